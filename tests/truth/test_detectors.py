"""What latents detect, against dense activations and counting by hand."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from labelled import CONCEPTS
from PIL import Image
from scipy import sparse
from studied import make_study

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.cache.encode_images import base_latents
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.truth import detectors
from lmm_sae_nb.truth.detectors import Detection, Detector, choose_detectors, detect_concepts, measure_detectors
from lmm_sae_nb.truth.label_maps import LabelMaps


class Studied(NamedTuple):
    place: SAEInPlace
    images: list[Image.Image]
    truth: LabelMaps
    cache: LatentCache


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A real cache with its store, over 8 images with labels at random, of a small true model."""
    (place, cache, *_), images, rows = make_study(tmp_path_factory.mktemp("cache"), batch_size=3)
    return Studied(place, images, LabelMaps(rows, CONCEPTS), cache)


def dense(place: SAEInPlace, images) -> np.ndarray:
    """(images * patches, latents), one image's dense activations after the other."""
    parts = []
    for latents in base_latents(place, images):
        full = torch.zeros(*latents.acts.shape[:2], place.sae.n_latents)
        parts.append(full.scatter(-1, latents.indices.long(), latents.acts.float()).flatten(0, 1).numpy())
    return np.concatenate(parts)


def shows(studied: Studied, row: int, images: int = 8) -> np.ndarray:
    """(images * patches,): whether a patch shows the concept of this row."""
    grid = studied.place.lmm.grid
    return np.concatenate([studied.truth.coverage(n, grid)[row] for n in range(images)]) >= 0.25


def f1(fires: np.ndarray, there: np.ndarray) -> float:
    hits = (fires & there).sum()
    return 0.0 if not hits else 2 / (fires.sum() / hits + there.sum() / hits)


def test_detectors_are_the_best_of_all_latents_and_thresholds(studied):
    acts = dense(studied.place, studied.images)
    found = choose_detectors(studied.cache, studied.truth, best=2, block=7)
    thresholds = [0, 0.02, 0.05, *(n / 10 for n in range(1, 10))]
    for row, (kind, concept) in enumerate(studied.truth.names):
        there = shows(studied, row)
        scores = [max(f1(acts[:, n] > part * acts[:, n].max(), there) for part in thresholds) for n in range(24)]
        chosen = [each for each in found if (each.kind, each.concept) == (kind, concept)]
        assert [each.f1 for each in chosen] == pytest.approx(sorted(scores, reverse=True)[:2], abs=0.01)
        assert [scores[each.latent] for each in chosen] == pytest.approx([each.f1 for each in chosen], abs=0.01)


@pytest.mark.usefixtures("unchecked")
def test_a_latent_that_fires_faintly_on_its_concept_detects_it_at_the_lowest_threshold():
    """Ten patches of a concept: one at the maximum, nine at a hundredth of it; nothing elsewhere."""
    showing = sparse.csc_array(np.repeat([1.0, 0.0], [10, 30])[:, None])
    entries = SimpleNamespace(latents=np.full(10, 3), images=np.zeros(10, int), patches=np.arange(10),
                              acts=np.array([5.0] + [0.05] * 9))  # fmt: skip
    score, threshold = detectors.best_thresholds(entries, 3, np.array([5.0]), showing, np.array([10.0]), 40)
    assert (score.item(), threshold.item()) == (1, 0)


def test_detectors_are_measured_at_their_own_thresholds(studied):
    chosen = choose_detectors(studied.cache, studied.truth, best=1)
    some = [Detector("object", "hat", 3, 0.0, 9.0), *chosen]
    measured = measure_detectors(studied.place, studied.images[:5], studied.truth, some, batch_size=2)
    acts = dense(studied.place, studied.images[:5])
    for before, after in zip(some, measured.detectors, strict=True):
        there = shows(studied, studied.truth.names.index((before.kind, before.concept)), 5)
        assert after.f1 == pytest.approx(f1(acts[:, before.latent] > before.threshold, there))
        assert (after.latent, after.threshold) == (before.latent, before.threshold)
    assert set(measured.present) == set(studied.truth.names)


def test_what_is_chosen_and_measured_on_the_same_images_scores_the_same(studied):
    found = detect_concepts(studied.place, studied.cache, studied.truth, studied.images, studied.truth)
    chosen = choose_detectors(studied.cache, studied.truth)
    assert [each.f1 for each in found.detectors] == pytest.approx([each.f1 for each in chosen], abs=0.01)


def test_chance_is_chosen_and_measured_with_the_label_maps_of_other_images(studied):
    found = detect_concepts(studied.place, studied.cache, studied.truth, studied.images, studied.truth)
    acts, images = dense(studied.place, studied.images), 8
    for row, name in enumerate(studied.truth.names):
        own = shows(studied, row).reshape(images, -1)
        there = np.roll(own, images // 2, 0).ravel()  # image n has the map of image n - 4
        mine = [each for each in found.by_chance if (each.kind, each.concept) == name]
        assert [each.f1 for each in mine] == pytest.approx(
            [f1(acts[:, each.latent] > each.threshold, there) for each in mine], abs=0.01
        )
        best = max(
            f1(acts[:, n] > part * acts[:, n].max(), there)
            for n in range(24)
            for part in (0, 0.02, 0.05, *(tenth / 10 for tenth in range(1, 10)))
        )
        assert mine[0].f1 == pytest.approx(best, abs=0.01)


def test_a_cache_without_its_activations_says_how_to_keep_them(studied, tmp_path):
    bare = cache_activations(studied.place, studied.images[:2], folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="store='float16'"):
        choose_detectors(bare, studied.truth)


def test_a_concept_is_recalled_if_one_of_its_detectors_has_its_name():
    candidates = [
        Detector("object", "cat", 2, 0.1, 0.6),
        Detector("object", "cat", 1, 0.1, 0.9),
        Detector("object", "dog", 3, 0.1, 0.8),
        Detector("object", "hat", 4, 0.1, 0.4),  # detects too badly
        Detector("scene", "sky", 5, 0.1, 0.9),  # is not present
    ]
    present = [("object", "cat"), ("object", "dog"), ("object", "hat"), ("scene", "sea")]
    detection = Detection(candidates, present)
    assert detection.latents() == [1, 2, 3]
    given = {1: "dog", 2: "cat", 3: None, 4: "hat", 5: "sky"}
    found = detectors.recall_metrics(detection, given)
    assert detectors.recall_by_kind(detection, given) == {
        "object": {"named": 1, "detected, not named": 1, "not detected": 1},
        "scene": {"named": 0, "detected, not named": 0, "not detected": 1},
    }
    assert (found["concepts_present"], found["concepts_detected"], found["concept_recall"]) == (4, 0.5, 0.25)
    assert "concepts_detected_by_chance" not in found
    chance = [Detector("object", "cat", 6, 0.1, 0.6), Detector("object", "dog", 6, 0.1, 0.5)]
    found = detectors.recall_metrics(Detection(candidates, present, chance), given)
    assert (found["concepts_detected"], found["concepts_detected_by_chance"]) == (0.5, 0.25)
    with pytest.raises(ValueError, match="show no concept"):
        detectors.recall_metrics(Detection(candidates, []), {})
