"""The sparse kernels of the SAE: compiled by numba for float32 on the CPU, plain torch otherwise.

Both give the same numbers up to rounding. Neither makes a gradient of shape (tokens, n_latents) or gathers
(tokens * k, width) rows. The compiled kernels use as many threads as torch (`torch.set_num_threads`); their results
do not depend on that number. `NUMBA_DISABLE_JIT=1` switches them off.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

COMPILED = True  # False: plain torch everywhere
BLOCK = 2**25  # pre-activations per block: 128 MB in float32
TOKENS = 2048  # tokens per block of a sweep over latents: a tile of them is 1 MB
LATENTS = 512  # latents per range: their rows and sums stay in the core's cache


# ---- compiled or not, and on how many threads -------------------------------------------------------------------


@cache
def _loops() -> ModuleType | None:
    """Return the compiled loops, or None if numba is missing or switched off."""
    if importlib.util.find_spec("numba") is None:
        return None
    from numba import config

    if config.DISABLE_JIT:
        return None
    from lmm_sae_nb.sae import numba_loops

    return numba_loops


def is_compiled(*tensors: Tensor) -> bool:
    """Return whether the compiled loops can take these tensors: float32, on the CPU."""
    fit = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    return COMPILED and fit and _loops() is not None


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return the threads of a process; a fork does not inherit threads, so each process number has its own pool."""
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")


def _in_parts(n: int, size: int, task: Callable[[int, int], object]) -> None:
    """Call task(first, last) for consecutive ranges of `size` that cover range(n), on as many threads as torch uses."""
    ranges = [(first, min(n, first + size)) for first in range(0, n, size)]
    threads = min(torch.get_num_threads(), len(ranges))
    if threads <= 1:
        for first, last in ranges:
            task(first, last)
    else:
        list(_pool(threads, os.getpid()).map(lambda part: task(*part), ranges))


def _range_size(n: int) -> int:
    """Return the size of ranges that divide n equal items among the threads, a few ranges for each thread."""
    return max(1, -(-n // (4 * torch.get_num_threads())))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


# ---- TopK -------------------------------------------------------------------------------------------------------


def top_k(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return TopK(ReLU(W_enc x + b_enc)): activations and int64 indices, each (tokens, k), in no order.

    It works on a block of tokens at a time and gives no gradient. TopK comes before ReLU, which changes no
    activation. Under `torch.autocast` only the dense product is computed in autocast's dtype.

    x: (tokens, width).
    W_enc, b_enc: (latents, width) and (latents,).
    k: from 1 to the number of latents.

    Raises:
        ValueError: k is something else, or shapes do not fit.
    """
    require_k(k, len(W_enc))
    _require_fit(x.dim() == 2 and x.shape[1] == W_enc.shape[1] and b_enc.shape == W_enc.shape[:1], x, W_enc, b_enc)
    tokens = max(1, BLOCK // len(W_enc))
    dtype = _autocast_dtype(x)
    W = W_enc.to(dtype or W_enc.dtype).T
    if not is_compiled(x, W_enc, b_enc):
        tops = [(_product(part, W, dtype) + b_enc).topk(k, sorted=False) for part in x.split(tokens)]
        return torch.cat([top.values for top in tops]).relu_(), torch.cat([top.indices for top in tops])
    acts, indices = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64)
    block = x.new_empty(min(tokens, len(x)), len(W_enc))
    for part, part_acts, part_indices in zip(x.split(tokens), acts.split(tokens), indices.split(tokens), strict=True):
        pre = _product(part, W, dtype, out=block[: len(part)])
        arrays = _array(pre), _array(b_enc), k, part_acts.numpy(), part_indices.numpy()
        _in_parts(len(part), _range_size(len(part)), lambda *span, arrays=arrays: _loops().select(*arrays, *span))
    return acts, indices


def above(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return ReLU(W_enc x + b_enc) where it is above the threshold: activations and int64 indices, each (tokens, k).

    Places beyond a token's active latents have the activation 0. As `top_k` it works on blocks and gives no gradient.

    x, W_enc, b_enc: as of `top_k`.
    threshold: (latents,).
    k: places per token, from 1 to the number of latents.

    Raises:
        ValueError: k is something else, shapes do not fit, or a token has more than k active latents.
    """
    require_k(k, len(W_enc))
    _require_fit(x.dim() == 2 and x.shape[1] == W_enc.shape[1] and b_enc.shape == W_enc.shape[:1], x, W_enc, b_enc)
    _require_fit(threshold.shape == b_enc.shape, threshold, b_enc)
    dtype = _autocast_dtype(x)
    W, tops, counts = W_enc.to(dtype or W_enc.dtype).T, [], []
    for part in x.split(max(1, BLOCK // len(W_enc))):
        pre = _product(part, W, dtype) + b_enc
        acts = pre.masked_fill_(pre <= threshold, 0).relu_()  # NaN is not below, so it stays to be noticed
        tops.append(acts.topk(k, sorted=False))
        counts.append((acts > 0).sum(1))
    most = int(torch.cat(counts).max()) if len(x) else 0
    if most > k:
        raise ValueError(
            f"a token has {most} active latents, and k_max is {k}: no more are kept of a token; load the SAE with "
            f"k_max={most} or more"
        )
    return torch.cat([top.values for top in tops]), torch.cat([top.indices for top in tops])


def require_k(k: int, n_latents: int) -> None:
    """Raise ValueError unless k is a whole number from 1 to the number of latents; the compiled loops rely on it."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= n_latents:
        raise ValueError(f"k is {k!r}, with {n_latents} latents; choose a whole number from 1 to {n_latents}")


def _require_fit(fits: bool, *tensors: Tensor) -> None:
    """Raise ValueError unless the shapes of tensors fit; the compiled loops would read and write beyond their ends."""
    if not fits:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(f"tensors of the shapes {shapes} do not fit together; give those of one SAE and one batch")


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    on = torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32
    return torch.get_autocast_dtype(x.device.type) if on else None


def _product(x: Tensor, W: Tensor, dtype: torch.dtype | None, out: Tensor | None = None) -> Tensor:
    """Return x @ W in x's dtype; with a dtype, both are rounded to it first."""
    with torch.autocast(x.device.type, enabled=False):
        if dtype is None:
            return torch.mm(x, W, out=out)
        product = torch.mm(x.to(dtype), W)
        return product.to(x.dtype) if out is None else out.copy_(product)


# ---- sums along the pattern of active latents -------------------------------------------------------------------


class Pattern(NamedTuple):
    """The places of a (tokens, k) table of latents, sorted by latent.

    starts: int32 (n_latents + 1,); latent j has the places starts[j] to starts[j + 1] - 1.
    tokens: int32 (places,); the token of each place.
    order: int32 (places,); where a place was in the flat table.
    """

    starts: np.ndarray
    tokens: np.ndarray
    order: np.ndarray


def _pattern(indices: Tensor, n_latents: int) -> Pattern:
    flat = _array(indices).reshape(-1)
    starts, order = np.empty(n_latents + 1, np.int32), np.empty(len(flat), np.int32)
    if not _loops().transpose(flat, starts, order):
        raise IndexError(
            f"there are latents {flat.min()} to {flat.max()}, the SAE has {n_latents}; use the SAE that made them"
        )
    return Pattern(starts, order // indices.shape[1], order)


def _blocks(n_latents: int, indices: Tensor, *tensors: Tensor) -> Iterator[tuple[Pattern, tuple[np.ndarray, ...]]]:
    """Yield blocks of tokens: the pattern of their latents, and their part of each tensor."""
    for part, *others in zip(indices.split(TOKENS), *(tensor.split(TOKENS) for tensor in tensors), strict=True):
        yield _pattern(part, n_latents), tuple(map(_array, others))


def _tiles(x: np.ndarray) -> np.ndarray:
    loops = _loops()
    tiles = np.empty((-(-x.shape[1] // loops.WIDTH), len(x), loops.WIDTH), np.float32)
    _in_parts(len(tiles), 1, lambda *span: loops.into_tiles(x, tiles, *span))
    return tiles


def decode(acts: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Return (tokens, width): for each token the sum of the rows at its indices, weighted by the activations.

    It gives no gradient.

    acts, indices: (tokens, k).
    rows: (latents, width).

    Raises:
        ValueError: shapes do not fit.
    """
    _require_fit(acts.dim() == rows.dim() == 2 and acts.shape == indices.shape, acts, indices, rows)
    if not is_compiled(acts, rows):
        return F.embedding_bag(indices, rows.detach(), per_sample_weights=acts.detach(), mode="sum")
    out, n_tiles = acts.new_empty(len(acts), rows.shape[1]), -(-rows.shape[1] // _loops().WIDTH)
    for part, (pattern, (weights,)) in zip(out.split(TOKENS), _blocks(len(rows), indices, acts), strict=True):
        arrays = pattern.starts, pattern.tokens, weights.reshape(-1)[pattern.order], _array(rows), part.numpy()
        _in_parts(n_tiles, 1, lambda *span, arrays=arrays: _loops().decode(*arrays, *span))
    return out


def sum_by_latent(weights: Tensor, indices: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Return a tensor of the shape of `rows`: row j is the sum of weight * x[t] over the tokens t with latent j.

    weights, indices: (tokens, k).
    x: (tokens, width).

    Raises:
        ValueError: shapes do not fit.
    """
    fits = weights.dim() == 2 and weights.shape == indices.shape and x.shape == (len(weights), rows.shape[1])
    _require_fit(fits, weights, indices, x, rows)
    if not is_compiled(weights, x, rows):
        latents, order = indices.flatten().sort(stable=True)
        starts = torch.searchsorted(latents, torch.arange(len(rows), device=x.device))
        tokens = order // indices.shape[-1]
        return F.embedding_bag(tokens, x, starts, per_sample_weights=weights.flatten()[order], mode="sum")
    out = torch.empty_like(rows)
    if not len(x):
        return out.zero_()
    for n, (pattern, (part, x_part)) in enumerate(_blocks(len(rows), indices, weights, x)):
        arrays = pattern.starts, pattern.tokens, part.reshape(-1)[pattern.order], _tiles(x_part), out.numpy(), n > 0
        _in_parts(len(rows), LATENTS, lambda *span, arrays=arrays: _loops().sum_by_latent(*arrays, *span))
    return out


def decode_gradients(grad: Tensor, acts: Tensor, indices: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `acts` and `rows` for a gradient of `decode`'s output.

    On a GPU the backward of `embedding_bag` would need a buffer of up to (tokens * k / 10, width) for the rows;
    `sum_by_latent` needs none.
    """
    fits = acts.shape == indices.shape and grad.shape == (len(acts), rows.shape[1])
    _require_fit(fits, grad, acts, indices, rows)
    if not is_compiled(grad, acts, rows):
        with torch.enable_grad():
            weights = acts.detach().requires_grad_()
            out = F.embedding_bag(indices, rows.detach(), per_sample_weights=weights, mode="sum")
        return torch.autograd.grad(out, weights, grad)[0], sum_by_latent(acts, indices, grad, rows)
    loops, grad_acts, grad_rows = _loops(), torch.empty_like(acts), torch.empty_like(rows)
    if not len(grad):
        return grad_acts, grad_rows.zero_()
    parts = zip(grad_acts.split(TOKENS), _blocks(len(rows), indices, acts, grad), strict=True)
    for n, (out, (pattern, (weights, grad_part))) in enumerate(parts):
        products = np.empty(len(pattern.order), np.float32)
        weights = weights.reshape(-1)[pattern.order]
        arrays = _array(rows), _tiles(grad_part), grad_rows.numpy(), products, n > 0
        arrays = pattern.starts, pattern.tokens, weights, *arrays
        _in_parts(len(rows), LATENTS, lambda *span, arrays=arrays: loops.sum_and_multiply(*arrays, *span))
        out.numpy().reshape(-1)[pattern.order] = products
    return grad_acts, grad_rows


# ---- one step of Adam -------------------------------------------------------------------------------------------


def along_rows(grad: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each unit row the part of its gradient along the row, and the squared length of the rest."""
    _require_fit(grad.dim() == 2 and grad.shape == rows.shape, grad, rows)
    if not is_compiled(grad, rows):
        along = (grad * rows).sum(1)
        return along, torch.addcmul(grad, along[:, None], rows, value=-1).square().sum(1)
    along, squares = grad.new_empty(len(rows)), grad.new_empty(len(rows))
    arrays = _array(grad), _array(rows), along.numpy(), squares.numpy()
    _in_parts(len(rows), _range_size(len(rows)), lambda *span: _loops().project(*arrays, *span))
    return along, squares


class Adam(NamedTuple):
    """The numbers of one step of Adam; `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: int

    @property
    def rate(self) -> float:
        """The learning rate over the bias of the mean."""
        return self.lr / (1 - self.beta1**self.step)

    @property
    def lift(self) -> float:
        """1 / sqrt of the bias of the mean square."""
        return (1 - self.beta2**self.step) ** -0.5


def adam_(
    weights: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    adam: Adam,
    scale: Tensor,
    along: Tensor | None = None,
    *,
    fused: bool | None = None,
) -> None:
    """Do one step of Adam, in place, with the gradient scale * grad.

    weights, grad, mean, square: of one shape; mean and square are Adam's moments.
    along: if the weights are unit rows, the part of each row's gradient along the row. It is subtracted first, and
        the rows are brought back to length 1 afterwards.
    fused: take torch's fused Adam, one sweep over the weights; by default on a GPU.
    """
    tensors = weights, grad, mean, square
    _require_fit(len({tensor.shape for tensor in tensors}) == 1, *tensors)
    if weights.dim() == 2 and not fused and is_compiled(*tensors) and all(tensor.is_contiguous() for tensor in tensors):
        product = torch.zeros(len(weights)) if along is None else along
        numbers = (float(scale), adam.beta1, adam.beta2, adam.eps, adam.rate, adam.lift)
        arrays = _array(weights), _array(grad), _array(product), _array(mean), _array(square)
        arrays = *arrays, *map(np.float32, numbers), along is not None
        _in_parts(len(weights), _range_size(len(weights)), lambda *span: _loops().adam(*arrays, *span))
        return
    if fused is None:
        fused = weights.device.type == "cuda"
    if fused:
        _fused_adam_(*tensors, adam, scale, along)
        return
    if along is not None:
        grad = torch.addcmul(grad, along[:, None], weights, value=-1)
    grad = grad * scale
    mean.lerp_(grad, 1 - adam.beta1)
    square.mul_(adam.beta2).addcmul_(grad, grad, value=1 - adam.beta2)
    weights.addcdiv_(mean, square.sqrt().mul_(adam.lift).add_(adam.eps), value=-adam.rate)
    if along is not None:
        weights.div_(weights.norm(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny))


def _fused_adam_(
    weights: Tensor, grad: Tensor, mean: Tensor, square: Tensor, adam: Adam, scale: Tensor, along: Tensor | None
) -> None:
    """Do the same by torch's fused Adam, some rows at a time, so that the copy of the gradient is small."""
    rows = max(1, BLOCK // max(1, weights[0].numel()))
    step = torch.tensor(float(adam.step), device=weights.device)
    pieces = zip(*(tensor.split(rows) for tensor in (weights, grad, mean, square)), strict=True)
    for n, (w, g, m, v) in enumerate(pieces):
        g = g if along is None else torch.addcmul(g, along[n * rows : (n + 1) * rows, None], w, value=-1)
        torch._fused_adam_(
            [w], [g * scale], [m], [v], [], [step], lr=adam.lr, beta1=adam.beta1, beta2=adam.beta2, weight_decay=0.0,
            eps=adam.eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        if along is not None:
            w.div_(w.norm(dim=1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny))
