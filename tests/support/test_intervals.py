"""Intervals of means and fractions, against textbook formulas."""

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap, norm

from lmm_sae_nb.support.intervals import (
    Mean,
    Proportion,
    bounds,
    difference_interval,
    mean_interval,
    mean_of_fractions,
    proportion,
    ratio_interval,
    run_interval,
)


def test_the_interval_of_a_normal_sample_is_the_textbook_one():
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = mean_interval(values)
    half = norm.ppf(0.995) * values.std() / np.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.05)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05)


def test_intervals_of_few_and_of_equal_values():
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([0.5])
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_the_interval_of_a_difference_agrees_with_normal_theory():
    """Mean of b less mean of a, give or take 2.576 standard errors; theirs add up in squares."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 2, 400), rng.normal(1.5, 1, 300)
    found = difference_interval(a, b)
    half = 2.576 * np.sqrt(a.var(ddof=1) / 400 + b.var(ddof=1) / 300)
    assert found.mean == pytest.approx(b.mean() - a.mean())
    assert (found.high - found.mean, found.mean - found.low) == pytest.approx((half, half), rel=0.06)
    assert difference_interval(a, b) == found
    with pytest.raises(ValueError, match="there are 1 and 300"):
        difference_interval(a[:1], b)


def test_the_interval_over_runs_is_students():
    """Three runs with means 1, 2 and 3: sd 1, t(0.995, 2) = 9.925."""
    runs = np.array([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]])
    found = run_interval(runs)
    assert found.mean == pytest.approx(2)
    assert found.high - 2 == pytest.approx(9.925 / 3**0.5, abs=1e-3)
    assert 2 - found.low == pytest.approx(found.high - 2)
    with pytest.raises(ValueError, match="at least two, there are 1"):
        run_interval(runs[:, :1])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_fraction_has_wilsons_interval(kind):
    found = proportion(kind([True] * 8 + [False] * 2))
    z, n, p = 2.5758293, 10, 0.8
    centre, half = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n),
    )
    assert found[:3] == pytest.approx((p, centre - half, centre + half), abs=1e-6)
    assert found.cases == 10
    with pytest.raises(ValueError, match="no cases"):
        proportion(kind([]))


def test_no_hits_among_few_cases_leave_a_wide_interval():
    assert proportion([False] * 20)[:2] == (0.0, pytest.approx(0.0, abs=1e-12))
    assert proportion([False] * 20).high == pytest.approx(2.5758293**2 / (20 + 2.5758293**2), abs=1e-6)


def test_bounds_are_named_after_what_they_bound():
    wanted = {"fvu": 0.5, "fvu_low": 0.25, "fvu_high": 0.75}
    assert bounds("fvu", Mean(0.5, 0.25, 0.75)) == wanted
    assert bounds("fvu", Proportion(0.5, 0.25, 0.75, 9)) == wanted


def test_the_interval_of_a_ratio_is_that_of_a_paired_bootstrap():
    rng = np.random.default_rng(0)
    wholes = rng.uniform(1, 5, 60)
    parts = wholes * rng.uniform(0.2, 0.4, 60)
    found = ratio_interval(parts, wholes)
    drawn = bootstrap(
        (parts, wholes), lambda a, b: a.sum() / b.sum(), paired=True, vectorized=False, confidence_level=0.99,
        method="percentile", rng=np.random.default_rng(1),
    )  # fmt: skip
    assert found.mean == pytest.approx(parts.sum() / wholes.sum())
    assert found[1:] == pytest.approx(tuple(drawn.confidence_interval), abs=0.005)
    assert ratio_interval(0.3 * wholes, wholes) == pytest.approx((0.3, 0.3, 0.3))
    with pytest.raises(ValueError, match="at least two cases"):
        ratio_interval([1], [2])


def test_the_mean_of_fractions_of_unequal_groups_is_covered_as_often_as_the_level_says():
    rng, truth, sizes = np.random.default_rng(3), (0.2, 0.8), (40, 160)
    found = [
        mean_of_fractions([proportion(rng.random(size) < p, 0.9) for p, size in zip(truth, sizes, strict=True)])
        for _ in range(1500)
    ]
    covered = np.mean([low <= 0.5 <= high for _, low, high in found])
    assert 0.87 < covered < 0.94


def test_the_mean_of_one_fraction_has_its_own_interval():
    alone = proportion([True] * 3 + [False] * 7)
    assert mean_of_fractions([alone]) == pytest.approx(alone[:3])
    with pytest.raises(ValueError, match="there are no groups"):
        mean_of_fractions([])
