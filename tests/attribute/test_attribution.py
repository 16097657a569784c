"""Attribution against finite differences, a linear head worked by hand, completeness, and brute-force ablation."""

import math

import pytest
import torch
from models import llava_next
from torch.testing import assert_close

from lmm_sae_nb.attribute.attribution import Decision, decision, difference, exact, integrated, linear, separate_paths
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE

LAYER = 1


@pytest.fixture(scope="module")
def lmm():
    torch.manual_seed(0)
    return LMM(*llava_next())


@pytest.fixture(scope="module")
def sae(lmm):
    sae = TopKSAE(lmm.width, 40, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    sae.b_dec.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return sae


@pytest.fixture(scope="module")
def place(lmm, sae):
    return SAEInPlace(lmm, sae, LAYER)


@pytest.fixture(scope="module")
def choice(lmm):
    return decision(lmm, "why so ?", None, "y", "n")


def run_with(lmm, choice, change):
    with torch.no_grad(), lmm.spliced(LAYER, change):
        logits = lmm.logits(choice.prompt)[0, -1]
    return float(logits[choice.answer] - logits[choice.baseline])


def brute_force(lmm, sae, choice, token, slot, keep_error):
    """d with the latent minus d without it, by decoding densely in the hook."""

    def without(hidden, silence):
        x = hidden[0]
        mask = choice.prompt.mask("base", "tiles", "newline", "text")[0]
        z = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
        top = z.topk(sae.k)
        z = torch.zeros_like(z).scatter(1, top.indices, top.values)
        error = x - (z @ sae.W_dec + sae.b_dec) if keep_error else 0
        if silence:
            z[token, sae.encode(x).indices[token, slot]] = 0
        return torch.where(mask[:, None], z @ sae.W_dec + sae.b_dec + error, x)[None]

    return run_with(lmm, choice, lambda h: without(h, False)) - run_with(lmm, choice, lambda h: without(h, True))


@pytest.mark.parametrize("keep_error", [True, False])
def test_exact_is_ablation_by_definition(place, lmm, sae, choice, keep_error):
    values = exact(place, choice, keep_error=keep_error, batch=7)
    mask = choice.prompt.mask("text")[0]
    for token in mask.nonzero()[:3, 0].tolist():
        for slot in range(sae.k):
            expected = brute_force(lmm, sae, choice, token, slot, keep_error)
            if not math.isnan(float(values[token, slot])):
                assert float(values[token, slot]) == pytest.approx(expected, abs=2e-5)
    assert values[~mask].isnan().all()


@pytest.mark.parametrize("keep_error", [True, False])
def test_linear_is_the_derivative_of_scaling_each_latent(place, lmm, sae, choice, keep_error):
    """A small step of one latent's activation, both ways, moves d by value / activation times the step."""
    found = linear(place, choice, keep_error=keep_error)
    mask = choice.prompt.mask("text")[0]

    def d_with(token, latent, step):
        def change(hidden):
            x = hidden[0]
            x_hat = sae(x)
            out = torch.where(mask[:, None], x if keep_error else x_hat, x).clone()
            out[token] += step * sae.W_dec[latent]
            return out[None]

        return run_with(lmm, choice, change)

    for token in mask.nonzero()[-3:, 0].tolist():
        for slot in range(sae.k):
            act, latent = float(found.latents.acts[token, slot]), int(found.latents.indices[token, slot])
            slope = (d_with(token, latent, 1e-3) - d_with(token, latent, -1e-3)) / 2e-3
            assert float(found.values[token, slot]) == pytest.approx(act * slope, rel=5e-3, abs=1e-3)


def test_linear_parts_sum_to_the_slope_times_the_state(place, lmm, choice):
    found = linear(place, choice)
    mask = choice.prompt.mask("text")[0]
    states = lmm.hidden_states(choice.prompt, LAYER)[0].clone().requires_grad_()
    with lmm.spliced(LAYER, lambda hidden: states[None]):
        d = difference(lmm, choice)[0]
    (slope,) = torch.autograd.grad(d, states)
    expected = torch.where(mask, (slope * states.detach()).sum(-1), 0)
    assert_close(found.of_tokens() + found.error + found.bias, expected, atol=1e-5, rtol=1e-4)
    assert found.clean == pytest.approx(float(d.detach()), abs=1e-5)


def test_integrated_gradients_are_complete(place, lmm, sae, choice):
    """Latents and error sum to d(clean) - d(b_dec alone), the axiom of completeness."""
    found = integrated(place, choice, steps=64)
    mask = choice.prompt.mask("text")[0]
    empty = run_with(lmm, choice, lambda h: torch.where(mask[:, None], sae.b_dec, h[0])[None])
    assert float((found.of_tokens() + found.error).sum()) == pytest.approx(found.clean - empty, abs=2e-3)


def test_last_layer_decision_is_linear_up_to_the_norm(lmm, sae, choice):
    """At the last layer only the last token can matter."""
    found = linear(SAEInPlace(lmm, sae, lmm.n_layers - 1), choice)
    assert found.values[:-1].abs().max() < 1e-6


def test_subset_and_resume(place, lmm, choice, tmp_path):
    whole = exact(place, choice)
    some = torch.zeros_like(whole, dtype=torch.bool)
    some[-4:, :2] = True
    store = tmp_path / "ablations.safetensors"
    part = exact(place, choice, some, store=store)
    assert_close(part[some], whole[some], equal_nan=True)
    assert part[~some].isnan().all()
    assert_close(exact(place, choice, store=store), whole, equal_nan=True)
    other = decision(lmm, "and how ?", None, "y", "n")
    with pytest.raises(ValueError, match="another decision"):
        exact(place, other, store=store)


def test_totals_by_latent_and_map_agree_with_a_loop(place, sae, choice):
    found = linear(place, choice)
    latents, totals = found.of_latents()
    by_hand: dict[int, float] = {}
    for token in range(len(found.values)):
        for slot in range(sae.k):
            if found.latents.acts[token, slot] > 0:
                j = int(found.latents.indices[token, slot])
                by_hand[j] = by_hand.get(j, 0.0) + float(found.values[token, slot])
    assert set(latents.tolist()) == set(by_hand)
    for latent, total in zip(latents.tolist(), totals.tolist(), strict=True):
        assert total == pytest.approx(by_hand[latent], abs=1e-6)
        assert float(found.map_of(latent).sum()) == pytest.approx(total, abs=1e-6)
    assert (totals.diff() <= 0).all()


def test_answers_are_single_tokens(lmm):
    with pytest.raises(ValueError, match=r"'yes' is not one token .*\['y', 'e', 's'\]"):
        decision(lmm, "why ?", None, "yes", "n")
    with pytest.raises(ValueError, match="same token"):
        decision(lmm, "why ?", None, "y", "y")


def test_a_decision_is_about_one_prompt(place, lmm):
    two = Decision(lmm.prompt(["why ?", "how ?"]), 5, 6)
    with pytest.raises(ValueError, match="one prompt, not 2"):
        linear(place, two)


def test_no_pairs_give_no_values(place, choice):
    none = torch.zeros_like(linear(place, choice).values, dtype=torch.bool)
    assert exact(place, choice, none).isnan().all()
    assert separate_paths(place, choice, none).isnan().all()
