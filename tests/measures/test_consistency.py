"""Agreement of dictionaries, against all permutations and dictionaries known to agree."""

from itertools import permutations

import numpy as np
import pytest
import torch

from lmm_sae_nb.measures.consistency import consistency, matched_cosines, maximal_cosines
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.score.scores import Explained


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_matching_is_the_best_of_all_permutations():
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((4, 3)).astype(np.float32), rng.standard_normal((6, 3)).astype(np.float32)
    cosines = unit(one) @ unit(other).T
    best = max(np.mean([cosines[n, m] for n, m in enumerate(way)]) for way in permutations(range(6), 4))
    assert matched_cosines(one, other).mean() == pytest.approx(best, abs=1e-6)
    assert maximal_cosines(one, other) == pytest.approx(cosines.max(1), abs=1e-6)


def made(lmm, seed: int, layer: int = 1) -> SAEInPlace:
    return SAEInPlace(lmm, TopKSAE(lmm.width, 24, 3, generator=torch.Generator().manual_seed(seed)), layer)


def test_the_same_directions_in_another_order_agree_and_random_ones_do_not(lmm):
    one, other = made(lmm, 0), made(lmm, 1)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    other.sae.W_dec.data = one.sae.W_dec.data[order] * 2  # a length does not count
    live = np.arange(24) % 4 > 0
    explained = {n: Explained("cat", "object") for n in range(8)}
    found = consistency(one, live, other, live[order.numpy()], explained)
    for name in ("max_cosine", "max_cosine_object", "max_cosine_back", "matched", "same"):
        assert found[f"consistency_{name}"] == pytest.approx(1, abs=1e-6)
    assert found["consistency_matched_random_high"] < 1 > found["consistency_max_cosine_random_high"]


def test_latents_that_are_not_live_do_not_count(lmm):
    one, other = made(lmm, 0), made(lmm, 0)
    live = np.arange(24) < 12
    assert consistency(one, live, other, ~live)["consistency_matched"] < 1
    assert consistency(one, live, other, live)["consistency_matched"] == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="1 of 24 latents are live"):
        consistency(one, np.arange(24) < 1, other, live)


def test_saes_of_different_layers_are_refused(lmm):
    live = np.ones(24, bool)
    with pytest.raises(ValueError, match="layers 1 and 2"):
        consistency(made(lmm, 0), live, made(lmm, 0, layer=2), live)
