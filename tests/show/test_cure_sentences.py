"""What a page says where a group has no case, and of one case in full."""

import pytest
import torch
from models import noise

from lmm_sae_nb.attribute.attribution import Attribution
from lmm_sae_nb.hallucination.cases import Case
from lmm_sae_nb.hallucination.report import HeldOut
from lmm_sae_nb.sae.activation import Latents
from lmm_sae_nb.show.cure_sentences import (
    UNKNOWN,
    case_in_words,
    choice_without_cases,
    cured_in_words,
    draws_in_words,
    empty_groups,
    fraction,
    interval,
)


def held_out(right: dict[str, list[bool]], cured: bool = True, contradicts: bool = True) -> HeldOut:
    """Contradicting cases by their right answer, and whether the model is right; the method cures all or none."""
    answer, before = zip(*((word, ok) for word, marks in right.items() for ok in marks), strict=True)
    after = [ok or cured for ok in before]
    return HeldOut(list(answer), [contradicts] * len(answer), [""] * len(answer), list(before), {"it": [after]})


def test_where_every_group_has_cases_no_sentence_is_needed():
    answers = held_out({"no": [False, True], "yes": [False, True]})
    answers = HeldOut(*([*part, part[1]] for part in list(vars(answers).values())[:4]), {"it": [[True] * 5]})
    answers.contradicts[-1] = False
    assert empty_groups(answers) == []
    assert cured_in_words(answers, "it").count(" of the 1 hallucinations whose right answer is ") == 2
    assert "there are none" not in cured_in_words(answers, "it")


@pytest.mark.parametrize("empty", ["no", "yes"])
def test_an_empty_group_is_named_and_the_rate_is_that_of_the_other(empty):
    other = {"no": "yes", "yes": "no"}[empty]
    answers = held_out({empty: [True, True], other: [False, True]})
    first, second = empty_groups(answers)
    assert first.startswith(f"All hallucinations have the right answer *{other}*, none has *{empty}*.")
    assert "agrees with memory" in second
    assert cured_in_words(answers, "it").endswith(f"*{other}* (there are none whose right answer is *{empty}*)")
    assert draws_in_words(answers, "it") == interval(answers.balanced("it"))
    assert fraction(answers.metrics, f"it_cured_right_{empty}") == UNKNOWN


def test_without_any_hallucination_nothing_is_cured_and_without_right_answers_no_harm_is_known():
    answers = held_out({"no": [True], "yes": [True]})
    assert "nothing to cure" in empty_groups(answers)[0]
    assert cured_in_words(answers, "it").startswith("nothing, because") and draws_in_words(answers, "it") == UNKNOWN
    assert "do not know what a method harms" in empty_groups(held_out({"no": [False], "yes": [False]}))[0]


def test_the_choice_says_which_groups_are_empty():
    no, yes = (Case(noise(), "why ?", right, "", True) for right in ("no", "yes"))
    assert choice_without_cases([no, yes], [no]) == []
    (one,) = choice_without_cases([no, no], [yes])
    assert "'no'" in one
    nothing, unlimited = choice_without_cases([], [])
    assert nothing.startswith("There is no hallucination") and unlimited.startswith("No case is answered right")


def test_a_case_names_the_words_and_the_latents_of_its_image_that_support_the_answer_most():
    indices = torch.tensor([[5, 7], [5, 9], [4, 7], [5, 9], [3, 9]])  # two tokens of the image, two words, and another
    values = torch.tensor([[0.25, 0.5], [0.5, -1.0], [0.25, 0.25], [-0.5, 0.25], [9.0, 9.0]])
    nothing = torch.zeros(5)
    parts = Attribution(Latents(torch.ones(5, 2), indices), values, nothing, nothing, 0.088)
    image, words = torch.tensor([True, True, False, False, False]), torch.tensor([False, False, True, True, False])
    text = case_in_words(parts, words, image, ["is", "peru"], {5: "map", 7: None})  # 5: 0.75, 7: 0.5, 9: -1
    assert text == (
        'In the case in full, the word that supports the given answer most is "is" (+0.50 logits), and "peru" opposes '
        "it most (-0.25); on the image, latents 5 (map), 7 (unnamed), 9 (unnamed) support it most. The parts do not "
        "sum to the decision (0.09 logits). So this is a hint at the cause, not a proof."
    )
