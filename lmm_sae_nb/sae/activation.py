"""How an SAE chooses the active latents of a token: the k largest, or all above a threshold.

These two are enough for the published kinds. TopK and Matryoshka TopK keep the k largest. JumpReLU has a threshold for
each latent, BatchTopK one for all, and a standard SAE the threshold 0. A gated SAE is a JumpReLU SAE (`folding.gated`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lmm_sae_nb.sae import kernels


class Latents(NamedTuple):
    """The k latents of each token, in no order.

    acts: activations, at least 0; a place with activation 0 holds no active latent.
    indices: numbers of the latents.
    """

    acts: Float[Tensor, "*tokens k"]
    indices: Int64[Tensor, "*tokens k"]

    def top(self, k: int) -> Latents:
        """Return the k highest latents of each token.

        Raises:
            ValueError: there are fewer.
        """
        kernels.require_k(k, self.acts.shape[-1])
        top = self.acts.topk(k, dim=-1)
        return Latents(top.values, self.indices.gather(-1, top.indices))


@runtime_checkable
class Activation(Protocol):
    """What an SAE needs to know of its kind.

    name: the kind's.
    k: places of a token in `Latents`.
    """

    name: str
    k: int

    def candidates(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, places: int) -> tuple[Tensor, Tensor]:
        """Return the `places` latents of each token that may be active: activations and numbers.

        x: (tokens, width), centred.
        """

    def choose(self, candidates: Latents) -> Latents:
        """Return the active latents among candidates, some of which may have been edited; differentiable."""


@dataclass(frozen=True)
class TopK:
    """Keep the k largest activations of a token (eq. 1)."""

    k: int
    name = "topk"

    def candidates(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, places: int) -> tuple[Tensor, Tensor]:
        """Return the `places` largest, so that with k + n of them n can be edited; see `kernels.top_k`."""
        return kernels.top_k(x, W_enc, b_enc, places)

    def choose(self, candidates: Latents) -> Latents:
        """Return the k largest: the latents compete for the places."""
        return candidates.top(self.k)


@dataclass(frozen=True)
class JumpReLU:
    """Keep each activation that is above its latent's threshold, however many these are.

    threshold: at least 0.
    k: the most active latents that a token may have; it is called k_max where an SAE is loaded.
    """

    threshold: Float[Tensor, " latents"]
    k: int
    name = "jumprelu"

    def candidates(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, places: int) -> tuple[Tensor, Tensor]:
        """Return all active latents and empty places; see `kernels.above`."""
        return kernels.above(x, W_enc, b_enc, self.threshold, places)

    def choose(self, candidates: Latents) -> Latents:
        """Silence what is not above its threshold; no latent takes another one's place."""
        active = candidates.acts > self.threshold[candidates.indices]
        return Latents(torch.where(active, candidates.acts, 0.0), candidates.indices)
