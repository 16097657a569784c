"""Read and write safetensors files; hash and check tensors."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmm_sae_nb.support.files import CHECKSUM, checksum, crc_of, write_through

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip
BLANK = "00000000"  # stands in place of a file's checksum while it is computed
MARK = f'"{CHECKSUM}": "'.encode()  # what comes before it in the header
_whole: set[tuple] = set()  # the files, as they were, whose checksum this process has checked


class _Place(NamedTuple):
    """The dtype as safetensors calls it, bytes a number, and shape of a tensor in a file."""

    dtype: str
    itemsize: int
    shape: tuple[int, ...]


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file with a checksum, atomically.

    tensors: by name.
    metadata: text for the file's header.

    Raises:
        OSError: it cannot be written; a full disk is named with the bytes needed and free.
    """
    layout = {
        name: _Place(DTYPES[tensor.dtype], tensor.element_size(), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    blocks = (
        (name, 0, tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        for name, tensor in tensors.items()
    )
    _save(Path(path), layout, blocks, metadata)


def save_rows(
    path: str | Path,
    layout: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    rows: Iterable[tuple[str, int, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file piece by piece, with a checksum, atomically and without a copy in memory.

    layout: dtype and shape of each tensor, by name.
    rows: (name, number of the first row, rows of that tensor); together they must cover all tensors.
    metadata, errors: as of `save_tensors`.
    """
    places = {
        name: _Place(f"{dtype.kind.upper()}{8 * dtype.itemsize}", dtype.itemsize, tuple(shape))
        for name, (dtype, shape) in layout.items()
    }
    blocks = (
        (name, first * math.prod(layout[name][1][1:]), np.ascontiguousarray(block, layout[name][0]))
        for name, first, block in rows
    )
    _save(Path(path), places, blocks, metadata)


def _save(
    path: Path,
    layout: Mapping[str, _Place],
    blocks: Iterable[tuple[str, int, np.ndarray]],
    metadata: Mapping[str, str] | None,
) -> None:
    """Write a safetensors file; `blocks`: a tensor's name, the number of the block's first value, and its values."""
    header, at = {"__metadata__": {**(metadata or {}), CHECKSUM: BLANK}}, 0
    for name, place in sorted(layout.items(), key=lambda item: (-item[1].itemsize, item[0])):
        span = (at, at := at + place.itemsize * math.prod(place.shape))
        header[name] = {"dtype": place.dtype, "shape": place.shape, "data_offsets": span}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # numbers of 8 bytes begin at multiples of 8
    begin = 8 + len(head)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            file.truncate(begin + at)
            for name, first, block in blocks:
                file.seek(begin + header[name]["data_offsets"][0] + first * layout[name].itemsize)
                if block.size:
                    file.write(block.data.cast("B"))
        digest = checksum(temporary)  # the system still has the file in memory
        with temporary.open("r+b") as file:
            file.seek(8 + head.index(MARK) + len(MARK))
            file.write(digest.encode())

    write_through(path, write, begin + at)


def open_tensors(path: str | Path) -> safe_open:
    """Open a safetensors file for lazy reading on the CPU.

    If `save_tensors` or `save_rows` wrote it, its checksum is checked, once in a process.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it was cut short, damaged, or is another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; make it first, or give the folder that holds it")
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): it was cut short or is something else; "
            "make it or download it again"
        ) from error
    check_once(path, _require_whole)
    return file


def check_once(path: Path, check: Callable[[Path], None]) -> None:
    """Call `check`, which raises if the file is damaged, unless this process has done so for the file as it is now."""
    stat = path.stat()
    state = path.absolute(), stat.st_ino, stat.st_size, stat.st_mtime_ns
    if state not in _whole:
        check(path)
        _whole.add(state)


def _require_whole(path: Path) -> None:
    """Raise ValueError if a file has a checksum in its header and another one in fact."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        head = file.read(length)
        at = head.find(MARK)
        if at < 0:  # another library wrote it
            return
        at += len(MARK)
        blank = head[:at] + BLANK.encode() + head[at + len(BLANK) :]
        digest = zlib.crc32(blank, zlib.crc32(struct.pack("<Q", length)))
        if f"{crc_of(file, digest):08x}".encode() != head[at : at + len(BLANK)]:
            raise ValueError(f"{path} is damaged: its checksum is not that of what was written; make it again")


def metadata_in(file: safe_open) -> dict[str, str]:
    """Return the text in the header of an open safetensors file, without the checksum."""
    return {name: text for name, text in (file.metadata() or {}).items() if name != CHECKSUM}


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
