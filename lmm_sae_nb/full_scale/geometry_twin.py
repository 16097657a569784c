"""Build and run a geometry twin: a real model's layers, head groups, patches and tiles, but narrow and random.

The twin runs the real classes and processor on any machine. It shows what a geometry costs in memory and time before
a GPU is there. Its answers and its latents mean nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
from lmm_sae_nb.full_scale.costs import Assumptions, attribute_cost, cache_cost, measure_this_machine, train_cost
from lmm_sae_nb.full_scale.models import config_of
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.support.devices import wait_for
from lmm_sae_nb.support.stages import peak_memory
from lmm_sae_nb.train.training import train_sae

IMAGE, END = "<image>", "<|end|>"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}" + IMAGE + "{% else %}{{ part.text }}{% endif %}{% endfor %}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def narrow(config: PretrainedConfig, width: int = 64) -> PretrainedConfig:
    """Return a LLaVA-NeXT config with the same layers, heads of a group, patches and tiles, but this width.

    width: of the decoder; the vision tower gets half of it.

    Raises:
        ValueError: a model of another family, or a width that the heads do not divide.
    """
    if not isinstance(config, LlavaNextConfig):
        raise ValueError(f"there is no geometry twin of a {config.model_type}; give a LLaVA-NeXT")
    text, vision = config.text_config, config.vision_config
    group = text.num_attention_heads // text.num_key_value_heads
    if width % (2 * group):
        raise ValueError(f"width {width} is not a multiple of {2 * group}, two for each of {group} heads")
    twin = type(config).from_dict(config.to_dict())
    for part, size, heads in ((twin.text_config, width, group), (twin.vision_config, width // 2, 2)):
        part.intermediate_size = part.intermediate_size * size // part.hidden_size
        part.hidden_size, part.num_attention_heads = size, heads
    twin.text_config.num_key_value_heads, twin.text_config.head_dim = 1, width // group
    twin.vision_config.projection_dim = vision.projection_dim * (width // 2) // vision.hidden_size
    return twin


def geometry_twin(
    name_or_path: str | Path,
    width: int = 64,
    seed: int = 0,
    *,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    dtype: torch.dtype = torch.float32,
) -> LMM:
    """Build the narrow twin of a LLaVA-NeXT model, with a processor that needs no files.

    name_or_path: the model whose geometry it has.
    width: of its decoder; 0 is the model's own.
    seed: of its random weights.
    """
    config, words = config_of(name_or_path), _byte_tokenizer()
    config = narrow(config, width) if width else config
    config.image_token_id = words.convert_tokens_to_ids(IMAGE)
    config.text_config.bos_token_id, config.text_config.eos_token_id = None, words.eos_token_id
    torch.manual_seed(seed)
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
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
    return LMM(model, processor, f"the twin of {name_or_path}, {config.text_config.hidden_size} wide")


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
    words.add_tokens([IMAGE], special_tokens=True)
    return words


def noise(sizes: list[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    """Return pictures of random pixels.

    sizes: (width, height) of each, in pixels.
    """
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
    """Train, cache and attribute with the twin, and predict what the same takes.

    The prediction uses the measured speed of the model's device in full. Numba's loops are compiled before anything is
    timed.

    pictures: all of one size; each is a sample, a cached image, and the image of one decision.
    layer, n_latents, k, n_top, steps, batch_tokens, seed: as in `train_sae` and `cache_activations`.

    Returns: for each of train, cache and attribute NAME_seconds and NAME_gb (the process's highest memory meanwhile),
    and the same with `_predicted`.
    """
    device = lmm.device
    on_gpu = device.type == "cuda"
    this_machine = measure_this_machine(device=device, side=8192 if on_gpu else 1024)
    memory_before = 0 if on_gpu else peak_memory() or 0
    question = "what is shown ?"
    samples = [{"image": picture, "question": question, "answer": "noise"} for picture in pictures]
    text_tokens = int(lmm.prompt(question, pictures[0], answers=["noise"]).mask("text", "special").sum())
    assumptions = Assumptions(pictures[0].size, text_tokens=text_tokens, library_memory=memory_before)
    size = {"n_latents": n_latents, "k": k}
    batches = {"steps": steps, "batch_tokens": batch_tokens, "buffer_tokens": 4 * batch_tokens, "batch_samples": 1}
    common = {"dtype": str(lmm.model.dtype).removeprefix("torch."), "assumptions": assumptions}
    costs = [
        train_cost(lmm.model, layer, **size, **batches, **common),
        cache_cost(lmm.model, layer, **size, n_top=n_top, batch_size=1, images=len(pictures), **common),
        attribute_cost(lmm.model, layer, **size, decisions=len(pictures), **common | {"dtype": "float32"}),
    ]
    measured: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        few = {"n_latents": 2 * k, "k": k, "steps": 1, "batch_tokens": 64, "buffer_tokens": 64, "batch_samples": 1}
        train_sae(lmm, samples[:1], layer, **few, folder=f"{folder}/few")
        with timed("train", measured, device):
            sae = train_sae(lmm, samples, layer, **size, **batches, seed=seed, folder=f"{folder}/train").sae
        place = SAEInPlace(lmm, sae, layer)
        with timed("cache", measured, device):
            cache_activations(place, pictures, n_top=n_top, batch_size=1, folder=f"{folder}/cache")
        with timed("attribute", measured, device):
            for picture in pictures:
                linear(place, decision(lmm, question, picture, "y", "n"))
    for cost in costs:
        seconds = 3600 * sum(cost.hours(this_machine, 1, utilisation=1.0).values())
        memory = sum(cost.gpu.values()) + cost.host.get("top images", 0.0)
        measured |= {f"{cost.stage}_seconds_predicted": seconds, f"{cost.stage}_gb_predicted": memory / 1e9}
    return measured


def predicted_and_measured(measured: Mapping[str, float], unit: str) -> dict[str, dict[str, float]]:
    """Return the prediction beside the measurement, by stage.

    measured: of `run_twin`.
    unit: "seconds" or "gb".
    """
    stages = [name.removesuffix(f"_{unit}") for name in measured if name.endswith(f"_{unit}")]
    return {
        stage: {"predicted": measured[f"{stage}_{unit}_predicted"], "measured": measured[f"{stage}_{unit}"]}
        for stage in stages
    }


def gpu_rows(results: Mapping[str, object]) -> list[dict[str, str | float]]:
    """Return a row for each number of `book/gpu.json` that was also predicted: both, and measured over predicted.

    results: part to its numbers, or to why there are none.
    """
    rows = []
    for part, numbers in results.items():
        for name in numbers if isinstance(numbers, Mapping) else ():
            if (predicted := numbers.get(f"{name}_predicted")) is not None:
                pair = {"measured": numbers[name], "predicted": predicted}
                rows.append({"part": part, "what": name.replace("_", " "), **pair, "ratio": numbers[name] / predicted})
    return rows


@contextmanager
def timed(stage: str, measured: dict[str, float], device: torch.device) -> Iterator[None]:
    """Add the stage's wall time and the highest memory meanwhile, of the GPU or of the process, to `measured`.

    Only Linux can forget an earlier peak of a process; elsewhere the memory is the highest so far.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held now
    began = time.monotonic()
    yield
    wait_for(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory() or 0
    measured |= {f"{stage}_seconds": time.monotonic() - began, f"{stage}_gb": peak / 1e9}
