"""Keep people's answers to whether explanations are right (Table 2), as JSON lines, and compare the raters."""

from __future__ import annotations

import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from lmm_sae_nb.chat.replies import readable

VERDICTS = ("yes", "no", "unsure")
UNDONE = "undone"  # takes back what the same person said of the same latent and concept
FIELDS = ("rater", "latent", "concept", "kind", "verdict", "time")
PATIENCE = 10.0  # seconds to wait for others who answer at the same time


def append_rating(path: str | Path, rater: str, latent: int, concept: str, kind: str | None, verdict: str) -> dict:
    """Add one answer to the file and return it as a row of `FIELDS`; it is on the disk when this returns.

    Several people can answer into one file at the same time: each waits for the others, at most `PATIENCE` seconds.
    A last line that a crash cut short is removed first; one that lacks only its end is kept.

    rater: who answers; what is no text in it is replaced, as in a reply.
    concept, kind: of the explanation that is judged.
    verdict: one of `VERDICTS`, or `UNDONE`.

    Raises:
        ValueError: the rater's name is empty, or there is no such verdict.
        OSError: the answer could not be written.
    """
    if not rater.strip():
        raise ValueError("an answer needs the name of who gave it; type one")
    if verdict not in (*VERDICTS, UNDONE):
        raise ValueError(f"{verdict!r} is no verdict; choose one of {', '.join((*VERDICTS, UNDONE))}")
    rater, concept, kind = (text and readable(text) for text in (rater.strip(), concept, kind))
    row = dict(zip(FIELDS, (rater, int(latent), concept, kind, verdict, _now()), strict=True))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # without the lock, a line that another rater is just writing would be taken for one that a crash cut short
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=PATIENCE):
            _append(path, (json.dumps(row, ensure_ascii=False) + "\n").encode())
    except Timeout as error:
        raise OSError(
            f"your rating was not saved: another rater has locked {path} for more than {PATIENCE:g} s; click again"
        ) from error
    return row


def _append(path: Path, line: bytes) -> None:
    with path.open("ab+", buffering=0) as file:
        file.seek(0)
        held = file.read()
        last = held[held.rfind(b"\n") + 1 :]
        if last and _is_row(last):
            line = b"\n" + line
        elif last:
            file.truncate(len(held) - len(last))
        written = file.write(line)
        if written != len(line):
            raise OSError(f"{path}: {written} of {len(line)} bytes could be written; make room and answer again")
        os.fsync(file.fileno())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_ratings(path: str | Path) -> list[dict]:
    """Return the answers that hold, in the order they were given: of each rater, latent and concept the last one.

    An answer that was taken back is left out, and so is a last line that was cut short. A missing file has none. Any
    other line that is no answer is left out, too, and a warning names it.
    """
    path, answers, wrong = Path(path), {}, []
    *lines, last = (path.read_bytes() if path.is_file() else b"").split(b"\n")
    lines += [last] if _is_row(last) else []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is None:
            wrong += [number] if line.strip() else []
            continue
        key = row["rater"], row["latent"], row["concept"]
        answers.pop(key, None)
        if row["verdict"] != UNDONE:
            answers[key] = row
    if wrong:
        some = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        warnings.warn(
            f"{path}: {len(wrong)} lines are no answers and do not count: {some}; an answer has {', '.join(FIELDS)}. "
            "Correct or remove them",
            stacklevel=2,
        )
    return list(answers.values())


def _is_row(line: bytes) -> bool:
    return _row(line) is not None


def _row(line: bytes) -> dict | None:
    """Return the answer that a line holds; None if it holds none."""
    try:
        row = json.loads(line)
        rater, latent, concept, kind, verdict, when = (row[name] for name in FIELDS)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    typed = all(isinstance(text, str) for text in (rater, concept, verdict, when)) and isinstance(kind, str | None)
    if not typed or type(latent) is not int or verdict not in (*VERDICTS, UNDONE):
        return None
    return row | {"rater": readable(rater), "concept": readable(concept), "kind": kind and readable(kind)}


def verdicts_by_rater(answers: Iterable[Mapping], concepts: Mapping[int, str]) -> dict[str, dict[int, str]]:
    """Return each rater's verdicts by latent; answers on earlier explanations are left out.

    answers: rows of `read_ratings`.
    concepts: the concept that each latent has now.
    """
    verdicts: dict[str, dict[int, str]] = defaultdict(dict)
    for row in answers:
        if concepts.get(latent := int(row["latent"])) == row["concept"]:
            verdicts[row["rater"]][latent] = row["verdict"]
    return dict(verdicts)


class RaterPair(NamedTuple):
    """Two raters, compared on the latents that both have rated.

    latents: how many both have rated.
    agreement: the fraction of them with the same verdict.
    kappa: Cohen's; None if chance alone would make them agree.
    """

    raters: tuple[str, str]
    latents: int
    agreement: float
    kappa: float | None


def cohens_kappa(one: Sequence[str], other: Sequence[str]) -> float | None:
    """Return (p - c) / (1 - c): p is the fraction of equal verdicts, c the fraction that chance would make equal.

    None if c is 1: both gave one and the same verdict throughout.

    Raises:
        ValueError: there are no verdicts, or the raters gave unequally many.
    """
    if len(one) != len(other) or not len(one):
        raise ValueError(f"{len(one)} and {len(other)} verdicts; give both raters' on the same items, at least one")
    chance = sum(one.count(word) * other.count(word) for word in {*one, *other}) / len(one) ** 2
    same = sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
    return None if chance == 1 else (same - chance) / (1 - chance)


def compare_raters(verdicts: Mapping[str, Mapping[int, str]]) -> list[RaterPair]:
    """Compare each two raters that have rated a latent in common.

    verdicts: rater to latent to verdict, as `verdicts_by_rater` gives them.
    """
    pairs = []
    for raters in combinations(sorted(verdicts), 2):
        both = sorted(verdicts[raters[0]].keys() & verdicts[raters[1]].keys())
        if both:
            one, other = ([verdicts[rater][latent] for latent in both] for rater in raters)
            same = sum(a == b for a, b in zip(one, other, strict=True)) / len(both)
            pairs.append(RaterPair(raters, len(both), same, cohens_kappa(one, other)))
    return pairs
