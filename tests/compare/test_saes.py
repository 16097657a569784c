"""SAEs of several sizes: their recipes, and one pass that trains and caches all of them."""

import numpy as np
import pytest
from models import make, noise

from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.compare.saes import names_by_size, size_recipes, train_and_cache
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.train.training import Recipe, train_sae

IMAGES = [noise(96, 96, seed=n) for n in range(4)]
SAMPLES = [{"image": image, "question": "what ?", "answer": "noise"} for image in IMAGES]
TRAINING = {"steps": 2, "batch_tokens": 64, "batch_samples": 2, "dead_after_tokens": 1000, "seed": 0}


def test_recipes_differ_from_the_middle_in_one_size():
    middle = Recipe(3, n_latents=512, k=16, lr=1e-3)
    recipes = size_recipes(middle, [256, 512], [8, 16, 32])
    assert recipes == {
        "n_256": Recipe(3, 256, 16, 1e-3),
        "k_8": Recipe(3, 512, 8, 1e-3),
        "k_32": Recipe(3, 512, 32, 1e-3),
    }


def test_sizes_are_found_in_order_and_other_layers_are_left_out():
    middle = Recipe(3, n_latents=512, k=16)
    recipes = {"low": Recipe(1, 512, 16), "middle": middle} | size_recipes(middle, [1024, 256], [8])
    assert list(names_by_size(recipes, middle, "n_latents").items()) == [
        (256, "n_256"),
        (512, "middle"),
        (1024, "n_1024"),
    ]
    assert list(names_by_size(recipes, middle, "k").items()) == [(8, "k_8"), (16, "middle")]


@pytest.fixture(scope="module")
def lmm() -> LMM:
    return LMM(*make("picture_world"))


@pytest.mark.slow
def test_all_are_trained_and_cached_and_the_second_call_runs_no_model(lmm, tmp_path, monkeypatch):
    recipes = {"low": Recipe(0, 24, 3), "high": Recipe(1, 32, 2)}
    studied = train_and_cache(lmm, recipes, SAMPLES, IMAGES, folder=tmp_path / "all", n_top=2, **TRAINING)
    for name, study in studied.items():
        assert (study.place.layer, study.place.sae.n_latents) == (recipes[name].layer, recipes[name].n_latents)
        assert (study.cache.layer, study.cache.n_top) == (recipes[name].layer, 2)
    alone = train_sae(lmm, SAMPLES, 1, n_latents=32, k=2, folder=tmp_path / "alone", **TRAINING).sae
    np.testing.assert_allclose(studied["high"].place.sae.W_dec, alone.W_dec.detach(), atol=1e-5)
    monkeypatch.setattr(LMM, "hidden_states", lambda *_: pytest.fail("the model ran again"))
    again = train_and_cache(lmm, recipes, SAMPLES, IMAGES, folder=tmp_path / "all", n_top=2, **TRAINING)
    for name, study in again.items():
        assert (study.place.sae.W_dec == studied[name].place.sae.W_dec).all()
        assert isinstance(study.cache, LatentCache)


def test_live_latents_come_in_random_order_and_silent_ones_do_not_come(lmm, tmp_path):
    study = train_and_cache(lmm, {"": Recipe(0, 64, 2)}, SAMPLES, IMAGES, folder=tmp_path, n_top=2, **TRAINING)[""]
    live = [latent for latent in range(64) if study.cache.max[latent] > 0]
    assert sorted(study.live_latents(0)) == live
    assert study.live_latents(0) == study.live_latents(0)
    assert len(live) < 4 or study.live_latents(0) != study.live_latents(1)
    exemplars = study.exemplars(IMAGES, n_top=1)[live[0]]
    assert [exemplar.image_index for exemplar in exemplars] == [study.cache.top(live[0])[0][0]]
