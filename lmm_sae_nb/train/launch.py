"""Train in several processes: `launch` on this machine, `accelerate launch -m lmm_sae_nb.train.launch` on several.

The command takes a JSON file with the arguments of `job`. Run it on every machine, with folders that all of them see:

    accelerate launch --multi_gpu --num_machines 2 --machine_rank 0 --num_processes 16 \\
        --main_process_ip ... --main_process_port 29500 -m lmm_sae_nb.train.launch job.json
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from lmm_sae_nb.model.hookpoints import Hookpoint
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.sample_checks import open_samples
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.files import read_json, write_json
from lmm_sae_nb.train.training import HISTORY, TrainResult, train_sae


def job(
    model: str | Path, dataset: str | Path, layer: Hookpoint, *, loading: Mapping[str, Any] | None = None, **settings
) -> TrainResult:
    """Load a model and a saved data set in this process and train; each process of a launcher runs this.

    model: a folder, or a name on the hub.
    dataset: folder of the saved data set.
    loading: settings of `LMM.load`; the device is that of the process, for the whole model.
    layer, settings: as of `train_sae`.
    """
    here = PartialState(cpu=not torch.cuda.is_available())
    where = dict(loading or {}) | {"device": here.device, "device_map": None}
    lmm = LMM.load(Path(model) if Path(model).is_dir() else str(model), **where)
    return train_sae(lmm, open_samples(dataset), layer, **settings)


def launch(
    processes: int,
    model: str | Path,
    dataset: str | Path,
    layer: Hookpoint,
    *,
    folder: str | Path,
    on_log: Callable[[list[dict[str, float]]], object] | None = None,
    **settings,
) -> TrainResult:
    """Run `job` in several processes of this machine and return its result.

    They are new processes (`accelerate launch`): a forked process could use neither a GPU nor threads that its parent
    has used. They end when this process ends.

    processes: one per GPU, if there are GPUs.
    model, dataset, layer, folder, settings: as of `job` and `train_sae`.
    on_log: called with all rows of the history so far, after each new row.

    Raises:
        RuntimeError: a process failed; the message holds the first error.
    """
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_machines", "1", "--num_processes", str(processes), "--main_process_port", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("-m", "lmm_sae_nb.train.launch"),
    ]
    arguments = {"model": str(model), "dataset": str(dataset), "layer": layer, "folder": str(folder), **settings}
    rows, error = [], None
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as errors:
        path = Path(scratch) / "job.json"
        write_json(path, arguments)
        with subprocess.Popen([*command, str(path)], stdout=subprocess.PIPE, stderr=errors, text=True) as running:
            try:
                for line in running.stdout:
                    message = _message(line)
                    error = error or message.get("error")
                    if "row" in message:
                        rows.append(message["row"])
                        if on_log:
                            on_log(rows)
            except BaseException:  # also the stop button of a notebook
                running.terminate()
                raise
        if running.returncode:
            errors.seek(0)
            raise RuntimeError(f"training in {processes} processes failed: {error or errors.read()[-2000:]}")
    record = read_json(Path(folder) / HISTORY)
    skipped = {int(number): fault for number, fault in record.get("skipped", {}).items()}
    return TrainResult(TopKSAE.load(folder), record["rows"], skipped, record.get("converted", {}))


def _send(**message) -> None:
    """Write a message in one piece: all processes write into one pipe, and `print` may write the line's end later."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _message(line: str) -> dict:
    """Return the message in a line of output; an empty one if the line is none."""
    with contextlib.suppress(ValueError):
        return json.loads(line) if line.startswith('{"') else {}
    return {}


if __name__ == "__main__":
    try:
        job(**read_json(sys.argv[1]), on_log=lambda rows: _send(row=rows[-1]))
    except Exception as error:
        _send(error=f"{type(error).__name__}: {error}"[:600])  # a pipe keeps 4 KB together, a letter may take 6 bytes
        raise
