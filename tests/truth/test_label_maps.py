"""Label maps against counting pixels by hand."""

import numpy as np
import pytest
from scored import CONCEPTS, corner, exemplar, label_maps

from lmm_sae_nb.truth.label_maps import LabelMaps


def test_truth_finds_a_concept_in_every_kind_that_has_its_name():
    face, word = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    face[:2], word[6:] = 1, 1
    truth = LabelMaps([label_maps(face=face, word=word)], CONCEPTS)
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
    truth = LabelMaps([label_maps(object=labels)], CONCEPTS)
    for grid in ((4, 4), (3, 5)):
        found = truth.coverage(0, grid)
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
    truth = LabelMaps([label_maps(object=cat), label_maps(object=dog), label_maps()], CONCEPTS)
    here = corner(2, 2)
    assert truth.in_common([exemplar(0, here)] * 4 + [exemplar(1, here)]) == ["cat"]
    assert truth.in_common([exemplar(0, here), exemplar(1, here)]) == []
    assert truth.in_common([exemplar(1, here)]) == ["dog"]
    with pytest.raises(ValueError, match="no exemplars"):
        truth.in_common([])


def test_a_data_set_without_label_maps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="face.*or no `concepts`"):
        LabelMaps([{"object": None}], CONCEPTS)
    with pytest.raises(FileNotFoundError, match="make world"):
        LabelMaps([], tmp_path / "concepts.json")


def test_patches_that_show_a_concept_stand_image_by_image():
    cat = np.zeros((8, 8), np.uint8)
    cat[:2, 0] = 1  # half of the first patch
    cat[0, 6] = 2  # a quarter of the last patch of the first row
    truth = LabelMaps([label_maps(), label_maps(object=cat)], CONCEPTS)
    assert truth.names[:2] == [("object", "cat"), ("object", "dog")]
    assert truth.coverage(1, (4, 4))[:2].nonzero()[1].tolist() == [0, 3]
    shows = truth.patches_showing([0, 1], (4, 4)).toarray()
    assert shows.shape == (4, 32)
    assert (shows[0].nonzero()[0].tolist(), shows[1].nonzero()[0].tolist()) == ([16], [19])


def test_what_was_read_is_not_read_again():
    class Rows(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    rows = Rows([label_maps(), label_maps()])
    truth = LabelMaps(rows, CONCEPTS)
    reads = []
    for _ in range(3):
        truth([0, 1], "cat")
        truth.coverage(0, (4, 4))
        truth.coverage(1, (2, 2))
        reads.append(rows.reads)
    assert reads[0] == reads[1] == reads[2]
