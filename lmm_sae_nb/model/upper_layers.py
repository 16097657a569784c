"""Run only the layers above a given one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from lmm_sae_nb.model.hooks import Captured, Hidden, _Stop


def before(cache: DynamicCache, start: int, versions: int) -> DynamicCache:
    """Keys and values of the first `start` tokens alone, as often as there are versions of what follows."""
    kept = DynamicCache()
    for number, layer in enumerate(cache.layers if start else ()):
        if layer.is_initialized:
            parts = (part[:, :, :start].expand(versions, -1, -1, -1) for part in (layer.keys, layer.values))
        else:  # below what was run; the decoder asks its first layer how many tokens there were
            parts = (torch.zeros(1, 1, start, 1) for _ in range(2))
        kept.update(*parts, number)
    return kept


def entry(decoder: nn.Module, run: Callable[[], object]) -> dict[str, Any]:
    """What a decoder is called with, by keyword, when `run` gets there; the forward ends with that."""
    called = {}

    def halt(module, args, kwargs):
        called.update(kwargs)
        raise _Stop(stopped)

    stopped = Captured()
    handle = decoder.register_forward_pre_hook(halt, with_kwargs=True)
    try:
        with suppress(_Stop):
            run()
    finally:
        handle.remove()
    return called


@contextmanager
def given(layers: Sequence[nn.Module], hidden: Hidden, bare: bool) -> Iterator[None]:
    """Let the last of these layers put out `hidden` and none of them be run; bare: as `Captured` has it.

    They stay in their places: a decoder looks up by a layer's place whether it sees the whole sequence or a window.
    """
    own = [layer.__dict__.get("forward") for layer in layers]  # accelerate puts its own there

    def puts_out(what: Hidden | None) -> Callable:
        return lambda x, *args, **kwargs: (x if what is None else what) if bare else (x if what is None else what,)

    try:
        for layer in layers:
            layer.forward = puts_out(hidden if layer is layers[-1] else None)
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            layer.__dict__.pop("forward", None)
            if before is not None:
                layer.forward = before
