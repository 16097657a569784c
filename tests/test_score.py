"""Scores against counting by hand, and against another library."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import norm

from lmm_sae_nb.explain import Exemplar, masked, upsample
from lmm_sae_nb.score import TrueMasks, iou, latent_iou, mean_interval

CONCEPTS = {"object": ["cat", "dog"], "face": ["happy"], "word": ["happy"]}


def exemplar(index: int, visible: np.ndarray, size: int = 8) -> Exemplar:
    image = Image.new("RGB", (size, size), (9, 9, 9))
    return Exemplar(index, image, visible.astype(np.float32), visible, masked(image, visible))


def row(**grids: np.ndarray) -> dict:
    empty = np.zeros((8, 8), np.uint8)
    return {kind: Image.fromarray(grids.get(kind, empty)) for kind in CONCEPTS}


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1))
def test_iou_counts_pixels(a, b):
    """Against Python's own sets."""
    one, two = ({i for i in range(16) if bits >> i & 1} for bits in (a, b))
    masks = [np.isin(np.arange(16), list(which)).reshape(4, 4) for which in (one, two)]
    assert iou(*masks) == pytest.approx(len(one & two) / len(one | two) if one | two else 0.0)
    assert iou(masks[1], masks[0]) == iou(*masks)


def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(3, 3\)"):
        iou(np.ones((2, 2), bool), np.ones((3, 3), bool))


def test_truth_finds_a_concept_in_every_kind_that_has_its_name():
    face, word = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    face[:2], word[6:] = 1, 1
    truth = TrueMasks([row(face=face, word=word)], CONCEPTS)
    assert truth.kinds_of("happy") == ["face", "word"]
    assert truth(0, "happy").sum() == 32
    with pytest.raises(ValueError, match="no ground truth for 'unicorn'"):
        truth(0, "unicorn")


def test_the_best_concept_and_the_score_by_hand():
    cat_and_dog = np.zeros((8, 8), np.uint8)
    cat_and_dog[:4, :4], cat_and_dog[4:] = 1, 2  # 16 pixels of cat, 32 of dog
    truth = TrueMasks([row(object=cat_and_dog), row()], CONCEPTS)
    corner = np.zeros((4, 4), bool)
    corner[:2, :3] = True  # 24 pixels, 16 of them cat: 16 / 24
    found = [exemplar(0, corner), exemplar(1, corner)]
    best = truth.best(found)
    assert (best.kind, best.concept) == ("object", "cat")
    assert best.iou == pytest.approx(16 / 24 / 2)
    assert latent_iou(found, "cat", truth) == pytest.approx(16 / 24 / 2)
    assert latent_iou(found, "dog", truth) == 0
    assert upsample(corner, (8, 8)).sum() == 24
    with pytest.raises(ValueError, match="no exemplars"):
        latent_iou([], "cat", truth)


def test_a_data_set_without_label_maps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="face"):
        TrueMasks([{"object": None}], CONCEPTS)
    with pytest.raises(FileNotFoundError, match="make world"):
        TrueMasks([], tmp_path / "concepts.json")


def test_the_interval_of_a_normal_sample_is_the_textbook_one():
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = mean_interval(values)
    half = norm.ppf(0.995) * values.std() / np.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.05)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05)


def test_intervals_of_few_and_of_equal_values():
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([0.5])
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
