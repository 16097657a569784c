"""What `make book` does, step by step, each only when something it reads has changed (doit)."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from doit import get_var
from doit.tools import config_changed

from book import api, features, pages
from book.progress import Reporter, progress
from lmm_sae_nb.support.files import MANIFEST, changed_files, files_below, read_json

ROOT = pages.ROOT
BUILD, BOOK = ROOT / "build", ROOT / "book"
SITE = BOOK / "_build" / "html" / "index.html"
DOIT_CONFIG = {
    "backend": "json",
    "dep_file": str(BUILD / "doit.json"),
    "default_tasks": ["book"],
    "verbosity": 2,
    "reporter": Reporter,
}
BUILD.mkdir(exist_ok=True)
os.environ["IPYTHONDIR"] = pages.quiet_kernels(BUILD / "ipython")

SOURCES = pages.sources()
try:
    PARAMS = pages.preset_file(get_var("preset", "tiny"), ROOT)
    VALUES = pages.preset(PARAMS, ROOT)
except (ValueError, OSError) as error:
    sys.exit(f"make book: {error}")
RESULTS = {source: pages.results(source, VALUES[source.stem]) for source in SOURCES}
RUN = next((values["run"] for values in VALUES.values() if "run" in values), PARAMS.stem)
STUDY = next((values["seeds_study"] for values in VALUES.values() if "seeds_study" in values), "book/seeds.json")
ARTIFACTS = ROOT / "data" / "artifacts" / RUN
PACKAGE = sorted((ROOT / pages.PACKAGE).rglob("*.py"))
REFERENCE = [BOOK / f"{name}.md" for name in api.pages()]
WORLD = ROOT / "data" / "artifacts" / "tiny" / "world"


def state(path: Path) -> str:
    """What tells one content from another: a manifest's or file's hash, or a folder's names, sizes, times."""
    for file in (path / "manifest.json", path):
        if file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()
    found = ((file, file.stat()) for file in files_below(path))
    lines = [(str(file.relative_to(path)), its.st_size, its.st_mtime_ns) for file, its in found]
    return hashlib.sha256(repr(lines).encode()).hexdigest()


def lacks_replies(metrics: Path) -> bool:
    """Whether a stage's metrics say that questions were not answered, or say nothing because they are damaged."""
    try:
        return bool(read_json(metrics).get("replies_failed"))
    except ValueError:
        return True


def is_damaged(stage: Path) -> bool:
    """Whether a finished stage lacks a file, or has one with another checksum than it was finished with."""
    with suppress(FileNotFoundError, ValueError):  # a damaged manifest has another hash
        return bool(changed_files(stage, read_json(stage / MANIFEST)))
    return False


class AsLeft:
    """Up to date while these results are as they were when the task last ended, or still not there if they were not.

    own: those of them that the task makes; one without all its replies, or with a damaged file, is to be made again
        (`Stage.is_current`).
    """

    def __init__(self, paths: list[Path], own: Sequence[Path] = ()):
        self.paths, self.own = paths, own

    def now(self) -> dict:
        return {"results": [state(path) for path in self.paths]}

    def configure_task(self, task) -> None:
        task.value_savers.append(self.now)

    def __call__(self, task, values: dict) -> bool:
        metrics = (path / "metrics.json" for path in self.own)
        if any(map(lacks_replies, filter(Path.is_file, metrics))) or any(map(is_damaged, self.own)):
            return False
        return values.get("results") == self.now()["results"]


def task_world():
    """Render the Picture World datasets."""
    datasets = ROOT / "lmm_sae_nb/pictureworld/world/datasets.py"  # not __main__, which also trains models
    return {
        "actions": [[sys.executable, "-m", "lmm_sae_nb.pictureworld", "render", "--out", str(WORLD)]],
        "file_dep": [
            datasets,
            *pages.modules(datasets),
            *(f for f in ROOT.glob("data/pictureworld/**/*") if f.is_file()),
        ],
        "targets": [WORLD / "concepts.json"],
    }


def task_ipynb():
    """Write the .ipynb of every notebook source, and remove what has no source any more."""
    kept = {source.stem for source in SOURCES}
    for folder in (BUILD / "ipynb", BUILD / "executed", BOOK / "notebooks"):
        for stale in (file for file in folder.glob("*.ipynb") if file.stem not in kept):
            stale.unlink()
    for source in SOURCES:
        target = BUILD / "ipynb" / f"{source.stem}.ipynb"
        yield {
            "name": source.stem,
            "actions": [(pages.convert, [source, target])],
            "file_dep": [source],
            "targets": [target],
        }


def made_by() -> dict[Path, Path]:
    """Return the page that makes each stage: the one that calls `page.stage` with its name."""
    return {
        ROOT / "data" / "artifacts" / str(VALUES[source.stem].get("run", "tiny")) / stage: source
        for source in reversed(SOURCES)
        for stage in pages.stages(source, ("stage",))
    }


MADE_BY = made_by()
# These read nothing of the page that they wait for. But 01, 02, 03 and 08, one after the other, take longest, and must
# not wait for a free core. Beside 01 runs 05, then these; beside 08 run 04, and then 06 and A4. A page that is named
# alone also runs the one that it waits for here, so 01 to 04, which your_own_lmm.md names alone, are not in the list.
LATER = {
    **dict.fromkeys(
        ("07_attribute_decisions", "A1_picture_world", "A2_benchmarks", "A3_full_scale"), "05_compare_layers_and_models"
    ),
    **dict.fromkeys(("06_steer_features", "A4_controls_and_metrics"), "04_score_interpretations"),
}


def waits(source: Path) -> list[str]:
    """Return the steps before a page: the pages whose results it reads, and the drawing of the world.

    The drawing uses every core. So all pages wait for it if the first one does.
    """
    makers = {maker.stem for path in RESULTS[source] if (maker := MADE_BY.get(path, source)) != source}
    makers |= {LATER[source.stem]} if source.stem in LATER else set()
    drawn = any(path.is_relative_to(WORLD) for path in RESULTS[source] + RESULTS[SOURCES[0]])
    return ["world"] * drawn + [f"page:{maker}" for maker in sorted(makers)]


def run(notebook: Path, executed: Path, values: dict) -> None:
    """Run a page and show how far it is."""
    with progress.page(notebook.stem, pages.code_cells(notebook) + bool(values)) as next_cell:
        pages.execute(notebook, executed, values, on_cell=next_cell)


def task_page():
    """Run each notebook with papermill and the preset's parameters, after those whose results it reads."""
    for source in SOURCES:
        values = VALUES[source.stem]
        notebook, executed, page = (
            folder / f"{source.stem}.ipynb" for folder in (BUILD / "ipynb", BUILD / "executed", BOOK / "notebooks")
        )
        yield {
            "name": source.stem,
            "actions": [(run, [notebook, executed, values]), (pages.publish, [executed, page])],
            "file_dep": [notebook, *pages.modules(source), *pages.shipped(source, values)],
            "uptodate": [
                config_changed({name: repr(value) for name, value in values.items()}),
                AsLeft(RESULTS[source], [path for path in RESULTS[source] if MADE_BY.get(path) == source]),
            ],
            "task_dep": waits(source),
            "targets": [page],
        }


def task_results():
    """Make the results page from the stages' metrics."""

    def write():
        from book import results
        from lmm_sae_nb.show.seed_study import read_study

        order = [stage for source in SOURCES for stage in pages.stages(source)]
        page = results.page(ARTIFACTS, list(dict.fromkeys(order)), read_study(STUDY and ROOT / STUDY))
        (BOOK / "results.md").write_text(page, encoding="utf-8")

    return {
        "actions": [write],
        "targets": [BOOK / "results.md"],
        "uptodate": [False],
        "task_dep": ["page"] if SOURCES else [],
    }


def task_features():
    """Make the features page from the explanations, the scores, the verdicts and the cache."""
    read = [ARTIFACTS / stage for stage in ("cache", "interpret", "score", "judge")]
    steering = next((f"notebooks/{source.stem}.html" for source in SOURCES if source.stem.startswith("06_")), None)
    return {
        "actions": [(features.write, [RUN, BOOK, steering])],
        "file_dep": [BOOK / "features.py", *pages.modules(BOOK / "features.py")],
        "targets": [BOOK / "features.md"],
        "uptodate": [
            config_changed({"run": RUN, "steering": steering}),
            AsLeft(read),
        ],
        "task_dep": sorted({f"page:{MADE_BY[path].stem}" for path in read if path in MADE_BY}),
    }


def task_api():
    """List the package's modules on the reference pages; Sphinx fills in their docstrings."""
    folder = BOOK / "reference"

    def write():
        shutil.rmtree(folder, ignore_errors=True)  # with the page of a folder that is gone
        folder.mkdir()
        for name, text in api.pages().items():
            (BOOK / f"{name}.md").write_text(text, encoding="utf-8")

    return {
        "actions": [write],
        "file_dep": [BOOK / "api.py", *PACKAGE],
        "targets": REFERENCE,
    }


def task_book():
    """Build the Jupyter Book, warnings as errors."""
    made_here = {"_build", "__pycache__", "features", "reference"}  # features.md names its pictures after their content
    written = [file for file in BOOK.rglob("*") if file.is_file() and not made_here & set(file.parts)]
    made = [BOOK / "notebooks" / f"{source.stem}.ipynb" for source in SOURCES]
    made += [BOOK / "results.md", BOOK / "features.md", *REFERENCE]
    written = [file for file in written if file.suffix != ".py" or file.name in ("api.py", "build_html.py")]

    def build():
        shutil.rmtree(BOOK / "_build", ignore_errors=True)  # a warning must not be lost to the cache of a failed build
        subprocess.run([sys.executable, "-m", "book.build_html", str(BOOK)], check=True)

    return {
        "actions": [build],
        "file_dep": sorted({*written, *made, *PACKAGE}),
        "targets": [SITE],
    }
