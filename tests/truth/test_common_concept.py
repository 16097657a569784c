"""The rule that says what masked images show: worked cases, and pixels counted one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmm_sae_nb.truth.common_concept import LEAST_IOU, best_common_concept, names_of, pooled_iou

CONCEPTS = {"scene": ["beach"], "object": ["star", "heart", "sign"], "colour": ["red", "blue"], "word": ["stop"]}
NAMES = names_of(CONCEPTS)
THING, PATCHES = 4, 16  # patches of a thing, and of an image


def image(*concepts: str, seen: int = THING, beside: int = 0):
    """An image of 16 patches: a thing on the first four, of these concepts, the beach on the others; how many of the
    thing's patches are visible, and how many of the beach's."""
    covered = np.zeros((len(NAMES), PATCHES))
    for number, (_, name) in enumerate(NAMES):
        covered[number, :THING] = name in concepts
    covered[0, THING:] = 1
    visible = np.zeros(PATCHES, bool)
    visible[:seen] = visible[THING : THING + beside] = True
    return visible, covered


def common(*images):
    visible, covered = map(np.stack, zip(*images, strict=True))
    return best_common_concept(visible, covered, NAMES)


def test_one_colour_of_unlike_things_is_the_colour_and_one_thing_in_unlike_colours_the_thing():
    assert common(*(image(name, "red") for name in ("star", "heart", "sign", "heart", "star"))).concept == "red"
    assert common(*(image("star", ink) for ink in ("red", "blue", "red", "blue", "blue"))).concept == "star"


def test_a_red_star_every_time_is_a_star_and_a_sign_that_always_says_stop_is_the_word():
    assert common(*[image("star", "red")] * 5).concept == "star"
    assert common(*[image("sign", "stop")] * 5)[:2] == ("word", "stop")


def test_three_images_of_five_are_enough_and_two_are_not():
    star, heart, sign = image("star"), image("heart"), image("sign")
    assert common(star, heart, star, star, sign).concept == "star"
    assert common(star, heart, star, sign, heart) is None
    assert common(star, heart, heart, sign) is None
    assert common(star, heart, heart).concept == "heart"
    assert common(star, heart) is None
    assert common(star, star).concept == common(star).concept == "star"


def test_visible_patches_beside_a_thing_may_be_as_many_as_its_own():
    assert common(*[image("star", beside=3)] * 5).concept == "star"
    assert common(*[image("star", beside=9)] * 5).concept == "beach"


def test_one_patch_of_a_wide_beach_is_a_place_not_a_beach():
    assert 1 / (PATCHES - THING) < LEAST_IOU
    assert common(*[image("star", seen=0, beside=1)] * 5) is None
    assert common(*[image("star", seen=0, beside=2)] * 5) == ("scene", "beach", pytest.approx(2 / 12))


def test_images_without_a_visible_patch_have_nothing_in_common():
    assert common(*[image("star", seen=0)] * 5) is None


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_pooled_iou_counts_pixels(images, seed):
    """Against sets of pixels: patches of four pixels, some of them of a concept."""
    rng = np.random.default_rng(seed)
    pixels, visible = rng.random((images, 3, 6, 4)) < 0.4, rng.random((images, 6)) < 0.5
    iou = pooled_iou(visible, pixels.mean(-1))
    for concept in range(3):
        has = {(i, p, x) for i, p, x in np.argwhere(pixels[:, concept]).tolist()}
        seen = {(i, p, x) for i, p in np.argwhere(visible).tolist() for x in range(4)}
        assert iou[concept] == pytest.approx(len(has & seen) / max(1, len(has | seen)))


def test_other_shapes_and_no_images_are_refused():
    with pytest.raises(ValueError, match=r"covered by 7 concepts"):
        best_common_concept(np.ones((2, 16), bool), np.ones((2, 3, 16)), NAMES)
    with pytest.raises(ValueError, match="at least one"):
        best_common_concept(np.ones((0, 16), bool), np.ones((0, 7, 16)), NAMES)
