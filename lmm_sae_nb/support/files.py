"""Write files and folders atomically, and identify their content by a hash."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

LARGEST = 2**30  # bytes of a JSON file that is read
AGAIN = "correct it, or delete it and run the notebook that makes it again"
MANIFEST = "manifest.json"  # of a stage's folder: the record of what it was made from, and of its files
TEMPORARY = ".tmp"  # ending of the hidden names of files that are being written
TEMPORARY_NAME = re.compile(rf"\..*\.[0-9a-f]{{32}}\{TEMPORARY}")  # the names that `temporary_name` gives
ASIDE = ".old"  # ending of the hidden names of folders that are being replaced
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the system's numbers for "no room"
CHECKSUM = "crc32"  # the key of a checksum in a JSON object, or in the header of a safetensors file
BLOCK = 2**20  # bytes that are read at a time
LARGE = 2**31  # bytes of a saved data set that is not read for its fingerprint
SETTLED = 2 * 10**9  # nanoseconds after which another write to a file is sure to change its time
_FINGERPRINTS: dict[tuple, str] = {}


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


def temporary_name(path: Path) -> Path:
    """Return a hidden name beside `path` to write to; `clear_temporaries` knows it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")


def write_through(path: Path, write: Callable[[Path], object], size: int | None = None) -> None:
    """Write a file so that readers see the old or the new one, never half of one.

    path: the file; its folder is made if it is missing.
    write: fills the temporary file whose path it gets, which is then renamed.
    size: bytes that it will have, if they are known, for the error.

    Raises:
        OSError: it cannot be written; if the disk is full, the message says how much is needed and how much is free.
    """
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise no_room(path, size, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def in_units(size: float) -> str:
    """Return a number of bytes as people read it, such as "999 bytes", "1.5 kB" or "4.29 GB"."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    for unit in units:
        if size < 999.5 or unit == units[-1]:
            break
        size /= 1000
    return f"{size:.3g} {unit}"


def free_bytes(path: str | Path) -> int:
    """Return the free bytes of the disk of a path, which need not exist."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.is_dir())).free


def no_room(path: str | Path, needed: int | None, error: OSError | None = None) -> OSError:
    """Return the error for a file or folder that does not fit on its disk.

    needed: bytes at most, if they are known.
    error: what the system said, if it was tried.
    """
    reason = f" cannot be written ({error.strerror or error})" if error else " does not fit on its disk"
    wanted = "" if needed is None else f"it needs up to {in_units(needed)}, "
    return OSError(
        error.errno if error else errno.ENOSPC,
        f"{path}{reason}: {wanted}{in_units(free_bytes(path))} are free there; make room and run again",
    )


def clear_temporaries(folder: str | Path, *, deep: bool = False) -> None:
    """Delete half-written files and folders that killed processes left; files of other names stay.

    folder: nobody may write there at the same time.
    deep: also look in the folders below.
    """
    for leftover in temporaries(folder, deep=deep):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def temporaries(folder: str | Path, *, deep: bool = False) -> list[Path]:
    """Return the half-written files and folders in a folder; `deep`: also in the folders below."""
    find = Path(folder).rglob if deep else Path(folder).glob
    return [path for path in find(f".*{TEMPORARY}") if TEMPORARY_NAME.fullmatch(path.name)]


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write bytes so that even after a crash `path` holds its old content or all of `data`."""
    write_through(Path(path), lambda temporary: temporary.write_bytes(data), len(data))


def write_json(path: str | Path, value: object, *, checked: bool = False) -> None:
    """Write a value as indented JSON, atomically.

    checked: the value is an object; add its checksum, which `read_json` checks and takes out again.

    Raises:
        ValueError: the value holds something that JSON lacks, such as NaN or infinity.
    """
    try:
        data = as_json(value | {CHECKSUM: _sum(value)} if checked else value)
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
        ValueError: as `parse_json`, the file holds something else than an object, or has a checksum that differs.
    """
    value = parse_json(read_whole(path), path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object; {AGAIN}")
    if isinstance(value.get(CHECKSUM), str):
        expected = value.pop(CHECKSUM)
        if _sum(value) != expected:
            raise ValueError(f"{path} was changed or damaged since it was written; delete it and make it again")
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


def _sum(value: Mapping) -> str:
    """Return the CRC-32 of an object's JSON, the same before it was written and after it was read."""
    return f"{zlib.crc32(json.dumps(value, ensure_ascii=False).encode(errors='surrogatepass')):08x}"


def checksum(path: str | Path) -> str:
    """Return the CRC-32 of a file, eight hexadecimal digits.

    It finds every flipped bit and every burst of up to 32 bits, and misses one other accident in four billion; it is
    no guard against intent. It is chosen for its speed: 4.7 GB/s on one core, where blake2b has 0.9 and SHA-256 1.7.
    """
    with Path(path).open("rb", buffering=0) as file:
        return f"{crc_of(file):08x}"


def crc_of(file: IO[bytes], start: int = 0) -> int:
    """Return the CRC-32 of the rest of an open file, after bytes whose CRC-32 is `start`."""
    block = memoryview(bytearray(BLOCK))
    while size := file.readinto(block):
        start = zlib.crc32(block[:size], start)
    return start


def outputs(folder: Path) -> dict[str, str]:
    """Return every file of a stage but the manifest and half-written (dot) files, with its size and checksum."""
    files = (file for file in sorted(folder.rglob("[!.]*")) if file.is_file() and file.name != MANIFEST)
    return {file.relative_to(folder).as_posix(): output(file) for file in files}


def output(file: Path) -> str:
    """Return what a manifest says of a file: its size and checksum."""
    return f"{file.stat().st_size} bytes, crc32 {checksum(file)}"


def changed_files(folder: Path, manifest: Mapping) -> set[str]:
    """Return the names of a stage's files that are missing, new or other than its manifest records."""
    recorded, actual = manifest.get("outputs"), outputs(folder)
    recorded = recorded if isinstance(recorded, dict) else {}
    return {name for name in recorded.keys() | actual.keys() if recorded.get(name) != actual.get(name)}


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
    """Return the SHA-256 of a file, or of a folder's files and their relative paths; links are followed.

    A large saved data set is not read. Of its shards only names and sizes count, and the fingerprint that `datasets`
    keeps in `state.json`.

    Raises:
        FileNotFoundError: there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"the input {path} is missing; run the notebook that writes it first")
    if path.is_file():
        return _file_fingerprint(path)
    digest, files = hashlib.sha256(), files_below(path)
    shards = {
        file: file.stat().st_size for file in files if file.suffix == ".arrow" and _is_saved_data_set(file.parent)
    }
    unread = shards if sum(shards.values()) > LARGE else {}
    for file in files:
        known = f"{unread[file]} bytes" if file in unread else _file_fingerprint(file)
        line = f"{file.relative_to(path).as_posix()} {known}\n"
        digest.update(line.encode(errors="surrogateescape"))  # names may hold bytes that are no text
    return digest.hexdigest()


def _is_saved_data_set(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def existing(root: Path, text: str) -> Path | None:
    """Return the file or folder that a text names, from `root` or in full; None if it names none, as most texts do."""
    path = root / text
    return path if os.path.exists(path) else None  # Path.exists raises for a text that is too long for a name


def files_below(folder: str | Path) -> list[Path]:
    """Return all files in a folder and those below it, sorted. Links are followed, into each folder once."""
    found, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [file for name in names if (file := Path(here, name)).is_file()]
    return sorted(found)


def _file_fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file. It is read once in a process, unless it changes or has just been written."""
    state = path.stat()
    written = max(state.st_mtime_ns, state.st_ctime_ns)
    key = (str(path.absolute()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
    if (known := _FINGERPRINTS.get(key)) is None:
        with path.open("rb") as file:
            known = hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _digest(file)
        if time.time_ns() - written > SETTLED:
            _FINGERPRINTS[key] = known
    return known


def _digest(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
