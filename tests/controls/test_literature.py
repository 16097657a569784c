"""The measures of the literature for one SAE: all are there, and what cannot be measured is said."""

import numpy as np
import pytest
import torch
from labelled import CONCEPTS
from PIL import Image

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.compare.saes import CachedSAE
from lmm_sae_nb.controls.literature import measure_directions, measure_names, measure_probes
from lmm_sae_nb.measures.absorption import NestedPair
from lmm_sae_nb.measures.image_latents import ImageLatents
from lmm_sae_nb.measures.monosemanticity import concept_vectors
from lmm_sae_nb.measures.probing import probing
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.truth.label_maps import LabelMaps

PAIR = NestedPair("cat", (("object", "cat"),), ("scene", "sea"))
IMAGES = 60


@pytest.fixture(scope="module")
def world():
    """Images of noise with labels at random; half of them lack each kind."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (192, 192, 3), dtype=np.uint8)) for _ in range(IMAGES)]

    def labels(names: list[str]) -> Image.Image:
        grid = rng.integers(0, 1 + len(names), (12, 12)) * (rng.random() < 0.5)
        return Image.fromarray(np.kron(grid, np.ones((16, 16))).astype(np.uint8))

    rows = [{kind: labels(names) for kind, names in CONCEPTS.items()} for _ in range(IMAGES)]
    return images, LabelMaps(rows, CONCEPTS)


@pytest.fixture(scope="module")
def study(lmm, world, tmp_path_factory):
    place = SAEInPlace(lmm, TopKSAE(lmm.width, 24, 4, generator=torch.Generator().manual_seed(0)), 1)
    return CachedSAE(place, cache_activations(place, world[0], folder=tmp_path_factory.mktemp("c"), store="float32"))


def test_probes_are_those_of_the_measures_and_a_pair_that_nothing_shows_is_left_out_with_a_reason(study, world):
    images, truth = world
    latents = ImageLatents.of_images(study.place, images)
    found = measure_probes(study, truth, latents, truth, [PAIR])
    assert found.metrics.items() >= probing(ImageLatents.of_cache(study.cache), truth, latents, truth).items()
    assert {"absorption", "absorption_cat", "probe_5_auroc_random"} <= found.metrics.keys() and not found.why
    without = measure_probes(study, truth, latents, truth, [NestedPair("bus", (("object", "bus"),), ("scene", "sea"))])
    assert "absorption" not in without.metrics
    assert without.why[0].startswith("absorption: the label maps have no 'bus'")


def test_names_that_no_latent_has_are_said_and_the_other_measure_is_there(study, world):
    images, truth = world
    latents = ImageLatents.of_images(study.place, images)
    vectors = {"true": concept_vectors(truth, IMAGES, (12, 12))}
    row = {"outcome": "refused", "concept": None, "kind": None}
    found = measure_names({3: row}, latents, truth, vectors, None)
    assert "monosemanticity_true" in found.metrics
    assert found.why[0].startswith("detection scoring: of 0 latents with a name")


def test_without_an_sae_of_another_seed_there_is_no_consistency(study, world):
    rows = {n: {"outcome": "explained", "concept": "cat", "kind": "object"} for n in range(24)}
    samples = [{"image": world[0][0], "question": "what is it ?", "answer": "a cat ."}]
    alone, beside = (measure_directions(study, other, rows, samples) for other in (None, study))
    assert "modality_object" in alone.metrics and "no SAE of another seed" in alone.why[0]
    assert beside.metrics["consistency_matched"] == pytest.approx(1, abs=1e-6) and not beside.why
