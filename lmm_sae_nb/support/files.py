"""Write files and folders atomically, and identify their content by a hash."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

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
        ValueError: the file was cut short or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not whole JSON ({error}); delete it and make it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object; delete it and make it again")
    return value


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
