"""`make lab` opens a notebook's source as a notebook, with nothing from another host."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from book import pages

FLAGS = "--no-browser --ip=127.0.0.1 --port={port} --IdentityProvider.token= --allow-root"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def lab(tmp_path) -> Iterator[str]:
    """The server as `make lab` starts it, over the environment that runs this test; its address."""
    port = free_port()
    command = ["make", "lab", "-o", ".venv/ready", f"BIN={Path(sys.prefix) / 'bin'}", "DOIT=true"]
    with (tmp_path / "log").open("w") as log:
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
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/api", timeout=2).close()
                break
            except OSError:
                time.sleep(0.25)
        else:
            pytest.fail((tmp_path / "log").read_text()[-3000:])
        yield address
    finally:
        os.killpg(server.pid, signal.SIGINT)  # twice: the server asks back after the first
        time.sleep(1)
        os.killpg(server.pid, signal.SIGINT)
        server.wait(timeout=60)


def test_a_click_opens_a_source_as_a_notebook(lab, browser):
    source = pages.sources()[0].name
    page, others = browser.new_page(), []
    page.on("request", lambda r: r.url.startswith((lab, "data:", "blob:")) or others.append(r.url))
    page.goto(lab)
    page.locator(".jp-DirListing-item", has_text=source).dblclick(timeout=60_000)
    page.locator(".jp-NotebookPanel .jp-MarkdownCell h1").first.wait_for(timeout=60_000)
    assert page.locator(".jp-NotebookPanel .jp-CodeCell").count() > 0
    assert page.locator(".jp-FileEditor").count() == 0
    assert others == []
    page.close()
