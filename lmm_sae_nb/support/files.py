"""Write files and folders atomically, and identify their content by a hash."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

LARGEST = 2**30  # bytes of a JSON file that is read
AGAIN = "correct it, or delete it and run the notebook that makes it again"
TEMPORARY = ".tmp"  # ending of the hidden names of files that are being written
ASIDE = ".old"  # ending of the hidden names of folders that are being replaced
SAFETENSORS_TEMPORARY = ".tmp" + "[A-Za-z0-9]" * 6  # the names that the safetensors library writes to


def project_root() -> Path:
    """Return the nearest folder, at or above the working directory, that holds pyproject.toml.

    Raises:
        FileNotFoundError: there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").is_file():
            return folder
    raise FileNotFoundError(f"no pyproject.toml in {here} or above it; start from inside the lmm-sae-nb checkout")


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_through(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that readers see the old or the new one, never half of one.

    path: the file; its folder is made if it is missing.
    write: fills the temporary file whose path it gets, which is then renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def clear_temporaries(folder: str | Path, *, deep: bool = False) -> None:
    """Delete half-written files and folders that killed processes left.

    folder: nobody may write there at the same time.
    deep: also look in the folders below.
    """
    find = Path(folder).rglob if deep else Path(folder).glob
    for leftover in [*find(f".*{TEMPORARY}"), *filter(Path.is_file, find(SAFETENSORS_TEMPORARY))]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write bytes so that even after a crash `path` holds its old content or all of `data`."""
    write_through(Path(path), lambda temporary: temporary.write_bytes(data))


def write_json(path: str | Path, value: object) -> None:
    """Write a value as indented JSON, atomically.

    Raises:
        ValueError: the value holds something that JSON lacks, such as NaN or infinity.
    """
    try:
        data = as_json(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; write plain finite numbers, text, lists and dictionaries") from error
    write_atomic(path, data)


def as_json(value: object) -> bytes:
    """Return the bytes that `write_json` writes."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: str | Path) -> dict:
    """Read a JSON object.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: as `parse_json`, or the file holds something else than an object.
    """
    value = parse_json(read_whole(path), path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object; {AGAIN}")
    return value


def read_whole(path: str | Path) -> bytes:
    """Read a file that is small enough to be read at once.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is a folder, or larger than `LARGEST`.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file; give the path of a file")
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; run the notebook that makes it, or correct the path")
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(
            f"{path} has {size / 2**30:.1f} GiB, more than the {LARGEST / 2**30:.0f} GiB that are read; {AGAIN}"
        )
    return path.read_bytes()


def parse_json(data: bytes | str, origin: object) -> object:
    """Return the value of a JSON text.

    origin: the file that it comes from, for errors.

    Raises:
        ValueError: the text is empty, cut short, binary or nested too deeply, has a name twice in an object, or a
            number that is not finite.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        if not data.strip():
            why = "it is empty"
        elif isinstance(error, RecursionError):
            why = "it is nested too deeply"
        elif isinstance(error, UnicodeDecodeError):
            why = f"byte {error.start} is not UTF-8"
        else:
            why = str(error)
        raise ValueError(f"{origin} is not whole JSON ({why}); {AGAIN}") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object's entries; a name that comes twice would hide a value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return found


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no finite number")


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _constant(text)


def sync_folder(folder: str | Path) -> None:
    """Flush a folder and everything in it to the disk."""
    folder = Path(folder)
    for path in (*folder.rglob("*"), folder):
        sync(path)


def replace_folder(temporary: str | Path, final: str | Path) -> None:
    """Put a finished folder in the place of `final`.

    The old folder is kept aside until the new one is in place. A kill in between can leave no `final`;
    `recover_folder` then restores the old one.
    """
    temporary, final = Path(temporary), Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(final)
    sync_folder(temporary)
    aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=ASIDE, dir=final.parent))
    if final.exists():
        final.replace(aside / final.name)
    temporary.replace(final)
    sync(final.parent)
    shutil.rmtree(aside)


def recover_folder(final: str | Path) -> None:
    """Clean up after a killed `replace_folder`: restore the old folder unless the new one is in place."""
    final = Path(final)
    for aside in final.parent.glob(f".{glob.escape(final.name)}.*{ASIDE}"):
        if (aside / final.name).exists() and not final.exists():
            (aside / final.name).replace(final)
        shutil.rmtree(aside)


def fingerprint(path: str | Path) -> str:
    """Return the SHA-256 of a file, or of a folder's files and their relative paths.

    Raises:
        FileNotFoundError: there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"the input {path} is missing; run the notebook that writes it first")
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _digest(file)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()} {fingerprint(file)}\n".encode())
    return digest.hexdigest()


def _digest(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
