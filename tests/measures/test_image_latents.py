"""The latents of images, against dense activations of the same model."""

from types import SimpleNamespace

import numpy as np
import patchwork
import pytest
import torch
from PIL import Image

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.cache.encode_images import base_latents
from lmm_sae_nb.measures.image_latents import ImageLatents, images_showing, mean_metrics
from lmm_sae_nb.model.token_kinds import NoPatchGrid
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.support.intervals import mean_interval


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (192, 192, 3), dtype=np.uint8)) for _ in range(5)]


@pytest.fixture(scope="module")
def dense(lmm, sae, pictures):
    """(images, patches, latents), scattered by PyTorch."""
    parts = []
    for acts, indices in base_latents(SAEInPlace(lmm, sae, 1), pictures, batch_size=2):
        parts.append(torch.zeros(*acts.shape[:2], sae.n_latents).scatter(-1, indices.long(), acts.float()))
    return torch.cat(parts).numpy()


def test_latents_of_images_are_those_of_the_model(lmm, sae, pictures, dense):
    found = ImageLatents.of_images(SAEInPlace(lmm, sae, 1), pictures, batch_size=2)
    assert np.array_equal(found.acts.toarray(), dense.reshape(-1, sae.n_latents))
    assert (found.images, found.patches, found.n_latents) == dense.shape
    assert found.maxima == pytest.approx(dense.max(1))
    assert found.means == pytest.approx(dense.mean(1), rel=1e-5)
    assert np.array_equal(found.live, (dense > 0).any((0, 1)))
    assert np.array_equal(found.columns([5, 2]), dense.reshape(-1, sae.n_latents)[:, [5, 2]])
    assert (found.acts.data > 0).all()


def test_latents_of_a_cache_and_its_firings_are_those_of_its_images(lmm, sae, pictures, dense, tmp_path):
    cache = cache_activations(SAEInPlace(lmm, sae, 1), pictures, folder=tmp_path, store="float32", batch_size=2)
    found = ImageLatents.of_cache(cache)
    assert found.acts.toarray() == pytest.approx(dense.reshape(-1, sae.n_latents), rel=1e-5)
    ours, theirs = found.firings(3, 9), cache.store.latents(3, 9)
    order = np.lexsort((ours.patches, ours.images, ours.latents))
    for one, other in zip(ours, theirs, strict=True):
        assert one[order] == pytest.approx(other)


@pytest.mark.usefixtures("unchecked")
def test_a_model_without_a_patch_grid_is_refused():
    with pytest.raises(NoPatchGrid, match="patch grid"):
        ImageLatents.of_cache(SimpleNamespace(grid=None, store=None))
    with pytest.raises(NoPatchGrid, match="patch grid"):
        ImageLatents.of_images(SimpleNamespace(lmm=SimpleNamespace(grid=None)), [])


def test_an_image_shows_a_concept_that_one_patch_shows():
    truth = patchwork.maps(patchwork.random_grids(np.random.default_rng(0), 4))
    expected = [(truth.coverage(n, (6, 6)) >= 0.25).any(1) for n in range(4)]
    assert np.array_equal(images_showing(truth, 4, (6, 6)), expected)


def test_means_have_an_interval_for_all_and_for_each_kind_of_two_or_more():
    found = mean_metrics("score", [0.0, 1.0, 0.5, 0.25], ["a", "a", "b", None])
    assert (found["score"], found["score_a"]) == (0.4375, 0.5)
    assert (found["score_low"], found["score_high"]) == mean_interval([0.0, 1.0, 0.5, 0.25])[1:]
    assert not any(name.startswith("score_b") for name in found)
    assert mean_metrics("score", [1.0]) == {}
