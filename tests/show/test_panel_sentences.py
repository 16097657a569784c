"""Sentences of a panel: against numbers read by hand."""

from panels import BAD, GOOD, PANEL, STEERED, panel_of, sae

from lmm_sae_nb.show.panel import MeasuredPart, Panel, PanelSAE
from lmm_sae_nb.show.panel_sentences import (
    against,
    against_controls,
    beside_each_other,
    compared_with_first,
    controls_in_short,
    detection_in_short,
    kinds_in_short,
    steering_in_short,
)


def test_a_sentence_says_whether_controls_overlap_with_trained_saes():
    good, bad = against_controls(PANEL, {"the good metric": GOOD, "the bad one": BAD})
    assert good.startswith("The good metric, 2 trained SAEs against 2 controls")
    assert good.endswith(": 0.80 to 0.90 against 0.10 to 0.20. No control is as high.")
    assert ": 0.50 to 0.70 against 0.60 (1 of 1 as high). So a high value does not show" in bad
    short = controls_in_short(PANEL, {"the good metric": GOOD, "the bad one": BAD})
    assert "the good metric 0.80 to 0.90 against 0.10 to 0.20; the bad one 0.50" in short
    assert short.endswith("So high values of the bad one do not show that an SAE learned something.")


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


def test_sentences_on_steering_by_kind_follow_from_the_intervals():
    random, controls, classical, others = kinds_in_short(STEERED)
    assert "texture 70 (5)" in random and "scene 15 (5)" in random and "word: nothing" in random
    assert "lie apart for: all kinds (1 of 1 SAEs), texture (1 of 2 SAEs)." in random
    assert classical == "In the SAE's place, all kinds together (named, of 100): PCA 4 [1, 20]."
    assert "every control that was measured (1) for: texture; a control is as high for: scene." in controls
    assert "no SAE: logistic probe 90 [80, 95]" in others
    assert others.endswith("Better than one latent for each concept: no SAE: logistic probe.")
    assert kinds_in_short(None) == kinds_in_short(PANEL) == []


def of_model(part, **metrics):
    return Panel("", "", {}, {}, [], {"model": PanelSAE("", "model", {part: MeasuredPart(metrics, 1.0)})})


def test_methods_are_compared_as_detectors_and_as_ways_to_steer():
    two = {"latent": "a latent", "probe": "a probe"}
    detecting = of_model(
        "direction_detection",
        latent_f1=(0.5, 0.4, 0.6),
        probe_f1=(0.8, 0.7, 0.9),
        probe_f1_above_latent=(0.3, 0.2, 0.4),
    )
    assert detection_in_short(detecting, two) == (
        "a latent 0.50 [0.40, 0.60], a probe 0.80 [0.70, 0.90]. Better than a latent: a probe."
    )
    steering = of_model(
        "direction_steering", steer_latent_named_of_100=(58, 38, 76), steer_probe_named_of_100=(50, 30, 70),
        steer_probe_named_above_latent=(-8, -20, 5),
    )  # fmt: skip
    assert steering_in_short(steering, two) == (
        "a latent 58 [38, 76], a probe 50 [30, 70]. No clear difference: a probe."
    )
    assert detection_in_short(steering, two) == steering_in_short(detecting, two) == ""


def test_without_a_panel_nothing_is_said():
    assert detection_in_short(None, {}) == steering_in_short(None, {}) == ""
    assert against(None, GOOD) is None and against_controls(None, {"good": GOOD}) == kinds_in_short(None) == []
    assert controls_in_short(None, {"good": GOOD}) == ""
