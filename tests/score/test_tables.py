"""Tables, metrics and the file of scores, from comparisons whose means are known."""

import json
from dataclasses import replace

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy.stats import norm
from scored import CONCEPTS, label_maps, scores_of

from lmm_sae_nb.score.scores import Column, Comparison, Scores, latents_by_kind
from lmm_sae_nb.score.tables import (
    correlation,
    explanation_metrics,
    kind_counts,
    kind_table,
    kind_tables,
    means_by_truth,
    median_latents,
    score_metrics,
    table_1,
    values_by_kind,
)
from lmm_sae_nb.support.intervals import mean_interval
from lmm_sae_nb.truth.label_maps import LabelMaps

KINDS = ["object", "object", "colour", "face", "colour", "scene"]
PAPER, STRICT, CLIP = Column("iou", "paper"), Column("iou", "strict"), Column("clip", "paper")


def rising(slope: float = 0.1) -> list[Comparison]:
    return [Comparison(slope * n, (0.01 * n - 0.01, 0.01 * n + 0.01), None, 0.0) for n in range(6)]


def test_a_table_has_the_kinds_in_order_and_the_total():
    scores = scores_of(KINDS, {PAPER: rising()})
    found = kind_table(scores, PAPER)
    assert list(found) == ["object", "colour", "total"]  # one scene and one face have no interval
    assert found["colour"].score.mean == pytest.approx(0.3)
    assert found["total"].gain.mean == pytest.approx(0.225)
    assert found["object"].random.mean == pytest.approx(0.005)
    assert found["total"].area is None
    assert found["total"].shuffled.mean == 0
    assert list(latents_by_kind(scores.explained)) == ["scene", "object", "colour", "face", "total"]
    with pytest.raises(KeyError, match="no column clip_paper; there is iou_paper"):
        kind_table(scores, CLIP)


def test_a_chance_that_any_latent_lacks_has_no_runs():
    rows = [*rising()[:5], replace(rising()[5], random=None)]
    total = kind_table(scores_of(KINDS, {PAPER: rows}), PAPER)["total"]
    assert total.random is None and total.gain is None


def test_a_table_stands_beside_the_published_one():
    scores = scores_of(KINDS, {PAPER: rising(), STRICT: rising(0.2), Column("iou", "paper", "sam"): rising(0)})
    published = {"iou_paper_colour": 0.1, "iou_paper_colour_random": 0.005, "iou_paper": 0.2}
    tables = table_1(kind_tables(scores), published)
    assert list(tables) == ["IoU", "IoU by sam"]
    rows = tables["IoU"]
    assert [(row["kind"], row["mode"]) for row in rows] == [
        ("object", "paper"), ("object", "strict"), ("colour", "paper"), ("colour", "strict"), ("total", "paper"),
        ("total", "strict"),
    ]  # fmt: skip
    assert [row["the paper"] for row in rows] == [None, None, 0.1, None, 0.2, None]
    assert rows[2]["the paper, random"] == 0.005
    assert rows[4]["own images"] == mean_interval([0.1 * n for n in range(6)])
    assert rows[1]["own images"] == mean_interval([0, 0.2])
    assert rows[4]["random images"].mean == pytest.approx(0.025)
    assert "the paper" not in table_1(kind_tables(scores))["IoU by sam"][0]


def test_the_metrics_of_a_stage_come_from_the_columns():
    kinds = [("object", "colour")[n % 2] for n in range(8)]
    random = [20.0 + 2 * (n % 2) for n in range(8)]
    columns = {
        STRICT: [Comparison(n / 10, (0.04, 0.06), shuffled=0.0) for n in range(8)],
        Column("iou", "strict", "seg_a"): [Comparison(1 - n / 10) for n in range(8)],
        CLIP: [Comparison(20.0 + n, (random[n], random[n])) for n in range(8)],
    }
    scores = scores_of(kinds, columns)
    found = score_metrics(scores, kind_tables(scores))
    assert (found["latents_scored"], found["latents_object"]) == (8, 4)
    assert found["iou_strict"] == pytest.approx(0.35)
    assert found["iou_strict_ratio"] == pytest.approx(0.35 / 0.05)
    assert found["iou_random"] == found["iou_strict_random"] == pytest.approx(0.05)
    assert found["iou_random_low"] < 0.05 < found["iou_random_high"]
    assert found["iou_strict_shuffled"] == 0
    assert found["iou_strict_gain"] == pytest.approx(0.3)
    assert found["iou_strict_colour"] == pytest.approx(0.4)
    assert found["iou_strict_seg_a_correlation"] == pytest.approx(-1)
    # objects gain 0, 2, 4 and 6: a resample has the mean 0 in 1 of 256, less than 0.5%; colours gain -1, 1, 3 and 5
    assert (found["clip_paper_kinds"], found["clip_paper_kinds_above_random"]) == (2, 1)
    assert found["clip_paper_colour_gain"] == pytest.approx(2)
    assert found["iou_strict_colour_random"] == pytest.approx(0.05)
    assert not {"iou_strict_colour_gain", "iou_strict_seg_a_ratio"} & found.keys()
    json.dumps(found, allow_nan=False)
    columns[CLIP] = [replace(row, score=row.score + 10) for row in columns[CLIP]]
    scores = scores_of(kinds, columns)
    assert score_metrics(scores, kind_tables(scores))["clip_paper_kinds_above_random"] == 2
    bare = scores_of(["other"] * 2, {Column("clip", "strict"): [Comparison(20.0)] * 2})
    assert set(score_metrics(bare, kind_tables(bare))) == {"latents_scored", "latents_other"} | {
        f"clip_strict{kind}{end}" for kind in ("", "_other") for end in ("", "_low", "_high")
    }


def test_scores_go_through_json_and_into_flat_rows():
    scores = scores_of(
        ["object", "colour"],
        {
            Column("iou", "strict", "sam"): [Comparison(1, (1, 0), 0.5, None), Comparison(0, (1, 1), 0, 1)],
            CLIP: [Comparison(3), Comparison(4)],
        },
    )
    kept = TypeAdapter(Scores)
    assert kept.validate_json(json.dumps(kept.dump_python(scores, mode="json"))) == scores
    assert scores.rows()[0] == {
        "concept": "concept 0", "kind": "object", "iou_strict_sam": 1, "iou_strict_sam_area": 0.5,
        "iou_strict_sam_random": 0.5, "clip_paper": 3,
    }  # fmt: skip
    assert scores.rows()[1]["iou_strict_sam_shuffled"] == 1


def test_the_median_of_each_kind():
    scores = scores_of(KINDS, {PAPER: rising()})
    assert median_latents(scores, PAPER) == {"scene": 5, "object": 1, "colour": 4, "face": 3}


def test_right_and_wrong_names_have_their_own_means():
    scores = scores_of(KINDS, {PAPER: rising(), CLIP: rising()})
    truth = {n: {"concept": f"concept {n}", "true_concept": f"concept {min(n, 3)}"} for n in range(6)}
    right, wrong = means_by_truth(scores, truth)
    assert (right["latents"], wrong["latents"]) == (4, 2)
    assert right["paper, by ground truth"].mean == pytest.approx(0.15)
    assert wrong["paper, by ground truth"].mean == pytest.approx(0.45)


def test_another_segmenter_is_compared_with_the_first_latent_by_latent():
    other = [replace(row, score=row.score + 0.1 * (n == 4)) for n, row in enumerate(rising())]
    scores = scores_of(KINDS, {PAPER: rising(), Column("iou", "paper", "sam"): other})
    truth = {n: {"concept": f"concept {n}", "true_concept": f"concept {min(n, 3)}"} for n in range(6)}
    right, wrong = means_by_truth(scores, truth)
    assert right["paper, sam less ground truth"] == pytest.approx((0, 0, 0))
    assert wrong["paper, sam less ground truth"] == pytest.approx((0.05, 0, 0.1))


def test_a_correlation_has_the_interval_of_fisher():
    rng = np.random.default_rng(0)
    one = rng.normal(size=80)
    other = one + rng.normal(size=80)
    seg = Column("iou", "strict", "sam")
    scores = scores_of(["object"] * 80, {STRICT: [Comparison(x) for x in one], seg: [Comparison(x) for x in other]})
    found, r = correlation(scores, STRICT, seg), np.corrcoef(one, other)[0, 1]
    half = norm.ppf(0.995) / (80 - 3) ** 0.5
    assert found == pytest.approx((r, np.tanh(np.arctanh(r) - half), np.tanh(np.arctanh(r) + half)))


def test_values_stand_by_kind_in_the_order_of_latents():
    scores = scores_of(KINDS, {PAPER: rising()})
    assert values_by_kind(scores, PAPER)["colour"] == pytest.approx([0.2, 0.4])
    assert "total" not in values_by_kind(scores, PAPER)


def test_what_could_be_scored_is_counted_beside_what_is():
    explained = scores_of(["object", "colour"], {}).explained
    rows = {n: {"concept": name, "true_kind": kind} for n, (name, kind) in enumerate(
        [("cat", "object"), ("unicorn", "object"), (None, "face"), ("dog", None)]
    )}  # fmt: skip
    assert kind_counts(explained, rows) == [
        {"kind": "object", "named as this kind (scored)": 1, "truly of this kind (asked)": 2},
        {"kind": "colour", "named as this kind (scored)": 1, "truly of this kind (asked)": 0},
        {"kind": "total", "named as this kind (scored)": 2, "truly of this kind (asked)": 3},
    ]
    assert explanation_metrics(rows, LabelMaps([label_maps()], CONCEPTS)) == {
        "names_unknown": 1, "latents_showing_face": 1, "latents_showing_object": 2,
    }  # fmt: skip
    photographs = {n: {"concept": "cat"} for n in range(3)}
    assert kind_counts(explained, photographs)[0] == {"kind": "object", "named as this kind (scored)": 1}
    assert explanation_metrics(photographs, None) == {}
