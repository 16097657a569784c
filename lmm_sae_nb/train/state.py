"""The state of a training: one SAE or several, what changes from step to step, and its checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from lmm_sae_nb.model.hookpoints import Hookpoint, plain
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.train import checkpoint
from lmm_sae_nb.train.checkpoint import Checkpoint
from lmm_sae_nb.train.kinds import KINDS
from lmm_sae_nb.train.sample_parts import Converted, LeftOut
from lmm_sae_nb.train.token_buffer import Position

FREEZES = {"": None, "encoder": "W_enc", "decoder": "W_dec"}  # what a recipe can freeze, and the weights


@dataclass(frozen=True)
class Recipe:
    """The settings of one SAE of several.

    layer: the layer, 0-based, or other hookpoint, whose output it learns.
    n_latents: number of latents.
    k: active latents per token.
    lr: highest learning rate; by default the published rule, 2e-4 / sqrt(n_latents / 2^14).
    frozen: "encoder" or "decoder", as a control: W_enc or W_dec keeps its first random rows. All biases and the other
        matrix learn, so a frozen encoder can still learn how often each latent is active. "": everything learns.
    kind: "topk", "batch_topk" or "matryoshka"; see `kinds`.

    Raises:
        ValueError: there is no such part to freeze, or no such kind.
    """

    layer: Hookpoint
    n_latents: int = 131_072
    k: int = 256
    lr: float | None = None
    frozen: str = ""
    kind: str = "topk"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"there is no training of the kind {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.frozen not in FREEZES:
            raise ValueError(f"frozen is {self.frozen!r}; choose 'encoder' or 'decoder', or '' to train everything")

    def run(self, lmm: LMM) -> dict[str, object]:
        """Return what distinguishes this SAE from the others of the same training.

        `frozen` and `kind` are there only if they are not the default, so that older records hold.
        """
        lr = 2e-4 / math.sqrt(self.n_latents / 2**14) if self.lr is None else self.lr
        run = asdict(self) | {"layer": plain(self.layer), "lr": lr, "model": lmm.fingerprint(self.layer)}
        usual = {"frozen": "", "kind": "topk"}
        return {name: value for name, value in run.items() if name not in usual or value != usual[name]}


@dataclass
class Learner:
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
class Training:
    """The state of a training, which a checkpoint holds.

    left_out: the samples that cannot be read.
    converted: those whose pictures were converted to 8-bit RGB.
    seconds: time spent on the steps, without the time lost between a checkpoint and a kill.
    clock: the moment up to which `seconds` counts; not part of a checkpoint.
    """

    learners: dict[str, Learner]
    position: Position
    left_out: LeftOut
    converted: Converted
    step: int = 0
    seconds: float = 0.0
    clock: float = field(default_factory=time.monotonic)

    @property
    def run(self) -> dict:
        """The settings of all SAEs."""
        return joined_settings({name: learner.run for name, learner in self.learners.items()})

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
        state |= {"step": self.step, "seconds": self.seconds, **self.left_out.record()}
        state |= self.converted.record()
        tensors = {f"{name}/silent": learner.silent for name, learner in self.learners.items()}
        for name, learner in self.learners.items():
            weights = learner.sae.state_dict()
            if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
                raise ValueError(
                    f"after step {self.step} weights{of_name(name)} hold NaN or infinity; train with a lower lr"
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


def of_name(name: str) -> str:
    """Return the part of a message that names an SAE; "" if there is only one, without a name."""
    return f" of {name}" if name else ""


def joined_settings(runs: Mapping[str, Mapping]) -> dict[str, object]:
    """Return the settings of all SAEs in one dictionary: shared ones by their key, others by `name key`."""
    separate = {item.name for item in fields(Recipe)} | {"model"}
    return {
        f"{name} {key}".strip() if key in separate else key: value
        for name, run in runs.items()
        for key, value in run.items()
    }
