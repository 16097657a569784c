"""Measure every system at every shape, each in a separate process, and record the machine and the versions."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import venv
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from lmm_sae_nb.benchmarks import systems
from lmm_sae_nb.benchmarks.systems import SYSTEMS, Shape
from lmm_sae_nb.support.files import project_root, write_json
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.stages import versions

SHAPES = (Shape(1024, 256, 8192, 32), Shape(2048, 1024, 16384, 64), Shape(1024, 4096, 32768, 256))
PEERS = ("eai-sparsify==1.3.3", "sae-lens==6.54.0", "dictionary-learning==0.1.0")
TARGETS = {256: (2.1, 1.6), 1024: (1.8, 1.6), 4096: (2.5, 4.0)}  # by width: highest ratio, lowest speed-up


def peers_python(folder: Path) -> Path:
    """Return the Python of an environment with the peers; create it first if `folder` does not hold it.

    Creating it takes minutes and a package registry. It gets this environment's version of torch. The peers install
    torchvision, which often does not fit that version; none of them needs it, so it is removed.

    Raises:
        RuntimeError: pip failed; the message holds pip's output.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / "ready"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        wanted = "torch==" + torch.__version__.split("+")[0]
        for command in (["install", wanted], ["install", wanted, *PEERS], ["uninstall", "--yes", "torchvision"]):
            ran = subprocess.run([python, "-m", "pip", "--quiet", *command], capture_output=True, text=True)
            if ran.returncode:
                raise RuntimeError(f"pip {' '.join(command)} failed, so there are no peers to compare:\n{ran.stderr}")
        done.touch()
    return python


def measured(python: Path | str, system: str, shape: Shape, threads: int, **how: float) -> dict:
    """Run `systems.measure` in a new process of this Python.

    Raises:
        RuntimeError: the process failed; the message holds the end of its error output.
    """
    request = {"system": system, "shape": shape, "threads": threads, **how}
    environment = {
        **os.environ, "PYTHONPATH": str(Path(systems.__file__).parents[2]), "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1", "SPARSIFY_DISABLE_TRITON": "1",
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
    }  # fmt: skip
    command = [str(python), systems.__file__, json.dumps(request)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode:
        raise RuntimeError(f"{system} at {tuple(shape)}, {threads} threads, failed:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def compare(
    python: Path | None, shapes: Iterable[Shape] = SHAPES, threads: Sequence[int] = (1, 2), **how: float
) -> dict:
    """Measure every system at every shape.

    python: of the environment with the peers; None measures only this package.
    threads: numbers of threads, each measured apart.
    how: settings of `systems.measure`.

    Returns: `results`, and the date, machine and versions of the measurement.
    """
    record = circumstances()  # before this makes the machine busy
    systems_here = [name for name, (_, peer) in SYSTEMS.items() if python or not peer]
    runs = [(name, shape, n) for n in threads for shape in shapes for name in systems_here]
    rows = [
        measured(python if SYSTEMS[name][1] else sys.executable, name, shape, n, **how)
        for name, shape, n in progress_bar(runs, desc="measuring")
    ]
    record["versions"] |= {row["system"]: row["version"] for row in rows if row["version"]}
    return record | {"results": [{name: value for name, value in row.items() if name != "version"} for row in rows]}


def circumstances() -> dict[str, object]:
    """Return the date (UTC), the machine and the versions of a measurement made now."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"date": today, "machine": machine(), "versions": versions()}


def machine() -> dict[str, object]:
    """Return the properties of this machine that the numbers depend on; its name is not among them."""
    name = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "busy": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,  # cores' worth of other work
    }


def by_shape(results: Sequence[dict], quantity: str, threads: int = 1) -> dict[str, dict[str, float]]:
    """Return one quantity of every system, by the shape in words.

    results: of `compare`.
    quantity: "ratio" (step by dense product), "step_ms", "floor_ms" or "peak_mb".
    """
    table: dict[str, dict[str, float]] = {}
    for row in (row for row in results if row["threads"] == threads):
        shape = f"{row['tokens']} tokens\nwidth {row['width']}\n{row['latents']} latents\nk {row['k']}"
        table.setdefault(shape, {})[row["system"]] = row[quantity]
    return table


def check_targets(results: Sequence[dict], threads: int = 1) -> list[dict]:
    """Compare this package with `TARGETS` and with the peers, one row for each width that has a target.

    A target is met if the step takes at most `ratio_target` dense products, is `faster_target` times faster than the
    fastest peer, and needs less memory than every peer. Widths without a measured peer are left out.
    """
    rows = []
    for width, (ratio_target, faster_target) in TARGETS.items():
        here = {row["system"]: row for row in results if row["width"] == width and row["threads"] == threads}
        peers = [row for name, row in here.items() if SYSTEMS[name][1]]
        if "ours" not in here or not peers:
            continue
        ours = here["ours"]
        faster = min(row["ratio"] for row in peers) / ours["ratio"]
        leanest = min(row["peak_mb"] for row in peers)
        met = ours["ratio"] <= ratio_target and faster >= faster_target and ours["peak_mb"] < leanest
        rows.append({
            "width": width, "threads": threads, "ratio": ours["ratio"], "ratio_target": ratio_target,
            "faster": round(faster, 2), "faster_target": faster_target, "peak_mb": ours["peak_mb"],
            "leanest_peer_mb": leanest, "met": met,
        })  # fmt: skip
    return rows


def renew(path: Path, environment: Path | None = None) -> dict:
    """Measure everything and write it to `path`: a quarter of an hour, and a registry the first time.

    environment: folder of the environment with the peers; None is build/peers.
    """
    record = compare(peers_python(environment or project_root() / "build" / "peers"))
    write_json(path, record)
    return record


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this command's options to a parser."""
    root = project_root()
    parser.add_argument("--out", type=Path, default=root / "book" / "benchmarks.json")
    parser.add_argument(
        "--peers",
        type=Path,
        default=root / "build" / "peers",
        help="the peers' environment; created if absent",
    )


def main(options: argparse.Namespace) -> None:
    """Run the command."""
    for row in check_targets(renew(options.out, options.peers)["results"]):
        print(row)
