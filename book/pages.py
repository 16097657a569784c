"""The book's pages: which notebooks there are, what each takes, imports and reads, and how one is run."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lmm_sae_nb"
WIDGET = "application/vnd.jupyter.widget-view+json"
PROGRESS = re.compile(r"(\d+%\|.*\|.*|\d+it|\d+/[\d?]+) \[\d+:\d\d")  # a line of tqdm
TOP = "result"  # the tag of the cell whose output opens the page in the book


class Parameter(NamedTuple):
    """One assignment of a parameters cell: `steps: int = 50`, with the comment above or behind it."""

    type: str
    default: object
    comment: str


def sources(root: Path = ROOT) -> list[Path]:
    """The notebooks in reading order: 01_... to 08_..., then the appendices A1_..."""
    return sorted(root.glob("notebooks/[0-9A]*_*.py"))


# What a notebook says of itself.


def parameters(source: Path) -> dict[str, Parameter]:
    """Return the typed names of a notebook's parameters cell, each with its default and its comment.

    A value may take several lines, as a dictionary does. The comment stands above the name, or behind the value.

    Raises:
        ValueError: there is not exactly one such cell, or a line of another form in it.
    """
    cells = re.split(r"^# %%", source.read_text(encoding="utf-8"), flags=re.MULTILINE)
    tagged = [cell for cell in cells if re.match(r".*tags=\[[^\]]*\"parameters\"", cell)]
    if len(tagged) != 1:
        raise ValueError(
            f"{source.name} has {len(tagged)} cells tagged parameters; "
            'write one, under the line # %% tags=["parameters"]'
        )
    lines = tagged[0].splitlines()[1:]
    found = {}
    for node in ast.parse("\n".join(lines)).body:
        text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        if not isinstance(node, ast.AnnAssign) or node.value is None:
            raise ValueError(f"{source.name}: {text!r} is not of the form  steps: int = 50  # optimiser steps")
        behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
        above = itertools.takewhile(lambda line: line.startswith("#"), reversed(lines[: node.lineno - 1]))
        comment = behind or " ".join(line.strip("# ") for line in reversed(list(above)))
        found[node.target.id] = Parameter(
            ast.unparse(node.annotation), ast.literal_eval(node.value), comment.strip("# ")
        )
    return found


READS = ("stage", "file", "read")  # methods of `Page` whose first argument is a stage


def stages(source: Path, methods: tuple[str, ...] = READS) -> list[str]:
    """Return the stages that a notebook makes or reads, in order.

    They are what `page.stage`, `page.file` and `page.read` are called with, and `after` and `beside` of `page.stage`.

    methods: of `Page`; `("stage",)` returns only the stages that the notebook makes.
    """
    calls = sorted(
        (node for node in ast.walk(_tree(source)) if isinstance(node, ast.Call)),
        key=lambda call: (call.lineno, call.col_offset),
    )
    names: list[str] = []
    for call in calls:
        method = call.func
        if not (isinstance(method, ast.Attribute) and method.attr in methods and ast.unparse(method.value) == "page"):
            continue
        given = [keyword.value for keyword in call.keywords if keyword.arg in ("after", "beside")]
        given = given * (methods == READS) + call.args[:1]
        names += [node.value for each in given for node in ast.walk(each) if isinstance(node, ast.Constant)]
    return list(dict.fromkeys(names))


def named(source: Path, values: Mapping[str, object]) -> set[str]:
    """The paths below `data/`, `book/` or `notebooks/` in a notebook's code or parameters, as they are with these
    values."""
    known = parameters(source)
    cells = (node for node in _tree(source).body if getattr(getattr(node, "target", None), "id", None) not in known)
    texts = [node.value for cell in cells for node in ast.walk(cell) if isinstance(node, ast.Constant)]
    texts += _texts({name: parameter.default for name, parameter in known.items()} | dict(values))
    return {text for text in texts if isinstance(text, str) and re.fullmatch(r"(data|book|notebooks)/[\w./-]+", text)}


def _texts(value: object) -> list[str]:
    """The texts in a plain value, however deep."""
    if isinstance(value, Mapping | list):
        return [text for each in (value.values() if isinstance(value, Mapping) else value) for text in _texts(each)]
    return [value] if isinstance(value, str) else []


def shipped(source: Path, values: Mapping[str, object], root: Path = ROOT) -> list[Path]:
    """The files of the repository (models, drawings, presets) that a notebook names."""
    paths = [root / text for text in named(source, values) if not f"{text}/".startswith("data/artifacts/")]
    files = {file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])}
    return sorted(file for file in files if file.is_file())


def results(source: Path, values: Mapping[str, object], root: Path = ROOT) -> list[Path]:
    """What a notebook writes, reads or names below `data/artifacts/`: its stages, and paths in full."""
    folder = root / "data" / "artifacts" / str(values.get("run", "tiny"))
    others = {root / text for text in named(source, values) if text.startswith("data/artifacts/")}
    return sorted({folder / stage for stage in stages(source)} | others)


def imports(source: Path, root: Path = ROOT, types: bool = False) -> set[Path]:
    """Return the package's files that a notebook or module imports directly, found without running it.

    types: whether imports for annotations alone, under `if TYPE_CHECKING:`, count as well.
    """
    names = _names(source.read_text(encoding="utf-8"), source.relative_to(root).parts, types)
    homes = _homes(root)
    names = {homes.get(name, name) for name in names}
    return {file for name in names if (file := _file(name, root)) and file != source}


def modules(source: Path, root: Path = ROOT) -> list[Path]:
    """The package's files that a notebook or module imports, directly or through others, and the data files beside
    them that they name."""
    found: set[Path] = set()
    waiting = imports(source, root)
    while waiting:
        file = waiting.pop()
        found.add(file)
        waiting |= imports(file, root) - found
    return sorted(found.union(*map(_beside, found)))


def _beside(module: Path) -> set[Path]:
    """The files in a module's folder, other than modules, that its code names."""
    return {file for name in _files(module.read_text(encoding="utf-8")) if (file := module.with_name(name)).is_file()}


@cache
def _files(text: str) -> frozenset[str]:
    """The strings in a module that may name a data file."""
    strings = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    return frozenset(s for s in strings if isinstance(s, str) and re.fullmatch(r"\w+\.(json|yaml|csv|txt)", s))


def _homes(root: Path) -> dict[str, str]:
    """The names that the package itself offers, `lmm_sae_nb.LMM`, each with the module that it is loaded from."""
    text = (root / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HOMES":
            return {f"{PACKAGE}.{name}": f"{PACKAGE}.{home}" for name, home in ast.literal_eval(node.value).items()}
    return {}


def _tree(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"), filename=str(source))


def _file(name: str, root: Path) -> Path | None:
    path = root.joinpath(*name.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


@cache
def _names(text: str, place: tuple[str, ...], types: bool) -> frozenset[str]:
    """Dotted names inside the package that a file's import statements may mean, parents included."""
    found, waiting = set(), [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*place[: -node.level], base]).strip(".")
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE:
                found |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return frozenset(found)


# What a notebook is given.


def preset(path: Path, root: Path = ROOT) -> dict[str, dict[str, object]]:
    """Return each notebook's parameters out of one params file.

    A `name: value` goes to every notebook that has that parameter; a section named after a notebook goes to that
    notebook alone and wins. Of a parameter that is a dictionary, only the entries that differ need to be given.

    Raises:
        ValueError: a name that nothing knows, or a text in a number's place.
    """
    import yaml

    given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    known = {source.stem: parameters(source) for source in sources(root)}
    shared = {name: value for name, value in given.items() if name not in known}
    for name, value in shared.items():
        if any(name in names for names in known.values()):
            continue
        if isinstance(value, dict):
            raise ValueError(
                f"{path.name}: there is no notebook {name!r} for this section; there is {', '.join(known)}"
            )
        raise ValueError(f"{path.name}: no notebook has a parameter {name!r}; remove it or correct its spelling")
    values = {}
    for page, names in known.items():
        shared_here = {name: value for name, value in shared.items() if name in names}
        values[page] = {
            name: _merged(names[name].default, value) if name in names else value
            for name, value in _merged(shared_here, given.get(page) or {}).items()
        }
        check(page, names, values[page], path.name)
    return values


def _merged(default: object, value: object) -> object:
    """A dictionary's entries, those that are given in place of the default ones; anything else as given."""
    if isinstance(default, dict) and isinstance(value, dict):
        return default | {name: _merged(default.get(name), each) for name, each in value.items()}
    return value


def check(page: str, known: Mapping[str, object], values: Mapping[str, object], origin: str = "the call") -> None:
    """ValueError for a parameter that the notebook does not have, or for a text in a number's place."""
    for name, value in values.items():
        if name not in known:
            raise ValueError(
                f"{origin} gives {page} the unknown parameter {name!r}; it has {', '.join(known)}: "
                "remove it or correct its spelling"
            )
        default = getattr(known[name], "default", None)
        if isinstance(default, dict) and isinstance(value, dict):
            parts = {part: Parameter("", each, "") for part, each in default.items()}
            check(f"{page}, {name}", parts, value, origin)
        if isinstance(default, (int, float)) and isinstance(value, str):
            raise ValueError(
                f"{origin} gives {page} {name}: {value!r}, a text; its default is the number {default!r} "
                "(YAML reads 1e-4 as a text: write 1.0e-4)"
            )


# Running.


def convert(source: Path, notebook: Path) -> None:
    """Write the .ipynb of a py:percent source."""
    import jupytext

    notebook.parent.mkdir(parents=True, exist_ok=True)
    jupytext.write(jupytext.read(source), notebook)


def code_cells(notebook: Path) -> int:
    """Return how many code cells a notebook has."""
    import nbformat

    return sum(cell.cell_type == "code" for cell in nbformat.read(notebook, as_version=4).cells)


def execute(
    notebook: Path,
    executed: Path,
    values: Mapping[str, object],
    root: Path = ROOT,
    on_cell: Callable[..., None] | None = None,
) -> None:
    """Run a notebook from the repository's root.

    values: parameters to change; papermill alone would let unknown ones pass. They become a code cell of the notebook.
    on_cell: called with keyword arguments when a code cell starts.

    Raises:
        ValueError: the notebook does not have one of these parameters.
    """
    import papermill

    check(notebook.stem, papermill.inspect_notebook(str(notebook)), values)
    executed.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        str(notebook), str(executed), dict(values), cwd=str(root), kernel_name="python3", progress_bar=False,
        on_cell_execute=on_cell,
    )  # fmt: skip


def publish(executed: Path, page: Path) -> None:
    """Copy an executed notebook into the book's source, without times of this run, progress bars, injected cell.

    The cell tagged `result` comes last in the notebook, for it reads what the others found, and second on the page.
    """
    import nbformat

    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for noise in ("papermill", "execution"):
            cell.metadata.pop(noise, None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("remove-cell")
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _only_progress(output)]
    top = [cell for cell in notebook.cells if TOP in cell.metadata.get("tags", [])]
    rest = [cell for cell in notebook.cells if cell not in top]
    notebook.cells = [*rest[:1], *top, *rest[1:]]
    if WIDGET not in nbformat.writes(notebook):
        notebook.metadata.pop("widgets", None)
    page.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, page)


def _only_progress(output: Mapping) -> bool:
    """Whether a cell's output is nothing but progress bars, drawn or written."""
    if WIDGET in output.get("data", {}):
        return bool(PROGRESS.search(output["data"].get("text/plain", "")))
    lines = [line for line in re.split(r"[\r\n]", output.get("text", "")) if line.strip("\x1b[A ")]
    return output.get("name") == "stderr" and all(map(PROGRESS.search, lines))


def quiet_kernels(folder: Path) -> str:
    """Make a private IPYTHONDIR for the book, the tests and `make lab`; return its path.

    Its kernels do not warn of their TCP transport at every start.
    """
    profile = folder / "profile_default"
    profile.mkdir(parents=True, exist_ok=True)
    (profile / "ipython_kernel_config.py").write_text("c.IPKernelApp.log_level = 40\n")
    return str(folder)
