"""Stages know whether they are current, and keep what was made; pages know their parameters and inputs."""

import hashlib
import importlib
import json
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from forks import started

from lmm_sae_nb.support import files, stages
from lmm_sae_nb.support.locks import FolderInUse
from lmm_sae_nb.support.stages import Page, Stage


@dataclass
class Case:
    name: str
    values: list[float]


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/01_train_sae.py").write_text('stage = page.stage("train")\n')
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


@pytest.fixture
def given(project):
    """What a stage is made from: parameters, inputs, code."""
    inputs = [project / "sae.safetensors"]
    inputs[0].write_bytes(b"weights")
    return {"params": {"layer": 2, "kinds": ("base", "text"), "seed": 7}, "inputs": inputs, "code": {"one": "abc"}}


@pytest.fixture
def finished(given):
    stage = Stage("tiny", "cache").begin(**given)
    files.write_atomic(stage.path("cache.json"), b"{}")
    stage.result("cases", list[Case], lambda: [Case("a", [1.0])])
    stage.finish({"live": 0.9, "images": 3})
    return stage


def again(given) -> Stage:
    return Stage("tiny", "cache").begin(**given)


def test_a_finished_stage_is_current(finished, given):
    assert finished.is_current
    assert again(given).is_current


def test_the_manifest_says_how_it_was_made(finished, project):
    manifest = finished.manifest
    assert manifest["inputs"] == {"sae.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert manifest["params"] == {"layer": 2, "kinds": ["base", "text"], "seed": 7}
    assert (manifest["seed"], manifest["code"], manifest["results"]) == (7, {"one": "abc"}, ["cases"])
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert manifest["peak_memory_bytes"] > 1_000_000
    assert finished.metrics == {"live": 0.9, "images": 3}
    assert str(project) not in finished.path("manifest.json").read_text()


CHANGES = {
    "a parameter": lambda stage, given: given["params"].update(layer=3),
    "a new parameter": lambda stage, given: given["params"].update(new=1),
    "an input's bytes": lambda stage, given: given["inputs"][0].write_bytes(b"other"),
    "an input less": lambda stage, given: given["inputs"].clear(),
    "the code": lambda stage, given: given["code"].update(one="abd"),
    "a file that is gone": lambda stage, given: stage.path("cache.json").unlink(),
    "a file cut short": lambda stage, given: stage.path("cache.json").write_bytes(b"cut"),
    "no manifest": lambda stage, given: stage.path("manifest.json").unlink(),
    "a manifest cut short": lambda stage, given: stage.path("manifest.json").write_text('{"cut'),
}


def flip(path, place=-3):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


CHANGES |= {
    "a flipped bit": lambda stage, given: flip(stage.path("cases.json")),
    "a flipped bit of the metrics": lambda stage, given: flip(stage.path("metrics.json")),
    "a file more": lambda stage, given: stage.path("more.json").write_text("{}"),
    "outputs of another type": lambda stage, given: files.write_json(
        stage.path("manifest.json"), stage.manifest | {"outputs": [1]}
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_makes_a_stage_stale_and_its_folder_unfinished(finished, given, change):
    change(finished, given)
    assert not again(given).is_current
    assert not finished.path("manifest.json").exists()


def test_a_result_is_made_once_for_a_key_and_again_for_another(finished, given):
    made = []

    def make():
        made.append(1)
        return [Case("b", [2.0])]

    assert again(given).result("cases", list[Case], make) == [Case("a", [1.0])]
    assert not made
    given["params"]["layer"] = 3
    assert again(given).result("cases", list[Case], make) == [Case("b", [2.0])]
    assert len(made) == 1


def test_a_killed_run_goes_on_with_the_results_that_it_had(given):
    def killed():
        raise KeyboardInterrupt

    stage = Stage("tiny", "cache").begin(**given)
    stage.result("one", int, lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        stage.result("two", int, killed)
    resumed = again(given)
    assert not resumed.is_current
    assert (resumed.result("one", int, killed), resumed.result("two", int, lambda: 2)) == (1, 2)


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_text("[{"), lambda path: path.unlink()])
def test_a_damaged_result_is_made_again_and_the_others_stay(given, damage):
    stage = Stage("tiny", "cache").begin(**given)
    for name in ("one", "two"):
        stage.result(name, list[int], lambda: [10_001])
    stage.finish({})
    damage(stage.path("one.json"))
    stage = again(given)
    assert not stage.is_current
    assert stage.result("one", list[int], lambda: [3]) == [3]
    assert stage.result("two", list[int], lambda: [4]) == [10_001]
    stage.finish({})
    assert again(given).is_current


def test_a_cut_result_of_a_killed_run_is_made_again(given):
    stage = Stage("tiny", "cache").begin(**given)
    stage.result("one", list[int], lambda: [1])
    stage.path("one.json").write_text("[")
    assert again(given).result("one", list[int], lambda: [2]) == [2]


@pytest.mark.parametrize("is_finished", [True, False])
def test_what_a_killed_process_left_is_cleared_at_the_next_start(finished, given, is_finished):
    if not is_finished:
        given["params"]["layer"] = 3
    left = [files.temporary_name(finished.path("metrics.json")), finished.path(".stage.lock")]
    for file in left:
        file.touch()
    users = finished.path(".notes.tmp")
    users.touch()
    stage = again(given)
    assert stage.is_current == is_finished
    stage.finish({})
    assert not any(file.exists() for file in left)
    assert users.exists()


def test_a_result_that_was_changed_after_its_stage_was_finished_is_not_read(finished):
    page = Page({"run": "tiny"})
    assert page.read("cache", "cases", list[Case]) == [Case("a", [1.0])]
    cases = finished.path("cases.json")
    cases.write_text(cases.read_text().replace("1.0", "2.0"))
    with pytest.raises(ValueError, match="cases.json was changed or damaged after .*; run .* again"):
        page.read("cache", "cases", list[Case])
    finished.path("manifest.json").unlink()  # of a stage that is still being made
    assert page.read("cache", "cases", list[Case]) == [Case("a", [2.0])]


def _begin_and_wait(given, gate):
    again(given)
    gate.touch()
    time.sleep(60)


def test_a_stage_that_another_process_makes_is_refused_and_a_finished_one_is_not(given, project):
    process, end = started(_begin_and_wait, given, project / "begun")
    while not (project / "begun").exists():
        time.sleep(0.001)
    with pytest.raises(FolderInUse, match=rf"another run holds .*cache since .*\(process {process.pid} on "):
        again(given)
    process.kill()
    process.join()
    end.close()
    again(given).finish({})
    process, end = started(again, given)
    assert end.poll(20)  # it ends well although this process was the last to make the stage
    process.join()
    assert process.exitcode == 0
    end.close()


def test_results_of_another_key_are_gone_before_new_ones_are_made(finished, given):
    given["params"]["layer"] = 3
    stage = again(given)
    assert not stage.path("cases.json").exists()
    assert stage.path("cache.json").exists()  # not a result: whoever wrote it looks after it


def test_failed_replies_are_asked_for_again(given):
    stage = Stage("tiny", "cache").begin(**given)
    stage.result("replies", list[str], lambda: ["", "yes"])
    files.write_atomic(stage.path("replies.jsonl"), b"{}\n")
    stage.finish({"replies_failed": 1})
    second = again(given)
    assert not second.is_current
    assert second.result("replies", list[str], lambda: ["no", "yes"]) == ["no", "yes"]
    assert second.path("replies.jsonl").exists()
    assert second.finish({"replies_failed": 0}) == {"replies_failed": 0}
    assert again(given).is_current


def test_a_folder_of_an_older_version_is_made_again_and_never_read_as_a_result(finished, given):
    manifest = finished.manifest
    del manifest["results"]
    files.write_json(finished.path("manifest.json"), manifest)
    stage = again(given)
    assert not stage.is_current
    assert stage.result("cases", list[Case], lambda: []) == []


def test_a_result_of_another_kind_is_refused(finished, given):
    finished.path("cases.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="cases.json does not hold what this version writes"):
        stages.read_typed(finished.path("cases.json"), list[Case])


def test_keys_that_are_numbers_come_back_as_numbers(given):
    stage = Stage("tiny", "cache").begin(**given)
    assert stage.result("by_latent", dict[int, str], lambda: {3: "dog"}) == {3: "dog"}


def test_a_half_written_file_does_not_make_a_stage_stale(finished, given):
    finished.path(".cache.json.0.tmp").write_bytes(b"{")
    assert again(given).is_current


@pytest.mark.usefixtures("unchecked")
def test_metrics_are_numbers(given):
    with pytest.raises(ValueError, match="by_kind"):
        Stage("tiny", "cache").begin(**given).finish({"by_kind": {"base": 1.0}})


def test_a_missing_input_is_an_error(given):
    given["inputs"][0].unlink()
    with pytest.raises(FileNotFoundError, match="sae.safetensors"):
        again(given)


@pytest.mark.parametrize("name", ["", "a/b", "..", "/"])
def test_a_stage_is_one_folder_name(project, name):
    with pytest.raises(ValueError, match="folder name"):
        Stage("tiny", name)


def test_require_names_the_notebook_that_makes_the_stage(finished):
    assert stages.require("tiny", "cache", "cache.json").is_file()
    assert stages.require("tiny", "cache") == finished.folder
    with pytest.raises(FileNotFoundError, match=r"data/artifacts/tiny/train/sae .*notebooks/01_train_sae.py with run="):
        stages.require("tiny", "train", "sae")


# Pages.


def notebook(**more) -> dict:
    """What `globals()` holds after a parameters cell and the imports."""
    return {"__name__": "__main__", "In": ["x"], "Out": {}, "_": 1, "json": json, "Stage": Stage, "run": "tiny", **more}


def test_a_page_takes_plain_values_as_parameters_and_paths_among_them_as_inputs(project):
    (project / "data").mkdir()
    (project / "data/model").write_bytes(b"1")
    namespace = notebook(model="data/model", layer=1, judge={"who": "data/model", "by": "a/b"}, kinds=["base"])
    page = Page(namespace)
    assert page.params == {
        "model": "data/model",
        "layer": 1,
        "judge": {"who": "data/model", "by": "a/b"},
        "kinds": ["base"],
    }
    page.stage("train").finish({})
    made = page.stage("steer", after=("train",), beside=("score",), without=("layer",))
    made.finish({"n": 1})
    assert set(made.manifest["inputs"]) == {"data/model", "data/artifacts/tiny/train/manifest.json"}
    assert "layer" not in made.manifest["params"]
    assert page.locate("data/model") == project / "data/model"
    assert page.locate("org/model") == "org/model"


def test_a_stage_made_from_other_content_of_an_input_is_refused_until_it_is_made_again(project):
    """Pictures are added after they were cached: they must not be explained by the old cache."""
    (project / "my pictures").mkdir()
    (project / "my pictures/b").write_text("1")
    page = Page(notebook(images="my pictures", prompt="a text that is too long for the name of a file " * 9))
    page.stage("cache").finish({})
    page.stage("interpret", after=("cache",)).finish({})
    (project / "my pictures/a").write_text("2")
    with pytest.raises(ValueError, match="^my pictures changed after .* the stage 'cache' from it; run .*again"):
        page.stage("score", after=("cache",))
    page.stage("cache").finish({"again": 1})
    with pytest.raises(ValueError, match="cache/manifest.json, my pictures changed after .* the stage 'interpret'"):
        page.stage("score", after=("cache", "interpret"))
    page.stage("interpret", after=("cache",)).finish({})
    page.stage("score", after=("cache", "interpret")).finish({})
    assert page.stage("score", after=("cache", "interpret")).is_current


def test_a_stage_that_another_page_makes_is_asked_for_by_its_notebook(project):
    with pytest.raises(FileNotFoundError, match="run notebooks/01_train_sae.py with run='tiny' first"):
        Page(notebook()).stage("steer", after=("train",))


def test_entries_that_change_no_result_are_left_out_and_so_is_a_dictionary_without_others(project):
    def params(extra, *without):
        names = {"run": "tiny", "endpoint": {"timeout": 1.0, "extra": extra}, "steps": 3}
        return Page(names).stage("steer", without=without)._key["params"]

    assert params({}, "endpoint.timeout") == params({}, "endpoint") == {"steps": 3}
    assert params({"a": None}, "endpoint.timeout") == {"steps": 3, "endpoint": {"extra": {"a": None}}}
    assert params({}) == {"steps": 3, "endpoint": {"timeout": 1.0, "extra": {}}}


def test_a_page_without_a_run_is_refused(project):
    with pytest.raises(ValueError, match="parameter `run: str`"):
        Page({"layer": 1})


def test_code_that_only_draws_does_not_count(project):
    from lmm_sae_nb.show import plots
    from lmm_sae_nb.support import intervals

    stage = Page(notebook(plots=plots, intervals=intervals)).stage("train")
    stage.finish({})
    assert set(stage.manifest["code"]) == {"lmm_sae_nb.support.intervals"}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose module `one` imports from `two`, which imports `three`; `four` stands alone."""
    folder = tmp_path / f"package_{tmp_path.name}"
    folder.mkdir()
    for name, text in {
        "__init__": "",
        "one": f"import json\nfrom {folder.name}.two import double\n",
        "two": f"from {folder.name} import three\ndef double(x): return 2 * x\n",
        "three": "x = 3\n",
        "four": "x = 4\n",
    }.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder, importlib.import_module(f"{folder.name}.one")
    for name in [name for name in sys.modules if name.partition(".")[0] == folder.name]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("file", "old", "new", "same"),
    [
        ("one", "import json", "import math", False),
        ("two", "2 * x", "3 * x", False),
        ("three", "x = 3", "x = 4", False),
        ("three", "x = 3", "# the third\n\nx  =  3", True),
        ("four", "x = 4", "x = 5", True),
    ],
)
def test_code_is_the_statements_of_a_module_and_of_what_it_imports(package, file, old, new, same):
    folder, one = package
    before = stages.code_fingerprints([one])
    assert [name.rpartition(".")[2] for name in before] == ["one", "three", "two"]
    (folder / f"{file}.py").write_text((folder / f"{file}.py").read_text().replace(old, new))
    assert (stages.code_fingerprints([one]) == before) == same
