"""How the trainings of BatchTopK and Matryoshka SAEs differ from that of a TopK SAE.

BatchTopK (Bussmann et al., 2024) keeps the k * tokens largest activations of a batch, on average k a token. The
smallest that is kept, averaged over batches, is the threshold that the SAE has when it is used. Matryoshka (Bussmann et
al., 2025; here with TopK) also reconstructs from the first latents alone, so that these learn what is most general.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lmm_sae_nb.sae.activation import Latents
from lmm_sae_nb.sae.libraries import K_MAX
from lmm_sae_nb.sae.topk import SAE, encode_topk

KINDS = ("topk", "batch_topk", "matryoshka")
PREFIXES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # fractions of the latents that a Matryoshka SAE reconstructs from, too
KEPT = 0.99  # part of the threshold that stays after a batch


def new_sae(kind: str, width: int, n_latents: int, k: int, generator: torch.Generator) -> SAE:
    """Return an SAE before its training; its first weights do not depend on the kind."""
    if kind != "batch_topk":
        return SAE(width, n_latents, k, generator=generator)
    places = min(n_latents, max(K_MAX, 8 * k))
    return SAE(width, n_latents, places, threshold=torch.zeros(n_latents), generator=generator)


def batch_topk(
    sae: SAE, x: Float[Tensor, "local width"], k: int, gathered: Callable[[Tensor], Tensor] = lambda acts: acts
) -> tuple[Latents, Float[Tensor, ""]]:
    """Return the k * tokens largest activations of a batch, and the smallest of them that is above 0.

    Each token gets places for its largest activations, and more until none of its active latents is without a place.

    x: the tokens of this process.
    gathered: makes a tensor of all processes' tokens from that of this one's.
    """
    places = min(4 * k, sae.n_latents)
    while True:
        latents = encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, places)
        everywhere = gathered(latents.acts.detach())
        smallest = everywhere.flatten().topk(k * len(everywhere)).values[-1]
        if places == sae.n_latents or not bool((everywhere.amin(1) >= smallest).any()):
            break
        places = min(2 * places, sae.n_latents)
    kept = latents.acts >= smallest
    positive = everywhere[(everywhere >= smallest) & (everywhere > 0)]
    smallest = positive.min() if len(positive) else smallest
    return Latents(torch.where(kept, latents.acts, 0.0), latents.indices), smallest


@torch.no_grad()
def follow(threshold: Float[Tensor, " latents"], smallest: Float[Tensor, ""]) -> None:
    """Move the threshold of a BatchTopK SAE, in place, by what a batch kept; the first batch sets it."""
    threshold.lerp_(smallest.to(threshold).expand_as(threshold), 1 - KEPT if bool(threshold.any()) else 1.0)


def nested_error(
    sae: SAE, x: Float[Tensor, "tokens width"], latents: Latents, error: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return the mean squared error of the reconstructions from the first latents alone and from all.

    Which latents are active does not depend on the prefix.

    latents: of x.
    error: sum ||x - x_hat||^2 with all latents.
    """
    errors = [error]
    for fraction in PREFIXES:
        first = latents.indices < max(1, round(fraction * sae.n_latents))
        x_hat = sae.decode(Latents(torch.where(first, latents.acts, 0.0), latents.indices))
        errors.append((x - x_hat).square().sum())
    return torch.stack(errors).mean()
