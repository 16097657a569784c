"""The samples of each part of a training: in a new random order each epoch, or in the order of a data stream.

Samples whose picture cannot be read are left out if the user wants that (`LeftOut`). They keep their numbers, so the
order of all others stays the same, also after their rows are taken out of the data set.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import IterableDataset

from lmm_sae_nb.model.data_identity import data_fingerprint
from lmm_sae_nb.model.samples import SampleReader, opened, undecoded
from lmm_sae_nb.support.conversions import CONVERSIONS, count_conversions
from lmm_sae_nb.support.images import UnreadableImage

EPOCH = 1  # part of the seed, so that samples and tokens are shuffled by different random numbers
PATIENCE = 10_000  # parts of a data stream without a token, after which it counts as empty

Openers = Iterator[tuple[int, Callable[[], dict]]]  # numbers of samples, and calls that read them


class LeftOut:
    """The samples that a training leaves out because their pictures cannot be read.

    samples: of the training.
    faults: number of a sample to the name and fault of its picture, so far.
    removed: the samples in `faults` have been taken out of `samples` since; the others keep their old numbers.
    """

    def __init__(self, samples: Sequence[Mapping] | IterableDataset, faults: Mapping[int, str], removed: bool):
        self._samples, self.faults, self.removed = samples, dict(faults), removed
        self._new: dict[int, str] = {}
        self._left: tuple[int, str] | None = None

    def add(self, number: int, fault: UnreadableImage) -> None:
        """Leave out a sample."""
        self.faults[number] = self._new[number] = f"{fault.name}: {fault.reason}"

    def gather(self, accelerator: Accelerator) -> None:
        """Tell every process what the others have left out since the last call; all must call it."""
        new, self._new = self._new, {}
        self.faults |= dict(gathered_objects(accelerator, new.items()))

    def record(self) -> dict[str, object]:
        """Return what a checkpoint and a history say of them; nothing if there are none.

        `samples_left` is the fingerprint that the data have without these samples.
        """
        if not self.faults:
            return {}
        if self._left is None or self._left[0] != len(self.faults):
            gone = () if self.removed or isinstance(self._samples, IterableDataset) else self.faults
            self._left = len(self.faults), data_fingerprint(self._samples, gone)
        return {"skipped": {str(n): self.faults[n] for n in sorted(self.faults)}, "samples_left": self._left[1]}


class Converted:
    """The samples of a training whose pictures were converted to 8-bit RGB.

    numbers: of samples, by what was done (`CONVERSIONS`).
    """

    def __init__(self, numbers: Mapping[str, Iterable[int]] = MappingProxyType({})):
        self._numbers = {kind: set(each) for kind, each in numbers.items()}
        self._new: list[tuple[int, tuple[str, ...]]] = []

    def add(self, number: int, done: tuple[str, ...]) -> None:
        """Note what was done to the picture of a sample, however often it is read."""
        if done and not all(number in self._numbers.get(kind, ()) for kind in done):
            self._note(number, done)
            self._new.append((number, done))

    def _note(self, number: int, done: Iterable[str]) -> None:
        for kind in done:
            self._numbers.setdefault(kind, set()).add(number)

    def gather(self, accelerator: Accelerator) -> None:
        """Tell every process what the others have noted since the last call; all must call it."""
        new, self._new = self._new, []
        for number, done in gathered_objects(accelerator, new):
            self._note(number, done)

    @property
    def counts(self) -> dict[str, int]:
        """How many pictures were converted, as `count_conversions` says it."""
        done: dict[int, list[str]] = {}
        for kind, numbers in self._numbers.items():
            for number in numbers:
                done.setdefault(number, []).append(kind)
        return count_conversions(done.values())

    def record(self) -> dict[str, object]:
        """Return what a checkpoint says of them; nothing if there are none."""
        numbers = {kind: sorted(self._numbers[kind]) for kind in CONVERSIONS if kind in self._numbers}
        return {"converted": numbers} if numbers else {}


def gathered_objects(accelerator: Accelerator, new: Collection) -> list:
    """Return the elements of all processes, which may be none; all processes must call it."""
    if accelerator.num_processes == 1:
        return list(new)
    count = accelerator.reduce(torch.tensor(len(new), device=accelerator.device))
    return [each for part in gather_object([list(new)]) for each in part] if int(count) else []


class ShuffledParts:
    """The parts of samples that have numbers: a new random order each epoch.

    batch: samples per part.
    seed: of the order.
    """

    def __init__(self, samples: Sequence[Mapping], batch: int, seed: int, left_out: LeftOut):
        self._reader, self._batch, self._seed, self._left_out = SampleReader(samples), batch, seed, left_out
        self._removed = sorted(left_out.faults) if left_out.removed else []
        self.count = len(samples) + len(self._removed)
        self.parts_an_epoch = -(-self.count // batch)

    def __call__(self, part: int) -> Openers:
        """Yield the samples of a part that are not left out.

        Raises:
            ValueError: as `require_some`.
        """
        self.require_some()
        epoch, place = divmod(part, self.parts_an_epoch)
        order = np.random.default_rng((self._seed, EPOCH, epoch)).permutation(self.count)
        for number in order[place * self._batch : (place + 1) * self._batch].tolist():
            if number not in self._left_out.faults:
                row = number - sum(gone < number for gone in self._removed)
                yield number, lambda row=row: self._reader[row]

    def require_some(self) -> None:
        """Raise ValueError if all samples are left out."""
        if len(self._left_out.faults) == self.count:
            raise ValueError(
                f"none of {self.count} samples can be read; the first is {next(iter(self._left_out.faults.values()))}. "
                "Give other samples"
            )


class StreamedParts:
    """The parts of a data stream, epoch after epoch, in its own order; `samples.shuffle(...)` gives it another.

    To go on from a part, the rows before it are read once more, without opening their pictures.
    """

    parts_an_epoch = PATIENCE

    def __init__(self, samples: IterableDataset, batch: int):
        self._samples, self._batch = undecoded(samples), batch
        self._next, self.epoch, self._rows = 0, -1, iter(())

    def __call__(self, part: int) -> Openers:
        """Yield the samples of a part, numbered within their epoch.

        Raises:
            ValueError: the stream is empty.
        """
        if part < self._next:
            self._next, self.epoch, self._rows = 0, -1, iter(())
        while self._next <= part:
            rows = self._take()
            self._next += 1
        for number, row in rows:
            yield number, lambda number=number, row=row: opened(row, f"sample {number}")

    def require_some(self) -> None:
        """Do nothing: a stream is endless, and `mixed` has a limit of parts without a token."""

    def _take(self) -> list[tuple[int, Mapping]]:
        if rows := list(itertools.islice(self._rows, self._batch)):
            return rows
        self.epoch += 1
        self._samples.set_epoch(self.epoch)  # a shuffled stream then comes in another order
        self._rows = enumerate(self._samples)
        if rows := list(itertools.islice(self._rows, self._batch)):
            return rows
        raise ValueError("the stream of samples is empty; give another one")
