"""People's answers to whether explanations are right (Table 2), kept as JSON lines: one written through at a time."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

VERDICTS = ("yes", "no", "unsure")
UNDONE = "undone"  # takes back what the same person said of the same latent and concept
FIELDS = ("rater", "latent", "concept", "kind", "verdict", "time")
PATIENCE = 10.0  # seconds to wait for others who answer at the same time


def append_rating(path: str | Path, rater: str, latent: int, concept: str, kind: str | None, verdict: str) -> dict:
    """Add one answer to the file, on the disk when this returns; the row {rater, latent, concept, kind, verdict, time}.

    A line that a crash cut short is removed first; the whole lines are only ever added to. Several people can answer
    into one file at once: each waits for the others, for `PATIENCE` seconds at most. ValueError for an empty name or a
    verdict that is none of `VERDICTS` or `UNDONE`; OSError if the answer could not be written.
    """
    if not rater.strip():
        raise ValueError("an answer needs the name of who gave it; type one")
    if verdict not in (*VERDICTS, UNDONE):
        raise ValueError(f"{verdict!r} is no verdict; choose one of {', '.join((*VERDICTS, UNDONE))}")
    row = dict(zip(FIELDS, (rater.strip(), int(latent), concept, kind, verdict, _now()), strict=True))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    try:
        with FileLock(lock, timeout=PATIENCE):  # else one takes for a crash's what another is just writing
            _append(path, (json.dumps(row, ensure_ascii=False) + "\n").encode())
    except Timeout as error:
        raise OSError(f"{lock} has been held for {PATIENCE:g} s by somebody who answers; answer again") from error
    return row


def _append(path: Path, line: bytes) -> None:
    with path.open("ab+", buffering=0) as file:
        file.seek(0)
        held = file.read()
        if held and not held.endswith(b"\n"):
            file.truncate(held.rfind(b"\n") + 1)
        written = file.write(line)
        if written != len(line):
            raise OSError(f"{path}: {written} of {len(line)} bytes could be written; make room and answer again")
        os.fsync(file.fileno())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_ratings(path: str | Path) -> list[dict]:
    """The answers that stand, in the order they were given: of each (rater, latent, concept) the last, unless undone.

    A missing file holds none, and a last line that was cut short does not count. ValueError, with the line's number,
    for a line that is no answer.
    """
    path, standing = Path(path), {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for number, line in enumerate(text.split("\n")[:-1], 1):
        row = _row(line, f"{path}, line {number}")
        key = row["rater"], row["latent"], row["concept"]
        standing.pop(key, None)
        if row["verdict"] != UNDONE:
            standing[key] = row
    return list(standing.values())


def _row(line: str, place: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}); correct or remove the line") from error
    if not isinstance(row, Mapping) or set(FIELDS) - set(row) or row["verdict"] not in (*VERDICTS, UNDONE):
        raise ValueError(f"{place} is no answer ({line[:80]!r}); an answer has {', '.join(FIELDS)}")
    return dict(row)


class Agreement(NamedTuple):
    """Two raters on what both have rated; kappa is None where chance alone would make them agree."""

    raters: tuple[str, str]
    items: int
    agreement: float
    kappa: float | None


def kappa(one: Sequence[str], two: Sequence[str]) -> float | None:
    """Cohen's kappa (p - c) / (1 - c): p the share of equal verdicts, c the share that chance would make equal.

    None if c is 1: both gave one and the same verdict throughout. ValueError for none, or unequally many.
    """
    if len(one) != len(two) or not len(one):
        raise ValueError(f"{len(one)} and {len(two)} verdicts; give both raters' on the same items, at least one")
    words = {*one, *two}
    chance = sum(one.count(word) * two.count(word) for word in words) / len(one) ** 2
    same = sum(a == b for a, b in zip(one, two, strict=True)) / len(one)
    return None if chance == 1 else (same - chance) / (1 - chance)


def standing(answers: Iterable[Mapping], concepts: Mapping[int, str]) -> dict[str, dict[str, str]]:
    """Each rater's verdicts by latent, out of rows {rater, latent, concept, verdict}: those on today's explanations."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for row in answers:
        if concepts.get(int(row["latent"])) == row["concept"]:
            found[row["rater"]][str(row["latent"])] = row["verdict"]
    return dict(found)


def agreements(ratings: Mapping[str, Mapping[str, str]]) -> list[Agreement]:
    """For each two raters that have items in common: how often they agree. ratings: rater to item to verdict."""
    found = []
    for pair in combinations(sorted(ratings), 2):
        both = sorted(ratings[pair[0]].keys() & ratings[pair[1]].keys())
        if both:
            one, two = ([ratings[rater][item] for item in both] for rater in pair)
            same = sum(a == b for a, b in zip(one, two, strict=True)) / len(both)
            found.append(Agreement(pair, len(both), same, kappa(one, two)))
    return found
