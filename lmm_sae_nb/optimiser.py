"""Adam for a TopK SAE: unit dictionary rows, clipped gradients, as few passes over the weights as may be."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lmm_sae_nb.sae import TopKSAE


class SAEAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba) with bias correction, on gradients made fit for a dictionary of unit rows.

    One step: take from W_dec's gradient its part parallel to the (unit) rows, which only stretches them; scale
    all gradients together to a norm of at most `max_norm`; Adam; bring W_dec's rows back to length 1. The state
    is that of `torch.optim.Adam`. A step uses `.grad` up: what it holds afterwards is not the gradient.
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
        given = [weights for weights in group["params"] if weights.grad is not None]
        W_dec = group["params"][2]
        if W_dec.grad is not None:
            W_dec.grad.addcmul_((W_dec.grad * W_dec).sum(1, keepdim=True), W_dec, value=-1)
        torch.nn.utils.clip_grad_norm_(given, group["max_norm"])
        for weights in given:
            _adam(weights, self._moments(weights), group)
        if W_dec.grad is not None:
            W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny))
        return loss

    def _moments(self, weights: Tensor) -> dict[str, Tensor]:
        state = self.state[weights]
        if not state:
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(weights))
            state["exp_avg_sq"] = torch.zeros_like(weights)
        return state


def _adam(weights: Tensor, state: dict[str, Tensor], group: dict) -> None:
    (beta1, beta2), grad = group["betas"], weights.grad
    state["step"] += 1
    step = float(state["step"])
    mean = state["exp_avg"].lerp_(grad, 1 - beta1)
    square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    weights.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))
