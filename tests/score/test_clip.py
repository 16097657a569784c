"""CLIP scores against counting by hand."""

import grounders
import numpy as np
import pytest
from PIL import Image
from scored import corner, exemplar

from lmm_sae_nb.interpret.exemplars import Exemplar, most_activated, upsample
from lmm_sae_nb.score import clip
from lmm_sae_nb.score.clip import clip_input, clip_scores, latents_clip, score_clips
from lmm_sae_nb.score.masks import PAPER, STRICT
from lmm_sae_nb.score.scores import Column, Explained
from lmm_sae_nb.score.similarity import ImageTextSimilarity


def brightness(images, texts):
    """A similarity one can work out: the mean brightness of an image, plus a tenth for the word dog, less for bee."""
    shift = {"dog": 0.1, "bee": -0.9}
    return np.array([[np.asarray(image).mean() / 255 + shift.get(text, 0) for text in texts] for image in images])


def test_clip_scores_are_not_below_zero_and_streams_are_cut_into_batches(monkeypatch):
    greys = [Image.new("RGB", (4, 4), (n, n, n)) for n in (0, 51, 255)]
    sizes = []

    def similar(images, texts):
        sizes.append(len(images))
        return brightness(images, texts)

    found = clip_scores(similar, iter(greys), ["cat", "bee"], batch=2)
    assert sizes == [2, 1]
    assert found == pytest.approx(np.array([[0, 0], [20, 0], [100, 10]]), abs=1e-4)
    again = clip_scores(similar, [greys[n].copy() for n in (1, 0, 1, 1, 2, 0)], ["cat", "bee"], batch=2)
    assert sizes[2:] == [2, 1]  # pictures with the same pixels are compared once
    assert again == pytest.approx(found[[1, 0, 1, 1, 2, 0]])
    monkeypatch.setattr(clip, "PIXELS", 20)  # large pictures are compared sooner
    assert clip_scores(similar, [greys[n] for n in (1, 0, 1, 2)], ["cat", "bee"]) == pytest.approx(found[[1, 0, 1, 2]])
    assert sizes[4:] == [2, 1]
    with pytest.raises(ValueError, match="no pictures"):
        clip_scores(similar, [], ["cat"])
    with pytest.raises(ValueError, match=r"shape \(2,\) for 2 images and 1 texts"):
        clip_scores(lambda images, texts: np.zeros(len(images)), greys[:2], ["cat"])


def test_clip_scores_of_latents_by_hand():
    whole, grey = np.ones((4, 4), bool), (51, 51, 51)
    own = {7: [exemplar(0, corner(4, 2), colour=grey)], 3: [exemplar(0, whole, colour=grey)] * 2}
    explained, others = {7: Explained("cat", "object"), 3: Explained("dog", "object")}, {7: "dog", 3: None}
    random = [Image.new("RGB", (8, 8), (n, n, n)) for n in (0, 102, 204, 204)]
    paper = latents_clip(brightness, own, explained, others, PAPER, random, runs=2)
    assert paper[7].score == pytest.approx(20)
    assert paper[7].random == pytest.approx((20, 80))
    assert paper[7].shuffled == pytest.approx(30)
    assert paper[3].score == pytest.approx(30)
    assert paper[3].shuffled is None
    assert paper[7].area is None
    strict = latents_clip(brightness, own, explained, others, STRICT, [])
    assert [one.score for one in strict.values()] == pytest.approx([10, 30])  # half of the picture is black
    assert [one.area for one in strict.values()] == pytest.approx([10, 30])  # wherever the half lies
    assert strict[7].random is None
    with pytest.raises(ValueError, match="3 random images cannot be divided among 2 runs"):
        latents_clip(brightness, own, explained, others, PAPER, random[:3], runs=2)
    with pytest.raises(ValueError, match="'cat' has no image"):
        latents_clip(brightness, {7: [], 3: own[3]}, explained, others, STRICT, [])


def test_the_clip_score_has_a_column_for_each_mode():
    own = {4: [exemplar(0, corner(4, 2), colour=(51, 51, 51))], 2: [exemplar(0, corner(4, 4), colour=(51, 51, 51))]}
    explained = {4: Explained("cat", "object"), 2: Explained("dog", "object")}
    random = [Image.new("RGB", (8, 8), (n, n, n)) for n in (0, 102)]
    found = score_clips(brightness, own, explained, {2: "cat", 4: "dog"}, random, runs=2)
    assert list(found) == [Column("clip", "paper"), Column("clip", "strict")]
    assert found[Column("clip", "paper")][2].random == pytest.approx((10, 50))
    assert found[Column("clip", "strict")][4].score == pytest.approx(10)


def test_clip_sees_in_strict_mode_what_the_explainer_saw():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(1, 255, (8, 8, 3)).astype(np.uint8))
    activation = rng.random((4, 4)).astype(np.float32)
    visible = most_activated(activation, STRICT.threshold)
    one = Exemplar(0, image, activation, visible)
    assert (np.asarray(clip_input(one, STRICT)) == np.asarray(one.masked)).all()
    assert clip_input(one, PAPER) is image
    away = np.asarray(clip_input(one, STRICT, rng)).any(-1)
    assert away.sum() == upsample(visible, (8, 8)).sum()


def test_all_pairs_are_the_single_pairs_whatever_the_parts(tmp_path):
    """Against the model's own forward over every pair, by the callable that takes pairs."""
    similar = ImageTextSimilarity.load(grounders.save(grounders.clip, tmp_path), batch=2)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 56, 3)).astype(np.uint8)) for _ in range(3)]
    texts = ["cat", "a red door", "red", "a", "dog"]
    pairs = similar([image for image in images for _ in texts], texts * 3).reshape(3, 5)
    found = similar.all_pairs(images, texts)
    assert found.shape == (3, 5)
    assert found == pytest.approx(pairs, abs=1e-5)
    assert similar.all_pairs(images[:1], texts[:2]) == pytest.approx(pairs[:1, :2], abs=1e-5)
    assert similar.all_pairs(images[1:], texts[:2]) == pytest.approx(pairs[1:, :2], abs=1e-5)
    assert similar.all_pairs([], texts).shape == (0, 5)
    with pytest.raises(ValueError, match="give a concept in words"):
        similar.all_pairs(images, ["cat", " "])
