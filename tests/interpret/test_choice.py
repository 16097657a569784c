"""The latents that the explainer is asked about are those that the page's parameters say."""

import models
import numpy as np
import pytest
import torch
from models import noise

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.interpret.choice import choose_latents
from lmm_sae_nb.sae.in_place import SAEInPlace

PICTURES = [noise(12, 12, seed=n).resize((192, 192)) for n in range(4)]


@pytest.fixture(scope="module")
def place(lmm, sae):
    return SAEInPlace(lmm, sae, 0)


@pytest.fixture(scope="module")
def cache(place, tmp_path_factory):
    return cache_activations(place, PICTURES, n_top=2, folder=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def means(lmm, sae):
    """(images, latents): the mean activation over the base tokens, by eq. 1 from the whole prompt."""
    rows = []
    for picture in PICTURES:
        prompt = lmm.prompt("", picture)
        rows.append(models.dense(sae, lmm.hidden_states(prompt, 0)[0, prompt.spans[0].where("base")]).mean(0))
    return torch.stack(rows).detach().numpy()


def choose(cache, place, count, by, images=(), seed=0):
    asked = {"by": by, "images": list(images)}
    return choose_latents(cache, PICTURES, count, asked, seed=seed, load=lambda: place).tolist()


def highest(means, count):
    return sorted(np.argsort(-means, kind="stable")[: min(count, (means > 0).sum())].tolist())


def test_random_latents_are_live_and_depend_on_the_seed_alone(cache, place, means):
    live = np.flatnonzero(means.any(0)).tolist()
    few = [choose(cache, place, 5, "random", seed=seed) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2] and set(few[0]) < set(live) and len(set(few[0])) == 5
    assert choose(cache, place, 10**6, "random") == live


def test_the_most_active_have_the_highest_mean_over_all_images(cache, place, means):
    for count in (1, 5, 10**6):
        assert choose(cache, place, count, "most active") == highest(means.mean(0), count)


def test_latents_of_given_images_are_the_most_active_on_these_by_row_or_by_file(cache, place, means, tmp_path):
    file = tmp_path / "a picture.png"
    PICTURES[2].save(file)
    for images in ([2], [str(file)]):
        assert choose(cache, place, 5, "images", images) == highest(means[2], 5)
        assert choose(cache, place, 10**6, "images", images) == highest(means[2], 10**6)
    assert choose(cache, place, 6, "images", [0, str(file)]) == highest(means[[0, 2]].mean(0), 6)


@pytest.mark.parametrize(
    ("by", "images", "error", "message"),
    [
        ("best", [], ValueError, "chosen by 'best' .* choose 'random', 'most active' without images, or 'images'"),
        ("random", [1], ValueError, "with the images"),
        ("images", [], ValueError, "with numbers of cached images or files"),
        ("images", [4], IndexError, "no image 4: 4 were cached"),
        ("images", ["no/file.png"], FileNotFoundError, "no/file.png is no file"),
    ],
)
def test_a_choice_that_means_nothing_is_refused(cache, place, by, images, error, message):
    with pytest.raises(error, match=message):
        choose(cache, place, 5, by, images)
