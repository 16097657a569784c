"""Train one TopK SAE or several in one pass over the model (section 2.1).

Accelerate says how many processes work. Each holds all SAEs and its part of the tokens. Gradients, variances, losses
and the record of active latents are summed over the processes, so the SAE does not depend on their number.
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
    """A trained SAE and its history, one row every few steps, with the columns of ROW."""

    sae: TopKSAE
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Recipe:
    """The settings of one SAE of several.

    layer: the layer, 0-based, whose output it learns.
    n_latents: number of latents.
    k: active latents per token.
    lr: highest learning rate; by default the published rule, 2e-4 / sqrt(n_latents / 2^14).
    """

    layer: int
    n_latents: int = 131_072
    k: int = 256
    lr: float | None = None

    def run(self, lmm: LMM) -> dict[str, object]:
        """Return what distinguishes this SAE from the others of the same training."""
        lr = 2e-4 / math.sqrt(self.n_latents / 2**14) if self.lr is None else self.lr
        return asdict(self) | {"lr": lr, "model": lmm.fingerprint(self.layer)}


def learning_rate(step: int, steps: int, peak: float, warm: int) -> float:
    """Return the learning rate at a step: a linear rise to `peak` over `warm` steps, then a linear fall to 0."""
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
    """Train an SAE on the output of one decoder layer, and save it and its history in `folder`.

    lmm: the model under study; it does not change.
    samples: rows with `image` (PIL or None), `question` and `answer`.
    layer: 0-based.
    n_latents, k, lr: as of `Recipe`.
    on_log: called with all rows of the history so far, after each new row.
    settings, errors: as of `train_saes`.
    """
    on_logs = None if on_log is None else lambda histories: on_log(histories[""])
    recipes = {"": Recipe(layer, n_latents, k, lr)}
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


# ---- the state of a training, and its files --------------------------------------------------------------------


@dataclass
class _Learner:
    """An SAE in training.

    run: its settings.
    silent: tokens since each latent was last active.
    """

    run: Mapping
    sae: TopKSAE
    optimiser: torch.optim.Optimizer
    silent: Int64[Tensor, " latents"]
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def dead(self) -> Bool[Tensor, " latents"]:
        """Which latents count as dead."""
        return self.silent > self.run["dead_after_tokens"]


@dataclass
class _Training:
    """The state of a training, which a checkpoint holds.

    seconds: time spent on the steps, without the time lost between a checkpoint and a kill.
    clock: the moment up to which `seconds` counts; not part of a checkpoint.
    """

    learners: dict[str, _Learner]
    position: Position
    step: int = 0
    seconds: float = 0.0
    clock: float = field(default_factory=time.monotonic)

    @property
    def run(self) -> dict:
        """The settings of all SAEs."""
        return _together({name: learner.run for name, learner in self.learners.items()})

    def count_time(self) -> None:
        """Add the time since the last call to `seconds`."""
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def save(self, folder: Path) -> None:
        """Write a checkpoint.

        Raises:
            ValueError: weights hold NaN or infinity.
            OSError: as `checkpoint.save`.
        """
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

    def load(self, saved: Checkpoint) -> None:
        """Take over the state of a checkpoint, which is used up."""
        for name, learner in self.learners.items():
            learner.silent.copy_(saved.tensors.pop(f"{name}/silent"))
            learner.sae.load_state_dict(
                {part: saved.tensors.pop(f"{name}/{part}") for part in learner.sae.state_dict()}
            )
            learner.optimiser.load_state_dict(saved.optimiser.pop(name))
            learner.history = saved.state["histories"][name]
        self.step, self.seconds = saved.state["step"], saved.state["seconds"]


def _of(name: str) -> str:
    return f" of {name}" if name else ""


def _together(runs: Mapping[str, Mapping]) -> dict[str, object]:
    """Return the settings of all SAEs in one dictionary: shared ones by their key, others by `name key`."""
    separate = {item.name for item in fields(Recipe)} | {"model"}
    return {
        f"{name} {key}".strip() if key in separate else key: value
        for name, run in runs.items()
        for key, value in run.items()
    }


def _begin(
    lmm: LMM, stream: Stream, accelerator: Accelerator, runs: Mapping[str, Mapping], folder: Path
) -> tuple[_Training, Iterator[tuple[dict[int, Tensor], Position]]]:
    """Return the training as its last checkpoint left it, or before its first step, and the batches that follow."""
    saved = checkpoint.load(folder / CHECKPOINTS)
    if saved:
        _require_same(saved.state["run"], _together(runs), folder / CHECKPOINTS)
    start = Position(**saved.state["position"]) if saved else Position()
    any_run = next(iter(runs.values()))
    sizes = {name: any_run[name] for name in ("buffer_tokens", "batch_tokens", "seed")}
    batches = mixed(stream, stream.parts_an_epoch, accelerator, **sizes, start=start)
    batches = ((stream.by_layer(tokens), position) for tokens, position in batches)
    training = _Training({name: _learner(lmm, run, accelerator) for name, run in runs.items()}, start)
    if saved:
        training.load(saved)
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
    """Raise ValueError, naming the differences, if a checkpoint is of another run."""
    names = sorted(name for name in saved.keys() | run.keys() if saved.get(name) != run.get(name))
    if names:
        changes = "; ".join(f"{name} was {saved.get(name)!r}, is now {run.get(name)!r}" for name in names)
        raise ValueError(
            f"{folder} holds a checkpoint of another run: {changes}. Use the old settings, or delete the folder to "
            "start again"
        )


def _finish(training: _Training, folder: Path) -> None:
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
    """Do the remaining steps; add rows to the histories and write checkpoints.

    run: the settings that the SAEs share.
    """
    steps, main = run["steps"], accelerator.is_main_process
    saved = time.monotonic()
    logged = (training.step, training.seconds)
    bar = progress_bar(total=steps, initial=training.step, desc="training", disable=not main)
    while training.step < steps:
        values = _step(training, batches, accelerator, run)
        training.count_time()
        bar.update()
        if training.step % log_every == 0 or training.step == steps:
            tracked = {}
            for name, learner in training.learners.items():
                learner.history.append(row := _row(training, learner, values[name], *logged))
                tracked |= {f"{name}/{column}".lstrip("/"): row[column] for column in ROW[1:]}
            logged = (training.step, training.seconds)
            accelerator.log(tracked, step=training.step)
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
    """Return a row of the history.

    values: FVU, AuxK, L0 and learning rate of the latest step.
    last_step, last_seconds: step and time of the row before.
    """
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
    """Do one optimiser step of each SAE; return its FVU, AuxK, L0 and learning rate."""
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
    name: str, learner: _Learner, x: Float[Tensor, "local width"], accelerator: Accelerator
) -> tuple[Float[Tensor, " 3"], Bool[Tensor, " latents"]]:
    """Compute the gradients of a batch's loss from this process's tokens.

    Return FVU, AuxK and L0 over all processes, and which latents were active. A latent with activation 0 was not.

    Raises:
        ValueError: the loss is not finite.
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
    active = latents.acts > 0
    fired = torch.zeros_like(dead)
    fired[latents.indices[active]] = True
    losses = accelerator.reduce(torch.stack([unexplained.detach(), aux.detach(), active.sum() / tokens])).double().cpu()
    if not losses.isfinite().all():
        raise ValueError(
            f"the loss{_of(name)} is not finite: FVU {losses[0]}, AuxK {losses[1]}; train with a lower lr, or on "
            "tokens that vary"
        )
    accelerator.backward(unexplained + auxk_alpha * aux)
    return losses, accelerator.reduce(fired.int()) > 0


def _sum_gradients(sae: TopKSAE, accelerator: Accelerator) -> None:
    """Sum the gradients over the processes, in place."""
    if accelerator.num_processes > 1:
        for weights in sae.parameters():
            torch.distributed.all_reduce(weights.grad)


def _gathered(x: Float[Tensor, "local width"], accelerator: Accelerator) -> Float[Tensor, "tokens width"]:
    """Return the tokens of all processes, in the order of processes."""
    counts = accelerator.gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = accelerator.gather(accelerator.pad_across_processes(x)).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(padded, counts, strict=True)])
