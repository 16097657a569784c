"""Losses of an SAE, FVU and AuxK, and the first value of the decoder's bias."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lmm_sae_nb.sae.topk import SAE, decode_sparse, encode_topk

PLACES = 2**25  # (token, latent) pairs that AuxK holds at once: about 50 bytes each, with their gradients


def fvu(x: Float[Tensor, "tokens width"], x_hat: Float[Tensor, "tokens width"]) -> Float[Tensor, ""]:
    """Return the fraction of variance unexplained, sum ||x - x_hat||^2 / sum ||x - mean||^2.

    The mean is that of the batch, so the value depends a little on the other tokens in it. `evaluate_sae` uses the
    mean of all tokens that it sees. Without variance the value is inf or nan.
    """
    return (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()


def auxk_loss(
    sae: SAE,
    x: Float[Tensor, "tokens width"],
    x_hat: Float[Tensor, "tokens width"],
    dead: Bool[Tensor, " latents"],
    k_aux: int,
) -> Float[Tensor, ""]:
    """Return AuxK of Gao et al.: sum ||e - e_hat||^2 / sum ||e||^2, the part of the residual that dead latents miss.

    The residual e = x - x_hat is detached. e_hat is decoded from the k_aux strongest dead latents of each token,
    without b_dec. With fewer dead latents than k_aux the loss is scaled down by their ratio. Without dead latents or
    without a residual it is 0. The reference code differs: it reverses the residual's sign, lets gradients into it,
    and adds b_dec.

    Of more than PLACES pairs, a part of the tokens is computed at a time, and once more for its gradient. So the memory
    does not grow with the batch.

    x_hat: reconstruction of x.
    dead: marks the dead latents.
    k_aux: latents per token.
    """
    n_dead = int(dead.sum())
    residual = (x - x_hat).detach()
    energy, rounding = residual.square().sum(), torch.finfo(x.dtype).eps ** 2 * x.square().sum()
    if n_dead == 0 or energy <= rounding:
        return x.new_zeros(())
    among, k = dead.nonzero()[:, 0], min(k_aux, n_dead)
    parts = [part.split(max(1, PLACES // k)) for part in (x, residual)]
    if len(parts[0]) <= 1:
        left = _left(sae, x, residual, among, k)
    else:
        left = sum(
            checkpoint(_left, sae, *part, among, k, use_reentrant=False, preserve_rng_state=False)
            for part in zip(*parts, strict=True)
        )
    return min(1.0, n_dead / k_aux) * left / energy


def _left(
    sae: SAE,
    x: Float[Tensor, "tokens width"],
    residual: Float[Tensor, "tokens width"],
    among: Int64[Tensor, " dead"],
    k: int,
) -> Float[Tensor, ""]:
    """Return the squared length of what k dead latents of each token leave of the residual."""
    latents = encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, k, among)
    return (residual - decode_sparse(latents, sae.W_dec)).square().sum()


@torch.no_grad()
def geometric_median(
    x: Float[Tensor, "tokens width"], *, steps: int = 100, tolerance: float = 1e-5
) -> Float[Tensor, " width"]:
    """Return the point with the smallest sum of distances to the tokens (Weiszfeld's iteration); b_dec starts there.

    A few tokens have an enormous norm (attention sinks). They move the mean, but not this point.

    steps: at most.
    tolerance: stop after a step shorter than this times the mean distance.
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
