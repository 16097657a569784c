"""The cache is what sorting everything would give, of the hidden states that the model would give; read lazily."""

import ctypes
import platform
import re
from functools import partial
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make, noise, params
from PIL import Image
from trainings import run

from lmm_sae_nb.cache import activations as caching
from lmm_sae_nb.cache.activations import cache_activations, finish_pass
from lmm_sae_nb.cache.encode_images import activation_maps
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.cache.resume import PassPart
from lmm_sae_nb.cache.top_images import Ranking, firings, merged
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.token_kinds import NoPatchGrid
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import Latents, TopKSAE, TrainedOn


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((192, 192)) for _ in range(7)]


@pytest.fixture(scope="module")
def dense(lmm, sae, pictures):
    """(images, patches, latents), one whole prompt at a time, by eq. 1."""
    rows = []
    for picture in pictures:
        prompt = lmm.prompt("", picture)
        rows.append(models.dense(sae, lmm.hidden_states(prompt, 0)[0, prompt.spans[0].where("base")]))
    return torch.stack(rows)


# The ranking, against brute force.

PATCHES, K, N_LATENTS = 6, 2, 5


def some_latents(images: int, seed: int, coarse: bool) -> Latents:
    """Activations with ties (whole numbers) or without, some of them 0."""
    rng = torch.Generator().manual_seed(seed)
    acts = torch.rand(images, PATCHES, K, generator=rng)
    acts = (acts * 3).floor() if coarse else torch.where(acts > 0.3, acts, 0)
    indices = [torch.randperm(N_LATENTS, generator=rng)[:K] for _ in range(images * PATCHES)]
    return Latents(acts, torch.stack(indices).view(images, PATCHES, K))


def take_in(ranking: Ranking, latents: Latents, numbers: list[int]) -> None:
    for _, new in firings(Latents(*(part[numbers] for part in latents)), numbers):
        ranking.update(new)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(
    data=st.data(), images=st.integers(1, 12), n_top=st.integers(1, 4), seed=st.integers(0, 999), coarse=st.booleans()
)
def test_shards_and_batches_of_any_kind_give_what_sorting_everything_gives(data, images, n_top, seed, coarse):
    """Any partition among processes, any batch size, any order of batches, ties, free places."""
    latents = some_latents(images, seed, coarse)
    owners = data.draw(st.lists(st.integers(0, 2), min_size=images, max_size=images))
    rankings = []
    for owner in sorted(set(owners)):
        mine = [image for image in range(images) if owners[image] == owner]
        size = data.draw(st.integers(1, 5))
        batches = data.draw(st.permutations([mine[start : start + size] for start in range(0, len(mine), size)]))
        rankings.append(Ranking.empty(N_LATENTS, n_top, PATCHES))
        for batch in batches:
            take_in(rankings[-1], latents, batch)
    found = merged(data.draw(st.permutations(rankings))).ordered()

    dense = torch.zeros(images, PATCHES, N_LATENTS).scatter_add(-1, latents.indices, latents.acts).double().numpy()
    for latent in range(N_LATENTS):
        acts = dense[:, :, latent]
        means = [(np.float32(acts[i].sum() / PATCHES), i) for i in range(images)]
        best = sorted((row for row in means if row[0] > 0), key=lambda row: (-row[0], row[1]))[:n_top]
        free = n_top - len(best)
        assert found["top_images"][latent].tolist() == [i for _, i in best] + [-1] * free
        assert found["top_means"][latent].tolist() == [m for m, _ in best] + [0] * free
        np.testing.assert_array_equal(found["patches"][latent][: len(best)], acts[[i for _, i in best]].astype(np.half))
        assert not found["patches"][latent][len(best) :].any()
        assert found["fired"][latent] == (acts > 0).sum()
        assert found["max"][latent] == acts.max()
        np.testing.assert_allclose(found["mean"][latent], acts.sum() / max((acts > 0).sum(), 1), rtol=1e-6)

    alone = Ranking.empty(N_LATENTS, n_top, PATCHES)
    take_in(alone, latents, list(range(images)))
    for name, array in alone.ordered().items():
        assert array.tobytes() == found[name].tobytes(), name


def test_what_one_update_takes_in_is_bounded_and_changes_nothing(monkeypatch):
    latents, rankings = some_latents(9, 0, True), []
    for entries in (1, 2 * PATCHES * K, 10**6):
        monkeypatch.setattr("lmm_sae_nb.cache.top_images.ENTRIES", entries)
        parts = list(firings(latents, range(9)))
        assert max(len(new.acts) for _, new in parts) <= max(entries, PATCHES * K)
        rankings.append(Ranking.empty(N_LATENTS, 3, PATCHES))
        take_in(rankings[-1], latents, list(range(9)))
    first, *others = (ranking.ordered() for ranking in rankings)
    for other in others:
        assert all((first[name] == other[name]).all() for name in first)


def test_an_activation_beyond_float16_is_refused():
    latents = Latents(torch.full((1, PATCHES, K), 70000.0), torch.arange(K).expand(1, PATCHES, K))
    with pytest.raises(ValueError, match="7e.04 exceeds float16"):
        take_in(Ranking.empty(N_LATENTS, 2, PATCHES), latents, [0])


# The pass.


def test_the_pass_equals_one_image_at_a_time(lmm, sae, pictures, dense, tmp_path):
    cache = cache_activations(SAEInPlace(lmm, sae, 0), pictures, n_top=3, batch_size=2, folder=tmp_path)
    values, order = dense.mean(1).T.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(cache.top_means, values[:, :3], atol=1e-5, rtol=1e-4)
    fires = values[:, :3] > 0
    assert (cache.top_images[fires] == order[:, :3][fires]).all()
    assert (cache.top_images[~fires] == -1).all()
    torch.testing.assert_close(cache.frequency, (dense > 0).float().mean((0, 1)))
    torch.testing.assert_close(
        cache.mean, dense.sum((0, 1)) / (dense > 0).sum((0, 1)).clamp_min(1), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(cache.max, dense.amax((0, 1)), atol=1e-5, rtol=1e-4)
    assert (cache.live == (dense > 0).any(0).any(0)).all()
    latent = int(cache.frequency.argmax())
    image = int(cache.top_images[latent, 0])
    torch.testing.assert_close(cache.patch_map(latent, 0), dense[image, :, latent].view(lmm.grid), atol=1e-2, rtol=1e-2)
    assert (cache.images, cache.grid, cache.layer, cache.skipped) == (7, lmm.grid, 0, {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache.json", "cache.safetensors", "key.json"]
    maps = activation_maps(SAEInPlace(lmm, sae, 0), pictures, [latent, 0], batch_size=3)
    np.testing.assert_allclose(maps[image, 0], dense[image, :, latent].view(lmm.grid), atol=1e-4)
    np.testing.assert_allclose(maps[2, 1], dense[2, :, 0].view(lmm.grid), atol=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_that_prepare_images_change_no_byte(lmm, sae, pictures, tmp_path, workers):
    folders = {}
    for count in (1, workers):
        folders[count] = tmp_path / str(count)
        how = {"n_top": 3, "batch_size": 2, "store": "float32", "workers": count}
        cache_activations(SAEInPlace(lmm, sae, 0), pictures, folder=folders[count], **how)
    one, other = ({path.name: path.read_bytes() for path in each.rglob("*.safetensors")} for each in folders.values())
    assert one == other and len(one) == 2


@pytest.mark.parametrize("family", params())
def test_base_tokens_need_nothing_that_comes_behind_them(family):
    """What a decoder makes of a sequence cut after its last base token is what it makes of the whole."""
    lmm = LMM(*make(family))
    prompt = lmm.prompt(["", "a word"], [noise(100, 60), noise(60, 100, 1)])
    base = prompt.mask("base")
    last = int(base.any(0).nonzero().max()) + 1
    cut = lmm.hidden_states(prompt, 1, base_only=True)
    assert cut.shape[1] == last
    torch.testing.assert_close(cut[base[:, :last]], lmm.hidden_states(prompt, 1)[base], atol=1e-4, rtol=1e-4)


def test_a_cache_that_does_not_fit_the_disk_is_refused(lmm, sae, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda path: caching.shutil._ntuple_diskusage(10, 8, 2**16))
    with pytest.raises(OSError, match=r"needs up to [\d.]+ kB at .*, 65\.5 kB are free: make room, .*store=None"):
        cache_activations(SAEInPlace(lmm, sae, 0), pictures, n_top=5, folder=tmp_path)
    assert not (tmp_path / "cache.safetensors").exists()


def test_an_sae_of_another_width_is_refused(lmm, pictures, tmp_path):
    with pytest.raises(ValueError, match=f"width {lmm.width + 1}.*width {lmm.width}"):
        cache_activations(SAEInPlace(lmm, TopKSAE(lmm.width + 1, 8, 2), 0), pictures, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_sae_of_another_layer_or_model_is_refused(lmm, sae, pictures, tmp_path):
    trained = TopKSAE(sae.width, sae.n_latents, sae.k)
    trained.trained_on = TrainedOn(0, lmm.fingerprint(0))
    other = LMM(*make("picture_world", seed=7))

    def cache(lmm, layer):
        cache_activations(SAEInPlace(lmm, trained, layer), pictures, folder=tmp_path)

    with pytest.raises(ValueError, match="trained on layer 0, not 1; give that layer"):
        cache(lmm, 1)
    with pytest.raises(ValueError, match="trained on another model than .*: layer 0 had other weights"):
        cache(other, 0)
    with pytest.raises(ValueError, match="no layer 9: .* has layers 0 to 2"):
        cache(lmm, 9)
    assert not list(tmp_path.iterdir())


WRONG = {"n_top": 0}, {"batch_size": 0}, {"store": "bfloat16"}, {"unreadable": "ignore"}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: next(iter(wrong)))
def test_an_argument_that_means_nothing_is_refused(lmm, sae, pictures, tmp_path, wrong):
    with pytest.raises(ValueError, match="give at least one of each|unreadable is 'refuse' or 'skip'"):
        cache_activations(SAEInPlace(lmm, sae, 0), pictures, folder=tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_nothing_to_rank_is_refused(lmm, sae, tmp_path):
    with pytest.raises(ValueError, match="0 images"):
        cache_activations(SAEInPlace(lmm, sae, 0), [], folder=tmp_path)


@pytest.mark.slow
def test_images_of_different_sizes_are_refused(tmp_path):
    lmm = LMM(*make("qwen2_5_vl"))
    with pytest.raises(ValueError, match=r"images have \[\d+, \d+\] base tokens"):
        cache_activations(
            SAEInPlace(lmm, TopKSAE(lmm.width, 8, 2), 0), [noise(60, 60), noise(300, 60)], batch_size=1, folder=tmp_path
        )
    lmm.image_size = (112, 84)  # as the error says
    cache = cache_activations(
        SAEInPlace(lmm, TopKSAE(lmm.width, 8, 2), 0), [noise(60, 60), noise(300, 60)], folder=tmp_path
    )
    assert cache.patch_map(int(cache.frequency.argmax()), 0).shape == lmm.grid == (3, 4)


def test_a_model_without_a_grid_has_means_but_no_maps(tmp_path):
    lmm = LMM(*make("instructblip"))
    cache = cache_activations(SAEInPlace(lmm, TopKSAE(lmm.width, 8, 2), 0), [noise(), noise(seed=1)], folder=tmp_path)
    assert cache.grid is None
    assert cache.live.any()
    with pytest.raises(NoPatchGrid, match="mean activations"):
        cache.patch_map(0, 0)


# The store.


@pytest.mark.parametrize("value", ["float16", "float32"])
def test_the_store_holds_every_activation_by_image_and_by_latent(
    lmm, sae, pictures, dense, tmp_path, monkeypatch, value
):
    monkeypatch.setattr("lmm_sae_nb.cache.sparse_store.FILE_BYTES", 4000)  # several files
    cache = cache_activations(SAEInPlace(lmm, sae, 0), pictures, batch_size=2, folder=tmp_path, store=value)
    assert len(list((tmp_path / "store").iterdir())) > 1
    tolerance = {"atol": 1e-3, "rtol": 1e-2} if value == "float16" else {"atol": 1e-4, "rtol": 1e-4}
    for number in (0, 4, 6):
        entries, found = cache.store.image(number), np.zeros(dense.shape[1:])
        found[entries.patches, entries.latents] = entries.acts
        np.testing.assert_allclose(found, dense[number], **tolerance)
    entries, found = cache.store.latents(3, 11), np.zeros((7, dense.shape[1], 8))
    found[entries.images, entries.patches, entries.latents - 3] = entries.acts
    np.testing.assert_allclose(found, dense[:, :, 3:11], **tolerance)
    keys = list(zip(entries.latents, entries.images, entries.patches, strict=True))
    assert keys == sorted(keys)
    with pytest.raises(ValueError, match="image 7 is not stored"):
        cache.store.image(7)


def test_a_cache_without_a_store_says_how_to_make_one(lmm, sae, pictures, tmp_path):
    cache_activations(SAEInPlace(lmm, sae, 0), pictures[:2], folder=tmp_path, store="float16")
    assert (tmp_path / "store").is_dir()
    cache = cache_activations(SAEInPlace(lmm, sae, 0), pictures[:2], folder=tmp_path)
    assert not (tmp_path / "store").exists()
    with pytest.raises(FileNotFoundError, match="store='float16'"):
        _ = cache.store


# Reading.


def test_a_missing_or_foreign_cache_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="02_cache_activations"):
        LatentCache.load(tmp_path / "nowhere")
    (tmp_path / "cache.json").write_text("{}")
    (tmp_path / "cache.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cache.safetensors"):
        LatentCache.load(tmp_path)


# Memory, for real: in a process of its own, how far the highest resident size rises. It is one of a server that has
# done nothing: what malloc keeps of all that this process had and freed would be used again, and not be counted.


def resident(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def give_back_what_is_freed() -> None:
    """Return what is freed at once, whatever the environment says (the Makefile does): only what is held counts."""
    libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3
    for threshold in (trim_threshold, mmap_threshold):
        libc.mallopt(threshold, 2**17)
    libc.malloc_trim(0)


def run_on_made_up_latents(folder, n_latents, images, batch, n_top, patches, k) -> None:
    """Write the bytes that a whole pass but the model takes, saving its state after each batch."""
    give_back_what_is_freed()
    rng = torch.Generator().manual_seed(0)
    acts = torch.rand(batch, patches, k, generator=rng)
    first = torch.randint(n_latents, (batch, patches, 1), generator=rng)
    latents = Latents(acts, (first + torch.arange(k) * (n_latents // k)) % n_latents)
    Path("/proc/self/clear_refs").write_text("5")  # the highest size so far is forgotten
    before = resident("VmRSS")
    (folder / ".partial").mkdir(parents=True)
    (folder / ".partial" / "key.json").write_text("{}")
    part = PassPart(folder / ".partial" / "00000.safetensors", n_latents, n_top, "float16")
    for number, start in enumerate(range(0, images, batch)):
        part.add(number, list(range(start, start + batch)), {}, latents)
        part.save()
    part.save(last=True)
    del part
    finish_pass(folder, n_latents, n_top, "float16", {"grid": None, "layer": 0, "model": "made up"})
    (folder / "bytes").write_text(str(resident("VmHWM") - before))


def taken(folder, **sizes) -> int:
    assert run(partial(run_on_made_up_latents, folder, **sizes)) == 0
    return int((folder / "bytes").read_text())


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or platform.libc_ver()[0] != "glibc",
    reason="the system does not tell the peak of memory, or its C library cannot be told to return it",
)
def test_memory_is_bounded_by_the_places_whatever_the_images_and_the_batch(tmp_path):
    """The bound that `cache_activations` states; next to nothing more for more images, or for more in a batch."""
    sizes = {"n_latents": 8192, "images": 64, "batch": 64, "n_top": 10, "patches": 576, "k": 64}
    once = taken(tmp_path / "once", **sizes)
    assert 8192 * 10 * 2 * 576 < once < 8192 * 10 * (2 * 576 + 12) + 2**29
    assert taken(tmp_path / "images", **sizes | {"images": 192}) < 1.2 * once
    assert taken(tmp_path / "batch", **sizes | {"images": 256, "batch": 256}) < 1.2 * once
