"""What exemplars have in common and what latents detect, against counting by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import make
from PIL import Image
from scipy import sparse

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.cache.encode_images import base_latents
from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.interpret.explainers import REFUSAL, Vocabulary
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.truth import accuracy, detectors
from lmm_sae_nb.truth.detectors import Detector, choose_detectors, measure_detectors
from lmm_sae_nb.truth.label_maps import PatchTruth, TrueMasks
from lmm_sae_nb.truth.responses import responds_to, shown_by

CONCEPTS = {"scene": ["sea", "sky"], "object": ["cat", "dog", "hat"], "colour": ["red", "blue"]}
SIDE, GRID = 24, (6, 6)


def row(**grids: np.ndarray) -> dict:
    """Label maps from grids of patches."""
    empty = np.zeros(GRID, np.uint8)
    enlarged = {kind: np.kron(grids.get(kind, empty), np.ones((4, 4), np.uint8)) for kind in CONCEPTS}
    return {kind: Image.fromarray(grid.astype(np.uint8)) for kind, grid in enlarged.items()}


def patch_truth(*rows: dict) -> PatchTruth:
    return PatchTruth(TrueMasks(list(rows), CONCEPTS), GRID)


def exemplar(index: int, visible: np.ndarray) -> Exemplar:
    image = Image.new("RGB", (SIDE, SIDE), (9, 9, 9))
    return Exemplar(index, image, visible.astype(np.float32), visible)


def box(top: int, left: int, height: int = 2, width: int = 2) -> np.ndarray:
    grid = np.zeros(GRID, bool)
    grid[top : top + height, left : left + width] = True
    return grid


PLACES = [(0, 0), (4, 4), (0, 4), (4, 0), (2, 2)]


def test_shares_of_patches_are_counted_once_and_as_the_masks_have_them():
    cat = np.zeros((SIDE, SIDE), np.uint8)
    cat[:4, :3] = 1  # three quarters of the first patch
    rows = [row(scene=np.full(GRID, 2)), row() | {"object": Image.fromarray(cat)}]
    truth = patch_truth(*rows)
    assert truth.names[:3] == [("scene", "sea"), ("scene", "sky"), ("object", "cat")]
    assert (truth[0][1] == 1).all() and truth[0].sum() == 36
    assert truth[1][2, 0] == 0.75 and truth[1].sum() == 0.75
    assert (truth[1] == truth[1]).all()
    assert truth.shows([0, 1]).toarray()[2].nonzero()[0].tolist() == [36]


def test_exemplars_of_one_object_have_it_in_common_wherever_it_is():
    truth = patch_truth(*(row(object=box(*place).astype(int)) for place in PLACES))
    found = [exemplar(n, box(*place)) for n, place in enumerate(PLACES)]
    assert shown_by(truth, found) == ("object", "cat", 1.0)
    assert responds_to(truth, found) == "one concept"


def test_the_same_patches_of_different_things_are_a_place():
    things = [row(object=(np.full(GRID, 1 + n % 3))) for n in range(5)]
    found = [exemplar(n, box(3, 3)) for n in range(5)]
    truth = PatchTruth(TrueMasks([*things, *[row()] * 5], CONCEPTS), GRID)
    assert responds_to(truth, found) == "a place"
    assert responds_to(truth, [exemplar(5 + n, box(0, 1)) for n in range(5)]) == "a place"


def test_patches_with_a_border_through_them_are_edges():
    """A line one pixel wide, three of four pixels long, is too little of a patch for the patch to show it."""
    line = np.zeros((SIDE, SIDE), np.uint8)
    line[:, 3] = line[:, 11] = 1
    line[::4] = 0
    truth = PatchTruth(TrueMasks([{"object": Image.fromarray(line)}] * 5, {"object": ["cat"]}), GRID)
    assert truth[0][0, :4].tolist() == [3 / 16, 0, 3 / 16, 0]
    on, off = ([box(top, left, 2, 1) for top, left in places] for places in (
        [(0, 0), (2, 0), (4, 0), (0, 2), (2, 2)], [(0, 1), (2, 1), (4, 1), (0, 3), (2, 3)]))  # fmt: skip
    assert responds_to(truth, [exemplar(n, where) for n, where in enumerate(on)]) == "edges"
    assert responds_to(truth, [exemplar(n, where) for n, where in enumerate(off)]) == "nothing"


def test_two_things_in_turn_are_several_concepts_and_none_at_all_is_nothing():
    rows = [row(object=(1 + n % 2) * box(*place)) for n, place in enumerate(PLACES[:4])]
    truth = patch_truth(*rows, *[row()] * 5)
    assert responds_to(truth, [exemplar(n, box(*place)) for n, place in enumerate(PLACES[:4])]) == "several concepts"
    assert responds_to(truth, [exemplar(4 + n, box(*place)) for n, place in enumerate(PLACES)]) == "nothing"
    assert responds_to(truth, []) == "nothing" and shown_by(truth, []) is None


# Detectors.


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A real cache with its store, over 8 images with labels at random, of a small true model."""
    lmm = LMM(*make("picture_world"))
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (192, 192, 3), dtype=np.uint8)) for _ in range(8)]

    def labels(names: list[str]) -> Image.Image:
        return Image.fromarray(np.kron(rng.integers(0, 1 + len(names), (12, 12)), np.ones((16, 16))).astype(np.uint8))

    rows = [{kind: labels(names) for kind, names in CONCEPTS.items()} for _ in range(8)]
    sae = TopKSAE(lmm.width, 24, 4, generator=torch.Generator().manual_seed(0))
    cache = cache_activations(
        SAEInPlace(lmm, sae, 1), images, folder=tmp_path_factory.mktemp("cache"), store="float32", batch_size=3
    )
    return lmm, sae, images, PatchTruth(TrueMasks(rows, CONCEPTS), lmm.grid), cache


def dense(lmm, sae, images) -> np.ndarray:
    """(images * patches, latents), the slow way."""
    parts = []
    for latents in base_latents(SAEInPlace(lmm, sae, 1), images):
        full = torch.zeros(*latents.acts.shape[:2], sae.n_latents)
        parts.append(full.scatter(-1, latents.indices.long(), latents.acts.float()).flatten(0, 1).numpy())
    return np.concatenate(parts)


def f1(on: np.ndarray, there: np.ndarray) -> float:
    hits = (on & there).sum()
    return 0.0 if not hits else 2 / (on.sum() / hits + there.sum() / hits)


def test_detectors_are_the_best_of_all_latents_and_thresholds(studied):
    lmm, sae, images, truth, cache = studied
    acts = dense(lmm, sae, images)
    found = choose_detectors(cache, truth, best=2, block=7)
    for row, (kind, name) in enumerate(truth.names):
        there = np.concatenate([truth[n][row] for n in range(8)]) >= 0.25
        rungs = [0, 0.02, 0.05, *(n / 10 for n in range(1, 10))]
        scores = [max(f1(acts[:, m] > share * acts[:, m].max(), there) for share in rungs) for m in range(24)]
        own = [one for one in found if (one.kind, one.concept) == (kind, name)]
        assert [one.f1 for one in own] == pytest.approx(sorted(scores, reverse=True)[:2], abs=0.01)
        assert [scores[one.latent] for one in own] == pytest.approx([one.f1 for one in own], abs=0.01)


def test_a_latent_that_fires_faintly_on_its_concept_detects_it_at_the_lowest_threshold():
    """Ten patches of a concept: one at the maximum, nine at a hundredth of it; nothing elsewhere."""
    shows = sparse.csc_array(np.repeat([1.0, 0.0], [10, 30])[:, None])
    entries = SimpleNamespace(latents=np.full(10, 3), images=np.zeros(10, int), patches=np.arange(10),
                              acts=np.array([5.0] + [0.05] * 9))  # fmt: skip
    scores, rung = detectors._best_rung(entries, 3, np.array([5.0]), shows, np.array([10.0]), 40)
    assert (scores.item(), rung.item()) == (1, 0)


def test_detectors_are_measured_at_their_own_thresholds(studied):
    lmm, sae, images, truth, cache = studied
    chosen = choose_detectors(cache, truth, best=1)
    some = [Detector("object", "hat", 3, 0.0, 9.0), *chosen]
    measured, present = measure_detectors(SAEInPlace(lmm, sae, 1), images[:5], truth, some, batch_size=2)
    acts = dense(lmm, sae, images[:5])
    for one, its in zip(some, measured, strict=True):
        there = np.concatenate([truth[n][truth.names.index((one.kind, one.concept))] for n in range(5)]) >= 0.25
        assert its == one._replace(f1=pytest.approx(f1(acts[:, one.latent] > one.threshold, there)))
    assert present == set(truth.names)


def test_a_cache_without_its_activations_is_told(studied, tmp_path):
    lmm, sae, images, truth, _ = studied
    bare = cache_activations(SAEInPlace(lmm, sae, 1), images[:2], folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="store='float16'"):
        choose_detectors(bare, truth)


def test_a_concept_is_recalled_if_one_of_its_detectors_has_its_name():
    found = [
        Detector("object", "cat", 1, 0.1, 0.9),
        Detector("object", "cat", 2, 0.1, 0.6),
        Detector("object", "dog", 3, 0.1, 0.8),
        Detector("object", "hat", 4, 0.1, 0.4),
        Detector("scene", "sky", 5, 0.1, 0.9),
    ]
    present = {("object", name) for name in ("cat", "dog", "hat")} | {("scene", "sea")}
    told = detectors.recalled(found, present, {1: "dog", 2: "cat", 3: None, 4: "hat", 5: "sky"})
    assert (told["concepts_present"], told["concepts_detected"], told["concept_recall"]) == (4, 0.5, 0.25)
    with pytest.raises(ValueError, match="show no concept"):
        detectors.recalled(found, set(), {})


# Counts.


def told(outcome: str, concept: str | None = None, true: str | None = None, **rest) -> dict:
    return {
        "outcome": outcome, "concept": concept, "kind": concept and "object", "true_concept": true,
        "true_kind": true and "object", "all_common": [true, "red"], "responds_to": "one concept" if true else "edges",
        **rest,
    }  # fmt: skip


def test_explanations_and_refusals_are_counted_by_hand():
    rows = {
        "1": told("explained", "cat", "cat"), "2": told("explained", "red", "dog"), "3": told("explained", "cat"),
        "4": told("refused"), "5": told("refused", true="hat"), "6": told("failed"),
        "7": told("unparseable", true="cat"), "8": told("explained", "dog", "dog"),
    }  # fmt: skip
    counts, right = accuracy.counted(rows), accuracy.judged(rows)
    assert [counts[name] for name in ("asked", "explained", "refused", "unparseable", "failed")] == [8, 4, 2, 1, 1]
    assert counts["explained_fraction"] == 0.5
    assert counts["explained_fraction_low"] < 0.5 < counts["explained_fraction_high"]
    assert right["concept_common"] == 0.75
    assert (right["concept_accuracy"], right["refusal_precision"], right["answerable_fraction"]) == (0.5, 0.5, 0.625)
    assert (right["unexplained_one_concept"], right["unexplained_edges"], right["unexplained_nothing"]) == (2, 2, 0)
    assert accuracy.confusion(rows) == {
        "object": {"object": 3, "refused": 1, "unparseable": 1}, "nothing": {"object": 1, "refused": 1, "failed": 1},
    }  # fmt: skip


def test_latents_that_the_explainer_did_not_learn_from_are_counted_apart():
    rows = {
        "1": told("explained", "cat", "cat"), "2": told("explained", "red", "dog"), "3": told("explained", "cat"),
        "4": told("refused"), "5": told("refused", true="hat"), "8": told("explained", "dog", "dog"),
    }  # fmt: skip
    found = accuracy.untaught(rows, {1, 4, 77})
    assert (found["asked_untaught"], found["explained_fraction_untaught"]) == (4, 0.75)
    assert found["concept_accuracy_untaught"] == pytest.approx(1 / 3)
    assert found["concept_accuracy_untaught_low"] < 1 / 3 < found["concept_accuracy_untaught_high"]
    assert accuracy.untaught(rows, {77}) == accuracy.untaught(rows, []) == {}


def test_what_each_limit_of_sureness_gives_by_hand():
    rows = {
        "1": told("explained", "cat", "cat", sureness=0.9, answer="a cat"),
        "2": told("refused", None, "dog", sureness=0.4, answer="Cat"),  # too unsure, and wrong
        "3": told("refused", None, "hat", sureness=0.5, answer="hat"),  # too unsure, yet right
        "4": told("refused", sureness=0.99, answer=REFUSAL),
        "5": told("failed", sureness=None, answer="it is down"),
    }
    found = accuracy.coverage(rows, Vocabulary({"object": ["cat", "dog", "hat"]}).refine)
    wanted = ("least_sure", "explained_fraction", "concept_accuracy")
    expected = [(0.9, 0.2, 1.0), (0.5, 0.4, 1.0), (0.4, 0.6, 2 / 3)]
    assert found == [dict(zip(wanted, row, strict=True)) for row in expected]


def test_a_share_of_nothing_is_left_out():
    assert "concept_accuracy" not in accuracy.judged({"1": told("refused")})
    assert accuracy.counted({})["asked"] == 0


def test_rows_are_given_their_truth():
    truth = patch_truth(*(row(object=box(*place).astype(int)) for place in PLACES), row())
    shown = {7: [exemplar(n, box(*place)) for n, place in enumerate(PLACES)], 8: [exemplar(5, box(0, 0))]}
    rows = accuracy.with_truth({"7": {"outcome": "refused"}, "8": {"outcome": "refused"}}, shown, truth)
    assert rows["7"] == {"outcome": "refused", "true_kind": "object", "true_concept": "cat", "true_iou": 1.0,
                         "all_common": ["cat"], "responds_to": "one concept"}  # fmt: skip
    assert rows["8"] == {"outcome": "refused", "true_kind": None, "true_concept": None, "true_iou": 0.0,
                         "all_common": [], "responds_to": "nothing"}  # fmt: skip
