"""Section 2.1: hidden states stream from the model into one TopK SAE or several, in one pass over the model.

One process or many: accelerate says which. Every process holds the SAEs and its own part of the tokens; gradients,
variances, losses and what fired are summed over all, so that an SAE does not depend on how many there are.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.samples import data_fingerprint
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.sae.adam import SAEAdam
from lmm_sae_nb.sae.losses import auxk_loss, geometric_median
from lmm_sae_nb.sae.topk import HISTORY, TopKSAE
from lmm_sae_nb.support.files import clear_temporaries, read_json, write_json
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.stages import code_fingerprints
from lmm_sae_nb.train import checkpoint
from lmm_sae_nb.train.checkpoint import Checkpoint
from lmm_sae_nb.train.token_buffer import Position, Stream, mixed

CHECKPOINTS = "checkpoint"
ROW = ("step", "tokens", "loss", "fvu", "auxk", "dead_fraction", "l0", "lr", "seconds", "tokens_per_second")
LOGS = "logs"
TRACKERS = ("none", "tensorboard", "trackio", "wandb")


class TrainResult(NamedTuple):
    sae: TopKSAE
    history: list[dict[str, float]]  # a row: ROW


@dataclass(frozen=True)
class Recipe:
    """One SAE of several: the layer (0-based) whose output it learns, its size, and the peak of its learning rate.

    lr: None is 2e-4 / sqrt(n_latents / 2^14), the published rule.
    """

    layer: int
    n_latents: int = 131_072
    k: int = 256
    lr: float | None = None

    def run(self, lmm: LMM) -> dict[str, object]:
        """What tells this SAE from another one of the same training."""
        lr = 2e-4 / math.sqrt(self.n_latents / 2**14) if self.lr is None else self.lr
        return asdict(self) | {"lr": lr, "model": lmm.fingerprint(self.layer)}


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
    lr: float | None = None,
    folder: str | Path,
    on_log: Callable[[list[dict[str, float]]], object] | None = None,
    **settings,
) -> TrainResult:
    """Train an SAE on the output of one decoder layer (0-based) and save it in `folder`: `train_saes` of one.

    on_log: called with all rows of the history so far, after each new one.
    """
    told = None if on_log is None else lambda histories: on_log(histories[""])
    recipes = {"": Recipe(layer, n_latents, k, lr)}
    return train_saes(lmm, samples, recipes, folder=folder, on_log=told, **settings)[""]


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

    samples: rows with image (PIL or None), question, answer. A latent counts as dead when it has not fired for
    `dead_after_tokens` tokens. The buffer that mixes tokens of many samples holds 16 batches by default, in the model's
    dtype, divided among the processes; every layer adds its states to it, and every SAE nothing.
    Loss of a batch: FVU + auxk_alpha * AuxK; a step takes the mean gradient of `accumulate` batches of `batch_tokens`
    tokens (over all processes). Steps: rows of W_dec kept at unit length, gradient norm clipped to 1, Adam, warm-up
    over 5 % of the steps. mixed_precision: "no" or "bf16" (autocast; weights stay float32). tracker: one of TRACKERS.
    on_log: called with the histories so far, by name, after each new row of theirs.

    An SAE has the bits that it gets when it is trained alone with the same seed, on one CPU process.

    Every `checkpoint_minutes` folder/checkpoint gets a whole checkpoint (three times the SAEs' size, six while one is
    written). Called again with the same arguments, training goes on from it, after computing again the tokens that
    the buffer held; on one CPU process it ends with the same bits as without the interruption. When all is done the
    checkpoint goes, and each history.json says what was trained: the same call again returns those SAEs.

    On n processes, each forwards every n-th part of the samples, and hidden states never travel; a step sends the
    gradients (twice the SAEs' size) once, beside a few numbers a latent.

    ValueError for no samples or recipes, a name that is no folder's, as `mixed`, for hidden states or a loss that are
    not finite, or a checkpoint of another run; ModuleNotFoundError if the tracker is not installed; OSError for samples
    that cannot be read, or a full disk. The last good checkpoint stays.
    """
    if min(len(samples), len(recipes), steps, accumulate) < 1:
        raise ValueError(
            f"{len(samples)} samples, {len(recipes)} recipes, {steps} steps of {accumulate} batches: there is nothing "
            "to train on; give at least one of each"
        )
    if wrong := [name for name in recipes if name in (CHECKPOINTS, LOGS) or not re.fullmatch(r"(\w[\w.+-]*)?", name)]:
        raise ValueError(f"SAEs cannot be called {wrong}: a name is its folder's, of letters, digits and _ . + -")
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
            return {name: its._replace(sae=its.sae.to(lmm.device)) for name, its in done.items()}
        if tracker != "none":
            accelerator.init_trackers("lmm-sae-nb", {name: _plain(value) for name, value in _together(runs).items()})
        stream = Stream(lmm, samples, [recipe.layer for recipe in recipes.values()], kinds, seed, batch_samples)
        training, batches = _begin(lmm, stream, accelerator, runs, folder)
        _train(training, batches, accelerator, shared, folder, checkpoint_minutes, log_every, on_log)
        if accelerator.is_main_process:
            _finish(training, folder)
        accelerator.wait_for_everyone()
    finally:
        for each in accelerator.trackers:
            each.finish()
        AcceleratorState._reset_state()  # so that another precision, or a launcher, may follow in this process
    return {name: TrainResult(learner.sae, learner.history) for name, learner in training.learners.items()}


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
        project_dir=folder / LOGS,
    )
    if accelerator.num_processes > 1:
        lmm.model.to(accelerator.device)
    return accelerator


def _plain(value: object) -> object:
    return ", ".join(value) if isinstance(value, list) else value


# ---- what a training is, and what it leaves -------------------------------------------------------------------


@dataclass
class _Learner:
    """An SAE in training: what it is, and what of it changes from step to step."""

    run: Mapping
    sae: TopKSAE
    optimiser: torch.optim.Optimizer
    silent: Int64[Tensor, " latents"]  # tokens since each latent last fired
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def dead(self) -> Bool[Tensor, " latents"]:
        return self.silent > self.run["dead_after_tokens"]


@dataclass
class _Training:
    """What a checkpoint holds."""

    learners: dict[str, _Learner]
    position: Position
    step: int = 0
    seconds: float = 0.0  # spent on these steps, without what was lost between a checkpoint and a kill
    clock: float = field(default_factory=time.monotonic)  # up to when `seconds` counts; no checkpoint needs it

    @property
    def run(self) -> dict:
        return _together({name: learner.run for name, learner in self.learners.items()})

    def count_time(self) -> None:
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def save(self, folder: Path) -> None:
        histories = {name: learner.history for name, learner in self.learners.items()}
        state = {"run": self.run, "position": self.position._asdict(), "histories": histories}
        state |= {"step": self.step, "seconds": self.seconds}
        tensors = {f"{name}/silent": learner.silent for name, learner in self.learners.items()}
        for name, learner in self.learners.items():
            weights = learner.sae.state_dict()
            if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
                raise ValueError(
                    f"after step {self.step} weights{_of(name)} hold NaN or infinity; train with a lower lr"
                )
            tensors |= {f"{name}/{part}": tensor for part, tensor in weights.items()}
        optimisers = {name: learner.optimiser.state_dict() for name, learner in self.learners.items()}
        checkpoint.save(folder, self.step, Checkpoint(state, tensors, optimisers))

    def load(self, found: Checkpoint) -> None:
        for name, learner in self.learners.items():
            learner.silent.copy_(found.tensors.pop(f"{name}/silent"))
            learner.sae.load_state_dict(
                {part: found.tensors.pop(f"{name}/{part}") for part in learner.sae.state_dict()}
            )
            learner.optimiser.load_state_dict(found.optimiser.pop(name))
            learner.history = found.state["histories"][name]
        self.step, self.seconds = found.state["step"], found.state["seconds"]


def _of(name: str) -> str:
    return f" of {name}" if name else ""


def _together(runs: Mapping[str, Mapping]) -> dict[str, object]:
    """What several SAEs share as it is, and under `name key` what they do not; of one alone just its run."""
    own = {item.name for item in fields(Recipe)} | {"model"}
    return {
        f"{name} {key}".strip() if key in own else key: value
        for name, run in runs.items()
        for key, value in run.items()
    }


def _begin(
    lmm: LMM, stream: Stream, accelerator: Accelerator, runs: Mapping[str, Mapping], folder: Path
) -> tuple[_Training, Iterator[tuple[dict[int, Tensor], Position]]]:
    """A training as its last checkpoint left it, or before its first step, and the batches that follow."""
    found = checkpoint.load(folder / CHECKPOINTS)
    if found:
        _require_same(found.state["run"], _together(runs), folder / CHECKPOINTS)
    start = Position(**found.state["position"]) if found else Position()
    any_run = next(iter(runs.values()))
    sizes = {name: any_run[name] for name in ("buffer_tokens", "batch_tokens", "seed")}
    batches = mixed(stream, stream.parts_an_epoch, accelerator, **sizes, start=start)
    batches = ((stream.by_layer(tokens), position) for tokens, position in batches)
    training = _Training({name: _learner(lmm, run, accelerator) for name, run in runs.items()}, start)
    if found:
        training.load(found)
    else:
        first = next(batches)
        batches = itertools.chain([first], batches)
        middle = {layer: geometric_median(_gathered(x.float(), accelerator)) for layer, x in first[0].items()}
        for learner in training.learners.values():
            learner.sae.b_dec.data.copy_(middle[learner.run["layer"]])
    return training, batches


def _learner(lmm: LMM, run: Mapping, accelerator: Accelerator) -> _Learner:
    generator = torch.Generator().manual_seed(run["seed"])
    sae = TopKSAE(lmm.width, run["n_latents"], run["k"], generator=generator).to(lmm.device)
    optimiser = accelerator.prepare_optimizer(SAEAdam(sae, run["lr"]), device_placement=False)
    return _Learner(run, sae, optimiser, torch.zeros(sae.n_latents, dtype=torch.long, device=lmm.device))


def _require_same(saved: Mapping, run: Mapping, folder: Path) -> None:
    """ValueError that names what differs if a checkpoint is of another run."""
    names = sorted(name for name in saved.keys() | run.keys() if saved.get(name) != run.get(name))
    if names:
        told = "; ".join(f"{name} was {saved.get(name)!r}, is now {run.get(name)!r}" for name in names)
        raise ValueError(
            f"{folder} holds a checkpoint of another run: {told}. Go on with what it had, or delete the folder to "
            "start anew"
        )


def _finish(training: _Training, folder: Path) -> None:
    """Each SAE, then what it is; in the end no checkpoint: killed in between, the next call finds its way."""
    for name, learner in training.learners.items():
        (folder / name / HISTORY).unlink(missing_ok=True)
        learner.sae.save(folder / name)
        write_json(folder / name / HISTORY, {"rows": learner.history, "run": learner.run, "code": _code()})
    _clear(folder, training.learners)


def _finished(folder: Path, runs: Mapping[str, Mapping], accelerator: Accelerator) -> dict[str, TrainResult] | None:
    """What this very code made of these very runs before, if it did, of all of them."""
    paths = {name: folder / name / HISTORY for name in runs}
    if not all(path.is_file() for path in paths.values()):
        return None
    told = {name: read_json(path) for name, path in paths.items()}
    if any((told[name].get("run"), told[name].get("code")) != (run, _code()) for name, run in runs.items()):
        return None
    if accelerator.is_main_process:
        _clear(folder, runs)
    return {name: TrainResult(TopKSAE.load(folder / name), told[name]["rows"]) for name in runs}


def _clear(folder: Path, names: Iterable[str]) -> None:
    """Take away the checkpoint, and what killed writers left."""
    for name in names:
        clear_temporaries(folder / name)
    checkpoint.remove(folder / CHECKPOINTS)


def _code() -> dict[str, str]:
    return code_fingerprints([sys.modules[__name__]])


# ---- steps ----------------------------------------------------------------------------------------------------


def _train(
    training: _Training,
    batches: Iterator[tuple[dict[int, Tensor], Position]],
    accelerator: Accelerator,
    run: Mapping,
    folder: Path,
    checkpoint_minutes: float,
    log_every: int,
    on_log: Callable[[dict[str, list[dict[str, float]]]], object] | None,
) -> None:
    """The steps that are left, with a row of each history now and then, and checkpoints. run: what the SAEs share."""
    steps, main = run["steps"], accelerator.is_main_process
    saved = time.monotonic()
    logged = (training.step, training.seconds)
    bar = progress_bar(total=steps, initial=training.step, desc="training", disable=not main)
    while training.step < steps:
        values = _step(training, batches, accelerator, run)
        training.count_time()
        bar.update()
        if training.step % log_every == 0 or training.step == steps:
            told = {}
            for name, learner in training.learners.items():
                learner.history.append(row := _row(training, learner, values[name], *logged))
                told |= {f"{name}/{column}".lstrip("/"): row[column] for column in ROW[1:]}
            logged = (training.step, training.seconds)
            accelerator.log(told, step=training.step)
            bar.set_postfix(fvu=f"{row['fvu']:.3f}", dead=f"{row['dead_fraction']:.3f}", refresh=False)
            if on_log and main:
                on_log({name: learner.history for name, learner in training.learners.items()})
        if main and training.step < steps and training.clock - saved >= 60 * checkpoint_minutes:
            training.save(folder / CHECKPOINTS)
            saved = time.monotonic()
    bar.close()


def _row(
    training: _Training, learner: _Learner, values: Mapping[str, float], last_step: int, last_seconds: float
) -> dict[str, float]:
    """A row of history, from what the latest step told and when the row before it was."""
    tokens = learner.run["accumulate"] * learner.run["batch_tokens"]
    row = {
        "step": training.step, "tokens": training.step * tokens, "seconds": training.seconds,
        "loss": values["fvu"] + learner.run["auxk_alpha"] * values["auxk"],
        "dead_fraction": float(learner.dead.float().mean()),
        "tokens_per_second": (training.step - last_step) * tokens / max(training.seconds - last_seconds, 1e-9),
    }  # fmt: skip
    return {name: (row | values)[name] for name in ROW}


def _step(
    training: _Training,
    batches: Iterator[tuple[dict[int, Tensor], Position]],
    accelerator: Accelerator,
    run: Mapping,
) -> dict[str, dict[str, float]]:
    """One optimiser step of each SAE; its FVU, AuxK, L0 and learning rate."""
    learners = training.learners
    for learner in learners.values():
        rate = learning_rate(training.step, run["steps"], learner.run["lr"], run["warm_steps"])
        for group in learner.optimiser.param_groups:
            group["lr"] = rate
    logged = {name: torch.zeros(3, dtype=torch.float64) for name in learners}
    fired = {name: torch.zeros_like(learner.silent, dtype=torch.bool) for name, learner in learners.items()}
    for _ in range(run["accumulate"]):
        states, training.position = next(batches)
        states = {layer: x.float() for layer, x in states.items()}
        with accelerator.accumulate(*(learner.sae for learner in learners.values())):
            for name, learner in learners.items():
                losses, active = _backward(name, learner, states[learner.run["layer"]], accelerator)
                logged[name] += losses / run["accumulate"]
                fired[name] |= active
                if accelerator.sync_gradients:
                    _sum_gradients(learner.sae, accelerator)
                learner.optimiser.step()
                learner.optimiser.zero_grad()
    training.step += 1
    for name, learner in learners.items():
        learner.silent += run["accumulate"] * run["batch_tokens"]
        learner.silent[fired[name]] = 0
    return {
        name: dict(zip(("fvu", "auxk", "l0"), logged[name].tolist(), strict=True))
        | {"lr": learner.optimiser.param_groups[0]["lr"]}
        for name, learner in learners.items()
    }


def _backward(
    name: str, learner: _Learner, x: Float[Tensor, "own width"], accelerator: Accelerator
) -> tuple[Float[Tensor, " 3"], Bool[Tensor, " latents"]]:
    """Gradients of a batch's loss from this process's tokens; FVU, AuxK and L0 of all; which latents fired.

    One with activation 0 has not fired. ValueError if the loss is not finite.
    """
    sae, dead, auxk_alpha = learner.sae, learner.dead, learner.run["auxk_alpha"]
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
            f"the loss{_of(name)} is not finite: FVU {losses[0]}, AuxK {losses[1]}; train with a lower lr, or on "
            "tokens that vary"
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
