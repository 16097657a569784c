"""Read and write safetensors files; hash and check tensors."""

from __future__ import annotations

import hashlib
import json
import math
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
    """Write tensors as one safetensors file, atomically.

    tensors: by name.
    metadata: text for the file's header.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_through(Path(path), lambda temporary: save_file(whole, temporary, metadata=dict(metadata or {})))


def save_rows(
    path: str | Path,
    layout: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    rows: Iterable[tuple[str, int, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file piece by piece, atomically and without a copy in memory.

    layout: dtype and shape of each tensor, by name.
    rows: (name, number of the first row, rows of that tensor); together they must cover all tensors.
    metadata: text for the file's header.
    """
    header, at = {"__metadata__": dict(metadata or {})}, 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        span = (at, at := at + dtype.itemsize * math.prod(shape))
        header[name] = {"dtype": f"{dtype.kind.upper()}{8 * dtype.itemsize}", "shape": shape, "data_offsets": span}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # numbers of 8 bytes begin at multiples of 8
    begin = 8 + len(head)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            file.truncate(begin + at)
            for name, first, block in rows:
                dtype, shape = layout[name]
                file.seek(begin + header[name]["data_offsets"][0] + first * dtype.itemsize * math.prod(shape[1:]))
                if block.size:
                    file.write(np.ascontiguousarray(block, dtype).data.cast("B"))

    write_through(Path(path), write)


def open_tensors(path: str | Path) -> safe_open:
    """Open a safetensors file for lazy reading on the CPU.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it was cut short or is another kind of file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing; make it first, or give the folder that holds it")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): it was cut short or is something else; "
            "make it or download it again"
        ) from error


def shapes_in(file: safe_open) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of an open safetensors file, by name; no tensor is read."""
    return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read all tensors of a safetensors file into memory, by name; errors as `open_tensors`."""
    file = open_tensors(path)
    return {name: file.get_tensor(name).numpy().copy() for name in file.keys()}  # noqa: SIM118


def hash_of(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of the bytes of tensors, in this order; the same on every device."""
    digest = hashlib.sha256()
    for tensor in tensors:
        for piece in tensor.detach().flatten().split(2**22):
            digest.update(piece.cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def require_finite(x: Tensor, source: str) -> None:
    """Check that hidden states hold no NaN and no infinity.

    x: (..., width).
    source: where they come from, for the message.

    Raises:
        ValueError: they hold some; the message counts the tokens.
    """
    if math.isfinite(float(x.sum())) or bool(x.isfinite().all()):
        return
    bad = int((~x.isfinite()).any(-1).sum())
    raise ValueError(
        f"{source}: {bad} of {x[..., 0].numel()} tokens hold NaN or infinity; load the model in float32 or "
        "bfloat16 (float16 overflows), and check its weights"
    )
