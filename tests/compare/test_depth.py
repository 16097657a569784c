"""What changes with depth, against hooks, single questions and all pairs."""

import pytest
import torch
from models import make, noise
from scipy.stats import spearmanr

from lmm_sae_nb.attribute.attribution import exact, greedy_decision, linear
from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.compare import depth
from lmm_sae_nb.compare.depth import SteeredLatent, effect_of_image_tokens, rank_agreement, steer_objects
from lmm_sae_nb.compare.report import depth_metrics
from lmm_sae_nb.compare.saes import CachedSAE
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.score.scores import Explained
from lmm_sae_nb.steer.steering import Edit, Scope, answers

SAMPLES = [{"image": image, "question": "why ?"} for image in (None, noise(seed=1), noise(seed=2))]


@pytest.fixture(scope="module")
def place() -> SAEInPlace:
    lmm = LMM(*make("picture_world"))
    sae = TopKSAE(lmm.width, 30, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    return SAEInPlace(lmm, sae, 1)


@pytest.fixture(scope="module")
def study(place, tmp_path_factory) -> CachedSAE:
    images = [noise(96, 96, seed=n) for n in range(3)]
    return CachedSAE(place, cache_activations(place, images, n_top=2, folder=tmp_path_factory.mktemp("cache")))


def test_image_tokens_matter_up_to_the_last_layer_where_nothing_reads_them(place):
    lmm = place.lmm
    changes = effect_of_image_tokens(lmm, SAMPLES[1], range(lmm.n_layers))
    assert changes[lmm.n_layers - 1] == 0

    prompt = lmm.prompt("why ?", SAMPLES[1]["image"])
    pixels = ~prompt.mask("text", "special", "pad")
    clean = lmm.model(**prompt.inputs).logits[:, -1]

    def erase(module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[pixels] = 0
        return output

    with torch.no_grad():
        hook = lmm.layer(0).register_forward_hook(erase)
        erased = lmm.model(**prompt.inputs).logits[:, -1]
        hook.remove()
    assert changes[0] == pytest.approx(float((erased - clean).abs().max()), rel=1e-4)
    assert changes[0] > 0


def test_objects_alone_are_clamped_each_by_itself(study):
    live = study.live_latents(0)[:4]
    explained = {
        n: Explained(f"thing{n}", kind) for n, kind in zip(live, ["object", "colour", "object", "object"], strict=True)
    }
    how = {"question": "what ?", "dose": 3.0, "kinds": ["base"], "image_size": 192, "seed": 0}
    steered = steer_objects(study, explained, n_latents=2, **how)
    assert len(steered) == 2
    assert {each.latent for each in steered} < {live[0], live[2], live[3]}
    white = noise(192, 192).point(lambda value: 255)
    for each in steered:
        edit = Edit(each.latent, 3.0 * float(study.cache.max[each.latent]))
        (alone,) = answers(study.place, "what ?", white, [[edit]], Scope(("base",)), max_new_tokens=24)
        assert (each.concept, each.answer) == (f"thing{each.latent}", alone)
    assert len(steer_objects(study, explained, n_latents=9, **how)) == 3


def test_an_answer_names_its_concept_as_a_word():
    assert SteeredLatent(1, "cat", "I see two cats.").named
    assert not SteeredLatent(1, "cat", "I see a category.").named


@pytest.mark.slow
def test_ranks_over_all_pairs_are_spearman_s_and_samples_without_an_image_are_left_out(place):
    ranks = rank_agreement({"one": place}, SAMPLES, decisions=2, pairs=10**6)
    by_hand = []
    for sample in SAMPLES[1:]:
        choice = greedy_decision(place.lmm, sample["question"], sample["image"])
        approximation = linear(place, choice)
        active = approximation.latents.acts > 0
        ablated = exact(place, choice, active)
        by_hand.append(spearmanr(ablated[active], approximation.values[active]).statistic)
    assert ranks["one"] == pytest.approx(by_hand, abs=1e-3)


def test_the_same_seed_draws_the_same_pairs(place):
    draws = [rank_agreement({"one": place}, SAMPLES, decisions=1, pairs=5, seed=n)["one"] for n in (3, 3, 4)]
    assert draws[0] == pytest.approx(draws[1], abs=1e-6)


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_a_decision_whose_effects_are_all_equal_has_no_rank_and_is_left_out(place, monkeypatch):
    monkeypatch.setattr(depth, "exact", lambda place, choice, pairs: pairs.float() * 0)
    assert rank_agreement({"one": place}, SAMPLES, decisions=2, pairs=5) == {"one": []}
    assert depth_metrics({"one": []}, {"one": []}) == {}
