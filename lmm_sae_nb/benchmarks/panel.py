"""Measure many SAEs and methods that are no SAEs, part by part, and write book/panel.json.

The panel is six seeds of notebook 01's SAE, control SAEs, other sizes, and classical dictionaries (`panel_saes`). They
are trained and cached first. Then each part of `PARTS` is measured for each of them. Every result is a file in
`data/artifacts/panel/`, so a command that was stopped goes on where it was; what was made with the present code,
parameters, models and data is not made again. The file is written at the end with what is finished. With `--add` it
keeps what it holds of the same recipe.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import ModuleType

from lmm_sae_nb.benchmarks import panel_saes
from lmm_sae_nb.benchmarks.panel_parts import MODEL, PARTS, SIZES, PanelCase, Part, part_file
from lmm_sae_nb.benchmarks.panel_saes import FIRST, PASSES, SAES, TRAINED, digest, page_parameters
from lmm_sae_nb.benchmarks.tasks import Task, do_tasks
from lmm_sae_nb.controls.chain import PartResult
from lmm_sae_nb.show.panel import MeasuredPart, Panel, PanelSAE, read_panel, write_panel
from lmm_sae_nb.support.files import fingerprint, project_root, read_json, write_json
from lmm_sae_nb.support.parameters import leave_out
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.stages import code_fingerprints

COMMAND = "python -m lmm_sae_nb.benchmarks panel"
ABOUT = (
    "The metrics of notebooks 01 to 07, and more, for SAEs of one model that differ in one thing, and of methods that "
    "are no SAEs. A number, or [number, low, high] with the ends of its 99% interval."
)


@cache
def code_of(part: Part) -> dict[str, str]:
    """Return the hashes of the code that decides a part's result, by name."""
    modules = [each for each in part.uses if isinstance(each, ModuleType)]
    functions = [part.measure, *(each for each in part.uses if not isinstance(each, ModuleType))]
    return code_fingerprints(modules) | {
        f"{each.__module__}.{each.__qualname__}": _statements(each) for each in functions
    }


def _statements(function: Callable) -> str:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


# ---- one part of one SAE --------------------------------------------------------------------------------------------


@cache
def inputs() -> dict[str, object]:
    """Return what all parts depend on: the notebooks' parameters, the panel's sizes, and hashes of models and data."""
    pages = {number: page_parameters(number) for number in ("01", "02", "03", "04", "06", "07")}
    used = {
        "01": ("model", "dataset", "heldout", "layer", "n_latents", "k", "steps", "batch_tokens", "buffer_tokens",
               "repeats", "lr", "dead_after_tokens", "kinds", "accumulate", "mixed_precision"),
        "02": ("images", "n_top", "batch_size", "store"),
        "03": ("heldout", "concepts", "explainer", "refiner", "labeller", "n_top", "threshold", "dim"),
        "04": ("similarity", "n_top", "threshold", "random_runs"),
        "06": ("objects",),
    }  # fmt: skip
    chosen = {number: {name: pages[number][name] for name in names} for number, names in used.items()}
    chosen["06"] = leave_out(chosen["06"], {f"objects.{name}" for name in ("count", "choosing", "others")})  # in SIZES
    models = [pages["01"]["model"], pages["03"]["explainer"]["model"], pages["04"]["similarity"]]
    return {
        "pages": chosen, "sizes": SIZES, "saes": {name: panel_saes.described(name) for name in SAES},
        "models": {name: fingerprint(project_root() / name) for name in models},
    }  # fmt: skip


@cache
def _data() -> dict[str, str]:
    names = [page_parameters("02")["images"], page_parameters("03")["heldout"], page_parameters("01")["dataset"]]
    return {name: fingerprint(project_root() / name) for name in names}


def key_of(sae: str, name: str) -> str:
    """Return a hash of everything that decides the result of a part: code, parameters, models, data, and the SAE.

    Raises:
        FileNotFoundError: the SAE is not trained, or a part that it reads is not measured.
    """
    part = PARTS[name]
    of_sae = FIRST if sae == MODEL else sae
    compared = [of_sae, part.other(of_sae)] if part.other else [of_sae]
    weights = [fingerprint(panel_saes.sae_folder(each) / "sae.safetensors") for each in compared]
    shared = {key: value for key, value in inputs().items() if key != "saes"}
    read = {each: read_json(part_file(of_sae, each))["key"] for each in part.reads}
    return digest({"code": code_of(part), "weights": weights, "inputs": shared, "data": _data(), "reads": read})


def is_done(sae: str, part: str) -> bool:
    """Return whether a part was measured with the present code, parameters, models, data and SAE."""
    try:
        return read_json(part_file(sae, part))["key"] == key_of(sae, part)
    except (FileNotFoundError, KeyError, ValueError):
        return False


def measure(sae: str, part: str) -> None:
    """Measure a part of one SAE and keep the result, unless it is there."""
    if is_done(sae, part):
        return
    key, began = key_of(sae, part), time.process_time()
    try:
        result = PARTS[part].measure(PanelCase(sae, part))
    except ValueError as error:  # as where too few latents have a name
        result = PartResult({}, [f"{part}: {error}"])
    result = result if isinstance(result, PartResult) else PartResult(dict(result))
    seconds = round(time.process_time() - began, 1)
    write_json(part_file(sae, part), {"key": key, "seconds": seconds} | asdict(result))


# ---- the command ----------------------------------------------------------------------------------------------------


def make_tasks(saes: Sequence[str], parts: Sequence[str], *, keep: bool = False) -> dict[str, Task]:
    """Return the tasks of the panel by name: trainings, dictionaries, caches, then the parts.

    The first SAE and those that a part compares with are made, too.

    keep: take SAEs and caches as they are on the disk, also those of an earlier version of the code.
    """
    tasks = {} if keep else _making(_needed(saes, parts))
    for part in (name for name in PARTS if name in parts):
        for sae in (name for name in (*saes, MODEL) if PARTS[part].is_for(name)):
            model = TRAINED if sae == MODEL else SAES[sae].model
            before = [f"cache {model}", *(f"{each}, {FIRST if sae == MODEL else sae}" for each in PARTS[part].reads)]
            tasks[f"{part}, {sae}"] = Task(measure, (sae, part), tuple(name for name in before if name in tasks))
    return tasks


def _needed(saes: Sequence[str], parts: Sequence[str]) -> list[str]:
    """The SAEs that parts of some SAEs read, in the order of `SAES`."""
    compared = {PARTS[part].other(sae) for part in parts for sae in saes if PARTS[part].other}
    return [name for name in SAES if name in {FIRST, *saes, *compared}]


def _making(saes: Sequence[str]) -> dict[str, Task]:
    """The tasks that make SAEs and their caches; SAEs of one pass, and of one model, are made together."""
    members, tasks = {name: SAES[name] for name in saes}, {}
    for one in PASSES:
        if together := tuple(name for name, member in members.items() if member.trained_in == one):
            tasks[f"train {one}"] = Task(panel_saes.train, (one, together))
    for name in (name for name, member in members.items() if not member.trained_in):
        tasks[f"build {name}"] = Task(panel_saes.build, (name,), ("train first",) if name == "random" else ())
    for model in dict.fromkeys(member.model for member in members.values()):
        of_model = {name: member for name, member in members.items() if member.model == model}
        made = {f"train {one.trained_in}" if one.trained_in else f"build {name}" for name, one in of_model.items()}
        tasks[f"cache {model}"] = Task(panel_saes.cache_all, (model, tuple(of_model)), tuple(sorted(made)))
    return tasks


def collect(made: dict, earlier: Panel | None = None) -> Panel:
    """Gather what is measured.

    made: date, machine and versions.
    earlier: a panel whose parts stand in for those that are not measured here; `made` then says which, and their date.

    Raises:
        ValueError: the earlier panel has another recipe.
    """
    if earlier and not _agree(earlier.recipe, json.loads(json.dumps(inputs()))):
        raise ValueError(
            "the earlier panel has another recipe, so its parts cannot stand beside new ones; leave it out"
        )
    missing, found, kept = [], {}, set()
    for sae in (*SAES, MODEL):
        of_sae = {}
        for part in (name for name, each in PARTS.items() if each.is_for(sae)):
            if is_done(sae, part):
                record = read_json(part_file(sae, part))
                of_sae[part] = MeasuredPart.of(record["metrics"], record["seconds"], record["why"])
            elif earlier and sae in earlier.saes and part in earlier.saes[sae].parts:
                of_sae[part] = earlier.saes[sae].parts[part]
                kept.add(part)
            else:
                missing.append(f"{sae}, {part}")
        if of_sae:
            about, group = (SAES[sae].about, SAES[sae].group) if sae in SAES else ("the model, without an SAE", MODEL)
            found[sae] = PanelSAE(about, group, of_sae)
    if earlier and kept:
        made = made | {"kept": {"date": earlier.made.get("date"), "parts": [name for name in PARTS if name in kept]}}
    return Panel(ABOUT, COMMAND, made, inputs(), missing, found)


def _agree(one: object, other: object) -> bool:
    """Whether two recipes have the same values by all names that both have."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(_agree(one[name], other[name]) for name in one.keys() & other.keys())
    return one == other


def run(tasks: Mapping[str, Task], jobs: int) -> dict[str, str]:
    """Do the tasks with a progress bar; return why each failed that did."""
    with progress_bar(total=len(tasks), desc="panel", unit="task") as bar:

        def on_end(name: str, error: Exception | None) -> None:
            bar.update()
            bar.write(f"{time.strftime('%H:%M:%S')} {name}: {error or 'done'}", file=sys.stderr)

        return do_tasks(tasks, jobs, on_end)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this command's options to a parser."""
    parser.add_argument("--saes", nargs="+", default=list(SAES), choices=SAES, metavar="SAE", help=", ".join(SAES))
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--keep", action="store_true", help="take SAEs and caches as they are, also those of earlier code"
    )
    parser.add_argument("--add", action="store_true", help="keep what the file holds and is not measured here")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes side by side")
    parser.add_argument("--out", type=Path, default=project_root() / "book" / "panel.json")


def main(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        SystemExit: the world is missing, or something failed; what is finished is written.
    """
    from lmm_sae_nb.benchmarks.comparison import circumstances

    if not (project_root() / page_parameters("03")["concepts"]).is_file():
        raise SystemExit("the datasets of Picture World are missing; run `make world` first")
    os.environ["OMP_NUM_THREADS"] = "1"  # of each process
    failed = run(make_tasks(options.saes, options.parts, keep=options.keep), options.jobs)
    found = collect(circumstances(), read_panel(options.out) if options.add else None)
    write_panel(options.out, found)
    for name, sae in found.saes.items():
        for why in (why for part in sae.parts.values() if not part.metrics for why in part.why):
            print(f"{name} has no {why}", file=sys.stderr)
    for name, error in failed.items():
        print(f"{name}: {error}", file=sys.stderr)
    if failed:
        raise SystemExit("something failed; correct the error and run the command again, it goes on where it was")
    print(options.out)
