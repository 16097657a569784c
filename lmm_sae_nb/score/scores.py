"""Hold the scores of latents: which column, each latent's score, and what chance gives in its place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmm_sae_nb.interpret.explainers import KINDS


class Explained(NamedTuple):
    """The concept that a latent was explained by, and the concept's kind ("object", "colour", …)."""

    concept: str
    kind: str


class Column(NamedTuple):
    """One way to score: `str(column)` is its name in metrics, such as "iou_strict_clipseg".

    quantity: "iou" or "clip".
    mode: the name of a `Mode`, "paper" or "strict".
    segmenter: says where the concept is; "" is the first of the segmenters, and CLIP, which needs none.
    """

    quantity: str
    mode: str
    segmenter: str = ""

    def __str__(self) -> str:
        return "_".join(filter(None, self))


@dataclass(frozen=True)
class Comparison:
    """A latent's score on its own images, and what chance gives in its place; None where a chance has no meaning.

    score: the mean over the latent's images.
    random: the mean over random images, one number for each run.
    area: the same images, with the activation moved to a random place.
    shuffled: the same images, with another latent's concept.
    """

    score: float
    random: tuple[float, ...] | None = None
    area: float | None = None
    shuffled: float | None = None

    def row(self, name: str) -> dict[str, float]:
        """Return the numbers by name: `name`, `name_area`, `name_shuffled` and the mean of `name_random`."""
        random = None if self.random is None else float(np.mean(self.random))
        numbers = {"": self.score, "_area": self.area, "_shuffled": self.shuffled, "_random": random}
        return {name + end: float(value) for end, value in numbers.items() if value is not None}


@dataclass(frozen=True)
class ColumnScores:
    """The comparisons of one column, by latent."""

    column: Column
    latents: dict[int, Comparison]


@dataclass(frozen=True)
class Scores:
    """All scores of all latents: a plain value, which `Stage.result` can keep.

    explained: each scored latent's concept and kind.
    by_column: the comparisons of each column, by latent.
    """

    explained: dict[int, Explained]
    by_column: list[ColumnScores]

    @property
    def columns(self) -> list[Column]:
        """The columns in the order in which they were scored."""
        return [each.column for each in self.by_column]

    def __getitem__(self, column: Column) -> dict[int, Comparison]:
        """Return one column's comparisons by latent.

        Raises:
            KeyError: there is no such column; the message names those that there are.
        """
        for each in self.by_column:
            if each.column == column:
                return each.latents
        raise KeyError(f"there is no column {column}; there is {', '.join(map(str, self.columns))}")

    def rows(self) -> dict[int, dict[str, float | str]]:
        """Return one flat row for each latent: concept, kind, and the numbers of every column by name."""
        rows: dict[int, dict[str, float | str]] = {}
        for latent, (concept, kind) in self.explained.items():
            rows[latent] = {"concept": concept, "kind": kind}
            for each in self.by_column:
                rows[latent] |= each.latents[latent].row(str(each.column))
        return rows


def latents_by_kind(explained: Mapping[int, Explained]) -> dict[str, list[int]]:
    """Return the latents of each kind, and all of them under "total". Table 1's kinds come first."""
    groups = defaultdict(list)
    for latent, (_, kind) in explained.items():
        groups[kind].append(latent)
    order = [*KINDS, *sorted(groups.keys() - set(KINDS))]
    return {kind: groups[kind] for kind in order if kind in groups} | {"total": list(explained)}
