"""Keep rendered scenes in memory, with what every patch of them shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from lmm_sae_nb.pictureworld.world.concepts import KINDS
from lmm_sae_nb.pictureworld.world.scenes import PATCH, SIDE, Scene, make_scene
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.tensor_files import open_tensors, save_tensors
from lmm_sae_nb.truth.common_concept import names_of

CONCEPTS = names_of(KINDS)
GRID = SIDE // PATCH
_AREA = PATCH * PATCH


class Gallery(NamedTuple):
    """Scenes in memory; as a sequence of images it can be cached (`lmm_sae_nb.cache.activations`)."""

    seeds: np.ndarray  # (scenes,) int64
    pixels: np.ndarray  # (scenes, SIDE, SIDE, 3) uint8
    counts: np.ndarray  # (scenes, concepts, patches) uint16: pixels of the patch that show the concept

    def covered(self, scenes: Sequence[int]) -> np.ndarray:
        """Return (scenes, concepts, patches) float32: fraction of each patch that each concept covers."""
        return self.counts[scenes].astype(np.float32) / _AREA

    @property
    def images(self) -> Images:
        return Images(self.pixels)

    def first(self, scenes: int) -> Gallery:
        """Return the first scenes."""
        return Gallery(*(part[:scenes] for part in self))


class Images(Sequence):
    """Pixels as a sequence of PIL images."""

    def __init__(self, pixels: np.ndarray):
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index])


def patch_counts(scene: Scene) -> np.ndarray:
    """Return (concepts, patches) uint16: how many pixels of each patch show each concept, from the label maps."""
    rows = []
    patch = (np.arange(SIDE)[:, None] // PATCH * GRID + np.arange(SIDE) // PATCH).ravel()
    for kind, names in KINDS.items():
        size = 1 + len(names)
        held = np.bincount(patch * size + scene.labels[kind].ravel(), minlength=size * GRID**2)
        rows.append(held.reshape(GRID**2, size)[:, 1:].T)
    return np.concatenate(rows).astype(np.uint16)


def scenes_of(first_seed: int, size: int) -> Gallery:
    """Return the scenes of seeds from `first_seed` on, rendered."""
    pixels = np.empty((size, SIDE, SIDE, 3), np.uint8)
    counts = np.empty((size, len(CONCEPTS), GRID**2), np.uint16)
    for n in progress_bar(range(size), desc="rendering", leave=False):
        scene = make_scene(first_seed + n)
        pixels[n], counts[n] = scene.pixels, patch_counts(scene)
    return Gallery(np.arange(first_seed, first_seed + size), pixels, counts)


def gallery(path: Path, first_seed: int, size: int) -> Gallery:
    """Return the scenes of seeds from `first_seed` on: rendered into a file at `path`, or read from there."""
    if not path.is_file():
        made = scenes_of(first_seed, size)
        tensors = {"pixels": torch.from_numpy(made.pixels), "counts": torch.from_numpy(made.counts)}
        save_tensors(path, tensors, {"first_seed": str(first_seed)})
    with open_tensors(path) as file:
        held = file.metadata()["first_seed"], file.get_slice("pixels").get_shape()[0]
        if held != (str(first_seed), size):
            raise ValueError(
                f"{path} holds {held[1]} scenes from seed {held[0]}, not {size} from {first_seed}; delete it"
            )
        seeds = np.arange(first_seed, first_seed + size)
        return Gallery(seeds, *(file.get_tensor(name).numpy() for name in ("pixels", "counts")))
