"""How well the approximations of section 2.4 agree with ablation, pair by pair, and what they cost."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from lmm_sae_nb.attribute.attribution import Attribution, Decision, difference, linear
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.steer.steering import steered


@torch.no_grad()
def own_decision(lmm: LMM, text: str, image: Image.Image | None) -> Decision:
    """The choice that the untouched model itself makes: its first token, against the runner-up."""
    prompt = lmm.entered(lmm.prompt(text, image))
    answer, baseline = lmm.last_logits(prompt)[0].topk(2).indices.tolist()
    return Decision(prompt, answer, baseline)


class Agreement(NamedTuple):
    """Of an approximation with exact values: Spearman's rank correlation, the share of equal signs, and of how many."""

    spearman: float
    sign: float
    pairs: int


def agreement(exact: Float[Tensor, "tokens k"], approximation: Float[Tensor, "tokens k"]) -> Agreement:
    """How an approximation agrees with exact values where both are known; ValueError for fewer than three pairs."""
    both = exact.isfinite() & approximation.isfinite()
    if int(both.sum()) < 3:
        raise ValueError(f"{int(both.sum())} pairs are known both ways; ablate at least three")
    true, found = exact[both].double().numpy(), approximation[both].double().numpy()
    return Agreement(
        float(spearmanr(true, found).statistic), float((np.sign(true) == np.sign(found)).mean()), len(true)
    )


def some_pairs(
    attribution: Attribution, count: int, generator: torch.Generator, among: Bool[Tensor, "tokens k"] | None = None
) -> Bool[Tensor, "tokens k"]:
    """As many active pairs (of those `among` marks) at random, all equally likely; all of them if there are fewer."""
    active = attribution.latents.acts > 0
    active = (active if among is None else active & among).nonzero()
    chosen = active[torch.randperm(len(active), generator=generator)[:count]]
    pairs = torch.zeros_like(attribution.latents.acts, dtype=torch.bool)
    pairs[tuple(chosen.T)] = True
    return pairs


def cost(place: SAEInPlace, choice: Decision, repetitions: int = 9) -> dict[str, float]:
    """Medians of alternating repetitions, in seconds: one forward of the spliced model, and `linear` for all pairs.

    Both from the pixels on, as if nothing were known of the prompt yet.
    """
    lmm = place.lmm
    seconds: dict[str, list[float]] = {"forward_seconds": [], "linear_seconds": []}
    linear(place, choice)  # what is compiled is compiled now
    for _ in range(repetitions):
        choice.prompt.entry = None
        started = time.perf_counter()
        with torch.no_grad(), steered(place, choice.prompt, keep_error=True):
            difference(lmm, choice)
        seconds["forward_seconds"].append(time.perf_counter() - started)
        choice.prompt.entry = None
        started = time.perf_counter()
        linear(place, choice)
        seconds["linear_seconds"].append(time.perf_counter() - started)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return medians | {"cost_ratio": medians["linear_seconds"] / medians["forward_seconds"]}
