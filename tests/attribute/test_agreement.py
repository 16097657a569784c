"""Agreement against a count by hand, random pairs, timing;
the run from a token on in every family of models."""

import pytest
import torch
from models import make, noise, params
from torch.testing import assert_close

from lmm_sae_nb.attribute.agreement import agreement, measure_cost, random_pairs
from lmm_sae_nb.attribute.attribution import (
    Attribution,
    Decision,
    clamping,
    exact,
    greedy_decision,
    linear,
    separate_paths,
)
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import Latents, TopKSAE

LAYER = 1
KINDS = ("base", "tiles", "newline", "text")


@pytest.fixture(scope="module", params=params())
def case(request) -> tuple[SAEInPlace, Decision]:
    """A model of each family with an SAE, and a decision about an image."""
    place = in_place(request.param)
    return place, greedy_decision(place.lmm, "what is it ?", noise(60, 40))


def in_place(family: str) -> SAEInPlace:
    lmm = LMM(*make(family))
    sae = TopKSAE(lmm.width, 30, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    return SAEInPlace(lmm, sae, LAYER)


def few(parts: Attribution, mask, each: int = 2) -> torch.Tensor:
    """Pairs at the first, a middle and the last spliced token."""
    pairs, active = torch.zeros_like(parts.values, dtype=torch.bool), parts.latents.acts > 0
    tokens = mask.nonzero()[:, 0]
    for token in (tokens[0], tokens[len(tokens) // 2], tokens[-1]):
        pairs[token] = active[token] & (torch.arange(pairs.shape[1]) < each)
    return pairs


def test_running_again_from_a_token_is_running_all_of_it(case):
    place, choice = case
    lmm, sae = place.lmm, place.sae
    parts = linear(place, choice)
    mask = choice.prompt.mask(*KINDS)[0]
    pairs = few(parts, mask)
    found = exact(place, choice, pairs, batch=1)
    states = lmm.hidden_states(choice.prompt, LAYER)[0]

    def d(states):
        with torch.no_grad(), lmm.spliced(LAYER, lambda hidden: states[None]):
            logits = lmm.logits(choice.prompt)[0, -1]
        return float(logits[choice.answer] - logits[choice.baseline])

    for token, slot in pairs.nonzero().tolist():
        without = states.clone()
        without[token] -= parts.latents.acts[token, slot] * sae.W_dec[parts.latents.indices[token, slot]]
        assert float(found[token, slot]) == pytest.approx(d(states) - d(without), abs=5e-5)
    assert found[~pairs].isnan().all()


@pytest.mark.slow
def test_separate_paths_comes_to_ablation(case):
    place, choice = case
    pairs = few(linear(place, choice), choice.prompt.mask(*KINDS)[0])
    true = exact(place, choice, pairs)[pairs]
    found = separate_paths(place, choice, pairs, steps=24, batch=3)[pairs]
    assert_close(found, true, atol=2e-3 * float(true.abs().max()) + 5e-5, rtol=1e-2)


def test_the_models_own_decision_is_its_first_token_against_the_runner_up(case):
    place, choice = case
    with torch.no_grad():
        logits = place.lmm.logits(choice.prompt)[0, -1]
    assert logits[choice.answer] == logits.max()
    assert (logits > logits[choice.baseline]).sum() == 1


def table(values) -> Attribution:
    values = torch.tensor([values])
    return Attribution(
        Latents(values.abs(), torch.zeros_like(values, dtype=torch.long)), values, *values.new_zeros(2, 1), 0.0
    )


def test_agreement_by_hand():
    true = torch.tensor([[1.0, 2.0, -3.0, float("nan"), 4.0]])
    found = torch.tensor([[2.0, 1.0, 3.0, 9.0, 5.0]])  # ranks 2 3 1 4 against 2 1 3 4: differences 0 2 -2 0
    both = agreement(true, found)
    assert both.spearman == pytest.approx(1 - 6 * 8 / (4 * 15)) and both.sign == 0.75 and both.pairs == 4
    with pytest.raises(ValueError, match="2 pairs"):
        agreement(true, torch.tensor([[1.0, 2.0] + [float("nan")] * 3]))


def test_some_pairs_are_active_and_repeat_with_the_generator():
    parts = table([1.0, 0.0, -2.0, 3.0])
    chosen = random_pairs(parts, 2, torch.Generator().manual_seed(3))
    assert chosen.sum() == 2 and not chosen[0, 1]
    assert torch.equal(chosen, random_pairs(parts, 2, torch.Generator().manual_seed(3)))
    assert random_pairs(parts, 99, torch.Generator()).tolist() == [[True, False, True, True]]
    among = torch.tensor([[True, True, False, False]])
    assert random_pairs(parts, 2, torch.Generator(), among).tolist() == [[True, False, False, False]]


def test_at_the_last_layer_pairs_of_the_last_token_alone_are_drawn():
    lmm = LMM(*make("picture_world"))
    sae = TopKSAE(lmm.width, 30, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    place = SAEInPlace(lmm, sae, lmm.n_layers - 1)
    choice = greedy_decision(lmm, "what is it ?", noise(60, 40))
    parts = linear(place, choice)
    drawn = random_pairs(parts, 10_000, torch.Generator())
    assert drawn[-1].sum() == (parts.latents.acts[-1] > 0).sum() > 0 and not drawn[:-1].any()


def test_the_cost_ratio_is_in_forwards():
    place = in_place("picture_world")
    cost = measure_cost(place, greedy_decision(place.lmm, "why ?", noise()), repetitions=2)
    assert cost["cost_ratio"] == cost["linear_seconds"] / cost["forward_seconds"] > 0


def test_clamping_adds_up_values_less_activations_times_the_slope():
    """Against the gradient in a dense z, tokens chosen or not."""
    place = in_place("picture_world")
    lmm, sae = place.lmm, place.sae
    choice = greedy_decision(lmm, "why ?", noise())
    mask = choice.prompt.mask(*KINDS)[0]
    x = lmm.hidden_states(choice.prompt, LAYER)[0, mask]
    latents = sae.encode(x)
    z = torch.zeros(len(x), 30).scatter(1, latents.indices, latents.acts).requires_grad_()
    states = z @ sae.W_dec + sae.b_dec + (x - sae.decode(latents))
    with lmm.spliced(LAYER, lambda hidden: hidden.masked_scatter(mask[None, :, None], states)):
        logits = lmm.last_logits(choice.prompt)[0]
    (slope,) = torch.autograd.grad(logits[choice.answer] - logits[choice.baseline], z)
    values = torch.linspace(0, 3, 30)
    change = (values - z.detach()) * slope
    assert_close(clamping(place, choice, values), change.sum(0), atol=1e-4, rtol=1e-3)
    text = choice.prompt.mask("text")[0]
    assert_close(clamping(place, choice, values, text), change[text[mask]].sum(0), atol=1e-4, rtol=1e-3)
    for wrong in (values[:4], values / 0):
        with pytest.raises(ValueError, match="give a finite one for each of 30 latents"):
            clamping(place, choice, wrong)
