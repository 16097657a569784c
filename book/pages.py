"""The book's pages: what each imports and reads, and how it is published.

What a notebook takes, and how it is run, is in `lmm_sae_nb.support.notebooks` and `.presets`; their names are offered
here as well.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from lmm_sae_nb.support.files import existing, files_below
from lmm_sae_nb.support.notebooks import (  # noqa: F401
    code_cells,
    convert,
    execute,
    parameters,
    quiet_kernels,
    sources,
    stages,
    tree,
)
from lmm_sae_nb.support.parameters import Parameter, check  # noqa: F401
from lmm_sae_nb.support.presets import preset, preset_file  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lmm_sae_nb"
WIDGET = "application/vnd.jupyter.widget-view+json"
PROGRESS = re.compile(r"(\d+%\|.*\|.*|\d+it|\d+/[\d?]+) \[\d+:\d\d")  # a line of tqdm
TOP = "result"  # the tag of the cell whose output opens the page in the book


PATH = re.compile(r"(data|book|notebooks)/[\w./-]+")  # of this repository, whether it is there or not


def named(source: Path, values: Mapping[str, object], root: Path = ROOT) -> set[str]:
    """The paths in a notebook's code or parameters, as they are with these values.

    They are paths below `data/`, `book/` or `notebooks/`, and in the parameters whatever names a file or folder, as
    `Page.stage` has it: wherever it lies, and whatever letters it is written with.
    """
    known = parameters(source)
    cells = (node for node in tree(source).body if getattr(getattr(node, "target", None), "id", None) not in known)
    texts = [node.value for cell in cells for node in ast.walk(cell) if isinstance(node, ast.Constant)]
    given = _texts({name: parameter.default for name, parameter in known.items()} | dict(values))
    found = {text for text in [*texts, *given] if isinstance(text, str) and PATH.fullmatch(text)}
    return found | {text for text in given if text and existing(root, text) not in (None, root)}


def _texts(value: object) -> list[str]:
    """The texts in a plain value, however deep."""
    if isinstance(value, Mapping | list):
        return [text for each in (value.values() if isinstance(value, Mapping) else value) for text in _texts(each)]
    return [value] if isinstance(value, str) else []


def shipped(source: Path, values: Mapping[str, object], root: Path = ROOT) -> list[Path]:
    """The files of the repository (models, drawings, presets) that a notebook names."""
    paths = [root / text for text in named(source, values, root) if _is_shipped(text)]
    files = {file for path in paths for file in (files_below(path) if path.is_dir() else [path])}
    return sorted(file for file in files if file.is_file())


def _is_shipped(text: str) -> bool:
    return bool(PATH.fullmatch(text)) and not f"{text}/".startswith("data/artifacts/")


def results(source: Path, values: Mapping[str, object], root: Path = ROOT) -> list[Path]:
    """What a notebook writes and reads that is not shipped.

    It is the notebook's stages, what it names below `data/artifacts/`, and what is the user's own, such as pictures.
    """
    folder = root / "data" / "artifacts" / str(values.get("run", "tiny"))
    others = {root / text for text in named(source, values, root) if not _is_shipped(text)}
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
