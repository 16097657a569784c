"""Metrics, tables and figures of the comparison, by hand."""

import json

import numpy as np
import pytest
from scored import scores_of

from lmm_sae_nb.compare.depth import SteeredLatent
from lmm_sae_nb.compare.report import (
    depth_metrics,
    depth_panels,
    direction,
    doubling_rows,
    exam_rows,
    kind_fractions,
    kind_metrics,
    kind_rows,
    layer_rows,
    quality_metrics,
    quantity_rows,
    rise_metrics,
    rise_rows,
    score_metrics,
    shared_concepts,
    size_curves,
)
from lmm_sae_nb.compare.scored import ScoredSAE
from lmm_sae_nb.compare.sentences import training_kind_sentences
from lmm_sae_nb.score.scores import Column, Comparison
from lmm_sae_nb.support.intervals import Mean

IOU, CLIP = Column("iou", "paper"), Column("clip", "strict")


def sae(iou: list[float], clip: list[float]) -> ScoredSAE:
    """An SAE with these scores; chance is 0.1 (IoU, random images) and 20 (CLIP, area)."""
    rows = {
        IOU: [Comparison(value, random=(0.09, 0.1, 0.11), area=0.2) for value in iou],
        CLIP: [Comparison(value, area=20 + n / 10) for n, value in enumerate(clip)],
    }
    return ScoredSAE({}, scores_of(["object"] * (len(iou) - 1) + ["colour"], rows))


LOW, HIGH = sae([0.3, 0.4, 0.5], [15, 16, 17]), sae([0.5, 0.6, 0.7, 0.8], [30, 31, 32, 33])


def test_scores_are_means_and_above_chance_only_if_their_interval_is():
    metrics = score_metrics({"layer_1": LOW, "layer_6": HIGH})
    assert (metrics["latents_layer_1"], metrics["latents_layer_6"]) == (3, 4)
    assert metrics["iou_paper_layer_1"] == pytest.approx(0.4)
    assert metrics["iou_paper_layer_1_random"] == pytest.approx(0.1)
    assert metrics["iou_paper_layer_1_gain"] == pytest.approx(0.3)
    assert metrics["clip_strict_layer_6_area"] == pytest.approx(20.15)
    assert metrics["iou_paper_layer_1_moved_gain"] == pytest.approx(0.2)
    names = ("iou_paper_layer_1", "clip_strict_layer_1", "clip_strict_layer_6")
    assert [metrics[f"{name}_above_moved"] for name in names] == [1, 0, 1]
    assert metrics["iou_paper_layer_1_above_random"] == 1
    assert "clip_strict_layer_1_above_random" not in metrics


def test_a_rise_is_the_difference_of_the_means_with_an_interval():
    metrics = rise_metrics(LOW.scores, HIGH.scores)
    assert metrics["iou_paper_rise"] == pytest.approx(0.25)
    assert metrics["iou_paper_gain_rise"] == pytest.approx(0.25)
    # the moved region rises by 0.05, from the mean of 20, 20.1 and 20.2
    assert metrics["iou_paper_moved_rise"] == pytest.approx(0.25)
    assert metrics["clip_strict_moved_rise"] == pytest.approx(15.5 - 0.05)
    rows = rise_rows(metrics, [1, 6])
    assert [row["score"] for row in rows] == [
        "IoU, paper mode", "IoU, paper mode, less moved", "IoU, paper mode, less random images",
        "CLIP score, strict mode", "CLIP score, strict mode, less moved",
    ]  # fmt: skip
    assert [row["from layer 1 to layer 6, the score"] for row in rows] == ["rises"] * 5
    assert metrics["clip_strict_rise_low"] < 15.5 < metrics["clip_strict_rise_high"]


@pytest.mark.parametrize(("low", "high", "word"), [(0.1, 0.2, "rises"), (-0.2, -0.1, "falls"), (-0.1, 0.2, "does not")])
def test_a_direction_needs_an_interval_without_0(low, high, word):
    assert direction(Mean((low + high) / 2, low, high)).startswith(word)


def test_quality_has_accuracy_only_where_the_truth_is_known():
    rows = {1: {"outcome": "explained", "concept": "cat"}, 2: {"outcome": "refused", "concept": None}}
    metrics = quality_metrics("layer_3", {"fvu": 0.2, "dead_fraction": 0.0, "l0": 16.0}, rows)
    assert set(metrics) == {
        "fvu_layer_3", "dead_fraction_layer_3", "explained_fraction_layer_3", "explained_fraction_layer_3_low",
        "explained_fraction_layer_3_high",
    }  # fmt: skip
    assert metrics["explained_fraction_layer_3"] == 0.5


def test_steering_is_a_fraction_and_ranks_are_a_mean():
    steered = {"layer_1": [SteeredLatent(1, "cat", "a cat"), SteeredLatent(2, "dog", "a cat")], "layer_6": []}
    metrics = depth_metrics(steered, {"layer_1": [0.8, 0.9], "layer_6": [0.5]})
    assert metrics["steered_layer_1"] == 0.5
    assert metrics["spearman_layer_1"] == pytest.approx(0.85)
    assert not [name for name in metrics if "layer_6" in name]


def test_table_3_has_each_chance_below_a_score_and_the_paper_s_numbers_where_there_are_some():
    metrics = score_metrics({"layer_1": LOW, "layer_6": HIGH})
    rows = layer_rows(metrics, [1, 6], {"iou_paper_layer_6": 0.4, "iou_paper_layer_6_random": 0.005})
    assert [row["score"] for row in rows] == [
        "IoU, paper mode", "… moved", "… less moved", "… on random images", "… in the paper",
        "… on random images, in the paper", "CLIP score, strict mode", "… moved", "… less moved",
    ]  # fmt: skip
    table = {row["score"]: row for row in rows[:6]}
    assert table["IoU, paper mode"]["layer 6"].mean == pytest.approx(0.65)
    assert table["… on random images"]["layer 1"].mean == pytest.approx(0.1)
    assert table["… less moved"]["layer 1"].mean == pytest.approx(0.2)
    assert (table["… in the paper"]["layer 1"], table["… in the paper"]["layer 6"]) == (None, 0.4)
    assert table["… on random images, in the paper"]["layer 6"] == 0.005
    assert rows[7]["layer 1"].mean == pytest.approx(20.1)
    (panel,) = depth_panels(metrics, [1, 6], "iou").values()
    assert panel["layer 6"]["moved"] == table["… moved"]["layer 6"]
    assert panel["layer 6"]["random images"] == table["… on random images"]["layer 6"]
    (panel,) = depth_panels(metrics, [1, 6], "clip").values()
    assert list(panel["layer 6"]) == ["own images", "moved"]


def test_a_quantity_that_was_not_measured_has_no_row():
    rows = quantity_rows({"fvu_layer_1": 0.1, "fvu_layer_6": 0.2}, [1, 6], {"fvu": "FVU", "steered": "names it"})
    assert rows == [{"quantity": "FVU", "layer 1": 0.1, "layer 6": 0.2}]


def test_kinds_are_fractions_of_all_latents_in_the_order_of_table_1():
    assert list(kind_fractions(HIGH.scores).items()) == [("object", 0.75), ("colour", 0.25)]


def test_shared_concepts_are_those_of_every_sae():
    shared = shared_concepts({"low": LOW, "high": HIGH})
    assert shared == {f"concept {n}": {"low": n, "high": n} for n in range(3)}


def test_curves_keep_intervals_and_leave_out_what_is_missing():
    metrics = {"fvu_a": 0.3, "right_a": 0.5, "right_a_low": 0.4, "right_a_high": 0.6, "fvu_b": 0.2}
    curves = size_curves(metrics, {8: "a", 16: "b"}, {"fvu": "FVU", "right": "right", "dead": "dead"})
    assert curves == {"FVU": {8: Mean(0.3, 0.3, 0.3), 16: Mean(0.2, 0.2, 0.2)}, "right": {8: Mean(0.5, 0.4, 0.6)}}


def test_a_change_per_doubling_is_a_geometric_mean():
    rows = doubling_rows({"fvu_a": 0.4, "fvu_b": 0.1}, {8: "a", 32: "b"}, "k")
    assert np.isclose(0.4 * (1 - 0.5) ** 2, 0.1)
    assert rows == [
        {"k": "8", "FVU": 0.4, "change per doubling": None},
        {"k": "32", "FVU": 0.1, "change per doubling": "-50.0%"},
    ]


def test_a_gain_does_not_rise_where_random_images_rise_as_much():
    better_chance = [Comparison(value, random=(value - 0.3,)) for value in (0.5, 0.6, 0.7)]
    metrics = rise_metrics(LOW.scores, scores_of(["object"] * 3, {IOU: better_chance, CLIP: better_chance}))
    assert metrics["iou_paper_rise"] == pytest.approx(0.2)
    assert metrics["iou_paper_gain_rise"] == pytest.approx(0, abs=1e-9)


def test_exams_stand_beside_each_other_and_a_model_without_one_is_left_out(tmp_path):
    (tmp_path / "one").mkdir()
    exam = {"seed": 3, "colour_of": {"fraction": 0.9, "low": 0.8}, "made": {"by": "hand"}}
    (tmp_path / "one" / "exam.json").write_text(json.dumps(exam))
    assert exam_rows({"one": tmp_path / "one", "other": tmp_path}) == [{"questions": "colour of", "one": 0.9}]


def explained(*right: bool, refused: int = 0) -> dict[int, dict]:
    rows = [{"outcome": "explained", "concept": "a", "true_concept": "a" if each else "b"} for each in right]
    return dict(enumerate(rows + [{"outcome": "refused", "concept": None, "true_concept": None}] * refused))


def test_kinds_of_training_differ_where_the_interval_of_the_difference_says_so():
    names = {"topk": "layer_3", "batch_topk": "batch_topk", "matryoshka": "matryoshka"}
    rows = {"layer_3": explained(*[True] * 30), "batch_topk": explained(*[True] * 30, refused=10),
            "matryoshka": explained(*[False] * 30)}  # fmt: skip
    evaluation = {name: {"l0": 4.0 + n} for n, name in enumerate(names.values())}
    fvus = {"batch_topk": Mean(-0.1, -0.2, -0.05), "matryoshka": Mean(0.01, -0.01, 0.03)}
    metrics = kind_metrics(names, evaluation, rows, fvus)
    assert [metrics[f"l0_{name}"] for name in names.values()] == [4, 5, 6]
    assert metrics["explained_fraction_difference_batch_topk"] == pytest.approx(-0.25)
    assert metrics["concept_accuracy_difference_matryoshka_high"] == -1
    silent = {f"dead_fraction_{name}": 0.5 for name in names.values()}
    batch, nested = training_kind_sentences(metrics | silent, names)
    assert "BatchTopK against TopK: the FVU is lower" in batch and "right names does not differ measurably" in batch
    assert "the FVU does not differ measurably" in nested and "the fraction of right names is lower" in nested
    rows = kind_rows(metrics | silent, names)
    assert [row["training"] for row in rows] == ["TopK", "BatchTopK", "Matryoshka"]
    assert rows[1]["active latents per token"] == 5


def test_kinds_without_names_a_truth_or_samples_are_left_out():
    names = {"topk": "layer_3", "matryoshka": "matryoshka"}
    evaluation = {name: {"l0": 4.0} for name in names.values()}
    nameless = {name: {0: {"outcome": "refused"}} for name in names.values()}
    metrics = kind_metrics(names, evaluation, nameless, {})
    assert metrics == {"l0_layer_3": 4, "l0_matryoshka": 4} and training_kind_sentences(metrics, names) == []
    alone = {"topk": "layer_3"}
    assert kind_metrics(alone, evaluation, nameless, {}) == {} and training_kind_sentences({}, alone) == []
