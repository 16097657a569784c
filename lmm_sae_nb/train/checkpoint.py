"""Checkpoints of a training: numbered folders, each there whole or not at all, the newest kept."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lmm_sae_nb.support.files import TEMPORARY, clear_temporaries, read_json, sync, sync_folder, write_json
from lmm_sae_nb.support.tensor_files import save_tensors

STATE, TENSORS, OPTIMISER = "state.json", "tensors.safetensors", "optimiser.pt"


class Checkpoint(NamedTuple):
    state: dict  # numbers, text and lists
    tensors: dict[str, Tensor]
    optimiser: dict  # its state_dict


def save(folder: str | Path, step: int, checkpoint: Checkpoint) -> None:
    """Write folder/<step>, then delete the older ones; a kill at any moment leaves a whole one, if there was one.

    It is written under another name and renamed once, so there is no moment without the last good one: the disk holds
    two for a while. OSError with the sizes if the disk is full or the file too large; the last good one stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{step}.{uuid.uuid4().hex}{TEMPORARY}"
    try:
        save_tensors(temporary / TENSORS, checkpoint.tensors)
        torch.save(checkpoint.optimiser, temporary / OPTIMISER)
        write_json(temporary / STATE, checkpoint.state)
        sync_folder(temporary)
        temporary.replace(folder / str(step))
        sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        clear_temporaries(folder)
        needed = _bytes(checkpoint.tensors) + _bytes(checkpoint.optimiser)
        raise OSError(
            f"{folder}: the checkpoint of step {step} could not be written ({error}); it takes {needed:,} bytes, and "
            f"{shutil.disk_usage(folder).free:,} are free beside {_last(folder)}. Make room and run again: training "
            "goes on from there"
        ) from error
    for older in _steps(folder)[:-1]:
        (folder / str(older)).replace(folder / f".{older}{TEMPORARY}")
    clear_temporaries(folder)


def load(folder: str | Path) -> Checkpoint | None:
    """The newest checkpoint, on the CPU; None if there is none."""
    steps = _steps(Path(folder))
    if not steps:
        return None
    newest = Path(folder) / str(steps[-1])
    return Checkpoint(
        read_json(newest / STATE),
        load_file(newest / TENSORS),
        torch.load(newest / OPTIMISER, map_location="cpu", weights_only=True),
    )


def remove(folder: str | Path) -> None:
    """Delete a folder of checkpoints, and what killed writers left beside it; gone at once, whatever happens."""
    folder = Path(folder)
    if folder.is_dir():
        folder.replace(folder.with_name(f".{folder.name}.{uuid.uuid4().hex}{TEMPORARY}"))
    clear_temporaries(folder.parent)


def _steps(folder: Path) -> list[int]:
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))


def _last(folder: Path) -> str:
    steps = _steps(folder)
    return f"the last good one, of step {steps[-1]}" if steps else "no earlier one"


def _bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value.values())) if isinstance(value, Mapping) else 0
