"""Section 2.1: hidden states stream from the model into a TopK SAE.

One process or many: accelerate says which. Every process holds the SAE and its own part of the tokens; gradients,
variances, losses and what fired are summed over all, so that the SAE does not depend on how many there are.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from tqdm.auto import tqdm

from lmm_sae_nb import checkpoint
from lmm_sae_nb.artifacts import code_fingerprints, read_json, write_json
from lmm_sae_nb.checkpoint import Checkpoint
from lmm_sae_nb.lmm import LMM
from lmm_sae_nb.optimiser import SAEAdam
from lmm_sae_nb.sae import HISTORY, TopKSAE, auxk_loss, geometric_median
from lmm_sae_nb.tokens import KINDS, Position, Stream, data_fingerprint, mixed

CHECKPOINTS = "checkpoint"
ROW = ("step", "tokens", "loss", "fvu", "auxk", "dead_fraction", "l0", "lr", "seconds", "tokens_per_second")
TRACKERS = ("none", "tensorboard", "trackio", "wandb")


class TrainResult(NamedTuple):
    sae: TopKSAE
    history: list[dict[str, float]]  # a row: ROW


def learning_rate(step: int, steps: int, peak: float, warm: int) -> float:
    """A linear rise over `warm` optimiser steps to `peak`, then a linear fall to 0 after the last step."""
    return peak * min((step + 1) / max(1, warm), (steps - step) / max(1, steps - warm), 1.0)


def train_sae(
    lmm: LMM,
    samples: Sequence[Mapping],
    layer: int,
    *,
    n_latents: int = 131_072,
    k: int = 256,
    steps: int,
    batch_tokens: int = 8192,
    accumulate: int = 1,
    lr: float | None = None,
    kinds: Sequence[str] = KINDS,
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
    on_log: Callable[[list[dict[str, float]]], object] | None = None,
) -> TrainResult:
    """Train an SAE on the output of one decoder layer (0-based) and save it in `folder`.

    samples: rows with image (PIL or None), question, answer. lr: its peak; by default 2e-4 / sqrt(n_latents / 2^14),
    the published rule. A latent counts as dead when it has not fired for `dead_after_tokens` tokens. The buffer that
    mixes tokens of many samples holds 16 batches by default, in the model's dtype, divided among the processes.
    Loss of a batch: FVU + auxk_alpha * AuxK; a step takes the mean gradient of `accumulate` batches of `batch_tokens`
    tokens (over all processes). Steps: rows of W_dec kept at unit length, gradient norm clipped to 1, Adam, warm-up
    over 5 % of the steps. mixed_precision: "no" or "bf16" (autocast; weights stay float32). tracker: one of TRACKERS.
    on_log: called with all rows of the history so far, after each new one.

    Every `checkpoint_minutes` folder/checkpoint gets a whole checkpoint (three times the SAE's size, six while one is
    written). Called again with the same arguments, training goes on from it, after computing again the tokens that
    the buffer held; on one CPU process it ends with the same bits as without the interruption. When all is done the
    checkpoint goes, and history.json says what was trained: the same call again returns that SAE.

    On n processes, each forwards every n-th part of the samples, and hidden states never travel; a step sends the
    gradients (twice the SAE's size) once, beside a few numbers a latent.

    ValueError for no samples, as `mixed`, for hidden states or a loss that are not finite, or a checkpoint of another
    run; ModuleNotFoundError if the tracker is not installed; OSError for samples that cannot be read, or a full disk.
    The last good checkpoint stays.
    """
    if min(len(samples), steps, accumulate) < 1:
        raise ValueError(
            f"{len(samples)} samples, {steps} steps of {accumulate} batches: there is nothing to train on; give at "
            "least one of each"
        )
    lr = 2e-4 / math.sqrt(n_latents / 2**14) if lr is None else lr
    run = {
        "layer": layer, "n_latents": n_latents, "k": k, "steps": steps, "batch_tokens": batch_tokens,
        "accumulate": accumulate, "lr": lr, "kinds": list(kinds), "seed": seed, "auxk_alpha": auxk_alpha,
        "dead_after_tokens": dead_after_tokens, "buffer_tokens": buffer_tokens or 16 * batch_tokens,
        "batch_samples": batch_samples, "warm_steps": max(1, steps // 20) if warm_steps is None else warm_steps,
        "mixed_precision": mixed_precision, "model": lmm.fingerprint(layer), "samples": data_fingerprint(samples),
        "image_size": lmm.image_size and list(lmm.image_size),
    }  # fmt: skip
    folder = Path(folder)
    accelerator = _accelerator(lmm, mixed_precision, accumulate, tracker, folder)
    try:
        if done := _finished(folder, run, accelerator):
            return done._replace(sae=done.sae.to(lmm.device))
        if tracker != "none":
            accelerator.init_trackers("lmm-sae-nb", {name: _plain(value) for name, value in run.items()})
        stream = Stream(lmm, samples, layer, kinds, seed, batch_samples)
        training, batches = _begin(lmm, stream, accelerator, run, folder)
        _train(training, batches, accelerator, run, folder, checkpoint_minutes, log_every, on_log)
        if accelerator.is_main_process:
            _finish(training, run, folder)
        accelerator.wait_for_everyone()
    finally:
        for each in accelerator.trackers:
            each.finish()
        AcceleratorState._reset_state()  # so that another precision, or a launcher, may follow in this process
    return TrainResult(training.sae, training.history)


def _accelerator(lmm: LMM, mixed_precision: str, accumulate: int, tracker: str, folder: Path) -> Accelerator:
    """Accelerate's view of this process: on the model's device if alone, else the model moves to the process's own."""
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
        project_dir=folder / "logs",
    )
    if accelerator.num_processes > 1:
        lmm.model.to(accelerator.device)
    return accelerator


def _plain(value: object) -> object:
    return ", ".join(value) if isinstance(value, list) else value


# ---- what a training is, and what it leaves -------------------------------------------------------------------


@dataclass
class _Training:
    """What changes from step to step, and so what a checkpoint holds."""

    sae: TopKSAE
    optimiser: torch.optim.Optimizer
    silent: Int64[Tensor, " latents"]  # tokens since each latent last fired
    position: Position
    step: int = 0
    seconds: float = 0.0  # spent on these steps, without what was lost between a checkpoint and a kill
    history: list[dict[str, float]] = field(default_factory=list)
    clock: float = field(default_factory=time.monotonic)  # up to when `seconds` counts; no checkpoint needs it

    def count_time(self) -> None:
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def save(self, run: Mapping, folder: Path) -> None:
        state = {name: getattr(self, name) for name in ("step", "seconds", "history")}
        state |= {"run": run, "position": self.position._asdict()}
        tensors = self.sae.state_dict() | {"silent": self.silent}
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError(f"after step {self.step} weights hold NaN or infinity; train with a lower lr")
        checkpoint.save(folder, self.step, Checkpoint(state, tensors, self.optimiser.state_dict()))

    def load(self, found: Checkpoint) -> None:
        self.silent.copy_(found.tensors.pop("silent"))
        self.sae.load_state_dict(found.tensors)
        self.optimiser.load_state_dict(found.optimiser)
        self.step, self.seconds, self.history = (found.state[name] for name in ("step", "seconds", "history"))


def _begin(
    lmm: LMM, stream: Stream, accelerator: Accelerator, run: Mapping, folder: Path
) -> tuple[_Training, Iterator[tuple[Tensor, Position]]]:
    """A training as its last checkpoint left it, or before its first step, and the batches that follow."""
    found = checkpoint.load(folder / CHECKPOINTS)
    if found:
        _require_same(found.state["run"], run, folder / CHECKPOINTS)
    start = Position(**found.state["position"]) if found else Position()
    sizes = {name: run[name] for name in ("buffer_tokens", "batch_tokens", "seed")}
    batches = mixed(stream, stream.parts_an_epoch, accelerator, **sizes, start=start)
    generator = torch.Generator().manual_seed(run["seed"])
    sae = TopKSAE(lmm.width, run["n_latents"], run["k"], generator=generator).to(lmm.device)
    silent = torch.zeros(sae.n_latents, dtype=torch.long, device=lmm.device)
    optimiser = accelerator.prepare_optimizer(SAEAdam(sae, run["lr"]), device_placement=False)
    training = _Training(sae, optimiser, silent, start)
    if found:
        training.load(found)
    else:
        first = next(batches)
        batches = itertools.chain([first], batches)
        sae.b_dec.data.copy_(geometric_median(_gathered(first[0].float(), accelerator)))
    return training, batches


def _require_same(saved: Mapping, run: Mapping, folder: Path) -> None:
    """ValueError that names what differs if a checkpoint is of another run."""
    names = sorted(name for name in saved.keys() | run.keys() if saved.get(name) != run.get(name))
    if names:
        told = "; ".join(f"{name} was {saved.get(name)!r}, is now {run.get(name)!r}" for name in names)
        raise ValueError(
            f"{folder} holds a checkpoint of another run: {told}. Go on with what it had, or delete the folder to "
            "start anew"
        )


def _finish(training: _Training, run: Mapping, folder: Path) -> None:
    """The SAE, then what it is, then no checkpoint: killed in between, the next call finds its way from any of them."""
    (folder / HISTORY).unlink(missing_ok=True)
    training.sae.save(folder)
    write_json(folder / HISTORY, {"rows": training.history, "run": run, "code": _code()})
    checkpoint.remove(folder / CHECKPOINTS)


def _finished(folder: Path, run: Mapping, accelerator: Accelerator) -> TrainResult | None:
    """What this very code made of this very run before, if it did."""
    if not (folder / HISTORY).is_file():
        return None
    told = read_json(folder / HISTORY)
    if (told.get("run"), told.get("code")) != (run, _code()):
        return None
    if accelerator.is_main_process:
        checkpoint.remove(folder / CHECKPOINTS)
    return TrainResult(TopKSAE.load(folder), told["rows"])


def _code() -> dict[str, str]:
    return code_fingerprints([sys.modules[__name__]])


# ---- steps ----------------------------------------------------------------------------------------------------


def _train(
    training: _Training,
    batches: Iterator[tuple[Tensor, Position]],
    accelerator: Accelerator,
    run: Mapping,
    folder: Path,
    checkpoint_minutes: float,
    log_every: int,
    on_log: Callable[[list[dict[str, float]]], object] | None,
) -> None:
    """The steps that are left, with a row of history now and then, and checkpoints."""
    steps, main = run["steps"], accelerator.is_main_process
    saved = time.monotonic()
    logged = (training.step, training.seconds)
    bar = tqdm(total=steps, initial=training.step, desc="training", mininterval=2, disable=not main)
    while training.step < steps:
        values = _step(training, batches, accelerator, run)
        training.count_time()
        bar.update()
        if training.step % log_every == 0 or training.step == steps:
            row = _row(training, values, run, *logged)
            logged = (training.step, training.seconds)
            training.history.append(row)
            accelerator.log({name: row[name] for name in ROW[1:]}, step=training.step)
            bar.set_postfix(fvu=f"{row['fvu']:.3f}", dead=f"{row['dead_fraction']:.3f}", refresh=False)
            if on_log and main:
                on_log(training.history)
        if main and training.step < steps and training.clock - saved >= 60 * checkpoint_minutes:
            training.save(run, folder / CHECKPOINTS)
            saved = time.monotonic()
    bar.close()


def _row(
    training: _Training, values: Mapping[str, float], run: Mapping, last_step: int, last_seconds: float
) -> dict[str, float]:
    """A row of history, from what the latest step told and when the row before it was."""
    tokens = run["accumulate"] * run["batch_tokens"]
    row = {
        "step": training.step, "tokens": training.step * tokens, "seconds": training.seconds,
        "loss": values["fvu"] + run["auxk_alpha"] * values["auxk"],
        "dead_fraction": float((training.silent > run["dead_after_tokens"]).float().mean()),
        "tokens_per_second": (training.step - last_step) * tokens / max(training.seconds - last_seconds, 1e-9),
    }  # fmt: skip
    return {name: (row | values)[name] for name in ROW}


def _step(
    training: _Training, batches: Iterator[tuple[Tensor, Position]], accelerator: Accelerator, run: Mapping
) -> dict[str, float]:
    """One optimiser step; its FVU, AuxK, L0 and learning rate."""
    rate = learning_rate(training.step, run["steps"], run["lr"], run["warm_steps"])
    for group in training.optimiser.param_groups:
        group["lr"] = rate
    dead = training.silent > run["dead_after_tokens"]
    logged = torch.zeros(3, dtype=torch.float64)
    fired = torch.zeros_like(dead)
    for _ in range(run["accumulate"]):
        x, training.position = next(batches)
        with accelerator.accumulate(training.sae):
            losses, active = _backward(training.sae, x.float(), dead, run["auxk_alpha"], accelerator)
            logged += losses / run["accumulate"]
            fired |= active
            if accelerator.sync_gradients:
                _sum_gradients(training.sae, accelerator)
            training.optimiser.step()
            training.optimiser.zero_grad()
    training.step += 1
    training.silent += run["accumulate"] * run["batch_tokens"]
    training.silent[fired] = 0
    return dict(zip(("fvu", "auxk", "l0"), logged.tolist(), strict=True)) | {"lr": rate}


def _backward(
    sae: TopKSAE,
    x: Float[Tensor, "own width"],
    dead: Bool[Tensor, " latents"],
    auxk_alpha: float,
    accelerator: Accelerator,
) -> tuple[Float[Tensor, " 3"], Bool[Tensor, " latents"]]:
    """Gradients of a batch's loss from this process's tokens; FVU, AuxK and L0 of all; which latents fired.

    One with activation 0 has not fired. ValueError if the loss is not finite.
    """
    sums = accelerator.reduce(torch.cat([x.sum(0), x.new_tensor([len(x)])]))
    mean, tokens = sums[:-1] / sums[-1], sums[-1]
    variance = accelerator.reduce((x - mean).square().sum())
    with accelerator.autocast():
        latents = sae.encode(x)
        x_hat = sae.decode(latents)
    error = (x - x_hat).square().sum()
    unexplained, aux = error / variance, x.new_zeros(())
    if auxk_alpha:
        energy = accelerator.reduce(error.detach())
        aux = auxk_loss(sae, x, x_hat, dead, k_aux=sae.width // 2) * error.detach() / energy.clamp_min(1e-30)
    own = latents.acts > 0
    fired = torch.zeros_like(dead)
    fired[latents.indices[own]] = True
    losses = accelerator.reduce(torch.stack([unexplained.detach(), aux.detach(), own.sum() / tokens])).double().cpu()
    if not losses.isfinite().all():
        raise ValueError(
            f"the loss is not finite: FVU {losses[0]}, AuxK {losses[1]}; train with a lower lr, or on tokens that vary"
        )
    accelerator.backward(unexplained + auxk_alpha * aux)
    return losses, accelerator.reduce(fired.int()) > 0


def _sum_gradients(sae: TopKSAE, accelerator: Accelerator) -> None:
    """Add up what the processes found, in place. All gradients come at once, so nothing could overlap with it."""
    if accelerator.num_processes > 1:
        for weights in sae.parameters():
            torch.distributed.all_reduce(weights.grad)


def _gathered(x: Float[Tensor, "own width"], accelerator: Accelerator) -> Float[Tensor, "tokens width"]:
    """The tokens of all processes, in their order."""
    counts = accelerator.gather(torch.tensor([len(x)], device=x.device)).tolist()
    shares = accelerator.gather(accelerator.pad_across_processes(x)).split(max(counts))
    return torch.cat([share[:count] for share, count in zip(shares, counts, strict=True)])
