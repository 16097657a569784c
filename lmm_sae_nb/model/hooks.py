"""Read, rewrite or stop at one module's output, cut its input short, share it, or leave layers out: context managers.

The only code that knows that a decoder layer may return its hidden states bare or as the first element of a
tuple (transformers has done both). Hooks live inside a `with` only, and go when it ends, by an error too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

Hidden = Float[Tensor, "batch tokens width"]


@dataclass
class Captured:
    """What a module put out: `value` is None before its first forward, then the latest hidden states.

    bare: whether they came as they are, or as the first element of a tuple.
    """

    value: Hidden | None = None
    bare: bool = True


class _Stop(Exception):
    """Ends a forward at the module of the `stop` that raised it."""

    def __init__(self, captured: Captured):
        self.captured = captured


def _hidden(output: Any) -> Hidden:
    return output[0] if isinstance(output, tuple) else output


def _with_hidden(output: Any, hidden: Hidden) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def _hooked(module: nn.Module, hook: Callable[[nn.Module, tuple, Any], Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def read(module: nn.Module) -> Iterator[Captured]:
    """Yield a `Captured` that holds the module's hidden states after each forward, not copied."""
    captured = Captured()

    def keep(module, args, output):
        captured.value, captured.bare = _hidden(output), not isinstance(output, tuple)

    with _hooked(module, keep):
        yield captured


@contextmanager
def rewrite(module: nn.Module, fn: Callable[[Hidden], Hidden]) -> Iterator[None]:
    """Replace the module's hidden states by `fn` of them, in every forward.

    The result must have the same shape, or hold the whole batch several times over, so that what follows runs on
    many versions while what came before ran once (ValueError otherwise). It is cast to the module's own dtype, so
    that a float32 SAE can be spliced into a bfloat16 model. Nested rewrites of one module apply outermost first.
    """

    def replace(module, args, output):
        hidden = _hidden(output)
        new = fn(hidden)
        if not isinstance(new, Tensor) or new.shape[1:] != hidden.shape[1:] or len(new) % len(hidden):
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"the rewriting function returned {got} for hidden states of shape {tuple(hidden.shape)}; "
                "return a tensor of that same shape, or several such batches one after the other"
            )
        return _with_hidden(output, new.to(hidden.dtype))

    with _hooked(module, replace):
        yield


@contextmanager
def stop(module: nn.Module) -> Iterator[Captured]:
    """Run a forward no further than this module: the `with` body ends there, the output in `.value`."""
    captured = Captured()

    def halt(module, args, output):
        captured.value, captured.bare = _hidden(output), not isinstance(output, tuple)
        raise _Stop(captured)

    with _hooked(module, halt):
        try:
            yield captured
        except _Stop as stopped:
            if stopped.captured is not captured:  # another `stop`, further out
                raise


@contextmanager
def truncate(decoder: nn.Module, tokens: int) -> Iterator[None]:
    """Let a decoder see only the first `tokens` tokens of what it is called with, by keyword, in every forward.

    Exact for causal attention: what comes later cannot change them.
    """

    def cut(module, args, kwargs):
        length = kwargs["inputs_embeds"].shape[1]
        axes = {"inputs_embeds": 1, "attention_mask": 1, "position_ids": -1}  # mrope: (3, batch, tokens)
        for name, axis in axes.items():
            value = kwargs.get(name)
            if isinstance(value, Tensor) and value.shape[axis] == length:
                kwargs[name] = value.narrow(axis, 0, min(tokens, length))
        return args, kwargs

    handle = decoder.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
