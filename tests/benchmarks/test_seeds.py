"""The study of several SAEs: what is run, what is not run again, what the file says, and whether it is still ours."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from lmm_sae_nb.benchmarks import seeds
from lmm_sae_nb.show.seed_study import Measured, read_study
from lmm_sae_nb.support import notebooks
from lmm_sae_nb.support.files import read_json

ONE = """\
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---
# %% [markdown]
# # One
# %% tags=["parameters"]
run: str = "tiny"  # the run
model: str = "data/models/m"  # the model
seed: int = 0  # of the SAE
jobs: int = 1  # how many work
# %%
from lmm_sae_nb.support.stages import Page
page = Page(globals())
stage = page.stage("train", without=("jobs",))
stage.result("sae", int, lambda: seed);
# %%
metrics = {"fvu": seed / 8, "fvu_low": 0.0, "fvu_high": 1.0}
stage.finish(metrics | {"train_seconds": 3.5});
"""
TWO = """\
# %% tags=["parameters"]
run: str = "tiny"  # the run
seed: int = 0  # of the choice of latents
n_top: int = 5  # images
seeds_study: str = "book/seeds.json"  # not read in the study
# %%
from lmm_sae_nb.support.stages import Page
page = Page(globals())
assert not seeds_study
sae = page.read("train", "sae", int)
stage = page.stage("cache", after=("train",), without=("seeds_study",))
stage.finish({"live": 10 * sae + seed} | ({"odd": 1} if sae % 2 else {}));
"""
MADE = {"date": "2026-11-30"}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository of two notebooks, in which the tests run."""
    files = {"pyproject.toml": "", "data/models/m": "weights", "notebooks/01_one.py": ONE, "notebooks/02_two.py": TWO}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ran(project, monkeypatch):
    """The pages that were executed, as (run, page); they run in this process, without kernels."""
    log = []

    def execute(notebook, executed, values, root, on_cell):
        source = (root / "notebooks" / f"{notebook.stem.removeprefix('.')}.py").read_text()
        log.append((values["run"], notebook.stem))
        namespace = {}
        for cell in re.split("^# %%", source, flags=re.MULTILINE)[1:]:
            exec(f"#{cell}", namespace)
            namespace.update(values if '"parameters"' in cell else {})
            on_cell()
        executed.write_text("executed")

    monkeypatch.setattr(notebooks, "execute", execute)
    return log


def study(project, numbers=(0, 1), **how):
    """Run the study; return the file as it is on the disk."""
    failed = seeds.run(numbers, seeds.chosen_pages(("01", "02")), project / "seeds.json", MADE, **how)
    assert not failed, failed
    return read_study(project / "seeds.json")


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_seed_runs_every_page_and_the_file_has_each_metric_of_each_seed(project, ran, jobs):
    found = study(project, (0, 1, 3), jobs=jobs)
    assert sorted(ran) == [(f"seed_{seed}", page) for seed in (0, 1, 3) for page in ("01_one", "02_two")]
    assert (found.seeds, found.missing, found.made) == ([0, 1, 3], [], MADE)
    fvu = Measured([0.0, 0.125, 0.375], 0.125, 0.0, 0.375, [0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    odd = Measured([None, 1, 1], 1, 1, 1)
    live = Measured([0, 10, 30], 10, 0, 30)  # page 02 kept its own seed
    assert found.stages == {"train": {"fvu": fvu}, "cache": {"live": live, "odd": odd}}  # no times


def test_what_is_done_is_not_run_again(project, ran):
    first = study(project)
    ran.clear()
    assert study(project) == first
    assert ran == []
    study(project, (0, 1, 2))
    assert ran == [("seed_2", "01_one"), ("seed_2", "02_two")]


def test_a_page_runs_again_if_its_code_or_what_it_reads_has_changed(project, ran):
    study(project)
    source = project / "notebooks/02_two.py"
    source.write_text(source.read_text().replace("# images", "# of a latent"))  # a comment
    study(project)
    assert len(ran) == 4
    source.write_text(source.read_text().replace("n_top: int = 5", "n_top: int = 6"))
    study(project)
    assert ran[4:] == [("seed_0", "02_two"), ("seed_1", "02_two")]
    shutil.rmtree(project / "data/artifacts/seed_1/train")
    study(project)
    assert ran[6] == ("seed_1", "01_one")
    ran.clear()
    (project / "data/models/m").write_text("other weights")
    study(project)
    assert len(ran) == 4


def test_a_killed_study_has_what_is_finished_and_goes_on(project, ran, monkeypatch):
    whole = notebooks.execute

    def killed(notebook, executed, values, root, on_cell):
        if (values["run"], notebook.stem) == ("seed_1", "02_two"):
            raise RuntimeError("killed")
        whole(notebook, executed, values, root, on_cell)

    monkeypatch.setattr(notebooks, "execute", killed)
    failed = seeds.run((0, 1), seeds.chosen_pages(("01", "02")), project / "seeds.json", MADE)
    assert {seed: str(error) for seed, error in failed.items()} == {1: "killed"}
    part = read_study(project / "seeds.json")
    assert (part.seeds, part.missing) == ([0], [1])
    monkeypatch.setattr(notebooks, "execute", whole)
    ran.clear()
    assert study(project).seeds == [0, 1]
    assert ran == [("seed_1", "02_two")]


def test_the_recipe_has_what_changes_a_result_and_the_models_hash(project):
    (project / "data/models").mkdir(exist_ok=True)
    before = seeds.recipe(seeds.chosen_pages(("01", "02")))
    assert before["pages"] == {"01_one": {"model": "data/models/m"}, "02_two": {"seed": 0, "n_top": 5}}
    (project / "data/models/m").write_text("other weights")
    after = seeds.recipe(seeds.chosen_pages(("01", "02")))
    (line,) = seeds.differences(before, after)
    assert line.startswith("models.data/models/m was ")


def test_the_recipe_of_an_older_study_leaves_out_what_only_newer_stages_take(project):
    page = project / "notebooks/02_two.py"
    newer = page.read_text().replace("n_top: int", "asked: int = 9  # of the newer stage\nn_top: int")
    newer = newer.replace('without=("seeds_study",)', 'without=("seeds_study", "asked")')
    page.write_text(newer + 'newer = page.stage("newer", after=("cache",), without=("seeds_study",))\n')
    pages = seeds.chosen_pages(("02",))
    assert seeds.recipe(pages, made=("cache",))["pages"] == {"02_two": {"seed": 0, "n_top": 5}}
    assert seeds.recipe(pages)["pages"] == {"02_two": {"seed": 0, "asked": 9, "n_top": 5}}


@pytest.mark.slow
def test_the_command_runs_pages_in_kernels(project, root):
    arguments = ["seeds", "--seeds", "2", "--pages", "01", "--out", "seeds.json"]
    command = [sys.executable, "-m", "lmm_sae_nb.benchmarks", *arguments]

    def call() -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(root)}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    assert "make world" in call().stderr
    world = project / "data/artifacts/tiny/world"
    world.mkdir(parents=True)
    (world / "concepts.json").write_text("{}")
    done = call()
    assert done.returncode == 0, done.stderr
    assert read_study("seeds.json").stages["train"]["fvu"].values == [0.25]
    assert (project / "data/artifacts/seed_2/pages/01_one.ipynb").is_file()


# The committed study.

RENEW = f"renew it with: {seeds.COMMAND}"


def test_the_committed_study_is_of_the_shipped_recipe(root):
    study = read_json(root / "book/seeds.json")
    known = study["recipe"]
    pages = seeds.chosen_pages([name.partition("_")[0] for name in known["pages"]], root)
    changed = seeds.differences(known, seeds.recipe(pages, root, study["stages"]))
    assert not changed, "\n".join(["book/seeds.json is of another recipe.", *changed, RENEW])


def test_the_committed_study_has_six_seeds_and_every_page(root):
    study = read_study(root / "book/seeds.json")
    pages = [source.stem for source in seeds.chosen_pages(root=root)]
    whole = (study.seeds, study.missing, list(study.recipe["pages"])) == (list(seeds.SEEDS), [], pages)
    assert whole, f"book/seeds.json has the seeds {study.seeds} and pages {list(study.recipe['pages'])}; {RENEW}"
    assert (root / "book/seeds.json").stat().st_size < 150_000
