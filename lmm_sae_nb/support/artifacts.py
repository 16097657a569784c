"""What moves between notebooks: files written whole or not at all, stages that know if they are current."""

from __future__ import annotations

import ast
import contextlib
import glob
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import struct
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST, METRICS = "manifest.json", "metrics.json"
TEMPORARY, ASIDE = ".tmp", ".old"  # how hidden names end: of what is being written, of what is being replaced
SAFETENSORS_TEMPORARY = ".tmp" + "[A-Za-z0-9]" * 6  # the names under which that library writes before it renames
VERSIONED = ("lmm-sae-nb", "torch", "transformers", "datasets", "safetensors", "numpy")


def project_root() -> Path:
    """The nearest folder at or above the working directory that holds pyproject.toml."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").is_file():
            return folder
    raise FileNotFoundError(f"no pyproject.toml in {here} or above it; start from inside the lmm-sae-nb checkout")


# Writing: temporary name in the same folder, fsync, rename.


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, from the system's memory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_through(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: readers see old or new, never half."""
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
    """Delete the half-written files and folders that killed writers left where nobody else is writing now, and, if
    `deep`, in the folders below."""
    find = Path(folder).rglob if deep else Path(folder).glob
    for leftover in [*find(f".*{TEMPORARY}"), *filter(Path.is_file, find(SAFETENSORS_TEMPORARY))]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write bytes so that `path` holds either what it held before or all of `data`, also after a crash."""
    write_through(Path(path), lambda temporary: temporary.write_bytes(data))


def write_json(path: str | Path, value: object) -> None:
    """Write a value as indented JSON, atomically; NaN and infinity, which JSON lacks, are a ValueError."""
    try:
        data = as_json(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; write plain finite numbers, text, lists and dictionaries") from error
    write_atomic(path, data)


def as_json(value: object) -> bytes:
    """The bytes that `write_json` writes."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: str | Path) -> dict:
    """Read a JSON object; ValueError if the file was cut short or holds something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not whole JSON ({error}); delete it and make it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object; delete it and make it again")
    return value


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


def sync_folder(folder: str | Path) -> None:
    """Bring a folder and all that is in it from the system's memory to the disk."""
    folder = Path(folder)
    for path in (*folder.rglob("*"), folder):
        sync(path)


def replace_folder(temporary: str | Path, final: str | Path) -> None:
    """Put a finished folder in the place of `final`, setting the old one aside until the new one is there.

    Killed between the two, it leaves no `final`; `recover_folder` brings the old one back.
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
    """Clear up after a `replace_folder` that was killed: the old folder comes back if no new one got there."""
    final = Path(final)
    for aside in final.parent.glob(f".{glob.escape(final.name)}.*{ASIDE}"):
        if (aside / final.name).exists() and not final.exists():
            (aside / final.name).replace(final)
        shutil.rmtree(aside)


# Stages.


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file, or of a folder's relative paths and files; FileNotFoundError if there is nothing."""
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


def hash_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of tensors in this order, whatever device they are on, a piece of each at a time."""
    digest = hashlib.sha256()
    for tensor in tensors:
        for piece in tensor.detach().flatten().split(2**22):
            digest.update(piece.cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def code_fingerprints(modules: Iterable[ModuleType]) -> dict[str, str]:
    """SHA-256 of the statements of modules and of what they import from their package, by name.

    Comments and layout do not count. An import inside a function is not seen.
    """
    waiting, found = list(modules), {}
    while waiting:
        module = waiting.pop()
        if module.__name__ not in found:
            statements = ast.unparse(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
            found[module.__name__] = hashlib.sha256(statements.encode()).hexdigest()
            waiting += _imported(module)
    return dict(sorted(found.items()))


def _imported(module: ModuleType) -> list[ModuleType]:
    """The modules of a module's own package that it imports, whole or something of them."""
    package = module.__name__.partition(".")[0] + "."
    names = {
        value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        for value in vars(module).values()
    }
    return [sys.modules[name] for name in names if isinstance(name, str) and name.startswith(package)]


def peak_memory() -> int | None:
    """The process's highest resident memory so far, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class Stage:
    """What a notebook makes in one go: `data/artifacts/<run>/<name>/` with manifest.json and a flat metrics.json."""

    def __init__(self, run: str, name: str):
        for word in (run, name):
            if word in ("", "..") or Path(word).name != word:
                raise ValueError(f"{word!r} cannot name a run or stage; use one folder name without separators")
        self.run, self.name = run, name
        self.folder = project_root() / "data" / "artifacts" / run / name

    def path(self, filename: str) -> Path:
        """Where this stage keeps `filename`; the folder is made when something is written."""
        return self.folder / filename

    def is_current(self, params: Mapping, inputs: Iterable[str | Path], code: Iterable[ModuleType] = ()) -> bool:
        """Whether the stage was finished with these parameters, inputs and code and its files are still there.

        Not if its metrics tell of `replies_failed`: whoever was asked and could not answer is to be asked again.
        code: modules as in `code_fingerprints`. A missing input is a FileNotFoundError: the step before has not run.
        """
        asked = {"params": _plain(params), "inputs": _fingerprints(inputs), "code": code_fingerprints(code)}
        if not self.path(MANIFEST).is_file():
            return False
        try:
            manifest = read_json(self.path(MANIFEST))
        except ValueError:
            return False
        asked["outputs"] = self._outputs()
        if any(manifest.get(key) != value for key, value in asked.items()):
            return False
        return not read_json(self.path(METRICS)).get("replies_failed")

    def finish(
        self,
        params: Mapping,
        inputs: Iterable[str | Path],
        metrics: Mapping,
        seconds: float,
        code: Iterable[ModuleType] = (),
    ) -> None:
        """Write metrics.json, then manifest.json: a stage without a manifest is not finished.

        metrics: name to number (ValueError for anything else); seconds: the stage's wall time; code: the modules
        that `is_current` is asked with.
        """
        wrong = {name: value for name, value in metrics.items() if not isinstance(value, (int, float))}
        if wrong:
            raise ValueError(f"metrics.json is flat, name to number; these are not numbers: {wrong}")
        write_json(self.path(METRICS), dict(metrics))
        manifest = {
            "run": self.run,
            "stage": self.name,
            "params": _plain(params),
            "seed": params.get("seed"),
            "inputs": _fingerprints(inputs),
            "code": code_fingerprints(code),
            "outputs": self._outputs(),
            "versions": versions(),
            "seconds": round(float(seconds), 3),
            "peak_memory_bytes": peak_memory(),
        }
        write_json(self.path(MANIFEST), manifest)

    def forget(self) -> None:
        """Remove what an earlier run left and this one does not make; replies on record (*.jsonl) stay."""
        for file in (self.path(MANIFEST), *map(self.path, self._outputs())):  # the manifest goes first
            if file.suffix != ".jsonl":
                file.unlink(missing_ok=True)

    def _outputs(self) -> dict[str, int]:
        """Every file of the stage but the manifest and half-written (dot) files, with its size in bytes."""
        files = (file for file in sorted(self.folder.rglob("[!.]*")) if file.is_file() and file.name != MANIFEST)
        return {file.relative_to(self.folder).as_posix(): file.stat().st_size for file in files}


def _plain(params: Mapping) -> dict:
    """Parameters as JSON gives them back (tuples become lists), so that old and new compare equal."""
    try:
        return json.loads(json.dumps(dict(params)))
    except TypeError as error:
        raise ValueError(f"a stage's parameters are numbers, text, lists and dictionaries: {error}") from error


def _fingerprints(inputs: Iterable[str | Path]) -> dict[str, str]:
    """Inputs by path from the project root (by name, if they lie outside it) with their hashes."""
    root = project_root()
    found = {}
    for path in (Path(path).resolve() for path in inputs):
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        if name in found:
            raise ValueError(f"two inputs are called {name}; keep inputs inside the project or name them apart")
        found[name] = fingerprint(path)
    return found


def require(run: str, stage: str, filename: str, notebook: str) -> Path:
    """The path of what an earlier notebook wrote; if missing, FileNotFoundError naming that notebook."""
    path = Stage(run, stage).path(filename)
    if not path.exists():
        shown = path.relative_to(project_root()).as_posix()
        raise FileNotFoundError(f"{shown} is missing; run notebooks/{Path(notebook).name} with run={run!r} first")
    return path
