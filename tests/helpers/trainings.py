"""Small trainings for processes of their own: what kills, faults and several processes are tried on.

`children` forks them from a server that has imported and built everything once (forkserver).
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Mapping
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from types import MappingProxyType
from unittest.mock import patch

import numpy as np
import torch
from accelerate import notebook_launcher
from models import make
from PIL import Image

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.adam import SAEAdam
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.train.training import Recipe, TrainResult, train_sae, train_saes

SETTINGS = dict(
    n_latents=40, k=4, steps=6, batch_tokens=512, buffer_tokens=1536, batch_samples=2, lr=3e-3, seed=3,
    dead_after_tokens=200, log_every=1, checkpoint_minutes=0,
)  # fmt: skip


def _samples() -> list[dict]:
    """Seven samples, two of them without an image."""
    rng = np.random.default_rng(0)
    rows = []
    for n in range(7):
        image = Image.fromarray(rng.integers(0, 256, (192, 192, 3), dtype=np.uint8)) if n % 4 else None
        rows.append({"image": image, "question": f"what is {n} ?", "answer": "it is " + "so " * n})
    return rows


def _warmed(model: LMM) -> LMM:
    """Kernels that are loaded here need not be loaded in every child."""
    sae = TopKSAE(4, 8, 2)
    sae(torch.randn(3, 4)).sum().backward()
    SAEAdam(sae, 0.1).step()
    return model


LMM_, SAMPLES = _warmed(LMM(*make("picture_world"))), _samples()  # built once, in the server


def train(folder: Path, settings: Mapping = MappingProxyType({})) -> TrainResult:
    return train_sae(LMM_, SAMPLES, 1, folder=folder, **SETTINGS | settings)


RECIPES = {  # two of one layer, one of another; none is like the rest in size
    "low": Recipe(0, 40, 4, 3e-3),
    "high": Recipe(2, 24, 2, 2e-3),
    "wide": Recipe(0, 60, 3, 1e-3),
}


def train_several(folder: Path, settings: Mapping = MappingProxyType({})) -> dict[str, TrainResult]:
    shared = {name: value for name, value in SETTINGS.items() if name not in ("n_latents", "k", "lr")}
    return train_saes(LMM_, SAMPLES, RECIPES, folder=folder, **shared | settings)


def train_one_of_several(folder: Path, name: str, settings: Mapping = MappingProxyType({})) -> TrainResult:
    recipe = RECIPES[name]
    own = dict(n_latents=recipe.n_latents, k=recipe.k, lr=recipe.lr)
    return train_sae(LMM_, SAMPLES, recipe.layer, folder=folder, **SETTINGS | own | settings)


def train_and_die(folder: Path, die_at: int, job=train) -> None:
    """A training that SIGKILLs itself in place of its `die_at`-th fsync or rename (0: never); prints how many."""
    calls = 0

    def counted(call):
        def wrapped(*args):
            nonlocal calls
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)

        return wrapped

    os.fsync, Path.replace = counted(os.fsync), counted(Path.replace)
    job(folder)
    (folder.parent / "calls.json").write_text(json.dumps(calls))


def train_together(folder: Path, processes: int, settings: dict, job=train) -> None:
    """A training in several processes that notebook_launcher forks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    notebook_launcher(job, (folder, settings), num_processes=processes, use_port=str(port))


def run(job, *args, kill_after: float | None = None) -> int:
    """A job in a child; how it ended: 0, 1 for an error, or minus the signal that killed it."""
    child = children().Process(target=job, args=args)
    child.start()
    child.join(kill_after)
    if child.exitcode is None:
        child.kill()
        child.join()
    return child.exitcode


@cache
def children():
    """A multiprocessing context whose processes start in no time, single-threaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainings"])
    paths = os.pathsep.join(path for path in sys.path if path)
    with patch.dict(os.environ, PYTHONPATH=paths, OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1"):
        forkserver.ensure_running()  # whose environment is that of all of them
    return context


def told(folder: Path) -> tuple[dict[str, bytes], list[dict]]:
    """The files of a finished training, and its history but for the clock."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    rows = json.loads(files.pop("history.json"))["rows"]
    timeless = [{name: value for name, value in row.items() if "second" not in name} for row in rows]
    return files, timeless
