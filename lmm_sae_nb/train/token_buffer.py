"""Tokens to train on: hidden states stream from the model, in one order for any number of processes, and mix.

The stream is a sequence of parts, the chosen tokens of a few samples each. Part n is the same whoever computes it,
so where a training stands is a handful of numbers (`Position`), and what the buffer held can be computed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.samples import prompts, token_mask
from lmm_sae_nb.support.tensor_files import require_finite

EPOCH, BLOCK = 1, 2  # what a shuffle is of: the same seed gives each its own random numbers


class Position(NamedTuple):
    """Where a stream of batches stands; every number counts from 0 and over all processes."""

    block: int = 0  # filling of the buffer that the next batch comes from
    batch: int = 0  # the next batch of that block
    part: int = 0  # part of the stream in which the block starts,
    skip: int = 0  # after so many of its tokens


START = Position()


class Stream:
    """The chosen kinds of hidden states of one layer or several, a part (`batch` samples) at a time, epoch after epoch.

    Samples come in a new random order each epoch. `stream(n)` computes part n, (tokens, layers * width) in the model's
    dtype, each layer's states beside the next one's; ValueError if a hidden state is not finite. A layer that is named
    twice is there once.
    """

    def __init__(
        self,
        lmm: LMM,
        samples: Sequence[Mapping],
        layers: int | Sequence[int],
        kinds: Sequence[str],
        seed: int,
        batch: int,
    ):
        self.lmm, self.samples, self.kinds, self.seed, self.batch = lmm, samples, kinds, seed, batch
        self.layers = sorted({layers} if isinstance(layers, int) else set(layers))
        self.parts_an_epoch = -(-len(samples) // batch)

    def __call__(self, part: int) -> Float[Tensor, "tokens states"]:
        epoch, place = divmod(part, self.parts_an_epoch)
        order = np.random.default_rng((self.seed, EPOCH, epoch)).permutation(len(self.samples))
        wanted = order[place * self.batch : (place + 1) * self.batch].tolist()
        (prompt,) = prompts(self.lmm, self.samples, wanted, self.batch)
        hidden, mask = self.lmm.hidden_states(prompt, self.layers), token_mask(prompt, self.kinds)
        tokens = {layer: hidden.pop(layer)[mask] for layer in self.layers}
        for layer, states in tokens.items():
            require_finite(states, f"hidden states of layer {layer}, samples {', '.join(map(str, wanted))}")
        return torch.cat(list(tokens.values()), 1)

    def by_layer(self, tokens: Float[Tensor, "tokens states"]) -> dict[int, Float[Tensor, "tokens width"]]:
        """The states of each layer alone."""
        parts = tokens.split(self.lmm.width, 1)
        return {layer: states.contiguous() for layer, states in zip(self.layers, parts, strict=True)}


class _Part(NamedTuple):
    number: int
    tokens: int
    own: Tensor | None  # None if another process holds it


def mixed(
    stream: Callable[[int], Float[Tensor, "tokens width"]],
    parts_an_epoch: int,
    accelerator: Accelerator,
    *,
    buffer_tokens: int,
    batch_tokens: int,
    seed: int,
    start: Position = START,
) -> Iterator[tuple[Float[Tensor, "own width"], Position]]:
    """This process's share of each batch, and the position after it; `start` at a position to go on from there.

    A buffer is filled with the stream's next `buffer_tokens` tokens (rounded down to whole batches), which are dealt
    out in random order until none is left: every token is in one batch, and all processes together hold
    `batch_tokens` of them. Each process computes and keeps every n-th part, so hidden states never travel; shares
    differ a little in size, and may be empty. The tokens of a batch are the same for any number of processes.
    To go on from a position costs computing its block again.
    ValueError if the buffer holds less than a batch, or an epoch of parts holds no token at all.
    """
    if not 1 <= batch_tokens <= buffer_tokens:
        raise ValueError(
            f"batches of {batch_tokens} tokens from a buffer of {buffer_tokens}; make the buffer the larger"
        )
    length = buffer_tokens - buffer_tokens % batch_tokens
    parts: deque[_Part] = deque()
    rounds = _rounds(stream, accelerator, start.part)
    parts.extend(next(rounds))
    nothing = next(part.own[:0] for part in parts if part.own is not None)  # the share of who holds none of a batch
    position = start
    while True:
        while sum(part.tokens for part in parts) - position.skip < length:
            tried = parts[-1].number - position.part if parts else 0
            if tried >= parts_an_epoch and not any(part.tokens for part in parts):
                raise ValueError("no sample has a token of the chosen kinds; choose others")
            parts.extend(next(rounds))
        order = torch.from_numpy(np.random.default_rng((seed, BLOCK, position.block)).permutation(length))
        pieces = _pieces(parts, position.skip, length)
        for batch in range(position.batch, length // batch_tokens):
            position = position._replace(batch=batch + 1)
            if batch + 1 == length // batch_tokens:
                position = _next_block(parts, position, length)
            own = _deal(pieces, order[batch * batch_tokens : (batch + 1) * batch_tokens])
            yield torch.cat([nothing, *own]), position
        del pieces  # the parts go before the next block's come
        while parts and parts[0].number < position.part:
            parts.popleft()


def _rounds(stream: Callable[[int], Tensor], accelerator: Accelerator, first: int) -> Iterator[list[_Part]]:
    """As many parts at a time as there are processes, r, r + n, ... by process r; those before `first` are emptied."""
    n, rank = accelerator.num_processes, accelerator.process_index
    for start in range(first - first % n, 2**63, n):
        own = stream(start + rank)
        own = own if start + rank >= first else own[:0]
        counts = accelerator.gather(torch.tensor([len(own)], device=accelerator.device)).tolist()
        yield [_Part(start + i, tokens, own if i == rank else None) for i, tokens in enumerate(counts)]


def _pieces(parts: Iterable[_Part], skip: int, length: int) -> list[tuple[int, Tensor]]:
    """What this process holds of a block, each piece with its place there."""
    pieces, place = [], -skip
    for part in parts:
        if part.own is not None:
            piece = part.own[max(0, -place) : max(0, length - place)]
            pieces.append((max(place, 0), piece))
        place += part.tokens
    return pieces


def _deal(pieces: list[tuple[int, Tensor]], places: Tensor) -> Iterator[Float[Tensor, "own width"]]:
    """The tokens at these places of a block, as far as they are here, in order of place."""
    places = places.sort().values
    for start, piece in pieces:
        low, high = torch.searchsorted(places, torch.tensor([start, start + len(piece)])).tolist()
        yield piece[(places[low:high] - start).to(piece.device)]


def _next_block(parts: Iterable[_Part], position: Position, length: int) -> Position:
    """Where the block after this one starts."""
    left = position.skip + length
    for part in parts:
        if left < part.tokens or not left:
            break
        left -= part.tokens
    else:
        return Position(position.block + 1, 0, part.number + 1, left)
    return Position(position.block + 1, 0, part.number, left)
