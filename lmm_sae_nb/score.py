"""Section 3.2: how well an explanation fits what excites its latent, in the `strict` way.

Strict: the activation mask is the latent's most activated patches, by nearest neighbour, at a stated share of the
image's highest activation; the concept's mask is the union of everything that the segmenter finds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from scipy.stats import bootstrap

from lmm_sae_nb.artifacts import read_json
from lmm_sae_nb.explain import Exemplar, upsample

Mask = Bool[np.ndarray, "height width"]
Segmenter = Callable[[int, str], Mask]  # index of the image in the data set, concept -> where it is


class Mean(NamedTuple):
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Shown(NamedTuple):
    """The ground-truth concept that a latent's patches show best, and how well (mean IoU)."""

    kind: str
    concept: str
    iou: float


def mean_interval(values: Sequence[float], level: float = 0.99, seed: int = 0) -> Mean:
    """Mean and percentile-bootstrap interval (9,999 resamples). ValueError for fewer than two values."""
    values = np.asarray(values, float)
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, there are {len(values)}; score more latents")
    if np.ptp(values) == 0:
        return Mean(*([float(values[0])] * 3))
    rng = np.random.default_rng(seed)
    interval = bootstrap((values,), np.mean, confidence_level=level, method="percentile", rng=rng).confidence_interval
    return Mean(float(values.mean()), float(interval.low), float(interval.high))


def iou(a: Mask, b: Mask) -> float:
    """|a and b| / |a or b|, in [0, 1]; 0 if both are empty, as the reference code counts it.

    ValueError for masks of different sizes.
    """
    if a.shape != b.shape:
        raise ValueError(f"masks of {a.shape} and {b.shape} pixels cannot be compared; bring both to the image's size")
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


class TrueMasks:
    """Ground truth as a segmenter: the label maps of a data set, one column for each kind of concept.

    `rows` has an image a row and, for each kind in the concepts file, a label map (mode L, 0 = none, i = the
    i-th concept of that kind).
    """

    def __init__(self, rows: Sequence[Mapping], concepts: str | Path | Mapping[str, Sequence[str]]):
        if not isinstance(concepts, Mapping):
            if not Path(concepts).is_file():
                raise FileNotFoundError(f"{concepts} is missing; render the data sets first: `make world`")
            concepts = read_json(concepts)
        self.concepts = {kind: list(names) for kind, names in concepts.items()}
        self._rows = rows
        missing = set(self.concepts) - set(rows[0])
        if missing:
            raise ValueError(f"the data set has no label maps {sorted(missing)}; give one with ground truth")
        self.labels = lru_cache(maxsize=512)(self._labels)

    def _labels(self, index: int) -> dict[str, np.ndarray]:
        row = self._rows[index]
        return {kind: np.asarray(row[kind]) for kind in self.concepts}

    def kinds_of(self, concept: str) -> list[str]:
        """The kinds that know a concept of this name; several if a word is also a face."""
        return [kind for kind, names in self.concepts.items() if concept in names]

    def __call__(self, index: int, concept: str) -> Mask:
        """Where the image shows the concept; ValueError for a concept outside the world's vocabulary."""
        kinds = self.kinds_of(concept)
        if not kinds:
            raise ValueError(f"there is no ground truth for {concept!r}; it is no concept of this data set")
        labels = self.labels(index)
        return np.logical_or.reduce([labels[k] == 1 + self.concepts[k].index(concept) for k in kinds])

    def best(self, exemplars: Sequence[Exemplar]) -> Shown:
        """The concept with the highest mean strict IoU over the exemplars; its kind is the first in file order."""
        totals = {kind: np.zeros(1 + len(names)) for kind, names in self.concepts.items()}
        for exemplar in exemplars:
            labels = self.labels(exemplar.image_index)
            active = upsample(exemplar.visible, exemplar.image.size)
            for kind, total in totals.items():
                both = np.bincount(labels[kind][active], minlength=len(total))
                area = np.bincount(labels[kind].ravel(), minlength=len(total))
                total += both / np.maximum(area + active.sum() - both, 1)
        ranked = [
            Shown(kind, names[best], float(totals[kind][1 + best]) / len(exemplars))
            for kind, names in self.concepts.items()
            for best in [int(totals[kind][1:].argmax())]
        ]
        return max(ranked, key=lambda shown: shown.iou)


def latent_iou(exemplars: Sequence[Exemplar], concept: str, segment: Segmenter) -> float:
    """Mean strict IoU of a latent's activation masks with the concept's masks, over its exemplars.

    ValueError if there are none.
    """
    if not exemplars:
        raise ValueError(f"no exemplars to score {concept!r} with; leave out latents that never fire")
    return float(np.mean([iou(upsample(e.visible, e.image.size), segment(e.image_index, concept)) for e in exemplars]))
