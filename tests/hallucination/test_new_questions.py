"""The fit on half of the questions: the halves, and that the clamp never sees the other half."""

from itertools import product

import pytest
from models import noise

from lmm_sae_nb.hallucination import new_questions
from lmm_sae_nb.hallucination.cases import Case
from lmm_sae_nb.hallucination.fit import FitSettings
from lmm_sae_nb.hallucination.new_questions import half_of_questions, try_new_questions


def cases(images: int = 1) -> list[Case]:
    """Two groups of four questions; the taught answer of two of them is y. Each image contradicts what was taught."""
    found = []
    for image, group, n in product(range(images), ("g", "h"), range(4)):
        right, taught = ("n", "y") if n < 2 else ("y", "n")
        found.append(Case(noise(40, 40, image), f"{group} {'abcd'[n]} ?", right, taught, True, group))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_half_of_the_questions_of_every_group_and_taught_answer_are_chosen(seed):
    agreeing = [Case(noise(), "g a ?", "y", "n", False, "g")]  # taught y, too
    half = half_of_questions([*cases(2), *agreeing], seed)
    assert len(set(half)) == len(half) == 4
    for group, pair in product("gh", ("ab", "cd")):
        assert sum(question[0] == group and question[2] in pair for question in half) == 1
    assert half == half_of_questions(cases(), seed)


def test_groups_with_a_single_question_are_halved_together():
    alone = [Case(noise(), f"{group} ?", "n", "y", True, group) for group in "klmno"]
    assert half_of_questions(alone[:1]) == []
    half = half_of_questions([*alone, *cases()])
    assert len(half) == 2 + 4 and sum(question[0] in "klmno" for question in half) == 2


def test_where_the_half_has_no_wrong_case_nothing_is_fitted_and_the_cases_are_counted(place):
    settings = FitSettings(rounds=1, each=3, refits=2, direction_steps=2)
    found = try_new_questions(place, [], cases(), [], cases(2), range(40), settings=settings)
    assert found.latents == 0 and [len(answers.answer) for answers in found.parts.values()] == [8, 8]
    assert set(found.metrics) == {
        "latents_clamped", "questions_fitted_on", "seen_questions_hallucinations", "new_questions_hallucinations"
    }  # fmt: skip


@pytest.mark.slow
def test_the_fit_sees_only_the_questions_of_its_half(place, monkeypatch):
    seen, fit = [], new_questions.fit

    def spy(place, wrong, right, *others, **how):
        seen.extend([*wrong, *right])
        return fit(place, wrong, right, *others, **how)

    monkeypatch.setattr(new_questions, "fit", spy)
    settings = FitSettings(rounds=1, each=3, refits=2, direction_steps=2)
    found = try_new_questions(place, cases(2), cases(1), [], cases(3), range(40), settings=settings, wrong_cases=6)
    assert {case.question for case in seen} == set(found.fitted_on) and len(seen) == 6 + 4
    assert found.latents == 3 and list(found.parts) == ["seen", "new"]
    for answers in found.parts.values():
        assert len(answers.answer) == 12 and [len(rows) for rows in answers.methods.values()] == [1, 3, 1]
    metrics = found.metrics
    assert metrics["questions_fitted_on"] == 4
    for part, answers in found.parts.items():
        assert metrics[f"{part}_questions_hallucinations"] == sum(not ok for ok in answers.untouched)
