"""Mix the tokens of many samples into batches, in the same order for any number of processes.

Hidden states stream from the model in parts: the chosen tokens of a few samples each. Part n is the same in every
process. So a few numbers (`Position`) say where a training stands, and the buffer's content can be computed again.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from datasets import IterableDataset
from jaxtyping import Float
from torch import Tensor

from lmm_sae_nb.model.hookpoints import Hookpoint, in_order, titled
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.prompts import Prompt
from lmm_sae_nb.model.samples import as_prompt, light, require_choice
from lmm_sae_nb.support.ahead import ahead
from lmm_sae_nb.support.images import UnreadableImage
from lmm_sae_nb.support.tensor_files import require_finite
from lmm_sae_nb.train.sample_parts import Converted, LeftOut, ShuffledParts, StreamedParts

BLOCK = 2  # part of the seed, so that samples and tokens are shuffled by different random numbers


class Position(NamedTuple):
    """Where a stream of batches stands; all numbers count from 0, over all processes.

    block: number of the buffer's filling that the next batch comes from.
    batch: number of the next batch in that block; with `repeats` it goes through the block several times.
    part: part of the stream in which the block starts.
    skip: tokens of that part before the block's start.
    """

    block: int = 0
    batch: int = 0
    part: int = 0
    skip: int = 0


START = Position()


class Prepared(NamedTuple):
    """The samples of a part, read and ready for the model.

    rows: number of a sample, to how its picture was converted.
    prompt: of them; None if there is none.
    faults: number of a sample whose picture cannot be read, or is refused by the processor, to the error.
    is_first_epoch: in later epochs a data stream has other numbers.
    """

    rows: dict[int, object]
    prompt: Prompt | None
    faults: dict[int, UnreadableImage]
    is_first_epoch: bool


class Stream:
    """The hidden states of the chosen tokens, part by part, epoch after epoch.

    lmm: computes the hidden states.
    samples: rows with `image`, `question` and `answer`, in a new random order each epoch; or a data stream, in its
        own order.
    layers: one or several, 0-based, or other hookpoints; their states stand side by side.
    kinds: kinds of token to keep.
    seed: of the order of samples.
    batch: samples per part.
    unreadable: "skip" leaves out samples whose picture cannot be read; "refuse" stops there.
    left_out: samples that are left out from the beginning; those that are found later are added.
    converted: samples whose pictures are known to be converted; others are added.
    workers: threads that read and process the next parts while the model computes one; each holds a part in memory.
    stride: the part after part n that is wanted is n + stride. Another one may be asked for, too.
    """

    def __init__(
        self,
        lmm: LMM,
        samples: Sequence[Mapping] | IterableDataset,
        layers: Hookpoint | Sequence[Hookpoint],
        kinds: Sequence[str],
        seed: int,
        batch: int,
        unreadable: str = "refuse",
        left_out: LeftOut | None = None,
        converted: Converted | None = None,
        workers: int = 0,
        stride: int = 1,
    ):
        require_choice(unreadable)
        self.lmm, self.kinds, self.unreadable = lmm, kinds, unreadable
        self.left_out = left_out or LeftOut(samples, {}, removed=False)
        self.converted = converted or Converted()
        self.layers = in_order([layers] if isinstance(layers, Hookpoint) else layers)
        self._widths = [lmm.width_at(layer) for layer in self.layers]
        streams = isinstance(samples, IterableDataset)
        self._parts = StreamedParts(samples, batch) if streams else ShuffledParts(samples, batch, seed, self.left_out)
        self.parts_an_epoch = self._parts.parts_an_epoch
        self._workers, self._stride = workers, stride
        self._ahead, self._next = None, -1

    def __call__(self, part: int) -> Float[Tensor, "tokens states"]:
        """Compute part n, (tokens, sum of the layers' widths), in the model's dtype.

        Raises:
            ValueError: a sample is wrong, all are unreadable, or a hidden state is not finite.
            UnreadableImage: a picture cannot be read, or the processor refuses it, with "refuse".
            OSError: files of the samples cannot be read.
        """
        prepared = self._prepared(part)
        for number, fault in prepared.faults.items():
            if prepared.is_first_epoch:
                self.left_out.add(number, fault)
            if self.unreadable == "refuse":
                raise fault
        if prepared.is_first_epoch:
            for number, converted in prepared.rows.items():
                self.converted.add(number, converted)
        if prepared.prompt is None:
            self._parts.require_some()
            return torch.empty(0, sum(self._widths), dtype=self.lmm.model.dtype, device=self.lmm.device)
        prompt, rows = prepared.prompt, prepared.rows
        hidden, mask = self.lmm.hidden_states(prompt, self.layers), prompt.mask(*self.kinds)
        tokens = {layer: hidden.pop(layer)[mask].to(self.lmm.device) for layer in self.layers}
        for layer, states in tokens.items():
            require_finite(states, f"hidden states of {titled(layer)}, samples {', '.join(map(str, rows))}")
        return torch.cat(list(tokens.values()), 1)

    def close(self) -> None:
        """End the threads."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _prepared(self, part: int) -> Prepared:
        """Return part n, and let the threads go on with the parts that follow it."""
        if self._ahead is None or self._next != part:
            self.close()
            tools = self.lmm.copies(self._workers) or [self.lmm]
            wanted = map(self._openers, itertools.count(part, self._stride))
            self._ahead = ahead(self._prepare, wanted, self._workers, tools)
        self._next = part + self._stride
        return next(self._ahead)

    def _openers(self, part: int) -> tuple[list, bool]:
        """Return the samples of a part, not yet read, and whether this is the first epoch."""
        return list(self._parts(part)), not getattr(self._parts, "epoch", 0)

    def _prepare(self, lmm: LMM, samples: list, is_first_epoch: bool) -> Prepared:
        """Read the samples of a part and process them; this is what the threads do."""
        rows, faults, prompt = {}, {}, None
        for number, read in samples:
            try:
                rows[number] = light(read)
            except UnreadableImage as fault:
                faults[number] = fault
                if self.unreadable == "refuse":
                    return Prepared({}, None, faults, is_first_epoch)
        while rows and prompt is None:
            try:
                prompt = as_prompt(lmm, rows)
            except UnreadableImage as fault:
                if fault.position is None:
                    raise
                del rows[number := [*rows][fault.position]]
                faults[number] = fault
                if self.unreadable == "refuse":
                    return Prepared({}, None, faults, is_first_epoch)
        return Prepared({n: row["converted"] for n, row in rows.items()}, prompt, faults, is_first_epoch)

    def by_layer(self, tokens: Float[Tensor, "tokens states"]) -> dict[Hookpoint, Float[Tensor, "tokens width"]]:
        """Divide what the stream returns into the states of each layer."""
        parts = tokens.split(self._widths, 1)
        return {
            layer: states.contiguous().to(self.lmm.device_of(layer))
            for layer, states in zip(self.layers, parts, strict=True)
        }


class _Part(NamedTuple):
    """A part of the stream; `states` is None if another process holds it."""

    number: int
    tokens: int
    states: Tensor | None


def mixed(
    stream: Callable[[int], Float[Tensor, "tokens width"]],
    parts_an_epoch: int,
    accelerator: Accelerator,
    *,
    buffer_tokens: int,
    batch_tokens: int,
    seed: int,
    repeats: int = 1,
    start: Position = START,
) -> Iterator[tuple[Float[Tensor, "local width"], Position]]:
    """Yield this process's tokens of each batch, and the position after the batch.

    A buffer is filled with the stream's next tokens, rounded down to whole batches. They are given out in random
    order until none is left, so every token is in one batch. With `repeats` the buffer is given out again, each time
    in another order. The tokens of a batch are the same for any number of processes. Each of n processes computes and
    keeps every n-th part, so hidden states never travel. Its tokens of a batch vary in number and can be none.

    stream: computes a part.
    parts_an_epoch: parts in an epoch.
    accelerator: knows the processes.
    buffer_tokens: capacity of the buffer, over all processes.
    batch_tokens: tokens per batch, over all processes.
    seed: of the random order.
    repeats: times that each token is given out, at least 1.
    start: position to continue from; its block is computed again.

    Raises:
        ValueError: the buffer is smaller than a batch, `repeats` is below 1, or an epoch has no token of the chosen
            kinds.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: each token is to be given out at least once; give 1 or more")
    if not 1 <= batch_tokens <= buffer_tokens:
        raise ValueError(
            f"batches of {batch_tokens} tokens from a buffer of {buffer_tokens}; make the buffer the larger"
        )
    length = buffer_tokens - buffer_tokens % batch_tokens
    batches = repeats * (length // batch_tokens)
    parts: deque[_Part] = deque()
    rounds = _rounds(stream, accelerator, start.part)
    parts.extend(next(rounds))
    nothing = next(part.states[:0] for part in parts if part.states is not None)  # for batches without local tokens
    position = start
    while True:
        while sum(part.tokens for part in parts) - position.skip < length:
            tried = parts[-1].number - position.part if parts else 0
            if tried >= parts_an_epoch and not any(part.tokens for part in parts):
                raise ValueError("no sample has a token of the chosen kinds; choose others")
            parts.extend(next(rounds))
        numbers = [(seed, BLOCK, position.block, *([turn] if turn else [])) for turn in range(repeats)]
        order = torch.from_numpy(np.concatenate([np.random.default_rng(each).permutation(length) for each in numbers]))
        pieces = _pieces(parts, position.skip, length)
        for batch in range(position.batch, batches):
            position = position._replace(batch=batch + 1)
            if batch + 1 == batches:
                position = _next_block(parts, position, length)
            here = _local_tokens(pieces, order[batch * batch_tokens : (batch + 1) * batch_tokens])
            yield torch.cat([nothing, *here]), position
        del pieces  # free their memory before the next block
        while parts and parts[0].number < position.part:
            parts.popleft()


def _rounds(stream: Callable[[int], Tensor], accelerator: Accelerator, first: int) -> Iterator[list[_Part]]:
    """Yield as many parts at a time as there are processes; process r computes parts r, r + n, ... from `first` on."""
    n, rank = accelerator.num_processes, accelerator.process_index
    for start in range(first - first % n, 2**63, n):
        states = stream(start + rank)
        states = states if start + rank >= first else states[:0]
        counts = accelerator.gather(torch.tensor([len(states)], device=accelerator.device)).tolist()
        yield [_Part(start + i, tokens, states if i == rank else None) for i, tokens in enumerate(counts)]


def _pieces(parts: Iterable[_Part], skip: int, length: int) -> list[tuple[int, Tensor]]:
    """Return this process's pieces of a block, each with its place in the block."""
    pieces, place = [], -skip
    for part in parts:
        if part.states is not None:
            piece = part.states[max(0, -place) : max(0, length - place)]
            pieces.append((max(place, 0), piece))
        place += part.tokens
    return pieces


def _local_tokens(pieces: list[tuple[int, Tensor]], places: Tensor) -> Iterator[Float[Tensor, "local width"]]:
    """Yield the tokens at these places of a block that this process holds, in order of place."""
    places = places.sort().values
    for start, piece in pieces:
        low, high = torch.searchsorted(places, torch.tensor([start, start + len(piece)])).tolist()
        yield piece[(places[low:high] - start).to(piece.device)]


def _next_block(parts: Iterable[_Part], position: Position, length: int) -> Position:
    """Return the position at which the block after this one starts."""
    left = position.skip + length
    for part in parts:
        if left < part.tokens or not left:
            break
        left -= part.tokens
    else:
        return Position(position.block + 1, 0, part.number + 1, left)
    return Position(position.block + 1, 0, part.number, left)
