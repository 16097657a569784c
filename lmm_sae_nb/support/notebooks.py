"""Read what a notebook takes and makes, and run it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from lmm_sae_nb.support.parameters import Parameter, check, declared

REPOSITORY = Path(__file__).resolve().parents[2]
READS = ("stage", "file", "read")  # methods of `Page` whose first argument is a stage


def sources(root: Path = REPOSITORY) -> list[Path]:
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
    return declared("\n".join(tagged[0].splitlines()[1:]), source.name)


def stages(source: Path, methods: tuple[str, ...] = READS) -> list[str]:
    """Return the stages that a notebook makes or reads, in order.

    They are what `page.stage`, `page.file` and `page.read` are called with, and `after` and `beside` of `page.stage`.

    methods: of `Page`; `("stage",)` returns only the stages that the notebook makes.
    """
    names: list[str] = []
    for call in _calls(source, methods):
        given = [keyword.value for keyword in call.keywords if keyword.arg in ("after", "beside")]
        given = given * (methods == READS) + call.args[:1]
        names += [text for each in given for text in _constants(each)]
    return list(dict.fromkeys(names))


def ignored(source: Path, made: Collection[str] | None = None) -> set[str]:
    """Return the parameters, or entries of parameters, that change no result of a notebook: those in `without` of every
    `page.stage`.

    made: only the results of these stages count; by default those of all that the notebook makes.
    """
    calls = [call for call in _calls(source, ("stage",)) if made is None or set(_constants(call.args[0])) & set(made)]
    given = [
        {text for keyword in call.keywords if keyword.arg == "without" for text in _constants(keyword.value)}
        for call in calls
    ]

    def is_covered(name: str, names: set[str]) -> bool:  # "endpoint" covers "endpoint.timeout"
        return bool({name, name.partition(".")[0]} & names)

    return {name for names in given for name in names if all(is_covered(name, each) for each in given)}


def _calls(source: Path, methods: tuple[str, ...]) -> list[ast.Call]:
    """The calls of these methods of `page`, in order."""
    found = [
        node
        for node in ast.walk(tree(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in methods
        and ast.unparse(node.func.value) == "page"
    ]
    return sorted(found, key=lambda call: (call.lineno, call.col_offset))


def _constants(expression: ast.expr) -> list[str]:
    return [node.value for node in ast.walk(expression) if isinstance(node, ast.Constant)]


def tree(source: Path) -> ast.Module:
    """Return the syntax tree of a notebook's source."""
    return ast.parse(source.read_text(encoding="utf-8"), filename=str(source))


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
    root: Path = REPOSITORY,
    on_cell: Callable[..., None] | None = None,
) -> None:
    """Run a notebook from the repository's root.

    values: parameters to change; papermill alone would let unknown ones pass. They become a code cell of the notebook.
    on_cell: called with keyword arguments when a code cell starts.

    Raises:
        ValueError: the notebook does not have one of these parameters, or a value is not of its type.
    """
    import nbformat
    import papermill

    cells = nbformat.read(notebook, as_version=4).cells
    known = [declared(cell.source, notebook.stem) for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    check(notebook.stem, known[0] if known else {}, values)
    executed.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        str(notebook), str(executed), dict(values), cwd=str(root), kernel_name="python3", progress_bar=False,
        on_cell_execute=on_cell,
    )  # fmt: skip


def quiet_kernels(folder: Path) -> str:
    """Make a private IPYTHONDIR for the book, the tests and `make lab`; return its path.

    Its kernels do not warn of their TCP transport at every start.
    """
    profile = folder / "profile_default"
    profile.mkdir(parents=True, exist_ok=True)
    (profile / "ipython_kernel_config.py").write_text("c.IPKernelApp.log_level = 40\n")
    return str(folder)
