"""Checkpoints of a training: numbered folders, each written atomically; only the newest is kept."""

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
    """The content of a checkpoint.

    state: numbers, text and lists.
    tensors: by name.
    optimiser: a state_dict.
    """

    state: dict
    tensors: dict[str, Tensor]
    optimiser: dict


def save(folder: str | Path, step: int, checkpoint: Checkpoint) -> None:
    """Write the checkpoint folder/<step>, then delete the older ones.

    It is written under another name and renamed, so a kill at any moment leaves the last good checkpoint. For a
    while the disk holds two.

    Raises:
        OSError: it cannot be written, for example on a full disk; the last good checkpoint stays.
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
            f"{folder}: the checkpoint of step {step} could not be written ({error}); it needs {needed:,} bytes, "
            f"{shutil.disk_usage(folder).free:,} are free. Make room and run again: training continues from "
            f"{_last(folder)}"
        ) from error
    for older in _steps(folder)[:-1]:
        (folder / str(older)).replace(folder / f".{older}{TEMPORARY}")
    clear_temporaries(folder)


def load(folder: str | Path) -> Checkpoint | None:
    """Load the newest checkpoint onto the CPU; None if there is none."""
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
    """Delete a folder of checkpoints at once, and the files that killed processes left beside it."""
    folder = Path(folder)
    if folder.is_dir():
        folder.replace(folder.with_name(f".{folder.name}.{uuid.uuid4().hex}{TEMPORARY}"))
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
