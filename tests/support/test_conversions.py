"""What is done to a picture to make it 8-bit RGB is noted in it, whatever file it comes from, and counted once."""

import io

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lmm_sae_nb.support.conversions import (
    conversion_metrics,
    conversions,
    conversions_in_words,
    count_conversions,
    sum_conversions,
)
from lmm_sae_nb.support.images import open_rgb, rgb

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 4), dtype=np.uint8)
COLOURS = Image.fromarray(PIXELS[..., :3])


def encoded(picture: Image.Image, kind: str, **settings) -> dict:
    picture.save(buffer := io.BytesIO(), kind, **settings)
    return {"bytes": buffer.getvalue(), "path": None}


def turned(orientation: int) -> dict:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(COLOURS, "JPEG", exif=exif)


def with_text() -> dict:
    info = PngInfo()
    info.add_text("converted", "turned")
    return encoded(COLOURS, "PNG", pnginfo=info)


FRAMES = [Image.fromarray(PIXELS[..., n : n + 3]) for n in (0, 1)]
FILES = {
    "RGB": (encoded(COLOURS, "PNG"), ()),
    "upright": (turned(1), ()),
    "a text of the file": (with_text(), ()),
    "turned": (turned(6), ("turned",)),
    "16 bits": (encoded(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "PNG"), ("scaled",)),
    "transparent": (encoded(Image.fromarray(PIXELS), "PNG"), ("on_white",)),
    "opaque": (encoded(COLOURS.convert("RGBA"), "PNG"), ("colours",)),
    "grey": (encoded(COLOURS.convert("L"), "PNG"), ("colours",)),
    "palette": (encoded(COLOURS.convert("P"), "PNG"), ("colours",)),
    "CMYK": (encoded(COLOURS.convert("CMYK"), "JPEG"), ("colours",)),
    "frames": (encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), ("first_frame",)),
    "grey frames": (
        encoded(FRAMES[0].convert("L"), "TIFF", save_all=True, append_images=[FRAMES[1].convert("L")]),
        ("first_frame", "colours"),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_picture_knows_what_was_done_to_it(name):
    file, expected = FILES[name]
    opened = open_rgb(file, name)
    assert conversions(opened) == expected
    assert conversions(rgb(opened)) == conversions(rgb(opened.copy()).resize((3, 3))) == expected


def test_a_picture_of_the_caller_is_not_written_into():
    known = dict(COLOURS.info)
    assert rgb(COLOURS) is COLOURS and COLOURS.info == known


def test_counts_are_of_pictures_and_of_kinds_and_none_is_nothing():
    done = [expected for _, expected in FILES.values()]
    counts = count_conversions(done)
    assert counts == {"pictures": 9, "turned": 1, "first_frame": 2, "scaled": 1, "on_white": 1, "colours": 5}
    assert sum_conversions([counts, {}, count_conversions([("turned",)])]) == counts | {"pictures": 10, "turned": 2}
    assert conversion_metrics("cases", count_conversions([("colours",)])) == {
        "cases_converted": 1, "cases_converted_colours": 1,
    }  # fmt: skip
    assert conversions_in_words(count_conversions([("turned",)] * 1000)) == (
        "1,000 pictures converted to 8-bit RGB: 1,000 turned as the EXIF tag says"
    )
    assert count_conversions([(), ()]) == conversion_metrics("cases", {}) == sum_conversions([{}, {}]) == {}
    assert conversions_in_words({}) == ""
