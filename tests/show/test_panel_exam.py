"""The exam of a panel's metrics, and its sentences: against numbers read by hand."""

from dataclasses import replace

import pytest
from panels import sae

from lmm_sae_nb.show.panel import Panel, read_panel
from lmm_sae_nb.show.panel_exam import (
    exam_in_short,
    exam_sentences,
    examine,
    explained_by_steering,
    random_beside_trained,
)
from lmm_sae_nb.show.panel_metrics import PanelMetric

COLUMNS = {title: PanelMetric("part", title) for title in ("FVU", "good", "concepts named", "concepts detected")}
VALUES = {  # FVU, good, concepts named, concepts detected
    "seed_0": (0.1, 0.9, 0.5, 0.6),
    "seed_1": (0.2, 0.8, 0.6, 0.7),
    "random": (0.9, 0.3, 0.1, 0.1),
    "untrained_layers": (0.3, 0.85, 0.4, 0.65),
    "nmf": (50.0, 0.5, 0.3, 0.3),
}
GROUPS = {"random": "control", "untrained_layers": "control", "nmf": "classical"}
PANEL = Panel(
    "", "", {}, {}, [],
    {name: sae(GROUPS.get(name, "seed"), name, **dict(zip(COLUMNS, of, strict=True))) for name, of in VALUES.items()},
)  # fmt: skip


def test_the_truth_comes_first_then_what_separates_best():
    exam = examine(PANEL, COLUMNS)
    assert [each.metric for each in exam.metrics] == ["concepts detected", "concepts named", "FVU", "good"]
    assert {each.metric: each.separation for each in exam.metrics} == {
        "concepts detected": 0.75, "concepts named": 1, "FVU": 0, "good": 0.75,
    }  # fmt: skip
    assert exam.without("untrained_layers") == {
        "concepts detected": 1, "concepts named": 1, "FVU": 0, "good": 1,
    }  # fmt: skip


def test_the_fvu_of_nmf_is_left_out():
    assert "FVU" not in examine(PANEL, COLUMNS).values["nmf"]
    assert examine(PANEL, COLUMNS).values["nmf"]["good"] == 0.5


def test_a_random_order_of_two_and_two_separates_them_in_two_of_six():
    exam = examine(PANEL, COLUMNS)
    assert exam.chance("FVU") == pytest.approx(1 / 3)
    assert exam.spread("FVU") == "0.10 to 0.20" and exam.spread("FVU", "control", but=("random",)) == "0.30"


@pytest.fixture
def committed(root):
    return read_panel(root / "book/panel.json")


def test_the_committed_panel_is_told_in_sentences(committed):
    told = exam_sentences(examine(committed))
    assert len(told) == 7
    (apart,) = (text for text in told if "on one side of every control" in text)
    assert "concepts detected" not in apart and "FVU" not in apart  # one control reaches them
    assert "put all trained SAEs on one side of all controls" in exam_in_short(examine(committed))
    (by_steering,) = explained_by_steering(committed)
    assert by_steering.startswith("Latents explained by steering: ")


def test_without_a_panel_nothing_is_told():
    exam = examine(None)
    assert exam.metrics == [] and exam.without("random") == {} and exam_in_short(exam) == ""
    assert exam_sentences(exam) == explained_by_steering(None) == []


def names(right: float, spread: float) -> dict:
    ends = {"concept_accuracy": right, "concept_accuracy_low": right - spread, "concept_accuracy_high": right + spread}
    return ends | {"explained_fraction": 0.5}


def test_a_random_dictionary_is_compared_by_its_interval():
    (same,) = random_beside_trained(names(0.9, 0.05), names(0.88, 0.05))
    assert "88% (83 to 93%) have the right name; of this run's SAE, 90% (85 to 95%)" in same
    assert "The intervals overlap" in same
    (apart,) = random_beside_trained(names(0.9, 0.05), names(0.5, 0.05))
    assert "do not overlap: the trained SAE is better." in apart
    assert random_beside_trained(names(0.9, 0.05), {"explained_fraction": 0.5}) == []


@pytest.mark.parametrize("missing", ["untrained_layers", "untrained", "random", "nmf", "seed_5"])
def test_a_panel_that_lacks_one_is_told_without_it(committed, missing):
    exam = examine(replace(committed, saes={name: one for name, one in committed.saes.items() if name != missing}))
    told = " ".join(exam_sentences(exam))
    assert ("keeps the trained image encoder" in told and "image encoder" in exam_in_short(exam)) == (
        missing != "untrained_layers"
    )
    count = {"untrained_layers": "1 of the controls has", "untrained": "1 of the controls has"}
    assert f" {count.get(missing, '2 of the controls have')} " in told
