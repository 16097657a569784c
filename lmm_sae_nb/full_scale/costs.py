"""Predict the work, memory and disk of each stage from shapes alone.

A stage's time is the sum over its kinds of work. Each takes the longer of two times: its FLOPs at the device's peak,
and its bytes at the memory's bandwidth; both are multiplied by `utilisation`. `Assumptions` holds what no preset
gives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from lmm_sae_nb.full_scale.models import (
    ImageLayout,
    activation_bytes,
    count_parameters,
    forward_flops,
    image_layout,
    width_of,
)
from lmm_sae_nb.model.hookpoints import Hookpoint, layers_below
from lmm_sae_nb.sae.kernels import BLOCK
from lmm_sae_nb.sae.losses import PLACES
from lmm_sae_nb.support.devices import allow_tf32, wait_for


class Device(NamedTuple):
    """A GPU as its maker describes it: dense peaks in FLOP/s, memory in bytes, bandwidths in bytes/s."""

    name: str
    memory: float
    float32: float
    bfloat16: float
    bandwidth: float
    link: float  # to the other GPUs, in one direction
    tf32: float = 0.0  # 0: as float32

    def peak(self, dtype: str) -> float:
        """Return the FLOP/s of products in float32, tf32 or bfloat16."""
        return {"float32": self.float32, "tf32": self.tf32 or self.float32, "bfloat16": self.bfloat16}[dtype]


DEVICES = {
    device.name: device
    for device in (
        Device("A100 80GB", 80e9, 19.5e12, 312e12, 2039e9, 300e9, 156e12),
        Device("H100 80GB", 80e9, 67e12, 989e12, 3350e9, 450e9, 495e12),
        Device("RTX 4090", 24e9, 82.6e12, 165e12, 1008e9, 32e9, 82.6e12),
    )
}


def device_named(name: str) -> Device:
    """Return a GPU by its name.

    Raises:
        ValueError: the name is unknown; the message lists those that are known.
    """
    if name not in DEVICES:
        raise ValueError(f"there is no GPU {name!r}; choose one of {', '.join(DEVICES)}")
    return DEVICES[name]


class Assumptions(NamedTuple):
    """Values that a prediction needs and no preset gives."""

    image: tuple[int, int] = (640, 480)  # width and height of every image, pixels
    image_bytes: int = 150_000  # on disk
    text_tokens: int = 100  # question, answer and chat template of a sample
    answer_tokens: int = 12  # that the explainer writes
    utilisation: float = 0.4  # fraction of the device's peaks that is reached
    library_memory: float = 1e9  # bytes on each GPU: CUDA's context and the libraries' workspace
    process_memory: float = 3e9  # bytes of each process: Python and its libraries
    prepare_seconds: float = 0.1  # of a CPU: open an image and cut it up, as measured for LLaVA-NeXT
    ranking_seconds: float = 0.054  # of a CPU: rank the latents of an image, as measured
    dead_fraction: float = 0.1  # of the latents, from the first step on: AuxK works on them


ASSUMPTIONS = Assumptions()


class Work(NamedTuple):
    """One kind of work of a stage: floating point operations, and bytes that pass through the device's memory."""

    name: str
    flops: float
    bytes: float = 0.0
    dtype: str = "float32"
    sent: float = 0.0  # bytes that each GPU sends to the others
    divided: bool = True  # among the GPUs; otherwise each does all of it

    def seconds(self, device: Device, gpus: int, utilisation: float) -> float:
        """Return the time on this number of GPUs."""
        busy = max(self.flops / device.peak(self.dtype), self.bytes / device.bandwidth)
        return (busy / (gpus if self.divided else 1) + (gpus > 1) * self.sent / device.link) / utilisation


class StageCost(NamedTuple):
    """Everything that a stage needs; memory and disk are in bytes, by what needs them.

    prepared: CPU seconds to prepare all images; threads do it beside the GPU's work, if there are any.
    workers: threads of each process.
    ranked: CPU seconds between the GPU's work, in each process's main thread.
    """

    stage: str
    tokens: float  # that the language model reads
    work: list[Work]  # of all GPUs together
    gpu: dict[str, float]  # memory of one GPU
    host: dict[str, float]  # memory of the machine
    disk: dict[str, float]
    prepared: float = 0.0
    workers: int = 0
    ranked: float = 0.0

    def hours(self, device: Device, gpus: int, utilisation: float) -> dict[str, float]:
        """Return the hours of each kind of work."""
        hours = {work.name: work.seconds(device, gpus, utilisation) / 3600 for work in self.work}
        if self.ranked:
            hours["ranking"] = self.ranked / gpus / 3600
        if self.prepared:
            alone = self.prepared / gpus / max(1, self.workers) / 3600
            hours["waiting for images"] = max(0.0, alone - sum(hours.values())) if self.workers else alone
        return hours

    def row(self, device: Device, gpus: int, utilisation: float) -> dict[str, str | float | bool]:
        """Return the totals as a row of a table: bytes in GB, times in hours, and whether one GPU is large enough."""
        gpu, host, disk = (sum(needs.values()) / 1e9 for needs in (self.gpu, self.host, self.disk))
        return {
            "stage": self.stage,
            "GPUs": gpus,
            "tokens, 1e6": self.tokens / 1e6,
            "1e18 FLOPs": sum(work.flops for work in self.work) / 1e18,
            "GB per GPU": gpu,
            "GB host": host,
            "GB disk": disk,
            "hours": sum(self.hours(device, gpus, utilisation).values()),
            f"fits {device.name}": gpu < device.memory / 1e9,
        }


# The SAE.


def sae_bytes(width: int, n_latents: int) -> float:
    """Return the bytes of an SAE's float32 weights."""
    return 4.0 * (2 * n_latents * width + n_latents + width)


def encoding_work(tokens: float, width: int, n_latents: int, dtype: str = "float32") -> list[Work]:
    """Return the work of equation 1: a dense product, and TopK's passes over its result."""
    return [
        Work("SAE encoder", 2.0 * tokens * width * n_latents, dtype=dtype),
        Work("TopK", 0.0, 4.0 * 4 * tokens * n_latents),  # written, and read about three times
    ]


def learning_work(tokens: float, steps: int, width: int, n_latents: int, k: int) -> list[Work]:
    """Return the work that training adds: sparse products (k rows a token), Adam, and the sum over GPUs."""
    weights = 2.0 * n_latents * width
    sparse = 4  # decoding, the activations' gradient, and the gradients of two matrices
    return [
        Work("sparse products", 2.0 * sparse * tokens * k * width, 4.0 * sparse * tokens * k * width),
        Work("Adam", 0.0, 4.0 * 18 * steps * weights, divided=False),  # clip, project, torch's fused Adam, unit rows
        Work("sum over GPUs", 0.0, 0.0, sent=4.0 * 2 * steps * weights),
    ]


def auxk_work(tokens: float, width: int, n_dead: float, k_aux: int, dtype: str = "float32") -> list[Work]:
    """Return the work of AuxK while latents are dead: a dense product with them, and sparse ones as in training."""
    sparse = 4
    return [
        Work("AuxK encoder", 2.0 * tokens * width * n_dead, 4.0 * 4 * tokens * n_dead, dtype=dtype),
        Work("AuxK", 2.0 * sparse * tokens * k_aux * width, 4.0 * sparse * tokens * k_aux * width),
    ]


def auxk_bytes(tokens: float, width: int, n_dead: float, k_aux: int) -> float:
    """Return the memory of AuxK: a copy of the dead rows, and its pairs with their gradients, sorted by latent."""
    return 4.0 * n_dead * width + 50.0 * min(tokens * k_aux, PLACES)


TOPK_BYTES = 3 * 4.0 * BLOCK  # a block of pre-activations, with the bias added, and what torch's topk needs

# The stages.


def train_cost(
    model: PreTrainedModel, layer: Hookpoint, n_latents: int, k: int, steps: int, batch_tokens: int, *, gpus: int = 1,
    buffer_tokens: int | None = None, repeats: int = 1, batch_samples: int = 16, dtype: str = "bfloat16",
    mixed_precision: str = "no", tf32: bool = True, k_aux: int = 0, workers: int = 0,
    assumptions: Assumptions = ASSUMPTIONS,
) -> StageCost:  # fmt: skip
    """Predict the cost of `train_sae` (section 2.1). Each GPU holds the SAE; samples and buffer are divided.

    The SAE, its gradient and Adam's two moments are float32.

    model, layer, n_latents, k, steps, batch_tokens, batch_samples: as in `train_sae`.
    dtype: of the model and of the buffer.
    buffer_tokens, repeats, mixed_precision, tf32, k_aux, workers: as in `train_saes`.

    Raises:
        ValueError: another `mixed_precision`, or `repeats` is below 1.
    """
    product = "tf32" if tf32 else "float32"
    encoders = {"no": product, "bf16": "bfloat16"}
    if mixed_precision not in encoders:
        raise ValueError(f"mixed_precision is {mixed_precision!r}; choose 'no' or 'bf16'")
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; give 1 or more")
    width, size, image = width_of(model), getattr(torch, dtype).itemsize, image_layout(model, assumptions.image)
    sample, tokens = image.tokens + assumptions.text_tokens, float(steps) * batch_tokens
    samples, tokens_of_gpu = tokens / repeats / sample, batch_tokens / gpus
    weights, sae = float(size * count_parameters(model)), sae_bytes(width, n_latents)
    k_aux, n_dead = k_aux or width // 2, assumptions.dead_fraction * n_latents
    return StageCost(
        "train",
        tokens,
        [
            Work("LMM forward", samples * forward_flops(model, sample, image, layer), dtype=dtype),
            *encoding_work(tokens, width, n_latents, encoders[mixed_precision]),
            *learning_work(tokens, steps, width, n_latents, k),
            *auxk_work(tokens, width, n_dead, k_aux, product),
        ],
        gpu={
            "LMM": weights,
            "SAE": sae,
            "gradient, Adam": 3 * sae,
            "buffer": float(buffer_tokens or 16 * batch_tokens) / gpus * width * size,
            "a batch": tokens_of_gpu * (6 * 4 * width + 6 * 8 * k),
            "TopK": TOPK_BYTES,
            "AuxK": auxk_bytes(tokens_of_gpu, width, n_dead, k_aux),
            "LMM activations": activation_bytes(model, batch_samples * sample, size),
            "libraries": assumptions.library_memory,
        },
        host={"processes": gpus * assumptions.process_memory, "checkpoint": 3 * sae},
        disk={"LMM": weights, "samples": samples * assumptions.image_bytes, "SAE": sae, "checkpoints": 6 * sae},
        prepared=samples * assumptions.prepare_seconds,
        workers=workers,
    )


def cache_cost(
    model: PreTrainedModel, layer: Hookpoint, n_latents: int, k: int, n_top: int, batch_size: int, images: int, *,
    gpus: int = 1, dtype: str = "bfloat16", tf32: bool = True, workers: int = 1,
    assumptions: Assumptions = ASSUMPTIONS,
) -> StageCost:  # fmt: skip
    """Predict the cost of `cache_activations` (section 2.2).

    Nothing after the base image's tokens is computed, and its vision tower does not see tiles that come after them.
    """
    width, size, image = width_of(model), getattr(torch, dtype).itemsize, image_layout(model, assumptions.image)
    image = image._replace(crops=1)
    sample = image.base + assumptions.text_tokens // 10  # the chat template has this much before the image
    weights, sae = float(size * count_parameters(model)), sae_bytes(width, n_latents)
    top_images = float(n_latents * (n_top * (2 * image.base + 12) + 28))
    return StageCost(
        "cache",
        float(images * sample),
        [
            Work("LMM forward", images * forward_flops(model, sample, image, layer), dtype=dtype),
            *encoding_work(images * image.base, width, n_latents, "tf32" if tf32 else "float32"),
        ],
        gpu={
            "LMM": weights,
            "SAE": sae,
            "a batch": batch_size * image.base * k * 12.0,
            "TopK": TOPK_BYTES,
            "LMM activations": activation_bytes(model, batch_size * sample, size),
            "libraries": assumptions.library_memory,
        },
        host={
            "processes": gpus * assumptions.process_memory,
            "top images": gpus * (top_images + 0.5e9),
        },
        disk={
            "LMM": weights,
            "SAE": sae,
            "images": float(images * assumptions.image_bytes),
            "cache": (gpus + 2) * top_images,
        },
        prepared=images * assumptions.prepare_seconds,
        workers=workers,
        ranked=images * assumptions.ranking_seconds,
    )


def attribute_cost(
    model: PreTrainedModel, layer: Hookpoint, n_latents: int, k: int, decisions: int, *, gpus: int = 1,
    dtype: str = "bfloat16", assumptions: Assumptions = ASSUMPTIONS,
) -> StageCost:  # fmt: skip
    """Predict the cost of `linear` (section 2.4): one forward and one backward for every active latent of a decision.

    The backward comes back to the layer, with no gradient for any weight: one product for each of the forward's,
    two for each of attention's.
    """
    width, size, image = width_of(model), getattr(torch, dtype).itemsize, image_layout(model, assumptions.image)
    sample = image.tokens + assumptions.text_tokens
    tokens, weights = float(decisions * sample), float(size * count_parameters(model))
    below, whole = (forward_flops(model, sample, image, last) for last in (layer, None))
    above = model.get_decoder().layers[layers_below(layer) :]
    backward = whole - below + sum(4.0 * block.self_attn.q_proj.out_features for block in above) * sample**2
    return StageCost(
        "attribute",
        tokens,
        [
            Work("LMM forward", decisions * whole, dtype=dtype),
            Work("LMM backward", decisions * backward, dtype=dtype),
            *encoding_work(tokens, width, n_latents),
            Work("latents' gradients", 2.0 * tokens * k * width, 4.0 * tokens * k * width),
        ],
        gpu={
            "LMM": weights,
            "SAE": sae_bytes(width, n_latents),
            "TopK": TOPK_BYTES,
            "LMM activations": max(1, len(above)) * activation_bytes(model, sample, size),
            "libraries": assumptions.library_memory,
        },
        host={"processes": gpus * assumptions.process_memory},
        disk={"LMM": weights, "SAE": sae_bytes(width, n_latents)},
    )


def explain_cost(
    model: PreTrainedModel, n_explained: int, n_top: int, *, batch: int = 32, gpus: int = 1,
    dtype: str = "bfloat16", assumptions: Assumptions = ASSUMPTIONS,
) -> StageCost:  # fmt: skip
    """Predict the cost of one question about each latent, answered token by token, by a model divided among GPUs.

    Each exemplar counts as a whole image without tiles, as LLaVA-OneVision reads several images.
    """
    text, size = model.config.get_text_config(), getattr(torch, dtype).itemsize
    image = image_layout(model, assumptions.image)
    exemplars = ImageLayout(n_top * image.base, n_top * image.base, n_top, image.patches)
    sample = exemplars.tokens + assumptions.text_tokens
    weights, answers = float(size * count_parameters(model)), n_explained * assumptions.answer_tokens
    head = text.hidden_size // text.num_attention_heads
    kept = 2.0 * size * text.num_hidden_layers * text.num_key_value_heads * head * sample  # keys and values
    return StageCost(
        "explain",
        float(n_explained * sample + answers),
        [
            Work("reading", n_explained * forward_flops(model, sample, exemplars), dtype=dtype),
            Work("writing", answers * forward_flops(model, 1, None), answers * (weights / batch + kept), dtype),
        ],
        gpu={
            "LMM": weights / gpus,
            "keys and values": batch * kept / gpus,
            "LMM activations": activation_bytes(model, batch * sample, size) / gpus,
            "libraries": assumptions.library_memory,
        },
        host={"processes": gpus * assumptions.process_memory},
        disk={"LMM": weights},
    )


# This machine.


def measure_this_machine(seconds: float = 0.4, device: torch.device = torch.device("cpu"), side: int = 1024) -> Device:  # noqa: B008
    """Measure the speed of a device's products and copies; a CPU has torch's number of threads.

    A CPU computes bfloat16 no faster than float32 here.

    seconds: how long each of them is measured.
    side: of the square matrices; a GPU needs 8,192 to be busy.
    """
    a = torch.randn(side, side, device=device)
    target, source = torch.empty(2**24, device=device), torch.randn(2**24, device=device)
    product, rounded = 2.0 * side**3, a.bfloat16()
    with allow_tf32(False, device):
        float32 = product * calls_per_second(lambda: a @ a, seconds, device)
    on_cpu = device.type == "cpu"
    with allow_tf32(True, device):
        tf32 = float32 if on_cpu else product * calls_per_second(lambda: a @ a, seconds, device)
    bfloat16 = float32 if on_cpu else product * calls_per_second(lambda: rounded @ rounded, seconds, device)
    bandwidth = 2.0 * 4 * 2**24 * calls_per_second(lambda: target.copy_(source), seconds, device)
    return Device(f"this {'CPU' if on_cpu else 'GPU'}", math.inf, float32, bfloat16, bandwidth, bandwidth, tf32)


def calls_per_second(work: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Return how often a device does some work in a second.

    seconds: how long this is measured, after a first call that does not count.
    """
    work()
    wait_for(device)
    times, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        work()
        wait_for(device)
        times += 1
    return times / spent
