"""Count a model's parameters, an image's tokens and a forward's products without loading any weight."""

from __future__ import annotations

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
from lmm_sae_nb.support.files import read_json

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
    return AutoConfig.from_pretrained(name_or_path)


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
    """Return the tokens and patches of an image, laid out as the model itself does it.

    model: a LLaVA-NeXT, LLaVA-OneVision or Qwen2.5-VL.
    size: (width, height) in pixels.

    Raises:
        ValueError: a model of another family.
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
        raise ValueError(
            f"the costs of a {config.model_type} cannot be predicted: add the number of its patches to {__name__}"
        )
    kinds, _ = LAYOUTS[config.model_type](model, inputs, 0, 0)
    return ImageLayout(len(kinds), int((kinds == BASE).sum()), crops, patches)


def forward_flops(
    model: PreTrainedModel, tokens: int, layout: ImageLayout | None, layer: Hookpoint | None = None
) -> float:
    """Return the FLOPs of one sample's forward: vision tower, projector and decoder layers.

    Attention is counted in full: a causal mask does not save products.

    tokens: length of the sequence.
    layout: of the sample's image; None without an image.
    layer: the last decoder layer, 0-based, or other hookpoint that is computed; None for all layers and the output
        embeddings.
    """
    layers = model.get_decoder().layers[: None if layer is None else layers_below(layer)]
    attended = sum(2 * block.self_attn.q_proj.out_features for block in layers)
    flops = 2.0 * count_products(layers) * tokens + 2.0 * attended * tokens**2
    if layer is None:
        flops += 2.0 * count_products(model.get_output_embeddings())
    if layout is None:
        return flops
    tower = getattr(model.model, "vision_tower", None) or model.model.visual
    vision = model.config.vision_config
    depth = getattr(vision, "num_hidden_layers", None) or vision.depth
    patches = layout.crops * layout.patches
    flops += 2.0 * count_products(tower) * patches
    flops += 4.0 * depth * vision.hidden_size * layout.crops * layout.patches**2
    projector = getattr(model.model, "multi_modal_projector", None)
    return flops + (2.0 * count_products(projector) * patches if projector else 0.0)


def width_of(model: PreTrainedModel) -> int:
    """Return the width of the decoder's hidden states."""
    return model.config.get_text_config().hidden_size


def activation_bytes(model: PreTrainedModel, tokens: float, itemsize: int) -> float:
    """Return the bytes of one decoder layer's intermediate results, which are freed layer by layer."""
    text = model.config.get_text_config()
    return float(itemsize * tokens * (3 * text.intermediate_size + 6 * text.hidden_size))
