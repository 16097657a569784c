"""Teaching the explainer's eye: to see in what a mask leaves what the embedded model's eye sees in the whole picture.

A tower that has only ever seen whole pictures loses most of what tells a part, an object or a word apart when the rest
is black. So it goes on from the shipped one with masked pictures. At every visible patch it learns what the patch
shows, kind by kind, and what the shipped tower makes of the same patch in the whole picture, so that what the language
model knows of its features stays true.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration

from lmm_sae_nb.pictureworld.explainer.masked_sets import PATCHES, Strips, masked_pixels
from lmm_sae_nb.pictureworld.llava.train_eye import LABEL_SHARE, normalise
from lmm_sae_nb.pictureworld.training_loop import attend, autocast_if_quicker, optimisers, pupil_weights
from lmm_sae_nb.pictureworld.world.concepts import KINDS
from lmm_sae_nb.pictureworld.world.rendered import Gallery
from lmm_sae_nb.pictureworld.world.scenes import PATCH
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.tensor_files import hash_of, metadata_in, open_tensors, save_tensors

STEPS, BATCH = 5250, 32
OFTEN = {"part": 3.0, "word": 2.0}  # how much more often the kinds that are hardest to see are drawn
_NONE = 0.1  # weight of a visible patch that shows nothing of a kind


def kind_labels(counts: np.ndarray) -> np.ndarray:
    """Return (images, kinds, patches): the concept of each kind that covers most of the patch, counted from 1.

    It is 0 where none covers enough.

    counts: (images, concepts, patches) pixels.
    """
    rows, start = [], 0
    for names in KINDS.values():
        own = counts[:, start : start + len(names)]
        rows.append(np.where(own.max(1) >= LABEL_SHARE * PATCH**2, 1 + own.argmax(1), 0))
        start += len(names)
    return np.stack(rows, 1)


@torch.no_grad()
def tower_features(tower: nn.Module, gallery: Gallery, strips: Strips, path: Path, batch: int = BATCH) -> Tensor:
    """Return what the tower makes of every masked image of the strips, (strips, images, patches, width) bfloat16,
    kept at `path` in parts, so that a stopped run goes on; ValueError for a part of another tower or of other strips.
    """
    eye, images = hash_of(tower.state_dict().values()), strips.scenes.shape[1]
    made = torch.empty(*strips.visible.shape, tower.config.hidden_size, dtype=torch.bfloat16)
    step = max(1, 640 // images)
    for first in progress_bar(range(0, len(made), step), desc=path.name):
        part, rows = path / f"{first:06d}.safetensors", slice(first, first + step)
        scenes, visible = strips.scenes[rows], strips.visible[rows]
        of = {"of": hashlib.sha256(eye.encode() + scenes.tobytes() + visible.tobytes()).hexdigest()}
        if not part.is_file():
            pixels = torch.from_numpy(masked_pixels(gallery, scenes.ravel(), visible.reshape(-1, PATCHES)))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast_if_quicker()):
                seen = [tower(normalise(some)).last_hidden_state[:, 1:].bfloat16() for some in pixels.split(batch)]
            save_tensors(part, {"features": torch.cat(seen).unflatten(0, (-1, images))}, of)
        with open_tensors(part) as file:
            if metadata_in(file) != of:
                raise ValueError(f"{part} was made by another tower or of other strips; delete {path}")
            made[rows] = file.get_tensor("features")
    return made


class Peeking(nn.Module):
    """The tower with a linear head for each kind of concept; `forward` gives the losses, and by kind how many visible
    patches show one (`asked_`) and how many of them are named right (`exact_`)."""

    def __init__(self, tower: nn.Module, width: int):
        super().__init__()
        self.tower = tower
        self.heads = nn.ModuleDict({kind: nn.Linear(width, 1 + len(names)) for kind, names in KINDS.items()})

    def forward(self, pixels: Tensor, visible: Tensor, labels: Tensor, whole: Tensor) -> dict[str, Tensor]:
        """visible: (images, patches) bool; labels: (images, kinds, patches); whole: (images, patches, width)."""
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast_if_quicker()):
            seen = self.tower(pixels).last_hidden_state[:, 1:]
        seen, shown = seen.float(), visible.float()
        wanted = whole.float()
        mean = (wanted * shown[..., None]).sum((0, 1)) / shown.sum()
        unlike = ((seen - wanted).square().sum(-1) * shown).sum() / ((wanted - mean).square().sum(-1) * shown).sum()
        losses, right = [], {}
        for number, (kind, head) in enumerate(self.heads.items()):
            logits, target = head(seen), labels[:, number]
            weight = shown * torch.where(target > 0, 1.0, _NONE)
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").unflatten(0, target.shape)
            losses.append((loss * weight).sum() / weight.sum())
            there = shown * (target > 0)
            right[f"asked_{kind}"] = there.sum()
            right[f"exact_{kind}"] = (there * (logits.argmax(-1) == target)).sum()
        return {"loss": torch.stack(losses).sum() + unlike, "unlike": unlike, **right}


def image_chances(gallery: Gallery, strips: Sequence[Strips]) -> np.ndarray:
    """Return (images,) summing to 1: every origin has its share of the images, and in it every strip the chance that
    its concept gives it (`Strips.chances`), which its images share.
    """
    total = sum(some.scenes.size for some in strips)
    rows = []
    for some in strips:
        count, images = some.scenes.shape
        rows.append(np.repeat(some.chances(gallery, OFTEN) * count / total, images))
    return np.concatenate(rows)


def train_eye(
    folder: Path,
    taught: Path,
    gallery: Gallery,
    strips: Sequence[Strips],
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    rate: float = 1e-3,
    minutes: float = math.inf,
) -> bool:
    """Teach the shipped tower masked pictures, resumably; whether all steps are done.

    Its work on the whole pictures, which comes first and is kept, counts as no minutes.
    """
    torch.manual_seed(0)
    tower = LlavaNextForConditionalGeneration.from_pretrained(taught, dtype=torch.float32).model.vision_tower
    scenes = np.arange(len(gallery.pixels))[:, None]
    pictures = Strips(scenes, np.ones((*scenes.shape, PATCHES), bool))  # of one image each, nothing hidden
    whole = tower_features(tower, gallery, pictures, folder / "whole")[:, 0]
    tower.config._attn_implementation = "eager"  # compiled, faster than SDPA for 145 tokens
    pupil = Peeking(tower, tower.config.hidden_size)
    forward = torch.compile(pupil)
    scenes = np.concatenate([some.scenes.ravel() for some in strips])
    visible = np.concatenate([some.visible.reshape(-1, PATCHES) for some in strips])
    chances = image_chances(gallery, strips)

    def loss_at(step: int) -> dict[str, Tensor]:
        rows = np.random.default_rng([65, step]).choice(len(scenes), size=batch, p=chances)
        own, seen = scenes[rows], visible[rows]
        pixels = normalise(torch.from_numpy(masked_pixels(gallery, own, seen)))
        labels = torch.from_numpy(kind_labels(gallery.counts[own]))
        return forward(pixels, torch.from_numpy(seen), labels, whole[own])

    return attend(folder, steps, pupil, optimisers([pupil], rate), loss_at, minutes=minutes, title="eye")


def open_eye(tower: nn.Module, folder: Path) -> nn.Module:
    """Return the tower with the weights that `train_eye` left in `folder`."""
    state = pupil_weights(folder, "explainer")
    tower.load_state_dict({name.removeprefix("tower."): w for name, w in state.items() if name.startswith("tower.")})
    return tower
