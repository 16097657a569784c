"""The study of several SAEs, alike but for the seed, which `python -m lmm_sae_nb.benchmarks seeds` writes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmm_sae_nb.support.files import MANIFEST
from lmm_sae_nb.support.stages import Page, Stage, read_manifest, read_typed

Number = int | float


@dataclass(frozen=True)
class Measured:
    """One metric of every SAE.

    values: in the order of the study's seeds; None where an SAE does not have this metric.
    median, lowest, highest: of the values.
    low, high: ends of the intervals, in the order of the values; None if the metric has no interval.
    """

    values: list[Number | None]
    median: Number
    lowest: Number
    highest: Number
    low: list[Number | None] | None = None
    high: list[Number | None] | None = None

    @property
    def known(self) -> list[Number]:
        """The values of the SAEs that have this metric."""
        return [value for value in self.values if value is not None]

    @classmethod
    def of(
        cls,
        values: Sequence[Number | None],
        low: Sequence[Number | None] | None = None,
        high: Sequence[Number | None] | None = None,
    ) -> Measured:
        """Summarise values, at least one of which is a number."""
        known = [value for value in values if value is not None]
        ends = [None if end is None else list(end) for end in (low, high)]
        return cls(list(values), statistics.median(known), min(known), max(known), *ends)


@dataclass(frozen=True)
class SeedStudy:
    """The metrics of several SAEs that differ only in their seed.

    about: what the file is.
    command: makes it.
    made: date, machine and versions.
    recipe: the pages' parameters, and the hashes of the models.
    seeds: of the SAEs.
    missing: seeds that were asked for and are not finished yet.
    stages: stage to metric to numbers.
    """

    about: str
    command: str
    made: dict
    recipe: dict
    seeds: list[int]
    missing: list[int]
    stages: dict[str, dict[str, Measured]]

    def find(self, stage: str, metric: str) -> Measured | None:
        """Return a metric's numbers; None if no SAE has it."""
        return self.stages.get(stage, {}).get(metric)


def is_studied(recipe: Mapping[str, object], page: Page) -> bool:
    """Return whether the SAE of a page's run was made by a recipe, but for its seed.

    recipe: parameters of notebook 01; others may have any value.
    """
    manifest = Stage(page.run, "train").path(MANIFEST)
    params = read_manifest(manifest)["params"] if manifest.is_file() else {}
    return all(name in params and params[name] == value for name, value in recipe.items() if name != "seed")


def read_study(path: str | Path, page: Page | None = None) -> SeedStudy | None:
    """Read a study; None if the path is empty, which says that there is none, or if it is of another recipe.

    page: if given, the SAE of its run must be of the study's recipe.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind.
    """
    study = read_typed(path, SeedStudy) if str(path) not in ("", ".") else None
    return None if study and page and not is_studied(study.recipe["pages"]["01_train_sae"], page) else study
