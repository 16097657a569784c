"""A geometry twin: a real model's layers, heads' grouping, patches and tiles at narrow widths, with random weights.

It runs the true classes and processor on any machine, so that what a geometry does to memory and time is seen
before a GPU is there. It knows nothing: what it says and what its latents show has no meaning.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    LlavaNextConfig,
    LlavaNextProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from lmm_sae_nb.attribute.attribution import decision, linear
from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.full_scale.costs import Assumed, attribute_cost, cache_cost, config_of, this_machine, train_cost
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.support.stages import peak_memory
from lmm_sae_nb.train.training import train_sae

IMAGE, END = "<image>", "<|end|>"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}" + IMAGE + "{% else %}{{ part.text }}{% endif %}{% endfor %}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def narrow(config: PretrainedConfig, width: int = 64) -> PretrainedConfig:
    """A LLaVA-NeXT config with all its numbers of layers, heads of a group, patches and tiles, but this width.

    ValueError for another family, or a width that the heads do not divide.
    """
    if not isinstance(config, LlavaNextConfig):
        raise ValueError(f"a twin of a {config.model_type} is not built here; give a LLaVA-NeXT")
    text, vision = config.text_config, config.vision_config
    group = text.num_attention_heads // text.num_key_value_heads
    if width % (2 * group):
        raise ValueError(f"width {width} is not a multiple of {2 * group}, two for each of {group} heads")
    twin = type(config).from_dict(config.to_dict())
    for part, (size, heads) in {"text_config": (width, group), "vision_config": (width // 2, 2)}.items():
        its = getattr(twin, part)
        its.intermediate_size = its.intermediate_size * size // its.hidden_size
        its.hidden_size, its.num_attention_heads = size, heads
    twin.text_config.num_key_value_heads, twin.text_config.head_dim = 1, width // group
    twin.vision_config.projection_dim = vision.projection_dim * (width // 2) // vision.hidden_size
    return twin


def geometry_twin(name_or_path: str | Path, width: int = 64, seed: int = 0) -> LMM:
    """The narrow twin of a LLaVA-NeXT model, float32 on the CPU, with a processor that needs no files."""
    config, words = narrow(config_of(name_or_path), width), _byte_tokenizer()
    config.image_token_id = words.convert_tokens_to_ids(IMAGE)
    config.text_config.bos_token_id, config.text_config.eos_token_id = None, words.eos_token_id
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    side = config.vision_config.image_size
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    processor = LlavaNextProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return LMM(model, processor, f"the twin of {name_or_path}, {width} wide")


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
    words.add_tokens([IMAGE], special_tokens=True)
    return words


def noise(sizes: list[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    """Pictures of random pixels, (width, height) each."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def run_twin(
    lmm: LMM,
    pictures: list[Image.Image],
    layer: int,
    *,
    n_latents: int = 131_072,
    k: int = 256,
    n_top: int = 5,
    steps: int = 4,
    batch_tokens: int = 1024,
    seed: int = 0,
) -> dict[str, float]:
    """Train on the twin, cache and attribute with it, for real, and forecast the same: seconds, GB of memory at most.

    pictures: all of one size. Gives train_seconds, train_seconds_forecast, train_gb, train_gb_forecast, and the same
    for cache and for attribute, a decision on each picture. The forecast takes this machine's measured speed, and all
    of it; what is compiled once is compiled first.
    """
    here, before, question = this_machine(), peak_memory() or 0, "what is shown ?"
    samples = [{"image": picture, "question": question, "answer": "noise"} for picture in pictures]
    text = int(lmm.prompt(question, pictures[0], answers=["noise"]).mask("text", "special").sum())
    assumed = Assumed(image=pictures[0].size, text_tokens=text, utilisation=1.0, library_memory=before)
    sizes = {"n_latents": n_latents, "k": k}
    batches = {"steps": steps, "batch_tokens": batch_tokens, "buffer_tokens": 4 * batch_tokens, "batch_samples": 1}
    told = {"dtype": "float32", "assumed": assumed}
    costs = {
        "train": train_cost(lmm.model, layer, **sizes, **batches, **told),
        "cache": cache_cost(lmm.model, layer, **sizes, n_top=n_top, batch_size=1, images=len(pictures), **told),
        "attribute": attribute_cost(lmm.model, layer, **sizes, decisions=len(pictures), **told),
    }
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        few = {"n_latents": 2 * k, "k": k, "steps": 1, "batch_tokens": 64, "buffer_tokens": 64, "batch_samples": 1}
        train_sae(lmm, samples[:1], layer, **few, folder=f"{folder}/few")
        with _measured("train", found):
            sae = train_sae(lmm, samples, layer, **sizes, **batches, seed=seed, folder=f"{folder}/train").sae
        with _measured("cache", found):
            cache_activations(
                SAEInPlace(lmm, sae, layer), pictures, n_top=n_top, batch_size=1, folder=f"{folder}/cache"
            )
        with _measured("attribute", found):
            for shown in pictures:
                linear(SAEInPlace(lmm, sae, layer), decision(lmm, question, shown, "y", "n"))
    for stage, cost in costs.items():
        found[f"{stage}_seconds_forecast"] = 3600 * sum(cost.hours(here, 1, 1.0).values())
        found[f"{stage}_gb_forecast"] = (sum(cost.gpu.values()) + cost.host.get("top images", 0.0)) / 1e9
    return found


@contextmanager
def _measured(stage: str, found: dict[str, float]) -> Iterator[None]:
    began = time.monotonic()
    yield
    found |= {f"{stage}_seconds": time.monotonic() - began, f"{stage}_gb": (peak_memory() or 0) / 1e9}
