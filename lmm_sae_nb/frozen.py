"""Models that are used and not trained: their linear layers in float32 on the processor are computed by oneDNN.

torch leaves such products to MKL, which on processors of other makers than its own uses half of their vectors; oneDNN,
which torch brings along for other types, uses all (`lmm_sae_nb.benchmarks.products` measures both). The products are
the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Model = TypeVar("Model", bound=nn.Module)

LEAST_ROWS = 32  # with fewer nothing is gained
_PLAIN: ContextVar[bool] = ContextVar("plain", default=False)


def frozen(model: Model) -> Model:
    """The model itself, set to eval, its parameters without gradients, its plain linear layers computed by oneDNN.

    A layer is computed by torch as ever where it learns again, is moved or cast, or torch has no oneDNN for its
    processor; so is all within `plain_products`, and what is traced or counted operation by operation.
    """
    for layer in model.eval().requires_grad_(False).modules():
        if type(layer) is nn.Linear:  # a quantised or adapted one knows better
            layer.__dict__.setdefault("forward", partial(_linear, layer))
    return model


@contextmanager
def plain_products() -> Iterator[None]:
    """Compute the linear layers as torch does, to the bit."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    if not _fits(layer, x):
        return F.linear(x, layer.weight, layer.bias)
    return _Product.apply(x, layer.weight, layer.bias)


def _fits(layer: nn.Linear, x: Tensor) -> bool:
    weights = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    return (
        x.numel() >= LEAST_ROWS * layer.in_features > 0
        and x.shape[-1] == layer.in_features  # or else torch's own message
        and all(part.dtype == torch.float32 and part.device.type == "cpu" for part in (x, *weights))
        and not any(part.requires_grad for part in weights)
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not _PLAIN.get()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
    )


class _Product(torch.autograd.Function):
    """x W^T + b with its gradient in x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _Product.apply(grad, weight.T, None), None, None
