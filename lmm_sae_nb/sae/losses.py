"""Losses of an SAE (FVU and AuxK) and the start of its decoder's bias."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lmm_sae_nb.sae.topk import TopKSAE, decode_sparse, encode_topk

# Losses and start.


def fvu(x: Float[Tensor, "tokens width"], x_hat: Float[Tensor, "tokens width"]) -> Float[Tensor, ""]:
    """Fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean||^2, with these tokens' mean.

    The baseline is the batch's own mean, so the value depends a little on what else is in the batch;
    `train.evaluate_sae` uses the mean of all the tokens it sees. Without variance the value is inf or nan.
    """
    return (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()


def auxk_loss(
    sae: TopKSAE,
    x: Float[Tensor, "tokens width"],
    x_hat: Float[Tensor, "tokens width"],
    dead: Bool[Tensor, " latents"],
    k_aux: int,
) -> Float[Tensor, ""]:
    """AuxK of Gao et al.: sum ||e - e_hat||^2 / sum ||e||^2, what dead latents leave of the residual.

    e = x - x_hat, detached; e_hat is decoded from the k_aux strongest dead latents of each token, without
    b_dec. Fewer dead latents than k_aux weigh as much less; none, or no residual, give 0. Departures from
    the reference code: it has the residual's sign reversed, lets gradient into it, and adds b_dec.
    """
    n_dead = int(dead.sum())
    residual = (x - x_hat).detach()
    energy, rounding = residual.square().sum(), torch.finfo(x.dtype).eps ** 2 * x.square().sum()
    if n_dead == 0 or energy <= rounding:
        return x.new_zeros(())
    latents = encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, min(k_aux, n_dead), dead.nonzero()[:, 0])
    left = residual - decode_sparse(latents, sae.W_dec)
    return min(1.0, n_dead / k_aux) * left.square().sum() / energy


@torch.no_grad()
def geometric_median(
    x: Float[Tensor, "tokens width"], *, steps: int = 100, tolerance: float = 1e-5
) -> Float[Tensor, " width"]:
    """The point with the least sum of distances to the tokens, by Weiszfeld's iteration; b_dec starts there.

    Stops when a step is shorter than `tolerance` times the tokens' mean distance. Unlike the mean it is not
    drawn to the few tokens of enormous norm that attention sinks are.
    """
    centre = x.mean(0)
    for _ in range(steps):
        distances = torch.linalg.vector_norm(x - centre, dim=1)
        scale = distances.mean()
        if scale == 0:
            break
        weights = scale / distances.clamp_min(1e-6 * scale)
        previous, centre = centre, weights @ x / weights.sum()
        if torch.linalg.vector_norm(centre - previous) <= tolerance * scale:
            break
    return centre
