"""An edit runs again what it touches and nothing else: the real build over a repository of two notebooks."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from book import pages
from lmm_sae_nb.support.files import outputs

pytestmark = pytest.mark.slow

HEAD = """\
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Page

# %% tags=["parameters"]
run: str = "tiny"  # the run
"""
ONE = """\
steps: int = 5  # steps
concepts: str = "data/artifacts/tiny/world/concepts.json"  # of the world

# %%
from lmm_sae_nb.change import Page, write

page = Page(run)
write(page.stage("train") / "manifest.json", f"{steps}")
if steps > 99:  # a stage that most runs do without
    write(page.stage("judge") / "manifest.json", "")
"""
TWO = """\
top: int = 3  # images

# %%
import lmm_sae_nb.other
from lmm_sae_nb.change import Page

page = Page(run)
page.file("train", "manifest.json").read_text(), top
"""
CHANGE = """\
from pathlib import Path

class Page:
    def __init__(self, run):
        self.run = run

    def stage(self, name):
        return Path("data/artifacts", self.run, name)

    def file(self, stage, name):
        return self.stage(stage) / name

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
"""
RENDER = """\
import sys
from pathlib import Path

from lmm_sae_nb.change import write

write(Path(sys.argv[-1]) / "concepts.json", "{}")
"""
FILES = {
    "pyproject.toml": "",
    "lmm_sae_nb/__init__.py": "",
    "lmm_sae_nb/change.py": CHANGE,
    "lmm_sae_nb/other.py": "",
    "lmm_sae_nb/support/__init__.py": "",
    "lmm_sae_nb/pictureworld/__init__.py": "",
    "lmm_sae_nb/pictureworld/world/__init__.py": "",
    "lmm_sae_nb/pictureworld/world/datasets.py": "",
    "lmm_sae_nb/pictureworld/__main__.py": RENDER,
    "notebooks/01_one.py": HEAD + ONE,
    "notebooks/02_two.py": HEAD + TWO,
    "notebooks/params/tiny.yaml": "run: tiny\n",
}


def written(folder: Path, files: dict[str, str]) -> Path:
    """A repository of these files, with the real build."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "book").mkdir()
    scripts = ("api", "features", "pages", "progress", "results")
    support = ("files", "names", "notebooks", "parameters", "presets")
    copied = [f"book/{script}.py" for script in scripts] + [f"lmm_sae_nb/support/{name}.py" for name in support]
    for name in ("dodo.py", "lmm_sae_nb/__init__.py", *copied):
        shutil.copy(pages.ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("repository"), FILES)


def ran(repository: Path, *options: str) -> list[str]:
    """Build the pages; the names of the steps that ran, sorted."""
    return sorted(in_order(repository, *options))


def environment(repository: Path) -> dict[str, str]:
    """Return this process's environment, in which the little package is found before the real one."""
    return os.environ | {"PYTHONPATH": str(repository)}


def doit(repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "doit", *arguments]
    return subprocess.run(
        command, cwd=repository, env=environment(repository), capture_output=True, text=True, timeout=300
    )


def in_order(repository: Path, *options: str) -> list[str]:
    """Build the pages; the names of the steps that ran, as they began."""
    done = doit(repository, *options, "page")
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split()[-1] for line in done.stdout.splitlines() if line.startswith(".  ")]


def edit(repository: Path, name: str, old: str, new: str) -> None:
    path = repository / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def built(repository) -> Path:
    """Two steps at a time, in which the second page still waits for what the first one makes."""
    steps = ran(repository, "-n", "2", "-P", "thread")
    assert steps == ["ipynb:01_one", "ipynb:02_two", "page:01_one", "page:02_two", "world"]
    return repository


def test_each_page_that_ran_is_reported_with_its_time(built):
    shutil.rmtree(built / "data/artifacts/tiny/train")
    done = doit(built, "page")
    assert re.search(r"^01_one  \d+:\d\d$", done.stdout, re.MULTILINE)
    assert "02_two  " not in done.stdout


def test_nothing_changed_nothing_runs(built):
    for file in built.rglob("*.py"):
        file.touch()
    assert ran(built) == []


def test_prose_runs_its_own_page_again(built):
    edit(built, "notebooks/01_one.py", "# # Page", "# # A page")
    assert ran(built) == ["ipynb:01_one", "page:01_one"]


def test_a_parameter_runs_its_page_and_those_that_read_the_result(built):
    edit(built, "notebooks/params/tiny.yaml", "run: tiny", "run: tiny\nsteps: 6")
    assert ran(built) == ["page:01_one", "page:02_two"]


def test_a_module_runs_the_pages_that_import_it(built):
    edit(built, "lmm_sae_nb/other.py", "", "# changed\n")
    assert ran(built) == ["page:02_two"]


def test_a_page_whose_stage_lacks_replies_is_run_again_until_it_has_them(built):
    metrics = built / "data/artifacts/tiny/train/metrics.json"
    metrics.write_text('{"replies_failed": 2}')
    assert ran(built) == ran(built) == ["page:01_one"]
    metrics.write_text('{"replies_failed": 0}')
    assert ran(built) == []
    metrics.unlink()


def test_a_stage_with_a_damaged_file_is_made_again(built):
    """Also if the file has the same size: its checksum is another."""
    page, stage = built / "notebooks/01_one.py", built / "data/artifacts/tiny/train"
    before = page.read_text()
    (stage / "weights").write_text("whole")
    record = json.dumps({"outputs": outputs(stage)})
    edit(built, "notebooks/01_one.py", 'f"{steps}")', f"{record!r})")
    assert "page:01_one" in ran(built)
    (stage / "weights").write_text("whale")
    assert ran(built) == ["page:01_one"]
    (stage / "weights").write_text("whole")
    assert ran(built) == []
    page.write_text(before)
    (stage / "weights").unlink()
    assert "page:01_one" in ran(built)


def test_a_deleted_result_is_made_again(built):
    shutil.rmtree(built / "data/artifacts/tiny/train")
    assert ran(built) == ["page:01_one"]


def test_the_injected_cell_is_hidden_and_the_page_tells_no_times(built):
    import nbformat

    page = nbformat.read(built / "book/notebooks/01_one.ipynb", as_version=4)
    (injected,) = (cell for cell in page.cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert "remove-cell" in injected.metadata.tags
    assert "papermill" not in page.metadata
    assert all(not {"papermill", "execution"} & cell.metadata.keys() for cell in page.cells)


def test_a_mistaken_params_file_stops_the_build_with_its_reason(built):
    (built / "notebooks/params/tiny.yaml").write_text("run: tiny\nstpes: 6\n")
    done = subprocess.run(
        [sys.executable, "-m", "doit"], cwd=built, env=environment(built), capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "tiny.yaml, line 2: no notebook has a parameter 'stpes'; did you mean 'steps'?" in done.stdout + done.stderr


COPIES = """

def execute(notebook, executed, values, **_):
    executed.parent.mkdir(exist_ok=True)
    executed.write_bytes(notebook.read_bytes())
"""


def test_a_page_runs_after_those_whose_results_it_reads(tmp_path):
    reads = {"01_one": (), "02_two": ("03_three",), "03_three": ("01_one",), "04_four": ("01_one",), "A1_more": ()}
    files = {name: text for name, text in FILES.items() if not name.startswith("notebooks/0")}
    for name, stages in reads.items():
        calls = [f"page.file('{stage}')" for stage in stages] + [f"page.stage('{name}')"]
        files[f"notebooks/{name}.py"] = HEAD + "\n# %%\n" + "\n".join(calls) + "\n"
    repository = written(tmp_path, files)
    with open(repository / "book" / "pages.py", "a") as module:  # for their order they need not be run
        module.write(COPIES)
    order = [step.split(":")[1] for step in in_order(repository) if step.startswith("page:")]
    assert order[0] == "01_one" and set(order) == reads.keys()
    assert order.index("01_one") < order.index("03_three") < order.index("02_two")
    assert order.index("01_one") < order.index("04_four")
