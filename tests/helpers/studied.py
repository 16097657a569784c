"""A small true model with an untrained SAE, its cache of eight images, and labels of these images at random."""

from pathlib import Path

import numpy as np
import torch
from labelled import CONCEPTS
from models import make
from PIL import Image

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.compare.saes import CachedSAE
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE


def make_study(folder: Path, **settings) -> tuple[CachedSAE, list[Image.Image], list[dict[str, Image.Image]]]:
    """The SAE with its cache, the images, and a row of label maps for each.

    settings: of `cache_activations`.
    """
    lmm = LMM(*make("picture_world"))
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (192, 192, 3), dtype=np.uint8)) for _ in range(8)]

    def labels(names: list[str]) -> Image.Image:
        return Image.fromarray(np.kron(rng.integers(0, 1 + len(names), (12, 12)), np.ones((16, 16))).astype(np.uint8))

    rows = [{kind: labels(names) for kind, names in CONCEPTS.items()} for _ in range(8)]
    place = SAEInPlace(lmm, TopKSAE(lmm.width, 24, 4, generator=torch.Generator().manual_seed(0)), 1)
    return CachedSAE(place, cache_activations(place, images, folder=folder, store="float32", **settings)), images, rows
