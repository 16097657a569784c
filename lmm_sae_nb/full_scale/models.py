"""Count a model's parameters, an image's tokens and a forward's products without loading any weight."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from lmm_sae_nb.model.hookpoints import Hookpoint, layers_below
from lmm_sae_nb.model.token_kinds import BASE, LAYOUTS
from lmm_sae_nb.support.files import existing, project_root, read_json

GEOMETRIES = Path(__file__).with_name("geometries.json")  # config.json of the presets' models, as the hub has them


class ImageLayout(NamedTuple):
    """How a model cuts an image into tokens and patches."""

    tokens: int  # in the language model's sequence
    base: int  # of these, patches of the whole image
    crops: int  # that the vision tower reads
    patches: int  # in each crop


def config_of(name_or_path: str | Path) -> PretrainedConfig:
    """Return a model's config from its folder, from `geometries.json`, or from the hub."""
    known = read_json(GEOMETRIES)
    if str(name_or_path) in known and not Path(name_or_path).is_dir():
        facts = dict(known[str(name_or_path)])
        return AutoConfig.for_model(facts.pop("model_type"), **facts)
    return AutoConfig.from_pretrained(existing(project_root(), str(name_or_path)) or name_or_path)


@lru_cache(maxsize=8)
def meta_model(name_or_path: str | Path) -> PreTrainedModel:
    """Build the model's real class on torch's meta device: every parameter has a shape and no memory."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config_of(name_or_path))


def count_parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(weights.numel() for weights in module.parameters())


def count_products(module: nn.Module) -> int:
    """Return the multiplications for one token or patch: the weights of linear and patch-embedding layers."""
    layers = (nn.Linear, nn.Conv2d, nn.Conv3d)
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, layers))


def image_layout(model: PreTrainedModel, size: tuple[int, int]) -> ImageLayout:
    """Return the tokens and patches of an image.

    They are those that the model's own code lays out for LLaVA-NeXT, LLaVA-OneVision and Qwen2.5-VL. Of other families
    the config's numbers say how many tokens the whole image has; tiles that a processor cuts besides are not counted.

    size: (width, height) in pixels.

    Raises:
        ValueError: the config does not say how an image becomes tokens, or images do not become tokens alone.
    """
    (width, height), config = size, model.config
    vision = getattr(config, "vision_config", None)
    if config.model_type in ("llava_next", "llava_onevision"):
        inputs = {"image_sizes": torch.tensor([[height, width]])}
        crops = image_size_to_num_patches((height, width), config.image_grid_pinpoints, vision.image_size)
        patches = (vision.image_size // vision.patch_size) ** 2
        kinds, _ = LAYOUTS[config.model_type](model, inputs, 0, 0)
        return ImageLayout(len(kinds), int((kinds == BASE).sum()), crops, patches)
    patch, side = _side(getattr(vision, "patch_size", None)), _side(getattr(vision, "image_size", None))
    text = config.get_text_config()
    refused = hasattr(config, "qformer_config") or hasattr(text, "cross_attention_layers") or config.is_encoder_decoder
    merge, longest = getattr(vision, "spatial_merge_size", None), getattr(config, "spatial_merge_size", None)
    if patch and (merge or longest) and not refused:  # the grid follows the image
        unit = patch * (merge or longest)
        if merge:
            rows, cols = (part // unit for part in smart_resize(height, width, factor=unit))
        else:  # as Pixtral: the longer side is at most `side`
            scale = min(1.0, side / max(size))
            rows, cols = (math.ceil(part * scale / unit) for part in (height, width))
        return ImageLayout(rows * cols, rows * cols, 1, rows * cols * (merge or longest) ** 2)
    if patch and side and not refused:  # the image is brought to one square
        patches = (side // patch) ** 2
        resampler = getattr(config, "perceiver_config", None)
        tokens = _first(config, vision, resampler, names=TOKENS) or round(patches * _kept(config, vision))
        return ImageLayout(tokens, tokens, 1, patches)
    raise ValueError(
        f"the costs of a {config.model_type} cannot be predicted: its config does not say how an image becomes tokens "
        "of its decoder (vision_config with patch_size and image_size or spatial_merge_size, and no Q-Former or "
        "cross-attention); forecast a preset of another model"
    )


# numbers of an image's tokens in a config
TOKENS = ("mm_tokens_per_image", "resampler_n_latents")


def _side(value: object) -> int:
    """Return the length of a square's side, which some configs give twice; 0 if there is none."""
    return int(value[0] if isinstance(value, list | tuple) else value or 0)


def _first(*configs: PretrainedConfig | None, names: tuple[str, ...]) -> int | float | None:
    """Return the first of these numbers that a config has."""
    return next((getattr(c, name) for c in configs for name in names if getattr(c, name, None)), None)


def _kept(config: PretrainedConfig, vision: PretrainedConfig) -> float:
    """Return the tokens for each patch: below 1 where a family joins neighbours."""
    if ratio := _first(config, vision, names=("downsample_ratio", "pixel_shuffle_ratio")):
        return float(ratio) ** 2
    factor = _first(config, vision, names=("scale_factor", "downsample_factor"))
    return 1 / float(factor) ** 2 if factor else 1.0


def forward_flops(
    model: PreTrainedModel, tokens: int, layout: ImageLayout | None, layer: Hookpoint | None = None
) -> float:
    """Return the FLOPs of one sample's forward: vision tower, projector and decoder layers.

    Attention is counted in full: a causal mask does not save products. All experts of a layer are counted.

    tokens: length of the sequence.
    layout: of the sample's image; None without an image.
    layer: the last decoder layer, 0-based, or other hookpoint that is computed; None for all layers and the output
        embeddings.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "model", decoder).layers[: None if layer is None else layers_below(layer)]
    flops = 2.0 * count_products(layers) * tokens + 2.0 * sum(map(attention_width, layers)) * 2 * tokens**2
    if layer is None:
        flops += 2.0 * count_products(model.get_output_embeddings())
    if layout is None:
        return flops
    tower, projector = _part(model, TOWERS), _part(model, PROJECTORS)
    vision = model.config.vision_config
    depth = _first(vision, names=("num_hidden_layers", "depth", "num_layers"))
    patches = layout.crops * layout.patches
    flops += 2.0 * count_products(tower) * patches if tower else 0.0
    flops += 4.0 * depth * _first(vision, names=("embed_dim", "hidden_size")) * layout.crops * layout.patches**2
    return flops + (2.0 * count_products(projector) * patches if projector else 0.0)


TOWERS = ("vision_tower", "visual", "vision_model")  # a family has one of these, and one of those or none
PROJECTORS = ("multi_modal_projector", "connector")


def _part(model: PreTrainedModel, names: tuple[str, ...]) -> nn.Module | None:
    owners = (getattr(model, "model", model), model)
    return next((getattr(owner, name) for owner in owners for name in names if getattr(owner, name, None)), None)


def attention_width(layer: nn.Module) -> int:
    """Return the width of all heads of a decoder layer's attention; 0 if it has another kind of mixing."""
    attention = getattr(layer, "self_attn", None)
    if attention is None:
        return 0
    if hasattr(attention, "q_proj"):
        return attention.q_proj.out_features
    config = attention.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head


def width_of(model: PreTrainedModel) -> int:
    """Return the width of the decoder's hidden states."""
    return model.config.get_text_config().hidden_size


def activation_bytes(model: PreTrainedModel, tokens: float, itemsize: int) -> float:
    """Return the bytes of one decoder layer's intermediate results, which are freed layer by layer."""
    text = model.config.get_text_config()
    return float(itemsize * tokens * (3 * text.intermediate_size + 6 * text.hidden_size))
