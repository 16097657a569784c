"""Whole pages that are killed: run again, they go on where they were, and make what an undisturbed run makes.

The pages run one after the other in a small project. An attempt takes a copy of it as it was before one of the pages,
kills this page's process and kernel at a random moment, and runs the page again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file

from lmm_sae_nb.benchmarks.faults_endings import Ending
from lmm_sae_nb.benchmarks.faults_processes import same_result
from lmm_sae_nb.benchmarks.faults_world import RUN, Usual, World, begin_project, contents
from lmm_sae_nb.cache.latent_cache import PARTIAL, TENSORS
from lmm_sae_nb.cache.resume import KEY
from lmm_sae_nb.sae.topk import HISTORY
from lmm_sae_nb.support import notebooks
from lmm_sae_nb.support.files import MANIFEST, outputs, read_json, write_json
from lmm_sae_nb.support.stages import BEGUN
from lmm_sae_nb.support.tensor_files import hash_of
from lmm_sae_nb.train.steps import CHECKPOINTS

SAMPLES = {"train": 64, "cache": 48, "heldout": 48, "traps": 240}  # rows of the small data sets
DATA = "data/artifacts/small"
SHARED = {  # parameters of several pages
    "run": RUN, "dataset": f"{DATA}/train", "texts": f"{DATA}/train", "samples": f"{DATA}/train",
    "heldout": f"{DATA}/heldout", "images": f"{DATA}/cache", "traps": f"{DATA}/traps",
    "concepts": f"{DATA}/concepts.json", "seeds_study": "", "panel": "",
}  # fmt: skip
TRAINING = {"n_latents": 64, "k": 4, "steps": 12, "batch_tokens": 256, "dead_after_tokens": 1000}
FIT = {"wrong": 3, "right": 2, "others": 2, "rounds": 1, "each": 2, "direction_steps": 2}
PAGES = {  # what else differs from the defaults: small enough for some seconds
    "01": {"evaluated": 12, "n_latents": 128, "k": 8, "steps": 60, "buffer_tokens": 2048, "checkpoint_minutes": 0.02},
    "02": {"n_texts": 24},
    "03": {"n_explained": 24},
    "04": {"n_scored": 12, "random_runs": 2, "clip_runs": 2, "segmenter": "", "similarity": "", "n_judged": 5},
    "05": {
        "layers": [1, 6], "cached_images": 24, "training": TRAINING, "other_training": {"steps": 6}, "sizes": [32],
        "ks": [], "evaluated": 4, "n_explained": 6, "n_swept": 4,
        "scoring": {"random_runs": 2, "clip_runs": 2},
        "steering": {"n_latents": 2}, "attribution": {"decisions": 2, "pairs": 4},
    },
    "06": {
        "cases": {"doses": [8], "story_doses": [0.5], "max_new_tokens": 4}, "ranked_images": 12,
        "objects": {"doses": [8], "count": 4, "choosing": 4, "others": 6, "max_new_tokens": 4},
    },
    "07": {
        "decisions": 4, "pairs": 4, "path_pairs": 2, "ig_steps": 2, "many_steps": 3, "many_decisions": 2,
        "other_layers": [4], "other_decisions": 2, "other_sae": TRAINING, "repetitions": 1,
    },
    "08": {
        "choosing": {
            "cases": 120, "attributed": 2, "latents": 16, "words": 1, "wrong": 3, "right": 3, "others": 3,
            "together": 1,
        },
        "fitting": FIT, "contradicting": 40, "agreeing": 8, "right_cases": 12, "price_questions": 4,
        "control_draws": 1,
        "new_questions": FIT | {"held_out": 40}, "presence": {"scenes": 2, "each": 1, "counted": 20},
    },
}  # fmt: skip
NAMED = [  # an SAE this small has no latents for these, and pages 06 and 08 need latents that are named so
    ("happy", "face"), ("sad", "face"), ("hungry", "face"), ("angry", "face"), ("cactus", "object"),
    ("clock", "object"), ("umbrella", "object"), ("guitar", "object"), ("libya", "word"), ("spain", "word"),
]  # fmt: skip
CLOCKED = re.compile("second|memory|cost_ratio|stamp")  # in the names of what differs between undisturbed runs


# ---- undisturbed runs ------------------------------------------------------------------------------------------


def measure_pages(world: World) -> None:
    """Run small versions of the pages once, undisturbed, in a project of their own.

    Raises:
        SystemExit: the data sets are missing.
        RuntimeError: a page failed without any fault.
    """
    from datasets import load_from_disk

    source, project = world.root / "data/artifacts/tiny/world", _project(world)
    if not (source / "concepts.json").is_file():
        raise SystemExit("the data sets of Picture World are missing; run `make world` first")
    shutil.rmtree(project, ignore_errors=True)
    begin_project(project)
    (project / DATA).mkdir(parents=True)
    for name in ("notebooks", "book", "data/models"):
        (project / name).symlink_to(world.root / name)
    for split, count in SAMPLES.items():
        rows = load_from_disk(source / split)
        rows.select(sorted(random.Random(split).sample(range(len(rows)), count))).save_to_disk(project / DATA / split)
    shutil.copy(source / "concepts.json", project / DATA)
    for number in PAGES:
        began = time.monotonic()
        if run_page(world, project, number).wait():
            raise RuntimeError(f"page {number} failed without any fault: {_log(project)[-2000:]}")
        world.usual[f"page {number}"] = Usual(_results(world, project, number), time.monotonic() - began, 0)
        if number == "03":
            name_latents(project / "data/artifacts" / RUN / "interpret/explanations.json")


def name_latents(file: Path) -> None:
    """Give the explained latents the names that later pages look for.

    file: explanations.json of a finished stage.
    """
    rows = read_json(file)
    for number, row in enumerate(rows.values()):
        concept, kind = NAMED[number % len(NAMED)]
        row |= {"outcome": "explained", "concept": concept, "kind": kind}
    write_json(file, rows)
    record = read_json(manifest := file.with_name(MANIFEST))
    write_json(manifest, record | {"outputs": outputs(file.parent)}, checked=True)  # else the file counts as damaged


def run_page(world: World, project: Path, number: str) -> subprocess.Popen:
    """Start a page in a project, as `make book` does."""
    source = _source(world, number)
    known = notebooks.parameters(source)
    values = {name: value for name, value in SHARED.items() if name in known} | PAGES[number]
    values = {  # of a dictionary, only some entries are given
        name: known[name].default | value if isinstance(value, dict) else value for name, value in values.items()
    }
    script = (
        "from pathlib import Path\nfrom lmm_sae_nb.support import notebooks\n"
        f"made = Path('nb')\nnotebooks.convert(Path({str(source)!r}), made / 'a.ipynb')\n"
        f"notebooks.execute(made / 'a.ipynb', made / 'b.ipynb', {values!r}, root=Path.cwd())\n"
    )
    quiet = notebooks.quiet_kernels(project / "ipython")
    settings = {**os.environ, "PYTHONPATH": str(world.root), "IPYTHONDIR": quiet, "OMP_NUM_THREADS": "1"}
    with (project / "page.log").open("w") as log:
        return subprocess.Popen([sys.executable, "-c", script], cwd=project, env=settings, stdout=log, stderr=log)


def _project(world: World) -> Path:
    return world.folder.with_name("pages")


def _source(world: World, number: str) -> Path:
    return next(page for page in notebooks.sources(world.root) if page.stem.startswith(number))


def _folders(world: World, project: Path, number: str) -> list[Path]:
    """Return the folders of the stages that a page makes."""
    made = notebooks.stages(_source(world, number), ("stage",))
    return [folder for name in made if (folder := project / "data/artifacts" / RUN / name).is_dir()]


def _results(world: World, project: Path, number: str) -> dict[str, object]:
    """Return what a page has made, by file, without what only the clock and the disk say."""
    return {
        f"{folder.name}/{name}": _comparable(folder / name, content)
        for folder in _folders(world, project, number)
        for name, content in contents(folder).items()
    }


def _comparable(file: Path, content: object) -> object:
    if file.name == "seconds.json":
        return None
    if file.name == TENSORS:  # its header says where on the disk the pictures are
        return {name: hash_of([tensor]) for name, tensor in load_file(file).items()}
    return _without_clock(content)


def _without_clock(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_clock(each) for name, each in value.items() if not CLOCKED.search(name)}
    return [_without_clock(each) for each in value] if isinstance(value, list) else value


def _log(project: Path) -> str:
    return (project / "page.log").read_text()


# ---- kills -----------------------------------------------------------------------------------------------------


def kill_page(world: World, place: Path, seed: int) -> Ending:
    """Kill a page at a random moment and run it again.

    It makes what an undisturbed run makes. What was finished before the kill is not made again, and no question is
    asked twice.
    """
    rng, number = random.Random(f"page {seed}"), list(PAGES)[seed % len(PAGES)]
    project, usual = place / "project", world.usual[f"page {number}"]
    shutil.copytree(_project(world), project, symlinks=True)
    for later in list(PAGES)[list(PAGES).index(number) :]:
        for folder in _folders(world, project, later):
            shutil.rmtree(folder)
    after = rng.uniform(0.3, 1) * usual.seconds
    _kill(run_page(world, project, number), after)
    finished = {file: _state(file) for folder in _folders(world, project, number) for file in _finished(folder)}
    case = f"page {number} killed after {after:.1f} s, with {len(finished)} finished files"
    if run_page(world, project, number).wait():
        return Ending(case, "raw error", " ".join(_log(project)[-400:].split()))
    if again := [file.name for file, state in finished.items() if _state(file) != state]:
        return Ending(case, "made twice", ", ".join(again)[:300])
    if twice := _asked_twice(project):
        return Ending(case, "asked twice", f"{twice} questions")
    return same_result(case, usual.result, _results(world, project, number))


def _kill(running: subprocess.Popen, after: float) -> None:
    """End a process and its children after so many seconds, unless it has ended."""
    import psutil

    try:
        running.wait(after)
    except subprocess.TimeoutExpired:
        for process in [*psutil.Process(running.pid).children(recursive=True), running]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        running.wait()


def _finished(folder: Path) -> Iterator[Path]:
    """Yield the files of a stage that a run need not make again: results on record, whole SAEs and whole caches."""
    for record in (folder / BEGUN, folder / MANIFEST):
        if record.is_file():
            yield from (folder / f"{name}.json" for name in json.loads(record.read_bytes())["results"])
    if not any(folder.rglob(CHECKPOINTS)):  # else an SAE may be one of several that are being written
        yield from folder.rglob(HISTORY)
    keys = [key for key in folder.rglob(KEY) if PARTIAL not in key.parts]  # a pass under way has one, too
    yield from (key.with_name(TENSORS) for key in keys if not key.with_name(PARTIAL).exists())


def _state(file: Path) -> tuple[int, int]:
    """Return what changes when a file is written again."""
    found = file.stat()
    return found.st_ino, found.st_mtime_ns


def _asked_twice(project: Path) -> int:
    """Return how many questions have several replies on record."""
    files = (project / "data/artifacts" / RUN).rglob("replies.jsonl")
    keys = Counter(json.loads(line)["key"] for file in files for line in file.read_bytes().splitlines())
    return sum(count > 1 for count in keys.values())


KINDS = {"kill, page": (kill_page, 32, "a page and its kernel killed at a random moment, then run again")}
