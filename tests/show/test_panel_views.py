"""Rows, dots and sentences of a panel: against numbers read by hand."""

import matplotlib.pyplot as plt
import pytest

from lmm_sae_nb.show.panel import MeasuredPart, Panel, PanelSAE
from lmm_sae_nb.show.panel_views import (
    PanelMetric,
    against_controls,
    beside_each_other,
    method_rows,
    panel_dots,
    panel_rows,
    panel_values,
    reached_by_controls,
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
    assert seeds["good"][:] == (pytest.approx(0.85), 0.8, 0.9) and str(seeds["bad"]) == "0.600 (0.500 to 0.700)"
    assert random == {"": "random rows", "good": Mean(0.1, 0.0, 0.2), "bad": 0.6}
    assert frozen["bad"] is None


def test_a_sentence_says_whether_controls_overlap_with_trained_saes():
    good, bad = against_controls(PANEL, {"the good metric": GOOD, "the bad one": BAD})
    assert good.startswith("The good metric: 2 trained SAEs have 0.80 to 0.90, 2 control SAEs 0.10 to 0.20")
    assert "This tells them apart" in good and "does not tell" in bad
    reached = reached_by_controls(PANEL, {"the good metric": GOOD, "the bad one": BAD})
    assert "the bad one (0.60: random rows; trained SAEs 0.50 to 0.70)" in reached and "good metric" not in reached
    assert reached_by_controls(PANEL, {"the good metric": GOOD}) == ""


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


def test_dots_are_the_values_of_each_group():
    (ax,) = panel_dots(PANEL, {"good": GOOD})
    drawn = [sorted(line.get_xdata()) for line in ax.lines]
    assert drawn == [[0.8, 0.9], [0.1, 0.2]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["trained", "controls"]
    plt.close("all")


def test_without_a_panel_nothing_is_shown():
    assert panel_rows(None, {"good": GOOD}) == panel_dots(None, {"good": GOOD}) == []
    assert panel_values(None, {"good": GOOD}) == {} and against_controls(None, {"good": GOOD}) == []
    assert method_rows(None, "part", {}, {}) == [] and reached_by_controls(None, {"good": GOOD}) == ""
