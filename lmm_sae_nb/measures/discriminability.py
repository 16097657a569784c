"""Which metric tells a good SAE from a bad one? Compare metrics over a panel of SAEs whose quality is known.

Where label maps give the truth, an SAE is good if its latents find the concepts of the world and carry their names. A
metric that needs no truth is useful as far as it orders SAEs in the same way (arXiv 2602.14111 and 2605.18229 ask this
of language models, where the truth is not known).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata, spearmanr

from lmm_sae_nb.support.intervals import Mean

Panel = Mapping[str, Mapping[str, float]]  # SAE to metric to value
FEWEST = 4  # SAEs, below which an order says nothing


@dataclass(frozen=True)
class Discriminability:
    """How well one metric tells SAEs apart.

    metric: its name.
    saes: how many SAEs have it.
    agreement: for each yardstick, Spearman's rank correlation with it over SAEs, with its 99% interval. It is negative
        if the metric is better when it is lower.
    separation: fraction of the pairs of a trained SAE and a control in which the trained SAE has the higher value; ties
        count a half. 0.5 is chance, and 0 separates as well as 1: there a lower value is better.
    distance: mean of the trained SAEs less mean of the controls, in standard deviations over seeds.
    noise: standard deviation over seeds, as a fraction of that over the whole panel. 0 is best; at 1 the seed matters
        as much as all other differences.
    """

    metric: str
    saes: int
    agreement: dict[str, Mean]
    separation: float
    distance: float
    noise: float


def compare_metrics(
    panel: Panel,
    metrics: Sequence[str],
    yardsticks: Sequence[str],
    *,
    seeds: Collection[str],
    controls: Collection[str],
    seed: int = 0,
) -> list[Discriminability]:
    """Measure each metric over a panel of SAEs. A metric that fewer than four SAEs have, or that is the same for all,
    is left out.

    panel: may lack a metric for some SAEs.
    metrics: to measure.
    yardsticks: metrics that say what is true.
    seeds: trained SAEs that differ only in their seed; at least two.
    controls: SAEs that should be worse.
    seed: of the intervals' resampling.

    Raises:
        ValueError: there are fewer than two seeds, no controls, or one of them is not in the panel.
    """
    if len(seeds) < 2 or not controls or (unknown := {*seeds, *controls} - set(panel)):
        missing = f", and {sorted(unknown)} are not in the panel" if len(seeds) > 1 and controls else ""
        raise ValueError(
            f"there are {len(seeds)} SAEs of different seeds and {len(controls)} controls{missing}; give at least two "
            f"seeds and one control, out of {', '.join(panel)}"
        )
    found = []
    for metric in metrics:
        values = {sae: row[metric] for sae, row in panel.items() if metric in row}
        alike, worse = ([values[sae] for sae in group if sae in values] for group in (seeds, controls))
        if len(values) < FEWEST or np.ptp(list(values.values())) == 0 or len(alike) < 2 or not worse:
            continue
        spread = float(np.std(alike, ddof=1))
        found.append(
            Discriminability(
                metric, len(values),
                {name: _agreement(panel, metric, name, seed) for name in yardsticks if name != metric},
                separation(alike, worse), (float(np.mean(alike)) - float(np.mean(worse))) / max(spread, 1e-12),
                spread / float(np.std(list(values.values()), ddof=1)),
            )
        )  # fmt: skip
    return found


def separation(better: Sequence[float], worse: Sequence[float]) -> float:
    """Return the fraction of pairs in which the first is higher (the area under the ROC curve); ties count a half."""
    ranks = rankdata([*better, *worse])[: len(better)]
    return float((ranks.sum() - len(better) * (len(better) + 1) / 2) / (len(better) * len(worse)))


def _agreement(panel: Panel, metric: str, yardstick: str, seed: int) -> Mean:
    """Return the rank correlation over SAEs with a percentile-bootstrap interval (2,000 resamples of SAEs)."""
    pairs = np.array([(row[metric], row[yardstick]) for row in panel.values() if metric in row and yardstick in row])
    if len(pairs) < FEWEST or (np.ptp(pairs, 0) == 0).any():
        return Mean(float("nan"), float("nan"), float("nan"))
    drawn = pairs[np.random.default_rng(seed).integers(len(pairs), size=(2_000, len(pairs)))]
    drawn = drawn[(np.ptp(drawn, 1) > 0).all(1)]
    ranks = rankdata(drawn, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    first, second = ranks[..., 0], ranks[..., 1]
    draws = (first * second).sum(1) / np.sqrt((first**2).sum(1) * (second**2).sum(1))  # Pearson's r of ranks
    low, high = np.quantile(draws, [0.005, 0.995])
    return Mean(float(spearmanr(*pairs.T).statistic), float(low), float(high))
