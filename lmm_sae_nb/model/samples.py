"""Read samples (image, question, answer), turn them into prompts, and mark the tokens that an SAE learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
from datasets import IterableDataset

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.prompts import PORTION, Prompt
from lmm_sae_nb.model.sample_checks import COLUMNS, check_samples, row_fault
from lmm_sae_nb.support.conversions import conversions, count_conversions
from lmm_sae_nb.support.images import UnreadableImage, open_rgb

LARGE = PORTION // 4  # pixels of an image that is not kept
UNREADABLE = ("refuse", "skip")  # what to do with samples whose picture cannot be read
AGAIN = "restore the data set's files and run again: a training goes on from its last checkpoint"


class SampleReader:
    """Read samples by number, each with its picture as RGB; name what is wrong.

    samples: rows with `image`, `question` and `answer`; pictures of a data set are opened here, not by datasets.
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
    """Return a data set with its three columns, of which no picture is decoded; anything else as it is."""
    if not hasattr(samples, "select_columns"):
        return samples
    features = samples.features
    if features is not None:
        samples = samples.select_columns(COLUMNS)
        if isinstance(features["image"], datasets.Image):
            samples = samples.cast_column("image", datasets.Image(decode=False))
    return samples


def opened(row: Any, name: str) -> dict:
    """Return a row with its picture as RGB; arguments and errors as `SampleReader`."""
    if fault := row_fault(row):
        raise ValueError(f"{name}: {fault}")
    image = row["image"]
    if image is None:
        return {column: row[column] for column in COLUMNS}
    try:
        if isinstance(image, Mapping) and image["bytes"] is None and "://" in image["path"]:
            image = datasets.Image().decode_example(image)  # of a stream, not on this machine
        return {"image": open_rgb(image, name), "question": row["question"], "answer": row["answer"]}
    except UnreadableImage as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno is not None:  # the system's: the file is gone, or the disk fails
            raise OSError(f"{error.name} cannot be read ({cause}); {AGAIN}") from error
        raise


def prompts(lmm: LMM, samples: Sequence[Mapping], order: Iterable[int], batch: int) -> Iterator[Prompt]:
    """Yield samples as prompts with answers, as in supervised fine-tuning, a batch at a time.

    lmm: formats and processes them.
    samples: rows with `image` (PIL or None), `question` and `answer`.
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
    """Read a sample, and say as `converted` what was done to its image.

    A large image is opened again when it is needed, for a batch of photographs takes gigabytes.
    """
    row = read()
    image = row["image"]
    row["converted"] = () if image is None else conversions(image)
    if image is None or image.width * image.height <= LARGE:
        return row
    return row | {"image": lambda: read()["image"]}


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
    questions, images, answers = ([row[column] for row in rows] for column in ("question", "image", "answer"))
    return lmm.prompt(questions, images, answers=answers)


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
        if row["image"] is not None:
            found.append(row)
        if len(found) == n:
            break
    return found


def pictured(samples: Sequence[Mapping]) -> Sequence[Mapping]:
    """Return the samples that have an image, for models that need one, such as InstructBLIP.

    samples: rows, or a saved data set, of which no picture is decoded.
    """
    if not hasattr(samples, "with_format"):
        return [row for row in samples if row["image"] is not None]
    known = samples.select_columns(["image"]).with_format("arrow")
    return samples.select([n for n in range(len(samples)) if known[n]["image"][0].is_valid])


def data_fingerprint(samples: Sequence[Mapping] | IterableDataset, without: Collection[int] = ()) -> str:
    """Return a SHA-256 of the number of samples and of up to 16 whole samples, spread evenly over the data set.

    Pictures count by their pixels. One that cannot be read counts as that, so that the same data have the same
    fingerprint whether or not it is skipped. Of a stream the first 16 samples count.

    without: numbers of samples that do not count, so that data have the fingerprint that they have once these rows
        are removed.
    """
    digest = hashlib.sha256()
    if isinstance(samples, IterableDataset):
        rows = [(place, row) for place, row in enumerate(undecoded(samples).take(16))]
        digest.update(b"a stream")
    else:
        kept = len(samples) - len(without)
        places = np.linspace(0, kept - 1, min(16, kept), dtype=int).tolist()
        for number in sorted(without):
            places = [place + (place >= number) for place in places]
        known = undecoded(samples)
        rows = [(place, known[place]) for place in places]
        digest.update(str(kept).encode())
    for place, row in rows:
        try:
            image = opened(row, f"sample {place}")["image"]
            pixels = b"" if image is None else image.tobytes()
        except UnreadableImage:
            pixels = b"unreadable"
        digest.update(repr((row["question"], row["answer"], len(pixels))).encode() + pixels)
    return digest.hexdigest()
