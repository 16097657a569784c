"""Bring the SAEs of all libraries to one form, with the same latents and reconstruction.

The form: pre = W_enc (x - b_dec) + b_enc; the k largest, or all above a threshold, are active; x_hat = W_dec^T z +
b_dec. Everything else that libraries do, such as scaling the input, is folded into the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

ROWS = 4096  # rows that are looked at at a time


class SAEWeights(NamedTuple):
    """The weights of an SAE, one row for each latent; see `SAE`.

    k: active latents per token; with a threshold, the most that a token may have.
    threshold: of each latent; None for a TopK SAE.
    hook: the library's name of the place that the SAE reads; "" if the files do not say it.
    """

    W_enc: Float[Tensor, "latents width"]
    b_enc: Float[Tensor, " latents"]
    W_dec: Float[Tensor, "latents width"]
    b_dec: Float[Tensor, " width"]
    k: int
    threshold: Float[Tensor, " latents"] | None = None
    hook: str = ""

    @property
    def usual_format(self) -> str:
        """The name of the format that the SAE is written in if none is asked for."""
        return "sparsify" if self.threshold is None else "saelens"


def exact(weights: SAEWeights) -> SAEWeights:
    """Return weights of 16 bits in float32, so that folding adds no rounding of 16 bits; others as they are."""
    if weights.W_enc.element_size() > 2:
        return weights
    threshold = weights.threshold
    return SAEWeights(
        *(tensor.float() for tensor in weights[:4]), weights.k, None if threshold is None else threshold.float()
    )


def gated(weights: SAEWeights, r_mag: Float[Tensor, " latents"], b_gate: Float[Tensor, " latents"]) -> SAEWeights:
    """Return a gated SAE as one with a threshold.

    With u = W_enc (x - b_dec), latent j of a gated SAE is ReLU(exp(r_mag) u + b_mag) where u + b_gate > 0. There
    exp(r_mag) u + b_mag is above b_mag - exp(r_mag) b_gate.

    weights: with b_mag in the place of b_enc.
    r_mag, b_gate: of the gated SAE.
    """
    stretch = r_mag.exp()
    threshold = (weights.b_enc - stretch * b_gate).clamp_min(0)
    return weights._replace(W_enc=weights.W_enc * stretch[:, None], threshold=threshold)


def unit_rows(weights: SAEWeights) -> SAEWeights:
    """Return an SAE whose activation is multiplied by the length of the latent's dictionary row, with rows of length 1.

    weights: of an SAE that chooses latents by activation times length; a threshold is of the product.
    """
    tiny = torch.finfo(weights.W_dec.dtype).tiny
    length = torch.linalg.vector_norm(weights.W_dec, dim=1, dtype=torch.float64).clamp_min(tiny)
    W_enc, b_enc, W_dec = weights.W_enc * length[:, None], weights.b_enc * length, weights.W_dec / length[:, None]
    dtype = weights.W_dec.dtype
    return weights._replace(W_enc=W_enc.to(dtype), b_enc=b_enc.to(dtype), W_dec=W_dec.to(dtype))


def scaled(weights: SAEWeights, factor: float) -> SAEWeights:
    """Return an SAE whose input is multiplied by a factor, and whose output is divided by it, without both."""
    return weights._replace(W_enc=weights.W_enc * factor, W_dec=weights.W_dec / factor, b_dec=weights.b_dec / factor)


def centred(weights: SAEWeights) -> SAEWeights:
    """Return an SAE whose encoder reads x as one whose encoder reads x - b_dec."""
    shift = torch.cat([rows.double() @ weights.b_dec.double() for rows in weights.W_enc.split(ROWS)])
    return weights._replace(b_enc=(weights.b_enc.double() + shift).to(weights.b_enc.dtype))
