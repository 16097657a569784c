"""The built book stands alone: every page loads with no request to another host and no error."""

import json
import re
import resource
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import nbformat
import pytest
from conftest import build

from book import api, pages

pytestmark = pytest.mark.book
SITE = pages.ROOT / "book" / "_build" / "html"
WINDOW = {"width": 1300, "height": 900}  # of a laptop
FIGURE = 740  # pixels of width up to which a figure's text is as large on the page as it was drawn
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


def test_building_again_does_nothing_and_takes_little_more_than_a_list_of_the_tasks(site):
    before = children_seconds()
    subprocess.run([sys.executable, "-m", "doit", "list"], cwd=pages.ROOT, capture_output=True, check=True)
    listed = children_seconds()
    done = build("book")
    again = children_seconds() - listed
    ran = [line for line in done.stdout.splitlines() if line.startswith(".  ")]
    assert ran == [".  results"]  # looks at the numbers each time, and leaves the page as it is
    assert again < 3 * (listed - before)  # of processors, so that a busy machine makes no difference


def test_every_source_has_its_page(site, published):
    assert [page.stem for page in published] == [source.stem for source in pages.sources()]
    for name in ("index", "intro", "notation", "departures", "features", "results", "references", *api.pages()):
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
        page.on("requestfailed", lambda r, w=wrong: asked_ahead(r) or w.append(f"missing: {r.url}"))
        page.on("pageerror", lambda error, w=wrong: w.append(str(error)))
        page.goto(file.as_uri(), wait_until="load")
        if sent := re.search(r"http-equiv=.refresh. content=.0; url=([^'\"]+)", file.read_text("utf-8"), re.IGNORECASE):
            page.wait_for_url((file.parent / sent[1]).as_uri())  # a page that is closed on its way may never be closed
        if saved := page.locator(f"script[type='{pages.WIDGET}']").count():
            page.wait_for_function(f"document.querySelectorAll('.widget-subarea > *').length >= {saved}")
        page.wait_for_timeout(300)
        assert not wrong, f"{file.relative_to(site)}: {wrong}"
        assert page.get_by_text("Error displaying widget").count() == 0
        broken = page.evaluate("[...document.fonts].filter(font => font.status === 'error').map(font => font.family)")
        assert broken == []
        page.close()


def asked_ahead(request):
    """Whether a font that is there was refused. A theme asks for it ahead of its use, which needs a server."""
    return request.resource_type == "font" and Path(url2pathname(urlsplit(request.url).path)).is_file()


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


def test_the_results_page_shows_every_target_beside_its_metric(site):
    rows = re.findall(r"<tr.*?</tr>", (site / "results.html").read_text(encoding="utf-8"), re.DOTALL)
    for stage, targets in json.loads((pages.ROOT / "book" / "targets.json").read_text()).items():
        for metric, bounds in targets.items():
            named = re.compile(f">{metric}<".replace("*", r"\w*"))
            shown = "".join(row for row in rows if named.search(row))
            for bound in bounds.values():
                assert f"{bound:g}" in shown, f"{stage}: the row of {metric} does not show its target {bound}"


SIDEWAYS = """() => [...document.querySelectorAll("pre")]
    .filter(block => block.scrollWidth > block.clientWidth)
    .map(block => block.innerText.slice(0, 80))"""
TOO_WIDE = """width => [...document.querySelectorAll(".cell_output img")]
    .filter(image => image.naturalWidth > width).map(image => image.alt || image.src)"""
# Pictures inside a widget (blob:) are no figures: the texts beside them say what they show.
UNDESCRIBED = """() => [...document.querySelectorAll(".cell_output img:not([src^='blob:'])")]
    .filter(image => !image.alt || image.alt.startsWith("../_images")).map(image => image.src)"""


def test_no_code_scrolls_sideways_and_figures_are_legible_and_described(site, browser):
    page, wrong = browser.new_page(viewport=WINDOW), []
    for file in written(site):
        if 'http-equiv="refresh"' in file.read_text(encoding="utf-8").lower():
            continue  # it sends the browser on to another page, which has its turn too
        page.goto(file.as_uri(), wait_until="load")
        name = file.relative_to(site)
        wrong += [f"{name} scrolls sideways: {text}" for text in page.evaluate(SIDEWAYS)]
        wrong += [f"{name}: a figure is wider than {FIGURE} px: {alt}" for alt in page.evaluate(TOO_WIDE, FIGURE)]
        wrong += [f"{name}: no alternative text: {source}" for source in page.evaluate(UNDESCRIBED)]
    page.close()
    assert not wrong, "\n".join(wrong)
