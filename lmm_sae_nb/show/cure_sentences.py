"""Say in words what a method cures and harms, also where a group has no case, and what one case shows (notebook 08)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lmm_sae_nb.show.markup import as_text
from lmm_sae_nb.support.intervals import read_mean

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor

    from lmm_sae_nb.attribute.attribution import Attribution
    from lmm_sae_nb.hallucination.cases import Case
    from lmm_sae_nb.hallucination.report import HeldOut
    from lmm_sae_nb.support.intervals import Mean

UNKNOWN = "an unknown fraction (no case)"


def interval(mean: Mean | Sequence[float], form: str = "{:.2f}") -> str:
    """Return "0.62 [0.50, 0.74]".

    mean: with its two ends.
    form: of each number.
    """
    return "{} [{}, {}]".format(*map(form.format, mean[:3]))


def fraction(metrics: Mapping[str, float], name: str, form: str = "{:.2f}") -> str:
    """Return a fraction among metrics with its interval; if it is absent, there was no case, and the text says so."""
    return interval(read_mean(metrics, name), form) if name in metrics else UNKNOWN


def cured_in_words(answers: HeldOut, method: str) -> str:
    """Return what a method cures of the hallucinations with each right answer, to stand behind "cures".

    A right answer without hallucinations is named, too.
    """
    counts, cured = answers.hallucinations, answers.cured(method)
    if not cured:
        return "nothing, because there are no hallucinations"
    parts = [
        f"{interval(part, '{:.0%}')} of the {counts[word]} hallucinations whose right answer is *{word}*"
        for word, part in cured.items()
    ]
    none = [f"*{word}*" for word, count in counts.items() if not count]
    return " and ".join(parts) + (f" (there are none whose right answer is {' or '.join(none)})" if none else "")


def draws_in_words(answers: HeldOut, method: str) -> str:
    """Return the balanced cured rate of a method: the range of several draws, or one with its interval."""
    if not answers.words:
        return UNKNOWN
    rates = answers.by_draw(method)
    several = f"{min(rates):.2f} to {max(rates):.2f} in {len(rates)} draws"
    return several if len(rates) > 1 else interval(answers.balanced(method))


def empty_groups(answers: HeldOut) -> list[str]:
    """Return a sentence for each group of held-out cases that is empty, about what is then unknown."""
    sentences, none = [], [f"*{word}*" for word, count in answers.hallucinations.items() if not count]
    if not answers.words:
        sentences.append(
            "No held-out case is a hallucination, so there is nothing to cure: no method has a cured rate."
        )
    elif len(answers.words) == 1:
        (word,) = answers.words
        sentences.append(
            f"All hallucinations have the right answer *{word}*"
            + (f", none has {' or '.join(none)}" if none else "")
            + f". So the balanced cured rate is the fraction cured of these, and a push towards *{word}* may reach 1."
        )
    elif none:
        sentences.append(f"No hallucination has the right answer {' or '.join(none)}.")
    if not any(answers.untouched):
        sentences.append("No held-out case is answered right, so we do not know what a method harms.")
    elif not any(right and not against for right, against in zip(answers.untouched, answers.contradicts, strict=True)):
        sentences.append(
            "No held-out case agrees with memory and is answered right, so we do not know what a method harms there."
        )
    return sentences


def choice_without_cases(wrong: Sequence[Case], right: Sequence[Case]) -> list[str]:
    """Return a sentence for each group that is empty among the cases for the choice of clamps.

    wrong: the hallucinations.
    right: the cases that are answered right.
    """
    sentences, words = [], sorted({case.right for case in wrong})
    if not wrong:
        sentences.append("There is no hallucination to cure: no latent is ranked, no clamp is fitted or chosen.")
    elif len(words) == 1:
        sentences.append(f"The right answer of all hallucinations is {words[0]!r}: a push towards it would cure them.")
    if not right:
        sentences.append("No case is answered right: nothing limits the harm of a clamp.")
    return sentences


def case_in_words(
    parts: Attribution,
    words: Bool[Tensor, " tokens"],
    image: Bool[Tensor, " tokens"],
    tokens: Sequence[str],
    names: Mapping[int, str | None],
) -> str:
    """Return which word of a case and which latents on its image support the given answer most.

    parts: attribution of the decision.
    words, image: masks of the question's words and of the image.
    tokens: the question's words, in the order of the prompt.
    names: latent to name; without one it is unnamed.
    """
    of_words = parts.of_tokens()[words].tolist()
    most, least = (end(range(len(tokens)), key=of_words.__getitem__) for end in (max, min))
    first, last = as_text(tokens[most]), as_text(tokens[least])
    of_image = ", ".join(f"{n} ({as_text(names.get(n) or 'unnamed')})" for n in parts.of_latents(image)[0][:3].tolist())
    return (
        f'In the case in full, the word that supports the given answer most is "{first}" '
        f'({of_words[most]:+.2f} logits), and "{last}" opposes it most ({of_words[least]:+.2f}); on the '
        f"image, latents {of_image} support it most. The parts do not sum to the decision ({parts.clean:.2f} logits). "
        "So this is a hint at the cause, not a proof."
    )
