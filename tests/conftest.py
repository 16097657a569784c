"""What the whole suite shares: its order, kernels that keep quiet and off the network, and the browser."""

import os
import shutil
from pathlib import Path

import hypothesis
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


def pytest_configure():
    os.environ["IPYTHONDIR"] = pages.quiet_kernels(pages.ROOT / "build" / "ipython")
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Units first, then the notebooks, in order for they need each other's results, then the book."""

    def place(item):
        if item.get_closest_marker("book"):
            return 2, ""
        return (1, item.path.name) if item.path.suffix == ".ipynb" else (0, "")

    items.sort(key=place)
    for item in items:
        if place(item)[0]:
            item.add_marker(pytest.mark.xdist_group("book"))  # one worker, in this order, under --dist loadgroup


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return pages.ROOT


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
