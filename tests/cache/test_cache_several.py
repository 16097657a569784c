"""Several SAEs, on whatever layers, cached in one pass over the model: the bytes that each gives alone."""

import numpy as np
import pytest
import torch
from models import dense, make, noise
from PIL import Image

from lmm_sae_nb.cache import activations
from lmm_sae_nb.cache.activations import cache_activations, cache_several
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE

SETTINGS = {"n_top": 3, "batch_size": 2, "store": "float16"}


def in_places(lmm) -> dict[str, SAEInPlace]:
    """Two on one layer, one on another; no two alike in size."""
    sizes = {"low": (24, 3, 0), "wide": (40, 2, 0), "high": (16, 4, 2)}
    places = {}
    for name, (n_latents, k, layer) in sizes.items():
        generator = torch.Generator().manual_seed(n_latents)
        places[name] = SAEInPlace(lmm, TopKSAE(lmm.width, n_latents, k, generator=generator), layer)
    return places


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((192, 192)) for _ in range(7)]


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["picture_world", "instructblip"])
def test_each_cache_is_that_of_its_sae_alone(family, pictures, tmp_path):
    lmm = LMM(*make(family))
    found = cache_several(in_places(lmm), pictures, folder=tmp_path / "several", **SETTINGS)
    for name, place in in_places(lmm).items():
        cache_activations(place, pictures, folder=tmp_path / name, **SETTINGS)
        assert contents(tmp_path / "several" / name) == contents(tmp_path / name)
        assert (found[name].layer, found[name].n_latents) == (place.layer, place.sae.n_latents)
    assert not list(tmp_path.rglob(".partial"))


@pytest.mark.slow
def test_the_model_runs_once_for_all_and_a_pass_goes_on_for_those_that_are_behind(pictures, tmp_path, monkeypatch):
    lmm, asked, encode = LMM(*make("picture_world")), [], activations.encode_batch

    def stopping(places, batch):
        if len(asked) == 2:
            asked.append(None)
            raise KeyboardInterrupt
        asked.append((batch.number, sorted(places)))
        return encode(places, batch)

    monkeypatch.setattr(activations, "encode_batch", stopping)
    places = in_places(lmm)
    with pytest.raises(KeyboardInterrupt):
        cache_several({"low": places["low"]}, pictures, folder=tmp_path / "several", save_every=0, **SETTINGS)
    cache_several(places, pictures, folder=tmp_path / "several", **SETTINGS)
    behind = sorted({"wide", "high"})
    assert asked == [
        (0, ["low"]),
        (1, ["low"]),
        None,
        (0, behind),
        (1, behind),
        (2, sorted(places)),
        (3, sorted(places)),
    ]
    for name, place in places.items():
        cache_activations(place, pictures, folder=tmp_path / name, **SETTINGS)
        assert contents(tmp_path / "several" / name) == contents(tmp_path / name)


def test_the_images_of_a_model_without_a_grid_are_ranked_by_the_mean_over_its_query_tokens(tmp_path):
    lmm = LMM(*make("instructblip"))
    images = [noise(seed=seed) for seed in range(5)]
    place = in_places(lmm)["high"]
    cache = cache_activations(place, images, folder=tmp_path, **SETTINGS)
    means = []
    for image in images:
        prompt = lmm.prompt("", image)
        queries = lmm.hidden_states(prompt, place.layer)[0, prompt.spans[0].where("base")]
        assert len(queries) == 32
        means.append(dense(place.sae, queries).mean(0))
    means = torch.stack(means)
    for latent in range(place.sae.n_latents):
        best = sorted(range(5), key=lambda n: -means[n, latent])[:3]
        assert [number for number, _ in cache.top(latent)] == [n for n in best if means[n, latent] > 0]


@pytest.mark.slow
def test_what_is_whole_is_not_made_again_and_what_differs_is(pictures, tmp_path, monkeypatch):
    lmm, asked, encode = LMM(*make("picture_world")), [], activations.encode_batch

    def counted(places, batch):
        asked.append(sorted(places))
        return encode(places, batch)

    monkeypatch.setattr(activations, "encode_batch", counted)
    places = in_places(lmm)
    cache_several({"low": places["low"]}, pictures, folder=tmp_path, **SETTINGS)
    before = contents(tmp_path / "low")
    found = cache_several(places, pictures, folder=tmp_path, **SETTINGS)
    assert asked == [["low"]] * 4 + [["high", "wide"]] * 4 and list(found) == ["low", "wide", "high"]
    assert contents(tmp_path / "low") == before
    assert cache_several(places, pictures, folder=tmp_path, **SETTINGS)["high"].n_latents == 16
    assert len(asked) == 8
    cache_several(places, pictures, folder=tmp_path, **SETTINGS | {"n_top": 2})
    assert len(asked) == 12
    with monkeypatch.context() as patch:
        patch.setattr(activations, "code_fingerprints", lambda modules: {"cache.py": "another"})
        cache_several(places, pictures, folder=tmp_path, **SETTINGS | {"n_top": 2})
    assert len(asked) == 16


def test_no_sae_at_all_is_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match="7 images, 0 SAEs"):
        cache_several({}, pictures, folder=tmp_path)


def test_saes_of_two_models_are_refused(pictures, tmp_path):
    one, other = (in_places(LMM(*make("picture_world")))["low"] for _ in range(2))
    with pytest.raises(ValueError, match="the SAEs a, b are of several models"):
        cache_several({"a": one, "b": other}, pictures, folder=tmp_path)
    assert not list(tmp_path.iterdir())
