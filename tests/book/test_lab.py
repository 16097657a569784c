"""JupyterLab as `make lab` starts it: sources open as notebooks, widgets work, and nothing comes from another host."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import torch

from book import pages
from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.pictureworld.world.scenes import make_scene
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.score.ratings import read_ratings
from lmm_sae_nb.steer.steering import Edit, compare
from lmm_sae_nb.support.images import open_images

pytestmark = pytest.mark.slow

FLAGS = "--no-browser --ip=127.0.0.1 --port={port} --IdentityProvider.token= --allow-root"
MODEL, LAYER, LATENTS = pages.ROOT / "data/models/tiny-llava-next", 4, 32
NAMES = {3: "third <b>", 5: "fifth"}
QUESTION, TOKENS = "what is shown ?", 6
START = """\
import ipywidgets as widgets
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.show.latent_table import LatentTable
from lmm_sae_nb.interpret.exemplars import ExemplarsByLatent
from lmm_sae_nb.support.images import open_images
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.show.feature_browser import FeatureBrowser
from lmm_sae_nb.show.rater import Rater
from lmm_sae_nb.show.steering_panel import SteeringPanel

cache, pictures = LatentCache.load("cache"), open_images("pictures")
names = {names}
asked = dict(image=pictures[0], text={question!r}, max_new_tokens={tokens})
parts = SAEInPlace.load({model!r}, "sae", {layer}), cache, names
panel = SteeringPanel(*parts, **asked)
panel.ask_now()
panel.box"""
RATER = """\
explained = {n: {"concept": name, "kind": "object"} for n, name in names.items()}
Rater("answers.jsonl", explained, ExemplarsByLatent(cache, pictures)).box"""
BROWSER = """\
rows = {n: {"concept": name, "iou": n / 10} for n, name in names.items()}
other = SteeringPanel(*parts, **asked)
browser = FeatureBrowser(LatentTable(cache, pictures, rows), other.choose, sort="iou")
widgets.VBox([browser.box, other.box])"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[str]:
    """The server as `make lab` starts it, over the environment that runs this test; its address."""
    port, log_file = free_port(), tmp_path_factory.mktemp("lab") / "log"
    command = ["make", "lab", "-o", ".venv/ready", f"BIN={Path(sys.prefix) / 'bin'}", "DOIT=true"]
    with log_file.open("w") as log:
        server = subprocess.Popen(
            [*command, f"ARGS={FLAGS.format(port=port)}"],
            cwd=pages.ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert server.poll() is None, log_file.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/api", timeout=2).close()
                break
            except OSError:
                time.sleep(0.25)
        else:
            pytest.fail(log_file.read_text()[-3000:])
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # at which it stops its kernels, and does not ask back
        server.wait(timeout=60)


def test_a_click_opens_a_source_as_a_notebook(lab, browser):
    source = pages.sources()[0].name
    page, others = browser.new_page(), []
    page.on("request", lambda r: r.url.startswith((lab, "data:", "blob:")) or others.append(r.url))
    page.goto(f"{lab}/lab/tree/notebooks?reset")
    page.locator(".jp-DirListing-item", has_text=source).dblclick(timeout=60_000)
    page.locator(".jp-NotebookPanel .jp-MarkdownCell h1").first.wait_for(timeout=60_000)
    assert page.locator(".jp-NotebookPanel .jp-CodeCell").count() > 0
    assert page.locator(".jp-FileEditor").count() == 0
    assert others == []
    page.close()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The embedded model, an SAE of this moment for one of its layers, and its cache on six scenes."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "pictures").mkdir()
    images = [make_scene(seed).image for seed in range(6)]
    for number, image in enumerate(images):
        image.save(folder / "pictures" / f"{number}.png")
    lmm = LMM.load(MODEL)
    sae = TopKSAE(lmm.width, LATENTS, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    sae.save(folder / "sae")
    pictures = open_images(folder / "pictures")
    cache = cache_activations(SAEInPlace(lmm, sae, LAYER), pictures, n_top=3, folder=folder / "cache")
    return folder, lmm, sae, cache, images


@pytest.fixture(scope="module")
def opened(parts, lab, browser):
    """A notebook with a widget in each cell, run in the lab: the page, the notebook's folder."""
    folder = pages.ROOT / "build" / f"widgets-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(parts[0], folder)
    start = START.format(names=NAMES, model=str(MODEL), layer=LAYER, question=QUESTION, tokens=TOKENS)
    cells = [nbformat.v4.new_code_cell(text) for text in (start, RATER, BROWSER)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "widgets.ipynb")
    page, wrong = browser.new_page(viewport={"width": 1400, "height": 2400}), []
    page.set_default_timeout(300_000)  # a kernel's first import and compilation, beside other tests
    page.on("request", lambda r: r.url.startswith((lab, "data:", "blob:")) or wrong.append(r.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"{lab}/lab/tree/build/{folder.name}/widgets.ipynb?reset")
    page.locator(".jp-NotebookPanel .jp-CodeCell").nth(2).wait_for()
    run_all(page)
    cell(page, 2).get_by_role("button", name="steer it").wait_for()
    yield page, folder
    page.close()
    shutil.rmtree(folder)
    assert wrong == []


def run_all(page) -> None:
    """Run the notebook; until its kernel is there, Lab lets the command pass without a word."""
    prompt = page.locator(".jp-CodeCell .jp-InputPrompt").first
    for _ in range(30):
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
        page.locator(".lm-MenuBar-item", has_text="Run").first.click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.wait_for_timeout(3000)
        if prompt.inner_text() != "[ ]:":
            return
    pytest.fail("the notebook does not run")


def cell(page, number: int):
    """What a cell of the notebook shows."""
    return page.locator(".jp-CodeCell").nth(number).locator(".jp-OutputArea")


def rows(shown) -> list[str]:
    """The answers of a panel, from its first to its last."""
    return shown.locator("table.answers td").all_inner_texts()


def wait_for(said, wanted, page) -> None:
    """Until the page says it: a short wait at a time, so that the browser goes on."""
    for _ in range(1200):
        if said() == wanted:
            return
        page.wait_for_timeout(100)
    assert said() == wanted


def expected(parts, latent: int, times: float, image) -> list[str]:
    """What the panel has to show, from the call of the package that it is a face of."""
    _, lmm, sae, cache, _ = parts
    edits = [Edit(latent, times * float(cache.max[latent]))]
    return [
        answers[0] for answers in compare(SAEInPlace(lmm, sae, LAYER), QUESTION, image, edits, max_new_tokens=TOKENS)
    ]


def field(shown, label: str):
    """The control of a widget that has this label."""
    labelled = shown.page.locator(".widget-label", has_text=re.compile(f"^{label}$"))
    return shown.locator(".widget-inline-hbox", has=labelled)


def keys_have_the_focus(page) -> None:
    """Once the rater has given it to them itself."""
    page.wait_for_function("document.activeElement.placeholder?.startsWith('keys')")


def test_the_steering_panel_answers_refuses_and_exports(parts, opened):
    (page, folder), images = opened, parts[4]
    panel = cell(page, 0)
    assert rows(panel) == expected(parts, 5, 1.0, images[0])

    field(panel, "dose").locator(".noUi-handle").press("End")
    moved = expected(parts, 5, 8.0, images[0])
    assert moved[2] != expected(parts, 5, 1.0, images[0])[2], "the slider must change the answer for this to be a test"
    wait_for(lambda: rows(panel), moved, page)
    assert panel.locator("table.answers mark").count() > 0

    with page.expect_file_chooser() as chooser:
        panel.locator(".widget-upload").click()
    chooser.value.set_files(folder / "pictures" / "1.png")
    wait_for(lambda: rows(panel), expected(parts, 5, 8.0, images[1]), page)

    latent = field(panel, "latent").locator("input")
    latent.fill("no <i>such")
    latent.press("Enter")
    panel.get_by_text("no latent is called 'no <i>such'; choose a name, or a number below 32").wait_for()
    assert rows(panel) == []
    latent.fill("3")
    latent.press("Enter")
    wait_for(lambda: rows(panel), expected(parts, 3, 8.0, images[1]), page)

    with page.expect_download() as download:
        panel.get_by_text("save as JSON").click()
    saved = json.loads(download.value.path().read_text())
    assert download.value.suggested_filename == "steering-latent-3.json"
    assert [saved[name] for name in ("untouched", "spliced", "steered")] == rows(panel)
    assert saved["latent"] == 3 and saved["dose"] == 8.0 and saved["prompt"] == QUESTION
    assert saved["image"]["size"] == list(images[1].size)


def test_two_people_rate_by_keys_and_buttons(parts, opened):
    page, folder = opened
    shown = cell(page, 1)
    answers = folder / "answers.jsonl"

    def given() -> list[tuple]:
        return [(row["rater"], row["latent"], row["verdict"]) for row in read_ratings(answers)]

    shown.get_by_text("type your name above to begin").wait_for()
    name, keys = field(shown, "rater").locator("input"), shown.get_by_placeholder("keys: y, n, u, z")
    name.fill("Ann")
    name.press("Enter")
    shown.get_by_text("third <b> (object)").wait_for()
    keys_have_the_focus(page)
    keys.press_sequentially("yn")
    wait_for(given, [("Ann", 3, "yes"), ("Ann", 5, "no")], page)
    shown.get_by_text("All latents are answered").wait_for()
    keys.press("z")
    wait_for(given, [("Ann", 3, "yes")], page)
    shown.get_by_role("button", name="unsure (u)").click()
    wait_for(given, [("Ann", 3, "yes"), ("Ann", 5, "unsure")], page)

    keys_have_the_focus(page)  # which they take: whoever types elsewhere before would end up there
    name.fill("Bob")
    name.press("Enter")
    shown.get_by_text("0 of 2").wait_for()
    keys_have_the_focus(page)
    keys.press("n")
    wait_for(given, [("Ann", 3, "yes"), ("Ann", 5, "unsure"), ("Bob", 3, "no")], page)
    shown.get_by_text("1 of 2").wait_for()


def test_the_browser_finds_a_latent_and_hands_it_to_the_panel(parts, opened):
    page, _ = opened
    shown = cell(page, 2)
    shown.get_by_role("heading", name="latent 5: fifth").wait_for()  # of highest IoU
    search = field(shown, "search").locator("input")
    search.fill("third")
    search.press("Enter")
    shown.get_by_role("heading", name="latent 3: third <b>").wait_for()
    shown.get_by_text("1 to 1 of 1").wait_for()
    drawn = "images => images.filter(i => i.offsetParent).map(i => i.naturalWidth > 0)"
    assert set(shown.locator("img.widget-image").evaluate_all(drawn)) == {True}
    shown.get_by_role("button", name="steer it").click()
    wait_for(lambda: rows(shown), expected(parts, 3, 1.0, parts[4][0]), page)
