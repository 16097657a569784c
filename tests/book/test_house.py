"""The house is in order: what is declared twice agrees, what is borrowed is licensed, notebooks keep form."""

import ast
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from book import pages

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = pages.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALLED = [Requirement(line) for line in PROJECT["dependencies"] + EXTRAS["book"] + EXTRAS["tests"]]
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in ("", "#")]
NOTEBOOKS = pages.sources()
PRESETS = sorted((ROOT / "notebooks" / "params").glob("*.yaml"))

LAYERED = ("lmm_sae_nb/__init__.py", "README.md", "CONTRIBUTING.md")  # each states the order of the folders
ON_TOP = ("pictureworld", "prepare", "benchmarks")  # of all other folders
BOOKKEEPING = ("is_current", "write_json", "read_json(", "fingerprint", "manifest.json", "require(", "Stage(")
WIDTH = 75  # characters of code that the book shows at a window width of 1,300 px without scrolling


def tracked(*patterns: str) -> list[Path]:
    """What git would commit here: files it has or would add."""
    command = [
        "git",
        "-c",
        f"safe.directory={ROOT}",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    names = subprocess.run([*command, "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [file for name in filter(None, names.split("\0")) if (file := ROOT / name).is_file()]


def pinned() -> dict[str, Requirement]:
    """The pins that hold on this Python, by canonical name."""
    return {canonicalize_name(pin.name): pin for pin in PINS if pin.marker is None or pin.marker.evaluate()}


# What is declared twice agrees.


def test_environment_yml_is_in_step_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = (item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert environment["name"] == PROJECT["name"]
    assert f"python{PROJECT['requires-python']}" in conda
    assert "pip" in conda
    assert pip == ["-c constraints.txt", "-e .[book,tests]"]
    assert {"book", "tests"} <= EXTRAS.keys()


def test_ways_to_install_name_the_same_extras():
    for file in ("Makefile", "environment.yml"):
        assert re.findall(r"-e '?\.\[(.+?)\]", (ROOT / file).read_text()) == ["book,tests"], file


@pytest.mark.parametrize("pin", PINS, ids=str)
def test_a_constraint_is_one_exact_public_version(pin):
    assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), f"{pin}: write NAME==VERSION, without a local suffix"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_has_one_pin_that_meets_it(python):
    here = default_environment() | {"python_version": python, "python_full_version": f"{python}.0"}
    for requirement in (r for r in INSTALLED if not r.marker or r.marker.evaluate(here)):
        name = canonicalize_name(requirement.name)
        pins = [p for p in PINS if canonicalize_name(p.name) == name and (not p.marker or p.marker.evaluate(here))]
        assert len(pins) == 1, f"{requirement}: {len(pins)} pins in constraints.txt for Python {python}"
        (version,) = pins[0].specifier
        assert requirement.specifier.contains(version.version), f"{pins[0]} does not meet {requirement}"


def test_everything_that_the_extras_pull_in_is_pinned():
    waiting, seen = list(INSTALLED), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, extras := frozenset(requirement.extras)) in seen or name.startswith(("nvidia", "cuda", "triton")):
            continue
        seen.add((name, extras))
        try:
            needs = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for need in map(Requirement, needs):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                waiting.append(need)
    ours = {name for name, _ in seen if name not in ("setuptools", "pip", "wheel")}
    installed = {name for name in ours if _is_installed(name)}
    assert installed - pinned().keys() == set(), "add them to constraints.txt"


def _is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def test_pre_commit_runs_the_pinned_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    used = {line for hook in hooks for line in hook.get("additional_dependencies", [])}
    assert used == {str(pinned()["ruff"])}


def test_workflows_run_only_pythons_that_the_project_allows():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert all(SpecifierSet(PROJECT["requires-python"]).contains(f"{version}.0") for version in versions)


def test_every_import_is_declared():
    names = {
        "PIL": "pillow",
        "sklearn": "scikit-learn",
        "yaml": "pyyaml",
        "IPython": "ipython",
        "sparsify": "eai-sparsify",
        "markdown_it": "markdown-it-py",
    }
    declared = {canonicalize_name(requirement.name) for requirement in INSTALLED}
    carried = {"ipython", "nbclient", "nbformat", "tomllib", "huggingface-hub", "tokenizers", "pandas"}
    carried |= {"markdown-it-py", "mdit-py-plugins"}  # by jupyter-book
    peers = {canonicalize_name(Requirement(line).name) for line in EXTRAS["peers"]}
    own = {"book", "lmm_sae_nb", "dodo"} | {file.stem for file in (ROOT / "tests").rglob("*.py")}
    for file in tracked("*.py"):
        allowed = declared | carried | (peers if {"peers", "benchmarks"} & set(file.parts) else set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.split(".")[0] for name in found} - own - sys.stdlib_module_names:
                package = canonicalize_name(names.get(top, top))
                assert package in allowed, f"{file.relative_to(ROOT)} imports {top}: add it to pyproject.toml"


# What is borrowed is licensed; what is ours names no machine.


def test_the_licence_is_the_one_that_is_declared():
    assert PROJECT["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


@pytest.mark.parametrize("line", re.findall(r"^\| `.+", (ROOT / "book/vendor/README.md").read_text(), re.MULTILINE))
def test_vendored_files_are_what_their_readme_says(line):
    name, _, digest = re.findall(r"`(.+?)`", line)
    assert hashlib.sha256((ROOT / "book/vendor" / name).read_bytes()).hexdigest() == digest


def test_every_vendored_file_is_listed_and_has_a_licence_beside_it():
    listed = (ROOT / "book/vendor/README.md").read_text()
    for file in tracked("book/vendor/*/*"):
        assert (file.parent / "LICENSE").is_file()
        assert f"{file.parent.name}/{file.name}`" in listed or "LICENSE" in file.name, file


def test_every_folder_of_borrowed_pictures_has_a_licence():
    for file in tracked("data/*.png", "data/*.ttf"):
        above = [folder for folder in file.parents if folder.is_relative_to(ROOT / "data")]
        assert any(list(folder.glob("LICEN[SC]E*")) for folder in above), f"no licence beside {file.relative_to(ROOT)}"


def text_of_ours() -> Iterator[tuple[Path, str]]:
    for file in tracked():
        if "vendor" not in file.parts and file.suffix in (
            "",
            ".py",
            ".md",
            ".toml",
            ".txt",
            ".yml",
            ".yaml",
            ".json",
        ):
            yield file.relative_to(ROOT), file.read_text(encoding="utf-8")


def test_no_file_names_a_machine_or_a_registry():
    folders = "|".join(["wo" + "rk", "ro" + "ot", "ho" + "me", "o" + "pt", "Us" + "ers", "m" + "nt"])
    path = re.compile(rf"(?<![\w./}}])/({folders})/\w")
    host = re.compile(r"\b(pypi\.(org|python)|registry\.npmjs|(deb|security)\.debian|download\.pytorch)\w*\.?")
    for file, text in text_of_ours():
        for number, line in enumerate(text.splitlines(), 1):
            if file.name != "test_house.py":
                assert not path.search(line), f"{file}:{number} names a folder of one machine: {line.strip()}"
                assert not host.search(line), f"{file}:{number} names a registry's host: {line.strip()}"


# The package.


def layers(file: str) -> list[str]:
    """The folders in their order, from the line `support · model · ...` in a file."""
    lines = re.findall(r"^\W*(\w+(?: · \w+)+)\W*$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(set(lines)) == 1, f"{file} has {len(lines)} lines of the form  support · model · ... · show; write one"
    return lines[0].split(" · ")


def test_every_text_states_the_same_order_of_folders_and_it_names_all_of_them():
    orders = {file: layers(file) for file in LAYERED}
    assert len(set(map(tuple, orders.values()))) == 1, f"these differ: {orders}"
    package = ROOT / "lmm_sae_nb"
    folders = {file.parent.relative_to(package).parts[0] for file in package.glob("*/**/*.py")}
    assert folders == {*orders[LAYERED[0]], *ON_TOP}


def test_a_folder_imports_only_from_folders_to_its_left():
    package, order = ROOT / "lmm_sae_nb", layers(LAYERED[0])
    height = {name: n for n, name in enumerate([*order, *ON_TOP])}
    for file in sorted(package.glob("*/**/*.py")):
        own = file.relative_to(package).parts[0]
        for imported in pages.imports(file, types=True) - {package / "__init__.py"}:
            other = imported.relative_to(package).parts[0]
            left = height[other] <= height[own]
            assert left, f"{file.relative_to(ROOT)} imports {imported.relative_to(ROOT)}: {other} is right of {own}"


def test_no_two_modules_import_each_other():
    modules = set((ROOT / "lmm_sae_nb").glob("*/**/[!_]*.py"))
    TopologicalSorter({file: pages.imports(file) & modules for file in modules}).prepare()  # it names a circle


def test_pictures_are_opened_and_converted_in_one_place_only():
    """Else a 16-bit or transparent picture is one picture in training and another in the cache."""
    allowed = {
        "lmm_sae_nb/support/images.py",
        "lmm_sae_nb/pictureworld/world/art.py",  # its own drawings
        "lmm_sae_nb/benchmarks/faults_files.py",  # these say without the package's help what a picture shows
        "lmm_sae_nb/benchmarks/faults_values.py",
    }
    for file in tracked("lmm_sae_nb/*.py", "notebooks/*.py", "book/*.py"):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text if re.search(r"\.(convert|open)\(", text) else "")):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                to_rgb = node.func.attr == "convert" and [ast.unparse(each) for each in node.args[:1]] == ["'RGB'"]
                if to_rgb or ast.unparse(node.func) == "Image.open":
                    name = file.relative_to(ROOT).as_posix()
                    assert name in allowed, f"{name}:{node.lineno}: use rgb or open_rgb of support/images.py"


def test_there_is_no_utils():
    assert not tracked("*utils*.py", "*misc*.py")


def test_no_executed_notebook_is_committed():
    assert not tracked("*.ipynb")


# The notebooks.


@pytest.fixture(params=NOTEBOOKS, ids=lambda source: source.stem)
def notebook(request) -> Path:
    return request.param


def cells(source: Path) -> list[tuple[str, str]]:
    """A py:percent file's cells: the rest of the `# %%` line, and the text below it."""
    parts = re.split(r"^# %%(.*)\n", source.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def test_there_are_notebooks():
    assert NOTEBOOKS, "notebooks/ holds no 01_*.py"


def test_a_notebook_opens_with_its_title(notebook):
    head, text = cells(notebook)[0]
    assert head.strip() == "[markdown]"
    assert text.startswith("# # "), f"the first cell of {notebook.name} begins with its title, # # ..."


def test_parameters_are_typed_and_commented_and_papermill_reads_the_same(notebook, tmp_path):
    import papermill

    found = pages.parameters(notebook)
    assert next(iter(found)) == "run", "the first parameter is the run"
    for name, parameter in found.items():
        assert parameter.type, f"{name} has no type"
        assert parameter.comment, f"{name} has no comment that says what it is and in what unit"
    pages.convert(notebook, tmp_path / "it.ipynb")
    read = papermill.inspect_notebook(str(tmp_path / "it.ipynb"))
    assert {name: ast.literal_eval(item["default"]) for name, item in read.items()} == {
        name: parameter.default for name, parameter in found.items()
    }
    assert {name: item["inferred_type_name"] for name, item in read.items()} == {
        name: parameter.type for name, parameter in found.items()
    }


def code(source: Path) -> Iterator[tuple[str, str]]:
    """A py:percent file's code cells."""
    return ((head, text) for head, text in cells(source) if "[markdown]" not in head)


def test_a_notebook_defines_no_long_function(notebook):
    for node in ast.walk(ast.parse(notebook.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 5, f"{node.name} has {length} lines: its home is the package"


def test_no_line_of_code_is_wider_than_the_page(notebook):
    visible = (text for head, text in code(notebook) if not re.search("remove-(cell|input)", head))
    for text in visible:
        for line in text.splitlines():
            assert len(line) <= WIDTH, f"{len(line)} characters, at most {WIDTH} fit: {line}"


def test_a_notebook_keeps_no_books(notebook):
    for _, text in code(notebook):
        found = [word for word in BOOKKEEPING if word in text]
        assert not found, f"{', '.join(found)}: leave this to page.stage, stage.result, page.read and page.file"


def test_every_parameter_is_used(notebook):
    used = {node.id for node in ast.walk(ast.parse(notebook.read_text(encoding="utf-8"))) if _is_read(node)}
    assert pages.parameters(notebook).keys() - {"run"} <= used


def _is_read(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)


def test_a_notebook_opens_its_page_right_after_its_parameters(notebook):
    assert list(code(notebook))[1][1].rstrip().endswith("page = Page(globals())\nplots.style()")


def test_a_notebook_has_a_result_findings_and_its_provenance(notebook):
    text = "".join(text for _, text in code(notebook))
    results = [head for head, _ in code(notebook) if f'"{pages.TOP}"' in head]
    assert len(results) == text.count("headline(\n") == 1, 'one cell tagged "result" calls headline(...)'
    assert "findings(" in text and "provenance(page" in text


def test_every_figure_has_a_caption_and_a_text_for_who_does_not_see_it(notebook):
    for head, text in code(notebook):
        if "plots." in text and isinstance(last := ast.parse(text).body[-1], ast.Expr) and _draws(last.value):
            settings = re.search(r"mystnb=(\{.*\})", head)
            assert settings, f"the cell that ends in {ast.unparse(last)[:60]} has no caption"
            given = json.loads(settings[1])
            assert given["figure"]["caption"] and given["figure"]["name"].startswith("fig-"), head
            assert given["image"]["alt"], head


NO_FIGURES = {"plots.style", "plots.table", "plots.case_studies", "plots.shaded_texts"}


def _draws(value: ast.expr) -> bool:
    name = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
    return name.startswith("plots.") and name not in NO_FIGURES


def test_a_cell_with_a_figure_shows_nothing_else(notebook):
    for head, text in cells(notebook):
        if '"figure"' in head and isinstance(ast.parse(text).body[-1], ast.Expr):
            assert text.rstrip().endswith(";"), f"end the cell under {head.strip()} with ; or its axes are printed"


def test_a_notebook_names_no_absolute_path_and_changes_no_directory(notebook):
    text = notebook.read_text(encoding="utf-8")
    assert not re.search(r"sys\.path|os\.chdir|%cd|pip install", text)


@pytest.mark.parametrize("params", PRESETS, ids=lambda path: path.stem)
def test_a_preset_gives_every_notebook_only_what_it_has(params):
    assert set(pages.preset(params)) == {source.stem for source in NOTEBOOKS}
    assert {values["run"] for values in pages.preset(params).values()} == {params.stem}


@pytest.mark.parametrize("name", ["small", "paper"])
def test_a_preset_of_another_scale_leaves_nothing_to_the_default(name):
    values = pages.preset(ROOT / "notebooks/params" / f"{name}.yaml")
    for source in NOTEBOOKS:
        left = pages.parameters(source).keys() - values[source.stem].keys()
        assert not left, f"{name}.yaml does not give {source.stem} {', '.join(sorted(left))}"


def test_the_tiny_preset_is_what_the_notebooks_say_themselves():
    values = pages.preset(ROOT / "notebooks/params/tiny.yaml")
    for source in NOTEBOOKS:
        defaults = {name: parameter.default for name, parameter in pages.parameters(source).items()}
        assert {**defaults, **values[source.stem]} == defaults


# The hands that read and run them.


ONE = """\
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% tags=["parameters"]
# the
# run
run: str = "tiny"
steps: int = 5  # steps

# %%
from lmm_sae_nb import Stage

page.stage("train", without=("steps",)).finish({})
"""
TWO = """\
# %% tags=["parameters"]
run: str = "tiny"  # the run
lr: float = 0.1  # rate
explainer: dict = {
    "model": "data/models/m",  # a folder
    "tokens": 32,
}  # asked for names

# %%
import lmm_sae_nb.b as b

page.file("train", "sae")
page.read("interpret", "names", dict[int, str])
stage = page.stage(
    "score", after=("cache", "train"), beside=("judge",), without=("lr",)
)
other.stage("no")
stage.result("maps", dict, lambda: b.f())
"""


@pytest.fixture
def little(tmp_path) -> Path:
    """A repository of two notebooks and a package of three modules, one of whose names the package itself offers."""
    for name, text in {
        "notebooks/01_one.py": ONE,
        "notebooks/02_two.py": TWO,
        "notebooks/notes.py": "",
        "notebooks/params/p.yaml": "run: big\n02_two: {lr: 0.2, explainer: {tokens: 64}}\n",
        "lmm_sae_nb/__init__.py": 'HOMES = {"Stage": "stages"}\nif TYPE_CHECKING:\n    from .b import f\n',
        "lmm_sae_nb/stages.py": "",
        "lmm_sae_nb/b.py": "def f():\n    from .inner import c\n",
        "lmm_sae_nb/inner/__init__.py": "",
        "lmm_sae_nb/inner/c.py": "from ..stages import Stage\nfrom lmm_sae_nb import b\nNAMED = 'c.json'\n",
        "lmm_sae_nb/inner/c.json": "{}",
        "data/models/m/weights": "1",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_modules_that_a_notebook_imports_are_found_without_running_it(little):
    one, two = pages.sources(little)

    def found(source):
        return {str(file.relative_to(little / "lmm_sae_nb")) for file in pages.modules(source, little)}

    assert found(one) == {"__init__.py", "stages.py"}
    assert found(two) == {"__init__.py", "stages.py", "b.py", "inner/__init__.py", "inner/c.py", "inner/c.json"}


def test_the_stages_of_a_notebook_are_the_ones_that_its_page_makes_and_reads(little):
    one, two = pages.sources(little)
    assert pages.stages(one) == ["train"]
    assert set(pages.stages(two)) == {"train", "interpret", "score", "cache", "judge"}
    given = {"run": "big", "images": "data/artifacts/tiny/world/cache"}
    assert pages.results(one, given, little) == [
        little / "data/artifacts/big/train",
        little / "data/artifacts/tiny/world/cache",
    ]


def test_a_parameter_has_a_type_a_value_and_the_comment_above_or_behind_it(little):
    one, two = map(pages.parameters, pages.sources(little))
    assert one == {"run": pages.Parameter("str", "tiny", "the run"), "steps": pages.Parameter("int", 5, "steps")}
    assert two["explainer"] == pages.Parameter("dict", {"model": "data/models/m", "tokens": 32}, "asked for names")


def test_files_of_the_repository_that_parameters_name_are_found_also_in_a_dictionary(little):
    _, two = pages.sources(little)
    preset = "notebooks/params/p.yaml"
    assert pages.shipped(two, {}, little) == [little / "data/models/m/weights"]
    assert pages.shipped(two, {"explainer": {"model": "elsewhere"}}, little) == []
    assert pages.shipped(two, {"explainer": {"model": preset}}, little) == [little / preset]


def test_the_build_sees_a_reader_s_own_folders_whatever_they_are_called(little, tmp_path_factory):
    _, two = pages.sources(little)
    outside = tmp_path_factory.mktemp("où")
    own = ["my pictures", "été/images", "data/with space", str(outside)]
    for name in own:
        (little / name).mkdir(parents=True, exist_ok=True)
    prompt = "a text that is too long for the name of a file " * 20
    given = {"run": "big", "explainer": {"model": [*own, prompt, "no/such folder", ""]}}
    assert {little / name for name in own} <= set(pages.results(two, given, little))
    assert not {little / "no/such folder", little} & set(pages.results(two, given, little))
    assert pages.shipped(two, given, little) == []


def test_a_preset_reaches_the_notebooks_and_leaves_the_other_entries_of_a_dictionary(little):
    assert pages.preset(little / "notebooks/params/p.yaml", little) == {
        "01_one": {"run": "big"},
        "02_two": {"run": "big", "lr": 0.2, "explainer": {"model": "data/models/m", "tokens": 64}},
    }


def test_a_dictionary_at_the_top_of_a_preset_reaches_every_notebook_that_has_it(little):
    (little / "p.yaml").write_text("explainer: {model: a, tokens: 7}\n02_two: {explainer: {tokens: 8}}\n")
    assert pages.preset(little / "p.yaml", little) == {
        "01_one": {},
        "02_two": {"explainer": {"model": "a", "tokens": 8}},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stpes: 3\n", "no notebook has a parameter 'stpes'"),
        ("01_one: {lr: 0.1}\n", "gives 01_one the unknown parameter 'lr'; it has run, steps"),
        ("03_three: {lr: 0.1}\n", "no notebook '03_three' for this section; there is 01_one, 02_two"),
        ("lr: 1e-4\n", "write 1.0e-4"),
        ("explainer: {tokens: 1e2}\n", "write 1.0e-4"),
        (
            "02_two: {explainer: {token: 1}}\n",
            "02_two, explainer.token is an unknown entry; explainer has model, tokens",
        ),
    ],
)
def test_a_params_file_with_a_mistake_is_refused(little, text, message):
    (little / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        pages.preset(little / "p.yaml", little)


def test_an_unknown_parameter_is_refused_before_a_notebook_runs(little, tmp_path):
    pages.convert(little / "notebooks/01_one.py", tmp_path / "01_one.ipynb")
    with pytest.raises(ValueError, match="unknown parameter 'stpes'; it has run, steps: did you mean 'steps'"):
        pages.execute(tmp_path / "01_one.ipynb", tmp_path / "out.ipynb", {"stpes": 3})
    assert not (tmp_path / "out.ipynb").exists()


def test_a_page_opens_with_its_title_and_its_result(tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    result = new_code_cell("headline()", metadata={"tags": [pages.TOP, "remove-input"]})
    cells = [new_markdown_cell("# Title"), new_code_cell("1"), new_code_cell("2"), result, new_code_cell("3")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "in.ipynb")
    pages.publish(tmp_path / "in.ipynb", tmp_path / "out.ipynb")
    order = [cell.source for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells]
    assert order == ["# Title", "headline()", "1", "2", "3"]


def test_a_page_keeps_what_a_notebook_said_but_no_progress_bar(tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    def widget(text):
        return new_output("display_data", {pages.WIDGET: {"model_id": "1"}, "text/plain": text})

    def told(text, name="stderr"):
        return new_output("stream", name=name, text=text)

    bars = [
        widget("training:   0%|          | 0/40 [00:00<?, ?it/s]"),
        widget("reading: 0it [00:00, ?it/s]"),
        told("\ra:   0%|    | 0/3 [00:00<?, ?it/s]\ra: 100%|####| 3/3 [00:01<00:00, 2.9it/s, loss=0.1]\n"),
    ]
    kept = [
        widget("IntSlider(value=3)"),
        told("UserWarning: no\n"),
        told("50%\n", "stdout"),
        told("\r 0it [00:00]\nbad\n"),
    ]
    notebook = new_notebook(cells=[new_code_cell(outputs=[*bars, *kept])], metadata={"widgets": {}})
    nbformat.write(notebook, tmp_path / "in.ipynb")
    pages.publish(tmp_path / "in.ipynb", tmp_path / "out.ipynb")
    published = nbformat.read(tmp_path / "out.ipynb", 4)
    assert published.cells[0].outputs == kept
    assert "widgets" in published.metadata
    notebook.cells[0].outputs = bars
    nbformat.write(notebook, tmp_path / "in.ipynb")
    pages.publish(tmp_path / "in.ipynb", tmp_path / "out.ipynb")
    published = nbformat.read(tmp_path / "out.ipynb", 4)
    assert not published.cells[0].outputs
    assert "widgets" not in published.metadata


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("steps = 5  # steps", "is not of the form"),
        ("steps: int = five()  # steps", "malformed"),
    ],
)
def test_a_parameters_cell_of_another_form_is_refused(tmp_path, cell, message):
    source = tmp_path / "01_one.py"
    source.write_text(f'# %% tags=["parameters"]\n{cell}\n')
    with pytest.raises(ValueError, match=message):
        pages.parameters(source)


def test_a_notebook_without_a_parameters_cell_is_refused(tmp_path):
    source = tmp_path / "01_one.py"
    source.write_text("# %%\nsteps: int = 5  # steps\n")
    with pytest.raises(ValueError, match="01_one.py has 0 cells tagged parameters"):
        pages.parameters(source)
