"""Explainer, refiner and labeller: how they are asked, and how their replies are understood.

Each is a plain callable over a `Chat` (`lmm_sae_nb.chat.questions`), a model in this process or an endpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lmm_sae_nb.chat.questions import Chat, Question
from lmm_sae_nb.chat.recorded import ask
from lmm_sae_nb.chat.replies import Reply
from lmm_sae_nb.support.concepts import read_concepts

REFUSAL = "unable to produce explanations"  # what an explainer is to answer if it sees nothing in common
REFUSES = re.compile(r"unable to produce (an )?(explanation|description)", re.IGNORECASE)  # text and code of the paper
KINDS = ("scene", "object", "part", "material", "texture", "colour")  # kinds of concept in Table 1
LONGEST_CONCEPT = 100  # characters; a longer text is no name

REFINE_PROMPT = (
    "Below is a description of what a feature of a vision model responds to. Give the one concept that it is about as "
    "a short noun phrase of at most four words, without any other text. If it says that there is none, answer: "
    f"{REFUSAL}\n\nDescription: {{text}}"
)
LABEL_PROMPT = (
    'Which kind of visual concept is "{text}"? A scene is a whole place; an object a thing; a part a piece of a thing; '
    "a material what a thing is made of; a texture a pattern; a colour a colour. Answer with one word: "
    "scene, object, part, material, texture or colour."
)


class Outcome(str, Enum):
    """What became of a question. Only what is explained is ever scored."""

    EXPLAINED = "explained"
    REFUSED = "refused"  # the model says that it sees nothing in common, or its confidence is too low
    UNPARSEABLE = "unparseable"  # it answers, but with nothing that can be used
    FAILED = "failed"  # there is no answer; it is asked again the next time


class Answer(NamedTuple):
    """A reply as it was understood.

    outcome: explained, refused, unparseable or failed.
    text: the explanation in one line; None unless the outcome is explained.
    raw: the answer as it came, without thoughts, or why there is none.
    confidence: as in `Reply`.
    """

    outcome: Outcome
    text: str | None
    raw: str
    confidence: float | None = None


Refiner = Callable[[Sequence[str]], list[Answer]]
Labeller = Callable[[Sequence[str]], "list[str | None]"]


def parse_reply(reply: Reply, tag: str = "", longest: int = 2000, least_confidence: float = 0.0) -> Answer:
    """Understand a reply as an explanation: the text behind the last `tag`, or all of it without a tag.

    Thoughts are no part of it (`Reply.answer`). It is refused if it has the words of `REFUSES`, or if its confidence is
    below `least_confidence`. It is unparseable if it is empty, if the tag is missing, if no letter or digit is left, if
    it is too long, or if the reply was cut short.

    reply: of the explainer.
    tag: the mark behind which the explanation stands; "" for none.
    longest: characters of an explanation.
    least_confidence: a probability in [0, 1]; 0 accepts every explanation.

    Raises:
        ValueError: `least_confidence` is above 0 and the reply reports no confidence.
    """
    raw = reply.answer
    if raw is None:
        return Answer(Outcome.FAILED, None, reply.fault)
    if not raw:
        return Answer(Outcome.UNPARSEABLE, None, raw, reply.confidence)
    if least_confidence > 0 and reply.confidence is None:
        raise ValueError(
            f"the reply {raw[:60]!r} comes without the probabilities of its tokens, so it cannot be compared "
            f"with least_confidence = {least_confidence}; set least_confidence to 0, or ask a server that returns "
            "`logprobs`"
        )
    line = " ".join(raw.split())
    _, mark, behind = line.rpartition(tag) if tag else ("", "all", line)
    if REFUSES.search(behind or line):  # some models refuse without writing the tag
        return Answer(Outcome.REFUSED, None, raw, reply.confidence)
    text = behind.strip().strip("\"'*`").strip()
    if reply.cut or not mark or not any(map(str.isalnum, text)) or len(text) > longest:
        return Answer(Outcome.UNPARSEABLE, None, raw, reply.confidence)
    if least_confidence > 0 and reply.confidence < least_confidence:
        return Answer(Outcome.REFUSED, None, raw, reply.confidence)
    return Answer(Outcome.EXPLAINED, text, raw, reply.confidence)


def explainer(
    chat: Chat, prompt: str, *, tag: str = "", least_confidence: float = 0.0
) -> Callable[[Iterable[Sequence[Image.Image]]], list[Answer]]:
    """Return a function that asks, for each set of images, what the images have in common.

    All images of a set go into one question. A set without images is not asked about, and counts as refused.

    chat: the model to ask.
    prompt: `{images}` marks the place of the images; without it they come first.
    tag, least_confidence: as in `parse_reply`.
    """

    def explain(sets: Iterable[Sequence[Image.Image]]) -> list[Answer]:
        empty: set[int] = set()

        def questions() -> Iterator[Question]:
            for number, images in enumerate(sets):
                if len(images):
                    yield Question(prompt, tuple(images))
                else:
                    empty.add(number)

        answers = [parse_reply(reply, tag, least_confidence=least_confidence) for reply in ask(chat, questions())]
        without, rest = Answer(Outcome.REFUSED, None, "no image excites it"), iter(answers)
        return [without if number in empty else next(rest) for number in range(len(answers) + len(empty))]

    return explain


def refiner(chat: Chat, prompt: str = REFINE_PROMPT) -> Refiner:
    """Return a function that shortens explanations to concepts of at most `LONGEST_CONCEPT` characters.

    chat: the language model to ask.
    prompt: `{text}` marks the place of the explanation.
    """

    def refine(texts: Sequence[str]) -> list[Answer]:
        replies = ask(chat, [Question(prompt.replace("{text}", text)) for text in texts])
        return [_as_concept(reply) for reply in replies]

    return refine


def no_refiner(texts: Sequence[str]) -> list[Answer]:
    """Return explanations as they are, if they are short enough to be concepts."""
    return [_as_concept(Reply(text)) for text in texts]


def _as_concept(reply: Reply) -> Answer:
    answer = parse_reply(reply, longest=LONGEST_CONCEPT)
    return answer._replace(text=answer.text.rstrip(" .").lower()) if answer.text else answer


def labeller(chat: Chat, prompt: str = LABEL_PROMPT) -> Labeller:
    """Return a function that gives each concept a kind of Table 1, or None where the model names none or several.

    chat: the language model to ask.
    prompt: `{text}` marks the place of the concept.
    """
    options = {**{kind: kind for kind in KINDS}, "color": "colour"}

    def label(concepts: Sequence[str]) -> list[str | None]:
        replies = ask(chat, [Question(prompt.replace("{text}", concept)) for concept in concepts])
        return [only_option(reply, options) for reply in replies]

    return label


def no_labeller(concepts: Sequence[str]) -> list[str | None]:
    """Return None for every concept."""
    return [None] * len(concepts)


def only_option(reply: Reply, options: Mapping[str, str]) -> str | None:
    """Return the meaning of the one option whose word a reply has; None for none or several.

    options: a word in small letters to its meaning.
    """
    words = set(re.findall(r"\w+", (reply.answer or "").lower()))
    meanings = {meaning for word, meaning in options.items() if word in words}
    return meanings.pop() if len(meanings) == 1 else None


def mentions(answer: str, concept: str) -> bool:
    """Tell whether an answer has a concept as a whole word, in capitals or not, singular or plural."""
    return re.search(rf"\b{re.escape(concept)}(e?s)?\b", answer, re.IGNORECASE) is not None


class Vocabulary:
    """Refiner and labeller where every concept of the world is known: exact, and without a model.

    concepts: kind to names, or the path of a JSON file with them.
    """

    name = "the vocabulary"

    def __init__(self, concepts: str | Path | Mapping[str, Sequence[str]]):
        names_by_kind = concepts if isinstance(concepts, Mapping) else read_concepts(concepts)
        self._kinds: dict[str, str] = {}
        for kind, names in names_by_kind.items():
            for name in names:
                self._kinds.setdefault(name.lower(), kind)
        names = "|".join(map(re.escape, sorted(self._kinds, key=len, reverse=True)))
        self._pattern = re.compile(rf"\b({names})(?:e?s)?\b", re.IGNORECASE)

    def refine(self, texts: Sequence[str]) -> list[Answer]:
        """Return each text as a concept, without an article; a text that names no concept is unparseable."""
        return [self._refine(text) for text in texts]

    def _refine(self, text: str) -> Answer:
        name = re.sub(r"^(a|an|the)\s+", "", text.lower().strip(" .\"'"))
        if name in self._kinds:
            return Answer(Outcome.EXPLAINED, name, text)
        return Answer(Outcome.UNPARSEABLE, None, text)

    def find(self, answers: Sequence[str], without: str) -> list[Answer]:
        """Return for each answer the first concept that it mentions and another answer does not.

        An answer without such a concept is unparseable.

        without: the other answer, such as one about the same image without steering.
        """
        known = set(self.mentioned(without))
        return [self._first(answer, known) for answer in answers]

    def _first(self, answer: str, known: Collection[str]) -> Answer:
        name = next((name for name in self.mentioned(answer) if name not in known), None)
        return Answer(Outcome.EXPLAINED if name else Outcome.UNPARSEABLE, name, answer)

    def mentioned(self, text: str) -> list[str]:
        """Return the concepts that a text mentions as whole words, singular or plural, in its order."""
        return [match[1].lower() for match in self._pattern.finditer(text)]

    def label(self, concepts: Sequence[str]) -> list[str | None]:
        """Return the kind of each concept; None for one that is not in the vocabulary."""
        return [self._kinds.get(concept) for concept in concepts]
