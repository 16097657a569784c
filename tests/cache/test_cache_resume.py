"""A pass that is killed goes on where it was and ends with the same bytes; what is half done looks like nothing."""

import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import killed, started
from models import make
from PIL import Image

from lmm_sae_nb.cache import activations
from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.cache.resume import part_files, read_progress
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.files import temporary_name
from lmm_sae_nb.support.images import open_images

pytestmark = pytest.mark.slow

SETTINGS = {"n_top": 3, "batch_size": 2, "store": "float16", "unreadable": "skip"}


@pytest.fixture(scope="module")
def sae(lmm):
    return TopKSAE(lmm.width, 64, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of 16 pictures, two of them broken."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for number in range(16):
        pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((192, 192)).save(folder / f"{number:02d}.png")
    (folder / "05.png").write_bytes(b"")
    (folder / "11.png").write_bytes((folder / "10.png").read_bytes()[:99])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def batches(folder: Path) -> int:
    """How many are in the state on disk."""
    return sum(len(read_progress(path)["batches"]) for path in part_files(folder / ".partial"))


def cut_short(lmm, sae, images, folder: Path) -> None:
    """A pass that is killed as soon as it has saved something, however fast the machine is."""
    process, end = started(cache_activations, SAEInPlace(lmm, sae, 0), images, **SETTINGS, folder=folder, save_every=0)
    while not ((folder / ".partial").is_dir() and batches(folder)):
        assert process.is_alive(), "the pass ended before it was seen to save anything"
        time.sleep(0.001)
    process.kill()
    process.join()
    end.close()


@pytest.mark.usefixtures("unchecked")  # the check takes longer than the pass, and kills would come too early
def test_a_pass_killed_again_and_again_ends_with_the_same_bytes(lmm, sae, pictures, tmp_path, monkeypatch):
    """SIGKILL at random moments of passes that save their state after every batch, in the middle of a write too."""
    monkeypatch.setattr("lmm_sae_nb.cache.sparse_store.FILE_BYTES", 6000)  # a file of the store every few images
    images, folder = open_images(pictures), tmp_path / "cache"
    began = time.monotonic()
    cache_activations(SAEInPlace(lmm, sae, 0), images, **SETTINGS, folder=tmp_path / "whole", save_every=0)
    seconds, rng, done, kills = time.monotonic() - began, random.Random(0), [0], 0
    while kills < 20 or max(done) < 4:
        kills, seconds = kills + 1, seconds * 1.02  # the machine may have become slower
        arguments = (SAEInPlace(lmm, sae, 0), images)
        after = rng.uniform(0.05, 0.8) * seconds
        killed(after, cache_activations, *arguments, **SETTINGS, folder=folder, save_every=0)
        if (folder / ".partial" / "key.json").is_file():
            done.append(batches(folder))
        assert not (folder / "cache.json").exists() or LatentCache.load(folder).images == 14
        if (folder / "key.json").is_file():
            folder = tmp_path / f"cache{kills}"  # the pass came to its end: the next kills are of a new one
    (folder / ".partial").mkdir(parents=True, exist_ok=True)
    for half_written in map(temporary_name, (folder / "cache.safetensors", folder / ".partial" / "00000.safetensors")):
        half_written.write_bytes(b"cut")
    cache_activations(SAEInPlace(lmm, sae, 0), images, **SETTINGS, folder=folder)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_kill_at_each_write_changes_nothing(lmm, sae, pictures, tmp_path, monkeypatch):
    """Every rename of the pass in turn is the last thing that happens: a stop before it, and one after it."""
    monkeypatch.setattr("lmm_sae_nb.cache.sparse_store.FILE_BYTES", 6000)
    images = open_images(pictures)
    cache_activations(SAEInPlace(lmm, sae, 0), images, **SETTINGS, folder=tmp_path / "whole")
    expected, replace = contents(tmp_path / "whole"), Path.replace

    class Cut(BaseException):
        """As a kill: nothing but `finally` runs."""

    total, count = [], lambda self, target: total.append(target) or replace(self, target)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", count)
        cache_activations(SAEInPlace(lmm, sae, 0), images, **SETTINGS, folder=tmp_path / "counted", save_every=0)
    for after in (False, True):
        for stop_at in (1, 2, len(total) // 2, *range(len(total) - 4, len(total) + 1)):
            folder, writes = tmp_path / f"{stop_at}{after}", []

            def cut(self, target, stop_at=stop_at, after=after, writes=writes):
                writes.append(target)
                if len(writes) == stop_at and not after:
                    raise Cut
                replace(self, target)
                if len(writes) == stop_at:
                    raise Cut

            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", cut)
                try:
                    cache_activations(SAEInPlace(lmm, sae, 0), images, **SETTINGS, folder=folder, save_every=0)
                    raise AssertionError(f"write {stop_at} never came")
                except Cut:
                    pass
            cache_activations(SAEInPlace(lmm, sae, 0), images, **SETTINGS, folder=folder)
            assert contents(folder) == expected, (stop_at, after, writes)


def test_it_goes_on_where_it_was(lmm, sae, pictures, tmp_path, monkeypatch):
    """What is done is not done again."""
    images, seen, encode = open_images(pictures), [], activations.encode_batch

    def stop_in_the_middle(places, batch):
        if batch.number == 5 and 5 not in seen:
            seen.append(5)
            raise KeyboardInterrupt
        seen.append(batch.number)
        return encode(places, batch)

    monkeypatch.setattr(activations, "encode_batch", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        cache_activations(SAEInPlace(lmm, sae, 0), images, **SETTINGS, folder=tmp_path / "c", save_every=0)
    cache_activations(SAEInPlace(lmm, sae, 0), images, **SETTINGS, folder=tmp_path / "c")
    assert seen == [*range(5), 5, *range(5, 8)]


@pytest.mark.parametrize("changed", ["sae", "images", "n_top", "model"])
def test_another_pass_does_not_go_on_from_this_one(lmm, sae, pictures, tmp_path, changed):
    images, folder = open_images(pictures), tmp_path / "c"
    cut_short(lmm, sae, images, folder)
    given = {"place": SAEInPlace(lmm, sae, 0), "images": images, **SETTINGS}
    if changed == "sae":
        other = TopKSAE(lmm.width, 64, 4, generator=torch.Generator().manual_seed(2))
        given["place"] = SAEInPlace(lmm, other, 0)
    elif changed == "images":
        (pictures / "05.png").write_bytes((pictures / "06.png").read_bytes())
    elif changed == "model":
        given["place"] = SAEInPlace(LMM(*make("picture_world", seed=1)), sae, 0)
    else:
        given["n_top"] = 2
    cache_activations(**given, folder=folder)
    cache_activations(**given, folder=tmp_path / "fresh")
    assert contents(folder) == contents(tmp_path / "fresh")


def test_what_cannot_be_read_is_refused_or_skipped_by_name(lmm, sae, pictures, tmp_path):
    images = open_images(pictures)
    with pytest.raises(ValueError, match=r"05\.png is not a readable image"):
        cache_activations(SAEInPlace(lmm, sae, 0), images, **SETTINGS | {"unreadable": "refuse"}, folder=tmp_path / "c")
    cache = cache_activations(SAEInPlace(lmm, sae, 0), images, **SETTINGS, folder=tmp_path / "c")
    assert list(cache.skipped) == [5, 11]
    assert "05.png" in cache.skipped[5]
    assert "05.png" in (tmp_path / "c" / "cache.json").read_text()
    assert cache.images == 14
    assert not {5, 11} & set(cache.top_images.flatten().tolist())
    # Numbers are still those of the source.
    latent = int(cache.top_means[:, 0].argmax())
    alone = cache_activations(
        SAEInPlace(lmm, sae, 0),
        [images[int(cache.top_images[latent, 0])]],
        **SETTINGS | {"n_top": 1},
        folder=tmp_path / "one",
    )
    torch.testing.assert_close(alone.top_means[latent, 0], cache.top_means[latent, 0], rtol=1e-4, atol=1e-5)


def test_nothing_readable_is_refused(lmm, sae, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image could be read, 1 were skipped.*a\.png"):
        cache_activations(SAEInPlace(lmm, sae, 0), open_images(tmp_path / "p"), **SETTINGS, folder=tmp_path / "c")
