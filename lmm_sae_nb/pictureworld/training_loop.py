"""What every training here shares: a schedule, a log, checkpoints that survive a kill, and progress to watch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.train import checkpoint
from lmm_sae_nb.train.checkpoint import Checkpoint

CHECKPOINTS = "checkpoint"  # the folder of checkpoints in a training's folder


def optimisers(modules: Iterable[nn.Module], rate: float, decay: float = 0.02) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and biases, at one learning rate."""
    named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    inner = {id(p): p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name}
    outer = {id(p): p for _, p in named if id(p) not in inner}
    return [
        torch.optim.Muon(list(inner.values()), lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(list(outer.values()), lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@lru_cache
def autocast_if_quicker() -> bool:
    """Use bfloat16 for matrix products if it is quicker than float32 on this processor (on some it halves the time,
    on some it doubles it).
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype)
        times = []
        for _ in range(9):
            began = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - began)
        seconds[dtype] = sorted(times)[4]
    return seconds[torch.bfloat16] < seconds[torch.float32]


def warm_then_cosine(step: int, steps: int, warm: int = 100, floor: float = 0.02) -> float:
    """Factor on the learning rate: a linear rise over `warm` steps, then half a cosine down to `floor`."""
    if step < warm:
        return (step + 1) / warm
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def attend(
    folder: Path,
    steps: int,
    pupil: nn.Module,
    opts: list[torch.optim.Optimizer],
    loss_at: Callable[[int], dict[str, Tensor]],
    *,
    minutes: float = math.inf,
    clip: float = 1.0,
    save_every: float = 120.0,
    log_every: int = 20,
    title: str = "training",
) -> bool:
    """Train `pupil` for `steps` steps in all, from the last checkpoint in `folder` if there is one.

    `loss_at(step)` returns named losses, the one called "loss" is minimised. Stops early after `minutes`; call
    again to go on. Returns whether all steps are done. Writes a checkpoint every `save_every` seconds, atomically and
    with checksums, and appends to `log.jsonl`.

    Raises:
        ValueError: the checkpoint is damaged.
        OSError: it cannot be written; the last good one stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.jsonl"
    start = kept = 0
    if known := checkpoint.load(folder / CHECKPOINTS):
        pupil.load_state_dict(known.tensors)
        for number, opt in enumerate(opts):
            opt.load_state_dict(known.optimiser[str(number)])
        start = kept = known.state["step"]

    def save(step: int) -> None:
        nonlocal kept
        if step > kept:
            optimisers = {str(number): opt.state_dict() for number, opt in enumerate(opts)}
            checkpoint.save(folder / CHECKPOINTS, step, Checkpoint({"step": step}, pupil.state_dict(), optimisers))
            kept = step

    peak = [[group["lr"] for group in opt.param_groups] for opt in opts] if start == 0 else None
    rates = peak or [[group.get("peak", group["lr"]) for group in opt.param_groups] for opt in opts]
    for opt, row in zip(opts, rates, strict=False):
        for group, rate in zip(opt.param_groups, row, strict=False):
            group["peak"] = rate
    began = saved_at = time.monotonic()
    sums: dict[str, float] = {}
    bar = progress_bar(range(start, steps), initial=start, total=steps, desc=title)
    for step in bar:
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * warm_then_cosine(step, steps)
        losses = loss_at(step)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_([p for opt in opts for group in opt.param_groups for p in group["params"]], clip)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        if (step + 1) % log_every == 0:
            steps_summed = step + 1 - max(start, step + 1 - log_every)  # fewer after a checkpoint between two rows
            row = {name: round(total / steps_summed, 5) for name, total in sums.items()}
            with log.open("a") as out:
                out.write(json.dumps({"step": step + 1, "seconds": round(time.monotonic() - began, 1), **row}) + "\n")
            bar.set_postfix(loss=row["loss"], refresh=False)
            sums = {}
        if time.monotonic() - saved_at > save_every:
            save(step + 1)
            saved_at = time.monotonic()
        if time.monotonic() - began > 60 * minutes:
            save(step + 1)
            return step + 1 == steps
    save(steps)
    return True


def has_checkpoint(folder: Path) -> bool:
    """Return whether a training has left a checkpoint in its folder."""
    return (folder / CHECKPOINTS).is_dir()


def pupil_weights(folder: Path, course: str) -> dict[str, Tensor]:
    """Return the weights that a training left in its folder.

    course: the command that trains, for the error.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are damaged.
    """
    if (known := checkpoint.load(folder / CHECKPOINTS)) is None:
        raise FileNotFoundError(
            f"{folder / CHECKPOINTS} is missing; run `python -m lmm_sae_nb.pictureworld {course}` first"
        )
    return known.tensors


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the rows of a training's log; FileNotFoundError if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it is written by the training and shipped with the model")
    return [json.loads(line) for line in path.read_text().splitlines()]


def smooth(rows: list[dict[str, float]], points: int = 60) -> list[dict[str, float]]:
    """About `points` rows, each the mean of its neighbours; counts `asked_x` and `exact_x` become `share_x`."""
    size = max(1, len(rows) // points)
    means = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        mean = {name: sum(row[name] for row in part) / len(part) for name in part[0]}
        asked = {n.removeprefix("asked_"): v for n, v in mean.items() if n.startswith("asked_")}
        means.append(mean | {f"share_{n}": mean[f"exact_{n}"] / v if v else float("nan") for n, v in asked.items()})
    return means
