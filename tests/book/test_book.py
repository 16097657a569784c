"""The built book stands alone: every page loads with no request to another host and no error."""

import json
import math
import re
import resource
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from conftest import build

from book import pages
from lmm_sae_nb.pictureworld.__main__ import MODEL

pytestmark = pytest.mark.book
SITE = pages.ROOT / "book" / "_build" / "html"
AIMS = {  # of the preset `tiny`, from least to most
    ("cache", "images"): (2000, math.inf), ("interpret", "asked"): (200, math.inf),
    ("train", "fvu"): (0, 0.10), ("train", "dead_fraction"): (0, 0.05), ("train", "loss_recovered"): (0.98, 1),
    ("interpret", "explained_fraction"): (0.4, 1), ("interpret", "concept_accuracy"): (0.85, 1),
    ("score", "iou_strict"): (0.35, 1), ("score", "iou_strict_ratio"): (20, math.inf),
    ("steer", "named_of_100"): (50, 100), ("steer", "control_named_of_100"): (0, 3),
    ("attribute", "spearman_linear"): (0.8, 1),
    ("hallucination", "cured_fraction"): (0.5, 1), ("hallucination", "harmed_fraction"): (0, 0.05),
}  # fmt: skip
SHORT = {  # what was aimed at as well and is not reached; departures say so
    ("interpret", "concept_recall"): 0.9, ("score", "iou_paper_ratio"): 40, ("attribute", "spearman_ig"): 0.95,
}  # fmt: skip
LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
}


@pytest.fixture(scope="module")
def site() -> Path:
    """The built book, made or brought up to date first; its pages can be tested while it is put together."""
    for tasks in (("page", "features"), ("book",)):
        done = build(*tasks)
        assert done.returncode == 0, done.stdout[-6000:]
    return SITE


@pytest.fixture(scope="module")
def published(site) -> list[Path]:
    """The executed notebooks that the book shows."""
    return sorted((pages.ROOT / "book" / "notebooks").glob("*.ipynb"))


def written(site: Path) -> list[Path]:
    """The book's pages, without the templates that its theme leaves among the static files."""
    return sorted(file for file in site.rglob("*.html") if "_static" not in file.parts)


class Addresses(HTMLParser):
    """The addresses that a browser loads by itself to show a page; links for the reader to follow are not."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.styles = False

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.styles = tag == "style"
        if tag == "link" and given.get("rel") not in ("canonical", "license", "author", "next", "prev"):
            self.found.append(given.get("href") or "")
        if tag in LOADS:
            self.found.append(given.get(LOADS[tag]) or "")
        self.found += re.findall(r"url\(['\"]?([^'\")]+)", given.get("style") or "")

    def handle_data(self, data):
        if self.styles:
            self.found += styled(data)


def styled(css: str) -> list[str]:
    """The addresses that a style sheet loads."""
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)
    return re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")\s]+)", css)


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_building_again_does_nothing_and_is_quick(site):
    before = children_seconds()
    done = build("book")
    ran = [line for line in done.stdout.splitlines() if line.startswith(".  ")]
    assert ran == [".  results"]  # looks at the numbers each time, and leaves the page as it is
    assert children_seconds() - before < 5  # of processors, so that a busy machine makes no difference


def test_every_source_has_its_page(site, published):
    assert [page.stem for page in published] == [source.stem for source in pages.sources()]
    for name in ("index", "intro", "notation", "departures", "features", "results", "references"):
        assert (site / f"{name}.html").is_file()
    for page in published:
        assert (site / "notebooks" / f"{page.stem}.html").is_file()


def test_no_page_or_style_loads_from_another_host(site):
    for file in written(site):
        addresses = Addresses()
        addresses.feed(file.read_text(encoding="utf-8"))
        others = [found for found in addresses.found if re.match(r"(https?:)?//", found)]
        assert not others, f"{file.relative_to(site)} loads {others}"
    for file in site.rglob("*.css"):
        others = [found for found in styled(file.read_text(encoding="utf-8")) if re.match(r"(https?:)?//", found)]
        assert not others, f"{file.relative_to(site)} loads {others}"


def test_every_page_loads_alone_without_error_and_draws_its_widgets(site, browser):
    for file in written(site):
        page, wrong = browser.new_page(), []
        page.on("request", lambda r, w=wrong: r.url.startswith(("file:", "data:", "blob:")) or w.append(r.url))
        page.on("requestfailed", lambda r, w=wrong: w.append(f"missing: {r.url}"))
        page.on("pageerror", lambda error, w=wrong: w.append(str(error)))
        page.goto(file.as_uri(), wait_until="load")
        if sent := re.search(r"http-equiv=.refresh. content=.0; url=([^'\"]+)", file.read_text("utf-8"), re.IGNORECASE):
            page.wait_for_url((file.parent / sent[1]).as_uri())  # a page that is closed on its way may never be closed
        if saved := page.locator(f"script[type='{pages.WIDGET}']").count():
            page.wait_for_function(f"document.querySelectorAll('.widget-subarea > *').length >= {saved}")
        page.wait_for_timeout(300)
        assert not wrong, f"{file.relative_to(site)}: {wrong}"
        assert page.get_by_text("Error displaying widget").count() == 0
        page.close()


def test_formulas_are_set(site, browser):
    page = browser.new_page()
    page.goto((site / "notation.html").as_uri())
    page.wait_for_selector("mjx-container svg", state="attached")
    assert page.locator("mjx-container").count() == page.locator(".math").count() > 10
    assert page.locator("[data-mjx-error], merror").count() == 0
    page.close()


def test_no_cell_failed_or_warned(published):
    for notebook in published:
        for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells):
            for output in cell.get("outputs", []):
                told = output.get("text", output.get("evalue", ""))
                loud = output.output_type == "error" or output.get("name") == "stderr"
                assert not loud, f"{notebook.stem}, cell {number}: {told[:300]}"


def test_the_injected_parameters_are_not_shown(site, published):
    for notebook in published:
        page = (site / "notebooks" / f"{notebook.stem}.html").read_text(encoding="utf-8")
        assert "tag_injected-parameters" not in page


def test_the_results_page_shows_every_number(site):
    page = (site / "results.html").read_text(encoding="utf-8")
    for file in pages.ROOT.glob("data/artifacts/tiny/*/metrics.json"):
        for name in json.loads(file.read_text()):
            assert re.sub("_(low|high)$", "", name) in page, f"{name} of {file.parent.name}"


def test_the_aims_are_met(site):
    found = {stage: metrics_of(stage) for stage, _ in AIMS}
    for (stage, name), (least, most) in AIMS.items():
        assert least <= found[stage][name] <= most, f"{stage}: {name} is {found[stage][name]}, not {least} to {most}"
    clip = found["score"]
    assert clip["clip_paper_kinds_above_random"] == clip["clip_paper_kinds"] == 8


def test_what_falls_short_still_does(site):
    for (stage, name), aim in SHORT.items():
        found = metrics_of(stage)
        assert found.get(f"{name}_high", found[name]) < aim, f"{name} reaches {aim} now: mend what departures say"


def test_the_exam_that_ships_lies_within_the_intervals_of_the_one_that_was_just_sat(site):
    ships, fresh = json.loads((pages.ROOT / MODEL / "exam.json").read_text()), metrics_of("pictureworld")
    assert len(ships.keys() & fresh.keys()) > 20  # a small exam lacks some, such as the seldom basin
    for family in ships.keys() & fresh.keys():
        assert fresh[f"{family}_low"] - 1e-9 <= ships[family]["fraction"] <= fresh[f"{family}_high"] + 1e-9, family


def metrics_of(stage: str) -> dict[str, float]:
    return json.loads((pages.ROOT / "data/artifacts/tiny" / stage / "metrics.json").read_text())
