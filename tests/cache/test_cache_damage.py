"""A missing, cut or flipped file of a cache is never returned as whole, and the next pass makes it again."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lmm_sae_nb.benchmarks.faults_world import CutImages, Stop
from lmm_sae_nb.cache.activations import cache_activations, cache_several
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.cache.resume import part_files, read_progress
from lmm_sae_nb.cache.texts import TextCache, cache_texts
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.files import temporary_name
from lmm_sae_nb.support.images import open_images
from lmm_sae_nb.support.locks import LOCK, FolderInUse, hold

SETTINGS = {"n_top": 2, "batch_size": 2, "store": "float16"}


@pytest.fixture(scope="module")
def place(lmm):
    return SAEInPlace(lmm, TopKSAE(lmm.width, 32, 4, generator=torch.Generator().manual_seed(1)), 0)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((192, 192)) for _ in range(5)]


@pytest.fixture(scope="module")
def whole(place, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmm_sae_nb.cache.sparse_store.FILE_BYTES", 6000)  # several files of the store
        cache_activations(place, pictures, **SETTINGS, folder=folder)
    assert len([*(folder / "store").iterdir()]) > 1
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "cache")
    return tmp_path / "cache"


def part(folder: Path) -> Path:
    return sorted((folder / "store").iterdir())[0]


FILES = {
    "cache.safetensors": lambda folder: folder / "cache.safetensors",
    "cache.json": lambda folder: folder / "cache.json",
    "a part of the store": part,
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


DAMAGE = {"gone": Path.unlink, "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]), "flipped": flip}


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_on_reading_and_made_again_by_the_pass(copy, whole, place, pictures, file, damage):
    path = file(copy)
    damage(path)
    if path.name != "cache.json":  # which is for people, and holds nothing that cache.safetensors does not
        with pytest.raises((FileNotFoundError, ValueError), match=r"(cache|store).*run notebooks/02_cache_activations"):
            LatentCache.load(copy).store.latents(0, 32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = cache_activations(place, pictures, **SETTINGS, folder=copy)
    assert any("the cache is made again: " in str(each.message) for each in caught) == (path.name != "cache.json")
    assert again.top(3) == LatentCache.load(whole).top(3)
    ours, theirs = (LatentCache.load(folder).store.latents(0, 32) for folder in (copy, whole))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for name in ("cache.safetensors", "cache.json", "key.json"):
        assert (copy / name).read_bytes() == (whole / name).read_bytes()


def test_a_store_of_another_cache_beside_it_is_refused(copy, whole):
    shutil.copy(part(copy), copy / "store" / "0000000099.safetensors")
    with pytest.raises(ValueError, match="the cache has 5: files are missing or of another cache; run"):
        LatentCache.load(copy).store.image(0)


def interrupted(place, pictures, folder: Path, monkeypatch) -> None:
    """A pass that stops after its second batch."""
    from lmm_sae_nb.cache import activations

    encode = activations.encode_batch

    def until(places, batch):
        if batch.number == 2:
            raise KeyboardInterrupt
        return encode(places, batch)

    with monkeypatch.context() as patch:
        patch.setattr("lmm_sae_nb.cache.sparse_store.FILE_BYTES", 6000)
        patch.setattr(activations, "encode_batch", until)
        with pytest.raises(KeyboardInterrupt):
            cache_activations(place, pictures, **SETTINGS, folder=folder, save_every=0)


@pytest.mark.parametrize("what", ["state", "store"])
def test_a_damaged_state_is_done_again_and_the_users_files_stay(place, pictures, whole, tmp_path, monkeypatch, what):
    interrupted(place, pictures, tmp_path, monkeypatch)
    (state,) = part_files(tmp_path / ".partial")
    assert read_progress(state)["batches"]
    flip(state if what == "state" else part(tmp_path / ".partial"))
    kept = [tmp_path / ".notes.tmp", tmp_path / "mine" / ".draft.0.tmp"]
    kept[1].parent.mkdir()
    for file in kept:
        file.touch()
    leftover = temporary_name(tmp_path / "cache.safetensors")
    leftover.touch()
    with pytest.warns(UserWarning, match="the images of 00000.safetensors are cached again: .* is damaged"):
        cache_activations(place, pictures, **SETTINGS, folder=tmp_path)
    assert (tmp_path / "cache.safetensors").read_bytes() == (whole / "cache.safetensors").read_bytes()
    assert all(file.exists() for file in kept)
    assert not leftover.exists()


def test_a_second_pass_into_a_folder_is_refused_and_a_whole_cache_is_not_held(copy, place, pictures, tmp_path):
    with hold(copy):
        cache_activations(place, pictures, **SETTINGS, folder=copy)
    (copy / LOCK).touch()  # as after a kill at the very end
    cache_activations(place, pictures, **SETTINGS, folder=copy)
    assert not (copy / LOCK).exists()
    with hold(tmp_path / "new"), pytest.raises(FolderInUse, match="another run holds .*new since"):
        cache_activations(place, pictures, **SETTINGS, folder=tmp_path / "new")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".hidden", "a\nb"])
def test_the_name_of_an_sae_stays_in_the_folder(place, pictures, tmp_path, name):
    with pytest.raises(ValueError, match="cannot name an SAE"):
        cache_several({name: place}, pictures, **SETTINGS, folder=tmp_path / "caches")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_end_the_pass(lmm, pictures, tmp_path, value):
    """One bad weight would make every token's activations NaN, and every latent look dead."""
    sae = TopKSAE(lmm.width, 32, 4, generator=torch.Generator().manual_seed(1))
    sae.W_enc.data[7, 0] = value
    with pytest.raises(ValueError, match="the SAE gives activations that are NaN or infinite: its weights"):
        cache_activations(SAEInPlace(lmm, sae, 0), pictures, **SETTINGS, folder=tmp_path)
    rows = [{"image": pictures[0], "question": "what ?", "answer": "a dog"}]
    with pytest.raises(ValueError, match="the SAE gives activations that are NaN or infinite"):
        cache_texts(SAEInPlace(lmm, sae, 0), rows, folder=tmp_path)


def test_no_room_is_said_in_units_that_fit(place, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("lmm_sae_nb.cache.activations.free_bytes", lambda _: 12_000)
    with pytest.raises(OSError, match=r"the cache needs up to [\d.]+ kB at .*, 12 kB are free: make room"):
        cache_activations(place, pictures, **SETTINGS, folder=tmp_path)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_cache_of_texts_is_made_once_and_again_if_damaged(place, tmp_path, damage, monkeypatch):
    rows = [{"image": None, "question": f"what is {n} ?", "answer": "a dog"} for n in range(3)]
    first = cache_texts(place, rows, folder=tmp_path)
    path = tmp_path / "texts.safetensors"
    written = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(type(place.lmm), "hidden_states", None)  # the model does not run
        assert cache_texts(place, rows, folder=tmp_path).top_words(1) == first.top_words(1)
    damage(path)
    with pytest.raises((FileNotFoundError, ValueError), match="texts.safetensors"):
        TextCache.load(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache_texts(place, rows, folder=tmp_path)
    assert path.read_bytes() == written
    assert cache_texts(place, rows[:2], folder=tmp_path).samples == 2


def test_converted_pictures_are_counted_once_also_in_a_pass_that_was_stopped(place, pictures, tmp_path):
    modes = ("RGB", "L", "RGBA", "P", "RGB")
    for number, (picture, mode) in enumerate(zip(pictures, modes, strict=True)):
        picture.convert(mode).save(tmp_path / f"{number}.png")
    images, settings = open_images(tmp_path), SETTINGS | {"save_every": 0.0}
    with pytest.raises(Stop):
        cache_activations(place, CutImages(images, 4), **settings, folder=tmp_path / "cache")
    assert read_progress(*part_files(tmp_path / "cache" / ".partial"))["converted"]["pictures"] > 0
    cache = cache_activations(place, images, **settings, folder=tmp_path / "cache")
    assert cache.converted == LatentCache.load(tmp_path / "cache").converted == {"pictures": 3, "colours": 3}
    assert cache_activations(place, pictures, **SETTINGS, folder=tmp_path / "plain").converted == {}
