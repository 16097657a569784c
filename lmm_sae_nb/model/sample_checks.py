"""Open the samples of a run, and check them before it begins: each row's question, answer and image."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from PIL import Image

from lmm_sae_nb.model.conversations import MARK, conversation_fault
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.support.saved_data import open_saved

COLUMNS = ["image", "question", "answer"]
WHOLE = ["images", "conversation"]  # the columns of samples that are whole conversations
FILLED = {"bytes": b"", "path": None}  # stands for an image that is not looked at
NAMED = 5  # further rows that an error names


def open_samples(folder: str | Path) -> Dataset:
    """Open a data set that `Dataset.save_to_disk` saved.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file is damaged, or it has several splits, each in a folder of its own; the message names them.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give that of a data set that Dataset.save_to_disk saved")
    opened = open_saved(folder)
    if isinstance(opened, DatasetDict):
        raise ValueError(
            f"{folder} has the splits {', '.join(opened)}; give the folder of one: {folder}/{[*opened][0]}"
        )
    return opened


def check_samples(samples: Sequence[Mapping] | IterableDataset, lmm: LMM | None = None) -> None:
    """Check samples before a run: each has a question and an answer as text, and one image or None; or a whole
    conversation and its images.

    No picture is opened, and of a data set no picture is read. Rows of a stream, or of an unknown kind of sequence,
    are checked as they come.

    samples: a data set, a stream, or a sequence of rows with `image`, `question` and `answer`, or with `images` and
        `conversation`, as `as_turns` says.
    lmm: also check that no text holds this model's image token, which the chat template writes.

    Raises:
        ValueError: they are of another kind, columns are missing, or rows are wrong; the message names the first
            rows, the value, and what to do.
    """
    if isinstance(samples, DatasetDict | IterableDatasetDict):
        raise ValueError(f"the samples have the splits {', '.join(samples)}; give one: samples[{[*samples][0]!r}]")
    if isinstance(samples, str | Path):
        raise ValueError(f"the samples are the text {str(samples)!r}; open the folder: open_samples({str(samples)!r})")
    if columns := getattr(samples, "column_names", None):
        _require_columns(columns)
    if isinstance(samples, IterableDataset):
        return
    token = str(lmm.processor.image_token) if lmm else ""
    if isinstance(samples, Dataset):
        suspects = _conversations(samples) if "conversation" in samples.features else _suspects(samples, token)
    elif isinstance(samples, list | tuple):
        suspects = enumerate(samples)
    elif hasattr(samples, "__getitem__") and hasattr(samples, "__len__"):
        return
    else:
        raise ValueError(
            f"the samples are a {type(samples).__name__}; give a data set, a list of rows, or an IterableDataset"
        )
    faults = {number: fault for number, row in suspects if (fault := row_fault(row, token))}
    if faults:
        first, fault = next(iter(faults.items()))
        others = [*faults][1 : 1 + NAMED]
        more = len(faults) - 1 - len(others)
        also = f". Also rows {', '.join(map(str, others))}{f' and {more:,} more' if more else ''}" if others else ""
        raise ValueError(f"sample {first} (rows count from 0): {fault}{also}")


def row_fault(row: Any, token: str = "") -> str:
    """Return what is wrong with a row, and what to do; "" if nothing is.

    token: that no text may hold; "" for none.
    """
    if not isinstance(row, Mapping):
        return f"it is a {type(row).__name__}; give a dictionary of {', '.join(COLUMNS)}"
    if "conversation" in row:
        return _conversation_fault(row, token)
    if missing := [column for column in COLUMNS if column not in row]:
        return f"it has no {' and no '.join(missing)}, only {', '.join(map(str, row))}; rename the columns"
    for column in ("question", "answer"):
        value = row[column]
        if isinstance(value, list | tuple):
            return (
                f"{column} is {_shown(value)}; give one question and one answer, or a conversation of several turns in "
                f"the columns {' and '.join(WHOLE)}"
            )
        if not isinstance(value, str):
            return f"{column} is {_shown(value)}, not text; write the text, or take the row out"
        if token and token in value:
            return f"{column} {_shown(value)} holds the image token {token}; leave it out, the chat template writes it"
    return _image_fault(row["image"])


def _conversation_fault(row: Mapping, token: str) -> str:
    images = row.get("images")
    if not isinstance(images, list | tuple):
        return f"images is {_shown(images)}; give the list of the conversation's images, [] if there are none"
    if fault := conversation_fault(row["conversation"], len(images)):
        return fault
    for number, turn in enumerate(row["conversation"]):
        if token and token in turn["content"].replace(MARK, ""):
            return f"turn {number} holds the image token {token}; write {MARK}, the chat template writes the token"
    faults = ("an image is None; leave it out" if image is None else _image_fault(image) for image in images)
    return next(filter(None, faults), "")


def _image_fault(image: object) -> str:
    if image is None or isinstance(image, Image.Image):
        return ""
    if isinstance(image, Mapping) and {"bytes", "path"} <= image.keys():
        return "" if image["bytes"] is not None or image["path"] else "image has neither bytes nor a path; write None"
    if isinstance(image, list | tuple):
        columns = " and ".join(WHOLE)
        return f"image is a list of {len(image)}; give one image or None, or a conversation in the columns {columns}"
    return (
        f"image is {_shown(image)}; give a PIL image or None, or cast the column: "
        "samples.cast_column('image', datasets.Image())"
    )


def _shown(value: object) -> str:
    """Return a value as an error repeats it, cut at a readable length."""
    text = f"a list of {len(value)}" if isinstance(value, list | tuple) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _require_columns(columns: Collection[str]) -> None:
    wanted = WHOLE if "conversation" in columns else COLUMNS
    if missing := [column for column in wanted if column not in columns]:
        raise ValueError(
            f"the samples have no column {' and no '.join(missing)}, only {', '.join(columns)}; rename the columns, "
            "each row with an image (or None), a question and an answer, or with images and a conversation"
        )


def _suspects(samples: Dataset, token: str) -> Iterator[tuple[int, dict]]:
    """Yield the rows of a data set that may be wrong, with an image only where the image may be."""
    typed = samples.features
    plain = all(getattr(typed[column], "dtype", "") in ("string", "large_string") for column in COLUMNS[1:])
    pictures = isinstance(typed["image"], datasets.Image) or getattr(typed["image"], "dtype", "") == "null"
    read = COLUMNS[1:] if pictures else COLUMNS
    number = 0
    for table in samples.select_columns(read).with_format("arrow").iter(10_000):
        columns = {name: table.column(name) for name in read}
        texts = [columns[name].to_pylist() for name in COLUMNS[1:]]
        images = [None] * len(table) if pictures else columns["image"].to_pylist()
        for place, (image, question, answer) in enumerate(zip(images, *texts, strict=True)):
            if not (plain and pictures) or question is None or answer is None or token and token in question + answer:
                yield number + place, {"image": image, "question": question, "answer": answer}
        number += len(table)


def _conversations(samples: Dataset) -> Iterator[tuple[int, dict]]:
    """Yield the rows of a data set of conversations; an image stands for all of them where the column holds images."""
    typed = getattr(samples.features["images"], "feature", None)
    number = 0
    for table in samples.select_columns(WHOLE).with_format("arrow").iter(500):
        images = table.column("images")
        known = isinstance(typed, datasets.Image)
        counts = [len(each) if each is not None else None for each in images] if known else images.to_pylist()
        for conversation, count in zip(table.column("conversation").to_pylist(), counts, strict=True):
            filled = [FILLED] * count if known and count is not None else count
            yield number, {"images": filled, "conversation": conversation}
            number += 1
