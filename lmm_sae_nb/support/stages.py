"""Stages and pages: what a notebook makes, what it is made from, and whether it is still current."""

from __future__ import annotations

import ast
import codecs
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lmm_sae_nb.support import locks
from lmm_sae_nb.support.files import (
    AGAIN,
    MANIFEST,
    changed_files,
    clear_temporaries,
    existing,
    fingerprint,
    output,
    outputs,
    parse_json,
    project_root,
    read_json,
    read_whole,
    temporaries,
    write_json,
)
from lmm_sae_nb.support.names import folder_name
from lmm_sae_nb.support.parameters import check_page, declared_in, leave_out

METRICS, BEGUN = "metrics.json", ".begun.json"
IPYTHON = {"In", "Out"}  # plain values in a kernel's namespace that are no parameters
T = TypeVar("T")
Metrics = dict[str, int | float]  # what a stage reports, flat
RECORDED = {  # what a manifest holds, with its type
    **dict.fromkeys(("params", "inputs", "code", "outputs", "versions"), dict), "results": list,
    "seconds": (int, float),
}  # fmt: skip
VERSIONED = ("lmm-sae-nb", "torch", "transformers", "datasets", "safetensors", "numpy")


def code_fingerprints(modules: Iterable[ModuleType]) -> dict[str, str]:
    """SHA-256 of the statements of modules and of what they import from their package, by name.

    Comments and layout do not count. An import inside a function is not seen.
    """
    waiting, found = list(modules), {}
    while waiting:
        module = waiting.pop()
        if module.__name__ not in found:
            found[module.__name__] = code_fingerprint(module.__file__)
            waiting += _imported(module)
    return dict(sorted(found.items()))


def code_fingerprint(path: str | Path) -> str:
    """Return the SHA-256 of a Python file's statements, without comments and layout."""
    statements = ast.unparse(ast.parse(Path(path).read_text(encoding="utf-8")))
    return hashlib.sha256(statements.encode()).hexdigest()


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
    """The folder of what a page makes in one go: `data/artifacts/<run>/<name>/`.

    It holds results, a flat `metrics.json` and `manifest.json`, the record of what they were made from. A folder
    without a manifest is not finished.

    run: the folder of a run's stages.
    name: the folder of this stage.

    Raises:
        ValueError: a name that is not one folder's (`folder_name`).
    """

    def __init__(self, run: str, name: str):
        self.run, self.name = folder_name(run, "a run"), folder_name(name, "a stage")
        self.folder = project_root() / "data" / "artifacts" / run / name
        self.is_current = False
        self._key: dict[str, dict] = {}
        self._made: list[str] = []  # names of the results that hold for this key
        self._started = time.monotonic()

    def path(self, filename: str) -> Path:
        """Return where this stage keeps `filename`; the folder is made when something is written."""
        return self.folder / filename

    def begin(self, params: Mapping, inputs: Iterable[str | Path], code: Mapping[str, str] | None = None) -> Stage:
        """Find out whether the stage is current; if it is not, forget the results that no longer hold.

        The stage is current if it was finished with the same parameters, inputs and code, its files are still there,
        and nobody who was asked failed to answer (`replies_failed` among its metrics). A run that was killed keeps
        the results that it had made.

        params: name to a plain value.
        inputs: files and folders, which are compared by their hashes.
        code: module name to hash, as `code_fingerprints` gives them.

        Raises:
            FileNotFoundError: an input is missing, because the step before has not run.
            FolderInUse: the stage is not current, and another process is making it.
        """
        self._key = {"params": _plain(params), "inputs": _fingerprints(inputs), "code": dict(code or {})}
        self._started = time.monotonic()
        manifest, begun = self._record(MANIFEST), self._record(BEGUN)
        known = next((record for record in (manifest, begun) if self._agrees(record)), None)
        finished = known is not None and known is manifest
        damaged = changed_files(self.folder, manifest) if finished else set()
        failed = finished and METRICS not in damaged and bool(self.metrics.get("replies_failed"))
        self.is_current = finished and not failed and not damaged
        made = known["results"] if known and not failed else []
        self._made = [name for name in made if f"{name}.json" not in damaged]
        if self.is_current and self._leftovers():
            with contextlib.suppress(OSError):  # another process may be about to finish the stage
                locks.keep(self.folder)
                clear_temporaries(self.folder)
                locks.let_go(self.folder)
        if not self.is_current:
            locks.keep(self.folder)
            clear_temporaries(self.folder)
            self.path(MANIFEST).unlink(missing_ok=True)  # first: from here on the folder is not whole
            for record in (manifest, begun):
                for name in set(record.get("results", []) if record else []) - set(self._made):
                    self.path(f"{name}.json").unlink(missing_ok=True)
            self._note()
        return self

    def result(self, name: str, kind: type[T] | Any, make: Callable[[], T]) -> T:
        """Return what `make` gives, kept as `<name>.json`: made if stale, else read.

        A fresh result is read back from the disk too, so that both ways give the same.

        name: the file's name without its ending.
        kind: the type of the result, as annotations have it: plain values, lists, dictionaries, dataclasses.
        make: called without arguments.

        Raises:
            ValueError: the file is not of this kind, as after a hand's change.
        """
        file = self.path(f"{name}.json")
        if name in self._made and not self.is_current:  # of a run that was killed: nobody has checked its files
            with contextlib.suppress(FileNotFoundError, ValueError):
                return read_typed(file, kind)
            self._made.remove(name)
        if name not in self._made:
            if self.is_current:
                raise ValueError(f"{self.folder} is finished without {file.name}; delete the folder and run again")
            write_json(file, TypeAdapter(kind).dump_python(make(), mode="json"))
            self._made.append(name)
            self._note()
        return read_typed(file, kind)

    @property
    def metrics(self) -> Metrics:
        """The stage's metrics, name to number; empty before it is finished."""
        file = self.path(METRICS)
        return read_typed(file, Metrics) if file.is_file() else {}

    @property
    def manifest(self) -> dict:
        """The record of what the stage was made from."""
        return read_manifest(self.path(MANIFEST))

    def finish(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Write metrics.json, then manifest.json, unless the stage is current; return the metrics as read back.

        metrics: name to number.

        Raises:
            ValueError: a metric is not a number.
        """
        if self.is_current:
            return self.metrics
        wrong = {
            name: value
            for name, value in metrics.items()
            if isinstance(value, bool) or not isinstance(value, (int, float))
        }
        if wrong:
            raise ValueError(f"metrics.json is flat, name to number; these are not numbers: {wrong}")
        write_json(self.path(METRICS), dict(metrics))
        self.path(BEGUN).unlink(missing_ok=True)
        manifest = {
            "run": self.run,
            "stage": self.name,
            **self._key,
            "seed": self._key["params"].get("seed"),
            "results": self._made,
            "outputs": outputs(self.folder),
            "versions": versions(),
            "seconds": round(time.monotonic() - self._started, 3),
            "peak_memory_bytes": peak_memory(),
        }
        write_json(self.path(MANIFEST), manifest, checked=True)
        self.is_current = True
        locks.let_go(self.folder)
        return self.metrics

    def holds(self) -> bool:
        """Return whether a finished stage would be made again alike: its inputs, code and files are unchanged.

        It needs no imports of the page's code. It does not know the page's parameters.
        """
        manifest, root = self._record(MANIFEST), project_root()
        if not self._agrees(manifest) or changed_files(self.folder, manifest) or self.metrics.get("replies_failed"):
            return False
        try:
            inputs = {name: fingerprint(root / name) for name in manifest["inputs"]}
            code = {name: code_fingerprint(importlib.util.find_spec(name).origin) for name in manifest["code"]}
        except (AttributeError, FileNotFoundError, ModuleNotFoundError):  # an input or a module is gone
            return False
        return (inputs, code) == (manifest["inputs"], manifest["code"])

    def _leftovers(self) -> bool:
        """Return whether a killed process left a lock or half-written files."""
        return self.path(locks.STAGE_LOCK).exists() or bool(temporaries(self.folder))

    def _note(self) -> None:
        """Record which results hold for this key."""
        write_json(self.path(BEGUN), {**self._key, "results": self._made})

    def _record(self, filename: str) -> dict | None:
        try:
            return read_manifest(self.path(filename))
        except (FileNotFoundError, ValueError):
            return None

    def _agrees(self, record: dict | None) -> bool:
        """Whether a record is of this key; one of an older version, which lists no results, is not."""
        return record is not None and "results" in record and all(record.get(k) == v for k, v in self._key.items())


class Page:
    """What a notebook knows of its run: its parameters, what earlier pages made, the stages that it makes.

    `page = Page(globals())` stands right behind the parameters cell and the imports. Every plain value that has a
    name by then is a parameter; every parameter that is the path of a file or folder is an input of the page's
    stages; the code that counts is what the page has imported of this package, but for what only draws.

    namespace: the notebook's `globals()`.

    A value that is not of the type in the parameters cell is refused, as papermill would let it pass.

    Raises:
        ValueError: there is no parameter `run`, or it cannot name a folder, or a value is not of its type.
    """

    def __init__(self, namespace: Mapping[str, object]):
        plain = {
            name: value
            for name, value in namespace.items()
            if not name.startswith("_") and name not in IPYTHON and _is_plain(value)
        }
        check_page(declared_in(namespace.get("In", [])), plain)
        if not isinstance(plain.get("run"), str):
            raise ValueError('a page has a parameter `run: str`; write it into the cell tagged "parameters"')
        self.run: str = folder_name(plain.pop("run"), "a run")
        self.params, self.root, self._namespace = plain, project_root(), namespace

    def locate(self, name: str) -> Path | str:
        """Return the folder of this project that a parameter names, or the name itself, as of a model on the hub.

        An empty name, which says that there is none, stays empty.
        """
        return (name and existing(self.root, name)) or name

    def stage(
        self, name: str, *, after: Iterable[str] = (), beside: Iterable[str] = (), without: Iterable[str] = ()
    ) -> Stage:
        """Open a stage that this page makes.

        name: the stage's folder.
        after: stages of the same run that it reads.
        beside: stages that it reads if they are there.
        without: parameters that change no result, such as how many processes work; "endpoint.timeout" is one entry of
            a dictionary.

        Raises:
            FileNotFoundError: a stage that it reads is not finished.
            ValueError: a stage in `after` was made from other content of an input that this one reads too, such as a
                folder of pictures to which some were added.
        """
        params = leave_out(self.params, set(without))
        inputs = [self.file(stage, MANIFEST) for stage in after]
        inputs += [file for stage in beside if (file := Stage(self.run, stage).path(MANIFEST)).is_file()]
        paths = dict.fromkeys(existing(self.root, text) for text in _texts(params))
        inputs += [path for path in paths if path not in (None, self.root)]
        self._require_same(after, inputs)
        return Stage(self.run, name).begin(params, inputs, code_fingerprints(self._code()))

    def _require_same(self, stages: Iterable[str], inputs: Iterable[Path]) -> None:
        now = _fingerprints(inputs)
        for stage in stages:
            then = Stage(self.run, stage).manifest["inputs"]
            if changed := sorted(name for name in then.keys() & now.keys() if then[name] != now[name]):
                raise ValueError(
                    f"{', '.join(changed)} changed after {_maker(stage)} had made the stage {stage!r} from it; run "
                    f"{_maker(stage)} again"
                )

    def file(self, stage: str, filename: str = "") -> Path:
        """Return a file of a stage that an earlier page made, or the stage's folder.

        Raises:
            FileNotFoundError: it is missing; the message names the notebook to run.
        """
        return require(self.run, stage, filename)

    def read(self, stage: str, result: str, kind: type[T] | Any) -> T:
        """Return a result that an earlier page kept with `Stage.result`.

        Raises:
            FileNotFoundError: as `file`.
            ValueError: as `read_typed`, or the file is not as it was when its stage was finished.
        """
        file = self.file(stage, f"{result}.json")
        manifest = Stage(self.run, stage).path(MANIFEST)
        recorded = read_json(manifest).get("outputs") if manifest.is_file() else {}
        expected = recorded.get(file.name) if isinstance(recorded, dict) else None
        if expected is not None and expected != output(file):
            raise ValueError(
                f"{file} was changed or damaged after its stage was finished; run {_maker(stage)} with "
                f"run={self.run!r} again"
            )
        return read_typed(file, kind)

    def _code(self) -> list[ModuleType]:
        """The package's modules that the page has imported, whole or something of them."""
        names = (
            value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            for value in self._namespace.values()
        )
        return [sys.modules[name] for name in dict.fromkeys(names) if isinstance(name, str) and _counts(name)]


def _counts(module: str) -> bool:
    """Whether a module's code can change a result: this package's does, but for the drawing and this file."""
    package = __name__.partition(".")[0]
    return module.startswith(f"{package}.") and not module.startswith(f"{package}.show") and module != __name__


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    return value is None or type(value) in (str, int, float, bool)


def _texts(value: object) -> Iterator[str]:
    """The texts in a plain value, however deep."""
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def read_typed(path: str | Path, kind: type[T] | Any) -> T:
    """Read a JSON file as a value of this kind; a text is no number, and true is not 1.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is no whole JSON, or is of another kind, as one of an older version is. The message names
            the file and the place in it.
    """
    data = read_whole(path)
    parse_json(data, path)
    try:
        return TypeAdapter(kind).validate_json(data.removeprefix(codecs.BOM_UTF8), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        found = repr(first["input"])
        raise ValueError(
            f"{path} does not hold what this version writes there: {f'at {place}: ' if place else ''}{first['msg']}, "
            f"not {found if len(found) <= 60 else found[:60] + '…'}; {AGAIN}"
        ) from None


def read_manifest(path: str | Path) -> dict:
    """Read a stage's manifest, or the record of a stage that has begun.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, or another version wrote it.
    """
    record = read_json(path)
    for name, kind in RECORDED.items():
        if (name in record or name in ("params", "inputs")) and not isinstance(record.get(name), kind):
            raise ValueError(f"{path} is no manifest of this version: {name} is {record.get(name)!r}; {AGAIN}")
    return record


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


def require(run: str, stage: str, filename: str = "") -> Path:
    """Return the path of what an earlier notebook wrote.

    filename: of the stage; without one, the folder of a finished stage.

    Raises:
        FileNotFoundError: it is missing; the message names the notebook that makes it.
    """
    path = Stage(run, stage).path(filename or MANIFEST)
    if not path.exists():
        missing = path.relative_to(project_root()).as_posix()
        raise FileNotFoundError(f"{missing} is missing; run {_maker(stage)} with run={run!r} first")
    return path if filename else path.parent


def _maker(stage: str) -> str:
    """The notebook that makes a stage, as a path from the project's root."""
    for notebook in sorted((project_root() / "notebooks").glob("*.py")):
        if re.search(rf'page\.stage\(\s*"{re.escape(stage)}"', notebook.read_text(encoding="utf-8")):
            return f"notebooks/{notebook.name}"
    return f"the notebook that makes the stage {stage!r}"
