"""Directions that detect concepts, against scikit-learn, SciPy and counting by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from labelled import CONCEPTS
from PIL import Image
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score

from lmm_sae_nb.controls.directions import (
    Detected,
    DetectionComparison,
    LabelledStates,
    auroc,
    best_threshold,
    compare_detectors,
    detection_baselines,
    direction_detection,
    f1,
    latent_detection,
    logistic_probes,
    mean_differences,
)
from lmm_sae_nb.support.intervals import mean_interval, proportion
from lmm_sae_nb.truth.detectors import choose_detectors
from lmm_sae_nb.truth.label_maps import LabelMaps

NAMES = [(kind, name) for kind, names in CONCEPTS.items() for name in names]


def patches(seed: int, images: int = 30, per_image: int = 20, width: int = 12) -> LabelledStates:
    """Random states; each concept adds its own direction, drawn once for all seeds, where it is shown."""
    rng = np.random.default_rng(seed)
    shows = rng.random((images * per_image, len(NAMES))) < 0.15
    own = np.random.default_rng(99).normal(size=(len(NAMES), width))
    states = rng.normal(size=(images * per_image, width)) + shows @ own + 3
    return LabelledStates(states.astype(np.float32), sparse.csc_array(shows.astype(np.float32)), NAMES, images)


def test_the_difference_of_means_is_that_of_two_groups_of_patches():
    made, concepts = patches(0), [4, 1]
    for vector, concept in zip(mean_differences(made, concepts), concepts, strict=True):
        there = made.shows.toarray()[:, concept] == 1
        expected = made.states[there].mean(0) - made.states[~there].mean(0)
        np.testing.assert_allclose(vector, expected, atol=1e-4)


def test_a_probe_is_scikit_learns_on_standardised_states():
    made = patches(1)
    there = made.there([2])[0]
    (vector,) = logistic_probes(made, [2], most=10_000, C=0.1, iterations=1_000)
    z = (made.states - made.states.mean(0)) / made.states.std(0)
    weights = LogisticRegression(C=0.1, class_weight="balanced", tol=1e-8, max_iter=1_000).fit(z, there).coef_[0]
    # with at most half of `most` patches of the concept nothing is left out here
    np.testing.assert_allclose(vector, weights / made.states.std(0), atol=5e-3)


def test_a_probe_is_fitted_on_so_many_patches_at_most(monkeypatch):
    made, seen = patches(1), []
    fit = LogisticRegression.fit
    monkeypatch.setattr(LogisticRegression, "fit", lambda self, x, y: (seen.append(y), fit(self, x, y))[1])
    logistic_probes(made, [0, 1], most=100)
    assert [(len(y), int(y.sum())) for y in seen] == [(100, 50)] * 2
    first, again, other = (logistic_probes(made, [0], most=100, seed=seed) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize("seed", range(5))
def test_auroc_and_f1_are_scikit_learns_with_ties(seed):
    rng = np.random.default_rng(seed)
    scores, there = rng.integers(0, 6, 200).astype(np.float32), rng.random(200) < 0.2
    assert auroc(scores, there) == pytest.approx(roc_auc_score(there, scores))
    assert f1(scores > 3, there) == pytest.approx(f1_score(there, scores > 3))
    limits = [-np.inf, *np.unique(scores)]
    best = max(f1_score(there, scores > limit) for limit in limits)
    assert f1_score(there, scores > best_threshold(scores, there)) == pytest.approx(best)


def test_an_auroc_or_a_threshold_needs_patches_of_the_concept():
    scores = np.zeros(3, np.float32)
    for there in (np.zeros(3, bool), np.ones(3, bool)):
        with pytest.raises(ValueError, match="give patches with and without it"):
            auroc(scores, there)
    with pytest.raises(ValueError, match="none of 3 patches"):
        best_threshold(scores, np.zeros(3, bool))
    assert f1(np.zeros(3, bool), np.zeros(3, bool)) == 0


def test_concepts_count_the_images_that_show_them():
    made = patches(2, images=6, per_image=3)
    by_image = made.shows.toarray().reshape(6, 3, -1).any(1).sum(0)
    assert made.scenes.tolist() == by_image.tolist()


def test_a_concept_without_enough_scenes_is_named():
    made = patches(2, images=6, per_image=3)
    shows = made.shows.toarray()
    shows[:, 3] = 0
    shows[4, 3] = 1  # one image shows cats
    few = replace(made, shows=sparse.csc_array(shows))
    for fit in (mean_differences, logistic_probes):
        with pytest.raises(ValueError, match=r"fewer than 2 of 6 images show dog \(1\); leave these concepts out"):
            fit(few, [0, 3], 2)
        with pytest.raises(ValueError, match="give more images"):
            fit(few, [], 2)


def test_other_maps_exchange_the_labels_of_whole_images():
    made = patches(3, images=6, per_image=4)
    other, shows = made.with_other_maps(), made.shows.toarray().reshape(6, 4, -1)
    expected = np.stack([shows[(n - 3) % 6] for n in range(6)]).reshape(24, -1)
    assert (other.shows.toarray() == expected).all() and other.states is made.states


@pytest.mark.slow
def test_thresholds_are_chosen_on_the_cached_patches_alone():
    cached, heldout, concepts = patches(4), patches(5), [6, 0, 2]
    directions = mean_differences(cached, concepts)
    for found, vector, concept in zip(
        direction_detection(directions, concepts, cached, heldout), directions, concepts, strict=True
    ):
        seen, unseen = cached.states @ vector, heldout.states @ vector
        there = cached.shows.toarray()[:, concept] == 1
        limit = max(np.unique(seen), key=lambda value: f1_score(there, seen >= value))
        measured = heldout.shows.toarray()[:, concept] == 1
        assert (found.kind, found.concept) == NAMES[concept]
        assert found.f1 == pytest.approx(f1_score(measured, unseen >= limit), abs=1e-6)
        assert found.auroc == pytest.approx(roc_auc_score(measured, unseen), abs=1e-6)


def test_labelled_states_are_the_layers_output_at_the_base_patches(studied):
    (place, *_), images, rows = studied
    truth = LabelMaps(rows, CONCEPTS)
    made = LabelledStates.read(place.lmm, 1, images, truth)
    for n, image in enumerate(images):
        prompt = place.lmm.prompt("", image)
        expected = place.lmm.hidden_states(prompt, 1)[prompt.mask("base")]
        np.testing.assert_allclose(made.states[144 * n : 144 * (n + 1)], expected.numpy(), atol=2e-4)
        there = truth.coverage(n, (12, 12)) >= 0.25
        assert (there == made.shows.toarray()[144 * n : 144 * (n + 1)].T).all()


@pytest.mark.parametrize("other_maps", [False, True])
def test_the_best_latent_of_a_concept_is_measured_on_other_images(studied, other_maps):
    (place, cache, *_), images, rows = studied
    truth, unseen = LabelMaps(rows, CONCEPTS), LabelMaps(rows[::-1], CONCEPTS)
    heldout = LabelledStates.read(place.lmm, 1, images[:5], unseen)
    heldout = heldout.with_other_maps() if other_maps else heldout
    best = choose_detectors(cache, truth, other_maps=other_maps, best=1)
    x = torch.from_numpy(heldout.states)
    z = torch.relu((x - place.sae.b_dec) @ place.sae.W_enc.T + place.sae.b_enc)
    kept = z.topk(4)
    acts = torch.zeros_like(z).scatter(1, kept.indices, kept.values).detach().numpy()
    found = latent_detection(place.sae, cache, truth, heldout, range(7), other_maps=other_maps)
    assert [(row.kind, row.concept) for row in found] == NAMES
    for n, row in enumerate(found):
        (chosen,) = [each for each in best if (each.kind, each.concept) == NAMES[n]]
        there = heldout.shows.toarray()[:, n] == 1
        assert row.auroc == pytest.approx(roc_auc_score(there, acts[:, chosen.latent]), abs=1e-4)
        assert row.f1 == pytest.approx(f1_score(there, acts[:, chosen.latent] > chosen.threshold), abs=1e-3)


def test_a_concept_that_too_few_cached_scenes_show_counts_as_not_detected(studied):
    (place, cache, *_), images, rows = studied
    empty = Image.fromarray(np.zeros((192, 192), np.uint8))
    blank = [row | {"scene": empty} for row in rows]
    truth, unseen = LabelMaps(blank, CONCEPTS), LabelMaps(rows, CONCEPTS)
    cached = LabelledStates.read(place.lmm, 1, images, truth)
    heldout = LabelledStates.read(place.lmm, 1, images[:4], unseen)
    found = compare_detectors(studied[0], truth, cached, heldout, least=8, most=300)
    for rows_of in (found.methods, found.by_chance):
        assert rows_of.keys() == {"difference", "probe", "latent"}
        for method in rows_of.values():
            assert [(row.kind, row.concept) for row in method] == NAMES
            assert {(row.auroc, row.f1) for row in method if row.kind == "scene"} == {(0.5, 0.0)}
    with pytest.raises(ValueError, match="no concept is shown by 9 of 8 images"):
        compare_detectors(studied[0], truth, cached, heldout, least=9)
    none = replace(heldout, shows=sparse.csc_array(heldout.shows.shape))
    with pytest.raises(ValueError, match="the held-out images show no concept"):
        compare_detectors(studied[0], truth, cached, none)
    metrics = detection_baselines(studied[0], images, truth, images[:4], unseen, least=8, most=300)
    assert metrics == found.metrics


def test_detection_metrics_are_means_over_concepts_beside_the_best_latent():
    def rows(*values: float) -> list[Detected]:
        return [Detected(*name, value, value) for name, value in zip(NAMES[1:5], values, strict=True)]

    methods = {"difference": rows(0.9, 0.6, 0.4, 0.8), "probe": rows(1, 1, 1, 1), "latent": rows(0.8, 0.5, 0.6, 0.1)}
    chance = {name: rows(0.1, 0.2, 0.3, 0.4) for name in methods}
    metrics = DetectionComparison(methods, chance).metrics
    assert metrics["detection_concepts"] == 4 and metrics["difference_detected"] == 0.75
    assert metrics["difference_detected_low"] == proportion([True, True, False, True]).low
    assert metrics["latent_detected"] == 0.5  # 0.5 is not above the limit
    assert metrics["difference_f1"] == pytest.approx(0.675)
    assert metrics["difference_f1_high"] == mean_interval([0.9, 0.6, 0.4, 0.8]).high
    assert metrics["difference_f1_above_latent"] == pytest.approx(0.175)
    low = mean_interval([0.1, -0.2, 0.7]).low
    assert metrics["difference_f1_above_latent_object_low"] == pytest.approx(low)
    assert metrics["probe_auroc_object"] == 1 and metrics["probe_auroc_scene"] == 1
    assert metrics["latent_by_chance_auroc"] == 0.25 and metrics["latent_by_chance_detected"] == 0
    assert "latent_f1_above_latent" not in metrics and "probe_auroc_scene_low" not in metrics
