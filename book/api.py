"""The reference: a page for each folder of the package, with every public name; the text is that of the docstring.

`pages` writes their sources, one `automodule` for each module. `setup` makes this file an extension of Sphinx that
reads the house's docstrings: a line `name: meaning` describes an argument, and code stands in single backticks.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lmm_sae_nb"
ON_TOP = ("pictureworld", "prepare", "benchmarks")
HEAD = """# Reference

The public functions and classes of the package, with a page for each folder. A folder imports only from folders to its
left:

> {line}

`pictureworld`, `prepare` and `benchmarks` stand on top of all of them. `lmm_sae_nb` itself offers the names that most
users need: {names}.

| folder | what it is for |
|---|---|
{folders}
"""


def layers(root: Path = ROOT) -> list[str]:
    """Return the package's folders in their order, as the package's docstring states it."""
    text = (root / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    return re.findall(r"^ +(\w+(?: · \w+)+)$", text, re.MULTILINE)[0].split(" · ")


def modules(folder: Path) -> list[str]:
    """Return the names of a folder's modules: first those that its docstring names, in that order, then the others."""
    found = [
        ".".join(file.relative_to(folder.parent.parent).with_suffix("").parts) for file in folder.rglob("[!_]*.py")
    ]
    text = (folder / "__init__.py").read_text(encoding="utf-8")
    place = {name: text.find(f"{name.split('.', 2)[2].replace('.', '/')}.py") for name in found}
    return sorted(found, key=lambda name: (place[name] < 0, place[name], name))


def pages(root: Path = ROOT) -> dict[str, str]:
    """Return the pages as Markdown, by name: `api`, then `reference/` and a folder, in the folders' order."""
    order = layers(root)
    text = (root / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    names = ", ".join(f"`{name}`" for name in re.findall(r'"(\w+)": "[\w.]+"', text))
    folders = [name for name in [*order, *ON_TOP] if (root / PACKAGE / name / "__init__.py").is_file()]
    rows = [f"| [{name}](reference/{name}) | {summary(root / PACKAGE / name)} |" for name in folders]
    first = HEAD.format(line=" · ".join(order), names=names, folders="\n".join(rows))
    return {"api": first} | {f"reference/{name}": folder_page(root / PACKAGE / name) for name in folders}


def summary(folder: Path) -> str:
    """Return the first paragraph of a folder's docstring, on one line."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def folder_page(folder: Path) -> str:
    """Return the page of one folder as Markdown: its own docstring, then its modules."""
    parts = [f"# {folder.name}\n", directive(f"automodule:: {PACKAGE}.{folder.name}", "no-index")]
    for module in modules(folder):
        parts.append(f"## {module.removeprefix(PACKAGE + '.')}\n")
        parts.append(directive(f"automodule:: {module}", "members"))
    return "\n".join(parts)


def directive(call: str, option: str) -> str:
    """Return a block of Markdown that runs a directive of reStructuredText."""
    return f"```{{eval-rst}}\n.. {call}\n   :{option}:\n```\n"


ARGUMENT = re.compile(r"(?P<names>\w+(?:, \w+)*): +(?P<text>.*)")


def restructured(lines: list[str], arguments: set[str] | None = None) -> list[str]:
    """Return a docstring of the house's form as reStructuredText.

    lines: of the docstring, without their common indentation.
    arguments: names that a line `name: meaning` may describe; None for any.
    """
    out: list[str] = []
    heading = ""
    for line in lines:
        bare = line.strip()
        if not line.startswith(" "):
            heading = bare if bare in ("Raises:", "Returns:", "Yields:") else heading if not bare else ""
        if bare and bare == heading:
            out.append("")
            continue
        described = ARGUMENT.fullmatch(bare)
        if described and heading == "Raises:":
            out.append(f":raises {described['names']}: {escaped(described['text'])}")
        elif described and _known(described["names"], arguments):
            for name in described["names"].split(", "):
                out.append(f":param {name}: {escaped(described['text'])}")
        elif bare and out and out[-1].lstrip().startswith((":param", ":raises")):
            out[-1] += f" {escaped(bare)}"
        else:
            out.append(escaped(line))
            continue
    return _apart(out)


def _known(names: str, arguments: set[str] | None) -> bool:
    return arguments is None or set(names.split(", ")) <= arguments


def _apart(lines: list[str]) -> list[str]:
    """The lines, with an empty one between text and a list of arguments."""
    out: list[str] = []
    for line in lines:
        if out and out[-1].strip() and line.strip() and line.startswith(":") != out[-1].startswith(":"):
            out.append("")
        out.append(line)
    return [*out, ""]


def escaped(line: str) -> str:
    """Return a line whose single backticks are code, and in which no other character is markup."""
    parts = re.split(r"(`+)([^`]+)\1", line)
    text = []
    for n in range(0, len(parts), 3):
        text.append(re.sub(r"([*|\\`]|_\b)", r"\\\1", parts[n]))
        if n + 2 < len(parts):
            text.append(f"``{parts[n + 2]}``")
    return "".join(text)


def _arguments(thing: object) -> set[str] | None:
    try:
        return set(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return None


def read_docstring(app, what: str, name: str, thing: object, options, lines: list[str]) -> None:
    """Rewrite a docstring in place, when Sphinx has read it."""
    lines[:] = restructured(lines, _arguments(thing) if what in ("function", "method", "class") else set())


def skip(app, what: str, name: str, thing: object, skipped: bool, options) -> bool | None:
    """Leave out the fields of named tuples, which the docstring of their class describes."""
    text = inspect.getdoc(thing) or ""
    return True if text.startswith("Alias for field number") else None


def setup(app) -> dict[str, bool]:
    """Connect this file to Sphinx."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("autodoc-skip-member", skip)
    if numbering := app.extensions.get("sphinx_multitoc_numbering"):
        # It numbers chapters after all pages are read, but does not say so. Then Sphinx would read one page at a time.
        numbering.parallel_read_safe = True
    return {"parallel_read_safe": True, "parallel_write_safe": True}
