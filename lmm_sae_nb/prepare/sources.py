"""Rows of a source, file by file: only what is needed is read, and a file can be read again after a kill."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import IterableDataset, load_dataset, load_from_disk

from lmm_sae_nb.prepare.recipe import Source

A_FILE = 500  # rows that are read from a file if a source has many: more files are more of its variety


class Share(NamedTuple):
    """How many rows a file of a source should give; if it gives fewer, the next files give more.

    file: its number.
    rows: how many rows to write, held-out ones included; None for all.
    heldout: how many of them are held out.
    """

    file: int
    rows: int | None
    heldout: int = 0


def open_source(source: Source, root: Path) -> IterableDataset:
    """Open a source as a stream of rows whose pictures are bytes.

    root: folders are below it.

    Raises:
        FileNotFoundError, ValueError: as `load_dataset`; or a column is missing.
    """
    folder = root / source.source
    if (folder / "state.json").is_file():
        saved = load_from_disk(str(folder))
        stream = saved.to_iterable_dataset(num_shards=max(1, len(saved) // A_FILE))
    else:
        name = str(folder) if folder.is_dir() else source.source
        settings: dict[str, Any] = {"revision": source.revision or None} if not folder.is_dir() else {}
        stream = load_dataset(name, source.config or None, split=source.split or None, streaming=True, **settings)
    if not isinstance(stream, IterableDataset):
        raise ValueError(f"{source.source} has the splits {', '.join(stream)}; write one as its split")
    if stream.features is None:
        stream = stream._resolve_features()  # from the first rows
    known = stream.features
    for ours, theirs in source.columns.items():
        if theirs not in known:
            raise ValueError(
                f"{source.source} has no column {theirs!r} (for {ours}), but {', '.join(known)}; correct `columns`"
            )
    columns = list(dict.fromkeys(source.columns.values()))
    return stream.select_columns(columns).decode(False)


def plan(source: Source, files: int) -> list[Share]:
    """Return how many rows come from which file, in the order of reading.

    Drawn rows come from as many files as possible, in equal numbers. Each of these files gives at least A_FILE rows, so
    that few files are opened.

    files: of the source.
    """
    order = np.random.default_rng(source.seed).permutation(files).tolist() if source.shuffle else list(range(files))
    total = source.rows + source.heldout
    if not source.rows:
        shares = _divided(source.heldout, files)
        return [Share(file, None, heldout) for file, heldout in zip(order, shares, strict=True)]
    some = order[: max(1, min(files, total // A_FILE))] if source.shuffle else order[:1]
    wanted, heldout = _divided(total, len(some)), _divided(source.heldout, len(some))
    return [Share(*each) for each in zip(some, wanted, heldout, strict=True)] + [
        Share(file, 0) for file in order[len(some) :]
    ]


def rows_of(stream: IterableDataset, file: int) -> Iterator[dict]:
    """Yield the rows of one file of a source, in its order."""
    files = stream.num_shards
    return iter(stream.shard(num_shards=files, index=file) if files > 1 else stream)


def held_out(source: Source, file: int, wanted: int, among: int) -> set[int]:
    """Draw which of the rows that a file gives are held out.

    wanted: how many.
    among: how many rows the file gives.
    """
    random = np.random.default_rng((source.seed, file))
    return set(random.permutation(max(among, wanted))[:wanted].tolist())


def rows_in(source: Source, stream: IterableDataset) -> int | None:
    """Return how many rows a source has, as far as it says."""
    split = (stream.info.splits or {}).get(source.split)
    return split.num_examples or None if split else None


def bounded(source: Source, stream: IterableDataset) -> Source:
    """Return a source that asks for all rows, if it asks for as many as there are or for more.

    Raises:
        ValueError: all of them would be held out.
    """
    known = rows_in(source, stream)
    if known and source.heldout >= known:
        raise ValueError(
            f"{source.source} has {known:,} rows, and {source.heldout:,} are to be held out: lower heldout"
        )
    return replace(source, rows=0) if known and source.rows + source.heldout >= known else source


def bytes_of(source: Source, stream: IterableDataset) -> tuple[int | None, int | None]:
    """Return about how many bytes a source's rows take on the way and on the disk; None where it is not known."""
    info = stream.info
    split = (info.splits or {}).get(source.split)
    if split is None or not split.num_examples:
        return None, None
    part = (source.rows + source.heldout) / split.num_examples if source.rows else 1.0
    disk = int(part * split.num_bytes) if split.num_bytes else None
    whole = info.dataset_size or split.num_bytes
    way = int(disk * info.download_size / whole) if disk and info.download_size and whole else None
    return way, disk


def _divided(total: int, parts: int) -> list[int]:
    """Divide a number into whole parts that differ by at most 1."""
    ends = [total * n // parts for n in range(parts + 1)]
    return [after - before for before, after in itertools.pairwise(ends)]
