"""Find out cheaply whether samples are the same as before, so that a training does not go on with others."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import IterableDataset
from PIL import Image

from lmm_sae_nb.model.samples import FirstTurns, opened, pictures_of, undecoded
from lmm_sae_nb.support.files import LARGE, fingerprint
from lmm_sae_nb.support.images import UnreadableImage

TEXTS = ("question", "answer", "conversation")  # columns
WHOLE = 16  # samples whose pixels count in any case


def data_fingerprint(samples: Sequence[Mapping] | IterableDataset, without: Collection[int] = ()) -> str:
    """Return a SHA-256 of the texts and pictures of samples.

    All texts count. How much of the pictures counts depends on what it costs:

    - of a data set or a list, the content of every picture, if together they have at most `LARGE` bytes: the stored
      bytes of a data set and of files, which are not decoded, or the pixels of pictures in memory;
    - of a larger one, the number of bytes of each stored picture, or width and height of each in memory. A picture
      that is replaced by another one of the same size is not seen;
    - of samples that are made by a call, width and height.

    In addition, the pixels of 16 samples count, spread evenly. Of a stream only its first 16 samples count. The place
    and the time of a file do not count, so data may be copied.

    A picture that cannot be read counts as that, so that the same data have the same fingerprint whether or not it is
    skipped.

    without: numbers of samples that do not count, so that data have the fingerprint that they have once these rows
        are removed.
    """
    if isinstance(samples, FirstTurns):  # it would decode every picture
        return hashlib.sha256(b"first turns" + data_fingerprint(samples.conversations, without).encode()).hexdigest()
    digest = hashlib.sha256()
    if isinstance(samples, IterableDataset):
        rows = list(enumerate(undecoded(samples).take(WHOLE)))
        digest.update(b"a stream")
    else:
        gone = set(without)
        numbers = [number for number in range(len(samples)) if number not in gone]
        digest.update(_all_rows(samples, numbers))
        known, spread = undecoded(samples), np.linspace(0, len(numbers) - 1, min(WHOLE, len(numbers)), dtype=int)
        rows = [(number, known[number]) for number in (numbers[place] for place in spread)]
    for number, row in rows:
        try:
            pixels = [image.tobytes() for image in pictures_of(opened(row, f"sample {number}"))]
        except UnreadableImage:
            pixels = [b"unreadable"]
        digest.update(repr((_texts(row), [len(each) for each in pixels])).encode() + b"".join(pixels))
    return digest.hexdigest()


def _texts(row: Mapping) -> tuple:
    """Return what is said in a sample."""
    if "conversation" in row:
        return tuple((turn["role"], turn["content"]) for turn in row["conversation"])
    return row["question"], row["answer"]


def _all_rows(samples: Sequence[Mapping], numbers: Sequence[int]) -> bytes:
    """Return a hash of the texts of all these samples, and of as much of their pictures as is cheap."""
    texts, sizes, total = hashlib.sha256(), hashlib.sha256(), 0
    for row, pictures in _rows(samples, numbers):
        texts.update(repr(_texts(row)).encode())
        found = [_size(picture) for picture in pictures]
        sizes.update(repr(found).encode())
        total += sum(3 * each[0] * each[1] if isinstance(each, tuple) else each for each in found)
    if not isinstance(samples, datasets.Dataset | list | tuple) or total > LARGE:
        return texts.digest() + sizes.digest()
    contents = hashlib.sha256()
    for _, pictures in _rows(samples, numbers):
        contents.update(repr([_content(picture) for picture in pictures]).encode())
    return texts.digest() + contents.digest()


def _rows(samples: Sequence[Mapping], numbers: Sequence[int]) -> Iterator[tuple[Mapping, list]]:
    """Yield samples with their pictures; those of a data set without reading the bytes of any."""
    if not isinstance(samples, datasets.Dataset):
        yield from ((row, pictures_of(row)) for row in (samples[number] for number in numbers))
        return
    texts = samples.select_columns([name for name in TEXTS if name in samples.features])
    texts = texts if len(numbers) == len(samples) else texts.select(numbers)
    yield from zip(texts, _stored_pictures(samples, numbers), strict=True)


def _stored_pictures(samples: datasets.Dataset, numbers: Sequence[int]) -> Iterator[list[dict]]:
    """Yield the pictures of each row as "bytes" and "path". The bytes are views into the data set's files, so that
    their number is known before any is read.
    """
    several = "conversation" in samples.features
    column = samples.data.column("images" if several else "image")
    places = range(len(column)) if samples._indices is None else samples._indices.column(0).to_numpy()
    for number in numbers:
        value = column[int(places[number])]
        pictures = list(value.values or ()) if several else [value]
        yield [_view(picture) for picture in pictures if picture.is_valid]


def _view(picture: Any) -> dict[str, Any]:
    """Return a picture of an Arrow table as "bytes" and "path"."""
    data = picture["bytes"]
    return {"bytes": memoryview(data.as_buffer()) if data.is_valid else None, "path": picture["path"].as_py()}


def _size(picture: Image.Image | Mapping) -> tuple[int, int] | int:
    """Return width and height of a picture in memory, or how many bytes are stored of it; 0 of one that is gone or on
    another machine.
    """
    if isinstance(picture, Image.Image):
        return picture.size
    if picture["bytes"] is not None:
        return len(picture["bytes"])
    file = Path(picture["path"])
    return file.stat().st_size if file.is_file() else 0


def _content(picture: Image.Image | Mapping) -> str:
    """Return a hash of a picture's pixels or stored bytes; of one on another machine, of its address."""
    if isinstance(picture, Image.Image):
        try:
            (image,) = pictures_of(opened({"image": picture, "question": "", "answer": ""}, ""))
        except UnreadableImage:
            return "unreadable"
        return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    if picture["bytes"] is not None:
        return hashlib.sha256(picture["bytes"]).hexdigest()
    file = Path(picture["path"])
    if not file.is_file():
        return hashlib.sha256(picture["path"].encode()).hexdigest() if "://" in picture["path"] else "missing"
    return fingerprint(file)
