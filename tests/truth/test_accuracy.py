"""Right and wrong explanations and refusals, counted by hand."""

import pytest
from labelled import CONCEPTS, PLACES, box, exemplar, row

from lmm_sae_nb.interpret.explainers import REFUSAL, Vocabulary
from lmm_sae_nb.truth import accuracy
from lmm_sae_nb.truth.label_maps import LabelMaps


def latent(outcome: str, concept: str | None = None, true: str | None = None, **rest) -> dict:
    return {
        "outcome": outcome, "concept": concept, "kind": concept and "object", "true_concept": true,
        "true_kind": true and "object", "all_common": [true, "red"], "responds_to": "one concept" if true else "edges",
        **rest,
    }  # fmt: skip


def test_explanations_and_refusals_are_counted_by_hand():
    rows = {
        1: latent("explained", "cat", "cat"), 2: latent("explained", "red", "dog"), 3: latent("explained", "cat"),
        4: latent("refused"), 5: latent("refused", true="hat"), 6: latent("failed"),
        7: latent("unparseable", true="cat"), 8: latent("explained", "dog", "dog"),
    }  # fmt: skip
    counts, right = accuracy.outcome_metrics(rows), accuracy.accuracy_metrics(rows)
    assert [counts[name] for name in ("asked", "explained", "refused", "unparseable", "failed")] == [8, 4, 2, 1, 1]
    assert counts["explained_fraction"] == 0.5
    assert counts["explained_fraction_low"] < 0.5 < counts["explained_fraction_high"]
    assert right["concept_common"] == 0.75
    assert (right["concept_accuracy"], right["refusal_precision"], right["answerable_fraction"]) == (0.5, 0.5, 0.625)
    assert (right["unexplained_one_concept"], right["unexplained_edges"], right["unexplained_nothing"]) == (2, 2, 0)
    assert accuracy.kinds_given(rows) == {
        "object": {"object": 3, "refused": 1, "unparseable": 1, "failed": 0},
        "nothing": {"object": 1, "refused": 1, "unparseable": 0, "failed": 1},
    }  # fmt: skip


def test_latents_that_the_explainer_was_not_trained_on_are_counted_apart():
    rows = {
        1: latent("explained", "cat", "cat"), 2: latent("explained", "red", "dog"), 3: latent("explained", "cat"),
        4: latent("refused"), 5: latent("refused", true="hat"), 8: latent("explained", "dog", "dog"),
    }  # fmt: skip
    found = accuracy.unseen_metrics(rows, {1, 4, 77})
    assert (found["asked_unseen"], found["explained_fraction_unseen"]) == (4, 0.75)
    assert found["concept_accuracy_unseen"] == pytest.approx(1 / 3)
    assert found["concept_accuracy_unseen_low"] < 1 / 3 < found["concept_accuracy_unseen_high"]
    assert accuracy.unseen_metrics(rows, {77}) == accuracy.unseen_metrics(rows, []) == {}


def test_each_limit_of_confidence_gives_what_counting_gives():
    rows = {
        1: latent("explained", "cat", "cat", confidence=0.9, answer="a cat"),
        2: latent("refused", None, "dog", confidence=0.4, answer="Cat"),  # below the limit, and wrong
        3: latent("refused", None, "hat", confidence=0.5, answer="hat"),  # below the limit, yet right
        4: latent("refused", confidence=0.99, answer=REFUSAL),
        5: latent("failed", confidence=None, answer="it is down"),
    }
    found = accuracy.accuracy_by_confidence(rows, Vocabulary({"object": ["cat", "dog", "hat"]}).refine)
    names = ("least_confidence", "explained_fraction", "concept_accuracy")
    expected = [(0.9, 0.2, 1.0), (0.5, 0.4, 1.0), (0.4, 0.6, 2 / 3)]
    assert found == [dict(zip(names, values, strict=True)) for values in expected]


def test_a_fraction_of_nothing_is_left_out():
    assert "concept_accuracy" not in accuracy.accuracy_metrics({1: latent("refused")})
    assert accuracy.outcome_metrics({})["asked"] == 0


def test_without_ground_truth_only_outcomes_are_counted():
    rows = {1: {"outcome": "explained", "concept": "cat", "kind": "object"}, 2: {"outcome": "refused"}}
    assert accuracy.add_truth(rows, {}, None) == rows
    assert accuracy.accuracy_metrics(rows) == accuracy.unseen_metrics(rows, {1}) == {}
    assert accuracy.outcome_metrics(rows)["explained_fraction"] == 0.5


def test_rows_get_what_their_exemplars_really_show():
    truth = LabelMaps([*(row(object=box(*place).astype(int)) for place in PLACES), row()], CONCEPTS)
    exemplars = {7: [exemplar(n, box(*place)) for n, place in enumerate(PLACES)], 8: [exemplar(5, box(0, 0))], 9: []}
    rows = accuracy.add_truth({n: {"outcome": "refused"} for n in exemplars}, exemplars, truth)
    assert rows[7] == {"outcome": "refused", "true_kind": "object", "true_concept": "cat", "true_iou": 1.0,
                       "all_common": ["cat"], "responds_to": "one concept"}  # fmt: skip
    assert rows[8] == rows[9] == {"outcome": "refused", "true_kind": None, "true_concept": None, "true_iou": 0.0,
                                  "all_common": [], "responds_to": "nothing"}  # fmt: skip
