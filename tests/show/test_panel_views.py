"""Rows, dots and sentences of a panel: against numbers read by hand."""

import matplotlib.pyplot as plt
import pytest

from lmm_sae_nb.measures.discriminability import Discriminability
from lmm_sae_nb.show.panel import MeasuredPart, Panel, PanelSAE
from lmm_sae_nb.show.panel_views import (
    PanelMetric,
    against,
    against_controls,
    all_methods,
    beside_each_other,
    compared_with_first,
    controls_in_short,
    kind_panels,
    kinds_in_short,
    method_rows,
    metric_exam,
    not_measured,
    panel_dots,
    panel_rows,
    panel_values,
    steered_kinds,
)
from lmm_sae_nb.support.intervals import Mean

GOOD, BAD = PanelMetric("part", "good"), PanelMetric("part", "bad")


def sae(group, about, **metrics):
    return PanelSAE(about, group, {"part": MeasuredPart(metrics, 1.0)})


PANEL = Panel(
    "", "", {}, {}, [],
    {
        "seed_0": sae("seed", "seed 0", good=(0.8, 0.7, 0.9), bad=0.5),
        "seed_1": sae("seed", "seed 1", good=(0.9, 0.8, 1.0), bad=0.7),
        "random": sae("control", "random rows", good=(0.1, 0.0, 0.2), bad=0.6),
        "frozen": sae("control", "frozen decoder", good=(0.2, 0.1, 0.3)),
        "model": sae("model", "no SAE", probe_f1=(0.5, 0.4, 0.6), latent_f1=0.3),
    },
)  # fmt: skip


def test_seeds_share_a_row_with_their_range_and_others_keep_their_interval():
    seeds, random, frozen = panel_rows(PANEL, {"good": GOOD, "bad": BAD})
    assert seeds["good"][:] == (pytest.approx(0.85), 0.8, 0.9) and str(seeds["bad"]) == "0.600 (0.500–0.700)"
    assert random == {"": "control: random rows", "good": Mean(0.1, 0.0, 0.2), "bad": 0.6}
    assert frozen["bad"] is None


def test_a_sentence_says_whether_controls_overlap_with_trained_saes():
    good, bad = against_controls(PANEL, {"the good metric": GOOD, "the bad one": BAD})
    assert good.startswith("The good metric, 2 trained SAEs against 2 controls")
    assert good.endswith(": 0.80 to 0.90 against 0.10 to 0.20. No control is as high.")
    assert ": 0.50 to 0.70 against 0.60 (1 of 1 as high). So a high value does not show" in bad
    short = controls_in_short(PANEL, {"the good metric": GOOD, "the bad one": BAD})
    assert "the good metric 0.80 to 0.90 against 0.10 to 0.20; the bad one 0.50" in short
    assert short.endswith("So high values of the bad one do not show that an SAE learned something.")


def panel_of(trained, controls):
    """A panel with one metric: values of trained SAEs, and of controls by what they are."""
    saes = {f"seed_{n}": sae("seed", "", good=value) for n, value in enumerate(trained)}
    return Panel("", "", {}, {}, [], saes | {key: sae("control", key, good=x) for key, x in controls.items()})


def test_a_control_that_alone_is_high_is_named():
    found = against(panel_of((0.5, 0.6), {"rows": 0.1, "half": 0.2, "eye": 0.55}), GOOD)
    assert found.alone == "eye" and found.clause() == "0.50 to 0.60 against 0.10 to 0.20, and 0.55 in one (eye)"
    close = against(panel_of((0.5, 0.6), {"half": 0.45, "eye": 0.55}), GOOD)
    assert close.alone == "" and close.clause() == "0.50 to 0.60 against 0.45 to 0.55 (1 of 2 as high)"


def test_controls_that_are_all_higher_are_not_called_told_apart():
    (sentence,) = against_controls(panel_of((0.5, 0.6), {"rows": 0.7, "half": 0.8}), {"it": GOOD})
    assert "0.70 to 0.80 (all are higher). So a high value does not show" in sentence


def test_overlapping_intervals_of_single_saes_are_said():
    panel = panel_of([(0.5, 0.2, 0.8)], {"rows": (0.1, 0.0, 0.3)})
    assert against_controls(panel, {"it": GOOD})[0].endswith("but intervals of single SAEs overlap.")
    apart = panel_of([(0.5, 0.4, 0.6)], {"rows": (0.1, 0.0, 0.3)})
    assert against(apart, GOOD).touching is False and against(panel, GOOD).touching is True


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


def test_methods_stand_beside_each_other_in_a_sentence():
    only = Panel("", "", {}, {}, [], {"model": sae("model", "", probe_f1=(0.5, 0.4, 0.6), latent_f1=(0.3, 0.2, 0.4))})
    words = {"probe": "a probe", "latent": "a latent", "other": "another"}
    assert beside_each_other(only, "part", words, "{}_f1") == "a probe 0.50 [0.40, 0.60], a latent 0.30 [0.20, 0.40]"
    assert beside_each_other(None, "part", words, "{}_f1") == beside_each_other(only, "no part", words, "{}_f1") == ""


def test_methods_are_better_or_worse_than_the_first_by_their_intervals():
    above = {"a_above": (0.2, 0.1, 0.3), "b_above": (0.1, -0.1, 0.3), "c_above": (-0.2, -0.3, -0.1)}
    only = Panel("", "", {}, {}, [], {"model": sae("model", "", **above)})
    words = {"first": "a latent", "a": "a probe", "b": "a mean", "c": "a prompt"}
    text = compared_with_first(only, "part", words, "{}_above")
    assert text == "Better than a latent: a probe. No clear difference: a mean. Worse: a prompt."
    assert compared_with_first(None, "part", words, "{}_above") == ""


def test_dots_are_the_values_of_each_group():
    (ax,) = panel_dots(PANEL, {"good": GOOD})
    drawn = [sorted(line.get_xdata()) for line in ax.lines]
    assert drawn == [[0.8, 0.9], [0.1, 0.2]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["trained", "controls"]
    plt.close("all")


def test_without_a_panel_nothing_is_shown():
    assert panel_rows(None, {"good": GOOD}) == panel_dots(None, {"good": GOOD}) == []
    assert panel_values(None, {"good": GOOD}) == {} and against_controls(None, {"good": GOOD}) == []
    assert method_rows(None, "part", {}, {}) == [] and controls_in_short(None, {"good": GOOD}) == ""
    assert all_methods(None) == []


def by_kind(group, about, why=(), **metrics):
    return PanelSAE(about, group, {"steer_kinds": MeasuredPart(metrics, 1.0, list(why))})


STEERED = Panel(
    "", "", {}, {}, [],
    {
        "seed_0": by_kind(
            "seed", "seed 0", ["face: none"], named_of_100_texture=(80, 50, 95),
            control_named_of_100_texture=(0, 0, 30), named_of_100_scene=(10, 0, 60),
            control_named_of_100_scene=(5, 0, 55),
        ),
        "seed_1": by_kind(
            "seed", "seed 1", ["face: none"], named_of_100_texture=(60, 20, 90),
            control_named_of_100_texture=(10, 0, 40), named_of_100_scene=(20, 0, 70),
            control_named_of_100_scene=(5, 0, 55), named_of_100=(40, 30, 50), control_named_of_100=(2, 0, 20),
        ),
        "random": by_kind(
            "control", "random rows", ["face: none", "texture: two"], named_of_100_scene=(20, 0, 70),
            named_of_100_texture=(30, 10, 50),
        ),
        "seed_2": sae("seed", "seed 2", good=0.5),
        "pca": by_kind("classical", "PCA", ["face: none"], named_of_100_texture=(5, 0, 30), named_of_100=(4, 1, 20)),
        "model": PanelSAE("no SAE", "model", {"direction_kinds": MeasuredPart({
            "steer_latent_named_of_100": (50, 40, 60), "steer_probe_named_of_100": (90, 80, 95),
            "steer_probe_named_of_100_texture": (100, 60, 100), "steer_probe_named_above_latent": (40, 20, 60),
        }, 1.0)}),
    },
)  # fmt: skip


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


def test_sentences_on_steering_by_kind_follow_from_the_intervals():
    random, controls, classical, others = kinds_in_short(STEERED)
    assert "texture 70 (5)" in random and "scene 15 (5)" in random and "word: nothing" in random
    assert "lie apart for: all kinds (1 of 1 SAEs), texture (1 of 2 SAEs)." in random
    assert classical == "In the SAE's place, all kinds together (named, of 100): PCA 4 [1, 20]."
    assert "every control that was measured (1) for: texture; a control is as high for: scene." in controls
    assert "no SAE: logistic probe 90 [80, 95]" in others
    assert others.endswith("Better than one latent for each concept: no SAE: logistic probe.")
    assert kinds_in_short(None) == kinds_in_short(PANEL) == []
