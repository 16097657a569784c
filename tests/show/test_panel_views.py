"""Rows, dots and sentences of a panel: against numbers read by hand."""

import matplotlib.pyplot as plt
import pytest
from panels import BAD, GOOD, PANEL, STEERED, sae

from lmm_sae_nb.measures.discriminability import Discriminability
from lmm_sae_nb.show.panel import MeasuredPart, Panel, PanelSAE
from lmm_sae_nb.show.panel_views import (
    all_methods,
    kind_panels,
    method_rows,
    metric_exam,
    not_measured,
    panel_dots,
    panel_rows,
    panel_values,
    steered_kinds,
)
from lmm_sae_nb.support.intervals import Mean


def test_seeds_share_a_row_with_their_range_and_others_keep_their_interval():
    seeds, random, frozen = panel_rows(PANEL, {"good": GOOD, "bad": BAD})
    assert seeds["good"][:] == (pytest.approx(0.85), 0.8, 0.9) and str(seeds["bad"]) == "0.600 (0.500–0.700)"
    assert random == {"": "control: random rows", "good": Mean(0.1, 0.0, 0.2), "bad": 0.6}
    assert frozen["bad"] is None


def test_the_one_table_has_saes_and_methods_without_an_sae():
    metrics = {"direction_detection": {"probe_detected": (0.9, 0.8, 1.0)},
               "direction_steering": {"steer_probe_named_of_100": (80, 60, 90)}}  # fmt: skip
    model = PanelSAE("the model", "model", {name: MeasuredPart(each, 1.0) for name, each in metrics.items()})
    rows = {row[""]: row for row in all_methods(Panel("", "", {}, {}, [], PANEL.saes | {"model": model}))}
    probe = rows["no SAE: logistic probe"]
    assert probe["concepts detected"] == Mean(0.9, 0.8, 1.0) and probe["objects named, of 100"] == Mean(80, 60, 90)
    assert probe["names right"] is None and "control: random rows" in rows and "trained, 2 seeds" in rows


def test_kinds_have_a_mark_for_trained_saes_and_for_each_other_one():
    parts = {f"good_{kind}": (x, x - 0.1, x + 0.1) for kind, x in {"face": 0.5, "word": 0.7}.items()}
    panel = Panel("", "", {}, {}, [], {"seed_0": sae("seed", "", **parts), "random": sae("control", "", **parts)})
    (ax,) = kind_panels(panel, {"random": "random rows"}, {"good": GOOD})
    marks = [float(line.get_xdata()[0]) for line in ax.lines if len(line.get_xdata()) == 1]
    assert marks == [0.5, 0.5, 0.7, 0.7]  # in the order of the kinds: face, word
    assert kind_panels(None, {}) == []
    plt.close("all")


def test_the_exam_draws_order_separation_and_noise_of_each_metric():
    exam = [
        Discriminability("FVU", 9, {"truth": Mean(-0.6, -0.9, -0.1), "names": Mean(0.1, -0.2, 0.3)}, 0.2, -3.0, 0.1),
        Discriminability("truth", 9, {"names": Mean(0.3, 0.0, 0.5)}, 1.0, 5.0, 0.3),
    ]  # fmt: skip
    order, apart, noise = metric_exam(exam, {"FVU": 0.0, "truth": 1.0}, "one")
    marks = [list(line.get_xdata()) for line in order.lines if line.get_marker() in "os"]
    assert marks == [[-0.6], [0.1, 0.3]]
    assert [list(line.get_xdata()) for line in apart.lines[:2]] == [[0.0, 1.0], [0.2, 1.0]]
    assert list(noise.lines[0].get_xdata()) == [0.1, 0.3]
    assert [label.get_text() for label in order.get_yticklabels()] == ["FVU", "truth"] and metric_exam([], {}, "") == []
    plt.close("all")


def test_methods_are_rows_with_their_own_metrics():
    rows = method_rows(PANEL, "part", {"probe": "a probe", "latent": "a latent"}, {"F1": "{}_f1"})
    assert rows == [{"": "a probe", "F1": None}, {"": "a latent", "F1": None}]  # the first SAE does not have them
    only = Panel("", "", {}, {}, [], {"model": PANEL.saes["model"]})
    rows = method_rows(only, "part", {"probe": "a probe", "latent": "a latent"}, {"F1": "{}_f1"})
    assert rows == [{"": "a probe", "F1": Mean(0.5, 0.4, 0.6)}, {"": "a latent", "F1": 0.3}]


def test_dots_are_the_values_of_each_group():
    (ax,) = panel_dots(PANEL, {"good": GOOD})
    drawn = [sorted(line.get_xdata()) for line in ax.lines]
    assert drawn == [[0.8, 0.9], [0.1, 0.2]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["trained", "controls"]
    plt.close("all")


def test_without_a_panel_nothing_is_shown():
    assert panel_rows(None, {"good": GOOD}) == panel_dots(None, {"good": GOOD}) == []
    assert panel_values(None, {"good": GOOD}) == {} and method_rows(None, "part", {}, {}) == all_methods(None) == []


def test_steering_by_kind_has_rows_of_saes_of_pca_and_of_other_methods():
    rows = {row.pop(""): row for row in steered_kinds(STEERED, kinds=("texture", "scene", ""))}
    assert list(rows)[:3] == ["trained, 2 seeds", "control: random rows", "PCA"]
    assert rows["PCA"]["texture"] == Mean(5, 0, 30)
    assert rows["trained, 2 seeds"]["texture"][:] == (70, 60, 80)
    assert rows["control: random rows"] == {"texture": Mean(30, 10, 50), "scene": Mean(20, 0, 70), "all kinds": None}
    assert rows["no SAE: logistic probe"] == {
        "texture": Mean(100, 60, 100), "scene": None, "all kinds": Mean(90, 80, 95)
    }  # fmt: skip
    assert steered_kinds(None) == []


def test_what_is_not_measured_is_said_with_its_reason_once():
    assert not_measured(STEERED, "steer_kinds") == [
        {"reason": "face: none", "SAEs": "seed 0; seed 1; random rows; PCA"},
        {"reason": "texture: two", "SAEs": "random rows"},
    ]
    assert not_measured(None, "steer_kinds") == []
