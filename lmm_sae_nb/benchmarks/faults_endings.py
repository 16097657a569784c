"""How attempts of the fault campaign end, what counts as a clear error, and the counts that page A2 shows."""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import lmm_sae_nb

SURVIVED = {
    "as usual": "the result is that of an undisturbed run",
    "clear error": "an error of this package that names the file or the value",
    "made again": "the damaged file was made again, with the usual result",
    "harmless": "the result is the usual one, and the file stayed as it was",
    "another valid file": "the damage made another file that a user could have written: nobody can know",
    "nothing ran": "code in a file was not run",
}
FAILED = {
    "raw error": "an error that names neither file nor value, or of another library",
    "another result": "a wrong result without an error",
    "leftovers": "files are left that an undisturbed run does not leave",
    "asked twice": "a question was asked again although its answer was on record",
    "made twice": "a result that was whole before the fault was made again",
    "lost": "something that was saved is gone",
    "code ran": "code from a file was run",
    "key shown": "the key of an endpoint, or a part of it, is in a text",
    "injected": "text became markup",
    "hang": "no end",
    "died": "the process died",
    "campaign broken": "the campaign itself has an error",
}
IMPOSSIBLE = "not possible"  # the machine does not allow the attempt, so it is not counted
NOT_HERE = "not possible on this machine"
COMMAND = "python -m lmm_sae_nb.benchmarks faults"
PACKAGE = str(Path(lmm_sae_nb.__file__).parent)


class Ending(NamedTuple):
    """How an attempt ended.

    case: what was done.
    ending: one of SURVIVED or FAILED.
    reason: of a failure.
    """

    case: str
    ending: str
    reason: str = ""


def error_ending(case: str, error: BaseException, names: Iterable[str]) -> Ending:
    """Return the ending of an attempt that an error ended.

    It is clear if this package raised it, not a library below, and its message has one of the names.

    names: of the file, or of what else was wrong.
    """
    frames = traceback.extract_tb(error.__traceback__)
    by_package = bool(frames) and frames[-1].filename.startswith(PACKAGE) and "benchmarks" not in frames[-1].filename
    if by_package and any(name in str(error) for name in names):
        return Ending(case, "clear error")
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    own = next((f for f in reversed(frames) if f.filename.startswith(PACKAGE) and "benchmarks" not in f.filename), None)
    below = f", below {Path(own.filename).name}:{own.lineno}" if own and not by_package else ""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return Ending(case, "raw error", f"{text} ({where}{below})")


def compare(case: str, read: Callable[[], object], usual: object, names: Iterable[str]) -> Ending:
    """Read something and compare it with the usual result; errors are judged by `error_ending`."""
    try:
        result = read()
    except Exception as error:
        return error_ending(case, error, names)
    if result == usual:
        return Ending(case, "as usual")
    return Ending(case, "another result", difference(usual, result))


def difference(usual: object, result: object) -> str:
    """Return in a few words where two results differ."""
    if isinstance(usual, dict) and isinstance(result, dict):
        for name in sorted(usual.keys() | result.keys(), key=str):
            if name not in result:
                return f"{name} is missing"
            if name not in usual:
                return f"{name} is there too"
            if usual[name] != result[name]:
                return f"{name}: {difference(usual[name], result[name])}"
    return f"{str(usual)[:80]} was expected, {str(result)[:80]} came"


# ---- counts ----------------------------------------------------------------------------------------------------

KEPT = 12  # failures of a kind that are kept word for word


FOLDERS = re.compile(r"(?<![\w:/])/(?:[^/\n'\":;]+/)+")


def without_folders(text: str) -> str:
    """Return a text in which absolute paths are their last names, so that the published file names no machine."""
    return FOLDERS.sub("", text)


@dataclass(frozen=True)
class Attempted:
    """A line of the record."""

    kind: str
    seed: int
    case: str
    ending: str
    reason: str
    seconds: float
    code: str


def summary(made: Sequence[Attempted], meanings: Mapping[str, str], commit: str, about: Mapping[str, object]) -> dict:
    """Return what book/faults.json keeps: for each kind the counts, the endings, and failures with their reason.

    meanings: what is done, by kind.
    commit: of the code that was tried.
    about: date, machine and versions.
    """
    rows = {}
    for kind, meaning in meanings.items():
        of_kind = [each for each in made if each.kind == kind]
        possible = [each for each in of_kind if each.ending != IMPOSSIBLE]
        failed = [each for each in possible if each.ending not in SURVIVED]
        rows[kind] = {
            "meaning": meaning,
            "commit": commit,
            "tried": len(possible),
            "survived": len(possible) - len(failed),
            "minutes": round(sum(each.seconds for each in of_kind) / 60, 1),
            "endings": dict(sorted(Counter(each.ending for each in possible).items())),
            "failures": [
                {"seed": each.seed, "case": each.case, "ending": each.ending, "reason": without_folders(each.reason)}
                for each in failed[:KEPT]
            ],
        }
        if len(possible) < len(of_kind):
            rows[kind]["not_possible"] = next(each.reason for each in of_kind if each.ending == IMPOSSIBLE)
    return {"command": COMMAND, **about, "kinds": rows}


def kind_rows(campaign: Mapping) -> list[dict[str, str | int]]:
    """Return a row for each kind of fault: what is done, how often, and how it ended.

    campaign: of book/faults.json.
    """
    return [
        {"fault": kind, "what is done": row["meaning"], "tried": row["tried"], "survived": row["survived"]}
        | {"how it ended": ", ".join(f"{ending} {count}" for ending, count in row["endings"].items()) or NOT_HERE}
        for kind, row in campaign["kinds"].items()
    ]


def commits(campaign: Mapping) -> list[str]:
    """Return the commits of the code that was tried; one, unless some kinds were tried again later."""
    return list(dict.fromkeys(row.get("commit", "unknown") for row in campaign["kinds"].values()))


def failure_rows(campaign: Mapping) -> list[dict[str, str]]:
    """Return a row for each failure that the campaign has kept word for word; there are at most `KEPT` of a kind."""
    return [
        {"fault": kind, "case": failure["case"], "ending": failure["ending"], "reason": failure["reason"][:200]}
        for kind, row in campaign["kinds"].items()
        for failure in row["failures"]
    ]


def endings_by_group(campaign: Mapping) -> dict[str, dict[str, float]]:
    """Return for each group of kinds, such as "kill", the fraction of attempts with each good ending, and of others."""
    counts: dict[str, Counter] = {}
    for kind, row in campaign["kinds"].items():
        counts.setdefault(kind.partition(",")[0], Counter()).update(row["endings"])
    shown = [ending for ending in SURVIVED if any(found[ending] for found in counts.values())]
    return {
        group: {ending: found[ending] / found.total() for ending in shown}
        | {"not survived": sum(found[ending] for ending in FAILED) / found.total()}
        for group, found in counts.items() if found.total()
    }  # fmt: skip


def campaign_metrics(campaign: Mapping) -> dict[str, int]:
    """Return how many attempts there were and how many failed, in all and for each group, as metrics."""
    metrics = {}
    for group in ("", *dict.fromkeys(kind.partition(",")[0] for kind in campaign["kinds"])):
        rows = [row for kind, row in campaign["kinds"].items() if group in ("", kind.partition(",")[0])]
        name = "faults" + "".join(f"_{word}" for word in group.lower().split())
        tried, survived = (sum(row[each] for row in rows) for each in ("tried", "survived"))
        metrics |= {f"{name}_tried": tried, f"{name}_failed": tried - survived}
    return metrics
