"""The panel of many SAEs and methods, which `python -m lmm_sae_nb.benchmarks panel` writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lmm_sae_nb.show.seed_study import is_studied
from lmm_sae_nb.support.files import write_atomic
from lmm_sae_nb.support.intervals import Mean
from lmm_sae_nb.support.stages import Metrics, Page, read_typed

Number = int | float


@dataclass(frozen=True)
class MeasuredPart:
    """What a part measured for one SAE.

    metrics: name to number, or to number, low and high end of its 99% interval.
    seconds: CPU time.
    why: a sentence for each thing that could not be measured.
    """

    metrics: dict[str, Number | tuple[Number, Number, Number]]
    seconds: float
    why: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, metrics: Metrics, seconds: float, why: list[str]) -> MeasuredPart:
        """Put numbers and their ends, `name_low` and `name_high`, together, and keep five digits."""
        metrics = {name: float(f"{x:.5g}") if isinstance(x, float) else x for name, x in metrics.items()}
        ends = {name: (f"{name}_low", f"{name}_high") for name in metrics}
        with_ends = {name for name, pair in ends.items() if metrics.keys() >= set(pair)}
        left_out = {end for name in with_ends for end in ends[name]}
        return cls(
            {
                name: (x, *(metrics[end] for end in ends[name])) if name in with_ends else x
                for name, x in metrics.items()
                if name not in left_out
            },
            seconds,
            why,
        )


@dataclass(frozen=True)
class PanelSAE:
    """An SAE of the panel, or the model itself, whose parts need no SAE.

    about: what it is.
    group: "seed", "control", "half", "size", "classical" or "model".
    parts: by name.
    """

    about: str
    group: str
    parts: dict[str, MeasuredPart]


@dataclass(frozen=True)
class Panel:
    """The metrics of several SAEs of one model, and of methods that are no SAEs.

    about: what the file is.
    command: makes it.
    made: date, machine and versions.
    recipe: the parameters that were used, and the hashes of models and data.
    missing: "SAE, part" of what is not measured yet.
    saes: by name.
    """

    about: str
    command: str
    made: dict
    recipe: dict
    missing: list[str]
    saes: dict[str, PanelSAE]

    def find(self, sae: str, part: str, metric: str) -> Number | None:
        """Return a metric; None if the SAE does not have it."""
        value = self._value(sae, part, metric)
        return value[0] if isinstance(value, tuple) else value

    def interval(self, sae: str, part: str, metric: str) -> Mean | None:
        """Return a metric with its 99% interval; None if the SAE does not have both."""
        value = self._value(sae, part, metric)
        return Mean(*value) if isinstance(value, tuple) else None

    def _value(self, sae: str, part: str, metric: str) -> Number | tuple[Number, Number, Number] | None:
        measured = self.saes[sae].parts.get(part)
        return None if measured is None else measured.metrics.get(metric)

    def column(self, part: str, metric: str) -> dict[str, Number]:
        """Return a metric of every SAE that has it, by the SAE's name."""
        found = {name: self.find(name, part, metric) for name in self.saes}
        return {name: value for name, value in found.items() if value is not None}

    def values(self, saes: Iterable[str], at: tuple[str, str]) -> list[Number]:
        """Return a metric, given by its part and name, of those of some SAEs that have it."""
        return [value for value in (self.find(name, *at) for name in saes) if value is not None]

    def group(self, group: str) -> list[str]:
        """Return the names of a group's SAEs."""
        return [name for name, sae in self.saes.items() if sae.group == group]


def read_panel(path: str | Path, page: Page | None = None) -> Panel | None:
    """Read a panel; None if the path is empty, which says that there is none, or if it is of another recipe.

    page: if given, the SAE of its run must be of the recipe of the panel's first SAEs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind.
    """
    panel = read_typed(path, Panel) if str(path) not in ("", ".") else None
    return None if panel and page and not is_studied(panel.recipe["pages"]["01"], page) else panel


def write_panel(path: str | Path, panel: Panel) -> None:
    """Write a panel as JSON, each part of an SAE on one line."""
    write_atomic(path, (_lines(asdict(panel), 4) + "\n").encode())


def _lines(value: object, depth: int, indent: str = "") -> str:
    """A value as JSON: a line for each entry down to `depth`, deeper values on one line."""
    if not isinstance(value, Mapping) or not value or depth == 0:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = indent + "  "
    entries = (f"{inner}{json.dumps(name)}: {_lines(each, depth - 1, inner)}" for name, each in value.items())
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}"
