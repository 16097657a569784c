"""Train one TopK SAE or several in one pass over the model (section 2.1).

Accelerate says how many processes work. Each holds all SAEs and its part of the tokens. Gradients, variances, losses
and the record of active latents are summed over the processes, so the SAE does not depend on their number.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.samples import data_fingerprint
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.sae.adam import SAEAdam
from lmm_sae_nb.sae.losses import geometric_median
from lmm_sae_nb.sae.topk import HISTORY, TopKSAE
from lmm_sae_nb.support.files import clear_temporaries, read_json, write_json
from lmm_sae_nb.support.stages import code_fingerprints
from lmm_sae_nb.train import checkpoint
from lmm_sae_nb.train.state import FREEZES, Learner, Recipe, Training, joined_settings
from lmm_sae_nb.train.steps import CHECKPOINTS, do_steps, gathered
from lmm_sae_nb.train.token_buffer import Position, Stream, mixed

LOGS = "logs"  # the folder of a tracker's files
TRACKERS = ("none", "tensorboard", "trackio", "wandb")


class TrainResult(NamedTuple):
    """A trained SAE and its history, one row every few steps, with the columns of `steps.ROW`."""

    sae: TopKSAE
    history: list[dict[str, float]]


def train_sae(
    lmm: LMM,
    samples: Sequence[Mapping],
    layer: int,
    *,
    n_latents: int = 131_072,
    k: int = 256,
    lr: float | None = None,
    frozen: str = "",
    folder: str | Path,
    on_log: Callable[[list[dict[str, float]]], object] | None = None,
    **settings,
) -> TrainResult:
    """Train an SAE on the output of one decoder layer, and save it and its history in `folder`.

    lmm: the model under study; it does not change.
    samples: rows with `image` (PIL or None), `question` and `answer`.
    layer: 0-based.
    n_latents, k, lr, frozen: as of `Recipe`.
    on_log: called with all rows of the history so far, after each new row.
    settings, errors: as of `train_saes`.
    """
    on_logs = None if on_log is None else lambda histories: on_log(histories[""])
    recipes = {"": Recipe(layer, n_latents, k, lr, frozen)}
    return train_saes(lmm, samples, recipes, folder=folder, on_log=on_logs, **settings)[""]


def train_saes(
    lmm: LMM,
    samples: Sequence[Mapping],
    recipes: Mapping[str, Recipe],
    *,
    steps: int,
    batch_tokens: int = 8192,
    accumulate: int = 1,
    kinds: Sequence[str] = SAE_KINDS,
    seed: int = 42,
    auxk_alpha: float = 1 / 32,
    dead_after_tokens: int = 10_000_000,
    buffer_tokens: int | None = None,
    batch_samples: int = 16,
    warm_steps: int | None = None,
    mixed_precision: str = "no",
    folder: str | Path,
    checkpoint_minutes: float = 10.0,
    tracker: str = "none",
    log_every: int = 10,
    on_log: Callable[[dict[str, list[dict[str, float]]]], object] | None = None,
) -> dict[str, TrainResult]:
    """Train an SAE by each recipe, all on the same tokens of one pass over the model, and save it in folder/<name>.

    The loss of a batch is FVU + auxk_alpha * AuxK. The optimiser is `SAEAdam`, with warm-up and linear decay. On one
    CPU process each SAE gets the same bits as if it were trained alone with the same seed.

    Call again with the same arguments to continue after a kill: training goes on from the last checkpoint, and on one
    CPU process ends with the same bits. At the end the checkpoint is deleted, and each history.json records what was
    trained, so the same call returns the finished SAEs.

    samples: rows with `image` (PIL or None), `question` and `answer`.
    recipes: by name; a name is its folder's.
    steps: optimiser steps.
    batch_tokens: tokens per batch, over all processes.
    accumulate: batches whose mean gradient makes one step.
    kinds: kinds of token to learn from.
    seed: of the first weights and of the order of tokens.
    auxk_alpha: weight of AuxK in the loss.
    dead_after_tokens: tokens without activation after which a latent counts as dead.
    buffer_tokens: tokens in the buffer that mixes samples, over all processes; by default 16 batches. It holds every
        layer's states in the model's dtype.
    batch_samples: samples per forward pass of the model.
    warm_steps: steps of warm-up; by default 5 % of all.
    mixed_precision: "no", or "bf16" (autocast; weights stay float32).
    folder: for the SAEs and the checkpoint, which takes up to six times the SAEs' size.
    checkpoint_minutes: minutes between checkpoints.
    tracker: one of TRACKERS.
    log_every: steps between rows of the history.
    on_log: called with the histories so far, by name, after each new row.

    Raises:
        ValueError: there are no samples or recipes, a name is no folder's, hidden states or a loss are not finite, or
            the checkpoint is of another run.
        ModuleNotFoundError: the tracker is not installed.
        OSError: samples cannot be read, or the disk is full. The last good checkpoint stays.
    """
    if min(len(samples), len(recipes), steps, accumulate) < 1:
        raise ValueError(
            f"{len(samples)} samples, {len(recipes)} recipes, {steps} steps of {accumulate} batches: there is nothing "
            "to train on; give at least one of each"
        )
    if wrong := [name for name in recipes if name in (CHECKPOINTS, LOGS) or not re.fullmatch(r"(\w[\w.+-]*)?", name)]:
        raise ValueError(f"{wrong} cannot name SAEs: a name is also a folder's; use letters, digits and _ . + -")
    shared = {
        "steps": steps, "batch_tokens": batch_tokens, "accumulate": accumulate, "kinds": list(kinds), "seed": seed,
        "auxk_alpha": auxk_alpha, "dead_after_tokens": dead_after_tokens,
        "buffer_tokens": buffer_tokens or 16 * batch_tokens, "batch_samples": batch_samples,
        "warm_steps": max(1, steps // 20) if warm_steps is None else warm_steps, "mixed_precision": mixed_precision,
        "samples": data_fingerprint(samples), "image_size": lmm.image_size and list(lmm.image_size),
    }  # fmt: skip
    runs = {name: shared | recipe.run(lmm) for name, recipe in recipes.items()}
    folder = Path(folder)
    accelerator = _accelerator(lmm, mixed_precision, accumulate, tracker, folder)
    try:
        if done := _finished(folder, runs, accelerator):
            return {name: TrainResult(one.sae.to(lmm.device), one.history) for name, one in done.items()}
        if tracker != "none":
            accelerator.init_trackers(
                "lmm-sae-nb", {name: _plain(value) for name, value in joined_settings(runs).items()}
            )
        stream = Stream(lmm, samples, [recipe.layer for recipe in recipes.values()], kinds, seed, batch_samples)
        training, batches = _begin(lmm, stream, accelerator, runs, folder)
        do_steps(training, batches, accelerator, shared, folder, checkpoint_minutes, log_every, on_log)
        if accelerator.is_main_process:
            _finish(training, folder)
        accelerator.wait_for_everyone()
    finally:
        for each in accelerator.trackers:
            each.finish()
        AcceleratorState._reset_state()  # so that another precision, or a launcher, may follow in this process
    return {name: TrainResult(learner.sae, learner.history) for name, learner in training.learners.items()}


def _accelerator(lmm: LMM, mixed_precision: str, accumulate: int, tracker: str, folder: Path) -> Accelerator:
    """Return accelerate's view of this process. A single process works on the model's device; with several the model
    moves to the device of each process."""
    if mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed_precision is {mixed_precision!r}; choose 'no' or 'bf16' (float16 overflows)")
    if tracker not in TRACKERS:
        raise ValueError(f"no tracker {tracker!r}; choose one of {', '.join(TRACKERS)}")
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ModuleNotFoundError(f"the tracker {tracker} is not installed; pip install {tracker}")
    accelerator = Accelerator(
        cpu=lmm.device.type == "cpu",
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=accumulate,
        log_with=None if tracker == "none" else tracker,
        project_dir=folder / LOGS,
    )
    if accelerator.num_processes > 1:
        lmm.model.to(accelerator.device)
    return accelerator


def _plain(value: object) -> object:
    """Return a setting as a tracker can take it."""
    return ", ".join(value) if isinstance(value, list) else value


# ---- the beginning and the end of a training --------------------------------------------------------------------


def _begin(
    lmm: LMM, stream: Stream, accelerator: Accelerator, runs: Mapping[str, Mapping], folder: Path
) -> tuple[Training, Iterator[tuple[dict[int, Tensor], Position]]]:
    """Return the training as its last checkpoint left it, or before its first step, and the batches that follow."""
    saved = checkpoint.load(folder / CHECKPOINTS)
    if saved:
        _require_same(saved.state["run"], joined_settings(runs), folder / CHECKPOINTS)
    start = Position(**saved.state["position"]) if saved else Position()
    any_run = next(iter(runs.values()))
    sizes = {name: any_run[name] for name in ("buffer_tokens", "batch_tokens", "seed")}
    batches = mixed(stream, stream.parts_an_epoch, accelerator, **sizes, start=start)
    batches = ((stream.by_layer(tokens), position) for tokens, position in batches)
    training = Training({name: _learner(lmm, run, accelerator) for name, run in runs.items()}, start)
    if saved:
        training.load(saved)
    else:
        first = next(batches)
        batches = itertools.chain([first], batches)
        middle = {layer: geometric_median(gathered(x.float(), accelerator)) for layer, x in first[0].items()}
        for learner in training.learners.values():
            learner.sae.b_dec.data.copy_(middle[learner.run["layer"]])
    return training, batches


def _learner(lmm: LMM, run: Mapping, accelerator: Accelerator) -> Learner:
    generator = torch.Generator().manual_seed(run["seed"])
    sae = TopKSAE(lmm.width, run["n_latents"], run["k"], generator=generator).to(lmm.device)
    if kept := FREEZES[run.get("frozen", "")]:
        getattr(sae, kept).requires_grad_(False)
    optimiser = accelerator.prepare_optimizer(SAEAdam(sae, run["lr"]), device_placement=False)
    return Learner(run, sae, optimiser, torch.zeros(sae.n_latents, dtype=torch.long, device=lmm.device))


def _require_same(saved: Mapping, run: Mapping, folder: Path) -> None:
    """Raise ValueError, naming the differences, if a checkpoint is of another run."""
    names = sorted(name for name in saved.keys() | run.keys() if saved.get(name) != run.get(name))
    if names:
        changes = "; ".join(f"{name} was {saved.get(name)!r}, is now {run.get(name)!r}" for name in names)
        raise ValueError(
            f"{folder} holds a checkpoint of another run: {changes}. Use the old settings, or delete the folder to "
            "start again"
        )


def _finish(training: Training, folder: Path) -> None:
    """Write each SAE, then its history; then delete the checkpoint. After a kill in between the next call resumes."""
    for name, learner in training.learners.items():
        (folder / name / HISTORY).unlink(missing_ok=True)
        learner.sae.save(folder / name)
        write_json(folder / name / HISTORY, {"rows": learner.history, "run": learner.run, "code": _code()})
    _clear(folder, training.learners)


def _finished(folder: Path, runs: Mapping[str, Mapping], accelerator: Accelerator) -> dict[str, TrainResult] | None:
    """Return the SAEs if this code has finished exactly these runs before; otherwise None."""
    paths = {name: folder / name / HISTORY for name in runs}
    if not all(path.is_file() for path in paths.values()):
        return None
    records = {name: read_json(path) for name, path in paths.items()}
    if any((records[name].get("run"), records[name].get("code")) != (run, _code()) for name, run in runs.items()):
        return None
    if accelerator.is_main_process:
        _clear(folder, runs)
    return {name: TrainResult(TopKSAE.load(folder / name), records[name]["rows"]) for name in runs}


def _clear(folder: Path, names: Iterable[str]) -> None:
    """Delete the checkpoint and the files that killed processes left."""
    for name in names:
        clear_temporaries(folder / name)
    checkpoint.remove(folder / CHECKPOINTS)


def _code() -> dict[str, str]:
    return code_fingerprints([sys.modules[__name__]])
