"""The book's own settings draw a widget without a network: a book of one page of its own, so that this holds before a
page of the real one has a slider, and needs none of it."""

import shutil
import subprocess
import sys

import nbformat
import pytest

from book import pages

pytestmark = pytest.mark.slow

SLIDER = "import ipywidgets\n\nipywidgets.IntSlider(value=3, max=9, description='strength')"


@pytest.mark.parametrize("text", ["# Slider", "# Slider\n\nSet $z_i$ to"], ids=["alone", "with a formula"])
def test_a_slider_is_drawn_and_moves_without_a_network(tmp_path, browser, text):
    from nbclient import NotebookClient

    for name in ("_config.yml", "api.py", "references.bib"):
        shutil.copy(pages.ROOT / "book" / name, tmp_path)
    for name in ("_static", "vendor"):
        shutil.copytree(pages.ROOT / "book" / name, tmp_path / name)
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: intro\nchapters:\n  - file: notebooks/slider\n")
    (tmp_path / "intro.md").write_text("# Intro\n")
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell(SLIDER)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, kernel_name="python3").execute()
    nbformat.write(notebook, tmp_path / "executed.ipynb")
    pages.publish(tmp_path / "executed.ipynb", tmp_path / "notebooks" / "slider.ipynb")
    subprocess.run([sys.executable, "-m", "book.build_html", str(tmp_path)], cwd=pages.ROOT, check=True)

    page, others = browser.new_page(), []
    page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or others.append(r.url))
    page.on("pageerror", lambda error: others.append(str(error)))
    page.goto((tmp_path / "_build/html/notebooks/slider.html").as_uri())
    page.locator(".widget-readout", has_text="3").wait_for()
    page.locator(".noUi-handle").press("ArrowRight")
    page.locator(".widget-readout", has_text="4").wait_for()
    assert page.locator("mjx-container svg").count() == text.count("$") / 2
    assert others == []
    page.close()
