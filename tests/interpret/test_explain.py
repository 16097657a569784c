"""Exemplars are the right images with the right masks; explanations are what the models answered."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lmm_sae_nb.cache.latent_cache import LatentCache, write_cache
from lmm_sae_nb.cache.top_images import Ranking
from lmm_sae_nb.interpret.exemplars import ExemplarsByLatent, exemplars, masked, most_activated, upsample
from lmm_sae_nb.interpret.explain import TRAINED_ON, Explanation, as_rows, explain_latents, latents_in_training
from lmm_sae_nb.interpret.explainers import Answer, Outcome
from lmm_sae_nb.support.files import write_json

EXPLAINED, REFUSED, UNPARSEABLE, FAILED = Outcome


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
def test_upsampling_gives_each_patch_its_pixels(rows, columns, seed):
    patches = np.random.default_rng(seed).random((rows, columns)) < 0.5
    mask = upsample(patches, (columns * 5, rows * 3))
    assert mask.sum() == patches.sum() * 15


def test_most_activated_is_above_a_fraction_of_the_highest():
    activation = np.array([[0.0, 1.0], [2.0, 4.0]], np.float32)
    assert most_activated(activation, 0.25).tolist() == [[False, False], [True, True]]
    assert most_activated(activation, 0).tolist() == [[False, True], [True, True]]
    assert not most_activated(np.zeros((2, 2), np.float32)).any()
    with pytest.raises(ValueError, match="threshold is 1"):
        most_activated(activation, 1)


@pytest.fixture
def cache(tmp_path):
    """Two latents over four images of 3 x 3 patches: one with two images, one silent."""
    ranking = Ranking.empty(2, 3, 9)
    ranking.images[0], ranking.means[0] = [0, 2, -1], [1, 2, 0]
    ranking.patches[0, :2] = np.stack([2 * np.eye(3), np.eye(3)]).reshape(2, 9)
    described = {
        "images": 4,
        "patches": 9,
        "grid": (3, 3),
        "layer": 0,
        "model": "made up",
        "skipped": [],
        "store": None,
    }
    write_cache(tmp_path, 2, 3, described, [(0, ranking)])
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


def test_hidden_patches_keep_the_brightness_that_is_asked_for():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    visible = np.array([[True, False], [False, False]])
    pixels, before = np.asarray(masked(image, visible, dim=0.12)), np.asarray(image, float)
    assert (pixels[:3, :3] == before[:3, :3]).all()
    assert abs(pixels[3:] - 0.12 * before[3:]).max() <= 0.5
    with pytest.raises(ValueError, match="dim is 1"):
        masked(image, visible, dim=1)


def test_of_images_with_the_same_pixels_one_is_shown_and_another_takes_its_place(tmp_path):
    ranking = Ranking.empty(1, 4, 9)
    ranking.images[0], ranking.means[0] = [3, 0, 2, 1], [4, 3, 2, 1]
    ranking.patches[0] = np.arange(36).reshape(4, 9)
    described = {
        "images": 4,
        "patches": 9,
        "grid": (3, 3),
        "layer": 0,
        "model": "made up",
        "skipped": [],
        "store": None,
    }
    write_cache(tmp_path, 1, 4, described, [(0, ranking)])
    pictures = [Image.new("RGB", (30, 30), (n // 2 * 9, n, 0)) for n in (0, 1, 2, 0)]  # 0 and 3 are alike
    found = exemplars(LatentCache.load(tmp_path), pictures, 0, n_top=2, threshold=0)
    assert [exemplar.image_index for exemplar in found] == [3, 2]
    assert found[1].activation.max() == 26  # its own map, not that of the one left out
    assert len(exemplars(LatentCache.load(tmp_path), pictures, 0, n_top=5)) == 3


def test_exemplars_by_latent_are_those_of_each_latent_and_made_when_looked_up(cache):
    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    pictures = Counted(Image.new("RGB", (30, 30), (n, n, n)) for n in range(4))
    by_latent = ExemplarsByLatent(cache, pictures, n_top=1, threshold=0.5)
    assert (list(by_latent), len(by_latent), pictures.reads) == ([0, 1], 2, 0)
    [ours], [direct] = by_latent[0], exemplars(cache, pictures, 0, n_top=1, threshold=0.5)
    assert ours.image_index == direct.image_index and (ours.visible == direct.visible).all()
    assert by_latent[1] == []
    one = by_latent.only([1])
    assert list(one.items()) == [(1, [])]
    with pytest.raises(KeyError, match="0"):
        one[0]


def test_the_latents_of_an_explainer_s_training_are_known_only_for_an_sae_of_the_same_training(tmp_path):
    explainer, one, other = (tmp_path / name for name in ("explainer", "one", "other"))
    elsewhere = tmp_path / "elsewhere"
    for folder, k, samples in ((one, 3, "train"), (other, 4, "train"), (elsewhere, 3, "photographs")):
        write_json(
            folder / "manifest.json", {"params": {"k": k, "new": 1}, "inputs": {"model": "a hash", samples: "another"}}
        )
    assert not latents_in_training(explainer, one)
    lessons = [{"trained": None, "latents": [7]},
               {"trained": {"params": {"k": 3}, "inputs": ["model", "train"]}, "latents": [1, 5]}]  # fmt: skip
    write_json(explainer / TRAINED_ON, {"lessons": lessons})
    assert latents_in_training(explainer, one) == {1, 5}
    assert not any(latents_in_training(explainer, folder) for folder in (other, elsewhere, tmp_path / "none"))


def test_the_last_model_that_was_asked_decides_the_outcome(cache):
    answers = {
        3: Answer(EXPLAINED, "a big cat", "!", 0.75), 5: Answer(EXPLAINED, "all sorts", "?"),
        7: Answer(REFUSED, None, "no"), 9: Answer(FAILED, None, "down"),
    }  # fmt: skip
    asked = []

    def explain(sets):
        asked.extend(list(images) for images in sets)
        return list(answers.values())

    def refine(texts):
        assert texts == ["a big cat", "all sorts"]
        return [Answer(EXPLAINED, "cat", ""), Answer(UNPARSEABLE, None, "")]

    found = exemplars(cache, [Image.new("RGB", (30, 30), (n, 1, 1)) for n in range(4)], 0)
    explained = explain_latents(
        dict.fromkeys(answers, found), explain, refine, lambda concepts: [f"{c}'s kind" for c in concepts]
    )
    assert asked == [[exemplar.masked for exemplar in found]] * 4
    assert explained == {
        3: Explanation(EXPLAINED, "cat", "cat's kind", "!", 0.75), 5: Explanation(UNPARSEABLE, None, None, "?"),
        7: Explanation(REFUSED, None, None, "no"), 9: Explanation(FAILED, None, None, "down"),
    }  # fmt: skip
    rows = json.loads(json.dumps(as_rows(explained, longest=1)))
    assert rows["9"] == {"outcome": "failed", "concept": None, "kind": None, "answer": "d", "confidence": None}
    assert rows["3"]["confidence"] == 0.75
