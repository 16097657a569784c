"""Explaining and scoring one SAE, with models that answer by a rule."""

import numpy as np
import pytest
import torch
from models import make, noise
from pydantic import TypeAdapter

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.compare.saes import CachedSAE
from lmm_sae_nb.compare.scored import ScoredSAE, explain_and_score, explain_some
from lmm_sae_nb.interpret.explain import Explanation
from lmm_sae_nb.interpret.explainers import Outcome
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.score.scores import Column

pytestmark = pytest.mark.usefixtures("unchecked")  # for its stand-ins

IMAGES = [noise(96, 96, seed=n) for n in range(5)]


class Rule:
    """An interpreter that explains even latents, refuses odd ones, and notes whom it was asked about."""

    def __init__(self):
        self.asked: list[int] = []

    def explain_enough(self, exemplars, latents, enough, at_once=16):
        rows = {}
        for latent in latents:
            assert len(exemplars[latent])
            self.asked.append(latent)
            named = (
                (Outcome.EXPLAINED, f"thing {latent % 4}", "object")
                if latent % 2 == 0
                else (Outcome.REFUSED, None, None)
            )
            rows[latent] = Explanation(*named, "an answer")
            if sum(row.outcome is Outcome.EXPLAINED for row in rows.values()) == enough:
                break
        return rows


def everywhere(indices, concept):
    """A segmenter that finds every concept in the left half of every image."""
    mask = np.zeros((1, 96, 96), bool)
    mask[:, :, :48] = True
    return [mask] * len(indices)


def all_pairs(images, texts):
    return np.full((len(images), len(texts)), 0.25, np.float32)


def study(family, folder) -> CachedSAE:
    lmm = LMM(*make(family))
    sae = TopKSAE(lmm.width, 40, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    place = SAEInPlace(lmm, sae, 1)
    return CachedSAE(place, cache_activations(place, IMAGES, n_top=2, folder=folder))


def scored(one: CachedSAE) -> ScoredSAE:
    how = {"n_explained": 4, "n_top": 2, "random_runs": 3, "clip_runs": 2}
    return explain_and_score(one, IMAGES, Rule(), None, {"half": everywhere}, all_pairs, **how)


@pytest.fixture(scope="module")
def patches(tmp_path_factory) -> CachedSAE:
    return study("picture_world", tmp_path_factory.mktemp("patches"))


def test_live_latents_are_asked_in_random_order_until_enough_are_explained(patches):
    rule = Rule()
    rows = explain_some(patches, IMAGES, rule, enough=2, n_top=2, seed=3)
    assert rule.asked == patches.live_latents(3)[: len(rule.asked)] == list(rows)
    assert sum(row["outcome"] == "explained" for row in rows.values()) == 2


def test_every_explained_latent_has_the_iou_of_its_active_patches_by_hand(patches):
    result = scored(patches)
    explained = [latent for latent, row in result.explanations.items() if row["outcome"] == "explained"]
    assert sorted(result.scores.explained) == sorted(explained)
    left = np.zeros((96, 96), bool)
    left[:, :48] = True
    for latent in explained:
        values = []
        for exemplar in patches.exemplars(IMAGES, n_top=2)[latent]:
            on = np.kron(exemplar.activation > 0.25 * exemplar.activation.max(), np.ones((8, 8), bool))
            values.append((on & left).sum() / (on | left).sum())
        assert result.scores[Column("iou", "strict")][latent].score == pytest.approx(np.mean(values))
        assert result.scores[Column("clip", "paper")][latent].score == pytest.approx(25)


def test_a_model_without_patches_has_a_clip_score_alone(tmp_path):
    assert scored(study("instructblip", tmp_path)).scores.columns == [Column("clip", "paper")]


def test_the_result_is_read_back_from_json_as_it_was(patches):
    kind, result = TypeAdapter(ScoredSAE), scored(patches)
    assert kind.validate_json(kind.dump_json(result)) == result
