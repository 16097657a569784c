"""Read, rewrite or stop at the output of one module, record or cut its input: context managers.

Only this file knows that a module may return its hidden states alone or as the first element of a tuple (transformers
has done both), and in one row for all samples. A hook lives inside its `with` only, also when an error ends it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from lmm_sae_nb.model.decoder_arguments import looks_back_only, narrowed, unknown

Hidden = Float[Tensor, "batch tokens width"]


@dataclass
class Captured:
    """The output of a module.

    value: the latest hidden states; None before the first forward pass.
    bare: whether they were returned alone, not as the first element of a tuple.
    """

    value: Hidden | None = None
    bare: bool = True

    def keep(self, args: tuple, output: Any) -> None:
        """Take in an output of the module; args: what it was called with."""
        self.value, self.bare = _hidden(args, output), not isinstance(output, tuple)


class _Stop(Exception):
    """Ends a forward pass at the module of the `stop` that raised it."""

    def __init__(self, captured: Captured):
        self.captured = captured


def _hidden(args: tuple, output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
    if hidden.ndim == 2 and args and args[0].ndim == 3:  # a mixture of experts lays all samples in one row
        hidden = hidden.unflatten(0, args[0].shape[:2])
    return hidden


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    if (output[0] if isinstance(output, tuple) else output).ndim < hidden.ndim:
        hidden = hidden.flatten(0, 1)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def _hooked(module: nn.Module, hook: Callable[[nn.Module, tuple, Any], Any], *, first: bool = False) -> Iterator[None]:
    handle = module.register_forward_hook(hook, prepend=first)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _pre_hooked(module: nn.Module, hook: Callable[[nn.Module, tuple, dict], Any]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def read(module: nn.Module) -> Iterator[Captured]:
    """Yield a `Captured` that holds the module's hidden states after each forward pass, not copied."""
    captured = Captured()
    with _hooked(module, lambda module, args, output: captured.keep(args, output)):
        yield captured


@contextmanager
def rewrite(module: nn.Module, fn: Callable[[Hidden], Hidden], *, first: bool = False) -> Iterator[None]:
    """Replace the module's hidden states by `fn` of them, in every forward pass.

    Nested rewrites of one module apply outermost first; with `first`, innermost first.

    fn: returns states of the same shape, or the whole batch several times over: what follows then runs on many
        versions, what came before on one. They are cast to the module's dtype, so that a float32 SAE can be
        spliced into a bfloat16 model.
    first: rewrite before the hooks that are there already, so that they see the new states. A vision tower records its
        states by such hooks, and the model reads the record.

    Raises:
        ValueError: fn returns another shape.
    """

    def replace(module, args, output):
        hidden = _hidden(args, output)
        new = fn(hidden)
        if not isinstance(new, Tensor) or new.shape[1:] != hidden.shape[1:] or len(new) % len(hidden):
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"the rewriting function returned {got} for hidden states of shape {tuple(hidden.shape)}; "
                "return a tensor of that same shape, or several such batches one after the other"
            )
        return _with_hidden(output, new.to(hidden.dtype))

    with _hooked(module, replace, first=first):
        yield


@contextmanager
def stop(module: nn.Module) -> Iterator[Captured]:
    """End a forward pass after this module, and with it the body of the `with`; yield a `Captured` of the output."""
    captured = Captured()

    def halt(module, args, output):
        captured.keep(args, output)
        raise _Stop(captured)

    with _hooked(module, halt):
        try:
            yield captured
        except _Stop as stopped:
            if stopped.captured is not captured:  # another `stop`, further out
                raise


@contextmanager
def read_input(module: nn.Module) -> Iterator[Captured]:
    """Yield a `Captured` that holds the hidden states that the module was given last, not copied."""
    captured = Captured()

    def keep(module, args, kwargs):
        captured.value = args[0] if args else kwargs["hidden_states"]

    with _pre_hooked(module, keep):
        yield captured


@contextmanager
def give(module: nn.Module, hidden: Hidden) -> Iterator[None]:
    """Give a module these hidden states instead of its own, in every forward pass."""

    def replace(module, args, kwargs):
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    with _pre_hooked(module, replace):
        yield


@contextmanager
def read_embeddings(decoder: nn.Module, *, end: bool = False) -> Iterator[Captured]:
    """Yield a `Captured` that holds the embeddings of text and images that a decoder was given last, not copied.

    end: end the forward pass there, and with it the body of the `with`.
    """
    captured = Captured()

    def keep(module, args, kwargs):
        captured.value = kwargs["inputs_embeds"]
        if end:
            raise _Stop(captured)

    with _pre_hooked(decoder, keep):
        try:
            yield captured
        except _Stop as stopped:
            if stopped.captured is not captured:
                raise


@contextmanager
def rewrite_embeddings(decoder: nn.Module, fn: Callable[[Hidden], Hidden]) -> Iterator[None]:
    """Replace the embeddings of text and images that a decoder is given by `fn` of them, in every forward pass.

    fn: returns embeddings of the same shape.

    Raises:
        ValueError: fn returns another shape.
    """

    def replace(module, args, kwargs):
        hidden = kwargs["inputs_embeds"]
        new = fn(hidden)
        if new.shape != hidden.shape:
            raise ValueError(
                f"the rewriting function returned {tuple(new.shape)} for embeddings of shape {tuple(hidden.shape)}; "
                "return a tensor of that same shape"
            )
        return args, kwargs | {"inputs_embeds": new.to(hidden.dtype)}

    with _pre_hooked(decoder, replace):
        yield


@contextmanager
def record_arguments(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield a dictionary that holds the keyword arguments of the module's latest call, not copied."""
    recorded = {}

    def record(module, args, kwargs):
        recorded.clear()
        recorded.update(kwargs)

    with _pre_hooked(module, record):
        yield recorded


@contextmanager
def fewer_rows(module: nn.Module, first_equal: Callable[[Tensor], Int64[Tensor, " rows"]]) -> Iterator[None]:
    """Run a module on some rows of its first argument only, and repeat its output, in every forward pass.

    module: returns a `ModelOutput` whose tensors have a row for each row of the argument. It runs on all rows if it
        is called with further tensors.
    first_equal: gives for each row the number of the row whose output it gets.
    """
    places = []

    def fewer(module, args, kwargs):
        rows = args[0] if args else kwargs[module.main_input_name]
        if any(isinstance(value, Tensor) for value in kwargs.values() if value is not rows):
            places.append(None)  # the sizes of images, for example: such a tower does not treat each row alone
            return args, kwargs
        kept, place = first_equal(rows).to(rows.device).unique(return_inverse=True)
        places.append(place if len(kept) < len(rows) else None)
        if places[-1] is None:
            return args, kwargs
        return ((rows[kept], *args[1:]), kwargs) if args else (args, kwargs | {module.main_input_name: rows[kept]})

    def repeat(module, args, output):
        def repeated(value):
            return tuple(map(repeated, value)) if isinstance(value, tuple) else value if value is None else value[place]

        if (place := places.pop()) is not None:
            for name, value in output.items():
                output[name] = repeated(value)
        return output

    with _pre_hooked(module, fewer), _hooked(module, repeat):
        yield


@contextmanager
def truncate(decoder: nn.Module, tokens: int) -> Iterator[None]:
    """Give a decoder only the first `tokens` tokens of its keyword arguments, in every forward pass.

    This is exact: attention is causal, so later tokens cannot change earlier ones. Where it is not causal (PaliGemma's
    image sees the question), or an argument cannot be cut, the decoder gets all tokens.
    """

    def cut(module, args, kwargs):
        if unknown(kwargs) or not looks_back_only(kwargs.get("attention_mask"), tokens):
            return args, kwargs
        return args, narrowed(kwargs, slice(0, tokens))

    with _pre_hooked(decoder, cut):
        yield
