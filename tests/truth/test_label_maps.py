"""Label maps against counting pixels by hand."""

import numpy as np
import pytest
from scored import CONCEPTS, corner, exemplar, label_maps

from lmm_sae_nb.truth.label_maps import TrueMasks


def test_truth_finds_a_concept_in_every_kind_that_has_its_name():
    face, word = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    face[:2], word[6:] = 1, 1
    truth = TrueMasks([label_maps(face=face, word=word)], CONCEPTS)
    assert truth.kinds_of("happy") == ["face", "word"]
    [found] = truth([0], "happy")
    assert found.shape == (1, 8, 8)
    assert found.sum() == 32
    with pytest.raises(ValueError, match="no ground truth for 'unicorn'"):
        truth([0], "unicorn")


def test_what_covers_a_patch_is_counted_in_pixels():
    """Brute force over every pixel, also where patches differ in size."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (8, 8)).astype(np.uint8)
    truth = TrueMasks([label_maps(object=labels)], CONCEPTS)
    for grid in ((4, 4), (3, 5)):
        found = truth.covered(0, grid)
        assert found.shape == (4, grid[0] * grid[1])
        owner = {(y, x): (y * grid[0] // 8, x * grid[1] // 8) for y in range(8) for x in range(8)}
        for number, concept in ((1, 0), (2, 1)):
            for patch in range(grid[0] * grid[1]):
                inside = [at for at, of in owner.items() if of == divmod(patch, grid[1])]
                share = np.mean([labels[at] == number for at in inside])
                assert found[concept, patch] == pytest.approx(share)
        assert not found[2:].any()


def test_the_concepts_that_exemplars_share():
    cat, dog = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    cat[:4, :4], dog[:4, :4] = 1, 2
    truth = TrueMasks([label_maps(object=cat), label_maps(object=dog), label_maps()], CONCEPTS)
    here = corner(2, 2)
    assert truth.common([exemplar(0, here)] * 4 + [exemplar(1, here)]) == {"cat"}
    assert truth.common([exemplar(0, here), exemplar(1, here)]) == set()
    assert truth.common([exemplar(1, here)]) == {"dog"}
    with pytest.raises(ValueError, match="no exemplars"):
        truth.common([])


def test_a_data_set_without_label_maps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="face.*or no `concepts`"):
        TrueMasks([{"object": None}], CONCEPTS)
    with pytest.raises(FileNotFoundError, match="make world"):
        TrueMasks([], tmp_path / "concepts.json")
