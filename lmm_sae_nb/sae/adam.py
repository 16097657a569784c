"""Adam for a TopK SAE: unit rows, clipped gradients, few passes over the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmm_sae_nb.sae import kernels
from lmm_sae_nb.sae.topk import SAE


class SAEAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba) for an SAE whose W_dec has rows of length 1.

    A step removes the part of W_dec's gradient along the rows, which would only change their length. It scales all
    gradients together to a norm of at most `max_norm`, applies Adam with bias correction, and scales W_dec's rows back
    to length 1. `.grad` does not change. The state is that of `torch.optim.Adam`.

    sae: its four weights learn.
    lr, betas, eps: as of `torch.optim.Adam`.
    max_norm: largest norm of all gradients together.
    """

    def __init__(
        self,
        sae: SAE,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_norm: float = 1.0,
    ):
        weights = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
        super().__init__([{"params": weights}], dict(lr=lr, betas=betas, eps=eps, max_norm=max_norm))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Do one step; weights without a gradient do not change.

        closure: computes the loss again, if given; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        W_dec, learning = group["params"][2], [weights for weights in group["params"] if weights.grad is not None]
        along, norms = {}, []
        for weights in learning:
            if weights is W_dec:
                along[weights], squares = kernels.along_rows(weights.grad, weights)
                norms.append(squares.sum().sqrt())
            else:
                norms.append(torch.linalg.vector_norm(weights.grad))
        for weights in learning:
            scale = (group["max_norm"] / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp_max(1)
            state = self._next_state(weights)
            adam = kernels.Adam(group["lr"], *group["betas"], group["eps"], int(state["step"]))
            moments = state["exp_avg"], state["exp_avg_sq"]
            kernels.adam_(weights, weights.grad, *moments, adam, scale, along.get(weights))
        return loss

    def _next_state(self, weights: Tensor) -> dict[str, Tensor]:
        """Return Adam's state of these weights with the step counted."""
        state = self.state[weights]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(weights) for _ in range(2))
        state["step"] += 1
        return state
