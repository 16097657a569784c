"""Measure on one GPU what page A3 forecasts, in minutes, without a network and without weights.

1. A training step of the paper's SAE, without and with dead latents, in float32, TF32 and bfloat16. Beside it stands
   the one dense product that every exact TopK SAE has to compute.
2. A LLaVA-NeXT of the paper's size with random weights trains, caches and attributes for a few images. Beside it
   stands what A3's formulas predict from this GPU's own speed.

Each part begins only while there is time. The results go to `book/gpu.json`, which A2 shows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from lmm_sae_nb.benchmarks.comparison import circumstances
from lmm_sae_nb.full_scale.costs import calls_per_second
from lmm_sae_nb.full_scale.geometry_twin import geometry_twin, noise, run_twin, timed
from lmm_sae_nb.sae.adam import SAEAdam
from lmm_sae_nb.sae.losses import auxk_loss, fvu
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.devices import choose_device
from lmm_sae_nb.support.files import project_root, write_json

PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class Sizes:
    """How large the SAE and the model are.

    tokens: of an optimiser step.
    width, n_latents, k: of the SAE.
    model_width: of the model's decoder; 0 is the paper's.
    layer: 0-based.
    pictures: that the model trains on, caches and attributes.
    """

    tokens: int = 10_240
    width: int = 4096
    n_latents: int = 131_072
    k: int = 256
    model_width: int = 0
    layer: int = 24
    pictures: int = 4


PAPER, SMALL = Sizes(), Sizes(64, 32, 256, 4, 64, 2, 1)
MODEL = "llava-hf/llama3-llava-next-8b-hf"


def step_cost(sizes: Sizes, precision: str, device: torch.device, *, dead: bool, repeats: int = 3) -> dict[str, float]:
    """Return the seconds and GB of a training step, and the seconds of the dense product alone.

    precision: one of PRECISIONS; the weights are float32.
    dead: whether enough latents are dead that AuxK has all its latents.
    """
    start = torch.Generator().manual_seed(0)
    sae = TopKSAE(sizes.width, sizes.n_latents, sizes.k, generator=start).to(device)
    x = torch.randn(sizes.tokens, sizes.width, generator=start).to(device)
    optimiser, marked = SAEAdam(sae, lr=1e-4), torch.zeros(sizes.n_latents, dtype=torch.bool, device=device)
    marked[: sizes.width * dead] = True
    rounded = torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()

    def step() -> None:
        with rounded:
            x_hat = sae(x)
        loss = fvu(x, x_hat)
        if dead:
            loss = loss + auxk_loss(sae, x, x_hat, marked, sizes.width // 2) / 32
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    def product() -> None:
        with rounded:
            x @ sae.W_enc.detach().T

    with tf32(precision == "tf32"):
        step()
        measured: dict[str, float] = {}
        with timed("step", measured, device):
            for _ in range(repeats):
                step()
        alone = 1 / calls_per_second(product, 0.2, device)
    seconds = measured["step_seconds"] / repeats
    return {"seconds": seconds, "gb": measured["step_gb"], "product_seconds": alone, "ratio": seconds / alone}


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Let a GPU round float32 products to TF32, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def model_cost(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Return what a model of this size takes to train an SAE on, cache and attribute, measured and predicted."""
    lmm = geometry_twin(MODEL, sizes.model_width, device=device, dtype=torch.bfloat16)
    pictures = noise([(640, 480)] * sizes.pictures)
    size = {"n_latents": sizes.n_latents, "k": sizes.k, "steps": 2, "batch_tokens": min(1024, sizes.tokens)}
    measured = run_twin(lmm, pictures, sizes.layer, **size)
    return measured | {"cached_images_per_second": sizes.pictures / measured["cache_seconds"]}


def parts(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], dict[str, float]]]:
    """Return the measurements by name, the most wanted first."""
    steps = {
        f"step, {precision}{', AuxK' * dead}": lambda precision=precision, dead=dead: step_cost(
            sizes, precision, device, dead=dead
        )
        for dead in (False, True)
        for precision in PRECISIONS
    }
    return {"model": lambda: model_cost(sizes, device)} | steps


def measure(sizes: Sizes, device: torch.device, minutes: float) -> dict[str, dict[str, float] | str]:
    """Return each measurement, or why there is none.

    minutes: no part begins later.
    """
    began, found = time.monotonic(), {}
    for name, part in parts(sizes, device).items():
        if time.monotonic() - began > 60 * minutes:
            found[name] = "the time was up"
            continue
        try:
            found[name] = part()
        except torch.OutOfMemoryError as error:
            found[name] = f"out of memory: {error}"[:200]
        print(name, found[name], flush=True)
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this command's options to a parser."""
    parser.add_argument("--minutes", type=float, default=6.0, help="no part begins later (default: 6)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the command where there is no GPU")
    parser.add_argument("--out", type=Path, default=project_root() / "book" / "gpu.json")


def main(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        SystemExit: there is no GPU for the full sizes.
    """
    device = choose_device()
    if device.type == "cpu" and not options.small:
        raise SystemExit("there is no GPU; --small tries the command without one")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found = measure(SMALL if options.small else PAPER, device, options.minutes)
    write_json(options.out, circumstances() | {"device": name, "results": found})
    print(options.out)
