"""Run and time one training step of each system.

This file also runs as a script in the peers' environment, which does not have this package. So it imports only torch
until a system is chosen.

A step is: forward, loss (no latent is dead, so there is no AuxK), backward, gradient clipping, Adam, and what the
system does to the rows of its dictionary. Each system goes through its public classes with its defaults.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LR = 1e-4
Step = Callable[[Tensor], object]


class Shape(NamedTuple):
    tokens: int
    width: int
    latents: int
    k: int


def ours(shape: Shape) -> Step:
    from lmm_sae_nb.sae.adam import SAEAdam
    from lmm_sae_nb.sae.losses import fvu
    from lmm_sae_nb.sae.topk import TopKSAE

    sae = TopKSAE(shape.width, shape.latents, shape.k)
    optimiser = SAEAdam(sae, LR)

    def step(x: Tensor) -> None:
        fvu(x, sae(x)).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def ours_plain(shape: Shape) -> Step:
    from lmm_sae_nb.sae import kernels

    kernels.COMPILED = False
    return ours(shape)


def sparsify(shape: Shape) -> Step:
    """Return the step of sparsify's Trainer with optimizer="adam", plus the clipping that this version leaves out."""
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(shape.width, SparseCoderConfig(num_latents=shape.latents, k=shape.k))
    optimiser = torch.optim.Adam(sae.parameters(), lr=LR)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def sae_lens(shape: Shape) -> Step:
    """Return the step of sae-lens' SAETrainer, without the statistics that it keeps of dense activations.

    Its use_sparse_activations is off, as by default: on a CPU it has no backward (aten::view is missing on SparseCPU).
    """
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    config = TopKTrainingSAEConfig(d_in=shape.width, d_sae=shape.latents, k=shape.k, device="cpu")
    sae = TopKTrainingSAE(config)
    optimiser = torch.optim.Adam(sae.parameters(), lr=LR)
    dead = torch.zeros(shape.latents, dtype=torch.bool)

    def step(x: Tensor) -> None:
        given = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=1, is_logging_step=False
        )
        sae.training_forward_pass(given).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def dictionary_learning(shape: Shape) -> Step:
    """Return `update` of dictionary-learning's TopKTrainer."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=1000, activation_dim=shape.width, dict_size=shape.latents, k=shape.k, layer=0, lm_name="none",
        lr=LR, warmup_steps=1, decay_start=None, device="cpu",
    )  # fmt: skip
    return lambda x: trainer.update(1, x)


SYSTEMS = {  # by name: the step, and the package on PyPI if it is a peer
    "ours": (ours, None),
    "ours, plain torch": (ours_plain, None),
    "sparsify": (sparsify, "eai-sparsify"),
    "sae-lens": (sae_lens, "sae-lens"),
    "dictionary-learning": (dictionary_learning, "dictionary-learning"),
}


def peak_mb() -> float:
    """Return the highest resident memory of this process in MB; unlike ru_maxrss, without its parent's."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(system: str, shape: Shape, threads: int, *, warm: int = 2, least: int = 3, budget: float = 6.0) -> dict:
    """Time a system's step and, in turns with it, the floor: one dense product x @ W_enc.T of the same shape.

    system: one of `SYSTEMS`.
    threads: of torch.
    warm: steps before the timing; the peak memory is read after them.
    least: lowest number of turns.
    budget: seconds; turns go on until these have passed.

    Returns: medians over the turns; `ratio` is the median of step by floor.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step, peer = SYSTEMS[system]
    run, x = step(shape), torch.randn(shape.tokens, shape.width)
    for _ in range(warm):
        run(x)
    memory = peak_mb()
    W_enc = torch.randn(shape.latents, shape.width)
    x @ W_enc.T
    turns, began = [], time.perf_counter()
    while len(turns) < least or time.perf_counter() - began < budget:
        turns.append((seconds(lambda: x @ W_enc.T), seconds(lambda: run(x))))
    return {
        "system": system, **shape._asdict(), "threads": threads, "turns": len(turns),
        "floor_ms": round(1e3 * statistics.median(floor for floor, _ in turns), 2),
        "step_ms": round(1e3 * statistics.median(step for _, step in turns), 2),
        "ratio": round(statistics.median(step / floor for floor, step in turns), 3),
        "peak_mb": round(memory), "version": importlib.metadata.version(peer) if peer else None,
    }  # fmt: skip


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    request["shape"] = Shape(*request["shape"])
    print("\n" + json.dumps(measure(**request)))
