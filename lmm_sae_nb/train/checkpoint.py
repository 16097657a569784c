"""Checkpoints of a training: numbered folders, each written atomically; only the newest is kept."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lmm_sae_nb.support.files import (
    checksum,
    clear_temporaries,
    free_bytes,
    in_units,
    read_json,
    sync,
    sync_folder,
    temporary_name,
    write_json,
)
from lmm_sae_nb.support.tensor_files import open_tensors, save_tensors

STATE, TENSORS, OPTIMISER = "state.json", "tensors.safetensors", "optimiser.pt"
SUMS = "checksums"  # in the state: of the optimiser's file


class Checkpoint(NamedTuple):
    """The content of a checkpoint.

    state: numbers, text and lists.
    tensors: by name.
    optimiser: a state_dict.
    """

    state: dict
    tensors: dict[str, Tensor]
    optimiser: dict


def save(folder: str | Path, step: int, checkpoint: Checkpoint) -> None:
    """Write the checkpoint folder/<step> with checksums, then delete the older ones.

    It is written under another name and renamed, so a kill at any moment leaves the last good checkpoint. For a
    while the disk holds two.

    Raises:
        OSError: it cannot be written, for example on a full disk; the last good checkpoint stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder / str(step))
    try:
        save_tensors(temporary / TENSORS, checkpoint.tensors)
        torch.save(checkpoint.optimiser, temporary / OPTIMISER)
        sums = {OPTIMISER: checksum(temporary / OPTIMISER)}  # that of the tensors is in their file
        write_json(temporary / STATE, checkpoint.state | {SUMS: sums}, checked=True)
        sync_folder(temporary)
        temporary.replace(folder / str(step))
        sync(folder)
    except (OSError, RuntimeError) as error:
        clear_temporaries(folder)
        needed = _bytes(checkpoint.tensors) + _bytes(checkpoint.optimiser)
        raise OSError(
            f"{folder}: the checkpoint of step {step} could not be written ({error}); it needs {in_units(needed)}, "
            f"{in_units(free_bytes(folder))} are free. Make room and run again: training continues from "
            f"{_last(folder)}"
        ) from error
    for older in _steps(folder)[:-1]:
        (folder / str(older)).replace(temporary_name(folder / str(older)))
    clear_temporaries(folder)


def load(folder: str | Path) -> Checkpoint | None:
    """Load the newest whole checkpoint onto the CPU; None if there is none at all.

    A kill can leave two checkpoints. If the newer one is damaged, the older one is taken, with a warning.

    Raises:
        ValueError: every checkpoint is damaged; the message names the files.
    """
    folder, faults = Path(folder), []
    for step in reversed(_steps(folder)):
        try:
            loaded = _read(folder / str(step))
        except (OSError, ValueError) as error:
            faults.append(str(error))
            continue
        for fault in faults:
            warnings.warn(f"{fault}: training continues from step {step}", stacklevel=2)
        return loaded
    if faults:
        raise ValueError(
            f"the checkpoint is damaged: {'; '.join(faults)}. Restore it from a backup, or delete {folder} to train "
            "from the beginning"
        )
    return None


def _read(folder: Path) -> Checkpoint:
    """Read a checkpoint; OSError or ValueError if a file is missing, damaged, or of an older version."""
    path = folder / STATE
    state = read_json(path)
    sums = state.pop(SUMS, None)
    if sums is None:
        raise ValueError(f"{path} has no checksums: an older version wrote it")
    for name, expected in sums.items():
        if checksum(folder / name) != expected:
            raise ValueError(f"{folder / name} was cut short or damaged")
    tensors = open_tensors(folder / TENSORS)
    return Checkpoint(
        state,
        {name: tensors.get_tensor(name) for name in tensors.keys()},  # noqa: SIM118
        torch.load(folder / OPTIMISER, map_location="cpu", weights_only=True, mmap=True),  # read as it is copied
    )


def remove(folder: str | Path) -> None:
    """Delete a folder of checkpoints at once, and the files that killed processes left beside it."""
    folder = Path(folder)
    if folder.is_dir():
        folder.replace(temporary_name(folder))
    clear_temporaries(folder.parent)


def _steps(folder: Path) -> list[int]:
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))


def _last(folder: Path) -> str:
    steps = _steps(folder)
    return f"the checkpoint of step {steps[-1]}" if steps else "the beginning"


def _bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value.values())) if isinstance(value, Mapping) else 0
