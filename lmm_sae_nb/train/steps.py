"""The steps of a training: losses, gradients, the optimiser, rows of the history, and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor

from lmm_sae_nb.model.hookpoints import Hookpoint
from lmm_sae_nb.sae.losses import auxk_loss
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.train.kinds import batch_topk, follow, nested_error
from lmm_sae_nb.train.state import Learner, Training, of_name
from lmm_sae_nb.train.token_buffer import Position

CHECKPOINTS = "checkpoint"  # the folder of checkpoints
ROW = ("step", "tokens", "loss", "fvu", "auxk", "dead_fraction", "l0", "lr", "seconds", "tokens_per_second")


def learning_rate(step: int, steps: int, peak: float, warm: int) -> float:
    """Return the learning rate at a step: a linear rise to `peak` over `warm` steps, then a linear fall to 0."""
    return peak * min((step + 1) / max(1, warm), (steps - step) / max(1, steps - warm), 1.0)


def do_steps(
    training: Training,
    batches: Iterator[tuple[dict[Hookpoint, Tensor], Position]],
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
        training.left_out.gather(accelerator)
        training.converted.gather(accelerator)
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
    training: Training, learner: Learner, values: Mapping[str, float], last_step: int, last_seconds: float
) -> dict[str, float]:
    """Return a row of the history.

    values: FVU, AuxK, L0, the reconstruction's part of the loss, and learning rate of the latest step.
    last_step, last_seconds: step and time of the row before.
    """
    tokens = learner.run["accumulate"] * learner.run["batch_tokens"]
    row = {
        "step": training.step, "tokens": training.step * tokens, "seconds": training.seconds,
        "loss": values["learned"] + learner.run["auxk_alpha"] * values["auxk"],
        "dead_fraction": float(learner.dead.float().mean()),
        "tokens_per_second": (training.step - last_step) * tokens / max(training.seconds - last_seconds, 1e-9),
    }  # fmt: skip
    return {name: (row | values)[name] for name in ROW}


def _step(
    training: Training,
    batches: Iterator[tuple[dict[Hookpoint, Tensor], Position]],
    accelerator: Accelerator,
    run: Mapping,
) -> dict[str, dict[str, float]]:
    """Do one optimiser step of each SAE; return its FVU, AuxK, L0, part of the loss and learning rate."""
    learners = training.learners
    for learner in learners.values():
        rate = learning_rate(training.step, run["steps"], learner.run["lr"], run["warm_steps"])
        for group in learner.optimiser.param_groups:
            group["lr"] = rate
    logged = {name: torch.zeros(4, dtype=torch.float64) for name in learners}
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
        name: dict(zip(("fvu", "auxk", "l0", "learned"), logged[name].tolist(), strict=True))
        | {"lr": learner.optimiser.param_groups[0]["lr"]}
        for name, learner in learners.items()
    }


def _backward(
    name: str, learner: Learner, x: Float[Tensor, "local width"], accelerator: Accelerator
) -> tuple[Float[Tensor, " 4"], Bool[Tensor, " latents"]]:
    """Compute the gradients of a batch's loss from this process's tokens.

    Return FVU, AuxK, L0 and the reconstruction's part of the loss over all processes, and which latents were active. A
    latent with activation 0 was not.

    Raises:
        ValueError: the loss is not finite.
    """
    sae, dead, auxk_alpha = learner.sae, learner.dead, learner.run["auxk_alpha"]
    kind, k = learner.run.get("kind", "topk"), learner.run["k"]
    sums = accelerator.reduce(torch.cat([x.sum(0), x.new_tensor([len(x)])]))
    mean, tokens = sums[:-1] / sums[-1], sums[-1]
    variance = accelerator.reduce((x - mean).square().sum())
    with accelerator.autocast():
        if kind == "batch_topk":
            latents, smallest = batch_topk(sae, x, k, lambda acts: gathered(acts, accelerator))
            follow(sae.threshold, smallest)
        else:
            latents = sae.encode(x)
        x_hat = sae.decode(latents)
    error = (x - x_hat).square().sum()
    nested = nested_error(sae, x, latents, error) if kind == "matryoshka" else error
    unexplained, aux = error / variance, x.new_zeros(())
    if auxk_alpha:
        energy = accelerator.reduce(error.detach())
        k_aux = learner.run.get("k_aux") or sae.width // 2
        aux = auxk_loss(sae, x, x_hat, dead, k_aux) * error.detach() / energy.clamp_min(1e-30)
    active = latents.acts > 0
    fired = torch.zeros_like(dead)
    fired[latents.indices[active]] = True
    learned = unexplained if nested is error else nested / variance
    values = unexplained.detach(), aux.detach(), active.sum() / tokens, learned.detach()
    losses = accelerator.reduce(torch.stack(values)).double().cpu()
    if not losses.isfinite().all():
        raise ValueError(
            f"the loss{of_name(name)} is not finite: FVU {losses[0]}, AuxK {losses[1]}; train with a lower lr, or on "
            "tokens that vary"
        )
    accelerator.backward(learned + auxk_alpha * aux)
    return losses, accelerator.reduce(fired.int()) > 0


def _sum_gradients(sae: TopKSAE, accelerator: Accelerator) -> None:
    """Sum the gradients over the processes, in place."""
    if accelerator.num_processes > 1:
        for weights in sae.parameters():
            if weights.requires_grad:
                torch.distributed.all_reduce(weights.grad)


def gathered(x: Float[Tensor, "local width"], accelerator: Accelerator) -> Float[Tensor, "tokens width"]:
    """Return the tokens of all processes, in the order of processes."""
    counts = accelerator.gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = accelerator.gather(accelerator.pad_across_processes(x)).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(padded, counts, strict=True)])
