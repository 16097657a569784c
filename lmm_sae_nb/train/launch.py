"""Training in several processes: `launch` on this machine, `accelerate launch -m lmm_sae_nb.train.launch` on several.

The second takes a JSON file with the arguments of `job`, and runs on every machine, on folders that all of them see:

    accelerate launch --multi_gpu --num_machines 2 --machine_rank 0 --num_processes 16 \\
        --main_process_ip ... --main_process_port 29500 -m lmm_sae_nb.train.launch job.json
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import load_from_disk

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.files import read_json, write_json
from lmm_sae_nb.train.training import HISTORY, TrainResult, train_sae


def job(model: str | Path, dataset: str | Path, layer: int, **settings) -> TrainResult:
    """Load a model (a folder, or a name on the hub) and a saved data set in this process, and train as `train_sae`.

    What each process of a launcher runs, `accelerate.notebook_launcher` too.
    """
    here = PartialState(cpu=not torch.cuda.is_available())
    lmm = LMM.load(Path(model) if Path(model).is_dir() else str(model), device=here.device)
    return train_sae(lmm, load_from_disk(dataset), layer, **settings)


def launch(
    processes: int,
    model: str | Path,
    dataset: str | Path,
    layer: int,
    *,
    folder: str | Path,
    on_log: Callable[[list[dict[str, float]]], object] | None = None,
    **settings,
) -> TrainResult:
    """`job` in so many processes of this machine, one a GPU where there are GPUs, and its result.

    They are new processes (`accelerate launch`), because a forked one can use neither a GPU nor threads that its
    parent has used. They end with this one. RuntimeError with the first error of theirs.
    """
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_machines", "1", "--num_processes", str(processes), "--main_process_port", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("-m", "lmm_sae_nb.train.launch"),
    ]
    arguments = {"model": str(model), "dataset": str(dataset), "layer": layer, "folder": str(folder), **settings}
    rows, error = [], None
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as told:
        path = Path(scratch) / "job.json"
        write_json(path, arguments)
        with subprocess.Popen([*command, str(path)], stdout=subprocess.PIPE, stderr=told, text=True) as running:
            try:
                for line in running.stdout:
                    message = _told(line)
                    error = error or message.get("error")
                    if "row" in message:
                        rows.append(message["row"])
                        if on_log:
                            on_log(rows)
            except BaseException:  # the reader's stop button too
                running.terminate()
                raise
        if running.returncode:
            told.seek(0)
            raise RuntimeError(f"training in {processes} processes failed: {error or told.read()[-2000:]}")
    return TrainResult(TopKSAE.load(folder), read_json(Path(folder) / HISTORY)["rows"])


def _tell(**message) -> None:
    """In one piece, for all processes write into one pipe: under `python -u`, `print` writes a line's end by itself."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _told(line: str) -> dict:
    """What a process tells in this line; nothing if it is somebody else's."""
    with contextlib.suppress(ValueError):
        return json.loads(line) if line.startswith('{"') else {}
    return {}


if __name__ == "__main__":
    try:
        job(**read_json(sys.argv[1]), on_log=lambda rows: _tell(row=rows[-1]))
    except Exception as error:
        _tell(error=f"{type(error).__name__}: {error}"[:600])  # a pipe keeps 4 KB together, a letter may take 6 bytes
        raise
