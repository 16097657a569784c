"""Means and fractions with their intervals, for every table and figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.stats import binomtest, bootstrap, t


class Mean(NamedTuple):
    """A mean with its interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(values: ArrayLike, level: float = 0.99, seed: int = 0) -> Mean:
    """Return the mean with a percentile-bootstrap interval (9,999 resamples).

    values: at least two.
    level: confidence level of the interval.
    seed: of the resampling.

    Raises:
        ValueError: fewer than two values.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, there are {len(values)}; score more latents")
    if np.ptp(values) == 0:
        return Mean(*([float(values[0])] * 3))
    rng, batch = np.random.default_rng(seed), max(1, 10_000_000 // len(values))
    result = bootstrap((values,), np.mean, confidence_level=level, method="percentile", batch=batch, rng=rng)
    interval = result.confidence_interval
    return Mean(float(values.mean()), float(interval.low), float(interval.high))


class Proportion(NamedTuple):
    """A fraction with its Wilson interval and the number of cases."""

    fraction: float
    low: float
    high: float
    cases: int

    def __str__(self) -> str:
        return f"{self.fraction:.3f} [{self.low:.3f}, {self.high:.3f}] of {self.cases}"


def proportion(hits: ArrayLike, level: float = 0.99) -> Proportion:
    """Return the fraction of hits with Wilson's interval, which has a width even if there are no hits.

    hits: whether each case is a hit.
    level: confidence level of the interval.

    Raises:
        ValueError: there are no cases.
    """
    hits = np.asarray(hits, bool)
    if not len(hits):
        raise ValueError("there are no cases, so there is no fraction; give more cases, or leave it out")
    low, high = binomtest(int(hits.sum()), len(hits)).proportion_ci(level, method="wilson")
    return Proportion(float(hits.mean()), float(low), float(high), len(hits))


def mean_of_fractions(parts: Sequence[Proportion]) -> Mean:
    """Return the mean of fractions of separate groups, each with the same weight, with its interval.

    The distance to each end is the root of the summed squares of the parts' distances, over their number (the MOVER
    method of Zou and Donner). So the mean of one fraction has that fraction's own interval.

    parts: the fraction of each group.

    Raises:
        ValueError: there are no groups.
    """
    if not parts:
        raise ValueError("there are no groups, so there is no mean of their fractions; give at least one")
    mean = float(np.mean([part.fraction for part in parts]))
    below = np.hypot.reduce([part.fraction - part.low for part in parts]) / len(parts)
    above = np.hypot.reduce([part.high - part.fraction for part in parts]) / len(parts)
    return Mean(mean, mean - float(below), mean + float(above))


def bounds(name: str, value: Mean | Proportion) -> dict[str, float]:
    """Return a mean or fraction as metrics: the value by its name, the ends by name_low and name_high."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), value[:3], strict=True))


def difference_interval(one: ArrayLike, other: ArrayLike, level: float = 0.99, seed: int = 0) -> Mean:
    """Return the mean of `other` minus the mean of `one` with a percentile-bootstrap interval.

    The samples are unpaired.

    one, other: at least two values each.
    level: confidence level of the interval.
    seed: of the resampling.

    Raises:
        ValueError: fewer than two values in either.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError(f"an interval needs at least two values, there are {len(one)} and {len(other)}")
    rng, draws = np.random.default_rng(seed), []
    for values in (np.asarray(one, float), np.asarray(other, float)):
        draws.append(np.array([rng.choice(values, len(values)).mean() for _ in range(9_999)]))
    low, high = np.quantile(draws[1] - draws[0], [(1 - level) / 2, (1 + level) / 2])
    return Mean(float(np.mean(other) - np.mean(one)), float(low), float(high))


def ratio_interval(parts: ArrayLike, wholes: ArrayLike, level: float = 0.99, seed: int = 0) -> Mean:
    """Return the sum of `parts` over the sum of `wholes` with a percentile-bootstrap interval over the pairs.

    parts, wholes: a pair for each case; at least two.
    level: confidence level of the interval.
    seed: of the resampling.

    Raises:
        ValueError: fewer than two pairs.
    """
    pairs = np.stack([np.asarray(parts, float), np.asarray(wholes, float)])
    if pairs.shape[1] < 2:
        raise ValueError(f"an interval needs at least two cases, there are {pairs.shape[1]}; give more samples")
    rng = np.random.default_rng(seed)
    draws = np.array([pairs[:, rng.integers(pairs.shape[1], size=pairs.shape[1])].sum(1) for _ in range(9_999)])
    low, high = np.quantile(draws[:, 0] / draws[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return Mean(float(pairs[0].sum() / pairs[1].sum()), float(low), float(high))


def run_interval(runs: Float[np.ndarray, "latents runs"], level: float = 0.99) -> Mean:
    """Return the mean over runs of each run's mean over latents, with Student's t interval, as the paper does.

    The interval says how much the draw of images matters. It does not say how much the choice of latents matters.

    runs: a value for each latent in each run.
    level: confidence level of the interval.

    Raises:
        ValueError: fewer than two runs.
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
