"""Run the pages for several seeds of the SAE and write book/seeds.json: each metric's value for each seed.

Six seeds take an hour of two cores. Every seed is a run, `data/artifacts/seed_0` and so on, with the pages'
own parameters. Only the run's name and notebook 01's `seed` differ. The executed pages are kept in the run's folder
`pages`. A command that was stopped goes on where it was, and what is done with the present code is not run again. The
file is written after each seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lmm_sae_nb.show.seed_study import Measured, SeedStudy
from lmm_sae_nb.support import notebooks
from lmm_sae_nb.support.files import fingerprint, project_root, read_json, write_atomic, write_json
from lmm_sae_nb.support.parameters import leave_out
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.stages import Stage

SEEDS = (0, 1, 2, 3, 4, 5)
PAGES = ("01", "02", "03", "04", "06", "08")  # in the order in which they are run
SEEDED = "01"  # the page whose seed differs
COMMAND = "python -m lmm_sae_nb.benchmarks seeds"
ABOUT = (
    "The metrics of SAEs that differ only in the seed of notebook 01. `values` are in the order of `seeds`, with the "
    "ends of their 99% intervals in `low` and `high`."
)
TIMES = re.compile("seconds|per_second")  # metrics of how fast the machine is


@dataclass(frozen=True)
class PageRun:
    """One page of one seed.

    source: the notebook.
    seed: of the SAE.
    """

    source: Path
    seed: int

    @property
    def run(self) -> str:
        return f"seed_{self.seed}"

    @property
    def values(self) -> dict[str, object]:
        """The parameters that differ from the notebook's own; a page of the study does not read the study."""
        given: dict[str, object] = {"run": self.run}
        if self.source.stem.startswith(SEEDED):
            given["seed"] = self.seed
        return given | ({"seeds_study": ""} if "seeds_study" in notebooks.parameters(self.source) else {})

    @property
    def stages(self) -> list[Stage]:
        """The stages that the page has made."""
        stages = (Stage(self.run, name) for name in notebooks.stages(self.source, ("stage",)))
        return [stage for stage in stages if stage.metrics]

    def file(self, ending: str) -> Path:
        """Return the path of the executed page, `.ipynb`, or of the record that it is done, `.json`."""
        return project_root() / "data" / "artifacts" / self.run / "pages" / (self.source.stem + ending)

    def is_done(self) -> bool:
        """Return whether the page has run with the present notebook, parameters, inputs and code."""
        record = self.file(".json")
        if not record.is_file() or not self.stages:
            return False
        known = read_json(record)
        same = (known["code"], known["values"]) == (_statements(self.source), self.values)
        return same and all(stage.holds() for stage in self.stages)

    def execute(self, on_cell) -> float:
        """Run the page and record that it is done; return the seconds.

        on_cell: called with keyword arguments when a code cell starts.
        """
        began, record, code = time.monotonic(), self.file(".json"), _statements(self.source)
        record.unlink(missing_ok=True)
        notebook = record.parent / ".sources" / f"{self.source.stem}.ipynb"
        notebooks.convert(self.source, notebook)
        notebooks.execute(notebook, self.file(".ipynb"), self.values, root=project_root(), on_cell=on_cell)
        seconds = time.monotonic() - began
        write_json(record, {"code": code, "values": self.values, "seconds": round(seconds)})
        return seconds


def _statements(source: Path) -> str:
    """The hash of a notebook's code; prose and comments do not count."""
    return hashlib.sha256(notebooks.ast.unparse(notebooks.tree(source)).encode()).hexdigest()


def _code_cells(source: Path) -> int:
    """How many code cells run: the notebook's own, and the one with the parameters that differ."""
    return 1 + len(re.findall(r"^# %%(?! \[markdown\])", source.read_text(encoding="utf-8"), re.MULTILINE))


def chosen_pages(numbers: Iterable[str] = PAGES, root: Path | None = None) -> list[Path]:
    """Return the notebooks with these numbers, in their order.

    Raises:
        ValueError: there is no notebook with one of the numbers.
    """
    found = {source.stem.partition("_")[0]: source for source in notebooks.sources(root or project_root())}
    if unknown := sorted(set(numbers) - set(found)):
        raise ValueError(f"there are no notebooks {', '.join(unknown)}; there are {', '.join(found)}")
    return [found[number] for number in sorted(numbers)]


def recipe(sources: Iterable[Path], root: Path | None = None, made: Collection[str] | None = None) -> dict[str, dict]:
    """Return what all SAEs of a study have in common: the pages' parameters, and the hashes of the models they name.

    Parameters that change no result, the run, and notebook 01's seed are left out.

    made: the stages whose results the study holds; by default all that the pages make. A study that is older than a
        stage says nothing of that stage, so parameters that reach no other stage are left out, too.
    """
    given = {}
    for source in sources:
        left_out = notebooks.ignored(source, made) | {"run"} | ({"seed"} if source.stem.startswith(SEEDED) else set())
        known = notebooks.parameters(source)
        given[source.stem] = leave_out({name: each.default for name, each in known.items()}, left_out)
    text = str(given)
    models = sorted(set(re.findall(r"'(data/models/[^']+)'", text)))
    return {"pages": given, "models": {name: fingerprint((root or project_root()) / name) for name in models}}


def differences(one: dict, other: dict, name: str = "") -> list[str]:
    """Return a line for each value that differs between two recipes, with its dotted name."""
    lines = []
    for key in sorted(one.keys() | other.keys()):
        before, now = one.get(key), other.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            lines += differences(before, now, f"{name}{key}.")
        elif before != now:
            lines.append(f"{name}{key} was {before!r} and is {now!r}")
    return lines


def collect(sources: Sequence[Path], seeds: Sequence[int], missing: Sequence[int], made: dict) -> SeedStudy:
    """Gather the metrics of finished seeds.

    seeds: whose pages are all done.
    missing: whose pages are not.
    made: date, machine and versions.
    """
    names = [name for source in sources for name in notebooks.stages(source, ("stage",))]
    stages = {name: _measured([Stage(PageRun(sources[0], seed).run, name).metrics for seed in seeds]) for name in names}
    return SeedStudy(ABOUT, COMMAND, made, recipe(sources), list(seeds), list(missing), stages)


def _measured(rows: Sequence[dict]) -> dict[str, Measured]:
    """A stage's metrics by name.

    rows: the metrics of each SAE.
    """
    names = dict.fromkeys(name for row in rows for name in row if not TIMES.search(name))
    ends = {name for name in names if name.endswith(("_low", "_high")) and name.rpartition("_")[0] in names}

    def column(name: str) -> list[int | float | None] | None:
        return [_short(row.get(name), 4 if name in ends else 5) for row in rows] if name in names else None

    found = {
        name: Measured.of(column(name), column(f"{name}_low"), column(f"{name}_high"))
        for name in names
        if name not in ends
    }
    return {name: replace(measured, median=_short(measured.median)) for name, measured in found.items()}


def _short(value: int | float | None, digits: int = 5) -> int | float | None:
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def write_study(path: Path, study: SeedStudy) -> None:
    """Write a study as JSON, each metric on one line."""
    write_atomic(path, (_lines(asdict(study)) + "\n").encode())


def _lines(value: object, indent: str = "") -> str:
    """A value as JSON: on one line if it is short, else a line for each entry; entries that are None are left out."""
    if isinstance(value, dict):
        value = {name: each for name, each in value.items() if each is not None}
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, dict) or (len(line) < 300 and "{" not in line[1:]):
        return line
    entries = (f"{indent}  {json.dumps(name)}: {_lines(each, indent + '  ')}" for name, each in value.items())
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}"


def run(
    seeds: Sequence[int], sources: Sequence[Path], path: Path, made: dict, *, jobs: int = 1
) -> dict[int, Exception]:
    """Run the pages of every seed that are not done, and write the study after each seed.

    seeds: of the SAEs.
    sources: the pages, each after those that it reads.
    path: where the study is written.
    made: date, machine and versions.
    jobs: how many seeds run side by side.

    Returns: the seeds that failed, with the error.
    """
    cells = {source: _code_cells(source) for source in sources}
    finished: list[int] = []
    failed: dict[int, Exception] = {}
    with (
        progress_bar(total=len(seeds) * sum(cells.values()), desc="cells", unit="cell") as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):

        def one_seed(seed: int) -> None:
            for page in (PageRun(source, seed) for source in sources):
                if page.is_done():
                    bar.update(cells[page.source])
                    continue
                seconds = page.execute(lambda **_: bar.update())
                bar.write(f"seed {seed}, {page.source.stem}: {seconds:.0f} s", file=sys.stderr)

        waiting = {pool.submit(one_seed, seed): seed for seed in seeds}
        for future in as_completed(waiting):
            if error := future.exception():
                failed[waiting[future]] = error
                continue
            finished.append(waiting[future])
            missing = [seed for seed in seeds if seed not in finished]
            write_study(path, collect(sources, sorted(finished), missing, made))
    return failed


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this command's options to a parser."""
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the SAEs (default: 0 to 5)")
    parser.add_argument("--pages", nargs="+", default=list(PAGES), help="numbers of the pages, such as 01 02")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="seeds that run side by side; they share the cores",
    )
    parser.add_argument("--out", type=Path, default=project_root() / "book" / "seeds.json")


def main(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        SystemExit: the world is missing, or a page failed; the finished seeds are written.
    """
    from lmm_sae_nb.benchmarks.comparison import circumstances

    root = project_root()
    if not (root / "data/artifacts/tiny/world/concepts.json").is_file():
        raise SystemExit("the datasets of Picture World are missing; run `make world` first")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
    os.environ["IPYTHONDIR"] = notebooks.quiet_kernels(root / "build" / "ipython")
    sources = chosen_pages(options.pages)
    failed = run(options.seeds, sources, options.out, circumstances(), jobs=options.jobs)
    for seed, error in failed.items():
        print(f"seed {seed}: {error}", file=sys.stderr)
    if failed:
        raise SystemExit("a page failed; correct the error and run the command again, it goes on where it was")
    print(options.out)
