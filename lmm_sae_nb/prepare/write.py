"""Write a goal's data sets: a part for each file of its sources, then the whole, without writing a row twice.

A part is whole or absent. So a run that was killed goes on with the first part that is missing.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from datasets import DatasetInfo, Features, IterableDataset
from datasets.arrow_writer import ArrowWriter

from lmm_sae_nb.model.sample_checks import open_samples
from lmm_sae_nb.prepare.recipe import Goal, Source
from lmm_sae_nb.prepare.records import Unfit, as_row, features_of
from lmm_sae_nb.prepare.sources import Share, bounded, bytes_of, held_out, plan, rows_in, rows_of
from lmm_sae_nb.support.files import checksum, free_bytes, in_units, no_room, read_json, replace_folder, write_json
from lmm_sae_nb.support.images import open_images
from lmm_sae_nb.support.locks import hold
from lmm_sae_nb.support.progress import progress_bar

RECIPE = "prepare.json"  # in a data set that was prepared: what it was made from, and what was left out
NAMED = 1000  # records that were left out and are named


@dataclass(frozen=True)
class Forecast:
    """What a goal will take.

    rows: to write, held-out ones included; None if all are written and their number is not known.
    download: bytes on the way; None if not known.
    disk: bytes on the disk; None if not known.
    """

    rows: int | None
    download: int | None
    disk: int | None


@dataclass(frozen=True)
class Prepared:
    """What was written.

    rows, heldout: how many.
    skipped: the place of each record that was left out, as `file 3, row 17`, with the reason; NAMED at most.
    reasons: how many were left out for each reason, without its numbers and names.
    """

    rows: int
    heldout: int
    skipped: dict[str, str]
    reasons: dict[str, int]


def is_given(goal: Goal) -> bool:
    """Return whether a goal's folders hold data of the user's own, which pages can read and this command leaves alone:
    pictures in a folder, or a data set that `Dataset.save_to_disk` saved.
    """
    folders = [folder for folder in (goal.folder, goal.heldout) if folder is not None]
    if not all(folder.is_dir() and not (folder / RECIPE).is_file() for folder in folders):
        return False
    try:
        return all(len(open_images(each) if goal.kind == "images" else open_samples(each)) for each in folders)
    except (ValueError, OSError):
        return False


def is_prepared(goal: Goal) -> bool:
    """Return whether a goal's data sets are there, made by the same recipe.

    Raises:
        FileExistsError: something else is there.
    """
    there = [folder for folder in (goal.folder, goal.heldout) if folder is not None and folder.exists()]
    for folder in there:
        if not (folder / RECIPE).is_file():
            raise FileExistsError(
                f"{folder} holds something that this command did not write, and no whole data of {goal.name}; give the "
                f"preset another folder, or write the other entries alone, with --only"
            )
        if read_json(folder / RECIPE)["recipe"] != _recipe(goal):
            raise FileExistsError(
                f"{folder} holds data of another recipe; delete the folder, or give the preset another one"
            )
    return len(there) == (1 if goal.heldout is None else 2)


def forecast(goal: Goal, streams: list[IterableDataset]) -> Forecast:
    """Return what a goal will take, as far as its sources report their sizes.

    streams: its sources, opened.
    """
    pairs = [(bounded(*pair), pair[1]) for pair in zip(goal.sources, streams, strict=True)]
    way, disk = (None if None in column else sum(column) for column in zip(*(bytes_of(*p) for p in pairs), strict=True))
    numbers = [source.rows + source.heldout if source.rows else rows_in(source, stream) for source, stream in pairs]
    return Forecast(None if None in numbers else sum(numbers), way, disk)


def require_room(folder: Path, expected: Forecast) -> None:
    """Raise OSError if the disk has no room for a goal."""
    near = next(each for each in (folder, *folder.parents) if each.exists())
    if expected.disk and expected.disk > free_bytes(near):
        raise no_room(folder, expected.disk)


def in_words(expected: Forecast) -> str:
    """Return a forecast as a sentence."""
    rows = "all rows" if expected.rows is None else f"{expected.rows:,} rows"
    way = "unknown" if expected.download is None else in_units(expected.download)
    disk = "unknown" if expected.disk is None else in_units(expected.disk)
    return f"{rows}, about {way} to download, {disk} on the disk"


def write_goal(goal: Goal, streams: list[IterableDataset], unreadable: str) -> Prepared:
    """Write a goal's data sets.

    streams: its sources, opened.
    unreadable: what to do with a record that does not fit: "skip", or "refuse" to stop there.

    Raises:
        ValueError: a record does not fit, with "refuse"; or no record fits.
        FolderInUse: another run writes them.
    """
    parts = goal.folder.with_name(f".{goal.folder.name}.parts")
    with hold(parts):
        if (parts / RECIPE).is_file() and read_json(parts / RECIPE) != _recipe(goal):
            shutil.rmtree(parts)  # of a recipe that has changed since
        parts.mkdir(parents=True, exist_ok=True)
        write_json(parts / RECIPE, _recipe(goal))
        features = features_of(goal.kind, goal.sources[0])
        expected = forecast(goal, streams).rows
        done: list[dict] = []
        with progress_bar(desc=goal.name, total=expected, unit=" rows") as bar:
            for number, job in enumerate(_jobs(goal, streams, done)):
                part = parts / f"part-{number:05d}"
                if not part.is_dir():
                    _write_part(part, goal, *job, features, unreadable)
                done.append(read_json(part / "report.json"))
                bar.update(done[-1]["rows"] + done[-1]["heldout"])
        prepared = _summary(done)
        if not prepared.rows:
            raise ValueError(f"no record fits {goal.name}: {next(iter(prepared.skipped.values()), 'there is none')}")
        whole = {"rows": goal.folder} | ({"heldout": goal.heldout} if goal.heldout else {})
        for name, folder in whole.items():
            _assemble(name, folder, parts, len(done), features, {"recipe": _recipe(goal)} | asdict(prepared))
    shutil.rmtree(parts)
    return prepared


def _recipe(goal: Goal) -> dict:
    return {"kind": goal.kind, "sources": [asdict(source) for source in goal.sources]}


Job = tuple[Source, IterableDataset, int, int | None, int]


def _jobs(goal: Goal, streams: list[IterableDataset], done: list[dict]) -> Iterator[Job]:
    """Yield for each part its source, stream, file, and how many rows and held-out rows it should have.

    done: reports of the parts before, to which one is added between two steps.
    """
    for source, stream in zip(goal.sources, streams, strict=True):
        first, due, due_heldout = len(done), 0, 0
        share: Share
        for share in plan(bounded(source, stream), stream.num_shards):
            got = sum(report["rows"] + report["heldout"] for report in done[first:])
            due_heldout += share.heldout
            heldout = due_heldout - sum(report["heldout"] for report in done[first:])
            if share.rows is None:
                yield source, stream, share.file, None, heldout
                continue
            due += share.rows
            if due > got:
                yield source, stream, share.file, due - got, min(heldout, due - got)


def _write_part(
    part: Path, goal: Goal, source: Source, stream: IterableDataset, file: int, wanted: int | None, heldout: int,
    features: Features, unreadable: str,
) -> None:  # fmt: skip
    """Write the rows of one file, and a report of them."""
    unfinished = part.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    usual = 0.9 * (rows_in(source, stream) or 100) / stream.num_shards  # some do not fit, and files differ
    away = held_out(source, file, heldout, int(usual) if wanted is None else wanted)
    counts, skipped = Counter(), {}
    writers = {name: ArrowWriter(path=str(unfinished / f"{name}.arrow"), features=features, writer_batch_size=100)
               for name in ("rows", "heldout")}  # fmt: skip
    for number, record in enumerate(rows_of(stream, file) if wanted != 0 else ()):
        try:
            row = as_row(goal.kind, source, record, Random(f"{source.seed} {file} {number}"))
        except Unfit as fault:
            place = f"{source.source}, file {file}, row {number}"
            if unreadable == "refuse":
                raise ValueError(
                    f"{place}: {fault}. Correct it, or leave out what does not fit: unreadable: skip"
                ) from fault
            skipped[place] = str(fault)
            continue
        name = "heldout" if counts.total() in away else "rows"
        writers[name].write(row)
        counts[name] += 1
        if counts.total() == wanted:
            break
    for writer in writers.values():
        writer.finalize()
    write_json(unfinished / "report.json", {"rows": counts["rows"], "heldout": counts["heldout"], "skipped": skipped})
    unfinished.rename(part)


def _summary(done: list[dict]) -> Prepared:
    """Return the reports of all parts as one."""
    skipped = {place: reason for report in done for place, reason in report["skipped"].items()}
    reasons = Counter("".join(c for c in reason.split(":")[0] if not c.isdigit()) for reason in skipped.values())
    rows, heldout = (sum(report[name] for report in done) for name in ("rows", "heldout"))
    return Prepared(rows, heldout, dict(list(skipped.items())[:NAMED]), dict(reasons.most_common()))


def _assemble(name: str, folder: Path, parts: Path, count: int, features: Features, record: Mapping) -> None:
    """Move the files of the parts into one saved data set; a run that was killed here goes on, too."""
    if folder.exists() and read_json(folder / RECIPE)["recipe"] == record["recipe"]:
        return
    whole = parts / f"whole-{name}"
    whole.mkdir(exist_ok=True)
    files = [f"data-{number:05d}-of-{count:05d}.arrow" for number in range(count)]
    for number, file in enumerate(files):
        if (here := parts / f"part-{number:05d}" / f"{name}.arrow").exists():
            here.rename(whole / file)
    digest = hashlib.sha256("".join(checksum(whole / file) for file in files).encode()).hexdigest()[:16]
    state = {"_data_files": [{"filename": file} for file in files], "_fingerprint": digest, "_split": None}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    DatasetInfo(features=features).write_to_directory(str(whole))
    write_json(whole / "state.json", state)
    write_json(whole / RECIPE, record)
    replace_folder(whole, folder)
