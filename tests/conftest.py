"""What the whole suite shares: its order, kernels that keep quiet and off the network, the pages, and the browser."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

from book import pages

# how long a case takes, or its making, is no property of the code
SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=SLOW)
hypothesis.settings.load_profile("any machine")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def pytest_configure(config):
    config.pluginmanager.register(Pages())  # what is only in here is not heard of for a file of another folder
    os.environ["IPYTHONDIR"] = pages.quiet_kernels(pages.ROOT / "build" / "ipython")
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Units, then the book, then the notebooks; in two workers one begins with the book, which is long.

    With --dist loadfile a file's tests stay in one worker, which makes what they share once, and notebooks go to
    whoever is free (the groups of pytest-xdist 3.8 are lost on pytest 9.2).
    """
    parallel = hasattr(config, "workerinput")

    def place(item):
        if item.get_closest_marker("book"):
            return 0 if parallel else 2
        return 3 if item.path.suffix == ".ipynb" else 1

    items.sort(key=place)


class Pages:
    """A notebook is run on the results of its page, which the build runs first, from nothing, and what it reads too."""

    def __init__(self):
        self.built: bool | None = None  # not tried yet

    def pytest_runtest_setup(self, item):
        if item.path.suffix != ".ipynb":
            return
        if self.built is None:  # all at once, since each build takes seconds to find that there is nothing to do
            asked = (other.path.stem for other in item.session.items if other.path.suffix == ".ipynb")
            self.built = build(*map("page:{}".format, asked)).returncode == 0
        if not self.built:
            done = build(f"page:{item.path.stem}")
            assert done.returncode == 0, done.stdout[-6000:]


def build(*tasks: str) -> subprocess.CompletedProcess:
    """`make book`'s steps up to these; two at a time, but one build after the other, whichever worker asks."""
    command = [sys.executable, "-m", "doit", "--continue", "-n", "2", "-P", "thread", *tasks]
    with (pages.ROOT / "build" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, cwd=pages.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(0.1)  # whoever waits goes first
    return done


@pytest.fixture
def unchecked():
    """Types are not checked: for tests of what a wrong type gives a user, or with stand-ins for large objects."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return pages.ROOT


@pytest.fixture(scope="session")
def lmm():
    """A random LLaVA-NeXT of Picture World's geometry."""
    from models import make

    from lmm_sae_nb.model.lmm import LMM

    return LMM(*make("picture_world"))


@pytest.fixture(scope="session")
def sae(lmm):
    """A random SAE for it: 24 latents, 3 of them active."""
    import torch

    from lmm_sae_nb.sae.topk import TopKSAE

    return TopKSAE(lmm.width, 24, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium of the system; without one the tests are skipped, in CI they fail."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        reason = f"no {', '.join(BROWSERS)} on the PATH; install one, on Debian: apt-get install chromium"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=list(QUIET))
        yield chromium
        chromium.close()
