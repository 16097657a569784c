"""Whatever stands in a preset: it reaches the pages as their parameters' types, or the error says where it is wrong."""

import re

import pytest

from lmm_sae_nb import LMM
from lmm_sae_nb.cache.sparse_store import VALUES
from lmm_sae_nb.full_scale.costs import device_named
from lmm_sae_nb.model.samples import UNREADABLE
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.support import presets
from lmm_sae_nb.support.names import folder_name
from lmm_sae_nb.support.notebooks import parameters, sources
from lmm_sae_nb.support.parameters import Parameter, misfit
from lmm_sae_nb.support.stages import Page, Stage
from lmm_sae_nb.train.kinds import KINDS as TRAININGS
from lmm_sae_nb.train.training import TRACKERS

ONE = """# %% tags=["parameters"]
run: str = "tiny"  # the run
steps: int = 5  # optimiser steps, at least 1
lr: float = 2e-3  # learning rate
mixed: str = "no"  # precision
# where curves go, one of "none",
# "board" or ""
tracker: str = "none"
colours: list[str] = ["red"]  # each one of "red" or "dark blue"
keep: bool = True  # or not
threshold: float = 0.25  # from 0 to 1
layers: list[int] = [1, 3]  # layers
kinds: list = ["base", "tiles"]  # kinds of token
limit: int | None = None  # of the images
place: "int or str" = 1  # counted from 0, or a name
explainer: dict = {"model": "m", "tokens": 32, "doses": [1, 2], "inner": {"question": "q"}}  # asked for names
endpoint: dict = {"extra": {}}  # fields of requests
"""


@pytest.fixture
def little(tmp_path):
    (tmp_path / "notebooks/params").mkdir(parents=True)
    (tmp_path / "notebooks/01_one.py").write_text(ONE)
    return tmp_path


def given(little, text: str | bytes) -> dict:
    file = little / "notebooks/params/mine.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return presets.preset(file, little)["01_one"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("run: 2024", {"run": "2024"}),
        ("run: 1.10", {"run": "1.10"}),
        ("run: 2024-10-01", {"run": "2024-10-01"}),
        ("mixed: no", {"mixed": "no"}),
        ("tracker: ''", {"tracker": ""}),
        ("tracker: board", {"tracker": "board"}),
        ("colours: [dark blue, red]", {"colours": ["dark blue", "red"]}),
        ("mixed: 0x1F", {"mixed": "0x1F"}),
        ("kinds: [1, on]", {"kinds": ["1", "on"]}),
        ("lr: 1", {"lr": 1}),
        ("limit: null", {"limit": None}),
        ("limit: 3", {"limit": 3}),
        ("place: 24", {"place": 24}),
        ("place: decoder.24.mlp", {"place": "decoder.24.mlp"}),
        ("steps: 100_000", {"steps": 100000}),
        ("\ufeffsteps: 7", {"steps": 7}),
        ("explainer: {doses: [0.5, 1]}\n01_one: {explainer: {tokens: 8, inner: {question: 7}}}",
         {"explainer": {"model": "m", "tokens": 8, "doses": [0.5, 1], "inner": {"question": "7"}}}),
        ("explainer: other\n01_one: {explainer: {tokens: 8}}",
         {"explainer": {"model": "m", "tokens": 8, "doses": [1, 2], "inner": {"question": "q"}}}),
        ("endpoint: {extra: {a: {b: false}, c: null}}", {"endpoint": {"extra": {"a": {"b": False}, "c": None}}}),
        ("first: &x {tokens: 7}\n", None),
        ("explainer: &x {tokens: 7}\n01_one: {explainer: *x}",
         {"explainer": {"model": "m", "tokens": 7, "doses": [1, 2], "inner": {"question": "q"}}}),
    ],
)  # fmt: skip
def test_a_value_reaches_the_page_as_its_parameters_type(little, text, value):
    if value is None:
        with pytest.raises(ValueError, match="no notebook 'first'"):
            given(little, text)
    else:
        assert given(little, text) == value


BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)) + "layers: *a39\n"
FAULTS = {
    "steps: null": (1, "steps is null, not a whole number", "give a value, or leave the line out"),
    "\nsteps: [5]": (2, r"steps is \[5\], a list, not a whole number", "write one value"),
    "steps: '12'": (1, "steps is '12', a text, not a whole number", "without quotes"),
    "steps: 3.7": (1, "steps is 3.7, a number, not a whole number", "write a whole number"),
    "steps: 3.0": (1, "steps is 3.0", "write 3$"),
    "steps: true": (1, "steps is true, a truth value, not a whole number", "write a number"),
    "steps: 010": (1, "steps is '010'", "without quotes"),
    "steps: 12:30": (1, "steps is '12:30'", "without quotes"),
    "steps: -3": (1, "steps is -3, a whole number, not a whole number, 0 or higher", "write a whole number"),
    "steps: 0": (1, "steps is 0, less than 1", "write a number of at least 1"),
    "threshold: 1.5": (1, "threshold is 1.5, outside 0 to 1", "from 0 to 1"),
    "lr: .nan": (1, "lr is nan, a number, not a finite number", "write a finite number"),
    "lr: 1e-4": (1, "lr is '1e-4', a text, not a finite number", "write 1.0e-4"),
    "keep: 1": (1, "keep is 1, a whole number, not true or false", "such as true"),
    "tracker: bord": (1, "tracker is 'bord', not one of 'none', 'board', ''", "write 'board'"),
    "tracker: yes": (1, "tracker is 'yes', not one of 'none', 'board', ''", "choose one of them"),
    "colours: [red, blue]": (1, "colours.1 is 'blue', not one of 'red', 'dark blue'", "write 'dark blue'"),
    "mixed: null": (1, "mixed is null, not a text", '"" says that there is none'),
    "mixed: {a: 1}": (1, "mixed is {'a': 1}, a dictionary, not a text", "write one value"),
    'mixed: "a\\0b"': (1, "with control characters", "remove them"),
    "place: [1]": (1, r"place is \[1\], a list, not a whole number", "write one value"),
    "layers: 3": (1, "layers is 3, a whole number, not a list", r"such as \[1, 2\]"),
    "layers:\n- 1\n- two": (3, "layers.1 is 'two', a text, not a whole number", "without quotes"),
    "layers: [1, [2]]": (1, r"layers.1 is \[2\], a list", "write one value"),
    "limit: x": (1, "limit is 'x', a text, not a whole number", "without quotes"),
    "explainer: 5": (1, "explainer is 5, a whole number, not a dictionary", "such as {name: value}"),
    "explainer:\n  tokens: a": (2, "explainer.tokens is 'a'", "without quotes"),
    "explainer:\n  inner:\n    question: [1]": (3, r"explainer.inner.question is \[1\]", "write one value"),
    "explainer: {token: 1}": (1, "explainer.token is an unknown entry; explainer has model", "did you mean 'tokens'"),
    "01_one: {explainer: {doses: [a]}}": (1, "explainer.doses.0 is 'a'", "without quotes"),
    "run: ../x": (1, "'../x' cannot name a run", "use one folder name"),
    "01_one: 7": (1, "the section 01_one holds 7, no entries", "name: value"),
    "stpes: 3": (1, "no notebook has a parameter 'stpes'", "did you mean 'steps'"),
    "01_one: {stpes: 3}": (1, "gives 01_one the unknown parameter 'stpes'; it has run, steps", "did you mean 'steps'"),
    "01_on:\n  steps: 3": (1, "there is no notebook '01_on' for this section", "did you mean '01_one'"),
    "run: a\nsteps: 1\nsteps: 2": (3, "'steps' stands here for the second time, after line 2", "keep one"),
    "run: a\n\tsteps: 3": (2, "is no YAML", "indent with spaces"),
    "run: 'a\nsteps: 3\nlr: 1": (1, "is no YAML", "close the quotation mark"),
    "run: a: b": (1, "is no YAML", "put texts with"),
    "run: a\nsteps: {": (2, "is no YAML", "write  name: value"),
    "run: *x": (1, "is no YAML .*undefined alias", "write  name: value"),
    "run: a\n---\nrun: b": (2, "is no YAML", "write  name: value"),
    "run: !!python/object/apply:os.getcwd []": (1, "run is \\[\\], a list", "write one value"),
    "run: !!python/name:os.getcwd x": (1, "python/name:os.getcwd is not read", "write a text"),
    "run: 2024-02-31": (1, "cannot be read", "put it into quotes"),
    "? [a]\n: 1": (1, "is no name", "write  name: value"),
    "layers: &x [*x]": (1, "more than 12 levels", "write anchors"),
    BOMB: (None, "more than 12 levels or 20,000 values", "write anchors"),
    "run: " + "[" * 1500: (None, "nested too deeply|is no YAML", ""),
    "": (None, "mine.yaml is empty", "run: mine"),
    "# nothing": (None, "mine.yaml is empty", "run: mine"),
    "- run": (None, "mine.yaml is a list", "run: mine"),
    "run": (None, "mine.yaml is one value", "run: mine"),
    "run: a\n# caf\udce9": (2, "this is not UTF-8", "save it as UTF-8"),
    "run: \u0001": (None, "is no YAML", "remove that character"),
}


@pytest.mark.parametrize("text", FAULTS, ids=lambda text: repr(text[:30]))
def test_a_mistake_is_refused_with_its_file_line_value_and_remedy(little, text):
    line, wrong, remedy = FAULTS[text]
    with pytest.raises(ValueError) as raised:
        given(little, text.encode("utf-8", "surrogateescape"))
    message = str(raised.value)
    assert message.startswith(f"mine.yaml, line {line}" if line else "mine.yaml"), message
    assert re.search(wrong, message) and re.search(remedy, message.splitlines()[-1]), message
    assert len(message) < 700


def test_an_unknown_preset_is_refused_with_those_that_there_are(little):
    (little / "notebooks/params/small.yaml").write_text("run: small")
    assert presets.preset_file("small", little) == little / "notebooks/params/small.yaml"
    with pytest.raises(FileNotFoundError, match="no preset 'smal'.*there is small: did you mean 'small'?"):
        presets.preset_file("smal", little)
    with pytest.raises(ValueError, match="cannot name a preset"):
        presets.preset_file("../../small", little)


def test_a_type_with_an_alternative_takes_both_and_a_type_of_ones_own_takes_anything():
    either = Parameter("list[int] | None", None, "")
    assert misfit(either, [1], "x") is None and misfit(either, None, "x") is None
    assert misfit(either, ["a"], "x").place == ("x", 0)
    assert misfit(Parameter("Path", None, ""), 5, "x") is None


# What papermill gives a running notebook.

CELL = 'run: str = "tiny"\nsteps: int = 5\nexplainer: dict = {"model": "m", "tokens": 3}\n'


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ('steps = "12"', "steps is '12', a text, not a whole number.*without quotes"),
        ("steps = True", "steps is true"),
        ("explainer = {'model': 'x'}", "explainer lacks tokens: papermill replaces a whole dictionary"),
        ("explainer = {'model': 'x', 'tokens': 3, 'tag': 1}", "explainer.tag is an unknown entry"),
        ("run = '../x'", "cannot name a run"),
        ("run = 2024", "run is 2024, a whole number, not a text"),
    ],
)
def test_a_page_refuses_what_papermill_passed_on_of_another_type(little, monkeypatch, cell, message):
    (little / "pyproject.toml").write_text("")
    monkeypatch.chdir(little)
    notebook = {"In": ["", "%matplotlib inline", CELL, cell]}
    exec(CELL, notebook)
    assert Page(notebook).params == {"steps": 5, "explainer": {"model": "m", "tokens": 3}}
    exec(cell, notebook)
    with pytest.raises(ValueError, match=message):
        Page(notebook)


# Names of folders.

ELSEWHERE = [
    "", ".", "..", "../x", "/etc", "a/b", "a\\b", "C:x", "x\n", "x\0", "a\tb", ".hidden", "x.", " x", "x ", "nul",
    "COM1.txt", "a*", "a?", '"a"', "<a>", "a|b", "x" * 101, "é" * 51, "\u202eabc", "\ud83d",
]  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE, ids=repr)
def test_a_name_that_leaves_its_folder_or_that_some_system_refuses_is_refused(little, monkeypatch, name):
    (little / "pyproject.toml").write_text("")
    monkeypatch.chdir(little)
    for make in (lambda: folder_name(name, "a run"), lambda: Stage(name, "train"), lambda: Stage("tiny", name)):
        with pytest.raises(ValueError, match="cannot name a (run|stage): .*use one folder name") as raised:
            make()
        assert len(str(raised.value)) < 300


@pytest.mark.parametrize("name", ["tiny", "2024", "my run (2)", "Köln-猫_v1.2", "layer+3", "é" * 50])
def test_an_ordinary_name_is_kept(name):
    assert folder_name(name, "a run") == name


def test_a_name_that_is_no_choice_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="no GPU 'A100'; choose one of A100 80GB, H100 80GB"):
        device_named("A100")
    with pytest.raises(ValueError, match="dtype is 'bf16'; choose one of float32, bfloat16, float16, auto"):
        LMM.load("data/models/tiny-llava-next", dtype="bf16")


def test_the_choices_that_a_comment_names_are_those_that_the_package_accepts():
    """The comments are what a preset is compared with."""
    pages = {source.stem[:2]: parameters(source) for source in sources()}
    choices = {
        "tracker": TRACKERS, "unreadable": UNREADABLE, "store": ("", *VALUES), "kinds": (*SAE_KINDS, "special"),
        "clamped_kinds": (*SAE_KINDS, "special"), "mixed_precision": ("no", "bf16"), "kind": TRAININGS,
    }  # fmt: skip
    for page in pages.values():
        for name in choices.keys() & page.keys():
            is_list = isinstance(page[name].default, list)
            for value in choices[name]:
                assert misfit(page[name], [value] if is_list else value, name) is None, (name, value)
            assert misfit(page[name], ["else"] if is_list else "else", name), name


def test_a_preset_extends_another_entry_by_entry(little):
    base = "run: base\nsteps: 7\nmixed: no\nexplainer: {model: a, tokens: 8}\n01_one: {explainer: {doses: [3]}, lr: 1}"
    (little / "notebooks/params/base.yaml").write_text(base)
    assert given(little, "extends: base\nrun: mine\nexplainer: {tokens: 9}\n01_one: {lr: 2}") == {
        "run": "mine", "steps": 7, "mixed": "no", "lr": 2,
        "explainer": {"model": "a", "tokens": 9, "doses": [3], "inner": {"question": "q"}},
    }  # fmt: skip
    assert given(little, "extends: base\nmixed: off")["mixed"] == "off"
    assert given(little, "extends: base\nprepare: {samples: {source: 1}}")["steps"] == 7


def test_an_error_in_an_extended_preset_names_its_own_file(little):
    (little / "notebooks/params/base.yaml").write_text("run: base\n\nsteps: many")
    with pytest.raises(ValueError, match="^base.yaml, line 3: .*steps is 'many'"):
        given(little, "extends: base")
    with pytest.raises(ValueError, match="^mine.yaml, line 2: .*steps is 'few'"):
        given(little, "extends: base\nsteps: few")
    with pytest.raises(FileNotFoundError, match="^mine.yaml, line 1: there is no preset 'bass'.*did you mean 'base'"):
        given(little, "extends: bass")
    with pytest.raises(ValueError, match="mine is extended by itself"):
        given(little, "extends: mine")
    (little / "notebooks/params/base.yaml").write_text("extends: mine")
    with pytest.raises(ValueError, match="base.yaml, line 1: mine is extended by itself"):
        given(little, "extends: base")
