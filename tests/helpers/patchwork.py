"""Latents and label maps given patch by patch, small enough to compute every measure by hand."""

import numpy as np
from labelled import CONCEPTS, GRID, row
from scipy import sparse

from lmm_sae_nb.measures.image_latents import ImageLatents
from lmm_sae_nb.truth.label_maps import LabelMaps


def latents(dense: np.ndarray) -> ImageLatents:
    """(images, patches, latents) as the package keeps them."""
    return ImageLatents(sparse.csr_array(dense.reshape(-1, dense.shape[-1]).astype(np.float32)), GRID)


def random_acts(rng: np.random.Generator, images: int, n_latents: int, active: float = 0.1) -> np.ndarray:
    """(images, patches, latents), a fraction of the entries above 0."""
    shape = (images, GRID[0] * GRID[1], n_latents)
    return rng.random(shape) * (rng.random(shape) < active)


def maps(grids: list[dict[str, np.ndarray]], concepts: dict = CONCEPTS) -> LabelMaps:
    """The label maps of images, from grids of 6 x 6 patches for each kind."""
    return LabelMaps([row(**grid) for grid in grids], concepts)


def random_grids(rng: np.random.Generator, images: int) -> list[dict[str, np.ndarray]]:
    return [{kind: rng.integers(0, 1 + len(names), GRID) for kind, names in CONCEPTS.items()} for _ in range(images)]
