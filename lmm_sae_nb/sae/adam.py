"""Adam for a TopK SAE: unit dictionary rows, clipped gradients, as few passes over the weights as may be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmm_sae_nb.sae import kernels
from lmm_sae_nb.sae.topk import TopKSAE


class SAEAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba) with bias correction, on gradients made fit for a dictionary of unit rows.

    One step: leave out the part of W_dec's gradient that is parallel to the (unit) rows, which only stretches
    them; scale all gradients together to a norm of at most `max_norm`; Adam; bring W_dec's rows back to length
    1. `.grad` stays as it is. The state is that of `torch.optim.Adam`.
    """

    def __init__(
        self,
        sae: TopKSAE,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_norm: float = 1.0,
    ):
        weights = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
        super().__init__([{"params": weights}], dict(lr=lr, betas=betas, eps=eps, max_norm=max_norm))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step; a parameter without a gradient stays as it is. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        W_dec, given = group["params"][2], [weights for weights in group["params"] if weights.grad is not None]
        along, norms = {}, []
        for weights in given:
            if weights is W_dec:
                along[weights], squares = kernels.along_rows(weights.grad, weights)
                norms.append(squares.sum().sqrt())
            else:
                norms.append(torch.linalg.vector_norm(weights.grad))
        for weights in given:
            scale = (group["max_norm"] / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp_max(1)
            state = self._next_state(weights)
            adam = kernels.Adam(group["lr"], *group["betas"], group["eps"], int(state["step"]))
            moments = state["exp_avg"], state["exp_avg_sq"]
            kernels.adam_(weights, weights.grad, *moments, adam, scale, along.get(weights))
        return loss

    def _next_state(self, weights: Tensor) -> dict[str, Tensor]:
        state = self.state[weights]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(weights) for _ in range(2))
        state["step"] += 1
        return state
