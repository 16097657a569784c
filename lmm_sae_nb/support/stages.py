"""What moves between notebooks: files written whole or not at all, stages that know if they are current."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

from lmm_sae_nb.support.files import fingerprint, project_root, read_json, write_json

MANIFEST, METRICS = "manifest.json", "metrics.json"


VERSIONED = ("lmm-sae-nb", "torch", "transformers", "datasets", "safetensors", "numpy")


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
