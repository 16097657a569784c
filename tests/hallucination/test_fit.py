"""The fit of a clamp: its states against `steered_states`, its gradients against differences, and that it cures."""

import pytest
import torch
from models import noise

from lmm_sae_nb.hallucination.answers import Push, Shift, first_tokens, strength
from lmm_sae_nb.hallucination.cases import Case, answer_questions
from lmm_sae_nb.hallucination.fit import ASKED, Batch, Fit, FitSettings, fit
from lmm_sae_nb.steer.steering import Edit, steered

QUESTIONS = ("why ?", "how ?", "and how is it so ?", "a b c d ?")
EDITS = (Edit(3, 30.0), Edit(7, 0.0))


def cases(right: str = "n", tempting: str = "y") -> list[Case]:
    return [Case(noise(40, 40, n), question, right, tempting, True) for n, question in enumerate(QUESTIONS)]


@pytest.mark.parametrize("keep_error", [True, False])
def test_a_batch_answers_as_the_steered_model_does(place, keep_error):
    batch = Batch(place, cases(), ASKED, spare=4, keep_error=keep_error)
    latents, values = torch.tensor([3, 7]), torch.tensor([30.0, 0.0])
    with torch.no_grad():
        logits = batch.logits(batch.clamp(latents, values))
        untouched = place.lmm.last_logits(batch.upper.prompt)
    torch.testing.assert_close(batch.untouched, untouched, atol=1e-4, rtol=1e-4)
    for row, case in zip(logits, cases(), strict=True):
        prompt = place.lmm.prompt(case.question, case.image)
        with torch.no_grad(), steered(place, prompt, EDITS, ASKED, keep_error=keep_error):
            torch.testing.assert_close(row, place.lmm.last_logits(prompt)[0], atol=1e-4, rtol=1e-4)


def test_the_gradient_of_a_value_is_that_of_finite_differences(place):
    batch = Batch(place, cases(), ASKED, spare=4)
    latents, values = torch.tensor([3, 7]), torch.tensor([30.0, 20.0], requires_grad=True)
    batch.logits(batch.clamp(latents, values))[:, 5].sum().backward()
    with torch.no_grad():
        for n in range(2):
            step = torch.zeros(2).index_fill(0, torch.tensor(n), 0.5)
            ends = [batch.logits(batch.clamp(latents, values + sign * step))[:, 5].sum() for sign in (1, -1)]
            assert float(values.grad[n]) == pytest.approx(float(ends[0] - ends[1]), rel=0.05, abs=1e-3)


@pytest.mark.slow
def test_a_fitted_clamp_raises_the_margins_it_was_fitted_to(place):
    wrong, others = cases(), answer_questions(place.lmm, [{"image": noise(40, 40, 9), "question": "what ?"}])
    found = fit(place, wrong, [], others, settings=FitSettings(rounds=2, each=3, refits=10, direction_steps=10))
    assert sorted(found.clamps) == [3, 6] and len({edit.latent for edit in found.clamps[6]}) == 6
    assert all(edit.value >= 0 for edit in found.clamps[6])
    settings = [None, *found.clamps.values(), Shift(tuple(found.direction))]
    margin = first_tokens(place, wrong, settings, ASKED).margin.mean(1)
    assert bool((margin[1:] > margin[0]).all())


def test_without_wrong_cases_nothing_is_fitted(place):
    assert fit(place, [], cases()) == Fit({}, [])
    assert strength(place, [], EDITS, ASKED) == 0


def test_a_push_is_as_long_as_the_change_of_its_clamp(place):
    prompt = place.lmm.prompt(cases()[0].question, cases()[0].image)
    chosen = ASKED.of_prompt(prompt)[0]
    clean = place.lmm.hidden_states(prompt, place.layer)[0]
    with torch.no_grad(), steered(place, prompt, EDITS, ASKED, keep_error=True):
        clamped = place.lmm.hidden_states(prompt, place.layer)[0]
    lengths = (clamped - clean)[chosen].norm(dim=-1)
    assert strength(place, cases()[:1], EDITS, ASKED) == pytest.approx(float(lengths.mean()), rel=1e-3)
    push = Push(EDITS, seed=2)
    margins = first_tokens(place, cases()[:1], [None, push, Push(EDITS, seed=3), push], ASKED).margin[:, 0]
    assert margins[1] == margins[3] and margins[1] != margins[2] and margins[1] != margins[0]
