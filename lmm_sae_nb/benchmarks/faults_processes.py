"""Faults of processes and machines: kills, full disks, two processes in one folder."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from lmm_sae_nb.benchmarks import faults_world as jobs
from lmm_sae_nb.benchmarks.faults_endings import Ending, difference, error_ending
from lmm_sae_nb.benchmarks.faults_world import Usual, World, begin_project
from lmm_sae_nb.score.ratings import append_rating, read_ratings

JOBS = {"training": jobs.train, "caching": jobs.cache, "explaining": jobs.explain, "scoring": jobs.score}
WRITES = ("fsync", "rename")  # calls at which a process can be killed


# ---- processes that end in the middle --------------------------------------------------------------------------


def started(job: Callable, world: World, place: Path, die_at: int = 0):
    """Start a job in a forked process; return the process, and the pipe that its seconds, writes or error come out of.

    die_at: the process kills itself in place of this flush or renaming of a file; 0: never.
    """
    context = get_context("fork")
    pipe, end = context.Pipe(duplex=False)
    process = context.Process(target=_do, args=(end, job, world, place, die_at))
    process.start()
    end.close()
    return process, pipe


def done(job: Callable, world: World, place: Path) -> Usual | Ending:
    """Do a job in a forked process; return its result or its error."""
    process, pipe = started(job, world, place)
    ended = pipe.recv()
    process.join()
    return ended


def _do(pipe, job: Callable, world: World, place: Path, die_at: int) -> None:
    writes = 0

    def counted(call):
        def wrapped(*arguments, **settings):
            nonlocal writes
            writes += 1
            if writes == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **settings)

        return wrapped

    os.fsync, Path.replace = counted(os.fsync), counted(Path.replace)
    began = time.monotonic()
    try:
        result = job(world, place)
        pipe.send(Usual(result, time.monotonic() - began, writes))
    except Exception as error:
        pipe.send(error_ending("", error, [str(place), place.name]))
    os._exit(0)


def measure(world: World, place: Path) -> None:
    """Do each job once, undisturbed, and note its result, its time and its writes."""
    for name, job in JOBS.items():
        shutil.rmtree(place, ignore_errors=True)
        world.usual[name] = done(job, world, begin_project(place))
        shutil.rmtree(place)
        if not isinstance(world.usual[name], Usual):
            raise RuntimeError(f"{name} failed without any fault: {world.usual[name]}")


def killed(name: str, world: World, place: Path, seed: int) -> Ending:
    """Kill a job one to three times, at a random moment or a random write, then let it end.

    The result must be the usual one to the byte, with nothing left over, and no answer on record is asked for again.
    """
    rng, usual, cases = random.Random(f"{name} {seed}"), world.usual[name], []
    begin_project(place)
    known: set[str] = set()
    for _ in range(rng.randint(1, 3)):
        die_at = rng.randint(1, usual.writes) if rng.random() < 0.5 else 0
        process, pipe = started(JOBS[name], world, place, die_at)
        if not die_at:
            time.sleep(rng.uniform(0, 1.1) * usual.seconds)
            process.kill()
        cases.append(f"write {die_at}" if die_at else "a random moment")
        process.join()
        pipe.close()
        if twice := known & asked_since(world):
            return Ending(f"killed at {', '.join(cases)}", "asked twice", f"{len(twice)} questions")
        known |= on_record(place)
    ended = done(JOBS[name], world, place)
    case = f"killed at {', '.join(cases)}"
    if not isinstance(ended, Usual):
        return ended._replace(case=case, ending="raw error" if ended.ending == "clear error" else ended.ending)
    if twice := known & asked_since(world):
        return Ending(case, "asked twice", f"{len(twice)} questions")
    return same_result(case, usual.result, ended.result)


def same_result(case: str, usual: dict, result: dict) -> Ending:
    """Return the ending of an attempt after which a folder should hold what an undisturbed run leaves."""
    if result == usual:
        return Ending(case, "as usual")
    if more := sorted(result.keys() - usual.keys()):
        return Ending(case, "leftovers", ", ".join(more)[:300])
    return Ending(case, "another result", difference(usual, result))


def on_record(place: Path) -> set[str]:
    """Return the keys of the questions whose replies are on record, found without the code that reads them."""
    lines = [line for file in place.rglob("replies.jsonl") for line in file.read_bytes().split(b"\n")[:-1]]
    return {json.loads(line)["key"] for line in lines}


def asked_since(world: World) -> set[str]:
    """Return the keys of the questions that were asked since the last call."""
    keys = set(world.asked.read_text().split()) if world.asked.is_file() else set()
    world.asked.unlink(missing_ok=True)
    return keys


# ---- full disks ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(place: Path, kilobytes: int):
    """Mount a disk of this size; yield a function that makes it large.

    Raises:
        PermissionError: mounting is not allowed here.
    """
    place.mkdir(parents=True)

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise PermissionError(done.stderr.strip())

    mount(f"size={kilobytes}k")
    try:
        yield lambda: mount("remount,size=64m")
    finally:
        os.chdir("/")
        subprocess.run(["umount", "-l", str(place)], check=True)


def unmount_below(folder: Path) -> None:
    """Unmount the small disks of attempts that were killed."""
    table = Path("/proc/mounts")
    for line in table.read_text().splitlines() if table.is_file() else ():
        place = line.split(" ")[1].replace("\\040", " ")
        if place.startswith(f"{folder}/"):
            subprocess.run(["umount", "-l", place], check=False)


def full_disk(name: str, world: World, place: Path, seed: int) -> Ending:
    """Do a job on a disk that is too small, then make room and do it again.

    The first run ends with a clear error, or as usual if the disk suffices; the second one ends as usual.
    """
    rng, usual = random.Random(f"{name} {seed}"), world.usual[name]
    kilobytes = 4 * rng.randint(1, {"training": 260, "caching": 100}.get(name, 8))
    case = f"a disk of {kilobytes} kB"
    try:
        with small_disk(place / "disk", kilobytes) as enlarge:
            folder = begin_project(place / "disk" / "project")
            first = done(JOBS[name], world, folder)
            enlarge()
            if isinstance(first, Usual):
                return same_result(case, usual.result, first.result)
            if first.ending != "clear error":
                return first._replace(case=case)
            second = done(JOBS[name], world, folder)
            if isinstance(second, Ending):
                return second._replace(case=f"{case}, then room")
            ending = same_result(f"{case}, then room", usual.result, second.result)
            return ending if ending.ending != "as usual" else first._replace(case=case)
    except PermissionError as error:
        return Ending(case, "not possible", f"this user cannot mount a small disk: {error}")


# ---- two processes in one folder -------------------------------------------------------------------------------


def race(name: str, world: World, place: Path, seed: int) -> Ending:
    """Do a job twice in one folder at about the same time, and once more if neither ended well.

    The result is the usual one; a process that fails says clearly why.
    """
    rng, usual = random.Random(f"{name} {seed}"), world.usual[name]
    begin_project(place)
    delay = rng.choice((0.0, rng.random())) * usual.seconds
    case = f"a second process {delay:.2f} s after the first"
    one = started(JOBS[name], world, place)
    time.sleep(delay)
    other = started(JOBS[name], world, place)
    endings = []
    for process, pipe in (one, other):
        endings.append(pipe.recv())
        process.join()
    for ended in endings:
        if isinstance(ended, Ending) and ended.ending != "clear error":
            return ended._replace(case=case)
    last = done(JOBS[name], world, place)
    if isinstance(last, Ending):
        return last._replace(case=f"{case}, then once more")
    ending = same_result(case, usual.result, last.result)
    if ending.ending == "as usual" and any(isinstance(ended, Ending) for ended in endings):
        return Ending(case, "clear error")
    return ending


def raters(world: World, place: Path, seed: int) -> Ending:
    """Let two people answer into one file at the same time: every answer is kept."""
    begin_project(place)
    file, each = place / "ratings.jsonl", 10

    def rate(name: str, world: World, place: Path) -> None:
        for latent in range(each):
            append_rating(file, name, latent, "cat", "object", "yes")

    running = [started(partial(rate, name), world, place) for name in ("ada", "max")]
    for process, pipe in running:
        ended = pipe.recv()
        process.join()
        if isinstance(ended, Ending):
            return ended._replace(case="two raters")
    given = {(row["rater"], row["latent"]) for row in map(json.loads, file.read_text().splitlines())}
    wanted = {(name, latent) for name in ("ada", "max") for latent in range(each)}
    if given != wanted or len(read_ratings(file)) != len(wanted):
        return Ending("two raters", "lost", f"{len(wanted - given)} answers")
    return Ending("two raters", "as usual")


KINDS = {
    f"kill, {name}": (partial(killed, name), tries, f"SIGKILL one to three times while {name}, then a last run")
    for name, tries in (("training", 120), ("caching", 120), ("explaining", 200), ("scoring", 200))
}
KINDS |= {
    f"full disk, {name}": (partial(full_disk, name), tries, f"a disk that is too small while {name}, then room")
    for name, tries in (("training", 60), ("caching", 60), ("explaining", 60), ("scoring", 60))
}
KINDS |= {
    f"race, {name}": (partial(race, name), tries, f"two processes that are {name} into one folder")
    for name, tries in (("training", 40), ("caching", 40), ("explaining", 60), ("scoring", 60))
}
KINDS |= {"race, rating": (raters, 30, "two people who rate into one file")}
