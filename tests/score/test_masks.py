"""Masks and their IoU against counting by hand, and against torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scored import CONCEPTS, exemplar, label_maps

from lmm_sae_nb.interpret.exemplars import upsample
from lmm_sae_nb.score.masks import (
    PAPER,
    STRICT,
    ActivationMap,
    activation_mask,
    concept_mask,
    exemplar_maps,
    iou,
    ious,
    move_mask,
)
from lmm_sae_nb.score.segmenters import Segmentation, SegmentedImages
from lmm_sae_nb.truth.label_maps import LabelMaps

GRIDS = arrays(np.float32, (4, 4), elements=st.sampled_from([0.0, 0.1, 0.2, 0.26, 0.5, 1.0]))
MODES = pytest.mark.parametrize("mode", [PAPER, STRICT], ids=lambda mode: mode.name)


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1))
def test_iou_counts_pixels(a, b):
    """Against Python's own sets."""
    one, two = ({i for i in range(16) if bits >> i & 1} for bits in (a, b))
    masks = [np.isin(np.arange(16), list(which)).reshape(4, 4) for which in (one, two)]
    assert iou(*masks) == pytest.approx(len(one & two) / len(one | two) if one | two else 0.0)
    assert iou(masks[1], masks[0]) == iou(*masks)


@pytest.mark.usefixtures("unchecked")
def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(3, 3\)"):
        iou(np.ones((2, 2), bool), np.ones((3, 3), bool))
    for wrong in (np.ones((1, 8, 6), bool), np.ones((6, 8), bool), np.ones((1, 6, 8), np.uint8)):
        with pytest.raises(ValueError, match=r"image of 8 x 6 pixels; it has to give bool of shape \(candidates, 6, 8"):
            concept_mask(wrong, (8, 6), STRICT)


def test_a_lone_patch_of_the_reference_code_becomes_780_pixels():
    """As measured on the reference code: 24 x 24 patches of 14 pixels."""
    lone = np.zeros((24, 24), np.float32)
    lone[11, 7] = 3.0
    assert activation_mask(ActivationMap(0, (336, 336), lone), PAPER).sum() == 780
    assert activation_mask(ActivationMap(0, (336, 336), lone), STRICT).sum() == 14 * 14


@given(GRIDS, st.sampled_from([(32, 32), (56, 40), (20, 36)]))
def test_activation_masks_are_those_that_torch_interpolates(activation, size):
    """Bilinear: torch's weights of what is inactive, of which the 8-bit picture cannot tell the last 1/448."""
    spot, grid = ActivationMap(0, size, activation), torch.from_numpy(activation)[None, None]
    active = torch.nn.functional.interpolate((grid > 0).float(), size[::-1], mode="bilinear")[0, 0].numpy()
    found = activation_mask(spot, PAPER)
    assert found[active > 1.5 / 224].all()
    assert not found[active < 0.4 / 224].any()
    near = torch.nn.functional.interpolate((grid > 0.25 * grid.max()).float(), size[::-1], mode="nearest-exact")
    assert (activation_mask(spot, STRICT) == near[0, 0].bool().numpy()).all()


@given(arrays(bool, (5, 7)), st.integers(0, 2**32 - 1))
def test_a_mask_that_is_moved_keeps_its_area_and_its_shape(mask, seed):
    found = move_mask(mask, np.random.default_rng(seed))
    assert found.sum() == mask.sum()
    turned = [np.roll(mask, (down, right), (0, 1)) for down in range(5) for right in range(7)]
    assert any((found == one).all() for one in turned)


def test_a_mask_is_moved_anywhere():
    rng, lone = np.random.default_rng(0), np.eye(1, 12, dtype=bool).reshape(3, 4)
    assert {int(move_mask(lone, rng).argmax()) for _ in range(300)} == set(range(12))


def test_all_candidates_together_or_the_likeliest():
    first, second = np.zeros((2, 3), bool), np.zeros((2, 3), bool)
    first[0, 0] = second[1, 2] = True
    both = np.stack([first, second])
    assert (concept_mask(both, (3, 2), PAPER) == (first | second)).all()
    assert (concept_mask(both, (3, 2), STRICT) == first).all()
    for mode in (PAPER, STRICT):
        assert not concept_mask(both[:0], (3, 2), mode).any()


def brute_iou(activation: np.ndarray, candidates: np.ndarray, mode) -> float:
    """Pixel by pixel, with torch's interpolation (in eighths, which 8 bits tell apart)."""
    grid = torch.from_numpy(activation)[None, None]
    if mode is PAPER:
        active = torch.nn.functional.interpolate((grid > 0).double(), (8, 8), mode="bilinear")[0, 0] > 0
        wanted = {(y, x) for one in candidates for y in range(8) for x in range(8) if one[y, x]}
    else:
        active = torch.nn.functional.interpolate((grid > 0.25 * grid.max()).double(), (8, 8), mode="nearest")[0, 0] > 0
        wanted = {(y, x) for y in range(8) for x in range(8) if len(candidates) and candidates[0, y, x]}
    seen = {(y, x) for y in range(8) for x in range(8) if active[y, x]}
    return len(seen & wanted) / len(seen | wanted) if seen | wanted else 0.0


@MODES
@settings(max_examples=60)
@given(activation=GRIDS, candidates=st.integers(0, 3).flatmap(lambda n: arrays(bool, (n, 8, 8))))
def test_an_images_iou_is_that_of_brute_force(mode, activation, candidates):
    found = ious([ActivationMap(0, (8, 8), activation)], "cat", lambda numbers, concept: [candidates], mode)
    assert found == pytest.approx([brute_iou(activation, candidates, mode)] if activation.any() else [0.0])


@MODES
def test_a_segmenter_is_not_asked_where_the_latent_is_silent_and_once_for_each_concept(mode):
    asked = []

    def segmenter(images, concepts):
        asked.append([(image.getpixel((0, 0))[0], concept) for image, concept in zip(images, concepts, strict=True)])
        return [Segmentation(np.ones((1, 8, 8), bool), np.ones(1, np.float32)) for _ in images]

    images = [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(3)]
    where = SegmentedImages(segmenter, images, room=3 * 64)
    places = [ActivationMap(n, (8, 8), np.full((4, 4), float(n != 1), np.float32)) for n in (0, 1, 2, 0)]
    assert ious(places, "cat", where, mode).tolist() == [1, 0, 1, 1]
    ious(places[::-1], "cat", where, mode)
    assert asked == [[(0, "cat"), (2, "cat")]]
    ious(places, "dog", where, mode)
    ious(places[1:], "cat", where, mode)  # of four answers the one unused longest is no longer kept
    assert asked[1:] == [[(0, "dog"), (2, "dog")], [(2, "cat")]]
    assert ious(places[1:2], "bee", where, mode) == [0]
    assert len(asked) == 3


def test_what_is_larger_than_the_room_is_asked_again_and_nothing_found_is_kept():
    asked = []

    def segmenter(images, concepts):
        asked.append(concepts[0])
        masks = np.ones((int(concepts[0] == "cat"), 8, 8), bool)
        return [Segmentation(masks, np.ones(len(masks), np.float32)) for _ in images]

    where = SegmentedImages(segmenter, [Image.new("RGB", (8, 8))], room=63)
    for concept in ("cat", "cat", "dog", "dog"):
        assert len(where([0], concept)[0]) == (concept == "cat")
    assert asked == ["cat", "cat", "dog"]


def test_candidates_come_likeliest_first():
    masks = np.eye(3, dtype=bool)[:, None]
    found = Segmentation(masks, np.array([0.2, 0.9, 0.2], np.float32))
    [ordered] = SegmentedImages(lambda images, concepts: [found], [Image.new("RGB", (3, 1))])([0], "cat")
    assert (ordered == masks[[1, 0, 2]]).all()


def test_chance_is_near_the_area_where_a_moved_mask_meets_the_concept():
    """Half of the image is the concept, an eighth is active: IoU is 1/16 to 9/16, so that the mean is known."""
    half = np.zeros((1, 8, 8), bool)
    half[0, :4] = True
    active = np.zeros((4, 4), np.float32)
    active[1, :] = 1  # 16 pixels in two lines: rows overlap 0, 8 or 16 pixels
    rows = [len({(down + k) % 8 for k in (2, 3)} & set(range(4))) for down in range(8)]
    expected = np.mean([8 * n / (32 + 16 - 8 * n) for n in rows])
    rng = np.random.default_rng(0)
    found = ious([ActivationMap(0, (8, 8), active)] * 800, "cat", lambda n, c: [half] * len(n), STRICT, rng=rng)
    assert found.mean() == pytest.approx(expected, abs=0.02)


def test_the_world_and_the_scores_agree_on_real_label_maps():
    """The strict score of ground truth is the IoU of the visible patches, straight from the definition."""
    rng = np.random.default_rng(2)
    truth = LabelMaps([label_maps(object=rng.integers(0, 3, (8, 8)).astype(np.uint8)) for _ in range(3)], CONCEPTS)
    found = [exemplar(n, rng.random((4, 4)) < 0.4) for n in range(3)]
    by_hand = [iou(upsample(e.visible, (8, 8)), truth([e.image_index], "dog")[0][0]) for e in found]
    assert ious(exemplar_maps(found), "dog", truth, STRICT).tolist() == by_hand
