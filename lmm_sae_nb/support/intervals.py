"""Means and shares with their intervals: what stands wherever a table or a figure shows one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest, bootstrap, t


class Mean(NamedTuple):
    """A mean with its interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(values: Sequence[float], level: float = 0.99, seed: int = 0) -> Mean:
    """Mean and percentile-bootstrap interval (9,999 resamples). ValueError for fewer than two values."""
    values = np.asarray(values, float)
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, there are {len(values)}; score more latents")
    if np.ptp(values) == 0:
        return Mean(*([float(values[0])] * 3))
    rng, at_once = np.random.default_rng(seed), max(1, 10_000_000 // len(values))
    found = bootstrap((values,), np.mean, confidence_level=level, method="percentile", batch=at_once, rng=rng)
    return Mean(float(values.mean()), float(found.confidence_interval.low), float(found.confidence_interval.high))


class Proportion(NamedTuple):
    """A fraction with its Wilson interval, and of how many cases."""

    fraction: float
    low: float
    high: float
    asked: int

    def __str__(self) -> str:
        return f"{self.fraction:.3f} [{self.low:.3f}, {self.high:.3f}] of {self.asked}"


def proportion(hits: Sequence[bool], level: float = 0.99) -> Proportion:
    """Return the fraction of hits with Wilson's interval: none of n is not none at all. ValueError for no cases."""
    hits = np.asarray(hits, bool)
    if not len(hits):
        raise ValueError("a fraction of no cases at all; give more cases, or leave this fraction out")
    low, high = binomtest(int(hits.sum()), len(hits)).proportion_ci(level, method="wilson")
    return Proportion(float(hits.mean()), float(low), float(high), len(hits))


def bounds(name: str, found: Mean | Proportion) -> dict[str, float]:
    """A mean or share as a stage's metrics: under its name, and its ends under name_low and name_high."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), found[:3], strict=True))


def difference_interval(one: Sequence[float], other: Sequence[float], level: float = 0.99, seed: int = 0) -> Mean:
    """Mean of `other` less that of `one`, of things that are not the same, with a percentile-bootstrap interval.

    ValueError for fewer than two values of either.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError(f"an interval needs at least two values, there are {len(one)} and {len(other)}")
    rng, draws = np.random.default_rng(seed), []
    for values in (np.asarray(one, float), np.asarray(other, float)):
        draws.append(np.array([rng.choice(values, len(values)).mean() for _ in range(9_999)]))
    low, high = np.quantile(draws[1] - draws[0], [(1 - level) / 2, (1 + level) / 2])
    return Mean(float(np.mean(other) - np.mean(one)), float(low), float(high))


def run_interval(runs: Float[np.ndarray, "latents runs"], level: float = 0.99) -> Mean:
    """The mean over runs of what each found for all latents, with Student's t interval: the paper's way.

    It tells how much the draws of images matter, not which latents were chosen. ValueError for fewer than two runs.
    """
    means = np.asarray(runs, float).mean(0)
    if len(means) < 2:
        raise ValueError(f"an interval over runs needs at least two, there are {len(means)}; ask for more runs")
    half = float(t.ppf((1 + level) / 2, len(means) - 1) * means.std(ddof=1) / len(means) ** 0.5)
    return Mean(float(means.mean()), float(means.mean()) - half, float(means.mean()) + half)


def read_mean(metrics: Mapping[str, float], name: str) -> Mean | float:
    """Return a metric with its interval, or alone if it has none: what `bounds` wrote.

    Raises:
        ValueError: there is no such metric.
    """
    if name not in metrics:
        raise ValueError(f"there is no metric {name!r}; there is {', '.join(metrics)}")
    if f"{name}_low" not in metrics:
        return metrics[name]
    return Mean(*(metrics[name + end] for end in ("", "_low", "_high")))
