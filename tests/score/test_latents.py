"""Which latents are scored, and the whole path from exemplars to scores."""

import numpy as np
import pytest
from models import make, noise
from PIL import Image
from scored import CONCEPTS, label_maps

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.interpret.exemplars import exemplars
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.score.latents import explained_latents, sample_by_kind, score_latents
from lmm_sae_nb.score.scores import Column, Explained
from lmm_sae_nb.score.tables import kind_tables, score_metrics
from lmm_sae_nb.truth.label_maps import LabelMaps


def test_only_what_is_explained_is_scored():
    truth = LabelMaps([label_maps()], CONCEPTS)
    old = {3: {"concept": "dog"}, 1: {"concept": "cat"}, 2: {"concept": None}, 4: {"concept": "unicorn"}}
    assert explained_latents(old, truth) == {1: ("cat", "object"), 3: ("dog", "object")}
    assert list(explained_latents(old)) == [1, 3, 4]
    new = {
        "5": {"outcome": "explained", "concept": "happy", "kind": "word"},
        "6": {"outcome": "failed", "concept": "cat", "kind": "object"},
        "7": {"outcome": "explained", "concept": "a red door", "kind": "part"},
        "8": {"outcome": "refused", "concept": None, "kind": None},
        "9": {"outcome": "explained", "concept": "cat", "kind": "object"},
    }
    assert explained_latents(new, truth) == {5: ("happy", "word"), 9: ("cat", "object")}
    assert explained_latents(new)[7] == ("a red door", "part")
    for few in ({}, {1: {"concept": None}}, {1: {"concept": "cat"}, 2: {"concept": "unicorn"}}):
        with pytest.raises(ValueError, match="03_interpret_features"):
            explained_latents(few, truth)


def test_few_of_many_latents_are_drawn_at_random_and_stay_in_order():
    rows = {n: {"concept": f"c{n}", "kind": "object"} for n in range(50)}
    found = list(explained_latents(rows, most=10, seed=3))
    assert len(set(found)) == 10
    assert found != list(explained_latents(rows, most=10, seed=4))
    assert explained_latents(rows, most=50) == explained_latents(rows)


def test_as_many_latents_of_each_kind_are_drawn():
    explained = {n: Explained(f"c{n}", ("object", "colour")[n > 11]) for n in range(15)}
    found = sample_by_kind(explained, 4)
    assert [sum(explained[n].kind == kind for n in set(found)) for kind in ("object", "colour")] == [4, 3]


def test_an_image_set_of_one_is_its_own_chance(tmp_path):
    """Every random image is the latent's own image, so chance is the score and the ratio is 1."""
    lmm = LMM(*make("picture_world"))
    place = SAEInPlace(lmm, TopKSAE(lmm.width, 24, 3).requires_grad_(False), 1)
    pictures = [noise(192, 192)]
    cache = cache_activations(place, pictures, n_top=5, folder=tmp_path)
    explained = {int(n): Explained(("cat", "dog")[i], "object") for i, n in enumerate(cache.live.nonzero()[:2, 0])}
    own = {n: exemplars(cache, pictures, n) for n in explained}
    assert [len(found) for found in own.values()] == [1, 1]
    everywhere = {"truth": lambda indices, concept: [np.ones((1, 192, 192), bool)] * len(indices)}
    half = lambda images, texts: np.full((len(images), len(texts)), 0.5)  # noqa: E731
    scores = score_latents(place, pictures, own, explained, everywhere, half, n_top=2, random_runs=3, clip_runs=2)
    assert scores.columns == [
        Column("iou", "paper"), Column("iou", "strict"), Column("clip", "paper"), Column("clip", "strict"),
    ]  # fmt: skip
    for n in explained:
        assert scores[Column("iou", "strict")][n].score == own[n][0].visible.mean()
        assert scores[Column("iou", "strict")][n].random == (own[n][0].visible.mean(),) * 3
        assert scores[Column("clip", "paper")][n].random == (50, 50)
    metrics = score_metrics(scores, kind_tables(scores))
    assert [metrics["iou_strict_ratio"], metrics["iou_paper_ratio"]] == pytest.approx([1, 1])


def test_unreadable_images_are_not_drawn(tmp_path):
    class Broken(list):
        def __getitem__(self, index):
            if index == 1:
                raise OSError("damaged")
            return super().__getitem__(index)

    lmm = LMM(*make("picture_world"))
    place = SAEInPlace(lmm, TopKSAE(lmm.width, 24, 3).requires_grad_(False), 1)
    pictures = [noise(192, 192)]
    cache = cache_activations(place, pictures, n_top=5, folder=tmp_path)
    live = [int(n) for n in cache.live.nonzero()[:2, 0]]
    own = {n: exemplars(cache, pictures, n) for n in live}
    explained = {n: Explained(f"c{n}", "object") for n in live}
    nowhere = {"truth": lambda indices, concept: [np.zeros((0, 192, 192), bool)] * len(indices)}
    broken = Broken([*pictures, Image.new("RGB", (192, 192))])
    scores = score_latents(place, broken, own, explained, nowhere, n_top=2, random_runs=8, skipped={1})
    assert scores.columns == [Column("iou", "paper"), Column("iou", "strict")]
    with pytest.raises(OSError, match="damaged"):
        score_latents(place, broken, own, explained, nowhere, n_top=2, random_runs=8)
