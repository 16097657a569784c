"""Detection scoring, against counting over pairs and choices by hand."""

from itertools import product

import numpy as np
import patchwork
import pytest
from labelled import CONCEPTS, GRID
from PIL import Image

from lmm_sae_nb.measures.detection_scoring import (
    accuracy_of_half,
    auroc,
    balanced_choice,
    detection_scoring,
    name_cosines,
)
from lmm_sae_nb.score.scores import Explained


def test_auroc_is_the_fraction_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    scores, active = rng.integers(0, 5, 30) / 4, rng.random(30) < 0.4
    pairs = list(product(scores[active], scores[~active]))
    expected = np.mean([1.0 if one > other else 0.5 if one == other else 0.0 for one, other in pairs])
    assert auroc(scores, active) == pytest.approx(expected)
    with pytest.raises(ValueError, match="0 silent"):
        auroc(scores, np.ones(30, bool))


def test_accuracy_of_half_is_the_mean_over_all_ways_to_break_ties():
    scores, active = np.array([0.9, 0.5, 0.5, 0.5, 0.1, 0.1]), np.array([True, True, False, True, False, False])
    ways = []
    for called in product([False, True], repeat=6):  # three are called active, none below one that is not
        called = np.array(called)
        if called.sum() == 3 and scores[called].min() >= scores[~called].max():
            ways.append((called == active).mean())
    assert accuracy_of_half(scores, active) == pytest.approx(np.mean(ways))
    assert accuracy_of_half(np.zeros(6), active) == 0.5


def test_active_images_come_from_all_quantiles_and_as_many_are_silent():
    acts = np.concatenate([np.arange(1, 101) / 10, np.zeros(50)])
    active, silent = balanced_choice(acts, 20, 5, np.random.default_rng(0))
    assert len(set(active)) == len(set(silent)) == 20
    assert (acts[silent] == 0).all()
    for part, highest in zip(active.reshape(5, 4), (10, 8, 6, 4, 2), strict=True):
        assert ((acts[part] > highest - 2) & (acts[part] <= highest)).all()
    assert balanced_choice(acts[:102], 20, 5, np.random.default_rng(0)) is None  # two are silent


def images_of(concepts: list[str]) -> list[dict[str, np.ndarray]]:
    """An image for each concept of kind object; it covers four patches."""
    grids = []
    for concept in concepts:
        grid = np.zeros(GRID, int)
        grid[:2, :2] = 1 + CONCEPTS["object"].index(concept)
        grids.append({"object": grid})
    return grids


@pytest.fixture(scope="module")
def scenes():
    """Sixty images of cats, dogs and hats; latent 0 fires on cats, 1 on dogs, 2 strongly on cats and weakly on hats."""
    shown = ["cat", "dog", "hat"] * 20
    dense = np.zeros((60, 36, 5))
    for n, concept in enumerate(shown):
        dense[n, 0, 0] = (concept == "cat") * (1 + n)
        dense[n, 1, 1] = (concept == "dog") * (1 + n)
        dense[n, 2, 2] = (concept == "cat") * (100 + n) + (concept == "hat") * (1 + n / 100)
        dense[n, 3, 3] = 1  # never silent
    return shown, patchwork.latents(dense), patchwork.maps(images_of(shown))


def test_a_judge_with_the_right_name_is_right_and_with_anothers_name_is_not(scenes):
    shown, latents, truth = scenes
    explained = {0: Explained("cat", "object"), 1: Explained("dog", "object"), 3: Explained("hat", "object")}
    cosines = {
        name: np.array([0.3 if name == each else 0.1 for each in shown], np.float32) for name in CONCEPTS["object"]
    }
    found = detection_scoring(latents, explained, truth, cosines, each=10)
    assert (found["detection_latents"], found["detection_left_out"]) == (2, 1)
    for name in ("detection_truth", "detection_truth_object", "detection_clip", "detection_clip_auroc"):
        assert found[name] == 1.0
    assert found["detection_truth_q5"] == found["detection_truth_rejects"] == 1.0
    assert found["detection_truth_shuffled"] < 0.5 and found["detection_clip_auroc_shuffled"] < 0.5


def test_a_name_that_fits_the_strongest_images_alone_gets_half_of_the_active_ones(scenes):
    """Latent 2 is a cat in its upper half: the quantiles show what an exemplar hides."""
    _, latents, truth = scenes
    explained = {0: Explained("cat", "object"), 2: Explained("cat", "object")}
    found = detection_scoring(latents, explained, truth, each=20, quantiles=4)
    assert found["detection_truth_q1"] == found["detection_truth_q2"] == 1.0
    assert found["detection_truth_q3"] == found["detection_truth_q4"] == 0.5  # latent 0 is a cat in all of them
    assert found["detection_truth"] == pytest.approx((1.0 + 0.75) / 2)
    assert "detection_clip" not in found


def test_what_cannot_be_scored_is_refused(scenes):
    _, latents, truth = scenes
    with pytest.raises(ValueError, match="cow: no concept"):
        detection_scoring(latents, {0: Explained("cow", "object")}, truth)
    with pytest.raises(ValueError, match="cat: no concept of the label maps, or without cosines"):
        detection_scoring(latents, {0: Explained("cat", "object")}, truth, {"dog": np.zeros(60, np.float32)})
    with pytest.raises(ValueError, match="of 1 latents with a name, 1 are active"):
        detection_scoring(latents, {0: Explained("cat", "object")}, truth)


def test_cosines_of_names_are_those_of_each_image():
    def similar(images, texts):
        return np.array([[image.width + len(text) for text in texts] for image in images]) / 100

    images = [Image.new("RGB", (side, 4)) for side in (3, 7)]
    found = name_cosines(similar, images, ["cat", "melon"])
    assert found["cat"] == pytest.approx([0.06, 0.1]) and found["melon"] == pytest.approx([0.08, 0.12])
