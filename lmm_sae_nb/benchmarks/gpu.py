"""Measure on one GPU what page A3 forecasts, in minutes, without a network and without weights.

1. A training step of the paper's SAE, without and with dead latents, in float32, TF32 and bfloat16: its time, its
   memory, and the fraction of the GPU's measured peak that it reaches. Beside it stand the one dense product that every
   exact TopK SAE has to compute, and what A3's formulas predict from this GPU's own speed.
2. What TF32 and bfloat16 change: the FVU, and which latents are among the k largest.
3. A LLaVA-NeXT of the paper's size with random weights in bfloat16 reads tokens, trains, caches, and attributes in
   float32 for a few images. Beside it stands the prediction.
4. Pages 01 to 04 of the preset `tiny`, with their metrics beside those that the CPU gave (`book/seeds.json`).

Each part begins only while there is time. The results go to `book/gpu.json`, which A2 and A3 show.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from lmm_sae_nb.benchmarks.comparison import circumstances
from lmm_sae_nb.full_scale.costs import (
    Device,
    auxk_work,
    calls_per_second,
    encoding_work,
    learning_work,
    measure_this_machine,
)
from lmm_sae_nb.full_scale.geometry_twin import geometry_twin, noise, run_twin, timed
from lmm_sae_nb.full_scale.models import forward_flops, image_layout
from lmm_sae_nb.sae.adam import SAEAdam
from lmm_sae_nb.sae.losses import auxk_loss, fvu
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.show.seed_study import read_study
from lmm_sae_nb.support import notebooks
from lmm_sae_nb.support.devices import allow_tf32, choose_device
from lmm_sae_nb.support.files import project_root, write_json
from lmm_sae_nb.support.stages import Stage

PRECISIONS = ("float32", "tf32", "bfloat16")
RUN = "gpu"  # the run of the pages
PAGES = {  # page to its stage, and the metrics that are compared
    "01": ("train", ("fvu", "dead_fraction", "loss_recovered")),
    "02": ("cache", ("latents_live", "latents_image_only_fraction")),
    "03": ("interpret", ("explained_fraction", "concept_accuracy", "concept_recall")),
    "04": ("score", ("iou_paper", "iou_strict", "clip_strict")),
}


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


def peak(device: torch.device) -> Device:
    """Return the measured speed of a device."""
    return measure_this_machine(0.2, device, side=8192 if device.type == "cuda" else 256)


def step_cost(
    sizes: Sizes, precision: str, device: torch.device, *, dead: bool, speed: Device, repeats: int = 3
) -> dict[str, float]:
    """Return what a training step takes, beside the dense product alone and the prediction.

    `seconds` and `gb`; `product_seconds` and `ratio`, the step over the product; `fraction_of_peak`, the product's
    FLOPs in the step's time over the measured peak of this precision; `seconds_predicted`, by A3's formulas.

    precision: one of PRECISIONS; the weights are float32.
    dead: whether as many latents are dead as AuxK takes, and more.
    speed: of the device, as measured.
    """
    sae, x = _sae_and_tokens(sizes, device)
    optimiser, marked = SAEAdam(sae, lr=1e-4), torch.zeros(sizes.n_latents, dtype=torch.bool, device=device)
    marked[: sizes.width * dead] = True

    def step() -> None:
        with in_precision(precision, device):
            x_hat = sae(x)
            loss = fvu(x, x_hat)
            if dead:
                loss = loss + auxk_loss(sae, x, x_hat, marked, sizes.width // 2) / 32
            loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    def product() -> None:
        with in_precision(precision, device):
            x @ sae.W_enc.detach().T

    step()
    measured: dict[str, float] = {}
    with timed("step", measured, device):
        for _ in range(repeats):
            step()
    seconds, alone = measured["step_seconds"] / repeats, 1 / calls_per_second(product, 0.2, device)
    flops, gb = 2.0 * sizes.tokens * sizes.width * sizes.n_latents, measured["step_gb"]
    return {
        "seconds": seconds, "gb": gb, "product_seconds": alone, "ratio": seconds / alone,
        "fraction_of_peak": flops / seconds / speed.peak(precision),
        "seconds_predicted": predicted_step(sizes, precision, speed, dead=dead),
    }  # fmt: skip


def predicted_step(sizes: Sizes, precision: str, speed: Device, *, dead: bool) -> float:
    """Return the seconds of a training step by A3's formulas."""
    work = encoding_work(sizes.tokens, sizes.width, sizes.n_latents, precision)
    work += learning_work(sizes.tokens, 1, sizes.width, sizes.n_latents, sizes.k)
    if dead:
        work += auxk_work(sizes.tokens, sizes.width, sizes.width, sizes.width // 2, precision)
    return sum(each.seconds(speed, 1, 1.0) for each in work)


def _sae_and_tokens(sizes: Sizes, device: torch.device) -> tuple[TopKSAE, torch.Tensor]:
    """An SAE, and tokens that are sums of k of its directions with noise, so that TopK has something to find."""
    start = torch.Generator().manual_seed(0)
    sae = TopKSAE(sizes.width, sizes.n_latents, sizes.k, generator=start).to(device)
    drawn = torch.randint(sizes.n_latents, (sizes.tokens, sizes.k), generator=start).to(device)
    strength = torch.rand(sizes.tokens, sizes.k, generator=start).to(device)
    with torch.no_grad():
        x = torch.nn.functional.embedding_bag(drawn, sae.W_dec, per_sample_weights=strength, mode="sum")
    return sae, x + 0.1 * torch.randn(x.shape, generator=start).to(device)


@contextmanager
def in_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Compute products in one of PRECISIONS inside the `with`."""
    rounded = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
    with allow_tf32(precision == "tf32", device), rounded:
        yield


@torch.no_grad()
def rounding(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Return for TF32 and bfloat16 which fraction of the latents of float32 stay among the k largest, and each FVU."""
    sae, x = _sae_and_tokens(sizes, device)
    found: dict[str, float] = {}
    exact = None
    for precision in PRECISIONS:
        with in_precision(precision, device):
            latents = sae.encode(x)
            found[f"fvu_{precision}"] = float(fvu(x, sae.decode(latents).float()))
        chosen = latents.indices.sort(-1).values
        if exact is None:
            exact = chosen
            continue
        places = torch.searchsorted(exact, chosen).clamp_max(sizes.k - 1)
        found[f"same_latents_{precision}"] = float((exact.gather(-1, places) == chosen).float().mean())
    return found


def model_cost(sizes: Sizes, device: torch.device, speed: Device) -> dict[str, float]:
    """Return what a model of this size takes to read tokens up to the layer, train an SAE on, cache and attribute,
    measured and predicted."""
    lmm = geometry_twin(MODEL, sizes.model_width, device=device, dtype=torch.bfloat16)
    pictures = noise([(640, 480)] * sizes.pictures)
    prompt = lmm.prompt("what is shown ?", pictures[0])
    tokens = prompt.inputs["input_ids"].shape[1]
    forwards = calls_per_second(lambda: lmm.hidden_states(prompt, sizes.layer), 0.5, device)
    flops = forward_flops(lmm.model, tokens, image_layout(lmm.model, (640, 480)), sizes.layer)
    size = {"n_latents": sizes.n_latents, "k": sizes.k, "steps": 2, "batch_tokens": min(1024, sizes.tokens)}
    measured = run_twin(lmm, pictures, sizes.layer, **size)
    return measured | {
        "tokens_per_second": tokens * forwards,
        "tokens_per_second_predicted": tokens * speed.bfloat16 / flops,
        "cached_images_per_second": sizes.pictures / measured["cache_seconds"],
    }


def page_metrics(number: str) -> dict[str, float]:
    """Run a page of the preset `tiny` on this machine's device; return metrics beside those of the CPU, and seconds.

    Raises:
        FileNotFoundError: Picture World was not rendered.
    """
    root, (stage, names) = project_root(), PAGES[number]
    if not (root / "data/artifacts/tiny/world/train").is_dir():
        raise FileNotFoundError("Picture World is missing; render it with `make world`")
    (source,) = root.glob(f"notebooks/{number}_*.py")
    values = {name: "" for name in ("seeds_study", "panel") if name in notebooks.parameters(source)}
    folder = root / "data" / "artifacts" / RUN / "pages"
    notebooks.convert(source, folder / ".sources" / f"{source.stem}.ipynb")
    began = time.monotonic()
    notebooks.execute(
        folder / ".sources" / f"{source.stem}.ipynb", folder / f"{source.stem}.ipynb", values | {"run": RUN}, root=root,
        on_cell=lambda **_: None,
    )  # fmt: skip
    found, on_cpu = Stage(RUN, stage).metrics, read_study(root / "book/seeds.json").stages[stage]
    row = {"seconds": time.monotonic() - began}
    for name in names:
        row |= {name: found[name], f"{name}, on the CPU": on_cpu[name].values[0]}
    return row


def parts(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], dict[str, float]]]:
    """Return the measurements by name, the most wanted first; small sizes run no pages."""
    speed = cache(lambda: peak(device))  # measured when the first part needs it
    steps = {
        f"step, {precision}{', AuxK' * dead}": lambda precision=precision, dead=dead: step_cost(
            sizes, precision, device, dead=dead, speed=speed()
        )
        for dead in (False, True)
        for precision in PRECISIONS
    }
    pages = {f"page {number}": partial(page_metrics, number) for number in PAGES} if sizes != SMALL else {}
    return {
        "speed": lambda: (
            {f"{name}_flops": speed().peak(name) for name in PRECISIONS} | {"bandwidth": speed().bandwidth}
        ),
        **steps,
        "rounding": lambda: rounding(sizes, device),
        "model": lambda: model_cost(sizes, device, speed()),
        **pages,
    }


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
        except FileNotFoundError as error:
            found[name] = str(error)[:200]
        if device.type == "cuda":
            torch.cuda.empty_cache()
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
