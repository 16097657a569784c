"""Train the eye: each patch learns to point at the word vectors of what it shows.

LLaVA starts from a CLIP tower whose features already lie near words, and first trains the projector alone. Picture
World has no captions by the billion but knows what every patch shows, so tower, projector and word vectors learn
together: the projected patch must be near (inner product) the word vectors of the concepts that it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlavaNextForConditionalGeneration

from lmm_sae_nb.pictureworld.llava.model import new_model, new_tokenizer, word_vector
from lmm_sae_nb.pictureworld.training_loop import attend, autocast_if_quicker, optimisers, pupil_weights
from lmm_sae_nb.pictureworld.world.concepts import KINDS, PLACES
from lmm_sae_nb.pictureworld.world.scenes import (
    PATCH,
    SIDE,
    TRAIN,
    Scene,
    make_crowd,
    make_map,
    make_masked,
    make_scene,
    make_signs,
)

GROUPS = {**KINDS, "place": PLACES}
PATCHES = (SIDE // PATCH) ** 2
LABEL_SHARE = 0.3  # of a patch that a concept must cover to be its label
# CLIP's own normalisation, as in the processor.
MEAN, STD = (
    torch.tensor([0.48145466, 0.4578275, 0.40821073]),
    torch.tensor([0.26862954, 0.26130258, 0.27577711]),
)


def patch_labels(scene: Scene) -> np.ndarray:
    """Return (groups, patches) uint8: for each group the concept that covers most of the patch, 0 if none covers 30
    %.
    """
    grids = [*(scene.labels[kind] for kind in KINDS), scene.where]
    rows = np.stack(grids).reshape(len(grids), SIDE // PATCH, PATCH, SIDE // PATCH, PATCH).transpose(0, 1, 3, 2, 4)
    rows = rows.reshape(len(grids) * PATCHES, PATCH * PATCH)
    counts = np.bincount((np.arange(len(rows))[:, None] * 128 + rows).ravel(), minlength=len(rows) * 128).reshape(
        -1, 128
    )
    counts[:, 0] = LABEL_SHARE * PATCH * PATCH  # nothing wins unless something reaches the share
    return counts.argmax(1).astype(np.uint8).reshape(len(grids), PATCHES)


_MIXED = (make_crowd, make_scene, make_crowd, make_scene, make_crowd, make_masked, make_crowd, make_map)
_READING = (make_signs, make_scene, make_signs, make_crowd, make_signs, make_masked, make_signs, make_map)


class Glimpses(IterableDataset):
    """An endless stream of (pixels uint8, patch labels), the makers of scenes taking turns."""

    def __init__(self, first_seed: int, makers: Sequence[Callable[[int], Scene]] = _MIXED):
        self.first_seed, self.makers = first_seed, makers

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        start, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for n in range(start, 10**9, stride):
            scene = self.makers[n % len(self.makers)](TRAIN + (self.first_seed + n) % 800_000)
            yield torch.from_numpy(scene.pixels), torch.from_numpy(patch_labels(scene))


def normalise(pixels: Tensor) -> Tensor:
    """Scale pixels (batch, h, w, 3) uint8 to (batch, 3, h, w) float32, as the processor does."""
    return ((pixels.float() / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


class Eye(nn.Module):
    """Tower and projector, taught towards fixed word vectors; `forward` gives the loss and the accuracy by group."""

    def __init__(self, tower: nn.Module, projector: nn.Module, width: int):
        super().__init__()
        self.tower, self.projector = tower, projector
        self.none = nn.ParameterDict({g: nn.Parameter(torch.randn(1, width) / width**0.5) for g in GROUPS})
        for group, names in GROUPS.items():
            self.register_buffer(
                "words_" + group, torch.stack([word_vector(name, width) for name in names]), persistent=False
            )

    def project(self, pixels: Tensor) -> Tensor:
        """Project images (batch, 3, h, w) to patches (batch, patches, width)."""
        return self.projector(self.tower(pixels).last_hidden_state[:, 1:])

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast_if_quicker()):
            patches = self.project(pixels)
        patches = patches.flatten(0, 1).float()
        losses, right = {}, {}
        for number, group in enumerate(GROUPS):
            logits = 6 * patches @ torch.cat([self.none[group], getattr(self, "words_" + group)]).T
            target = labels[:, number].flatten().long()
            weight = torch.where(target > 0, 1.0, 0.1)
            losses[group] = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
            seen = target > 0
            right["acc_" + group] = (
                (logits.argmax(-1) == target)[seen].float().mean() if seen.any() else torch.tensor(0.0)
            )
        return {"loss": torch.stack(list(losses.values())).sum(), **right}


def train_tower(
    folder: Path,
    start: Path | None = None,
    steps: int = 1750,
    batch: int = 32,
    rate: float = 2e-3,
    minutes: float = math.inf,
) -> bool:
    """Teach the tower and projector, resumably; a checkpoint in `folder` holds them when the call returns True.

    start: the folder of an earlier course to go on from. Its projector is then kept as it is, so that what the
    language model has learned to see keeps its meaning, and signs come up much more often: they are hardest.
    """
    torch.manual_seed(0)
    model = new_model(new_tokenizer())
    model.model.vision_tower.config._attn_implementation = "eager"  # compiled, faster than SDPA for 145 tokens
    eye = Eye(model.model.vision_tower, model.model.multi_modal_projector, model.config.text_config.hidden_size)
    if start:
        eye.load_state_dict(pupil_weights(start, start.name))
        eye.projector.requires_grad_(False)
    first, makers = (400_000, _READING) if start else (0, _MIXED)
    forward, stream = torch.compile(eye), None

    def loss_at(step: int) -> dict[str, Tensor]:
        nonlocal stream
        if stream is None:
            glimpses = Glimpses(first + step * batch, makers)
            stream = iter(DataLoader(glimpses, batch, num_workers=1, prefetch_factor=6))
        pixels, labels = next(stream)
        return forward(normalise(pixels), labels)

    return attend(folder, steps, eye, optimisers([eye], rate), loss_at, minutes=minutes, title="tower")


def open_eyes(model: LlavaNextForConditionalGeneration, folder: Path, projector: bool = True) -> None:
    """Give the model the tower, and unless told otherwise the projector, that `train_tower` left in `folder`."""
    pupil = pupil_weights(folder, folder.name)
    modules = {"tower.": model.model.vision_tower, "projector.": model.model.multi_modal_projector}
    for prefix, module in list(modules.items())[: 1 + projector]:
        module.load_state_dict({k.removeprefix(prefix): v for k, v in pupil.items() if k.startswith(prefix)})
