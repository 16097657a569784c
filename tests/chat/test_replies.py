"""What a model sends back is read in one way: thoughts are cut off, and what is no text is replaced and counted."""

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from lmm_sae_nb.benchmarks.faulty_server import completion
from lmm_sae_nb.chat.replies import ONLY_REASONED, Reply, read_completion, read_text, readable, without_thoughts
from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.interpret.explainers import REFUSAL, Outcome, explainer, labeller, parse_reply, refiner
from lmm_sae_nb.score.judges import model_judge
from lmm_sae_nb.steer.relevance import by_model


@pytest.mark.parametrize(
    "text",
    [
        "dogs", "<think>cats</think>dogs", "<THINK>\ncats\n</THINK>\n\ndogs\n", "<thinking>cats</thinking> dogs",
        "<think></think>dogs", "<think/>dogs", "<think>a</think><think>b</think>dogs", "a </think> dogs",
        "<think>a<think>b</think>c</think>dogs", "<think>the tag <think> is mine</think>dogs",
        "<think>the tag <thinking> is mine</think>dogs", "<think>a</think>b</think>dogs", "dogs<think>or cats",
        "<think>a</think>dogs<think>or cats", "[THINK]cats[/THINK]dogs", "◁think▷cats◁/think▷dogs",
        "< think >cats</ think>dogs", "<reasoning>cats</reasoning>dogs",
    ],
)  # fmt: skip
def test_a_thought_is_cut_off_whatever_form_it_has(text):
    assert without_thoughts(text) == "dogs"
    assert Reply(text).answer == "dogs" and read_text(text).text == text.strip()  # the record keeps it whole


@pytest.mark.parametrize(
    "text", ["[REASONING]: it barks", "I think dogs", "<b>dogs</b>", "a <thinker> statue", "think>", "1 < 2"]
)
def test_words_about_thinking_are_no_thought(text):
    assert without_thoughts(text) == text


@pytest.mark.parametrize("text", ["<think>cats", "<think>cats</think>", "cats</think>", "<think>a</think> <think>b"])
def test_a_thought_alone_is_no_answer(text):
    reply = read_text(text, cut=True)
    assert (reply.text, reply.fault, reply.refused, reply.only_reasoned) == (None, ONLY_REASONED, True, True)


@example("\ud83d")
@example("a\ude00\ud83d")
@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_every_text_can_be_written_and_good_text_stays(text):
    clean = readable(text)
    assert json.loads(json.dumps(clean).encode()) == clean and clean.encode().decode() == clean
    assert not any(ord(c) < 32 and c not in "\t\n\v\f\r" for c in clean)
    if text.isprintable():
        assert clean == text


def test_halves_of_a_pair_that_stand_together_are_one_character():
    assert readable("\ud83d\ude00 \ud83d \ude00") == "\U0001f600 \ufffd \ufffd"
    assert read_text("a\x00b\ud83d").replaced == 2


def test_every_reader_reads_past_the_thought_and_never_in_it():
    picture = Image.new("RGB", (2, 2))
    said = "<think>Perhaps 3, no, unable to produce explanations, a texture, unsure.</think> {}"

    class Chat:
        name = identity = "a function"

        def __init__(self, answer):
            self.answer = answer

        def __call__(self, questions):
            yield from ((n, Reply(said.format(self.answer))) for n, _ in enumerate(questions))

    [found] = explainer(Chat("[E]: Dogs"), "?", tag="[E]:")([[picture]])
    assert (found.outcome, found.text, found.raw) == (Outcome.EXPLAINED, "Dogs", "[E]: Dogs")
    [short] = refiner(Chat("Dogs."))(["dogs that run"])
    assert short[:2] == (Outcome.EXPLAINED, "dogs")
    assert refiner(Chat(REFUSAL))(["x"])[0].outcome is Outcome.REFUSED
    assert labeller(Chat("object"))(["dogs"]) == ["object"]
    assert by_model(Chat("7"))(["a dog"], ["dogs"]) == [7]
    assert model_judge(Chat("yes"))([[Exemplar(0, picture, None, None)]], ["dogs"]) == ["yes"]


def test_an_empty_answer_blocks_no_page_that_has_a_limit_of_confidence():
    assert parse_reply(Reply(""), least_confidence=0.5).outcome is Outcome.UNPARSEABLE
    assert parse_reply(Reply("<think>cats"), least_confidence=0.5).outcome is Outcome.UNPARSEABLE
    assert parse_reply(read_text("<think>cats"), least_confidence=0.5).outcome is Outcome.FAILED


def body(content: object = "dogs", reason: str = "stop", **message: object) -> bytes:
    return json.dumps(completion(content, reason, **message)).encode()


@pytest.mark.parametrize(
    ("sent", "fault"),
    [
        (body(None, reasoning_content="cats"), "only reasoned: raise max_new_tokens or switch thinking off"),
        (body("", reasoning="cats"), "only reasoned"),
        (body(" \n", reasoning_details=[{"text": "cats"}]), "only reasoned"),
        (body(None, thinking="cats"), "only reasoned"),
        (body([{"type": "thinking", "thinking": []}]), "only reasoned"),
        (body(None, "length"), "only reasoned"),
        (body("<think>cats", "length"), "only reasoned"),
        (body(None, refusal="I cannot."), "refuses to answer: I cannot."),
        (body(None, "tool_calls", tool_calls=[{"id": "1"}]), "called a tool: switch tools off"),
        (body(None, "content_filter"), "content filter"),
    ],
)
def test_a_completion_without_an_answer_says_why(sent, fault):
    reply = read_completion(sent)
    assert reply.text is None and reply.refused and fault in reply.fault


@pytest.mark.parametrize(
    ("sent", "text", "cut"),
    [
        (body(), "dogs", False), (body(None), "", False), (body("dogs", refusal="no"), "dogs", False),
        (body("dogs", "length"), "dogs", True), (body("dogs", "content_filter"), "dogs", True),
        (body("dogs", reasoning_content="cats"), "dogs", False), (body("dogs", tool_calls=[1]), "dogs", False),
        (body(["do", {"type": "output_text", "text": "gs"}, {"type": "image"}, 7, {"text": 3}]), "dogs", False),
        (b"\xef\xbb\xbf" + body(), "dogs", False), (body("MARK").replace(b"MARK", b"d\xffogs"), "d\ufffdogs", False),
        (body("a", "length").replace(b'"length"', b"null"), "a", False),
    ],
)  # fmt: skip
def test_a_completion_is_its_first_choice(sent, text, cut):
    reply = read_completion(sent)
    assert (reply.text, reply.cut, reply.fault) == (text, cut, "")


def with_logprobs(*values: object) -> bytes:
    sent = completion("dogs")
    sent["choices"][0]["logprobs"] = {"content": [{"token": "x", "logprob": value} for value in values]}
    return json.dumps(sent).encode()


def test_the_confidence_is_a_probability_or_missing_or_a_fault_of_its_question():
    assert read_completion(with_logprobs(-1.0, -0.5), with_confidence=True).confidence == pytest.approx(math.exp(-1.5))
    assert read_completion(with_logprobs(0.0, 1e-7), with_confidence=True).confidence == 1.0
    assert read_completion(with_logprobs(-math.inf), with_confidence=True).confidence == 0.0
    assert read_completion(with_logprobs(), with_confidence=True).confidence is None
    for wrong in (math.nan, math.inf, None, "-1", True, 2.0):
        with pytest.raises(ValueError, match="no logarithm of a probability"):
            read_completion(with_logprobs(wrong), with_confidence=True)
        assert read_completion(with_logprobs(wrong)).confidence is None  # nobody asked
