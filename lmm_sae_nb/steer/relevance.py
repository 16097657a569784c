"""Rate how much an answer has to do with a concept (section 4.1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from lmm_sae_nb.chat.questions import Chat, Question
from lmm_sae_nb.chat.recorded import ask

RELEVANCE_PROMPT = (
    'Asked what is in an image, a model answered: "{answer}". How relevant is this answer to the concept "{text}"? '
    "Answer with one whole number, from 1 (not at all) to 10 (it names the concept)."
)


Relevance = Callable[[Sequence[str], Sequence[str]], "list[int | None]"]  # answers, concepts -> 1 to 10


def relevance(chat: Chat, prompt: str = RELEVANCE_PROMPT) -> Relevance:
    """Appendix D: how relevant each answer is to a concept, from 1 to 10, by a language model; None where it gives no
    such number."""

    def rate(answers: Sequence[str], concepts: Sequence[str]) -> list[int | None]:
        pairs = zip(answers, concepts, strict=True)
        asked = [Question(prompt.replace("{text}", concept).replace("{answer}", answer)) for answer, concept in pairs]
        found = [re.findall(r"\d+", reply.text or "") for reply in ask(chat, asked)]
        return [int(n[0]) if len(n) == 1 and 1 <= int(n[0]) <= 10 else None for n in found]

    return rate
