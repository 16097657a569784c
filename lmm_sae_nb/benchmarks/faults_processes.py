"""Faults of processes and machines: kills, full disks, two processes in one folder, whole pages that are killed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from lmm_sae_nb.benchmarks import faults_world as jobs
from lmm_sae_nb.benchmarks.faults_endings import Ending, difference, error_ending
from lmm_sae_nb.benchmarks.faults_world import RUN, Usual, World, begin_project
from lmm_sae_nb.benchmarks.faulty_server import FAULTS, KEY, ONCE, Result, serving
from lmm_sae_nb.chat.endpoint import EndpointChat
from lmm_sae_nb.chat.questions import Question, Reply
from lmm_sae_nb.chat.recorded import Recorded, ask
from lmm_sae_nb.score.ratings import append_rating, read_ratings
from lmm_sae_nb.support import notebooks

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
        process, pipe = started(job, world, begin_project(place))
        world.usual[name] = pipe.recv()
        process.join()
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
    process, pipe = started(JOBS[name], world, place)
    ended = pipe.recv()
    process.join()
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
            first = _ended(name, world, folder)
            enlarge()
            if isinstance(first, Usual):
                return same_result(case, usual.result, first.result)
            if first.ending != "clear error":
                return first._replace(case=case)
            second = _ended(name, world, folder)
            if isinstance(second, Ending):
                return second._replace(case=f"{case}, then room")
            ending = same_result(f"{case}, then room", usual.result, second.result)
            return ending if ending.ending != "as usual" else first._replace(case=case)
    except PermissionError as error:
        return Ending(case, "not possible", f"this user cannot mount a small disk: {error}")


def _ended(name: str, world: World, place: Path) -> Usual | Ending:
    process, pipe = started(JOBS[name], world, place)
    ended = pipe.recv()
    process.join()
    return ended


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
    last = _ended(name, world, place)
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


# ---- an endpoint that misbehaves -------------------------------------------------------------------------------

QUESTIONS, FAULTY = 100, 0.09  # of an attempt, and the fraction that meets a fault
TIMEOUT, RETRIES = 0.5, 1
MOST = 3  # times in a run that a question may be asked that gets no answer, or nothing but reasoning
USELESS = [name for name, ending in FAULTS.items() if ending is Result.STOP]
SINGLE = [name for name in FAULTS if name not in USELESS]


def endpoint(world: World, place: Path, seed: int) -> Ending:
    """Ask an endpoint that misbehaves, in a process of its own, and ask again what failed."""
    begin_project(place)
    job = useless_endpoint if seed % 6 == 5 else faulty_endpoint
    process, pipe = started(lambda world, place: job(place, seed), world, place)
    ended = pipe.recv()
    process.join()
    return ended.result if isinstance(ended, Usual) else ended._replace(case=f"seed {seed}")


def faulty_endpoint(place: Path, seed: int) -> Ending:
    """Ask a hundred questions of which 9 % meet a fault, twice: none is answered wrongly, none asked without need.

    What each fault calls for is written beside the server. A fault of one time is gone when the question comes again.
    """
    rng = random.Random(f"endpoint {seed}")
    texts = [f"question {seed} {number}" for number in range(QUESTIONS)]
    faults = {text: rng.choice(SINGLE) + rng.choice(("", ONCE)) for text in texts if rng.random() < FAULTY}
    case = f"{QUESTIONS} questions, {', '.join(faults.values())}"
    os.environ["FAULTY_KEY"] = KEY
    with serving(key=KEY, choose=lambda request: faults.get(request.text, "none")) as server:
        settings = dict(key_variable="FAULTY_KEY", concurrency=8, timeout=TIMEOUT, retries=RETRIES, max_bytes=2**16)
        for turn in (1, 2):
            chat = Recorded(EndpointChat("a model", server.url, stop_after=50, **settings), place / "replies.jsonl")
            replies = dict(zip(texts, ask(chat, [Question(text) for text in texts]), strict=True))
            times = server.times()
            for text, reply in replies.items():
                fault = faults.get(text, "")
                if wrong := _wrong(text, fault, reply, turn):
                    return Ending(case, "another result", f"{fault or 'no fault'}, turn {turn}: {wrong}")
                again = Result(_right(fault)) in (Result.FAULT, Result.REFUSED)
                if times[text] > (turn * MOST if again else 1):
                    return Ending(case, "asked twice", f"{fault or 'no fault'}: {times[text]} times")
            if part := _part_of_key((place / "replies.jsonl").read_text() + repr(replies)):
                return Ending(case, "key shown", f"{len(part)} characters of the key are on record")
    return Ending(case, "as usual")


def _right(fault: str) -> Result:
    return FAULTS[fault.removesuffix(ONCE)] if fault else Result.ANSWER


def _wrong(text: str, fault: str, reply: Reply, turn: int) -> str:
    """Return what is wrong with a reply; "" if nothing is."""
    right, said = _right(fault), f"heard: {text}"
    passed = fault.endswith(ONCE) and right in (Result.FAULT, Result.REFUSED)  # the question may have come again
    answer, brief = reply.answer, f"{reply.answer!r} {reply.fault}"[:160]
    if passed:
        return "" if answer == said or (turn == 1 and answer is None and reply.fault) else brief
    if right in (Result.FAULT, Result.REFUSED):
        return "" if answer is None and reply.fault else brief
    if right is Result.CUT:
        return "" if reply.cut or answer is None else "it does not count as cut"
    return "" if answer and said in answer and "<" not in answer else brief


def useless_endpoint(place: Path, seed: int) -> Ending:
    """Ask an endpoint that it is useless to ask, or give a strange key: a clear error, without the key, and soon."""
    rng = random.Random(f"endpoint {seed}")
    fault, key = rng.choice(USELESS), rng.choice((KEY, f"{KEY}\n", f"{KEY}\t", f"{KEY} x  y", f"{KEY}\u00e9"))
    case = f"every question meets {fault}, the key ends in {key[-3:]!r}"
    os.environ["FAULTY_KEY"] = key
    with serving(choose=lambda request: fault) as server:
        try:
            chat = EndpointChat("a model", server.url, key_variable="FAULTY_KEY", concurrency=4, timeout=TIMEOUT)
            replies = ask(chat, [Question(f"question {number}") for number in range(60)])
        except Exception as error:
            if _part_of_key(f"{error!r} {error.__cause__!r} {error.__context__!r}"):
                return Ending(case, "key shown", "the key is in the error")
            if len(server.requests) > 12:
                return Ending(case, "asked twice", f"{len(server.requests)} requests to a useless endpoint")
            return error_ending(case, error, [server.url, "FAULTY_KEY"])
        return Ending(case, "another result", f"no error, {replies[0]}"[:200])


def _part_of_key(text: str) -> str:
    """Return the first eight characters of the key that stand in a text together, plain or in base64; "" if none do."""
    secret = KEY.removeprefix("sk-")
    coded = base64.b64encode(f"Bearer {KEY}".encode()).decode().removeprefix("QmVhcmVyIHNrL")
    parts = (each[at : at + 8] for each in (secret, coded) for at in range(len(each) - 7))
    return next((part for part in parts if part in text), "")


# ---- whole pages -----------------------------------------------------------------------------------------------

SMALL = {"train": 64, "cache": 48, "heldout": 48}  # samples of the small data sets
DATA = "data/artifacts/small"
OWN = {"seeds_study": "", "panel": ""}
PAGES = {  # small enough for some seconds
    "01": {
        "dataset": f"{DATA}/train", "heldout": f"{DATA}/heldout", "evaluated": 12, "n_latents": 128, "k": 8,
        "steps": 60, "checkpoint_minutes": 0.02,
    },
    "02": {"images": f"{DATA}/cache", "texts": f"{DATA}/train", "n_texts": 24},
    "03": {
        "images": f"{DATA}/cache", "heldout": f"{DATA}/heldout", "concepts": f"{DATA}/concepts.json",
        "n_explained": 24, **OWN,
    },
    "04": {
        "images": f"{DATA}/cache", "concepts": f"{DATA}/concepts.json", "n_scored": 12, "random_runs": 2,
        "clip_runs": 2, "segmenter": "", "similarity": "", "n_judged": 5, **OWN,
    },
}  # fmt: skip
STAGES = {"01": "train", "02": "cache", "03": "interpret", "04": "score"}


def measure_pages(world: World) -> None:
    """Run small versions of the pages once, undisturbed, in a project of their own.

    Raises:
        SystemExit: the data sets are missing.
    """
    from datasets import load_from_disk

    source, project = world.root / "data/artifacts/tiny/world", world.folder.with_name("pages")
    if not (source / "concepts.json").is_file():
        raise SystemExit("the data sets of Picture World are missing; run `make world` first")
    shutil.rmtree(project, ignore_errors=True)
    begin_project(project)
    (project / DATA).mkdir(parents=True)
    for name in ("notebooks", "book", "data/models"):
        (project / name).symlink_to(world.root / name)
    for split, samples in SMALL.items():
        load_from_disk(source / split).select(range(samples)).save_to_disk(project / DATA / split)
    shutil.copy(source / "concepts.json", project / DATA)
    for number in PAGES:
        began = time.monotonic()
        run_page(world, project, number).wait()
        seconds = time.monotonic() - began
        if not (project / "data/artifacts" / RUN / STAGES[number] / "manifest.json").is_file():
            log = (project / "page.log").read_text()
            raise RuntimeError(f"page {number} failed without any fault: {log[-2000:]}")
        world.usual[f"page {number}"] = Usual(_results(project, number), seconds, 0)


def run_page(world: World, project: Path, number: str) -> subprocess.Popen:
    """Start a page in a project, as `make book` does."""
    (source,) = (page for page in notebooks.sources(world.root) if page.stem.startswith(number))
    known = notebooks.parameters(source)
    values = {  # of a dictionary, only some entries are given
        name: known[name].default | value if isinstance(value, dict) else value
        for name, value in {"run": RUN, **PAGES[number]}.items()
    }
    script = (
        "import sys\nfrom pathlib import Path\nfrom lmm_sae_nb.support import notebooks\n"
        f"made = Path('nb')\nnotebooks.convert(Path({str(source)!r}), made / 'a.ipynb')\n"
        f"notebooks.execute(made / 'a.ipynb', made / 'b.ipynb', {values!r}, root=Path.cwd())\n"
    )
    quiet = notebooks.quiet_kernels(project / "ipython")
    settings = {**os.environ, "PYTHONPATH": str(world.root), "IPYTHONDIR": quiet, "OMP_NUM_THREADS": "1"}
    with (project / "page.log").open("w") as log:
        return subprocess.Popen([sys.executable, "-c", script], cwd=project, env=settings, stdout=log, stderr=log)


def _results(project: Path, number: str) -> dict:
    """Return what a page has made, without what the clock says."""
    made = jobs.contents(project / "data/artifacts" / RUN / STAGES[number])
    made["seconds.json"] = None
    return {
        name: {each: entry for each, entry in value.items() if not re.search("second|memory|cost_ratio", each)}
        if isinstance(value, dict) else value for name, value in made.items()
    }  # fmt: skip


def kill_page(world: World, place: Path, seed: int) -> Ending:
    """Kill a page and its kernel at a random moment and run it again: it makes what an undisturbed run makes."""
    import psutil

    rng, number = random.Random(f"page {seed}"), list(PAGES)[seed % len(PAGES)]
    project, usual = place / "project", world.usual[f"page {number}"]
    shutil.copytree(world.folder.with_name("pages"), project, symlinks=True)
    for later in list(PAGES)[list(PAGES).index(number) :]:
        shutil.rmtree(project / "data/artifacts" / RUN / STAGES[later])
    running, after = run_page(world, project, number), rng.uniform(0.3, 1) * usual.seconds
    case = f"page {number} killed after {after:.1f} s"
    try:
        running.wait(after)
    except subprocess.TimeoutExpired:
        for process in [*psutil.Process(running.pid).children(recursive=True), running]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        running.wait()
    if run_page(world, project, number).wait():
        return Ending(case, "raw error", " ".join((project / "page.log").read_text()[-400:].split()))
    return same_result(case, usual.result, _results(project, number))


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
KINDS |= {
    "endpoint": (
        endpoint,
        36,
        "a hundred questions, asked twice, of which 9 % meet a fault",
    ),
    "kill, page": (kill_page, 12, "a page and its kernel killed at a random moment, then run again"),
}
