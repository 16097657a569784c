"""Compare the approximations of section 2.4 with ablation, pair by pair, and measure their cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from scipy.stats import spearmanr
from torch import Tensor

from lmm_sae_nb.attribute.attribution import Attribution, Decision, difference, linear
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.steer.steering import steered
from lmm_sae_nb.support.devices import wait_for


class Agreement(NamedTuple):
    """How well an approximation agrees with ablation."""

    spearman: float  # rank correlation, from -1 to 1
    sign: float  # fraction of pairs with the same sign
    pairs: int  # known both ways


def agreement(exact: Tensor | Sequence[float], approximation: Tensor | Sequence[float]) -> Agreement:
    """Compare an approximation with ablation at the pairs that both know.

    exact: attribution by ablation; NaN where it is not known.
    approximation: of the same shape; NaN where it is not known.

    Raises:
        ValueError: fewer than three pairs are known both ways.
    """
    exact, approximation = (torch.as_tensor(values, dtype=torch.float64) for values in (exact, approximation))
    known = exact.isfinite() & approximation.isfinite()
    if int(known.sum()) < 3:
        raise ValueError(f"{int(known.sum())} pairs are known both ways; ablate at least three")
    by_ablation, approximated = exact[known].numpy(), approximation[known].numpy()
    spearman = spearmanr(by_ablation, approximated).statistic
    same_sign = np.sign(by_ablation) == np.sign(approximated)
    return Agreement(float(spearman), float(same_sign.mean()), len(by_ablation))


def median_ratio(exact: Sequence[float], approximation: Sequence[float], largest: float = 0.05) -> float:
    """Return the median of approximation over ablation, over the pairs with the largest effects by ablation.

    A rank correlation does not see it if an approximation halves the large effects; this does.

    exact: attribution by ablation.
    approximation: of the same pairs.
    largest: fraction of the pairs that counts, at least one pair.
    """
    exact, approximation = np.asarray(exact, float), np.asarray(approximation, float)
    chosen = np.argsort(-np.abs(exact), kind="stable")[: max(1, round(largest * len(exact)))]
    return float(np.median(approximation[chosen] / exact[chosen]))


def random_pairs(
    attribution: Attribution, count: int, generator: torch.Generator, among: Bool[Tensor, "tokens k"] | None = None
) -> Bool[Tensor, "tokens k"]:
    """Choose active (token, latent) pairs at random, all equally likely.

    A pair whose linear attribution is exactly 0 is left out, because no path leads from it to the decision: at the
    model's last layer that is every pair but those of the last token.

    attribution: of the decision, as `linear` returns it; its `latents` say which pairs are active.
    count: number of pairs; all of them are taken if there are fewer.
    generator: the source of randomness.
    among: mask of the pairs to choose from; by default every active one.
    """
    active = (attribution.latents.acts > 0) & (attribution.values != 0)
    active = (active if among is None else active & among).nonzero()
    chosen = active[torch.randperm(len(active), generator=generator)[:count]]
    pairs = torch.zeros_like(attribution.latents.acts, dtype=torch.bool)
    pairs[tuple(chosen.T)] = True
    return pairs


def measure_cost(place: SAEInPlace, choice: Decision, repetitions: int = 9) -> dict[str, float]:
    """Time one forward of the spliced model, and `linear` for all pairs, in turns.

    Both start from the pixels. Return the medians in seconds, `forward_seconds` and `linear_seconds`, and their
    ratio, `cost_ratio`.

    repetitions: of each.
    """
    lmm = place.lmm
    seconds: dict[str, list[float]] = {"forward_seconds": [], "linear_seconds": []}
    linear(place, choice)  # compile before the clock starts
    for _ in range(repetitions):
        wait_for(place.device)
        started = time.perf_counter()
        with torch.no_grad(), steered(place, choice.prompt, keep_error=True):
            difference(lmm, choice)
        wait_for(place.device)
        seconds["forward_seconds"].append(time.perf_counter() - started)
        started = time.perf_counter()
        linear(place, choice)
        wait_for(place.device)
        seconds["linear_seconds"].append(time.perf_counter() - started)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return medians | {"cost_ratio": medians["linear_seconds"] / medians["forward_seconds"]}
