"""Comparing metrics over a panel: against orders and pairs counted by hand."""

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from lmm_sae_nb.measures.discriminability import compare_metrics, separation

SEEDS, CONTROLS = [f"seed {n}" for n in range(6)], [f"control {n}" for n in range(4)]


def panel(rng):
    """A panel in which `good` follows the truth, `upside_down` follows it the other way round, `blind` is noise."""
    rows = {}
    for name in (*SEEDS, *CONTROLS, "half"):
        truth = {"s": 0.8, "c": 0.1, "h": 0.5}[name[0]] + rng.normal(0, 0.01)
        rows[name] = {"truth": truth, "good": 2 * truth, "upside_down": -truth, "blind": rng.normal(), "same": 1.0}
    return rows


def test_a_metric_that_follows_the_truth_is_told_from_one_that_does_not():
    rows = panel(np.random.default_rng(0))
    found = {
        each.metric: each
        for each in compare_metrics(
            rows, ["good", "upside_down", "blind", "same"], ["truth"], seeds=SEEDS, controls=CONTROLS
        )
    }
    assert "same" not in found  # it cannot order anything
    assert found["good"].agreement["truth"].mean == pytest.approx(1) and found["good"].separation == 1
    assert found["upside_down"].agreement["truth"].mean == pytest.approx(-1) and found["upside_down"].separation == 0
    assert abs(found["blind"].agreement["truth"].mean) < 0.9
    assert found["good"].noise < 0.1 < found["blind"].noise
    assert found["good"].distance > 20 and found["upside_down"].distance < -20
    truth, blind = ([row[name] for row in rows.values()] for name in ("truth", "blind"))
    assert np.sign(found["blind"].agreement["truth"].mean) == np.sign(kendalltau(truth, blind).statistic)


def test_the_interval_is_that_of_resampled_saes_one_by_one():
    rng = np.random.default_rng(4)
    rows = {f"{name} {n}": {"truth": float(rng.integers(5)), "it": float(rng.integers(5))}
            for name in ("seed", "control") for n in range(6)}  # fmt: skip
    (found,) = compare_metrics(rows, ["it"], ["truth"], seeds=SEEDS, controls=CONTROLS)
    pairs, again, draws = np.array([[*row.values()] for row in rows.values()]), np.random.default_rng(0), []
    for _ in range(2_000):
        drawn = pairs[again.integers(12, size=12)]
        if (np.ptp(drawn, 0) > 0).all():
            draws.append(spearmanr(*drawn.T).statistic)
    assert found.agreement["truth"][1:] == pytest.approx(np.quantile(draws, [0.005, 0.995]))


def test_separation_counts_pairs():
    rng = np.random.default_rng(1)
    for _ in range(20):
        better, worse = rng.integers(0, 4, 5), rng.integers(0, 4, 3)
        pairs = [1.0 if b > w else 0.5 if b == w else 0.0 for b in better for w in worse]
        assert separation(better.tolist(), worse.tolist()) == pytest.approx(np.mean(pairs))


def test_a_metric_that_some_saes_lack_is_measured_on_the_others():
    rows = panel(np.random.default_rng(2))
    del rows["half"]["good"], rows["control 0"]["good"]
    (found,) = compare_metrics(rows, ["good"], ["truth"], seeds=SEEDS, controls=CONTROLS)
    assert found.saes == len(rows) - 2 and found.agreement["truth"].mean == pytest.approx(1)


@pytest.mark.parametrize("seeds, controls", [(SEEDS[:1], CONTROLS), (SEEDS, []), (SEEDS, ["a stranger"])])
def test_groups_that_cannot_be_compared_are_refused(seeds, controls):
    with pytest.raises(ValueError, match="at least two seeds and one control"):
        compare_metrics(panel(np.random.default_rng(3)), ["good"], ["truth"], seeds=seeds, controls=controls)
