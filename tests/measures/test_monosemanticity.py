"""The monosemanticity score, against the double sum over all pairs of images."""

import numpy as np
import patchwork
import pytest

from lmm_sae_nb.measures.monosemanticity import concept_vectors, monosemanticity, monosemanticity_scores
from lmm_sae_nb.score.scores import Explained


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def by_pairs(acts: np.ndarray, vectors: np.ndarray) -> float:
    """The definition: every pair of images once, weighted by the product of its activations."""
    above = below = 0.0
    for n in range(len(acts)):
        for m in range(n + 1, len(acts)):
            above += acts[n] * acts[m] * float(vectors[n] @ vectors[m])
            below += acts[n] * acts[m]
    return above / below


def test_one_pass_gives_the_sum_over_all_pairs():
    rng = np.random.default_rng(0)
    acts, vectors = rng.random((9, 4)) * (rng.random((9, 4)) < 0.7), unit(rng.standard_normal((9, 5)))
    acts[:2, :] = 0.5  # each latent has at least two images
    expected = [by_pairs(acts[:, n], vectors) for n in range(4)]
    assert monosemanticity_scores(acts, vectors) == pytest.approx(expected)


def test_a_latent_of_equal_images_scores_one_and_one_of_a_single_image_has_no_score():
    vectors = np.array([[1.0, 0], [1, 0], [0, 1]])
    acts = np.array([[2.0, 0, 3], [1, 0, 0], [0, 5, 1]])
    same, alone, different = monosemanticity_scores(acts, vectors)
    assert same == pytest.approx(1) and np.isnan(alone) and different == pytest.approx(0)


def test_true_vectors_are_the_covered_fractions_of_length_one():
    truth = patchwork.maps(patchwork.random_grids(np.random.default_rng(1), 3))
    found = concept_vectors(truth, 3, (6, 6))
    covered = np.array([[np.mean(np.asarray(truth(range(3), name)[n])) for _, name in truth.names] for n in range(3)])
    assert found == pytest.approx(unit(covered), abs=1e-6)


def test_latents_of_one_concept_score_above_their_shuffled_activations():
    """Each latent is active on the images of one of three concepts, so its score is 1; shuffled, about a third."""
    concept = np.repeat([0, 1, 2], 20)
    dense = np.zeros((60, 36, 4))
    dense[:, 3, :3] = np.eye(3)[concept]
    latents, vectors = patchwork.latents(dense), np.eye(3)[concept]
    explained = {0: Explained("cat", "object"), 1: Explained("dog", "object"), 2: Explained("sea", "scene")}
    for pool in ("mean", "max"):
        found = monosemanticity(latents, {"true": vectors}, explained, pool=pool)
        assert found["monosemanticity_latents"] == 3  # the fourth is dead
        assert found["monosemanticity_true"] == pytest.approx(1)
        assert found["monosemanticity_true_object_low"] == pytest.approx(1)
        assert found["monosemanticity_true_shuffled_high"] < 0.5
        assert "monosemanticity_true_scene" not in found  # one latent has no interval


@pytest.mark.parametrize(
    "dense, rows, pool, message",
    [
        (np.ones((2, 36, 3)), 2, "sum", "pool is 'sum'"),
        (np.ones((2, 36, 3)), 3, "mean", "3 true_vectors and 2 images"),
        (np.zeros((2, 36, 3)), 2, "mean", "0 latents are active on two or more of 2 images"),
    ],
)
def test_what_cannot_be_scored_is_refused(dense, rows, pool, message):
    with pytest.raises(ValueError, match=message):
        monosemanticity(patchwork.latents(dense), {"true": np.eye(3)[:rows]}, pool=pool)
