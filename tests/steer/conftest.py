"""What the tests of steering share: an untrained model with an untrained SAE, and its cache."""

import numpy as np
import pytest
import torch
from models import llava_next, noise

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE

LAYER, LATENTS, K = 1, 24, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An untrained model with an untrained SAE, its cache of four images, and the images."""
    torch.manual_seed(0)
    lmm = LMM(*llava_next())
    sae = TopKSAE(lmm.width, LATENTS, K, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    place, pictures = SAEInPlace(lmm, sae, LAYER), [noise(40, 30, seed) for seed in range(4)]
    return place, cache_activations(place, pictures, n_top=2, folder=tmp_path_factory.mktemp("cache")), pictures


@pytest.fixture
def live(made):
    return np.flatnonzero(np.asarray(made[1].live)).tolist()
