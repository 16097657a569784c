"""Presets: YAML files of parameters for the notebooks, with types checked and every error on its line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lmm_sae_nb.support.names import folder_name
from lmm_sae_nb.support.notebooks import REPOSITORY, parameters, sources
from lmm_sae_nb.support.parameters import Parameter, check, nearest

EXTENDS, PREPARE = "extends", "prepare"  # entries of a preset that are of no notebook
DEEPEST, MOST = 12, 20_000  # levels and values of a preset; those of this book have 3 levels and 200 values
PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp")}
Place = tuple[str | int, ...]


@dataclass
class Written:
    """What stands in a YAML file.

    values: the entries.
    lines: the names and numbers that lead to a value to its line, from 1.
    texts: the same to the value as it is written, for values without quotes.
    files: the same to the file's name, for values of a preset that this one extends.
    """

    path: Path
    values: dict[str, object] = field(default_factory=dict)
    lines: dict[Place, int] = field(default_factory=dict)
    texts: dict[Place, str] = field(default_factory=dict)
    files: dict[Place, str] = field(default_factory=dict)

    def origin(self, place: Sequence[str | int]) -> str:
        """Return the file's name and the line of a place, or of the nearest place that has one."""
        ends = (tuple(place[:end]) for end in range(len(place), 0, -1))
        known = next((end for end in ends if end in self.lines), None)
        return f"{self.files.get(known, self.path.name)}, line {self.lines[known]}" if known else self.path.name


def preset_file(name: str, root: Path = REPOSITORY) -> Path:
    """Return the file of a preset, `notebooks/params/<name>.yaml`.

    Raises:
        ValueError: the name leads elsewhere.
        FileNotFoundError: there is no such preset; the message lists those that there are.
    """
    file = root / "notebooks" / "params" / f"{folder_name(name, 'a preset')}.yaml"
    if not file.is_file():
        known = sorted(each.stem for each in file.parent.glob("*.yaml"))
        raise FileNotFoundError(
            f"there is no preset {name!r}, no file notebooks/params/{name}.yaml; "
            f"there is {', '.join(known)}: {nearest(name, known)}"
        )
    return file


def preset(path: Path, root: Path = REPOSITORY) -> dict[str, dict[str, object]]:
    """Return each notebook's parameters out of one params file.

    The preset that `extends` names gives what this file does not, entry by entry, as if both were one file. The section
    `prepare` is for `python -m lmm_sae_nb.prepare`.

    A `name: value` goes to every notebook that has that parameter; a section named after a notebook goes to that
    notebook alone and wins. Of a parameter that is a dictionary, only the entries that differ need to be given. In a
    text's place, a number or a word such as `no` is the text as it is written.

    Raises:
        ValueError: the file is no YAML, a name is unknown, or a value is not of its parameter's type. The message
            names file, line, notebook, parameter, value, type and remedy.
    """
    written = read_extended(path, root)
    written.values.pop(PREPARE, None)
    known = {source.stem: parameters(source) for source in sources(root)}
    for name, value in written.values.items():
        if name not in known and not any(name in names for names in known.values()):
            raise ValueError(_unknown(written, name, value, known))
    return {page: _values_of(page, names, written, known) for page, names in known.items()}


def _unknown(written: Written, name: str, value: object, known: Mapping[str, Mapping[str, Parameter]]) -> str:
    """Return the error for a name at the top that is neither a notebook nor a parameter of one."""
    everything = [*known, *dict.fromkeys(each for names in known.values() for each in names)]
    if isinstance(value, dict):
        return (
            f"{written.origin([name])}: there is no notebook {name!r} for this section; "
            f"there is {', '.join(known)}: {nearest(name, everything)}"
        )
    return f"{written.origin([name])}: no notebook has a parameter {name!r}; {nearest(name, everything)}"


def _values_of(
    page: str, names: Mapping[str, Parameter], written: Written, pages: Mapping[str, object]
) -> dict[str, object]:
    """Return what a preset gives one notebook, checked and merged."""
    section = written.values.get(page)
    if section is not None and not isinstance(section, dict):
        raise ValueError(
            f"{written.origin([page])}: the section {page} holds {section!r}, no entries; "
            "write one  name: value  on each line below it, with two spaces before it"
        )
    section = section or {}
    shared = {name: value for name, value in written.values.items() if name in names and name not in pages}
    shared = {name: value for name, value in shared.items() if name not in section or _both(value, section[name])}
    values: dict[str, object] = {}
    for given, before in ((shared, ()), (section, (page,))):
        given = {
            name: _as_text(names[name].default, value, (*before, name), written) if name in names else value
            for name, value in given.items()
        }
        check(page, names, given, lambda place, before=before: written.origin((*before, *place)))
        values |= {name: _merged(values.get(name), value) for name, value in given.items()}
    if "run" in values:
        try:
            folder_name(values["run"], "a run")
        except ValueError as error:
            raise ValueError(f"{written.origin(['run'])}: {error}") from None
    return {name: _merged(names[name].default, value) for name, value in values.items()}


def _both(one: object, other: object) -> bool:
    return isinstance(one, dict) and isinstance(other, dict)


def _merged(one: object, other: object) -> object:
    """A dictionary's entries, with those of the other in place of the same ones; anything else is the other."""
    if not _both(one, other):
        return other
    return one | {name: _merged(one.get(name), each) for name, each in other.items()}


def _as_text(default: object, value: object, place: Place, written: Written) -> object:
    """Return a value with its unquoted numbers and words as they are written, where the default is a text."""
    if isinstance(default, str) and value is not None and place in written.texts:
        return written.texts[place]
    if isinstance(default, list) and default and isinstance(value, list):
        return [_as_text(default[0], each, (*place, n), written) for n, each in enumerate(value)]
    if _both(default, value):
        return {name: _as_text(default.get(name), each, (*place, name), written) for name, each in value.items()}
    return value


def read_extended(path: str | Path, root: Path = REPOSITORY, below: Sequence[Path] = ()) -> Written:
    """Read a preset, and the preset that it extends: entries of this one win, and dictionaries are merged.

    below: files that extend this one.

    Raises:
        FileNotFoundError, ValueError: as `read_yaml` and `preset_file`; or presets extend each other in a circle.
    """
    written = read_yaml(path)
    if EXTENDS not in written.values:
        return written
    name = written.values.pop(EXTENDS)
    try:
        file = preset_file(str(name), root)
        if file in (written.path, *below):
            raise ValueError(f"{file.stem} is extended by itself; name another preset")
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{written.origin([EXTENDS])}: {error}") from None
    base = read_extended(file, root, (*below, written.path))
    files = {place: base.files.get(place, base.path.name) for place in base.lines if place not in written.lines}
    replaced = tuple(place for place in written.lines if place and not isinstance(_at(written.values, place), dict))
    texts = {place: text for place, text in base.texts.items() if not any(place[: len(p)] == p for p in replaced)}
    return Written(
        written.path, _merged(base.values, written.values), base.lines | written.lines, texts | written.texts, files
    )


def _at(values: object, place: Place) -> object:
    for name in place:
        values = values[name] if isinstance(values, list | dict) and name != EXTENDS else None
    return values


# YAML.


def read_yaml(path: str | Path) -> Written:
    """Read a YAML file whose top is entries `name: value`, each with its line.

    Values are text, numbers, true and false, null, lists and dictionaries with names; no file can run code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8 or no YAML, has a name twice, or is too deep or large.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no preset {path}; give its file's path from the root, such as notebooks/params/paper.yaml"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path.name}, line {line}: this is not UTF-8 ({error.reason}); save it as UTF-8") from None
    written = Written(path)
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        top = loader.get_single_node()
        if isinstance(top, yaml.MappingNode):
            written.values = _plain(loader, top, (), written)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_yaml_error(path, text, error)) from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ValueError(f"{path.name} is no YAML: {error}; remove that character") from None
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply; a preset has sections and dictionaries") from None
    if not isinstance(top, yaml.MappingNode) or not written.values:
        found = "empty" if top is None or not top.value else "a list" if isinstance(top.value, list) else "one value"
        raise ValueError(f"{path.name} is {found}; write entries  name: value, the first one  run: {path.stem}")
    return written


def _yaml_error(path: Path, text: str, error) -> str:
    """Return what is wrong with a file that is no YAML, on which line, and what to do."""
    problem = " ".join(part for part in (error.context, error.problem) if part)
    quoted = "quoted scalar" in problem  # the end of the file is where the parser noticed, not where the mark stands
    mark = error.context_mark if quoted and error.context_mark else error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.splitlines()
    if line <= len(lines) and "\t" in lines[line - 1]:
        remedy = "indent with spaces, not with tabs"
    elif quoted:
        remedy = "close the quotation mark"
    else:
        remedy = "write  name: value, with a space behind the colon; put texts with : # [ { into quotes"
    return f"{path.name}, line {line} is no YAML ({problem}): {remedy}"


def _plain(loader, node, place: Place, written: Written) -> object:
    """Return a node of a YAML file as a plain value, and note its line and its text."""
    import yaml

    line = node.start_mark.line + 1
    written.lines.setdefault(place, line)
    where = f"{written.path.name}, line {line}"
    if len(place) > DEEPEST or len(written.lines) > MOST:
        raise ValueError(
            f"{where}: more than {DEEPEST} levels or {MOST:,} values; a preset has few: write anchors (&, *) out"
        )
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, each, (*place, n), written) for n, each in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _entries(loader, node, place, written)
    if node.tag not in PLAIN:
        raise ValueError(f"{where}: {node.tag} is not read; write a text, a number, true, false or null")
    try:
        value = loader.construct_object(node)
    except (ValueError, OverflowError) as error:  # such as the day 2024-02-31
        raise ValueError(f"{where}: {node.value!r} cannot be read ({error}); put it into quotes") from None
    if node.style is None:
        written.texts[place] = node.value
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and not re.fullmatch(r"[-+]?(0|[1-9][\d_]*)", node.value)
        ):
            return node.value  # YAML reads 010 as 8, 12:30 as 750
    return value if value is None or isinstance(value, (bool, int, float, str)) else node.value


def _entries(loader, node, place: Place, written: Written) -> dict[str, object]:
    """Return a mapping of a YAML file as a dictionary."""
    found: dict[str, object] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        where = f"{written.path.name}, line {line}"
        if not isinstance(key.value, str) or key.tag == "tag:yaml.org,2002:merge":
            raise ValueError(f"{where}: {key.value!r} is no name; write  name: value")
        name = key.value
        if name in found:
            first = written.lines[(*place, name)]
            raise ValueError(f"{where}: {name!r} stands here for the second time, after line {first}; keep one of them")
        written.lines[(*place, name)] = line
        found[name] = _plain(loader, value, (*place, name), written)
    return found
