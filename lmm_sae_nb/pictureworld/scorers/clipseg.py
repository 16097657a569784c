"""Teaching a text-prompted segmenter: CLIPSeg, for which every concept's name has its mask.

As in CLIPSeg's own training the vision tower stays as it is: it is the embedded LMM's. Text side and decoder start from
nothing. One pass of the tower serves all the concepts that are asked about a picture, present and absent ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import processors
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)  # fmt: skip

from lmm_sae_nb.pictureworld.llava.model import new_tokenizer
from lmm_sae_nb.pictureworld.llava.train_eye import MEAN, STD, normalise
from lmm_sae_nb.pictureworld.training_loop import (
    attend,
    autocast_if_quicker,
    has_checkpoint,
    optimisers,
    pupil_weights,
)
from lmm_sae_nb.pictureworld.world.concepts import KINDS, NUMBER
from lmm_sae_nb.pictureworld.world.scenes import PATCH, SIDE, TRAIN, Scene, make_crowd, make_scene, make_signs

NAMES = tuple(dict.fromkeys(name for names in KINDS.values() for name in names))
LEAST = 64  # pixels; of a concept that covers fewer nothing is asked
ASKED, PRESENT = 10, 7  # concepts asked about one picture, and how many of them at most are in it
READ = (1, 5)  # layers of the LMM's tower, from 0, that the decoder reads
_TURNS = (make_scene, make_crowd, make_scene, make_signs, make_scene, make_crowd, make_scene, make_scene)
_WEIGHT = {"scene": 1.5, "object": 3, "part": 3, "material": 2, "texture": 3, "colour": 1, "face": 4, "word": 4}


def areas(scene: Scene) -> dict[str, int]:
    """Pixels that show each name, under any kind; names that no pixel shows are left out."""
    found: dict[str, int] = {}
    for kind, grid in scene.labels.items():
        for number, count in enumerate(np.bincount(grid.ravel())[1:]):
            if count:
                name = KINDS[kind][number]
                found[name] = found.get(name, 0) + int(count)
    return found


def target(scene: Scene, name: str) -> np.ndarray:
    """Return (SIDE, SIDE) bool: the pixels that show the concept of this name, under any kind that knows it."""
    grids = [scene.labels[kind] == numbers[name] for kind, numbers in NUMBER.items() if name in numbers]
    return np.logical_or.reduce(grids)


def kind_of(scene: Scene, name: str) -> str:
    """Return the kind under which most pixels of the scene show a name; the first that knows it if none does."""
    counts = {k: np.count_nonzero(scene.labels[k] == n[name]) for k, n in NUMBER.items() if name in n}
    return max(counts, key=counts.get)


def ask_about(scene: Scene, rng: np.random.Generator) -> list[str]:
    """ASKED names: up to PRESENT that the scene shows, the rest absent, every other one of a kind that it shows."""
    found = areas(scene)
    seen = [name for name, area in found.items() if area >= LEAST]
    weights = np.array([_WEIGHT[kind_of(scene, name)] for name in seen])
    chosen = list(rng.choice(seen, min(PRESENT, len(seen)), replace=False, p=weights / weights.sum())) if seen else []
    kinds = [kind for kind, grid in scene.labels.items() if grid.any()]
    while len(chosen) < ASKED:
        names = KINDS[kinds[rng.integers(len(kinds))]] if len(chosen) % 2 else NAMES
        name = names[rng.integers(len(names))]
        if name not in found and name not in chosen:
            chosen.append(name)
    return [str(name) for name in chosen]


class Prompts(IterableDataset):
    """An endless stream of (pixels uint8, numbers of the ASKED names, their masks bool)."""

    def __init__(self, first_seed: int):
        self.first_seed = first_seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for n in range(self.first_seed, 10**9):
            scene = _TURNS[n % len(_TURNS)](TRAIN + n % 800_000)
            names = ask_about(scene, np.random.default_rng([60, n]))
            masks = np.stack([target(scene, name) for name in names])
            numbers = torch.tensor([NAMES.index(name) for name in names])
            yield torch.from_numpy(scene.pixels), numbers, torch.from_numpy(masks)


# ---- the model ------------------------------------------------------------------------------------------------


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """Return the LMM's words, with begin and end tokens added as CLIP's text models want them."""
    tokenizer = new_tokenizer()
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    tokenizer.padding_side, tokenizer.model_max_length = "right", 77
    return tokenizer


def new_processor() -> CLIPSegProcessor:
    """Pictures are stretched to SIDE x SIDE pixels, so that a mask can be stretched back."""
    size = {"height": SIDE, "width": SIDE}
    eye = ViTImageProcessorPil(size=size, image_mean=MEAN.tolist(), image_std=STD.tolist())
    return CLIPSegProcessor(eye, clip_tokenizer())


def text_settings(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> dict:
    """Settings of a CLIP text model for the world's words."""
    return {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
        "num_attention_heads": 4, "max_position_embeddings": 77, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip


def tower_settings(layers: int) -> dict:
    """Settings of the LMM's vision tower, cut after so many layers."""
    return {
        "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": layers, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": PATCH, "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip


def new_model(tokenizer: PreTrainedTokenizerFast) -> CLIPSegForImageSegmentation:
    """Return an untrained CLIPSeg around a tower like the LMM's; its decoder reads READ, the deepest first."""
    config = CLIPSegConfig(
        text_config=text_settings(tokenizer, 32, 1), vision_config=tower_settings(6), projection_dim=32,
        extract_layers=list(READ), reduce_dim=64, decoder_num_attention_heads=4, decoder_intermediate_size=128,
    )  # fmt: skip
    model = CLIPSegForImageSegmentation(config)
    with torch.no_grad():  # the class draws these with a deviation of 1, far too wide to learn from
        for name, weight in model.decoder.named_parameters():
            if name.startswith("film") and weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
        model.decoder.transposed_convolution.weight.normal_(std=0.02)
        model.decoder.transposed_convolution.bias.fill_(-3.0)  # most pixels show none of what is asked
    return model


def lend_tower(vision: nn.Module, lmm: Path) -> None:
    """Start a CLIP-like vision model as the first layers of the vision tower of the LMM in folder `lmm`.

    FileNotFoundError if the LMM is not there, KeyError or RuntimeError if its tower is of another form.
    """
    weights = lmm / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} is missing; the segmenter and the similarity start from its vision tower")
    held = load_file(weights)
    (prefix,) = {name.split("embeddings.")[0] for name in held if name.endswith("class_embedding")}
    vision.load_state_dict({name: held[prefix + name].float() for name in vision.state_dict()})


# ---- training -------------------------------------------------------------------------------------------------


@torch.no_grad()
def whiten(model: CLIPSegForImageSegmentation, pixels: Tensor) -> None:
    """Start the decoder's reductions as the whitened principal directions of what they read of these pictures."""
    hidden = model.clip.vision_model(pixels, output_hidden_states=True).hidden_states
    for layer, reduce in zip(reversed(model.extract_layers), model.decoder.reduces, strict=True):
        rows = hidden[layer + 1][:, 1:].flatten(0, 1)
        mean = rows.mean(0)
        spread, directions = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
        most = slice(len(spread) - len(reduce.bias), None)
        reduce.weight.copy_(directions[:, most].T / spread[most, None].sqrt())
        reduce.bias.copy_(-reduce.weight @ mean)


class Pointer(nn.Module):
    """A CLIPSeg to be trained: `forward` gives the loss and the IoU with the masks that were asked for."""

    def __init__(self, model: CLIPSegForImageSegmentation, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.model = model
        words = tokenizer(list(NAMES), padding=True, return_tensors="pt")
        self.ids, self.mask = words.input_ids, words.attention_mask

    def logits(self, pixels: Tensor, numbers: Tensor) -> Tensor:
        """Return logits (batch, asked, SIDE, SIDE) for images (batch, 3, SIDE, SIDE) and names (batch, asked).

        As the model's own forward does, but with gradients for its text side, and each picture seen once only.
        """
        asked = numbers.shape[1]
        with torch.no_grad():
            hidden = self.model.clip.vision_model(pixels, output_hidden_states=True).hidden_states
        read = tuple(hidden[i + 1].repeat_interleave(asked, 0) for i in self.model.extract_layers)
        words = self.model.clip.get_text_features(self.ids, self.mask).pooler_output
        return self.model.decoder(read, words[numbers.flatten()]).logits.unflatten(0, (-1, asked))

    def forward(self, pixels: Tensor, numbers: Tensor, masks: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast_if_quicker()):
            logits = self.logits(pixels, numbers)
        logits, truth = logits.float(), masks.float()
        here = masks.any((-1, -2))
        chance = logits.sigmoid()
        overlap = 2 * (chance * truth).sum((-1, -2)) / (chance + truth).sum((-1, -2)).clamp_min(1)
        found = logits > 0
        iou = (found & masks).sum((-1, -2)) / (found | masks).sum((-1, -2)).clamp_min(1)
        return {
            "loss": 4 * F.binary_cross_entropy_with_logits(logits, truth) + (1 - overlap)[here].mean(),
            "iou": iou[here].mean(),
            "false_alarms": found[~here].any((-1, -2)).float().mean(),
        }


def train_segmenter(
    folder: Path, lmm: Path, steps: int, batch: int = 8, rate: float = 3e-3, minutes: float = math.inf
) -> bool:
    """Teach CLIPSeg resumably; a checkpoint in `folder` holds it. `lmm` is the folder of the LMM that lends its eye."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    pupil = Pointer(new_model(tokenizer), tokenizer)
    clip = pupil.model.clip
    lend_tower(clip.vision_model, lmm)
    if not has_checkpoint(folder):
        whiten(pupil.model, normalise(torch.stack([row[0] for row in islice(Prompts(0), 64)])))
    clip.requires_grad_(False)
    clip.text_model.requires_grad_(True)
    clip.text_projection.requires_grad_(True)
    opts = optimisers([clip, pupil.model.decoder], rate)
    stream = None

    def loss_at(step: int) -> dict[str, Tensor]:
        nonlocal stream
        if stream is None:
            stream = iter(DataLoader(Prompts(step * batch), batch, num_workers=1, prefetch_factor=6))
        pixels, numbers, masks = next(stream)
        return pupil(normalise(pixels), numbers, masks)

    return attend(folder, steps, pupil, opts, loss_at, minutes=minutes, title="segmenter")


def finished(folder: Path) -> CLIPSegForImageSegmentation:
    """Return the model that `train_segmenter` left in `folder`; FileNotFoundError if it left none."""
    weights = pupil_weights(folder, "segmenter")
    tokenizer = clip_tokenizer()
    pupil = Pointer(new_model(tokenizer), tokenizer)
    pupil.load_state_dict(weights)
    return pupil.model.eval()
