"""Pictures become RGB as a viewer would show them; unreadable ones are named; numbers are those of the source."""

import errno
import io
import os

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from lmm_sae_nb.support.images import (
    Chosen,
    Remembered,
    UnreadableImage,
    find_pictures,
    in_words,
    open_images,
    open_rgb,
    pixel_hash,
    rgb,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


def two_pixels() -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", (2, 1), RED)
    picture.putpixel((1, 0), BLUE)
    return picture


def stored(picture: Image.Image, form: str = "PNG", **settings) -> Image.Image:
    """Through a file, as a folder's pictures come."""
    held = io.BytesIO()
    picture.save(held, form, **settings)
    return open_rgb({"bytes": held.getvalue(), "path": None}, "it")


# What is in a file.


@pytest.mark.parametrize(
    "orientation, size, first",
    [(1, (2, 1), RED), (2, (2, 1), BLUE), (3, (2, 1), BLUE), (4, (2, 1), RED)]
    + [(5, (1, 2), RED), (6, (1, 2), RED), (7, (1, 2), BLUE), (8, (1, 2), BLUE)],
)
def test_a_rotated_photograph_becomes_upright(orientation, size, first):
    tag = Image.Exif()
    tag[0x0112] = orientation
    seen = stored(two_pixels(), exif=tag)
    assert (seen.size, seen.getpixel((0, 0))) == (size, first)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("orientation, quarters", [(6, -1), (8, 1)])
def test_a_turned_tiff_file_is_upright_by_its_name_and_by_its_bytes(tmp_path, mode, orientation, quarters):
    """Pillow 13.0 scrambles some modes of an uncompressed file that it opens by name."""
    tag = Image.Exif()
    tag[0x0112] = orientation
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)).convert(mode)
    picture.save(file := tmp_path / "a.tiff", exif=tag)
    upright = np.rot90(np.asarray(stored(picture, "TIFF")), quarters)
    for item in (file, {"bytes": file.read_bytes(), "path": None}, Image.open(file)):
        assert np.array_equal(np.asarray(open_rgb(item, "it")), upright)


@settings(deadline=None, max_examples=40)
@given(pixels=arrays.arrays(np.uint16, (3, 4)))
def test_sixteen_bit_grey_keeps_its_shades(pixels):
    seen = np.asarray(stored(Image.fromarray(pixels)))
    expected = np.floor(pixels / 257 + 0.5)
    assert (seen == expected[..., None]).all()


@settings(deadline=None, max_examples=40)
@given(pixels=arrays.arrays(np.uint8, (3, 4, 4)))
def test_transparent_pixels_become_white(pixels):
    seen = np.asarray(stored(Image.fromarray(pixels, "RGBA"))).astype(float)
    alpha = pixels[..., 3:] / 255
    assert np.abs(seen - (alpha * pixels[..., :3] + (1 - alpha) * 255)).max() <= 1


def test_transparency_of_palettes_and_of_grey_is_seen():
    palette = two_pixels().quantize(2)
    clear = palette.getpixel((0, 0))
    for form in ("PNG", "GIF"):
        seen = stored(palette, form, transparency=clear)
        assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), BLUE]
    assert stored(Image.new("LA", (1, 1), (10, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert stored(Image.new("L", (1, 1), 10), transparency=10).getpixel((0, 0)) == (255, 255, 255)
    assert stored(palette).getpixel((0, 0)) == RED


def test_print_colours_become_screen_colours():
    seen = stored(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF").getpixel((4, 4))
    assert seen == RED
    red, green, blue = stored(Image.new("CMYK", (8, 8), (255, 0, 255, 0)), "JPEG").getpixel((4, 4))
    assert green > 200 > 60 > max(red, blue)


def test_the_transparent_shade_of_sixteen_bit_grey_becomes_white():
    held = Image.fromarray(np.array([[0, 514, 65535]], np.uint16))
    held.info["transparency"] = 514
    assert np.asarray(rgb(held))[0, :, 0].tolist() == [0, 255, 255]


def test_a_plain_picture_is_not_copied_and_others_are_left_as_they_are():
    plain, clear = two_pixels(), Image.new("RGBA", (1, 1))
    assert rgb(plain) is plain
    assert rgb(clear).getpixel((0, 0)) == (255, 255, 255) and clear.mode == "RGBA"


def test_a_picture_outlives_the_closed_file_that_it_came_from(tmp_path):
    two_pixels().save(tmp_path / "a.png")
    seen = open_rgb(tmp_path / "a.png", "a")
    (tmp_path / "a.png").unlink()
    assert type(seen) is Image.Image and seen.crop((1, 0, 2, 1)).getpixel((0, 0)) == BLUE


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    for form in ("GIF", "WEBP", "PNG"):
        assert stored(frames[0], form, save_all=True, append_images=frames[1:], lossless=True).getpixel((0, 0)) == RED


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "La", "PA", "RGBX", "RGBa", "I", "I;16", "I;16B"],
)
def test_every_mode_becomes_rgb(mode):
    assert rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_pixels_of_unknown_range_or_none_are_refused():
    with pytest.raises(UnreadableImage, match="row 3 .*unknown range"):
        open_rgb(Image.new("F", (2, 2)), "row 3")
    with pytest.raises(UnreadableImage, match="row 3 .*integer pixels from -1 to 70,000"):
        open_rgb(Image.fromarray(np.array([[-1, 70_000]], np.int32)), "row 3")
    with pytest.raises(UnreadableImage, match="0 x 5 px"):
        open_rgb(Image.new("RGB", (0, 5)), "row 3")


# Where they come from.


def test_images_of_a_folder_in_order_of_names(tmp_path):
    (tmp_path / "deeper").mkdir()
    for n, name in enumerate(("b.png", "a.JPG", "deeper/c.webp")):
        Image.new("RGB", (8, 8), (n * 50, 0, 0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    found = open_images(tmp_path)
    assert [round(image.getpixel((0, 0))[0], -1) for image in found] == [50, 0, 100]
    before = found.identity
    assert open_images(str(tmp_path)).identity == before
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    assert open_images(tmp_path).identity != before


def test_links_are_followed_each_file_is_read_once_and_what_is_left_out_is_named(tmp_path):
    """Links to folders and files, in both directions and in a loop; hidden, foreign and special files."""
    pictures, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    for path in (pictures / "sub/b.png", elsewhere / "c.png", elsewhere / "more/d.png", tmp_path / "e.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        two_pixels().save(path)
    two_pixels().save(pictures / "z.png")
    two_pixels().save(pictures / ".hidden.png")
    (pictures / ".git").mkdir()
    two_pixels().save(pictures / ".git/x.png")
    (pictures / "notes.txt").write_text("no picture")
    os.mkfifo(pictures / "pipe.png")  # whoever opens it waits for ever
    (pictures / "a linked folder").symlink_to(elsewhere, target_is_directory=True)
    (pictures / "again").symlink_to(pictures / "sub", target_is_directory=True)
    (elsewhere / "loop").symlink_to(pictures, target_is_directory=True)
    (pictures / "f.png").symlink_to(tmp_path / "e.png")
    (pictures / "a.png").symlink_to(pictures / "z.png")  # the name that is no link comes first
    (pictures / "gone.png").symlink_to(tmp_path / "nowhere.png")
    files, left_out = find_pictures(pictures)
    names = [file.relative_to(pictures).as_posix() for file in files]
    assert names == ["a linked folder/c.png", "a linked folder/more/d.png", "f.png", "sub/b.png", "z.png"]
    assert left_out == {
        ".git": "hidden",
        ".hidden.png": "hidden",
        "a linked folder/loop": "a link to a folder that is read already",
        "a.png": "the same file as z.png",
        "again": "a link to a folder that is read already",
        "gone.png": "a link to nothing",
        "notes.txt": "no picture by its ending '.txt'",
        "pipe.png": "no regular file",
    }
    opened = open_images(pictures)
    assert len(opened) == 5 and opened.left_out == left_out and opened[2].size == (2, 1)
    assert in_words(left_out, 1) == "8 files or folders left out: .git (hidden), and 7 more"
    assert in_words({}) == "0 files or folders left out"


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n cut"])
def test_an_unreadable_file_is_named(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(UnreadableImage, match="broken.png") as fault:
        open_images(tmp_path)[0]
    assert fault.value.name.endswith("broken.png")


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(0, 200))
def test_a_file_cut_anywhere_is_read_or_named(cut):
    held = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(held, "PNG")
    try:
        assert open_rgb({"bytes": held.getvalue()[:cut], "path": "x.png"}, "row 0").size == (8, 8)
    except UnreadableImage as fault:
        assert "row 0 (x.png)" in str(fault)


def test_a_picture_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    Image.new("1", (64, 64)).save(tmp_path / "huge.png")
    for limit in (4095, 64):  # Pillow only warns of the first
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UnreadableImage, match="huge.png .*4,?096 pixels.*limit.*MAX_IMAGE.*unreadable: skip"):
            open_images(tmp_path)[0]
    for limit in (4096, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert open_images(tmp_path)[0].size == (64, 64)


def test_a_machine_at_its_limits_does_not_make_a_picture_unreadable(monkeypatch):
    for error in (MemoryError(), OSError(errno.EMFILE, "too many open files")):
        monkeypatch.setattr(Image, "open", lambda _, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            open_rgb("a.png", "a")


def test_pictures_with_the_same_numbers_and_another_palette_are_different():
    first, second = (Image.new("P", (1, 1)) for _ in range(2))
    first.putpalette([1, 2, 3])
    second.putpalette([4, 5, 6])
    assert pixel_hash(first) != pixel_hash(second)


def test_images_of_a_saved_data_set(tmp_path):
    Dataset.from_dict({"image": [Image.new("L", (4, 4), 7), None]}).save_to_disk(tmp_path)
    found = open_images(tmp_path)
    assert (len(found), found[0].mode, found[0].getpixel((0, 0))) == (2, "RGB", (7, 7, 7))
    assert found.identity == open_images(tmp_path).identity
    with pytest.raises(UnreadableImage, match="row 1 is not a readable image .it has no image"):
        found[1]
    with pytest.raises(IndexError, match="no image 2: there are 2"):
        found[2]


def test_remembered_pictures_are_kept_while_they_fit(tmp_path):
    for n in range(3):
        Image.new("L", (4, 4 + 4 * (n == 2)), n).save(tmp_path / f"{n}.png")
    pictures = Remembered(open_images(tmp_path), room=4 * 4 * 4)  # for one of the first two, not for the third
    assert len(pictures) == 3
    pictures[0].putpixel((0, 0), RED)  # into a copy
    (tmp_path / "0.png").write_bytes(b"no longer a picture")
    assert pictures[0].getpixel((0, 0)) == (0, 0, 0)
    assert pictures[2].getpixel((0, 0)) == (2, 2, 2) and pictures[0].getpixel((0, 0)) == (0, 0, 0)
    assert pictures[1].getpixel((0, 0)) == (1, 1, 1)  # and takes the place of the first
    with pytest.raises(UnreadableImage, match="0.png"):
        pictures[0]


def test_chosen_pictures_are_opened_one_by_one(tmp_path):
    for n in range(3):
        Image.new("L", (4, 4), n).save(tmp_path / f"{n}.png")
    chosen = Chosen(open_images(tmp_path), np.array([2, 0, 2]))
    (tmp_path / "1.png").write_bytes(b"never opened")
    assert len(chosen) == 3
    assert [picture.getpixel((0, 0))[0] for picture in chosen] == [2, 0, 2]
    assert [picture.getpixel((0, 0))[0] for picture in chosen[1:9]] == [0, 2]


def test_sources_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        open_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="picture"):
        open_images(Dataset.from_dict({"picture": [1]}))
    DatasetDict(train=Dataset.from_dict({"image": [Image.new("L", (4, 4))]})).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="splits train; give one"):
        open_images(tmp_path / "splits")
