"""Read and write safetensors files; hash and check tensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmm_sae_nb.support.files import write_through


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as one safetensors file, atomically; `metadata` is text for the file's header."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_through(Path(path), lambda temporary: save_file(whole, temporary, metadata=dict(metadata or {})))


def save_rows(
    path: str | Path,
    layout: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    rows: Iterable[tuple[str, int, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file piece by piece, atomically and without a copy in memory.

    layout: dtype and shape of each tensor; rows: (name, first row, rows of that tensor) until all are written.
    """
    header, at = {"__metadata__": dict(metadata or {})}, 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        span = (at, at := at + dtype.itemsize * math.prod(shape))
        header[name] = {"dtype": f"{dtype.kind.upper()}{8 * dtype.itemsize}", "shape": shape, "data_offsets": span}
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)  # numbers of 8 bytes begin at multiples of 8
    begin = 8 + len(told)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(told)) + told)
            file.truncate(begin + at)
            for name, first, block in rows:
                dtype, shape = layout[name]
                file.seek(begin + header[name]["data_offsets"][0] + first * dtype.itemsize * math.prod(shape[1:]))
                if block.size:
                    file.write(np.ascontiguousarray(block, dtype).data.cast("B"))

    write_through(Path(path), write)


def open_tensors(path: str | Path) -> safe_open:
    """Open a safetensors file for lazy reading on the CPU; ValueError if it is cut short or no such file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing; make it first, or give the folder that holds it")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): it was cut short or is something else; "
            "make it or download it again"
        ) from error


class TensorRows:
    """A safetensors file of which rows are read: each with one small read of the disk, and nothing ahead.

    A mapped file (`open_tensors`) reads megabytes around the first byte that is touched. shapes: by tensor's name.
    FileNotFoundError if the file is missing, ValueError if it is cut short or another kind.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        try:
            told = self._read(8, struct.unpack("<Q", self._read(0, 8))[0])
            header = json.loads(told)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._begin = 8 + len(told)
            self._tensors = {
                name: (_dtype(at["dtype"]), at["shape"], at["data_offsets"]) for name, at in header.items()
            }
            whole = self._begin + max((stop for _, _, (_, stop) in self._tensors.values()), default=0)
        except (struct.error, MemoryError, OverflowError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a safetensors file ({error!r}); make it or download it again") from error
        if (size := self._path.stat().st_size) != whole:
            raise ValueError(f"{path} has {size} bytes of {whole}: it was cut short; make it or download it again")
        self.shapes = {name: tuple(shape) for name, (_, shape, _) in self._tensors.items()}

    def row(self, name: str, *index: int) -> np.ndarray:
        """tensor[index], for as many leading axes as are given, each from 0; read anew at every call."""
        dtype, shape, (begin, _) = self._tensors[name]
        at = int(np.ravel_multi_index(index, shape[: len(index)]))
        rest = shape[len(index) :]
        size = dtype.itemsize * math.prod(rest)
        return np.frombuffer(self._read(self._begin + begin + at * size, size), dtype).reshape(rest)

    def whole(self, name: str) -> np.ndarray:
        """All of a tensor, in memory of its own; ValueError for a name that the file does not have."""
        if name not in self.shapes:
            raise ValueError(f"{self._path} has no {name}, only {', '.join(self.shapes)}")
        dtype, shape, (begin, _) = self._tensors[name]
        return np.fromfile(self._path, dtype, math.prod(shape), offset=self._begin + begin).reshape(shape)

    def _read(self, start: int, size: int) -> bytes:
        with self._path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            file.seek(start)
            return file.read(min(size, max(0, self._path.stat().st_size - start)))


def _dtype(name: str) -> np.dtype:
    return np.dtype({"F": "f", "I": "i", "U": "u"}[name[0]] + str(int(name[1:]) // 8))


def hash_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of tensors in this order, whatever device they are on, a piece of each at a time."""
    digest = hashlib.sha256()
    for tensor in tensors:
        for piece in tensor.detach().flatten().split(2**22):
            digest.update(piece.cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def require_finite(x: Tensor, source: str) -> None:
    """ValueError naming `source` if hidden states hold NaN or infinity, which would spoil what follows."""
    if math.isfinite(float(x.sum())) or bool(x.isfinite().all()):
        return
    bad = int((~x.isfinite()).any(-1).sum())
    raise ValueError(
        f"{source}: {bad} of {x[..., 0].numel()} tokens hold NaN or infinity; load the model in float32 or "
        "bfloat16 (float16 overflows), and check its weights"
    )
