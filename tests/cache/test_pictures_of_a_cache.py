"""A cache knows its pictures by their content: whatever changes in their folder, it is renewed or refused."""

import os
import shutil

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from PIL import Image

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.interpret.exemplars import ExemplarsByLatent, exemplars
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.support.images import Remembered, open_images


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((48, 48), Image.Resampling.NEAREST)


@pytest.fixture
def folder(tmp_path):
    """A folder whose name has a space and an accent, with three pictures of one size."""
    folder = tmp_path / "my pictures, é"
    folder.mkdir()
    for n in range(3):
        noise(n).save(folder / f"{n}1.bmp")
    return folder


@pytest.fixture
def cached(lmm, sae, folder, tmp_path):
    place = SAEInPlace(lmm, sae, 0)
    return lambda images: cache_activations(place, images, n_top=2, folder=tmp_path / "cache")


def edited(folder):
    """Another picture in a file of the same size and time."""
    file = folder / "11.bmp"
    before = file.stat()
    noise(9).save(file)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def reordered(folder):
    """The same three contents under each other's names."""
    (folder / "01.bmp").rename(folder / "x")
    (folder / "11.bmp").rename(folder / "01.bmp")
    (folder / "x").rename(folder / "11.bmp")


CHANGES = {
    "added at the end": lambda folder: noise(5).save(folder / "91.bmp"),
    "added before the others": lambda folder: noise(5).save(folder / "00.bmp"),
    "removed": lambda folder: (folder / "11.bmp").unlink(),
    "renamed": lambda folder: (folder / "01.bmp").rename(folder / "99.bmp"),
    "edited": edited,
    "reordered": reordered,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_in_the_folder_renews_the_cache_and_until_then_it_is_refused(folder, cached, change):
    cache = cached(open_images(folder))
    exemplars(cache, open_images(folder), 0)
    change(folder)
    now = open_images(folder)
    for read in (
        lambda: exemplars(cache, now, 0),
        lambda: ExemplarsByLatent(cache, now),
        lambda: ExemplarsByLatent(cache, Remembered(now)),
    ):
        with pytest.raises(ValueError, match=f"is of other pictures than.*my pictures, é.*3 then, {len(now)} now"):
            read()
    renewed = cached(now)
    assert renewed.images == len(now)
    for latent in range(renewed.n_latents):
        for rank, (number, mean) in enumerate(renewed.top(latent)):
            shown = exemplars(renewed, now, latent)[rank]
            assert (shown.image_index, shown.image.tobytes()) == (number, now[number].tobytes())
            assert float(renewed.patch_map(latent, rank).mean()) == pytest.approx(mean, rel=1e-2)


def test_the_same_pictures_at_another_place_and_time_are_accepted(folder, cached, tmp_path):
    cache = cached(open_images(folder))
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    exemplars(cache, open_images(tmp_path / "copy"), 0)
    exemplars(cache, Remembered(open_images(folder)), 0)
    written = (tmp_path / "cache" / "cache.json").stat().st_mtime_ns
    cached(open_images(tmp_path / "copy"))
    assert (tmp_path / "cache" / "cache.json").stat().st_mtime_ns == written  # nothing was made again


def test_a_data_set_is_known_by_what_it_holds(cached, tmp_path, folder):
    Dataset.from_dict({"image": [noise(n) for n in range(3)]}).save_to_disk(tmp_path / "one")
    Dataset.from_dict({"image": [noise(n) for n in (0, 7, 2)]}).save_to_disk(tmp_path / "two")
    cache = cached(open_images(tmp_path / "one"))
    exemplars(cache, open_images(tmp_path / "one"), 0)
    exemplars(cache, open_images(load_from_disk(tmp_path / "one")), 0)
    with pytest.raises(ValueError, match="is of other pictures"):
        exemplars(cache, open_images(tmp_path / "two"), 0)
    with pytest.raises(ValueError, match="is of other pictures"):
        exemplars(cache, open_images(tmp_path / "one").first(2), 0)

    named = Dataset.from_dict({"image": [str(folder / f"{n}1.bmp") for n in range(3)]})  # it holds names alone
    cache = cached(open_images(named))
    edited(folder)
    with pytest.raises(ValueError, match="is of other pictures"):
        exemplars(cache, open_images(named), 0)


def test_a_list_that_changes_in_the_middle_is_cached_anew(cached):
    pictures = [noise(n) for n in range(3)]
    before = cached(pictures).top_means
    pictures[1] = noise(7)
    assert not np.array_equal(cached(pictures).top_means, before)


def test_images_that_can_be_read_are_all_but_the_skipped_ones(lmm, sae, folder, tmp_path):
    (folder / "11.bmp").write_bytes(b"")
    place = SAEInPlace(lmm, sae, 0)
    cache = cache_activations(place, open_images(folder), unreadable="skip", folder=tmp_path / "cache")
    assert cache.readable.tolist() == [0, 2] and "11.bmp" in cache.skipped[1]
