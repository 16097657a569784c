"""Answers under many settings side by side, against one run for each."""

import pytest
import torch
from models import noise
from torch.testing import assert_close

from lmm_sae_nb.attribute.attribution import decision
from lmm_sae_nb.hallucination.answers import first_tokens, unchanged
from lmm_sae_nb.hallucination.cases import Case, answer_questions
from lmm_sae_nb.pictureworld.world.scenes import VALIDATION, make_scene
from lmm_sae_nb.steer.steering import Edit, Scope, steered

QUESTIONS = ("why ?", "and how is it so ?", "how ?", "who ?", "why ?")  # some equally long, some not
SIZES = ((40, 40), (40, 40), (40, 40), (40, 40), (90, 40))
CASES = [
    Case(noise(*size, n), question, *("yn" if n % 2 else "ny"), bool(n))
    for n, (question, size) in enumerate(zip(QUESTIONS, SIZES, strict=True))
]


@pytest.mark.parametrize("keep_error", [True, False])
def test_answers_side_by_side_are_those_of_one_run_each(place, keep_error):
    settings = [None, (), (Edit(3, 4.0),), (Edit(5, 2.0), Edit(7, 0.0))]
    scope = Scope(("text",))
    answers = first_tokens(place, CASES, settings, scope, keep_error=keep_error, at_once=3)
    for n, case in enumerate(CASES):
        choice = decision(place.lmm, case.question, case.image, case.right, case.tempting)
        for s, edits in enumerate(settings):
            with torch.no_grad():
                if edits is None:
                    logits = place.lmm.last_logits(choice.prompt)[0]
                else:
                    with steered(place, choice.prompt, edits, scope, keep_error=keep_error):
                        logits = place.lmm.last_logits(choice.prompt)[0]
            assert_close(answers.margin[s, n], logits[choice.answer] - logits[choice.baseline], atol=1e-5, rtol=1e-4)
            assert int(answers.token[s, n]) == int(logits.argmax())
            assert bool(answers.right[s, n]) == (int(logits.argmax()) == choice.answer)


def test_questions_about_one_image_are_answered_as_each_alone(place):
    pictures = [noise(90, 70, n) for n in (0, 1)]
    asked = ("why ?", "how ?", "who ?", "why ?")
    cases = [Case(pictures[n % 2].copy(), question, "y", "n", True) for n, question in enumerate(asked * 2)]
    settings = [None, (Edit(3, 30.0),), (Edit(5, 20.0),), ()]
    scopes = [Scope(), Scope(("text",)), Scope(("base",)), Scope()]
    together = first_tokens(place, cases, settings, scopes)
    for n, case in enumerate(cases):
        alone = first_tokens(place, [case], settings, scopes)
        assert_close(together.margin[:, n], alone.margin[:, 0], atol=1e-5, rtol=1e-4)
        assert torch.equal(together.token[:, n], alone.token[:, 0])


def test_each_setting_can_have_tokens_of_its_own(place):
    clamp, scopes = (Edit(3, 30.0),), [Scope(("text",)), Scope(("base",)), Scope(("base", "text"))]
    together = first_tokens(place, CASES, [None, *[clamp] * 3], [Scope(), *scopes])
    for n, scope in enumerate(scopes):
        alone = first_tokens(place, CASES, [None, clamp], scope, at_once=1)
        assert_close(together.margin[[0, 1 + n]], alone.margin, atol=1e-5, rtol=1e-4)
        assert torch.equal(together.token[[0, 1 + n]], alone.token)


def test_settings_that_change_nothing_answer_as_the_untouched_model(place):
    alone = first_tokens(place, CASES, [None])
    nothing = first_tokens(place, CASES, [None, (), (Edit(3, 0.0, "add"),)], keep_error=True)
    for margin in nothing.margin:
        assert_close(margin, alone.margin[0], atol=1e-5, rtol=1e-4)


def test_an_answer_of_two_tokens_is_refused(place):
    with pytest.raises(ValueError, match="not one token"):
        first_tokens(place, [Case(noise(), "why ?", "yes", "n", True)], [None])


@pytest.mark.slow
def test_an_answer_is_unchanged_if_generating_gives_it_again(embedded):
    lmm = embedded.lmm
    questions = ("what do you see in this image ?", "what is on the left ?", "what is in the top left ?")
    rows = [{"image": make_scene(VALIDATION + n).image, "question": question} for n, question in enumerate(questions)]
    answered, scope = answer_questions(lmm, rows, batch=2), Scope(("base", "tiles"))
    alone = [lmm.generate(lmm.prompt(row["question"], row["image"]))[0] for row in rows]
    assert [each.answer for each in answered] == alone
    settings = [None, (), *((Edit(n, value),) for n in (1, 2) for value in (10.0, 1000.0))]
    same = unchanged(embedded, answered, settings, scope)
    for edits, row in zip(settings, same.tolist(), strict=True):
        for each, kept in zip(answered, row, strict=True):
            prompt = lmm.prompt(each.question, each.image)
            with steered(embedded, prompt, edits or (), scope, keep_error=True):
                assert (lmm.generate(prompt) == [each.answer]) == kept, (edits, each.question)
    assert same[:2].all() and not same[2:].all()
