"""The parameters of a notebook: what its parameters cell says of each, and whether a value fits."""

from __future__ import annotations

import ast
import contextlib
import difflib
import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

WORDS = {
    "int": "a whole number, 0 or higher", "float": "a finite number, 0 or higher", "str": "a text",
    "bool": "true or false", "list": "a list", "dict": "a dictionary", "None": "null",
}  # fmt: skip
KINDS = {bool: "bool", int: "int", float: "float", str: "str", list: "list", dict: "dict", type(None): "None"}
AT_LEAST = re.compile(r"\bat least (\d+)\b")  # how a comment says a range
BETWEEN = re.compile(r"\bfrom (\d+) to (\d+)\b")
CHOICES = re.compile(r'\bone of ((?:"[^"]*"(?:, or |, | or )?)+)')  # papermill reads no type Literal["a", "b"]
LONGEST = 60  # characters of a value that an error repeats


class Parameter(NamedTuple):
    """One assignment of a parameters cell: `steps: int = 50`, with the comment above or behind it."""

    type: str
    default: object
    comment: str


class Misfit(NamedTuple):
    """What is wrong with a value.

    place: the names and numbers that lead to it, from the parameter on.
    wrong: what it is and what it should be.
    remedy: what to write.
    """

    place: tuple[str | int, ...]
    wrong: str
    remedy: str


def declared(cell: str, origin: str) -> dict[str, Parameter]:
    """Return the typed names of a parameters cell, each with its default and its comment.

    A value may take several lines, as a dictionary does. The comment stands above the name, or behind the value.

    origin: the notebook's name, for errors.

    Raises:
        ValueError: the cell has a line of another form.
    """
    lines = cell.splitlines()
    found = {}
    for node in ast.parse(cell).body:
        text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        if not isinstance(node, ast.AnnAssign) or node.value is None:
            raise ValueError(f"{origin}: {text!r} is not of the form  steps: int = 50  # optimiser steps")
        behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
        above = itertools.takewhile(lambda line: line.startswith("#"), reversed(lines[: node.lineno - 1]))
        comment = behind or " ".join(line.strip("# ") for line in reversed(list(above)))
        kind = node.annotation.value if isinstance(node.annotation, ast.Constant) else ast.unparse(node.annotation)
        found[node.target.id] = Parameter(str(kind), ast.literal_eval(node.value), comment.strip("# "))
    return found


def declared_in(cells: Sequence[str]) -> dict[str, Parameter]:
    """Return what the latest parameters cell among a notebook's executed cells declares; nothing if there is none.

    cells: their code, such as IPython's `In`. The cell that declares `run` is meant.
    """
    for cell in reversed(cells):
        if "run:" in cell:
            with contextlib.suppress(SyntaxError, ValueError):
                found = declared(cell, "the parameters cell")
                if "run" in found:
                    return found
    return {}


def nearest(name: str, known: Collection[str]) -> str:
    """Return the remedy for an unknown name: the known name that resembles it, if there is one."""
    close = difflib.get_close_matches(str(name), known, 1)
    return f"did you mean {close[0]!r}?" if close else "remove it or correct its spelling"


def leave_out(values: Mapping[str, object], names: Collection[str]) -> dict[str, object]:
    """Return values without some of them, and without dictionaries that are left with nothing in them.

    names: of values, or of entries of a dictionary as "endpoint.timeout".
    """
    left = {}
    for name, value in values.items():
        entries = {each.partition(".")[2] for each in names if each.startswith(f"{name}.")}
        if isinstance(value, Mapping) and entries:
            value = {key: each for key, each in value.items() if key not in entries and each != {}}
        if name not in names and not (entries and value == {}):
            left[name] = value
    return left


def misfit(parameter: Parameter, value: object, name: str) -> Misfit | None:
    """Return what is wrong with a value of a parameter; None if it fits.

    A type is written as in an annotation: int, float, str, bool, list[int], dict, or several with `|`, or with `or` in
    quotes, which papermill reads. A list without a type of its elements takes that of its default's; a dictionary takes
    the entries of its default. Numbers are counts, sizes, fractions and seeds: never negative. A comment with "at least
    1" or "from 0 to 1" narrows them, one with 'one of "a", "b" or "c"' narrows a text or the texts of a list.
    """
    return _misfit(ast.parse(parameter.type, mode="eval").body, parameter.default, value, (name,), parameter.comment)


def _misfit(
    kind: ast.expr, default: object, value: object, place: tuple[str | int, ...], comment: str = ""
) -> Misfit | None:
    if isinstance(kind, ast.BinOp | ast.BoolOp):
        kinds = kind.values if isinstance(kind, ast.BoolOp) else (kind.left, kind.right)
        found = [_misfit(each, default, value, place, comment) for each in kinds]
        return None if None in found else found[0]
    name = ast.unparse(kind.value if isinstance(kind, ast.Subscript) else kind)
    if name not in WORDS:  # a type of a user's own
        return None
    if not _is(name, value):
        return Misfit(place, f"is {_shown(value)}, not {WORDS[name]}", _remedy(name, value))
    if name in ("int", "float"):
        return _out_of_range(value, place, comment)
    if name == "str" and any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in value):
        return Misfit(place, f"is {_shown(value)} with control characters", "remove them")
    if name == "str" and (found := CHOICES.search(comment)):
        return _no_choice(re.findall('"([^"]*)"', found[1]), value, place)
    if name == "list":
        element = kind.slice if isinstance(kind, ast.Subscript) else _kind_of_elements(default)
        parts = [(n, element, None, each) for n, each in enumerate(value)] if element else []
    elif name == "dict" and default and not isinstance(kind, ast.Subscript):
        if unknown := [entry for entry in value if entry not in default]:
            wrong = f"is an unknown entry; {place[-1]} has {', '.join(default)}"
            return Misfit((*place, unknown[0]), wrong, nearest(unknown[0], default))
        parts = [(entry, _kind_of(default[entry]), default[entry], each) for entry, each in value.items()]
    else:
        parts = []
    found = (_misfit(kind, known, each, (*place, at), comment) for at, kind, known, each in parts)
    return next(filter(None, found), None)


def _no_choice(choices: Sequence[str], value: str, place: tuple[str | int, ...]) -> Misfit | None:
    """Return what is wrong with a text that is none of the choices."""
    if value in choices:
        return None
    close = difflib.get_close_matches(value, choices, 1)
    names = ", ".join(map(repr, choices))
    return Misfit(place, f"is {value!r}, not one of {names}", f"write {close[0]!r}" if close else "choose one of them")


def _is(kind: str, value: object) -> bool:
    """Whether a value is of a plain type; true and false are no numbers, and a whole number is one."""
    if kind == "float":
        return type(value) in (int, float) and math.isfinite(value) and value >= 0
    return KINDS.get(type(value)) == kind and (kind != "int" or value >= 0)


def _kind_of(default: object) -> ast.expr:
    return ast.parse(KINDS.get(type(default), "object"), mode="eval").body


def _kind_of_elements(default: object) -> ast.expr | None:
    """The type of a list's elements; whole numbers in a dictionary's list, such as doses, may have fractions."""
    kinds = {type(each) for each in default} if isinstance(default, list) else set()
    if kinds and kinds <= {int, float}:
        return _kind_of(0.0)
    return _kind_of("") if kinds == {str} else None


def _out_of_range(value: float, place: tuple[str | int, ...], comment: str) -> Misfit | None:
    """Return what is wrong with a number beyond the range that its comment says."""
    if (least := AT_LEAST.search(comment)) and value < float(least[1]):
        return Misfit(place, f"is {value!r}, less than {least[1]}", f"write a number of at least {least[1]}")
    if (ends := BETWEEN.search(comment)) and not float(ends[1]) <= value <= float(ends[2]):
        wanted = f"{ends[1]} to {ends[2]}"
        return Misfit(place, f"is {value!r}, outside {wanted}", f"write a number from {wanted}")
    return None


def _shown(value: object) -> str:
    """Return a value as an error shows it, with what it is."""
    written = repr(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{str(value).lower()}, a truth value"
    text = written if len(written) <= LONGEST else written[:LONGEST] + "…"
    names = {str: "a text", list: "a list", dict: "a dictionary", int: "a whole number", float: "a number"}
    return f"{text}, {names.get(type(value), 'of type ' + type(value).__name__)}"


def _remedy(kind: str, value: object) -> str:
    """Return what to write in place of a value of another type."""
    if value is None:
        return 'give a value, or leave the line out for the default; for a text, "" says that there is none'
    if kind in ("int", "float") and isinstance(value, str):
        return "write the number without quotes (YAML reads 1e-4 as a text: write 1.0e-4)"
    if kind in ("int", "float") and isinstance(value, bool):
        return "write a number (YAML reads yes, no, on and off as true and false)"
    if kind == "int" and isinstance(value, float) and value.is_integer() and value >= 0:
        return f"write {int(value)}"
    if isinstance(value, (list, dict)) and kind not in ("list", "dict"):
        return "write one value, without brackets and entries"
    examples = {"list": "such as [1, 2]", "dict": "such as {name: value}", "bool": "such as true", "str": 'such as "a"'}
    return f"write {WORDS[kind]}" + (f", {examples[kind]}" if kind in examples else "")


def check(
    page: str,
    known: Mapping[str, Parameter],
    values: Mapping[str, object],
    origin: Callable[[Sequence[str | int]], str] | str = "the call",
) -> None:
    """Refuse a parameter that a notebook does not have, and a value that is not of its parameter's type.

    page: the notebook's name.
    known: its parameters.
    values: to check; of a dictionary, only the entries that differ need to be given.
    origin: where the values were written, or a function of the names that lead to one.

    Raises:
        ValueError: with the origin, the place, the value, the type and the remedy.
    """

    def at(place: Sequence[str | int]) -> str:
        return origin(place) if callable(origin) else origin

    for name, value in values.items():
        if name not in known:
            raise ValueError(
                f"{at([name])} gives {page} the unknown parameter {name!r}; it has {', '.join(known)}: "
                f"{nearest(name, known)}"
            )
        if wrong := misfit(known[name], value, name):
            path = ".".join(map(str, wrong.place))
            raise ValueError(f"{at(wrong.place)}: {page}, {path} {wrong.wrong}: {wrong.remedy}")


def check_page(known: Mapping[str, Parameter], values: Mapping[str, object]) -> None:
    """Refuse values that a running notebook was given, by papermill or by hand, and that are not of their types.

    known: as the notebook's parameters cell declares them.
    values: all plain values of the notebook.

    Raises:
        ValueError: as `check`, or a dictionary lacks entries.
    """
    given = {name: values[name] for name in known if name in values}
    check("this notebook", known, given, "parameters cell or papermill -p")
    for name, value in given.items():
        default = known[name].default
        if isinstance(default, dict) and (missing := [entry for entry in default if entry not in value]):
            raise ValueError(
                f"this notebook, {name} lacks {', '.join(missing)}: papermill replaces a whole dictionary; give every "
                "entry, or use `make book PRESET=...`, which keeps the others"
            )
