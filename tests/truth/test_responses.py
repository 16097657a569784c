"""What a latent responds to, on label maps drawn by hand."""

import numpy as np
from labelled import CONCEPTS, GRID, PLACES, SIDE, box, exemplar, row
from PIL import Image

from lmm_sae_nb.truth.label_maps import LabelMaps
from lmm_sae_nb.truth.responses import common_concept, response_of


def test_exemplars_of_one_object_have_it_in_common_wherever_it_is():
    truth = LabelMaps([row(object=box(*place).astype(int)) for place in PLACES], CONCEPTS)
    images = [exemplar(n, box(*place)) for n, place in enumerate(PLACES)]
    assert common_concept(truth, images) == ("object", "cat", 1.0)
    assert response_of(truth, images) == "one concept"


def test_one_patch_of_a_wide_scene_is_a_detail():
    truth = LabelMaps([row(scene=np.ones(GRID, int))] * 5, CONCEPTS)
    images = [exemplar(n, box(*place, 1, 1)) for n, place in enumerate(PLACES)]
    assert common_concept(truth, images) is None
    assert response_of(truth, images) == "a detail"


def test_the_same_patches_of_different_things_are_a_place():
    things = [row(object=np.full(GRID, 1 + n % 3)) for n in range(5)]
    truth = LabelMaps([*things, *[row()] * 5], CONCEPTS)
    assert response_of(truth, [exemplar(n, box(3, 3)) for n in range(5)]) == "a place"
    assert response_of(truth, [exemplar(5 + n, box(0, 1)) for n in range(5)]) == "a place"


def test_patches_with_a_border_through_them_are_edges():
    """A line one pixel wide, three of four pixels long, is too little of a patch for the patch to show it."""
    line = np.zeros((SIDE, SIDE), np.uint8)
    line[:, 3] = line[:, 11] = 1
    line[::4] = 0
    truth = LabelMaps([{"object": Image.fromarray(line)}] * 5, {"object": ["cat"]})
    assert truth.coverage(0, GRID)[0, :4].tolist() == [3 / 16, 0, 3 / 16, 0]
    on, off = ([box(top, left, 2, 1) for top, left in places] for places in (
        [(0, 0), (2, 0), (4, 0), (0, 2), (2, 2)], [(0, 1), (2, 1), (4, 1), (0, 3), (2, 3)]))  # fmt: skip
    assert response_of(truth, [exemplar(n, visible) for n, visible in enumerate(on)]) == "edges"
    assert response_of(truth, [exemplar(n, visible) for n, visible in enumerate(off)]) == "none of these"


def test_two_things_in_turn_are_several_concepts_and_none_at_all_is_none_of_these():
    rows = [row(object=(1 + n % 2) * box(*place)) for n, place in enumerate(PLACES[:4])]
    truth = LabelMaps([*rows, *[row()] * 5], CONCEPTS)
    assert response_of(truth, [exemplar(n, box(*place)) for n, place in enumerate(PLACES[:4])]) == "several concepts"
    assert response_of(truth, [exemplar(4 + n, box(*place)) for n, place in enumerate(PLACES)]) == "none of these"
    assert response_of(truth, []) == "none of these" and common_concept(truth, []) is None
