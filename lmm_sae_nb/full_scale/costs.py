"""What a run will take before any of it runs: memory, disk, tokens, FLOPs and hours of each stage of a preset.

Parameters and products are counted in the models' true classes on torch's meta device, without weights. A stage's
time is the sum over its parts of the longer of two: its FLOPs at the device's peak times `utilisation`, its bytes
at the memory's bandwidth times `utilisation`. What no preset says is assumed, in `Assumed`.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from lmm_sae_nb.model.token_kinds import BASE, layout_of
from lmm_sae_nb.support.files import read_json

GEOMETRIES = Path(__file__).with_name("geometries.json")  # of the presets' models, as their config.json on the hub


class Device(NamedTuple):
    """A GPU as its maker describes it: dense peaks in FLOP/s, memory in bytes, bandwidths in bytes/s."""

    name: str
    memory: float
    float32: float
    bfloat16: float
    bandwidth: float
    link: float  # to the other GPUs, one way


DEVICES = {
    device.name: device
    for device in (
        Device("A100 80GB", 80e9, 19.5e12, 312e12, 2039e9, 300e9),
        Device("H100 80GB", 80e9, 67e12, 989e12, 3350e9, 450e9),
        Device("RTX 4090", 24e9, 82.6e12, 165e12, 1008e9, 32e9),
    )
}


class Assumed(NamedTuple):
    """What a forecast takes for granted."""

    image: tuple[int, int] = (640, 480)  # width and height of every image, pixels
    image_bytes: int = 150_000  # on disk
    text_tokens: int = 100  # question, answer and chat template of a sample
    answer_tokens: int = 12  # that the explainer writes
    utilisation: float = 0.4  # share of the device's peaks that is reached
    library_memory: float = 1e9  # CUDA's context and the libraries' own workspace on each GPU
    process_memory: float = 3e9  # Python and its libraries in each process


ASSUMED = Assumed()


class Part(NamedTuple):
    """One kind of work of a stage: floating point operations, and bytes that pass through the device's memory."""

    name: str
    flops: float
    bytes: float = 0.0
    dtype: str = "float32"
    sent: float = 0.0  # bytes that each GPU sends to others, when there are others
    shared: bool = True  # among the GPUs; else each does all of it

    def seconds(self, device: Device, gpus: int, utilisation: float) -> float:
        """Time on so many GPUs."""
        busy = max(self.flops / getattr(device, self.dtype), self.bytes / device.bandwidth)
        return (busy / (gpus if self.shared else 1) + (gpus > 1) * self.sent / device.link) / utilisation


class Cost(NamedTuple):
    """What a stage takes: all of its parts' work; memory of one GPU, of the host and on disk, by what needs it."""

    stage: str
    tokens: float  # that the language model reads
    parts: list[Part]
    gpu: dict[str, float]
    host: dict[str, float]
    disk: dict[str, float]

    def hours(self, device: Device, gpus: int, utilisation: float) -> dict[str, float]:
        return {part.name: part.seconds(device, gpus, utilisation) / 3600 for part in self.parts}


# The model.


def config_of(name_or_path: str | Path) -> PretrainedConfig:
    """A model's config: of a folder, one that is known offline, or from the hub."""
    known = read_json(GEOMETRIES)
    if str(name_or_path) in known and not Path(name_or_path).is_dir():
        facts = dict(known[str(name_or_path)])
        return AutoConfig.for_model(facts.pop("model_type"), **facts)
    return AutoConfig.from_pretrained(name_or_path)


@lru_cache(maxsize=8)
def meta_model(name_or_path: str | Path) -> PreTrainedModel:
    """The true class with every parameter in its place and no memory behind it."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config_of(name_or_path))


def parameters(module: nn.Module) -> int:
    """How many numbers a module's weights are."""
    return sum(weights.numel() for weights in module.parameters())


def products(module: nn.Module) -> int:
    """Multiplications for one token or patch: the weights of the linear and patch-embedding layers."""
    layers = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, layers))


class Picture(NamedTuple):
    """What an image is to a model."""

    tokens: int  # in the language model's sequence
    base: int  # of them, patches of the whole image
    crops: int  # that the vision tower sees
    patches: int  # in each of them


def picture(model: PreTrainedModel, size: tuple[int, int]) -> Picture:
    """Tokens and patches of an image of `size` = (width, height) pixels, as the model itself lays it out.

    ValueError for a family that has no fixed rule here (LLaVA-NeXT, LLaVA-OneVision and Qwen2.5-VL have one).
    """
    (width, height), config = size, model.config
    vision = config.vision_config
    if config.model_type == "qwen2_5_vl":
        unit = vision.patch_size * vision.spatial_merge_size
        rows, cols = (side // vision.patch_size for side in smart_resize(height, width, factor=unit))
        inputs, crops, patches = {"image_grid_thw": torch.tensor([[1, rows, cols]])}, 1, rows * cols
    elif config.model_type in ("llava_next", "llava_onevision"):
        inputs = {"image_sizes": torch.tensor([[height, width]])}
        crops = image_size_to_num_patches((height, width), config.image_grid_pinpoints, vision.image_size)
        patches = (vision.image_size // vision.patch_size) ** 2
    else:
        raise ValueError(f"no forecast for a {config.model_type}: how many patches its images have is not written here")
    kinds, _ = layout_of(model)(model, inputs, 0, 0)
    return Picture(len(kinds), int((kinds == BASE).sum()), crops, patches)


def reading_flops(model: PreTrainedModel, tokens: int, picture: Picture | None, layer: int | None = None) -> float:
    """FLOPs of one sample's forward: vision tower, projector, and the decoder's layers up to `layer` (None: all).

    Attention is counted in full, as a causal mask that is not exploited computes it, and crops that are equal as often
    as they are shown.
    """
    layers = model.get_decoder().layers[: None if layer is None else layer + 1]
    attended = sum(2 * block.self_attn.q_proj.out_features for block in layers)
    flops = 2.0 * products(layers) * tokens + 2.0 * attended * tokens**2
    if layer is None:
        flops += 2.0 * products(model.get_output_embeddings())
    if picture is None:
        return flops
    tower = getattr(model.model, "vision_tower", None) or model.model.visual
    vision = model.config.vision_config
    depth = getattr(vision, "num_hidden_layers", None) or vision.depth
    seen = picture.crops * picture.patches
    flops += 2.0 * products(tower) * seen + 4.0 * depth * vision.hidden_size * picture.crops * picture.patches**2
    projector = getattr(model.model, "multi_modal_projector", None)
    return flops + (2.0 * products(projector) * seen if projector else 0.0)


# The SAE.


def sae_bytes(width: int, n_latents: int) -> float:
    """Bytes of an SAE's float32 weights."""
    return 4.0 * (2 * n_latents * width + n_latents + width)


def encode_parts(tokens: float, width: int, n_latents: int, dtype: str = "float32") -> list[Part]:
    """Eq. 1 of so many tokens: a dense product, and TopK's passes over what it gives."""
    return [
        Part("SAE encoder", 2.0 * tokens * width * n_latents, dtype=dtype),
        Part("TopK", 0.0, 4.0 * 4 * tokens * n_latents),  # written, and read about three times
    ]


def learn_parts(tokens: float, steps: int, width: int, n_latents: int, k: int) -> list[Part]:
    """What training adds: sparse products (k rows of the width a token), Adam, the sum over GPUs."""
    weights = 2.0 * n_latents * width
    sparse = 4  # decoding, the activations' gradient, and the two matrices' gradients
    return [
        Part("sparse products", 2.0 * sparse * tokens * k * width, 4.0 * sparse * tokens * k * width),
        Part("Adam", 0.0, 4.0 * 9 * steps * weights, shared=False),  # clip, four arrays read, three written, unit rows
        Part("sum over GPUs", 0.0, 0.0, sent=4.0 * 2 * steps * weights),
    ]


# The stages.


def read_preset(path: str | Path) -> dict[str, dict]:
    """A params file's values for each notebook: what is common to all, under what is a notebook's own.

    FileNotFoundError for a path at which there is no file.
    """
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no preset {path}; give its file's path from the root, such as notebooks/params/paper.yaml"
        )
    given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    common = {name: value for name, value in given.items() if not isinstance(value, dict)}
    return {name: common | values for name, values in given.items() if isinstance(values, dict)}


def costs(preset: Mapping[str, Mapping], images: int, *, gpus: int = 1, assumed: Assumed = ASSUMED) -> list[Cost]:
    """What the stages of a preset (`read_preset`) take on so many GPUs, `images` being cached.

    ValueError for a preset that leaves out what a forecast needs.
    """
    train = _chosen(preset, "01_train_sae", TRAIN)
    cache = _chosen(preset, "02_cache_activations", CACHE) | {name: train[name] for name in ("n_latents", "k")}
    explain = _chosen(preset, "03_interpret_features", EXPLAIN)
    explain["model"] = explain.pop("explainer").partition("@http")[0]
    models = [meta_model(values.pop("model")) for values in (train, cache, explain)]
    return [
        train_cost(models[0], **train, gpus=gpus, assumed=assumed),
        cache_cost(models[1], **cache, images=images, gpus=gpus, assumed=assumed),
        explain_cost(models[2], **explain, gpus=gpus, assumed=assumed),
    ]


def explainer_of(preset: Mapping[str, Mapping]) -> str:
    """The name of the model that explains, whether it runs in the notebook's process or behind an endpoint."""
    return preset["03_interpret_features"]["explainer"].partition("@http")[0]


TRAIN = ("model", "layer", "n_latents", "k", "steps", "batch_tokens")
JOB = (*TRAIN, "dataset", "lr", "dead_after_tokens", "kinds", "seed")
CACHE = ("model", "layer", "n_top", "batch_size")
EXPLAIN = ("explainer", "n_explained", "n_top")


def _chosen(preset: Mapping[str, Mapping], notebook: str, names: Iterable[str]) -> dict:
    values = preset.get(notebook, {})
    if missing := [name for name in names if name not in values]:
        raise ValueError(
            f"the preset does not give {notebook} {', '.join(missing)}; choose one that says all, as paper"
        )
    return {name: values[name] for name in names}


def train_cost(
    model: PreTrainedModel, layer: int, n_latents: int, k: int, steps: int, batch_tokens: int, *, gpus: int = 1,
    buffer_tokens: int | None = None, batch_samples: int = 16, dtype: str = "bfloat16",
    mixed_precision: str = "no", assumed: Assumed = ASSUMED,
) -> Cost:  # fmt: skip
    """Section 2.1 as `train_sae` does it: an SAE on each GPU, the samples and the buffer divided among them.

    dtype: of the model and of the buffer, 16 batches by default; the SAE, its gradient and Adam's two moments are
    float32. mixed_precision: "no", or "bf16" for the SAE's encoder in bfloat16; ValueError for any other.
    """
    encoders = {"no": "float32", "bf16": "bfloat16"}
    if mixed_precision not in encoders:
        raise ValueError(f"mixed_precision is {mixed_precision!r}; choose 'no' or 'bf16'")
    width, size, image = _width(model), getattr(torch, dtype).itemsize, picture(model, assumed.image)
    sample, tokens = image.tokens + assumed.text_tokens, float(steps) * batch_tokens
    samples, own = tokens / sample, batch_tokens / gpus
    weights, sae = float(size * parameters(model)), sae_bytes(width, n_latents)
    reading = Part("LMM forward", samples * reading_flops(model, sample, image, layer), dtype=dtype)
    return Cost(
        "train",
        tokens,
        [
            reading,
            *encode_parts(tokens, width, n_latents, encoders[mixed_precision]),
            *learn_parts(tokens, steps, width, n_latents, k),
        ],
        gpu={
            "LMM": weights,
            "SAE": sae,
            "gradient, Adam": 3 * sae,
            "buffer": float(buffer_tokens or 16 * batch_tokens) / gpus * width * size,
            "a batch": own * (6 * 4 * width + 6 * 8 * k),
            "LMM activations": _activations(model, batch_samples * sample, size),
            "libraries": assumed.library_memory,
        },
        host={"processes": gpus * assumed.process_memory, "loading the LMM": gpus * weights, "checkpoint": 3 * sae},
        disk={"LMM": weights, "samples": samples * assumed.image_bytes, "SAE": sae, "checkpoints": 6 * sae},
    )


def cache_cost(
    model: PreTrainedModel, layer: int, n_latents: int, k: int, n_top: int, batch_size: int, images: int, *,
    gpus: int = 1, dtype: str = "bfloat16", assumed: Assumed = ASSUMED,
) -> Cost:  # fmt: skip
    """Section 2.2 as `cache_activations` does it: nothing behind the base image's tokens is computed."""
    width, size, image = _width(model), getattr(torch, dtype).itemsize, picture(model, assumed.image)
    sample = image.base + assumed.text_tokens // 10  # what the chat template has before the image
    weights, sae = float(size * parameters(model)), sae_bytes(width, n_latents)
    table = float(n_latents * (n_top * (2 * image.base + 12) + 28))
    reading = Part("LMM forward", images * reading_flops(model, sample, image, layer), dtype=dtype)
    return Cost(
        "cache",
        float(images * sample),
        [reading, *encode_parts(images * image.base, width, n_latents)],
        gpu={
            "LMM": weights,
            "SAE": sae,
            "a batch": batch_size * image.base * k * 12.0,
            "LMM activations": _activations(model, batch_size * sample, size),
            "libraries": assumed.library_memory,
        },
        host={
            "processes": gpus * assumed.process_memory,
            "loading the LMM": gpus * weights,
            "top images": gpus * (table + 0.5e9),
        },
        disk={"LMM": weights, "SAE": sae, "images": float(images * assumed.image_bytes), "cache": (gpus + 2) * table},
    )


def attribute_cost(
    model: PreTrainedModel, layer: int, n_latents: int, k: int, decisions: int, *, gpus: int = 1,
    dtype: str = "bfloat16", assumed: Assumed = ASSUMED,
) -> Cost:  # fmt: skip
    """Section 2.4 as `attribution.linear` does it: every active latent of a decision from one forward and one backward.

    The forward runs once; the latents are read off on the way. The backward comes back to the layer, with no gradient
    for any weight: one product for each of the forward's, two for each of attention's.
    """
    width, size, image = _width(model), getattr(torch, dtype).itemsize, picture(model, assumed.image)
    sample = image.tokens + assumed.text_tokens
    tokens, weights = float(decisions * sample), float(size * parameters(model))
    below, whole = (reading_flops(model, sample, image, last) for last in (layer, None))
    above = model.get_decoder().layers[layer + 1 :]
    backward = whole - below + sum(4.0 * block.self_attn.q_proj.out_features for block in above) * sample**2
    return Cost(
        "attribute",
        tokens,
        [
            Part("LMM forward", decisions * whole, dtype=dtype),
            Part("LMM backward", decisions * backward, dtype=dtype),
            *encode_parts(tokens, width, n_latents),
            Part("latents' gradients", 2.0 * tokens * k * width, 4.0 * tokens * k * width),
        ],
        gpu={
            "LMM": weights,
            "SAE": sae_bytes(width, n_latents),
            "LMM activations": max(1, len(above)) * _activations(model, sample, size),
            "libraries": assumed.library_memory,
        },
        host={"processes": gpus * assumed.process_memory, "loading the LMM": gpus * weights},
        disk={"LMM": weights, "SAE": sae_bytes(width, n_latents)},
    )


def explain_cost(
    model: PreTrainedModel, n_explained: int, n_top: int, *, batch: int = 32, gpus: int = 1,
    dtype: str = "bfloat16", assumed: Assumed = ASSUMED,
) -> Cost:  # fmt: skip
    """A question a latent that shows its exemplars at once, answered a token at a time, by a model divided among GPUs.

    Of each exemplar the whole image alone is counted, without tiles, as LLaVA-OneVision shows several images.
    """
    text, size, image = model.config.get_text_config(), getattr(torch, dtype).itemsize, picture(model, assumed.image)
    shown = Picture(n_top * image.base, n_top * image.base, n_top, image.patches)
    sample, asked = shown.tokens + assumed.text_tokens, n_explained
    weights, answers = float(size * parameters(model)), asked * assumed.answer_tokens
    head = text.hidden_size // text.num_attention_heads
    kept = 2.0 * size * text.num_hidden_layers * text.num_key_value_heads * head * sample  # keys and values
    return Cost(
        "explain",
        float(asked * sample + answers),
        [
            Part("reading", asked * reading_flops(model, sample, shown), dtype=dtype),
            Part("writing", answers * reading_flops(model, 1, None), answers * (weights / batch + kept), dtype),
        ],
        gpu={
            "LMM": weights / gpus,
            "keys and values": batch * kept / gpus,
            "LMM activations": _activations(model, batch * sample, size) / gpus,
            "libraries": assumed.library_memory,
        },
        host={"processes": gpus * assumed.process_memory, "loading the LMM": weights},
        disk={"LMM": weights},
    )


def _width(model: PreTrainedModel) -> int:
    return model.config.get_text_config().hidden_size


def _activations(model: PreTrainedModel, tokens: float, size: int) -> float:
    """Bytes that one decoder layer needs for its intermediate results; they are freed layer by layer."""
    text = model.config.get_text_config()
    return float(size * tokens * (3 * text.intermediate_size + 6 * text.hidden_size))


# This machine, as a device.


def this_machine(seconds: float = 0.4) -> Device:
    """Measure this CPU's float32 products and copies, with the threads that torch has."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    far, near = torch.empty(2**24), torch.randn(2**24)
    flops = 2.0 * 1024**3 * _rate(lambda: a @ b, seconds)
    bandwidth = 2.0 * 4 * 2**24 * _rate(lambda: far.copy_(near), seconds)
    return Device("this CPU", math.inf, flops, flops, bandwidth, bandwidth)


def _rate(work, seconds: float) -> float:
    """How often `work` can be done in a second."""
    work()
    times, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        work()
        times += 1
    return times / spent


# How to start it.


def commands(path: str | Path, preset: Mapping[str, Mapping], gpus: int) -> dict[str, str]:
    """What to type for each stage, from the repository's root, and the job that several GPUs train from."""
    name = Path(path).stem
    if gpus == 1:
        return {"all notebooks and the book": f"make book PRESET={shlex.quote(name)} JOBS=1"}
    job = _chosen(preset, "01_train_sae", JOB) | {"folder": f"data/artifacts/{preset['01_train_sae']['run']}/train"}
    launch = f"accelerate launch --multi_gpu --num_processes {gpus}"
    return {
        "write the job": f"echo {shlex.quote(json.dumps(job))} > job.json",
        "train": f"{launch} -m lmm_sae_nb.train.launch job.json",
        "the rest": f"make book PRESET={shlex.quote(name)} JOBS=1",
    }
