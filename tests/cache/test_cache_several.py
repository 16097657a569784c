"""Several SAEs, on whatever layers, cached in one pass over the model: the bytes that each gives alone."""

import numpy as np
import pytest
import torch
from models import dense, make, noise
from PIL import Image

from lmm_sae_nb.cache import activations, encode_images
from lmm_sae_nb.cache.activations import cache_activations, cache_several
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE, TrainedOn
from lmm_sae_nb.train.evaluate import evaluate_sae

SETTINGS = {"n_top": 3, "batch_size": 2, "store": "float16"}


def saes(lmm) -> dict[str, tuple[TopKSAE, int]]:
    """Two on one layer, one on another; no two alike in size."""
    sizes = {"low": (24, 3, 0), "wide": (40, 2, 0), "high": (16, 4, 2)}
    return {
        name: (TopKSAE(lmm.width, n_latents, k, generator=torch.Generator().manual_seed(n_latents)), layer)
        for name, (n_latents, k, layer) in sizes.items()
    }


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((192, 192)) for _ in range(7)]


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("family", ["picture_world", "instructblip"])
def test_each_cache_is_that_of_its_sae_alone(family, pictures, tmp_path):
    lmm = LMM(*make(family))
    found = cache_several(lmm, saes(lmm), pictures, folder=tmp_path / "several", **SETTINGS)
    for name, (sae, layer) in saes(lmm).items():
        cache_activations(SAEInPlace(lmm, sae, layer), pictures, folder=tmp_path / name, **SETTINGS)
        assert contents(tmp_path / "several" / name) == contents(tmp_path / name)
        assert (found[name].layer, found[name].n_latents) == (layer, sae.n_latents)
    assert not list(tmp_path.rglob(".partial"))


def test_the_model_runs_once_for_all_and_a_pass_goes_on_for_those_that_are_behind(pictures, tmp_path, monkeypatch):
    lmm, asked, encode = LMM(*make("picture_world")), [], encode_images._encode

    def stopping(lmm, studied, batch):
        if len(asked) == 2:
            asked.append(None)
            raise KeyboardInterrupt
        asked.append((batch.number, sorted(studied)))
        return encode(lmm, studied, batch)

    monkeypatch.setattr(activations, "_encode", stopping)
    studied = saes(lmm)
    with pytest.raises(KeyboardInterrupt):
        cache_several(lmm, {"low": studied["low"]}, pictures, folder=tmp_path / "several", save_every=0, **SETTINGS)
    cache_several(lmm, studied, pictures, folder=tmp_path / "several", **SETTINGS)
    behind = sorted({"wide", "high"})
    assert asked == [
        (0, ["low"]),
        (1, ["low"]),
        None,
        (0, behind),
        (1, behind),
        (2, sorted(studied)),
        (3, sorted(studied)),
    ]
    for name, (sae, layer) in studied.items():
        cache_activations(SAEInPlace(lmm, sae, layer), pictures, folder=tmp_path / name, **SETTINGS)
        assert contents(tmp_path / "several" / name) == contents(tmp_path / name)


def test_the_images_of_a_model_without_a_grid_are_ranked_by_the_mean_over_its_query_tokens(tmp_path):
    lmm = LMM(*make("instructblip"))
    images = [noise(seed=seed) for seed in range(5)]
    sae, layer = saes(lmm)["high"]
    cache = cache_activations(SAEInPlace(lmm, sae, layer), images, folder=tmp_path, **SETTINGS)
    means = []
    for image in images:
        prompt = lmm.prompt("", image)
        queries = lmm.hidden_states(prompt, layer)[0, prompt.spans[0].where("base")]
        assert len(queries) == 32
        means.append(dense(sae, queries).mean(0))
    means = torch.stack(means)
    for latent in range(sae.n_latents):
        best = sorted(range(5), key=lambda n: -means[n, latent])[:3]
        assert [number for number, _ in cache.top(latent)] == [n for n in best if means[n, latent] > 0]


def test_what_is_whole_is_not_made_again_and_what_differs_is(pictures, tmp_path, monkeypatch):
    lmm, asked, encode = LMM(*make("picture_world")), [], encode_images._encode

    def counted(lmm, studied, batch):
        asked.append(sorted(studied))
        return encode(lmm, studied, batch)

    monkeypatch.setattr(activations, "_encode", counted)
    studied = saes(lmm)
    cache_several(lmm, {"low": studied["low"]}, pictures, folder=tmp_path, **SETTINGS)
    before = contents(tmp_path / "low")
    found = cache_several(lmm, studied, pictures, folder=tmp_path, **SETTINGS)
    assert asked == [["low"]] * 4 + [["high", "wide"]] * 4 and list(found) == ["low", "wide", "high"]
    assert contents(tmp_path / "low") == before
    assert cache_several(lmm, studied, pictures, folder=tmp_path, **SETTINGS)["high"].n_latents == 16
    assert len(asked) == 8
    cache_several(lmm, studied, pictures, folder=tmp_path, **SETTINGS | {"n_top": 2})
    assert len(asked) == 12
    with monkeypatch.context() as patch:
        patch.setattr(activations, "code_fingerprints", lambda modules: {"cache.py": "another"})
        cache_several(lmm, studied, pictures, folder=tmp_path, **SETTINGS | {"n_top": 2})
    assert len(asked) == 16


def test_no_sae_at_all_is_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match="7 images, 0 SAEs"):
        cache_several(LMM(*make("picture_world")), {}, pictures, folder=tmp_path)


def test_a_layer_that_does_not_exist_is_refused_and_nothing_written(pictures, tmp_path):
    lmm = LMM(*make("picture_world"))
    sae, _ = saes(lmm)["low"]
    for call in (cache_activations, evaluate_sae):
        with pytest.raises(ValueError, match="no layer 3: .* has layers 0 to 2, 0-based"):
            rows = [{"image": picture, "question": "what ?", "answer": "that"} for picture in pictures[:1]]
            given, where = (pictures, {"folder": tmp_path}) if call is cache_activations else (rows, {})
            call(lmm, sae, given, 3, **where)
    assert not list(tmp_path.iterdir())


def test_an_sae_of_another_model_or_layer_is_refused(pictures, tmp_path):
    lmm = LMM(*make("picture_world"))
    sae, layer = saes(lmm)["low"]
    sae.trained_on = TrainedOn(layer, lmm.fingerprint(layer))
    other = LMM(*make("picture_world", seed=1))
    with pytest.raises(ValueError, match="was trained on layer 0, not 1; give that layer"):
        cache_activations(SAEInPlace(lmm, sae, 1), pictures, folder=tmp_path)
    with pytest.raises(ValueError, match="was trained on another model than .*load the one that it was trained on"):
        cache_activations(SAEInPlace(other, sae, 0), pictures, folder=tmp_path)
    rows = [{"image": pictures[0], "question": "what ?", "answer": "that"}]
    with pytest.raises(ValueError, match="was trained on another model"):
        evaluate_sae(SAEInPlace(other, sae, 0), rows)
