"""Files of an SAE's weights: safetensors, torch.save and npz, read lazily where the format allows, without pickle."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lmm_sae_nb.sae.folding import SAEWeights
from lmm_sae_nb.support.files import free_bytes, write_through
from lmm_sae_nb.support.tensor_files import check_once, open_tensors, save_tensors

NOT_WHOLE = (
    RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def open_safetensors(path: Path) -> Mapping:
    """Return the tensors by name; each has a shape and reads only the rows that are indexed."""
    try:
        file = open_tensors(path)
    except ValueError as error:
        raise ValueError(
            f"{error}: train the SAE again with notebooks/01_train_sae.py, or download it again"
        ) from error
    rows = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    rows = {name: part if part.get_shape() else file.get_tensor(name) for name, part in rows.items()}
    k = (file.metadata() or {}).get("k", "")
    return rows | {"k": torch.tensor(int(k))} if k.isdecimal() else rows


def save_safetensors(path: Path, tensors: dict[str, Tensor], weights: SAEWeights) -> None:
    """Write the tensors with a checksum; k stands in the header, too, to notice a config of another SAE."""
    save_tensors(path, tensors, {"format": "pt", "k": str(weights.k)})


def _plain(*_: object) -> dict:
    """Stand for a defaultdict, in which logs lie beside an overcomplete SAE."""
    return {}


def _load_pickled(path: Path) -> object:
    """Map a torch.save file into memory; no code in it is run (weights_only)."""
    try:
        check_once(path, _require_whole_records)
        with torch.serialization.safe_globals([(_plain, "collections.defaultdict"), list]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except NOT_WHOLE as error:
        reason = (str(error) or repr(error)).splitlines()[0]  # some errors of PyTorch have no text
        raise ValueError(
            f"{path} is not a whole file of tensors ({reason}): it was cut short, is something "
            "else, or holds objects that would have to be run; download it again or save its state_dict"
        ) from error


def open_with_k(path: Path) -> Mapping:
    """Return the tensors of a torch.save file by name; beside them it may hold k, a whole number."""
    state = _load_pickled(path)
    if isinstance(state, dict) and isinstance(k := state.get("k"), int):
        state = state | {"k": torch.tensor(k)}
    return _named_tensors(path, state)


def open_pickled(path: Path) -> Mapping:
    """Return the tensors of a torch.save file of dictionary_learning by name."""
    state = _load_pickled(path)
    if isinstance(state, dict) and "ae" in state:
        raise ValueError(
            f"{path} is a backup from the middle of a training (it holds {', '.join(map(str, state))}), whose weights "
            "may not be scaled back yet; use the ae.pt from the end of the training"
        )
    return _named_tensors(path, state)


def _named_tensors(path: Path, state: object) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds no state_dict, that is names and tensors; save the dictionary's state_dict")
    return state


def _require_whole_records(path: Path) -> None:
    """Raise ValueError if a record of a zip file has a wrong checksum; torch and NumPy write them."""
    with zipfile.ZipFile(path) as records:
        if broken := records.testzip():
            raise ValueError(f"the checksum of {broken} is wrong")


def open_overcomplete(path: Path) -> Mapping:
    """Return the tensors of an overcomplete SAE as it computes with them: unit dictionary rows, and thresholds.

    The file is a state_dict, or holds one under `model_state`. How a dictionary is normalised is not in the file;
    the library's default, rows of length 1, is assumed where it nearly holds.
    """
    state = _load_pickled(path)
    inner = state.get("model_state", state) if isinstance(state, dict) else state
    tensors = dict(_named_tensors(path, inner))
    if "dictionary._weights" not in tensors:
        raise ValueError(
            f"{path} has no dictionary._weights (it holds {', '.join(tensors)}): it is no SAE of overcomplete with a "
            "plain dictionary; other libraries' files have the names that the library gives them"
        )
    rows = tensors["dictionary._weights"].float()
    lengths = torch.linalg.vector_norm(rows, dim=1)
    if not bool(((lengths - 1).abs() < 0.1).all()):  # an optimiser's step after the last normalisation
        raise ValueError(
            f"{path}: rows of dictionary._weights have lengths {lengths.min():.3g} to {lengths.max():.3g}: it was not "
            "normalised to length 1, and how it was is not in the file; save the SAE with sae.get_dictionary() as "
            "dictionary._weights, scaled to length 1"
        )
    scale = tensors.pop("dictionary.multiplier", torch.zeros(())).float().exp()
    tensors["dictionary._weights"] = F.normalize(rows, dim=1) * scale
    if "thresholds" in tensors:
        tensors["thresholds"] = tensors["thresholds"].float().exp()
    return tensors


def open_npz(path: Path) -> Mapping:
    """Return the arrays of an npz file as tensors by name."""
    try:
        check_once(path, _require_whole_records)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except NOT_WHOLE as error:
        raise ValueError(f"{path} is not a whole file of arrays ({error}); download it again") from error


def save_pickled(path: Path, tensors: dict[str, Tensor], weights: SAEWeights) -> None:
    """Write the tensors as dictionary_learning does; a threshold of -1 was never measured."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    whole |= {"k": torch.tensor(weights.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
    size = sum(tensor.numel() * tensor.element_size() for tensor in whole.values())

    def write(temporary: Path) -> None:
        try:
            torch.save(whole, temporary)
        except RuntimeError as error:  # torch hides what the system said
            if free_bytes(path) > size:
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error

    write_through(path, write, size)
