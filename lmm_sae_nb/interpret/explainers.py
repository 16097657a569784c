"""Sections 2.2, 3.2: models that are asked but not studied: explainer, refiner, concept labeller and judge.

Each is a plain callable over a `Chat` (`lmm_sae_nb.chat.recorded`), a model in this process or an endpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lmm_sae_nb.chat.questions import Chat, Question, Reply
from lmm_sae_nb.chat.recorded import ask
from lmm_sae_nb.support.files import read_json

REFUSAL = "unable to produce explanations"


REFUSES = re.compile(r"unable to produce (an )?(explanation|description)", re.IGNORECASE)  # text and code of the paper


KINDS = ("scene", "object", "part", "material", "texture", "colour")  # of Table 1


LONGEST = 100  # characters of a concept; what is longer is no name


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
    """What became of a question; only what is explained is ever scored."""

    EXPLAINED = "explained"
    REFUSED = "refused"  # the model says that it cannot, or is too unsure of what it says
    UNPARSEABLE = "unparseable"  # it answers, but with nothing that can be used
    FAILED = "failed"  # there is no answer; it is asked again the next time


class Answer(NamedTuple):
    """A reply as it was understood: `text` only if the outcome is explained; `raw` is what was said, or the fault.

    sureness: as in `Reply`.
    """

    outcome: Outcome
    text: str | None
    raw: str
    sureness: float | None = None


Refiner = Callable[[Sequence[str]], list[Answer]]


Labeller = Callable[[Sequence[str]], "list[str | None]"]


def understood(reply: Reply, tag: str = "", longest: int = 2000, least_sure: float = 0.0) -> Answer:
    """A reply as an explanation: what stands behind `tag`, or all of it if there is no tag.

    Refused if that has the words of `REFUSES`, in any case, or the model gives its explanation a probability below
    `least_sure`. Unparseable if the tag is missing, nothing is left, more than `longest` characters are, or the reply
    was cut short. ValueError for a `least_sure` above 0 where the reply does not tell how sure it is.
    """
    if reply.text is None:
        return Answer(Outcome.FAILED, None, reply.fault)
    if least_sure > 0 and reply.sureness is None:
        raise ValueError(
            f"the reply {reply.text[:60]!r} comes without the probabilities of its tokens, so it cannot be held "
            f"against least_sure = {least_sure}; set least_sure to 0, or ask a server that returns `logprobs`"
        )
    said, rest = " ".join(reply.text.split()), (reply.text, reply.sureness)
    _, found, behind = said.rpartition(tag) if tag else ("", "all", said)
    if REFUSES.search(behind or said):  # all of the reply, if there is no tag: some refuse without it
        return Answer(Outcome.REFUSED, None, *rest)
    text = behind.strip().strip("\"'*`").strip()
    if reply.cut or not found or not any(map(str.isalnum, text)) or len(text) > longest:
        return Answer(Outcome.UNPARSEABLE, None, *rest)
    if least_sure > 0 and reply.sureness < least_sure:
        return Answer(Outcome.REFUSED, None, *rest)
    return Answer(Outcome.EXPLAINED, text, *rest)


def explainer(
    chat: Chat, prompt: str, *, tag: str = "", least_sure: float = 0.0
) -> Callable[[Iterable[Sequence[Image.Image]]], list[Answer]]:
    """What the images of each set have in common, all of a set being shown at once.

    prompt: with `{images}` where they stand, or else they come first; tag, least_sure: as in `understood`. A set
    without images is not asked about, and refused.
    """

    def explain(sets: Iterable[Sequence[Image.Image]]) -> list[Answer]:
        empty: set[int] = set()

        def questions() -> Iterator[Question]:
            for number, images in enumerate(sets):
                if len(images):
                    yield Question(prompt, tuple(images))
                else:
                    empty.add(number)

        found = [understood(reply, tag, least_sure=least_sure) for reply in ask(chat, questions())]
        silent, rest = Answer(Outcome.REFUSED, None, "no image excites it"), iter(found)
        return [silent if number in empty else next(rest) for number in range(len(found) + len(empty))]

    return explain


def refiner(chat: Chat, prompt: str = REFINE_PROMPT) -> Refiner:
    """A long explanation as a short name of at most `LONGEST` characters, by a language model."""

    def refine(texts: Sequence[str]) -> list[Answer]:
        replies = ask(chat, [Question(prompt.replace("{text}", text)) for text in texts])
        return [_named(understood(reply, longest=LONGEST)) for reply in replies]

    return refine


def _named(answer: Answer) -> Answer:
    return answer._replace(text=answer.text.rstrip(" .").lower()) if answer.text else answer


def unrefined(texts: Sequence[str]) -> list[Answer]:
    """Explanations as they are, if they are short enough to be names."""
    return [_named(understood(Reply(text), longest=LONGEST)) for text in texts]


def labeller(chat: Chat, prompt: str = LABEL_PROMPT) -> Labeller:
    """The kind of Table 1 that a language model gives each concept; None where it gives none of the six."""
    return _chosen_by(chat, prompt, {**{kind: kind for kind in KINDS}, "color": "colour"})


def unlabelled(concepts: Sequence[str]) -> list[str | None]:
    """No kinds, where there is neither a model to ask for them nor a vocabulary."""
    return [None] * len(concepts)


def names(answer: str, concept: str) -> bool:
    """Whether the answer has the concept's name, in any case, singular or plural, as words of their own."""
    return re.search(rf"\b{re.escape(concept)}(e?s)?\b", answer, re.IGNORECASE) is not None


def _chosen_by(chat: Chat, prompt: str, options: Mapping[str, str]) -> Labeller:
    def label(concepts: Sequence[str]) -> list[str | None]:
        replies = ask(chat, [Question(prompt.replace("{text}", concept)) for concept in concepts])
        return [_chosen(reply, options) for reply in replies]

    return label


def _chosen(reply: Reply, options: Mapping[str, str]) -> str | None:
    """The one option whose word a reply has; None for none or several."""
    words = set(re.findall(r"\w+", (reply.text or "").lower()))
    found = {meant for word, meant in options.items() if word in words}
    return found.pop() if len(found) == 1 else None


class Vocabulary:
    """Refiner and labeller for answers in the words of a world whose every concept is known; exact, and no model.

    concepts: kind -> names, or the path of a JSON file with them. An answer that is no name is unparseable.
    """

    name = "the vocabulary"

    def __init__(self, concepts: str | Path | Mapping[str, Sequence[str]]):
        told = concepts if isinstance(concepts, Mapping) else read_json(concepts)
        self._kinds: dict[str, str] = {}
        for kind, names in told.items():
            for name in names:
                self._kinds.setdefault(name.lower(), kind)

    def refine(self, texts: Sequence[str]) -> list[Answer]:
        return [self._refine(text) for text in texts]

    def _refine(self, text: str) -> Answer:
        name = re.sub(r"^(a|an|the)\s+", "", text.lower().strip(" .\"'"))
        if name in self._kinds:
            return Answer(Outcome.EXPLAINED, name, text)
        return Answer(Outcome.UNPARSEABLE, None, text)

    def label(self, concepts: Sequence[str]) -> list[str | None]:
        return [self._kinds.get(concept) for concept in concepts]

    def rate(self, answers: Sequence[str], concepts: Sequence[str]) -> list[int | None]:
        """Relevance by the words alone: 10 if an answer names its concept, 5 if another one of its kind, else 1."""
        return [self._rate(answer, concept) for answer, concept in zip(answers, concepts, strict=True)]

    def _rate(self, answer: str, concept: str) -> int:
        if names(answer, concept):
            return 10
        kind = self._kinds.get(concept.lower())
        alike = (name for name, its in self._kinds.items() if kind and its == kind)
        return 5 if any(names(answer, name) for name in alike) else 1
