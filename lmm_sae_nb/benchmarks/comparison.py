"""Run every system at every shape, each in a process of its own, and write down what came out and where."""

from __future__ import annotations

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
from tqdm.auto import tqdm

from lmm_sae_nb.benchmarks import systems
from lmm_sae_nb.benchmarks.systems import SYSTEMS, Shape
from lmm_sae_nb.support.files import project_root, write_json
from lmm_sae_nb.support.stages import versions

SHAPES = (Shape(1024, 256, 8192, 32), Shape(2048, 1024, 16384, 64), Shape(1024, 4096, 32768, 256))
PEERS = ("eai-sparsify==1.3.3", "sae-lens==6.54.0", "dictionary-learning==0.1.0")
BARS = {256: (2.1, 1.6), 1024: (1.8, 1.6), 4096: (2.5, 4.0)}  # width: at most this ratio; at least this much faster


def peers_python(folder: Path) -> Path:
    """The Python of an environment that holds the peers, made in `folder` if it is not there; minutes, and a registry.

    It gets this environment's version of torch. torchvision, which the peers bring, often does not fit the torch
    that is here, and none of them needs it: it is taken out. RuntimeError with pip's words if it cannot be made.
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
    """`systems.measure` in a new process of this Python; RuntimeError with its last words if it fails."""
    asked = {"system": system, "shape": shape, "threads": threads, **how}
    environment = {
        **os.environ, "PYTHONPATH": str(Path(systems.__file__).parents[2]), "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1", "SPARSIFY_DISABLE_TRITON": "1",
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
    }  # fmt: skip
    command = [str(python), systems.__file__, json.dumps(asked)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode:
        raise RuntimeError(f"{system} at {tuple(shape)}, {threads} threads, failed:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def compare(
    python: Path | None, shapes: Iterable[Shape] = SHAPES, threads: Sequence[int] = (1, 2), **how: float
) -> dict:
    """Every system (without `python`, the environment of the peers, ours alone): what was measured, where and when."""
    told = circumstances()  # before this makes the machine busy itself
    asked = [(s, n, name) for n in threads for s in shapes for name, (_, peer) in SYSTEMS.items() if python or not peer]
    rows = [
        measured(python if SYSTEMS[name][1] else sys.executable, name, shape, n, **how)
        for shape, n, name in tqdm(asked, desc="measuring")
    ]
    told["versions"] |= {row["system"]: row["version"] for row in rows if row["version"]}
    return told | {"results": [{name: value for name, value in row.items() if name != "version"} for row in rows]}


def circumstances() -> dict[str, object]:
    """When, where and with what a measurement is made: date (UTC), machine and versions."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"date": today, "machine": machine(), "versions": versions()}


def machine() -> dict[str, object]:
    """What the numbers depend on, without the machine's name."""
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


def bars(results: Sequence[dict], threads: int = 1) -> list[dict]:
    """For each width with a bar: our ratio and memory, the fastest and the leanest peer's, and if it is met."""
    rows = []
    for width, (most, least) in BARS.items():
        here = {row["system"]: row for row in results if row["width"] == width and row["threads"] == threads}
        others = [row for name, row in here.items() if SYSTEMS[name][1]]
        if "ours" not in here or not others:
            continue
        mine, faster = here["ours"], min(row["ratio"] for row in others) / here["ours"]["ratio"]
        leanest = min(row["peak_mb"] for row in others)
        met = mine["ratio"] <= most and faster >= least and mine["peak_mb"] < leanest
        rows.append({
            "width": width, "ratio": mine["ratio"], "at_most": most, "faster": round(faster, 2), "at_least": least,
            "peak_mb": mine["peak_mb"], "leanest_peer_mb": leanest, "met": met,
        })  # fmt: skip
    return rows


def renew(path: Path, environment: Path | None = None) -> dict:
    """Measure everything and write it to `path`; about a quarter of an hour, and a registry the first time."""
    found = compare(peers_python(environment or project_root() / "build" / "peers"))
    write_json(path, found)
    return found
