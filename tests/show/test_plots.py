"""The live figure: shown in place while it lasts, gone when it is over; no figure is left open."""

import io
import re

import matplotlib.pyplot as plt
import matplotlib.text
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from PIL import Image

from lmm_sae_nb.measures.selectivity import Pair
from lmm_sae_nb.show import plots, style
from lmm_sae_nb.show.seed_study import Measured, SeedStudy
from lmm_sae_nb.support.intervals import Mean, Proportion, bounds
from lmm_sae_nb.support.stages import Stage

ROWS = [{"step": step, "fvu": 1 / step, "l0": 4.0} for step in range(1, 6)]


@pytest.fixture
def shell():
    """An IPython that shows things to whoever captures them, and no longer exists afterwards; no figure is open."""
    plt.close("all")
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def shown(captured):
    """What was shown, first and in updates: its kind, and whether it replaced what its place had."""
    return [("Figure" if "Figure" in out.data["text/plain"] else "nothing", out.update) for out in captured.outputs]


def test_a_live_figure_is_redrawn_in_place_and_goes(shell):
    with capture_output() as captured, plots.live(["fvu", "l0"], every=0) as on_log:
        for n in range(1, 6):
            on_log(ROWS[:n])
    assert shown(captured) == [("nothing", False), *[("Figure", True)] * 4, ("nothing", True)]
    assert len({out.transient["display_id"] for out in captured.outputs}) == 1
    assert not plt.get_fignums()


def test_a_live_figure_is_not_redrawn_more_often_than_asked(shell):
    with capture_output() as captured, plots.live(["fvu"], every=1000) as on_log:
        for n in range(1, 6):
            on_log(ROWS[:n])
    assert len(shown(captured)) == 3


def test_a_group_without_a_case_says_so_in_its_row():
    rows = {"one": {"no": Mean(0.5, 0.2, 0.8), "yes": None}, "other": {"no": Mean(0.1, 0.0, 0.3)}, "last": {"no": None}}
    ax = plots.means(rows, "fraction")
    assert [text.get_position()[1] for text in ax.texts if text.get_text() == "no case"] == pytest.approx([1.91, 0.09])
    plots.means({"one": {"no": None}}, "fraction").figure.draw_without_rendering()


def test_a_live_figure_stays_where_an_error_ends_it(shell):
    with capture_output() as captured, pytest.raises(OSError, match="disk"), plots.live(["fvu"], every=0) as on_log:
        on_log(ROWS)
        raise OSError("disk")
    assert shown(captured)[-1] == ("Figure", True)


def test_a_table_escapes_what_it_shows():
    shown = plots.table([{"kind": "<b>", "n": 3, "iou": 0.5}, {"kind": "a & b", "iou": None}], "<i>").data
    assert "<b>" not in shown and "<i>" not in shown
    assert "&lt;b&gt;" in shown and "a &amp; b" in shown
    assert shown.count("<tr>") == 3
    assert ">0.500<" in shown and ">3<" in shown
    assert shown.count("–") == 2  # n of the second row is not there, its IoU is None


def test_a_table_with_fewer_digits_keeps_none_of_large_numbers():
    rows = [
        {"IoU": Mean(0.4567, 0.4, 0.5), "of 100": Mean(9.0909, 1.0765, 47.888), "FVU": 123.13, "dose": 2.0, "n": 30}
    ]
    text = re.sub("<[^>]*>", " ", plots.table(rows, digits=2).data)
    assert all(each in text for each in ("0.46", "[0.40, 0.50]", " 9 ", "[1, 48]", " 123 ", "2.00", " 30 "))


def test_a_table_rounds_a_number_once():
    assert "[0.42, 0.54]" in plots.table([{"F1": Mean(0.4849, 0.4151, 0.54493)}], digits=2).data


def test_a_table_puts_an_interval_below_its_mean():
    shown = plots.table([{"IoU": Mean(0.5, 0.25, 0.75), "yes": Proportion(0.5, 0.1, 0.9, 2)}]).data
    for interval in ("[0.250, 0.750]", "[0.100, 0.900] of 2"):
        assert re.search(rf">0\.500<br><small[^>]*>{re.escape(interval)}</small></td>", shown)


def test_a_column_with_a_text_in_it_is_set_left():
    shown = plots.table([{"kind": None, "n": 3}, {"kind": "cat", "n": None}]).data
    assert re.findall(r"text-align:(\w+)", shown) == ["left", "right"] * 3


def test_texts_are_escaped_and_shaded():
    shown = plots.shaded_texts({"latent <3>": [(["<i>", "cat"], [0.0, 2.0]), (["a"], [1.0])], "none": []}).data
    assert "<i>" not in shown and "&lt;i&gt;" in shown and "latent &lt;3&gt;" in shown
    assert shown.count("<p ") == 2 and 'title="+2.000">cat<' in shown


def test_axes_for_pictures_are_as_many_as_asked():
    assert [len(plots.picture_axes(n)) for n in (1, 4, 7)] == [1, 4, 7]
    plt.close("all")


def test_calibration_has_a_dot_for_each_thing():
    ax = plots.calibration({"a": [0.1, 0.2], "b": [0.5]}, {"a": [0.3, 0.1], "b": [0.6]}, "x", "y")
    assert [line.get_xydata().tolist() for line in ax.lines[1:]] == [[[0.1, 0.3], [0.2, 0.1]], [[0.5, 0.6]]]
    plt.close("all")


MEANS = {kind: {"own images": Mean(0.3, 0.2, 0.4), "random": Mean(0.1, 0.0, 0.2)} for kind in ("scene", "$5 or $6")}
NOISE = np.random.default_rng(0).random(9)
PICTURES = [Image.new("RGB", (24, 24))] * 7
LONG = "a long answer of a model about 5 $ here and 6 $ there " * 3
PAIR = Pair(PICTURES[0], Image.new("RGB", (24, 24), "red"), "colour", ("black",), ("red",))
WAYS = {
    key: value for name in ("right", "right_object") for way in ("exemplars", "steering", "both")
    for key, value in bounds(f"{way}_{name}", Mean(0.5, 0.4, 0.6)).items()
}  # fmt: skip
DYING = [{"step": n, "loss": 0.1, "fvu": 0.1, "dead_fraction": 0.001 * (n == 7)} for n in range(1500)]
FIGURES = {
    "training": lambda: plots.training(ROWS, ["fvu", "l0"]),
    "training with long ticks": lambda: plots.training(DYING, ["loss", "fvu", "dead_fraction"]),
    "proportions": lambda: plots.proportions({LONG[:40]: {"fraction": 0.5, "low": 0.4, "high": 0.6, "least": 0.7}}),
    "means": lambda: plots.means(MEANS, "IoU"),
    "mean_panels": lambda: plots.mean_panels({"IoU, paper": MEANS, "IoU, strict": MEANS}),
    "histogram": lambda: plots.histogram(NOISE, "fraction", log=True),
    "stacked": lambda: plots.stacked({"layer": {f"kind {n}": 0.1 for n in range(11)}}, "fraction", limit=0.9),
    "compared": lambda: plots.compared({"train": {"predicted": 1.0, "measured": 2.0}}, "seconds"),
    "bars": lambda: plots.bars({"a": {"b": 1.0, "c": 20.0}}, "MB"),
    "calibration": lambda: plots.calibration({"$a$": NOISE}, {"$a$": NOISE}, "truth", "measured"),
    "agreement": lambda: plots.agreement(NOISE, {"linear": NOISE, "integrated": NOISE}),
    "scatter": lambda: plots.scatter(NOISE, NOISE, "x", "y"),
    "cross_table": lambda: plots.cross_table({"$a$": {"b": 3}, "b": {"c": 4}}, "x", "y"),
    "dose_curves": lambda: plots.dose_curves({"names $ and $": {0.5: Mean(0.1, 0, 0.2)}}, "dose", "fraction"),
    "size_panels": lambda: plots.size_panels(
        {LONG: ({"$fvu$": {2: Mean(0.1, 0, 0.2), 8: Mean(0.2, 0, 0.3)}}, 4)}, "fraction", LONG
    ),
    "images": lambda: plots.images(PICTURES, [LONG] * 7),
    "signed_maps": lambda: plots.signed_maps(PICTURES[0], {LONG: np.ones((2, 2)), "b": -np.ones((2, 2))}),
    "changed_pairs": lambda: plots.changed_pairs([(LONG[:40], PAIR, np.ones((2, 2)))] * 2),
    "ways_of_explaining": lambda: plots.ways_of_explaining(WAYS),
    "picture_rows": lambda: plots.picture_rows([(LONG, PICTURES[:5]), ("none", [])]),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_in_the_book_a_figure_is_not_scaled_down_and_its_text_is_legible(name):
    plt.close("all")
    with plt.rc_context():
        plots.style()
        FIGURES[name]()
        figure = plt.gcf()
        file = io.BytesIO()
        figure.savefig(file, bbox_inches="tight")  # as the notebook does
        assert Image.open(file).width <= 740
        texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() and text.get_visible()]
        assert texts
        assert all(text.get_fontsize() / 72 * figure.dpi > 16 for text in texts)
    plt.close("all")


@pytest.mark.parametrize("text", ["5 $ and 6 $", "$x^2$", r"\$", "no dollar"])
def test_dollars_are_drawn_as_they_are(text):
    figure = plt.figure()
    drawn, is_mathematics = figure.text(0, 0, plots.literal(text))._preprocess_math(plots.literal(text))
    assert not is_mathematics and drawn == text
    plt.close(figure)


def test_a_long_title_is_wrapped_not_shrunk():
    lines = plots.wrapped(LONG, 2).splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= 20 + LONG.count("$")
    assert " ".join(lines).replace("\\$", "$") == LONG.strip()


def test_a_colour_means_the_same_on_every_page():
    assert style.colours(["own images", "random"])["random"] == style.colours(["a", "random"])["random"] == plots.CHANCE
    assert len(set(style.colours(["own images", "random", "a", "b", "c"]).values())) == 5


def test_the_same_metric_of_other_saes_is_grey_and_that_of_this_run_is_coloured(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    stage = Stage("tiny", "steer").begin({}, [])
    stage.finish({"named": 0.4})
    named = {"named": Measured.of([0.5, None, 0.75]), "chance": Measured.of([0.0, 0.0, 0.25])}
    study = SeedStudy("", "", {}, {}, [0, 1, 2], [], {"steer": named})
    words = {"named": "answers that name the object", "chance": "control", "unknown": "not drawn"}
    ax = plots.other_saes(study, stage, words, "fraction")
    drawn = [(line.get_color(), line.get_xdata().tolist()) for line in ax.lines]
    saes = [drawn[0], drawn[3]]
    assert saes == [(style.CHANCE, [0.5, 0.75]), (style.CHANCE, [0.0, 0.0, 0.25])]
    assert [found for found in drawn if found[0] == style.LATENT] == [(style.LATENT, [0.4])]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["answers that name the object", "control"]
    assert [text.get_text() for text in ax.figure.legends[0].get_texts()] == [
        "3 SAEs", "their median", "this page's SAE",
    ]  # fmt: skip
    assert plots.other_saes(None, stage, words, "fraction") is None
    assert plots.other_saes(study, stage, {"unknown": "not drawn"}, "fraction") is None
    plt.close("all")


def test_the_legend_of_several_panels_names_the_series_of_each():
    mean = Mean(0.2, 0.1, 0.3)
    axes = plots.mean_panels(
        {"one": {"layer": {"own images": mean, "random images": mean}}, "two": {"layer": {"moved": mean}}}
    )
    (legend,) = axes[0].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["own images", "random images", "moved"]


def test_a_figure_without_values_says_so():
    ax = plots.scatter([], [], "predicted", "measured")
    assert [text.get_text() for text in ax.texts] == ["there is nothing to compare"]
    assert not plots.scatter([1.0], [2.0], "predicted", "measured").texts
