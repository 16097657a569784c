"""How an attempt of the fault campaign can end, and what counts as a clear error."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
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
    "not possible": "the machine does not allow the attempt",
}
FAILED = {
    "raw error": "an error that names neither file nor value, or of another library",
    "another result": "a wrong result without an error",
    "leftovers": "files are left that an undisturbed run does not leave",
    "asked twice": "a question was asked again although its answer was on record",
    "lost": "something that was saved is gone",
    "code ran": "code from a file was run",
    "injected": "text became markup",
    "hang": "no end",
    "died": "the process died",
    "campaign broken": "the campaign itself has an error",
}
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
