"""Rate from 1 to 10 how relevant steered answers are to a concept (Appendix D)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmm_sae_nb.chat.questions import Chat, Question
from lmm_sae_nb.chat.recorded import Recorded, ask, open_chat
from lmm_sae_nb.interpret.explainers import mentions
from lmm_sae_nb.steer.objects import ObjectSteering
from lmm_sae_nb.support.concepts import read_concepts
from lmm_sae_nb.support.files import project_root
from lmm_sae_nb.support.intervals import Mean, bounds, mean_interval
from lmm_sae_nb.support.stages import Metrics

RELEVANCE_PROMPT = (
    'Asked what is in an image, a model answered: "{answer}". How relevant is this answer to the concept "{text}"? '
    "Answer with one whole number, from 1 (not at all) to 10 (it names the concept)."
)
NAMED, SAME_KIND, UNRELATED = 10, 5, 1  # ratings by words alone

Rate = Callable[[Sequence[str], Sequence[str]], "list[int | None]"]  # answers, concepts -> 1 to 10


def by_model(chat: Chat, prompt: str = RELEVANCE_PROMPT) -> Rate:
    """Return a function that asks a language model for the relevance of each answer, as the paper asks GPT-4.

    A reply that is not one whole number from 1 to 10 gives None.

    prompt: with `{answer}` and `{text}`, the concept.
    """

    def rate(answers: Sequence[str], concepts: Sequence[str]) -> list[int | None]:
        questions = [
            Question(prompt.replace("{text}", concept).replace("{answer}", answer))
            for answer, concept in zip(answers, concepts, strict=True)
        ]
        numbers = [re.findall(r"\d+", reply.answer or "") for reply in ask(chat, questions)]
        return [int(n[0]) if len(n) == 1 and 1 <= int(n[0]) <= 10 else None for n in numbers]

    return rate


def by_words(kinds: Mapping[str, Sequence[str]]) -> Rate:
    """Return a function that rates by words alone, for a world whose every concept is known.

    10: the answer names the concept; 5: it names another concept of the same kind; 1: neither.

    kinds: kind to the names of its concepts; a name in two kinds counts for the first.
    """
    kind_of: dict[str, str] = {}
    for kind, concepts in kinds.items():
        for concept in concepts:
            kind_of.setdefault(concept.lower(), kind)

    def rate_one(answer: str, concept: str) -> int:
        if mentions(answer, concept):
            return NAMED
        kind = kind_of.get(concept.lower())
        same_kind = (name for name, other in kind_of.items() if kind and other == kind)
        return SAME_KIND if any(mentions(answer, name) for name in same_kind) else UNRELATED

    def rate(answers: Sequence[str], concepts: Sequence[str]) -> list[int | None]:
        return [rate_one(answer, concept) for answer, concept in zip(answers, concepts, strict=True)]

    return rate


@dataclass(frozen=True)
class Relevance:
    """How relevant answers are to the concept, from 1 to 10; None where a model gave no such number.

    objects: of the reported object latents, in their order.
    random: of the random latents.
    failed: questions that the model did not answer.
    """

    objects: list[int | None]
    random: list[int | None]
    failed: int = 0

    @property
    def means(self) -> dict[str, Mean]:
        """The mean of each group with at least two ratings, with its interval."""
        known = {
            group: [rating for rating in ratings if rating is not None]
            for group, ratings in (("object latents", self.objects), ("random live latents", self.random))
        }
        return {group: mean_interval(ratings) for group, ratings in known.items() if len(ratings) > 1}

    @property
    def metrics(self) -> Metrics:
        """The means with their intervals, and the number of failed questions."""
        names = {"object latents": "relevance", "random live latents": "control_relevance"}
        metrics: Metrics = {"replies_failed": self.failed}
        for group, mean in self.means.items():
            metrics |= bounds(names[group], mean)
        return metrics


def rate_objects(
    steering: ObjectSteering,
    judge: str,
    concepts: str,
    *,
    replies: Path,
    endpoint: Mapping[str, object],
) -> Relevance:
    """Rate the answers of object latents at the chosen dose, and of the random control.

    judge: a language model as `open_chat` takes it, or "".
    concepts: without a judge, a JSON file of this project with kind to names, for `by_words`. If this is "" too,
        nothing is rated.
    replies: the file that keeps a judge's replies, so that a second run does not ask again.
    endpoint: `key_variable`, `concurrency`, `timeout` and `extra` of `open_chat`.
    """
    chat = Recorded(open_chat(judge, **endpoint), replies) if judge else None
    if chat is None and not concepts:
        return Relevance([], [])
    rate = by_words(read_concepts(project_root() / concepts)) if chat is None else by_model(chat)
    objects, random = (
        rate([row.answer for row in rows], [row.concept for row in rows])
        for rows in (steering.reported, steering.random)
    )
    return Relevance(objects, random, chat.failed if chat else 0)
