"""Whatever text data and models give: a figure draws it as it is, within the figure; a page shows it escaped."""

import html
import json
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import matplotlib.text
import numpy as np
import pytest
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from PIL import Image

from book import results
from lmm_sae_nb.hallucination.search import Limits, Search, Setting, Trial
from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.measures.discriminability import Discriminability
from lmm_sae_nb.measures.selectivity import Pair
from lmm_sae_nb.score.examples import Overlap
from lmm_sae_nb.show import markup, plots, report, texts
from lmm_sae_nb.show.panel import MeasuredPart, Panel, PanelSAE
from lmm_sae_nb.show.panel_views import PanelMetric, kind_panels, metric_exam, panel_dots
from lmm_sae_nb.show.seed_study import Measured, SeedStudy
from lmm_sae_nb.show.steering_panel import answers_html, download_html
from lmm_sae_nb.show.thumbnails import histogram_svg
from lmm_sae_nb.steer.experiments import CaseStudy
from lmm_sae_nb.steer.fluency import Ordinary
from lmm_sae_nb.steer.steering import Edit
from lmm_sae_nb.support.intervals import Mean, bounds
from lmm_sae_nb.support.stages import Stage

HOSTILE = {
    "dollars": "$10 (10% off $20)",
    "cases": r"solve $\begin{cases} x$",
    "backslashes": r"\$ \\ $x^2_{a}$ \frac{",
    "long": "a long answer of 5 $ " * 95,
    "one word": "W" * 2000,
    "emoji": "\U0001f98a\u200d\U0001f525 \U0001f1e9\U0001f1ea ok",
    "script": "<script>alert(1)</script>",
    "lines": "one\ntwo\r\nthree\u2028four" + "\nmore" * 40,
    "NUL": "a\0b\x1b[31m\x07",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd abc\u202e",
    "surrogate": "half \ud83d of a pair",
    "underscore": "_hidden",
    "percent": "%s {} {0} %(x)s",
    "blank": " \t\n",
    "empty": "",
    "Chinese": "\u6236\u5916\u7684\u732b",
}
SHORT = ("dollars", "cases", "script", "emoji", "NUL", "right to left", "surrogate", "percent")
ALL_AT_ONCE = {
    "short": "$ $x^ " + " ".join(HOSTILE[kind] for kind in SHORT),
    "wide": HOSTILE["one word"],
}
NOISE = np.random.default_rng(0).random(5)
IMAGE = Image.new("RGB", (24, 24))
MASK = np.eye(24, dtype=bool)
MAP = np.ones((2, 2), np.float32)
MEAN = Mean(0.3, 0.2, 0.4)
PAIR = Pair(IMAGE, Image.new("RGB", (24, 24), "red"), "colour", ("black",), ("red",))
PART = MeasuredPart({"good": 0.5, "good_scene": (0.5, 0.4, 0.6)}, 1.0)


def search(text: str) -> Search:
    setting = Setting((text, "b"), 2.0, (Edit(1, 2.0),))
    return Search(setting, [Trial(setting, 0.5, 0.1, 0.2, 0.3)])


def study(text: str):
    stage = Stage("tiny", "steer")
    measured = SeedStudy("", "", {}, {}, [0, 1], [], {"steer": {text: Measured.of([0.5, 0.75])}})
    return plots.other_saes(measured, stage, {text: text}, text)


def exemplar() -> Exemplar:
    return Exemplar(0, IMAGE, MAP, np.ones((2, 2), bool))


FIGURES = {
    "curve": lambda t: plots.curve([{t: 1.0, "x": 1.0}], t, "x", label=t),
    "training": lambda t: plots.training([{"step": 1, t: 1.0}, {"step": 2, t: 2.0}], [t, t]),
    "proportions": lambda t: plots.proportions({t: {"fraction": 0.5, "low": 0.4, "high": 0.6, "least": 0.7}}),
    "means": lambda t: plots.means({t: {t: MEAN, "random": MEAN, "other name": MEAN}}, t),
    "mean_panels": lambda t: plots.mean_panels({t: {t: {t: MEAN}}, "b": {t: {"c": MEAN}}}),
    "ways_of_explaining": lambda t: plots.ways_of_explaining(
        {name: x for way in ("steering", "exemplars") for name, x in
         (bounds(f"{way}_right", MEAN) | bounds(f"{way}_right_{t}", MEAN)).items()}
    ),
    "histogram": lambda t: plots.histogram(NOISE, t, ylabel=t),
    "stacked": lambda t: plots.stacked({t: {t: 0.1, "b": 0.2}}, t),
    "compared": lambda t: plots.compared({t: {t: 1.0, "b": 2.0}}, t),
    "other_saes": study,
    "bars": lambda t: plots.bars({t: {t: 1.0, "b": 2.0}}, t),
    "calibration": lambda t: plots.calibration({t: NOISE}, {t: NOISE}, t, t),
    "agreement": lambda t: plots.agreement(NOISE, {t: NOISE, "b": NOISE}, t),
    "scatter": lambda t: plots.scatter(NOISE, NOISE, t, t),
    "search_trials": lambda t: plots.search_trials(search(t), Limits(0.1)),
    "cross_table": lambda t: plots.cross_table({t: {t: 3}, "b": {"c": 4}}, t, t),
    "dose_curves": lambda t: plots.dose_curves({t: {0.5: MEAN}}, t, t),
    "size_panels": lambda t: plots.size_panels({t: ({t: {2: MEAN}}, 4), "b": ({t: {2: MEAN}}, 4)}, t, t),
    "panel_dots": lambda t: panel_dots(
        Panel("", "", {}, {}, [], {t: PanelSAE(t, "seed", {"p": PART})}),
        {t: PanelMetric("p", "good"), "b": PanelMetric("p", "good")},
    ),
    "kind_panels": lambda t: kind_panels(
        Panel("", "", {}, {}, [], {"a": PanelSAE(t, "seed", {"p": PART}), "b": PanelSAE(t, "control", {"p": PART})}),
        {"b": t}, {t: PanelMetric("p", "good"), "b": PanelMetric("p", "good")},
    ),
    "metric_exam": lambda t: metric_exam([Discriminability(t, 3, {t: MEAN}, 0.5, 1.0, 0.1)], {t: 0.5}, t),
    "images": lambda t: plots.images([IMAGE] * 2, [t] * 2),
    "picture_rows": lambda t: plots.picture_rows([(t, [IMAGE] * 5), (t, [])]),
    "exemplar_strip": lambda t: plots.exemplar_strip([(t, [exemplar()] * 5)]),
    "signed_maps": lambda t: plots.signed_maps(IMAGE, {t: MAP, "b": -MAP}),
    "changed_pairs": lambda t: plots.changed_pairs([(t, replace(PAIR, taken_out=(t,), put_in=(f"{t} b",)), MAP)]),
    "overlaps": lambda t: plots.overlaps([Overlap(t, IMAGE, MASK, ~MASK, 0.5)] * 2, exemplar()),
}  # fmt: skip


def letters(text: str) -> str:
    """The letters that a reader can find: without spaces, line breaks, boxes and escapes."""
    return "".join(re.findall(r"[a-zA-Z0-9<>$%(){}]", text))


def drawn(figure) -> list[str]:
    found = figure.findobj(matplotlib.text.Text)
    return [text._preprocess_math(text.get_text())[0] for text in found if text.get_visible() and text.get_text()]


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    plt.close("all")
    with plt.rc_context(), warnings.catch_warnings():
        plots.style()
        warnings.simplefilter("error")  # a letter that the font lacks is a warning
        yield
    plt.close("all")


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_draws_any_text_as_it_is_and_is_no_wider_than_its_place(project, name):
    for kind, text in ALL_AT_ONCE.items():
        FIGURES[name](text)
        figure = plt.gcf()
        figure.draw_without_rendering()
        size = figure.get_tightbbox()
        assert size.width <= 7.45 and size.height <= 12, (kind, size)
        of_text = [line for line in drawn(figure) if letters(text)[:5] in letters(line)]
        if letters(text) and name != "panel_dots":
            assert of_text, (kind, drawn(figure))
        for line in of_text:
            assert texts.CUT in line or letters(text) in letters(line), (kind, line)
        plt.close("all")


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_text_is_whole_or_ends_with_an_ellipsis_and_fits(project, kind):
    text = HOSTILE[kind]
    figure = plt.figure()
    for made, inches in ((texts.literal, 3.0), (texts.one_line, 2.0), (texts.wrapped, 1.7)):
        ready = made(text, inches)
        shown = figure.text(0, 0, ready)
        shown_text, is_mathematics = shown._preprocess_math(ready)
        assert not is_mathematics
        assert letters(shown_text) == letters(text) or texts.CUT in shown_text
        assert shown.get_window_extent(figure.canvas.get_renderer()).width <= 100 * inches + 12
        assert made(ready, inches) == ready
    assert "\n" not in texts.one_line(text)
    assert texts.wrapped(text).count("\n") < texts.LINES


def test_letters_that_are_read_from_the_right_are_drawn_from_the_right(project):
    assert texts.literal("abc \u05d0\u05d1 \u05d2 def") == "abc \u05d2 \u05d1\u05d0 def"


def test_a_letter_of_another_font_is_drawn_if_the_figures_use_that_font(project):
    assert texts.literal("\u1e9e\u6236") == "\u1e9e\u25a1"
    plt.rcParams["font.family"] = ["DejaVu Sans", "STIXGeneral"]
    assert texts.literal("\u2a0c") == "\u2a0c"


# Markup.

ALLOWED = {
    "table", "caption", "thead", "tbody", "tr", "th", "td", "div", "p", "b", "span", "mark", "a", "svg", "path", "text",
}  # fmt: skip


class Reader(HTMLParser):
    """What a browser shows: the text, and the elements."""

    def __init__(self, page: str):
        super().__init__()
        self.shown, self.elements = "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert tag in ALLOWED and not any(name.startswith("on") for name, _ in attrs), (tag, attrs)
        self.elements.append(tag)

    def handle_data(self, data):
        self.shown += data


MARKUP = (
    HOSTILE["script"] + ' " onclick=" \' `````` </td></table> &lt; <!-- <img src=x onerror=y> $a$ | [x](javascript:y)'
    " ![p](http://e.com/i.png) **b** {eval-rst}`x` \0 \ud83d"
)
VISIBLE = MARKUP.replace("\0", "\ufffd").replace("\ud83d", "\ufffd")
STUDY = CaseStudy(MARKUP, 7, MARKUP, "an answer", [0.0, 2.0], ["a " + MARKUP, MARKUP], [], Ordinary([], []))
PAGES = {
    "table": lambda: plots.table([{MARKUP: MARKUP, "n": 1.0}], MARKUP).data,
    "shaded_texts": lambda: plots.shaded_texts({MARKUP: [([MARKUP], [1.0])]}).data,
    "mark_changes": lambda: plots.mark_changes("an answer", MARKUP),
    "case_studies": lambda: plots.case_studies([STUDY]).data,
    "answers": lambda: answers_html({"untouched": "a", "steered": MARKUP}),
    "download": lambda: download_html(MARKUP, MARKUP),
    "histogram": lambda: histogram_svg(np.array([1, 2]), np.array([0.0, 1.0, 2.0]), MARKUP),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_markup_as_text(name):
    read = Reader(PAGES[name]())
    words = "".join(read.shown.split())
    if name != "download":  # there it is the name of the file
        assert "".join(VISIBLE.split()) in words
    assert "script" not in read.elements and "img" not in read.elements


def rendered(markdown: str) -> str:
    """Markdown as HTML, with tables, formulas and raw HTML switched on."""
    reader = MarkdownIt("commonmark", {"html": True}).enable("table").use(dollarmath_plugin)
    return reader.render(markdown)


def test_a_sentence_shows_markup_as_text_and_keeps_what_its_author_wrote():
    page = rendered(markup.sentence(f"**Bold**, `code` and [A4](A4_controls#x): {markup.as_text(MARKUP)}"))
    assert "<strong>Bold</strong>" in page and "<code>code</code>" in page and '<a href="A4_controls#x">A4</a>' in page
    assert page.count("<") == 8  # those three, and the paragraph
    assert " ".join(VISIBLE.split()) in html.unescape(page)


def test_a_sentence_with_a_text_that_nobody_escaped_has_no_html_no_picture_and_no_link_elsewhere():
    page = rendered(markup.sentence(f"The answer is {MARKUP}\n\n# no heading"))
    assert not re.search(r"<(script|img|a|h1|span|div|eq)\b", page)
    assert "\ud83d" not in page


@pytest.mark.parametrize("link", ["[x [y]](javascript:a)", r"\\[x](http://e.com)", "![x](a.png)", "<http://e.com>"])
def test_a_link_to_elsewhere_is_shown_as_text(link):
    assert not re.search("<(a|img)", rendered(markup.sentence(link)))


def test_findings_and_the_result_are_one_line_each(monkeypatch):
    outputs = []
    monkeypatch.setattr(report, "display", outputs.append)
    report.findings("one\n\n# two", MARKUP)
    report.headline(None, "ours\n<b>", "paper", "why")
    first, second = (output.data for output in outputs)
    assert len(first.splitlines()) == 2 and all(line.startswith("- ") for line in first.splitlines())
    assert [line for line in second.splitlines() if line != ">"] == [
        "> **Result:** ours &lt;b>", "> **The paper:** paper", "> **Why they differ:** why",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["iou_paper", "a|b", "`x`", "<b>", "a\nb", "$x$", "*a*", "{role}`x`", "[x](y)"])
def test_a_name_in_the_type_of_code_is_a_cell_of_a_table(name):
    page = rendered(f"| a | b |\n|---|---|\n| {markup.code(name)} | 1 |\n")
    assert page.count("<td>") == 2
    (inside,) = re.findall(r"<code>(.*?)</code>", page, re.DOTALL)
    assert "<" not in inside and html.unescape(inside) == name.replace("\ud83d", "\ufffd")


def test_the_results_page_shows_hostile_names_of_metrics_as_they_are(tmp_path):
    (tmp_path / "score").mkdir()
    (tmp_path / "score/metrics.json").write_text(json.dumps({f"iou_{MARKUP[:-1]}": 0.5, "n": 3}))
    page = rendered(results.page(tmp_path, ["score"]))
    assert not re.search(r"<(script|img|a|em|math)\b", page.split("Every metric")[1])
    assert page.split("Every metric")[1].count("<td") == 10
