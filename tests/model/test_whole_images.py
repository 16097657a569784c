"""The path of notebooks 02 to 04 for a model without a patch grid: whole images, CLIP score, and no IoU."""

from functools import partial

import numpy as np
import pytest
from models import make, noise
from PIL import Image

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.interpret.exemplars import Exemplar, ExemplarsByLatent, exemplars
from lmm_sae_nb.interpret.explain import as_rows, explain_enough, explain_latents
from lmm_sae_nb.interpret.explainers import Answer, Outcome
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.token_kinds import NoPatchGrid
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.score.clip import latents_clip
from lmm_sae_nb.score.iou import maps_on
from lmm_sae_nb.score.latents import explained_latents
from lmm_sae_nb.score.masks import PAPER, STRICT, exemplar_maps
from lmm_sae_nb.show import plots
from lmm_sae_nb.show.rater import Rater
from lmm_sae_nb.truth.accuracy import other_names
from lmm_sae_nb.truth.label_maps import LabelMaps
from lmm_sae_nb.truth.responses import common_concept

LAYER = 1


@pytest.fixture(scope="module")
def lmm():
    return LMM(*make("instructblip"))


@pytest.fixture(scope="module")
def pictures():
    return [noise(seed=seed) for seed in range(6)]


@pytest.fixture(scope="module")
def sae(lmm):
    return TopKSAE(lmm.width, 12, 3)


@pytest.fixture(scope="module")
def cache(lmm, sae, pictures, tmp_path_factory):
    return cache_activations(SAEInPlace(lmm, sae, LAYER), pictures, folder=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def live(cache):
    return [latent for latent in range(cache.n_latents) if len(cache.top(latent)) > 2]


def test_exemplars_are_whole_images_in_the_cache_s_order(cache, pictures, live):
    for latent in live:
        found = exemplars(cache, pictures, latent, n_top=3)
        assert [one.image_index for one in found] == [number for number, _ in cache.top(latent)[:3]]
        for one in found:
            assert one.activation is None and one.visible is None
            assert np.array_equal(np.asarray(one.masked), np.asarray(pictures[one.image_index]))


def test_the_explainer_gets_whole_images_and_the_clip_score_compares_them(cache, pictures, live):
    """CLIP score by hand: the mean over a latent's images of 100 times the cosine, 0 where that is negative."""
    shown, heard = ExemplarsByLatent(cache, pictures, n_top=3), []

    def explain(sets):
        heard.extend(list(images) for images in sets)
        return [Answer(Outcome.EXPLAINED, f"concept {n % 2}", "") for n in range(len(heard))]

    refine = lambda texts: [Answer(Outcome.EXPLAINED, text, text) for text in texts]  # noqa: E731
    ask = partial(explain_latents, explain=explain, refine=refine, label=lambda names: ["object"] * len(names))
    rows = as_rows(explain_enough(live, shown, ask, enough=len(live), at_once=len(live)))
    for latent, images in zip(live, heard, strict=True):
        assert [image.tobytes() for image in images] == [one.image.tobytes() for one in shown[latent]]

    def similar(images, texts):
        return np.array([[np.asarray(image).mean() / 255 * (-1) ** len(text) for text in texts] for image in images])

    explained = explained_latents(rows)
    others = other_names(explained)
    found = latents_clip(similar, shown, explained, others, PAPER, pictures[:4], runs=2)
    for latent, score in found.items():
        sign = (-1) ** len(explained[latent].concept)
        values = [np.asarray(one.image).mean() / 255 * sign for one in shown[latent]]
        assert score.score == pytest.approx(100 * np.maximum(values, 0).mean())
        assert len(score.random) == 2
    with pytest.raises(NoPatchGrid, match="no IoU; take the CLIP score in the mode 'paper'"):
        latents_clip(similar, shown, explained, others, STRICT, pictures[:4], runs=2)


def test_an_iou_is_refused_with_the_reason(lmm, sae, cache, pictures, live):
    found = exemplars(cache, pictures, live[0])
    with pytest.raises(NoPatchGrid, match="whole images, of a model without a patch grid .*there is .*no IoU"):
        exemplar_maps(found)
    with pytest.raises(NoPatchGrid, match="no patch grid, so there are no maps"):
        maps_on(SAEInPlace(lmm, sae, LAYER), pictures, live, [0, 1])
    labels = {"object": Image.new("L", (100, 60))}
    masks = LabelMaps([labels] * len(pictures), {"object": ["ball"]})
    with pytest.raises(NoPatchGrid, match="no region to mask"):
        masks.in_common(found)
    with pytest.raises(NoPatchGrid, match="no region to mask"):
        common_concept(masks, found)


def test_figures_and_the_rater_show_whole_images(cache, pictures, live, tmp_path):
    shown = ExemplarsByLatent(cache, pictures, n_top=3)
    masked = Exemplar(0, pictures[0], np.ones((2, 2), np.float32), np.ones((2, 2), bool))
    axes = plots.exemplar_strip([("whole", shown[live[0]]), ("masked", [masked]), ("whole", shown[live[1]])])
    assert [len(ax.get_images()) for ax in axes[:, 0]] == [1, 2, 1, 1]
    assert [ax.get_title("left") for ax in axes[:, 0]] == ["whole", "masked", "", "whole"]
    rater = Rater(tmp_path / "ratings.jsonl", {live[0]: {"concept": "ball", "kind": "object"}}, shown)
    assert rater.picture(live[0])[:4] == b"RIFF"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("enough", "asked"), [(0, 4), (2, 4), (3, 8), (9, 10)])
def test_no_more_latents_are_asked_about_than_give_enough(enough, asked):
    """Every other latent is explained; four are asked about at once, ten there are."""
    batches = []

    def ask(shown):
        batches.append(list(shown))
        explain = lambda sets: [Answer(list(Outcome)[s[0].masked % 2], "a", "") for s in sets_of]  # noqa: E731
        sets_of = list(shown.values())
        refine = lambda texts: [Answer(Outcome.EXPLAINED, text, text) for text in texts]  # noqa: E731
        return explain_latents(shown, explain, refine, lambda names: [None] * len(names))

    class Seen:
        def __init__(self, number):
            self.masked = number

    found = explain_enough(range(10), {latent: [Seen(latent)] for latent in range(10)}, ask, enough, at_once=4)
    assert list(found) == list(range(asked))
    assert [len(batch) for batch in batches] == [4, 4, 2][: -(-asked // 4)]
