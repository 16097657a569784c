"""The parts of the chain: what they add to what they call, and what they do with too little."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from labelled import CONCEPTS
from models import make, noise
from PIL import Image

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.compare.depth import rank_agreement
from lmm_sae_nb.compare.saes import CachedSAE
from lmm_sae_nb.controls import chain
from lmm_sae_nb.interpret.explain import Explanation
from lmm_sae_nb.interpret.explainers import Outcome
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.intervals import mean_interval
from lmm_sae_nb.train.evaluate import evaluate_sae
from lmm_sae_nb.truth.detectors import choose_detectors, measure_detectors
from lmm_sae_nb.truth.label_maps import LabelMaps

pytestmark = pytest.mark.usefixtures("unchecked")  # for its stand-ins

IMAGES = [noise(192, 192, seed=n) for n in range(8)]
SAMPLES = [{"image": image, "question": "what is it ?", "answer": "so so"} for image in IMAGES[:4]]
WHITE = Image.new("RGB", (192, 192), "white")


class Rule:
    """An interpreter that gives every third latent no name, and the others the concepts in turn."""

    def __init__(self):
        self.asked = []

    def explain(self, exemplars):
        names = [(name, kind) for kind, concepts in CONCEPTS.items() for name in concepts]
        rows = {}
        for latent in exemplars:
            assert len(exemplars[latent])
            self.asked.append(latent)
            name, kind = names[latent % len(names)]
            given = (Outcome.EXPLAINED, name, kind) if latent % 3 else (Outcome.REFUSED, None, None)
            rows[latent] = Explanation(*given, "an answer", 0.9)
        return rows


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    lmm = LMM(*make("picture_world"))
    sae = TopKSAE(lmm.width, 40, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    place = SAEInPlace(lmm, sae, 1)
    folder = tmp_path_factory.mktemp("cache")
    return CachedSAE(place, cache_activations(place, IMAGES, n_top=5, folder=folder, store="float32"))


@pytest.fixture(scope="module")
def truth():
    rng = np.random.default_rng(0)

    def labels(names):
        return Image.fromarray(np.kron(rng.integers(0, 1 + len(names), (12, 12)), np.ones((16, 16))).astype(np.uint8))

    return LabelMaps([{kind: labels(names) for kind, names in CONCEPTS.items()} for _ in IMAGES], CONCEPTS)


def silent(study):
    """The same SAE with a cache in which no latent is live."""
    return CachedSAE(study.place, SimpleNamespace(live=torch.zeros(40, dtype=torch.bool)))


def test_fidelity_is_that_of_notebook_01_with_the_live_latents(study):
    found = chain.fidelity(study, SAMPLES, kinds=("base", "text"))
    expected = evaluate_sae(study.place, SAMPLES, kinds=("base", "text"))
    shared = {name: value for name, value in found.metrics.items() if "live" not in name}
    assert shared == {name: value for name, value in expected.items() if name in shared}
    excited = {n for n in range(40) if study.cache.top(n)}
    assert found.metrics["live_latents"] == len(excited) == round(40 * found.metrics["live_fraction"])
    # what is left out is loss_recovered alone, and only with the reason
    assert all(name.startswith("loss_recovered") for name in expected.keys() - shared.keys())
    assert bool(found.why) == ("loss_recovered" not in shared)


def test_names_are_asked_of_a_random_sample_and_counted_by_kind(study, truth):
    rule = Rule()
    found = chain.interpret(study, IMAGES, rule, truth, latents=12, seed=3)
    assert rule.asked == sorted(study.live_latents(3)[:12]) == list(found.rows)
    named = [row for row in found.rows.values() if row["outcome"] == "explained"]
    assert found.metrics["asked"] == 12
    for kind in CONCEPTS:
        of_kind = [row for row in named if row["kind"] == kind]
        assert found.metrics.get(f"explained_{kind}", 0) == len(of_kind)
        if of_kind:
            right = np.mean([row["concept"] == row["true_concept"] for row in of_kind])
            assert found.metrics[f"concept_accuracy_{kind}"] == pytest.approx(right)


def test_guessed_names_of_one_frequent_name_are_right_as_often_as_it_is():
    rows = {
        n: {"outcome": "explained", "concept": "cat", "kind": "object", "true_concept": "cat" if n < 3 else "dog"}
        for n in range(8)
    }
    found = chain.names_by_kind(rows)
    assert found["explained_object"] == 8
    assert found["concept_accuracy_object"] == found["concept_accuracy_guessed_object"] == 3 / 8


def test_detection_is_chosen_on_cached_scenes_and_measured_on_others(study, truth):
    heldout = [noise(192, 192, seed=n) for n in range(20, 28)]
    found = chain.detect(study, IMAGES, Rule(), truth, heldout, truth).metrics
    chosen = choose_detectors(study.cache, truth)
    good = measure_detectors(study.place, heldout, truth, chosen).good()
    detected = {(each.kind, each.concept) for each in good}
    assert found["concepts_detected"] == pytest.approx(len(detected) / found["concepts_present"])
    assert sum(found[f"concepts_present_{kind}"] for kind in CONCEPTS) == found["concepts_present"]
    for kind in CONCEPTS:
        of_kind = sum(name == kind for name, _ in detected)
        assert found[f"concepts_detected_{kind}"] == pytest.approx(of_kind / found[f"concepts_present_{kind}"])


def test_scores_are_those_of_the_named_latents(study, truth):
    rows = chain.interpret(study, IMAGES, Rule(), truth, latents=12).rows
    cosines = lambda images, texts: np.full((len(images), len(texts)), 0.25, np.float32)  # noqa: E731
    found = chain.score(study, IMAGES, rows, truth, {"ground truth": truth}, cosines, random_runs=2, clip_runs=2)
    assert found.metrics["latents_scored"] == sum(row["concept"] is not None for row in rows.values())
    assert found.metrics["clip_paper"] == pytest.approx(25)
    assert {"iou_paper", "iou_strict", "iou_strict_area", "iou_strict_low"} <= found.metrics.keys()


@pytest.mark.parametrize(("objects", "reported", "choosing"), [(3, 2, 1), (7, 5, 2), (9, 5, 3)])
def test_objects_are_divided_into_those_reported_and_those_that_choose_the_dose(study, objects, reported, choosing):
    live = study.live_latents(0)
    rows = {n: {"concept": "cat", "kind": "object"} for n in live[:objects]}
    rows |= {live[-1]: {"concept": "red", "kind": "colour"}, live[-2]: {"concept": None, "kind": None}}
    found = chain.steer(
        study, rows, "what ?", WHITE, [2, 4], others=IMAGES[:4], count=5, choosing=3, kinds=("base",), max_new_tokens=2
    )
    assert found.metrics["object_latents"] == objects
    assert (found.metrics["objects_steered"], found.metrics["dose_chosen_on"]) == (reported, choosing)
    assert bool(found.why) == (reported < 5)


def test_attribution_is_the_mean_rank_correlation(study):
    found = chain.attribute(study.place, SAMPLES, decisions=3, pairs=8, seed=2).metrics
    values = rank_agreement({"": study.place}, SAMPLES, decisions=3, pairs=8, seed=2)[""]
    known = [value for value in values if np.isfinite(value)]
    assert found["decisions"] == len(known)
    assert found["spearman_linear"] == mean_interval(known, seed=2).mean


def test_too_little_is_reported_and_does_not_stop_a_part(study, truth):
    results = [
        chain.interpret(silent(study), IMAGES, Rule(), truth),
        chain.score(study, IMAGES, {}, truth, {"ground truth": truth}, None),
        chain.steer(study, {1: {"concept": "cat", "kind": "object"}}, "what ?", WHITE, [2], others=[], kinds=("base",)),
    ]
    assert [result.metrics for result in results] == [
        {"asked": 0},
        {"latents_scored": 0},
        {"object_latents": 1, "objects_steered": 0},
    ]
    assert all(len(result.why) == 1 for result in results)
