"""Models that are used and not trained: where torch's BLAS is slow, oneDNN computes their linear layers.

torch leaves products in float32 to MKL, which on AMD's processors uses half of the width of AVX-512's vectors; oneDNN,
which torch brings along for other types, uses all of it (`lmm_sae_nb.benchmarks.products` measures both). The products
are the same but for rounding. On other processors, of which nothing was measured, nothing changes.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Model = TypeVar("Model", bound=nn.Module)

LEAST_ROWS = 32  # with fewer nothing is gained
_PLAIN: ContextVar[bool] = ContextVar("plain", default=False)


def frozen(model: Model) -> Model:
    """The model itself, set to eval, its parameters without gradients, its plain linear layers `FrozenLinear`."""
    for layer in model.eval().requires_grad_(False).modules():
        if type(layer) is nn.Linear:  # an adapted one has a forward of its own
            layer.__class__ = FrozenLinear
    return model


@contextmanager
def plain_products() -> Iterator[None]:
    """Compute all linear layers as torch does, to the bit."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


class FrozenLinear(nn.Linear):
    """A linear layer that oneDNN computes where it is faster: frozen, in float32, on the processor, for many rows.

    Elsewhere it is nn.Linear: on a GPU, in another type, with weights that learn again, within `plain_products`, under
    autocast, compiled, traced, counted by operations, or differentiated forwards.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (nn.Linear's name)
        if not self._fits(input):
            return super().forward(input)
        rows = _Product.apply(input.reshape(-1, self.in_features), self.weight, self.bias)
        return rows.reshape(*input.shape[:-1], self.out_features)

    def _fits(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or not onednn_is_faster():
            return False
        weights = [part for part in (self.weight, self.bias) if part is not None]
        return (
            x.layout is torch.strided
            and x.numel() >= LEAST_ROWS * self.in_features > 0
            and x.shape[-1] == self.in_features  # or else torch's own message
            and all(part.dtype == torch.float32 and part.device.type == "cpu" for part in (x, *weights))
            and type(x) in (Tensor, nn.Parameter)
            and all(type(part) is nn.Parameter and part.is_contiguous() for part in weights)
            and not any(part.requires_grad for part in weights)
            and torch.backends.mkldnn.enabled
            and not (_PLAIN.get() or torch.is_autocast_enabled("cpu") or _is_watched())
        )


class _Product(torch.autograd.Function):
    """x W^T + b of (rows, width) with its gradient in x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _Product.apply(grad, weight.T, None), None, None


@cache
def onednn_is_faster() -> bool:
    """Whether torch has oneDNN, its BLAS is MKL, and the processor is of the kind measured: AMD's, with AVX-512."""
    told = Path("/proc/cpuinfo")
    processor = told.read_text() if told.is_file() else platform.processor()
    return (
        "AuthenticAMD" in processor
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _is_watched() -> bool:
    """Whether someone counts operations one by one, or transforms functions."""
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or is_in_torch_dispatch_mode()
