"""A random LLaVA-NeXT and a random SAE on its middle layer."""

import pytest
import torch
from models import llava_next

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE


@pytest.fixture(scope="session")
def place() -> SAEInPlace:
    torch.manual_seed(4)  # this one answers y
    lmm = LMM(*llava_next())
    sae = TopKSAE(lmm.width, 40, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    sae.b_dec.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return SAEInPlace(lmm, sae, 1)


@pytest.fixture(scope="session")
def embedded(root) -> SAEInPlace:
    """The model of the preset tiny, with a random SAE."""
    lmm = LMM.load(root / "data/models/tiny-llava-next")
    sae = TopKSAE(lmm.width, 64, 8, generator=torch.Generator().manual_seed(3)).requires_grad_(False)
    return SAEInPlace(lmm, sae, 1)
