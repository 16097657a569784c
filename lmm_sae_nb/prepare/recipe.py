"""What a preset prepares: its section `prepare`, and the folders where its pages read the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from lmm_sae_nb.support.names import folder_name
from lmm_sae_nb.support.parameters import nearest
from lmm_sae_nb.support.presets import PREPARE, Written, preset, read_extended

PLACES = {  # where pages read what is prepared: notebook and parameter
    "samples": ("01_train_sae", "dataset"),
    "heldout": ("01_train_sae", "heldout"),
    "images": ("02_cache_activations", "images"),
    "traps": ("08_hallucination_case", "traps"),
}


@dataclass(frozen=True)
class Source:
    """Rows of a data set on the hub, or of a folder.

    source: the data set's name on the hub, a folder that `Dataset.save_to_disk` wrote, or one with parquet files.
    split: such as "train"; "" for a folder without splits.
    columns: our name of a column to the source's. Samples have `conversation` and `images`, or `question`, `answer` and
        `image`. Images have `image`. Traps have `image`, `question` and `answer`, and may have `taught` and `group`.
    config: the data set's configuration, if it has several.
    revision: a commit of the data set, so that everyone gets the same rows; "" is the newest.
    rows: how many to write, without the held-out ones; 0 for all.
    heldout: how many more to write as held-out samples; only samples have them.
    shuffle: draw the rows at random; otherwise the first ones are written.
    seed: of the draw.
    answers: a text in the source's column of answers to the answer that is written, such as "0" to "No".
    """

    source: str
    split: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    config: str = ""
    revision: str = ""
    rows: int = 0
    heldout: int = 0
    shuffle: bool = True
    seed: int = 0
    answers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Goal:
    """One data set to write.

    name: `samples`, `images`, `traps`, or one of the user's own.
    kind: samples, images or traps.
    sources: their rows are written one source after the other.
    folder: where pages read it.
    heldout: where pages read the held-out samples; None for other goals.
    """

    name: str
    kind: str
    sources: tuple[Source, ...]
    folder: Path
    heldout: Path | None = None


def read_recipe(path: Path, root: Path) -> tuple[list[Goal], str]:
    """Return what a preset prepares, and whether records that do not fit are to "skip" or to "refuse".

    path: of the preset's file.
    root: of the project; folders are below it.

    Raises:
        ValueError: the preset has no section `prepare`, or an entry of it is wrong; the message names file and line.
        FileNotFoundError, ValueError: as `preset`.
    """
    written, values = read_extended(path), preset(path)
    section = written.values.get(PREPARE)
    if not isinstance(section, dict) or not section:
        raise ValueError(
            f"{path.name} has no section {PREPARE}; write one as in notebooks/params/small.yaml, or `extends: small`"
        )
    folders = {name: values[page].get(parameter, "") for name, (page, parameter) in PLACES.items()}
    unreadable = values["01_train_sae"].get("unreadable", "refuse")
    return [_goal(name, entry, written, folders, root) for name, entry in section.items()], unreadable


def _goal(name: str, entry: object, written: Written, folders: Mapping[str, str], root: Path) -> Goal:
    place = (PREPARE, name)
    folder_name(name, "a data set")
    listed = entry if isinstance(entry, list) else [entry]
    to, kinds, sources = "", {name}, []
    for number, each in enumerate(listed):
        at = (*place, number) if isinstance(entry, list) else place
        if not isinstance(each, dict):
            raise ValueError(f"{written.origin(at)}: {name} is {each!r}; write  source, split and columns")
        to, kinds = each.get("to", to), {each.get("kind", name)}
        sources.append(_source({k: v for k, v in each.items() if k not in ("to", "kind")}, at, written))
    (kind,) = kinds
    if kind not in ("samples", "images", "traps"):
        raise ValueError(f"{written.origin(place)}: {name} has no kind; write  kind: samples, images or traps")
    folder = to or folders.get(name, "")
    if not folder:
        raise ValueError(f"{written.origin(place)}: no page says where {name} belongs; write  to: data/artifacts/...")
    if any(each.heldout for each in sources) and (name != "samples" or not folders["heldout"]):
        raise ValueError(f"{written.origin(place)}: heldout belongs to samples, in a preset whose page 01 has heldout")
    heldout = root / folders["heldout"] if any(each.heldout for each in sources) else None
    return Goal(name, kind, tuple(sources), root / folder, heldout)


def _source(entry: dict, at: tuple, written: Written) -> Source:
    known = {each.name: each for each in fields(Source)}
    for name, value in entry.items():
        where = written.origin((*at, name))
        if name not in known:
            raise ValueError(
                f"{where}: a source has no entry {name!r}, but {', '.join(known)}, to and kind; {nearest(name, known)}"
            )
        default = known[name].default
        wanted = dict if default is MISSING and name != "source" else str if name == "source" else type(default)
        if type(value) is not wanted or wanted is int and value < 0:
            raise ValueError(f"{where}: {name} is {value!r}; write a {_words(wanted)}")
        if wanted is dict and not all(isinstance(each, str) for each in value.values()):
            raise ValueError(f"{where}: {name} is {value!r}; write texts, in quotes where they are numbers, yes or no")
    if not entry.get("source"):
        raise ValueError(f"{written.origin(at)}: the source is missing; write  source: owner/name")
    return Source(**entry)


def _words(kind: type) -> str:
    return {str: "text", int: "whole number, 0 or higher", bool: "truth value", dict: "dictionary"}[kind]
