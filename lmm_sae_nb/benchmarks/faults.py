"""Do to a small project what happens to users, some thousand times, and write book/faults.json: what was survived.

Each attempt is one fault at a place that its seed chooses, with an expected ending that does not come from the code
under test. Attempts run in processes of their own, which are ended when they take too long. A line is kept for each
attempt, so a command that was stopped goes on where it was; lines of other code are not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from multiprocessing import connection, get_context
from pathlib import Path
from typing import NamedTuple

from lmm_sae_nb.benchmarks import faults_endpoint, faults_files, faults_pages, faults_processes, faults_values
from lmm_sae_nb.benchmarks.faults_endings import Attempted, Ending, summary
from lmm_sae_nb.benchmarks.faults_world import MODEL, World, make_world
from lmm_sae_nb.support.files import project_root, read_json, write_json
from lmm_sae_nb.support.progress import progress_bar

PATIENCE = 300.0  # seconds until an attempt counts as hanging; a page takes the most
MEMORY = 8 * 2**30  # bytes that an attempt may take


class Kind(NamedTuple):
    """A kind of fault.

    attempt: called with the world, an empty folder and a seed.
    tries: seeds 0 to tries - 1 make a whole campaign.
    meaning: what is done, for people.
    """

    attempt: Callable[[World, Path, int], Ending]
    tries: int
    meaning: str


KINDS: dict[str, Kind] = {
    name: Kind(*given)
    for part in (faults_processes, faults_endpoint, faults_pages, faults_files, faults_values)
    for name, given in part.KINDS.items()
}


# ---- the attempts, in processes of their own -------------------------------------------------------------------


class Worker:
    """A forked process that makes one attempt after the other."""

    def __init__(self, world: World, place: Path):
        self._world, self._place = world, place
        self._start()

    def _start(self) -> None:
        context = get_context("fork")
        self.pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, self._world, self._place))
        self._process.start()
        end.close()
        self.task: tuple[str, int] | None = None

    def give(self, kind: str, seed: int) -> None:
        """Let the process make an attempt; its ending comes out of `pipe`."""
        self.task, self._began = (kind, seed), time.monotonic()
        self.pipe.send((kind, seed))

    def ending(self) -> Ending | None:
        """Return how the attempt ended; None if it is still under way. A process that hangs or has died is replaced."""
        if self.pipe.poll():
            try:
                return self.pipe.recv()
            except EOFError:
                self._process.join()
                return self._replaced("died", f"the process ended with code {self._process.exitcode}")
        if self.seconds > PATIENCE:
            return self._replaced("hang", f"no end after {PATIENCE:g} s")
        return None

    @property
    def seconds(self) -> float:
        """How long the attempt has taken so far."""
        return time.monotonic() - self._began

    def _replaced(self, ending: str, reason: str) -> Ending:
        task = self.task
        self.end()
        self._start()
        return Ending(f"seed {task[1]}", ending, reason)

    def end(self) -> None:
        """End the process and those that it has started."""
        with contextlib.suppress(ProcessLookupError):  # it may not yet lead a group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _serve(pipe: connection.Connection, world: World, place: Path) -> None:
    import torch

    os.setsid()
    torch.set_num_threads(1)
    quiet = os.open(place.parent / f"{place.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    resource.setrlimit(resource.RLIMIT_AS, (_virtual_bytes() + MEMORY, resource.RLIM_INFINITY))
    parent = os.getppid()
    while True:
        while not pipe.poll(1):
            if os.getppid() != parent:  # the campaign was killed
                os._exit(0)
        kind, seed = pipe.recv()
        pipe.send(attempt(world, place, kind, seed))


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def attempt(world: World, place: Path, kind: str, seed: int) -> Ending:
    """Make one attempt, in this process.

    place: emptied first. The attempt gets a folder of a new name there, as this process may hold locks of earlier ones.
    """
    os.chdir(world.folder)
    shutil.rmtree(place, ignore_errors=True)
    (own := place / f"{kind} {seed}").mkdir(parents=True)
    world.asked = place / "asked"
    try:
        return KINDS[kind].attempt(world, own, seed)
    except Exception:  # the campaign itself is at fault
        return Ending(f"seed {seed}", "campaign broken", traceback.format_exc()[-1500:])


# ---- the campaign ----------------------------------------------------------------------------------------------


def code_hash(root: Path) -> str:
    """Return a hash of all code of the package."""
    digest = hashlib.sha256()
    for file in sorted((root / "lmm_sae_nb").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def commit_of(root: Path) -> str:
    """Return the commit of the code, with "-dirty" if tracked files have changed since; "" outside a repository."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


def read_record(path: Path, code: str) -> list[Attempted]:
    """Return the attempts that were made with this code; a last line that was cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [each for each in (Attempted(**json.loads(line)) for line in lines if line) if each.code == code]


def run(
    world: World, kinds: Mapping[str, int], record: Path, *, code: str, jobs: int = 1, minutes: float = 60.0
) -> list[Attempted]:
    """Make the attempts that the record lacks, and add each to it as it ends.

    world: of `make_world`.
    kinds: how many attempts of each.
    record: a file of JSON lines.
    code: of `code_hash`.
    jobs: processes.
    minutes: after these no attempt is started.

    Returns: all attempts of this code, also those from the record.
    """
    made = read_record(record, code)
    known = {(each.kind, each.seed) for each in made}
    # the same part of every kind at any time: a campaign that is cut short has some of each
    waiting = [(seed / tries, kind, seed) for kind, tries in kinds.items() for seed in range(tries)]
    waiting = [(kind, seed) for _, kind, seed in sorted(waiting) if (kind, seed) not in known]
    record.parent.mkdir(parents=True, exist_ok=True)
    faults_processes.unmount_below(record.parent)
    latest = time.monotonic() + 60 * minutes
    workers = [Worker(world, record.parent / f"attempt{number}") for number in range(jobs)]
    try:
        with record.open("a", encoding="utf-8") as lines, progress_bar(total=len(waiting), desc="faults") as bar:
            while True:
                for worker in workers:
                    if worker.task is None and waiting and time.monotonic() < latest:
                        worker.give(*waiting.pop(0))
                busy = [worker for worker in workers if worker.task]
                if not busy:
                    return made
                connection.wait([worker.pipe for worker in busy], timeout=1)
                for worker in busy:
                    task, seconds = worker.task, worker.seconds
                    if ending := worker.ending():
                        worker.task = None
                        made.append(Attempted(*task, *ending, round(seconds, 2), code))
                        lines.write(json.dumps(asdict(made[-1])) + "\n")
                        lines.flush()
                        bar.update()
    finally:
        for worker in workers:
            worker.end()
        faults_processes.unmount_below(record.parent)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this command's options to a parser."""
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND",
                        help=f"any of: {'; '.join(KINDS)}. The counts of others stay")  # fmt: skip
    parser.add_argument("--tries", type=int, default=10**6, help="at most so many attempts of each kind")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no attempt after these")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument(
        "--work", type=Path, default=project_root() / "build" / "faults", help="a folder for the record"
    )
    parser.add_argument("--out", type=Path, default=project_root() / "book" / "faults.json")


def main(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        SystemExit: an attempt failed; the file is written.
    """
    import torch

    from lmm_sae_nb.benchmarks.comparison import circumstances
    from lmm_sae_nb.model.lmm import LMM

    root, about = project_root(), circumstances()  # before this makes the machine busy
    torch.set_num_threads(1)
    work, out, code, commit = options.work.resolve(), options.out.resolve(), code_hash(root), commit_of(root)
    world = make_world(work / "world", LMM.load(root / MODEL), root)
    faults_processes.measure(world, work / "usual")
    if "kill, page" in options.kinds:
        faults_pages.measure_pages(world)
    kinds = {kind: min(KINDS[kind].tries, options.tries) for kind in options.kinds}
    made = run(world, kinds, work / "record.jsonl", code=code, jobs=options.jobs, minutes=options.minutes)
    result = summary(made, {kind: KINDS[kind].meaning for kind in options.kinds}, commit, about)
    rows = (read_json(out)["kinds"] if out.is_file() else {}) | result["kinds"]
    result["kinds"] = {kind: rows[kind] for kind in KINDS if kind in rows}
    write_json(out, result)
    for kind, row in result["kinds"].items():
        print(f"{kind}: {row['survived']} of {row['tried']} survived, {row['endings']}")
        for failure in row["failures"]:
            print(f"    {failure['case']}: {failure['ending']}: {failure['reason']}", file=sys.stderr)
    if any(row["failures"] for row in result["kinds"].values()):
        raise SystemExit(f"some attempts failed; {out} names them")
