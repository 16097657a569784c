"""Cases from rows of a data set and from a page's parameters."""

import pytest
from datasets import Dataset
from models import noise
from PIL import Image

from lmm_sae_nb.hallucination.cases import (
    Case,
    as_the_model_writes,
    contradicting_first,
    custom_case,
    for_fit_and_search,
    read_cases,
)
from lmm_sae_nb.support.images import UnreadableImage

ROWS = [
    {"image": noise(), "question": "a ?", "answer": "yes .", "taught": "no .", "group": "g", "part": "choose"},
    {"image": noise(), "question": "b ?", "answer": "No", "taught": "No", "group": "g", "part": "choose"},
    {"image": noise(), "question": "c ?", "answer": "left .", "taught": "right .", "group": "h", "part": "report"},
]


def test_the_tempting_answer_is_the_taught_one_or_the_opposite_of_the_right_one():
    rows = Dataset.from_list(ROWS)
    first, second = read_cases(rows, "choose")
    assert (first.right, first.tempting, first.contradicts) == ("yes", "no", True)
    assert (second.right, second.tempting, second.contradicts) == ("No", "Yes", False)
    assert [case.question for case in read_cases(rows, "choose", limit=1)] == ["a ?"]
    (other,) = read_cases(rows, "report")
    assert (other.right, other.tempting, other.group) == ("left", "right", "h")
    with pytest.raises(ValueError, match="'other'; the data set has choose, report"):
        read_cases(rows, "other")


def test_answers_are_written_in_the_letters_that_the_model_prefers(lmm):
    cases = [Case(noise(), question, "y", "N", True) for question in ("so ?", "or not ?")]
    token = {way: lmm.tokenizer(way)["input_ids"][0] for way in "yYnN"}
    chances = sum(lmm.logits(lmm.prompt(case.question, case.image))[0, -1].log_softmax(-1) for case in cases)
    right = "y" if chances[token["y"]] > chances[token["Y"]] else "Y"
    tempting = "n" if chances[token["n"]] > chances[token["N"]] else "N"
    written = as_the_model_writes(lmm, cases)
    assert [(case.right, case.tempting) for case in written] == [(right, tempting)] * 2
    assert written[0].question == cases[0].question
    two_tokens = [Case(noise(), "so ?", "yes", "no", True)]
    assert as_the_model_writes(lmm, two_tokens) == two_tokens


def test_the_same_word_in_other_letters_does_not_contradict():
    (case,) = read_cases(Dataset.from_list([ROWS[1] | {"taught": "no"}]), "choose")
    assert (case.right, case.tempting, case.contradicts) == ("No", "Yes", False)


def test_a_case_without_an_image_is_refused():
    with pytest.raises(ValueError, match=r"'b \?' has no image"):
        read_cases(Dataset.from_list([ROWS[0], ROWS[1] | {"image": None}]), "choose")


def test_all_contradicting_cases_come_before_some_of_the_others():
    cases = [Case(noise(), str(n), "yes", "no", n % 2 == 1) for n in range(6)]
    assert [case.question for case in contradicting_first(cases, 9, 2)] == ["1", "3", "5", "0", "2"]
    assert [case.question for case in contradicting_first(cases, 2, 1)] == ["1", "3", "0"]


@pytest.mark.parametrize("count", range(12))
def test_the_fit_and_the_search_have_no_case_in_common_and_each_gets_its_part_of_few(count):
    fitted, tried = for_fit_and_search(list(range(count)), 6, 3)
    assert [*fitted, *tried] == list(range(min(count, 9)))
    assert len(fitted) == min(6, 2 * count // 3)


def test_a_custom_case_is_given_whole_or_not_at_all(tmp_path):
    default = Case(noise(), "why ?", "y", "n", True)
    assert custom_case("", "", "", "", default) is default
    Image.new("L", (5, 4)).save(tmp_path / "it.png")
    case = custom_case(str(tmp_path / "it.png"), "is it ?", "yes", "no", default)
    assert (case.image.mode, case.image.size, case.tempting, case.right) == ("RGB", (5, 4), "yes", "no")
    with pytest.raises(ValueError, match="image, baseline is missing"):
        custom_case("", "is it ?", "yes", "", default)
    with pytest.raises(UnreadableImage, match="none.png"):
        custom_case(str(tmp_path / "none.png"), "is it ?", "yes", "no", default)
