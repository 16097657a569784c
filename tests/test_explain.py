"""Exemplars show what they claim to show; explanations are what the answers share."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lmm_sae_nb.cache import LatentCache, write_cache
from lmm_sae_nb.explain import REFUSAL, ask_each, exemplars, masked, most_activated, shared_answer, upsample
from lmm_sae_nb.ranking import Ranking


def test_masking_blackens_exactly_the_other_patches():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(1, 256, (24, 36, 3), dtype=np.uint8))
    visible = np.zeros((4, 6), bool)
    visible[1, 2] = visible[3, 5] = True
    pixels, before = np.asarray(masked(image, visible)), np.asarray(image)
    for row in range(4):
        for column in range(6):
            patch = np.s_[6 * row : 6 * row + 6, 6 * column : 6 * column + 6]
            assert (pixels[patch] == (before[patch] if visible[row, column] else 0)).all()


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6))
def test_upsampling_covers_each_patch_by_its_share_of_the_pixels(rows, columns, seed):
    patches = np.random.default_rng(seed).random((rows, columns)) < 0.5
    mask = upsample(patches, (columns * 5, rows * 3))
    assert mask.sum() == patches.sum() * 15


def test_most_activated_is_above_a_share_of_the_highest():
    activation = np.array([[0.0, 1.0], [2.0, 4.0]], np.float32)
    assert most_activated(activation, 0.25).tolist() == [[False, False], [True, True]]
    assert most_activated(activation, 0).tolist() == [[False, True], [True, True]]
    assert not most_activated(np.zeros((2, 2), np.float32)).any()
    with pytest.raises(ValueError, match="share is 1"):
        most_activated(activation, 1)


@pytest.mark.parametrize(
    ("answers", "agree", "shared"),
    [
        (["A cat.", "a cat", "a dog."], 2, "a cat"),
        (["a cat", "a dog"], 2, None),
        (["", "", ""], 2, None),
        ([], 1, None),
    ],
)
def test_what_answers_share(answers, agree, shared):
    assert shared_answer(answers, agree) == shared


@pytest.fixture
def cache(tmp_path):
    """Two latents over four images of 3 x 3 patches: one with two images, one silent."""
    ranking = Ranking.empty(2, 3, 9)
    ranking.images[0], ranking.means[0] = [0, 2, -1], [1, 2, 0]
    ranking.patches[0, :2] = np.stack([2 * np.eye(3), np.eye(3)]).reshape(2, 9)
    told = {"images": 4, "patches": 9, "grid": (3, 3), "layer": 0, "model": "made up", "skipped": [], "store": None}
    write_cache(tmp_path, 2, 3, told, [(0, ranking)])
    return LatentCache.load(tmp_path)


def test_exemplars_are_the_ranked_images_and_no_more(cache):
    pictures = [Image.new("RGB", (30, 30), (n, n, n)) for n in range(4)]
    found = exemplars(cache, pictures, 0, n_top=3)
    assert [exemplar.image_index for exemplar in found] == [2, 0]
    assert found[1].activation.max() == 2
    assert np.asarray(found[0].masked).sum() == 3 * 100 * 2 * 3
    assert exemplars(cache, pictures, 1) == []
    with pytest.raises(ValueError, match="no latent 2"):
        exemplars(cache, pictures, 2)


class Answering:
    """Stands for an LMM whose answer is a function of question and picture."""

    def __init__(self):
        self.asked = []

    def prompt(self, texts, images):
        self.asked += list(zip(texts, images, strict=True))
        return [(text, image.getpixel((0, 0))[0]) for text, image in zip(texts, images, strict=True)]

    def generate(self, prompt, max_new_tokens):
        return [f"thing {value}." if text == "what" else "red." for text, value in prompt]


def test_questions_are_asked_in_turn_until_answers_agree():
    def pictures(*values):
        return [Image.new("RGB", (2, 2), (value, 0, 0)) for value in values]

    lmm = Answering()
    same, mixed, none = ask_each(lmm, ["what", "colour"], agree=3, batch=2)([pictures(7, 7, 7), pictures(1, 2, 3), []])
    assert (same.concept, mixed.concept, none.concept) == ("thing 7", "red", None)
    assert none.text == REFUSAL
    assert mixed.answers == ("thing 1.", "thing 2.", "thing 3.", "red.", "red.", "red.")
    assert sum(text == "colour" for text, _ in lmm.asked) == 3  # only where the first question left it open
