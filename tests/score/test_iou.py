"""IoU of latents against counting by hand, and against the segmenters' own answers."""

import grounders
import numpy as np
import pytest
import torch
from models import make, noise
from PIL import Image

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.score.iou import latent_iou, maps_on, score_ious
from lmm_sae_nb.score.latents import explained_latents
from lmm_sae_nb.score.masks import PAPER, STRICT, ActivationMap, activation_mask, iou
from lmm_sae_nb.score.scores import Column, Comparison, Explained
from lmm_sae_nb.score.segmenters import BoxSegmenter, PromptedSegmenter, SegmentedImages, open_segmenters
from lmm_sae_nb.truth.accuracy import other_names

MODES = pytest.mark.parametrize("mode", [PAPER, STRICT], ids=lambda mode: mode.name)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Segmenters of the true classes, with random weights, on disk."""
    folder = tmp_path_factory.mktemp("models")
    makes = (grounders.clipseg, grounders.grounding_dino, grounders.sam)
    return {make.__name__: str(grounders.save(make, folder / make.__name__)) for make in makes}


@MODES
def test_a_latents_scores_by_hand(mode):
    everywhere, nowhere = np.ones((4, 4), np.float32), np.zeros((4, 4), np.float32)
    left = np.zeros((1, 8, 8), bool)
    left[..., :4] = True
    masks = {"cat": left, "dog": ~left, "nothing": left[:0]}
    own = [ActivationMap(0, (8, 8), everywhere)] * 2
    random = [ActivationMap(1, (8, 8), part) for part in (everywhere, nowhere, nowhere, nowhere)]
    find = lambda indices, concept: [masks[concept]] * len(indices)  # noqa: E731
    found = latent_iou(own, random, "cat", "nothing", find, mode, runs=2)
    assert found == Comparison(score=0.5, random=(0.25, 0.0), area=0.5, shuffled=0.0)
    alone = latent_iou(own[:1], random, "cat", None, find, mode, runs=4)
    assert (alone.score, alone.shuffled) == (0.5, None)
    with pytest.raises(ValueError, match="no exemplars"):
        latent_iou([], random, "cat", None, find, mode, runs=2)
    with pytest.raises(ValueError, match="4 random images cannot be divided among 3 runs"):
        latent_iou(own, random, "cat", None, find, mode, runs=3)


def test_maps_on_images_are_each_latents_activations_there():
    """By eq. 1, an image at a time."""
    lmm = LMM(*make("picture_world"))
    sae, pictures = TopKSAE(lmm.width, 24, 3), [noise(192, 192, seed) for seed in range(3)]
    found = maps_on(SAEInPlace(lmm, sae, 1), pictures, [5, 11], [2, 0, 2])
    for latent, maps in found.items():
        assert [seen.image_index for seen in maps] == [2, 0, 2]
        for seen in maps:
            prompt = lmm.prompt("", pictures[seen.image_index])
            x = lmm.hidden_states(prompt, 1)[0, prompt.spans[0].where("base")]
            z = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
            kept = torch.where(z >= z.topk(3).values[:, -1:], z, 0)[:, latent].reshape(lmm.grid).detach()
            np.testing.assert_allclose(seen.activation, kept, atol=1e-4)
            assert seen.size == (192, 192)


def test_every_latent_is_scored_in_every_mode_by_every_segmenter():
    full, half = np.ones((1, 8, 8), bool), np.ones((1, 8, 8), bool)
    half[..., 4:] = False
    own = ActivationMap(0, (8, 8), np.ones((4, 4), np.float32))
    silent = ActivationMap(1, (8, 8), np.zeros((4, 4), np.float32))
    segmenters = {"truth": lambda n, c: [full] * len(n), "other": lambda n, c: [half] * len(n)}
    explained = {7: Explained("cat", "object"), 3: Explained("dog", "object")}
    found = score_ious(lambda n: ([own], [own, silent]), explained, {7: "dog", 3: None}, segmenters, runs=2)
    assert list(map(str, found)) == ["iou_paper", "iou_paper_other", "iou_strict", "iou_strict_other"]
    assert found[Column("iou", "strict")][7] == Comparison(1, (1, 0), 1, 1)
    assert found[Column("iou", "paper", "other")][3] == Comparison(0.5, (0.5, 0), 0.5, None)


def test_photographs_without_ground_truth_are_scored_by_real_segmenters(models):
    """By hand from the segmenters' own answers: the union, or the mask of the highest score."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 56, 3)).astype(np.uint8)) for _ in range(3)]
    rows = {1: {"outcome": "explained", "concept": "a cat", "kind": "object"},
            2: {"outcome": "explained", "concept": "red", "kind": None}}  # fmt: skip
    explained = explained_latents(rows)
    real = {
        "": BoxSegmenter.load(models["grounding_dino"], models["sam"], threshold=0.0),
        "clipseg": PromptedSegmenter.load(models["clipseg"], threshold=0.4),
    }
    maps = {n: [ActivationMap(i, (56, 40), rng.random((4, 5)).astype(np.float32)) for i in range(3)] for n in explained}
    segmenters = {name or "sam": SegmentedImages(segmenter, images) for name, segmenter in real.items()}
    found = score_ious(lambda n: (maps[n], maps[n][::-1]), explained, other_names(explained), segmenters, runs=3)
    for name, segmenter in real.items():
        for n, (concept, _) in explained.items():
            answers = segmenter(images, [concept] * 3)
            for mode in (PAPER, STRICT):
                masks = [
                    one.masks.any(0) if mode is PAPER or not len(one.masks) else one.masks[one.scores.argmax()]
                    for one in answers
                ]
                by_hand = [iou(activation_mask(at, mode), mask) for at, mask in zip(maps[n], masks, strict=True)]
                comparison = found[Column("iou", mode.name, name)][n]
                assert comparison.score == pytest.approx(np.mean(by_hand), abs=1e-6)
                assert comparison.random == pytest.approx(by_hand[::-1], abs=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_segmenters_are_opened_by_name_the_truth_first(models):
    images, truth = [Image.new("RGB", (40, 56))], lambda indices, concept: []
    assert list(open_segmenters(truth, "", "", images)) == ["ground truth"]
    assert list(open_segmenters(truth, models["clipseg"], "", images, "cpu")) == ["ground truth", "clipseg"]
    (sam,) = open_segmenters(None, models["sam"], models["grounding_dino"], images, "cpu").values()
    assert sam([0], "cat")[0].shape[1:] == (56, 40)
    with pytest.raises(ValueError, match="neither a ground truth nor a segmenter"):
        open_segmenters(None, "", "", images)
