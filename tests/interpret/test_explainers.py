"""What replies are understood as, and what explainer, refiner and labeller make of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lmm_sae_nb.chat.questions import Question
from lmm_sae_nb.chat.replies import Reply
from lmm_sae_nb.interpret import explainers
from lmm_sae_nb.interpret.explainers import LONGEST_CONCEPT, REFUSAL, Outcome, Vocabulary, parse_reply

TAG = "[EXPLANATION]:"


@pytest.mark.parametrize(
    ("text", "tag", "outcome", "found"),
    [
        ("Train tracks.", "", Outcome.EXPLAINED, "Train tracks."),
        (f"I looked.\n{TAG}  *Train   tracks*", TAG, Outcome.EXPLAINED, "Train tracks"),
        (f"{TAG} no, wait. {TAG} a cat", TAG, Outcome.EXPLAINED, "a cat"),
        (f"Were there nothing: {REFUSAL}. {TAG} a cat", TAG, Outcome.EXPLAINED, "a cat"),
        (f"I am {REFUSAL}", TAG, Outcome.REFUSED, None),
        (f"{REFUSAL}. {TAG}", TAG, Outcome.REFUSED, None),
        ("Train tracks.", TAG, Outcome.UNPARSEABLE, None),
        (f"{TAG} ...", TAG, Outcome.UNPARSEABLE, None),
        ("", "", Outcome.UNPARSEABLE, None),
        ("?!", "", Outcome.UNPARSEABLE, None),
        ("x" * 2001, "", Outcome.UNPARSEABLE, None),
        (REFUSAL, "", Outcome.REFUSED, None),
        (f"{TAG} Unable to produce\nexplanations.", TAG, Outcome.REFUSED, None),
        ("I am unable to produce descriptions", TAG, Outcome.REFUSED, None),  # as the paper's code says it
        ("the word UNABLE", "", Outcome.EXPLAINED, "the word UNABLE"),
        ("<b>hat</b>", "", Outcome.EXPLAINED, "<b>hat</b>"),
    ],
)
def test_a_reply_is_understood_by_its_tag_and_its_words(text, tag, outcome, found):
    answer = parse_reply(Reply(text), tag)
    assert (answer.outcome, answer.text, answer.raw) == (outcome, found, text)


def test_neither_a_fault_nor_half_a_reply_is_an_explanation():
    assert parse_reply(Reply(None, "it is down")) == (Outcome.FAILED, None, "it is down", None)
    assert parse_reply(Reply("train tra", cut=True)).outcome is Outcome.UNPARSEABLE


@pytest.mark.parametrize(
    ("confidence", "least", "outcome"),
    [
        (0.5, 0.5, Outcome.EXPLAINED),
        (0.49, 0.5, Outcome.REFUSED),
        (0.0, 0.0, Outcome.EXPLAINED),
        (None, 0.0, Outcome.EXPLAINED),
    ],
)
def test_an_explanation_of_low_confidence_counts_as_refused(confidence, least, outcome):
    answer = parse_reply(Reply("a hat", confidence=confidence), least_confidence=least)
    assert (answer.outcome, answer.raw, answer.confidence) == (outcome, "a hat", confidence)
    assert answer.text == ("a hat" if outcome is Outcome.EXPLAINED else None)


def test_a_limit_needs_a_reply_that_reports_its_confidence():
    with pytest.raises(
        ValueError, match=r"'a hat' comes without .* least_confidence = 0.5; set least_confidence to 0, or ask"
    ):
        explainers.explainer(Answering(lambda question: Reply("a hat")), "?", least_confidence=0.5)([pictures(1)])
    assert parse_reply(Reply(None, "it is down"), least_confidence=0.5).outcome is Outcome.FAILED


@given(st.text(max_size=300), st.sampled_from(["", TAG]))
def test_only_what_is_explained_has_a_text_and_it_is_one_line(text, tag):
    answer = parse_reply(Reply(text), tag)
    assert (answer.text is not None) == (answer.outcome is Outcome.EXPLAINED)
    assert answer.text is None or (answer.text == " ".join(answer.text.split()) != "" and "\n" not in answer.text)


class Answering:
    """A chat whose replies are a function of the question, given back in reverse."""

    name = identity = "a function"

    def __init__(self, answer):
        self.answer, self.heard = answer, []

    def __call__(self, questions):
        self.heard = list(questions)
        return reversed([(n, self.answer(question)) for n, question in enumerate(self.heard)])


def pictures(*values: int) -> list[Image.Image]:
    return [Image.new("RGB", (2, 2), (value, 0, 0)) for value in values]


def shade(question: Question) -> Reply:
    shades = {image.getpixel((0, 0))[0] for image in question.images}
    return Reply(f"{TAG} shade {shades.pop()}." if len(shades) == 1 else f"{TAG} {REFUSAL}")


def test_an_explainer_sees_a_set_at_once_and_is_not_asked_about_an_empty_one():
    chat = Answering(shade)
    same, mixed, none, last = explainers.explainer(chat, "look: {images} why ?", tag=TAG)(
        iter([pictures(7, 7, 7), pictures(1, 2), [], pictures(4)])
    )
    assert (same.text, last.text) == ("shade 7.", "shade 4.")
    assert mixed.outcome is none.outcome is Outcome.REFUSED
    assert [len(question.images) for question in chat.heard] == [3, 2, 1]
    assert {question.text for question in chat.heard} == {"look: {images} why ?"}


def test_a_refiner_gives_a_short_name_or_says_that_there_is_none():
    chat = Answering(lambda question: Reply(question.text.removeprefix("shorten: ").partition(",")[0]))
    texts = ["Train Tracks., where trains run", f"{REFUSAL}, sorry", "x" * (LONGEST_CONCEPT + 1)]
    name, none, long = explainers.refiner(chat, "shorten: {text}")(texts)
    assert name[:3] == (Outcome.EXPLAINED, "train tracks", "Train Tracks.")
    assert (none.outcome, long.outcome) == (Outcome.REFUSED, Outcome.UNPARSEABLE)
    short, long = explainers.no_refiner(["A cat.", "a long, long story " * 9])
    assert (short.text, long.outcome) == ("a cat", Outcome.UNPARSEABLE)


def test_text_in_braces_is_text():
    chat = Answering(lambda question: Reply("ok"))
    explainers.refiner(chat, 'as {"json": "{text}"}')(["{text} {0} {images}"])
    assert chat.heard[0].text == 'as {"json": "{text} {0} {images}"}'


@pytest.mark.parametrize(
    ("said", "kind"),
    [("Object.", "object"), ("color", "colour"), ("a texture, or an object", None), ("no idea", None), (None, None)],
)
def test_a_labeller_gives_one_of_the_six_kinds_or_none(said, kind):
    assert explainers.labeller(Answering(lambda question: Reply(said)))(["a hat"]) == [kind]


def test_the_vocabulary_is_exact(tmp_path):
    words = Vocabulary({"object": ["cat", "hat"], "face": ["happy"], "word": ["happy", "stop"]})
    texts = ["cat", "A hat.", ' "Stop" ', "dog", "cat hat", ""]
    found = words.refine(texts)
    assert [answer.text for answer in found] == ["cat", "hat", "stop", None, None, None]
    assert {answer.outcome for answer in found[3:]} == {Outcome.UNPARSEABLE}
    assert words.label(["cat", "happy", "stop", "dog"]) == ["object", "face", "word", None]
    (tmp_path / "concepts.json").write_text('{"object": ["cat"]}')
    assert Vocabulary(tmp_path / "concepts.json").label(["cat"]) == ["object"]
    assert explainers.no_labeller(["cat", "dog"]) == [None, None]


def test_every_concept_of_picture_world_is_its_own_name():
    from lmm_sae_nb.pictureworld.world.concepts import KINDS

    words = Vocabulary(KINDS)
    names = [name for kind in KINDS.values() for name in kind]
    assert [answer.text for answer in words.refine(names)] == names
    assert np.mean([kind in KINDS for kind in words.label(names)]) == 1


@pytest.mark.parametrize(
    ("answer", "concept", "named"),
    [
        ("A scene with Dogs.", "dog", True),
        ("hotdog", "dog", False),
        ("two boxes", "box", True),
        ("a c++ c.", "c.", False),
    ],
)
def test_an_answer_names_a_concept_by_whole_words(answer, concept, named):
    assert explainers.mentions(answer, concept) is named
