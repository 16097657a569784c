"""The panel of many SAEs and methods, which `python -m lmm_sae_nb.benchmarks panel` writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lmm_sae_nb.support.stages import read_typed

Number = int | float


@dataclass(frozen=True)
class MeasuredPart:
    """What a part measured for one SAE.

    metrics: name to number; intervals as `name_low` and `name_high`.
    seconds: CPU time.
    why: a sentence for each thing that could not be measured.
    """

    metrics: dict[str, Number]
    seconds: float
    why: list[str] = field(default_factory=list)


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
        measured = self.saes[sae].parts.get(part)
        return None if measured is None else measured.metrics.get(metric)

    def column(self, part: str, metric: str) -> dict[str, Number]:
        """Return a metric of every SAE that has it, by the SAE's name."""
        found = {name: self.find(name, part, metric) for name in self.saes}
        return {name: value for name, value in found.items() if value is not None}

    def group(self, group: str) -> list[str]:
        """Return the names of a group's SAEs."""
        return [name for name, sae in self.saes.items() if sae.group == group]


def read_panel(path: str | Path) -> Panel | None:
    """Read a panel; None if the path is empty, which says that there is none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind.
    """
    return read_typed(path, Panel) if str(path) not in ("", ".") else None
