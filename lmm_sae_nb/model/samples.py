"""Read samples, turn them into prompts, and mark the tokens that an SAE learns from.

A sample is an image, a question and an answer, or a whole conversation with its images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import datasets
from datasets import IterableDataset
from PIL import Image

from lmm_sae_nb.model.conversations import as_turns, first_exchange
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.prompts import PORTION, Prompt
from lmm_sae_nb.model.sample_checks import COLUMNS, WHOLE, check_samples, row_fault
from lmm_sae_nb.model.templates import exchange
from lmm_sae_nb.support.conversions import conversions, count_conversions
from lmm_sae_nb.support.images import UnreadableImage, open_rgb

LARGE = PORTION // 4  # pixels of an image that is not kept
UNREADABLE = ("refuse", "skip")  # what to do with samples whose picture cannot be read
AGAIN = "restore the data set's files and run again: a training goes on from its last checkpoint"


class SampleReader:
    """Read samples by number, each with its picture as RGB; name what is wrong.

    samples: rows with `image`, `question` and `answer`, or with `images` and `conversation`; pictures of a data set are
        opened here, not by datasets.
    """

    def __init__(self, samples: Sequence[Mapping]):
        self._rows = undecoded(samples)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict:
        """Return a sample.

        Raises:
            ValueError: as `row_fault` says.
            UnreadableImage: its picture cannot be read.
            OSError: the data set's files cannot be read.
        """
        name = f"sample {number}"
        try:
            row = self._rows[number]
        except OSError as error:
            raise OSError(f"{name} cannot be read ({error}); {AGAIN}") from error
        return opened(row, name)


def undecoded(samples: Any) -> Any:
    """Return a data set with its columns of a sample, of which no picture is decoded; anything else as it is."""
    if not hasattr(samples, "select_columns"):
        return samples
    features = samples.features
    if features is None:
        return samples
    if "conversation" in features:
        samples = samples.select_columns(WHOLE)
        return samples.decode(False) if isinstance(samples, IterableDataset) else _Undecoded(samples)
    samples = samples.select_columns(COLUMNS)
    if isinstance(features["image"], datasets.Image):
        samples = samples.cast_column("image", datasets.Image(decode=False))
    return samples


class _Undecoded(Sequence):
    """The rows of a data set as they are stored. (To cast a column of lists would write the data set again.)"""

    def __init__(self, samples: datasets.Dataset):
        self._samples = samples
        self._tables = samples.with_format("arrow")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> dict:
        (row,) = self._tables[[number]].to_pylist()
        return row


def opened(row: Any, name: str) -> dict:
    """Return a row with its pictures as RGB; arguments and errors as `SampleReader`."""
    if fault := row_fault(row):
        raise ValueError(f"{name}: {fault}")
    if "conversation" in row:
        names = [f"{name}, image {n}," if len(row["images"]) > 1 else name for n in range(len(row["images"]))]
        return {
            "images": [_picture(image, each) for image, each in zip(row["images"], names, strict=True)],
            "conversation": row["conversation"],
        }
    image = None if row["image"] is None else _picture(row["image"], name)
    return {"image": image, "question": row["question"], "answer": row["answer"]}


def _picture(image: Any, name: str) -> Image.Image:
    try:
        if isinstance(image, Mapping) and image["bytes"] is None and "://" in image["path"]:
            image = datasets.Image().decode_example(image)  # of a stream, not on this machine
        return open_rgb(image, name)
    except UnreadableImage as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno is not None:  # the system's: the file is gone, or the disk fails
            raise OSError(f"{error.name} cannot be read ({cause}); {AGAIN}") from error
        raise


def pictures_of(row: Mapping) -> list:
    """Return the images of a sample; none, one or several."""
    if "conversation" in row:
        return list(row["images"])
    return [] if row["image"] is None else [row["image"]]


def prompts(lmm: LMM, samples: Sequence[Mapping], order: Iterable[int], batch: int) -> Iterator[Prompt]:
    """Yield samples as prompts with answers, as in supervised fine-tuning, a batch at a time.

    lmm: formats and processes them.
    samples: rows with `image` (PIL or None), `question` and `answer`, or with `images` and `conversation`.
    order: numbers of the samples, in the order to yield them.
    batch: samples per prompt.

    Raises:
        ValueError: a sample is wrong, or the model cannot take it; the message names it.
        UnreadableImage: a picture cannot be read.
        OSError: files of the samples cannot be read.
    """
    order, reader = list(order), SampleReader(samples)
    for start in range(0, len(order), batch):
        wanted = order[start : start + batch]
        yield as_prompt(lmm, {number: light(partial(reader.__getitem__, number)) for number in wanted})


def light(read: Callable[[], dict]) -> dict:
    """Read a sample, and say as `converted` what was done to its images.

    A large image is opened again when it is needed, for a batch of photographs takes gigabytes.
    """
    row = read()
    images = pictures_of(row)
    done = tuple(dict.fromkeys(each for image in images for each in conversions(image)))
    kept = [image if _small(image) else partial(_again, read, n) for n, image in enumerate(images)]
    if "conversation" in row:
        return row | {"images": kept, "converted": done}
    return row | {"image": kept[0] if kept else None, "converted": done}


def _small(image: Image.Image) -> bool:
    return image.width * image.height <= LARGE


def _again(read: Callable[[], dict], number: int) -> Image.Image:
    return pictures_of(read())[number]


def as_prompt(lmm: LMM, rows: Mapping[int, Mapping]) -> Prompt:
    """Return rows, by number, as a prompt with answers.

    Raises:
        UnreadableImage: an image cannot be read, or the processor refuses it; `position` is that of its row.
        ValueError: the model cannot take a row; the message names it.
    """
    try:
        return _prompt(lmm, rows.values())
    except UnreadableImage as fault:
        if fault.position is not None and not fault.name.startswith(name := f"sample {[*rows][fault.position]}"):
            named = type(fault)(f"{name}: {fault.name}", fault.reason)
            named.position = fault.position
            raise named from fault
        raise
    except ValueError:
        for number, row in rows.items():
            try:
                _prompt(lmm, [row])
            except ValueError as error:
                raise ValueError(f"sample {number}: {error}") from error
        raise


def _prompt(lmm: LMM, rows: Iterable[Mapping]) -> Prompt:
    rows = list(rows)
    turns = [
        as_turns(row["conversation"])
        if "conversation" in row
        else exchange(row["question"], row["image"], row["answer"])
        for row in rows
    ]
    return lmm.conversations(turns, [pictures_of(row) for row in rows])


def readable(
    samples: Sequence[Mapping], unreadable: str = "skip", lmm: LMM | None = None
) -> tuple[Sequence[Mapping], dict[int, str], dict[str, int]]:
    """Return the samples whose picture can be read, the number and fault of each other one, and how many pictures are
    converted to 8-bit RGB (`count_conversions`).

    Every picture is opened once; for few samples, such as held-out ones.

    unreadable: "skip", or "refuse" to raise the first fault.
    lmm: with "skip", samples whose picture its processor refuses are left out, too.

    Raises:
        ValueError: a sample is wrong, no picture can be read, or `unreadable` is something else.
        UnreadableImage: a picture cannot be read, with "refuse".
    """
    require_choice(unreadable)
    check_samples(samples)
    reader, skipped, converted = SampleReader(samples), {}, []
    for number in range(len(samples)):
        try:
            row = light(partial(reader.__getitem__, number))
            if lmm and unreadable == "skip":
                as_prompt(lmm, {number: row})
        except UnreadableImage as fault:
            if unreadable == "refuse":
                raise
            skipped[number] = f"{fault.name}: {fault.reason}"
        else:
            converted.append(row["converted"])
    kept = [number for number in range(len(samples)) if number not in skipped]
    if skipped and not kept:
        raise ValueError(f"no sample can be read, {len(skipped)} were skipped: {skipped[0]}; give others")
    if not skipped:
        return samples, {}, count_conversions(converted)
    left = samples.select(kept) if hasattr(samples, "select") else [samples[n] for n in kept]
    return left, skipped, count_conversions(converted)


def require_choice(unreadable: str) -> None:
    """Raise ValueError unless it says what to do with unreadable samples."""
    if unreadable not in UNREADABLE:
        raise ValueError(f"unreadable is {unreadable!r}; choose one of {' and '.join(map(repr, UNREADABLE))}")


def examples(samples: Sequence[Mapping], n: int) -> list[dict]:
    """Return the first n samples with a readable picture, to show; all samples with one if there are fewer.

    samples: rows, or a saved data set, of which only these pictures are decoded.
    """
    found, reader = [], SampleReader(samples)
    for number in range(len(reader)):
        try:
            row = reader[number]
        except UnreadableImage:
            continue
        if pictures_of(row):
            found.append(row)
        if len(found) == n:
            break
    return found


class FirstTurns(Sequence):
    """The first question of each conversation, with its image and its answer, as samples of one turn.

    The image is None if several come before the answer: the question is not of one alone.

    conversations: rows with `images` and `conversation`.
    """

    def __init__(self, conversations: Sequence[Mapping]):
        self.conversations = conversations
        self._rows = undecoded(conversations)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict:
        if not 0 <= number < len(self):
            raise IndexError(f"no sample {number}: there are {len(self)}")
        row = self._rows[number]
        if fault := row_fault(row):
            raise ValueError(f"sample {number}: {fault}")
        question, answer, images = first_exchange(row["conversation"])
        image = _picture(row["images"][0], f"sample {number}") if images == 1 else None
        return {"image": image, "question": question, "answer": answer}

    def select(self, numbers: Iterable[int]) -> FirstTurns:
        """Return some of the samples."""
        numbers = list(numbers)
        known = self.conversations
        return FirstTurns(known.select(numbers) if hasattr(known, "select") else [known[n] for n in numbers])

    def pictured(self) -> FirstTurns:
        """Return the samples with an image."""
        turns = self.conversations
        if hasattr(turns, "select_columns"):
            turns = turns.select_columns(["conversation"])  # no picture is read
        return self.select(n for n in range(len(self)) if first_exchange(turns[n]["conversation"])[2] == 1)


def first_turns(samples: Sequence[Mapping]) -> Sequence[Mapping]:
    """Return samples as one image, one question and one answer each; those that are so already as they are."""
    columns = getattr(samples, "column_names", None) or (samples[0] if len(samples) else ())
    return FirstTurns(samples) if "conversation" in columns else samples


def pictured(samples: Sequence[Mapping]) -> Sequence[Mapping]:
    """Return the samples that have an image, for models that need one, such as InstructBLIP.

    samples: rows with `image`, or a saved data set, of which no picture is decoded; or `first_turns` of conversations.
    """
    if isinstance(samples, FirstTurns):
        return samples.pictured()
    if not hasattr(samples, "with_format"):
        return [row for row in samples if row["image"] is not None]
    known = samples.select_columns(["image"]).with_format("arrow")
    return samples.select([n for n in range(len(samples)) if known[n]["image"][0].is_valid])
