"""Right and wrong explanations and refusals, counted by hand."""

import numpy as np
import pytest
from labelled import CONCEPTS, PLACES, box, exemplar, row

from lmm_sae_nb.interpret.explainers import REFUSAL, Vocabulary
from lmm_sae_nb.score.latents import explained_latents
from lmm_sae_nb.truth import accuracy
from lmm_sae_nb.truth.accuracy import other_names
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
    assert [right[f"unexplained_{name}"] for name in ("one_concept", "edges", "none_of_these")] == [2, 2, 0]
    assert accuracy.kinds_given(rows) == {
        "object": {"object": 3, "refused": 1, "unparseable": 1, "failed": 0},
        "nothing in common": {"object": 1, "refused": 1, "unparseable": 0, "failed": 1},
    }  # fmt: skip


def test_right_kinds_lie_on_the_diagonal_of_the_kinds_given():
    """A kind that is only given, or only true, has a row and a column all the same."""
    rows = {
        1: latent("explained", "red", "cat") | {"kind": "colour"}, 2: latent("explained", "night"),
        3: latent("refused"), 4: latent("explained", "a", "a") | {"kind": "word", "true_kind": "word"},
        5: latent("explained", "?", "cat") | {"kind": None},
    }  # fmt: skip
    rows[2]["kind"] = "scene"
    table = accuracy.kinds_given(rows)
    kinds = ["scene", "object", "colour", "word"]
    assert list(table) == [*kinds, "nothing in common"]
    assert all(list(row) == [*kinds, "refused", "no kind"] for row in table.values())
    assert (table["object"]["colour"], table["word"]["word"], table["object"]["no kind"]) == (1, 1, 1)
    assert (table["nothing in common"]["scene"], table["nothing in common"]["refused"]) == (1, 1)
    assert sum(map(sum, (row.values() for row in table.values()))) == len(rows)


def test_another_concept_is_never_the_latents_own_and_of_the_same_kind_where_there_is_one():
    rows = [("cat", "object"), ("dog", "object"), ("dog", "object"), ("bee", "object"), ("red", "colour")]
    explained = {n: rows[n % 5] for n in range(250)}
    others = other_names(explained, seed=1)
    for own in ("cat", "dog", "bee", "red"):
        found = {others[n] for n, (concept, _) in explained.items() if concept == own}
        assert found == {"cat", "dog", "bee"} - {own}
    assert other_names({1: ("cat", "object"), 2: ("cat", "object")}) == {1: None, 2: None}


def test_guesses_are_right_as_often_as_names_of_their_kind_agree():
    """A guess knows how frequent a name is; it does not know the latent."""
    same = {n: latent("explained", "cat", "cat") for n in range(5)}
    assert accuracy.accuracy_metrics(same)["concept_accuracy_guessed"] == 1
    distinct = {n: latent("explained", f"name {n}", f"name {n}") for n in range(50)}
    assert accuracy.accuracy_metrics(distinct)["concept_accuracy_guessed"] == 0
    halves = {n: latent("explained", "ab"[n % 2], "ab"[n % 2]) for n in range(400)}
    found = accuracy.accuracy_metrics(halves, seed=3)
    assert found["concept_accuracy_guessed_low"] < 199 / 399 < found["concept_accuracy_guessed_high"]
    kinds = {n: latent("explained", "cat", "cat") for n in range(3)}
    kinds |= {n: latent("explained", "red", "red") | {"kind": "colour"} for n in range(3, 6)}
    assert accuracy.accuracy_metrics(kinds)["concept_accuracy_guessed"] == 1  # names stay within their kind
    assert (
        not {"concept_accuracy_guessed", "concept_accuracy_shuffled"} & accuracy.accuracy_metrics({1: same[0]}).keys()
    )


def test_another_name_is_right_only_where_the_own_name_is_wrong():
    rows = {1: latent("explained", "cat", "cat"), 2: latent("explained", "dog", "cat"), 3: latent("explained", "dog")}
    rows[3]["all_common"] = ["cat"]
    found = accuracy.accuracy_metrics(rows)
    assert found["concept_accuracy_shuffled"] == found["concept_accuracy"] == pytest.approx(1 / 3)  # latent 2
    assert found["concept_common_shuffled"] == pytest.approx(2 / 3)  # and latent 3


def test_the_other_name_of_each_latent_is_the_one_that_scores_use():
    rows = {n: latent("explained", "abcd"[n * 7 % 4], "abcd"[n * 5 % 4]) for n in range(40)}
    names = other_names(explained_latents(rows), seed=2)
    right = [names[n] == row["true_concept"] for n, row in rows.items()]
    assert accuracy.accuracy_metrics(rows, seed=2)["concept_accuracy_shuffled"] == np.mean(right)


def test_refusals_for_low_confidence_are_counted_apart_from_those_in_words():
    rows = {
        1: latent("refused", answer="cat", confidence=0.3), 2: latent("refused", answer=REFUSAL, confidence=0.2),
        3: latent("refused", answer="no image excites it", confidence=None),
        4: latent("explained", "cat", answer="cat", confidence=0.9),
        5: latent("refused", answer="what the refiner refused", confidence=0.8),
        6: latent("unparseable", answer="?", confidence=0.1),
    }  # fmt: skip
    assert accuracy.outcome_metrics(rows, 0.5)["refused_low_confidence"] == 1
    assert "refused_low_confidence" not in accuracy.outcome_metrics(rows)


def test_latents_that_the_explainer_was_not_trained_on_are_counted_apart():
    rows = {
        1: latent("explained", "cat", "cat"), 2: latent("explained", "red", "dog"), 3: latent("explained", "cat"),
        4: latent("refused"), 5: latent("refused", true="hat"), 8: latent("explained", "dog", "dog"),
    }  # fmt: skip
    found = accuracy.unseen_metrics(rows, {1, 4, 77})
    assert (found["asked_unseen"], found["explained_unseen"], found["explained_fraction_unseen"]) == (4, 3, 0.75)
    assert found["concept_accuracy_unseen"] == pytest.approx(1 / 3)
    assert found["concept_accuracy_unseen_low"] < 1 / 3 < found["concept_accuracy_unseen_high"]
    assert found["concept_accuracy_shuffled_unseen"] <= 2 / 3  # of latents 2, 3 and 8; 8 has its own name
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
                                  "all_common": [], "responds_to": "none of these"}  # fmt: skip


def test_masks_on_random_images_have_a_concept_in_common_only_by_chance():
    truth = LabelMaps([*(row(object=box(*place).astype(int)) for place in PLACES), *([row()] * 95)], CONCEPTS)
    exemplars = {7: [exemplar(n, box(*place)) for n, place in enumerate(PLACES)], 9: []}
    found = accuracy.concepts_by_chance(exemplars, truth, 100)
    assert found == {7: None, 9: None}  # nearly all other images are empty
    everywhere = LabelMaps([row(object=np.ones_like(box(0, 0), int))] * 12, CONCEPTS)
    assert accuracy.concepts_by_chance(exemplars, everywhere, 12)[7] == "cat"
    assert accuracy.chance_metrics({1: "cat", 2: None, 3: None, 4: None})["answerable_fraction_random"] == 0.25
