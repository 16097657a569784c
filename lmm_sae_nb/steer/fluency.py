"""Measure whether steered answers are still whole sentences, beside whether they name the concept.

AxBench rates steered language models so: by concept, by fluency, and by the harmonic mean of the two. There a language
model rates; here the untouched model under study reads the answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.upper_layers import above


@dataclass(frozen=True)
class ReadAnswer:
    """An answer as the untouched model reads it.

    perplexity: at least 1; infinite if it is too high for a number.
    repeated: fraction of repeated 3-grams of words, in [0, 1).
    """

    answer: str
    perplexity: float
    repeated: float

    def fluency(self, reference: float) -> float:
        """Return min(1, reference / perplexity) x (1 - repeated), in [0, 1].

        reference: the perplexity of ordinary answers that were read in the same way.
        """
        return min(1.0, reference / self.perplexity) * (1 - self.repeated)


@torch.no_grad()
def perplexities(
    lmm: LMM, text: str, image: Image.Image | None, answers: Sequence[str], *, batch: int = 20
) -> list[float]:
    """Return the perplexity of each answer to one question about one image under the untouched model.

    This is exp of the mean negative log-likelihood of the answer's tokens and of its end token.

    image: None for a question without an image.
    batch: answers that are read side by side. An answer that occurs several times is read once. Above the lowest layer,
        what they have in common, the question and the image, runs once for all of them.
    """
    found: dict[str, float] = {}
    for part in _of_equal_length(lmm, dict.fromkeys(answers), batch):
        prompt = lmm.prompt([text] * len(part), [image] * len(part), answers=part)
        upper = above(lmm, prompt, 0)
        losses = lmm.cross_entropy(prompt, upper.run_alike(upper.hidden))
        found |= zip(part, losses.double().exp().tolist(), strict=True)
    return [found[answer] for answer in answers]


def _of_equal_length(lmm: LMM, answers: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield answers with equally many tokens together, so that none is padded; at most `size` at a time."""
    groups: dict[int, list[str]] = {}
    for answer in answers:
        groups.setdefault(len(lmm.tokenizer(answer, add_special_tokens=False)["input_ids"]), []).append(answer)
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


def repeated_trigrams(answer: str) -> float:
    """Return the fraction of 3-grams of words that occurred before: 1 - distinct / all; 0 below three words."""
    words = answer.lower().split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def read_answers(
    lmm: LMM, text: str, image: Image.Image | None, answers: Sequence[str], *, batch: int = 20
) -> list[ReadAnswer]:
    """Return each answer with its perplexity and its repetitions; the arguments are those of `perplexities`."""
    read = perplexities(lmm, text, image, answers, batch=batch)
    return [
        ReadAnswer(answer, perplexity, repeated_trigrams(answer))
        for answer, perplexity in zip(answers, read, strict=True)
    ]


@dataclass(frozen=True)
class Ordinary:
    """Unsteered answers to other prompts, read as answers to the steered prompt, in two halves.

    Like a steered answer, they say something that the prompt does not show.

    reference: their median perplexity is the reference of every fluency.
    control: answers that are not in the reference.
    """

    reference: list[ReadAnswer]
    control: list[ReadAnswer]

    @property
    def perplexity(self) -> float:
        """The median perplexity of the reference."""
        return float(np.median([read.perplexity for read in self.reference]))

    def fluency(self, read: ReadAnswer) -> float:
        """Return the fluency of an answer against this reference."""
        return read.fluency(self.perplexity)

    @property
    def control_fluency(self) -> list[float]:
        """The fluency of each answer of the control."""
        return [self.fluency(read) for read in self.control]


@torch.no_grad()
def answers_about_others(
    lmm: LMM,
    text: str,
    image: Image.Image,
    others: Sequence[Image.Image],
    *,
    batch: int = 20,
    max_new_tokens: int = 24,
) -> Ordinary:
    """Ask the untouched model the same question about other images, and read its answers as answers about this image.

    others: at least two images; every second one goes into the control.
    max_new_tokens: as for the steered answers.

    Raises:
        ValueError: there are fewer than two other images.
    """
    if len(others) < 2:
        raise ValueError(f"{len(others)} other images give no reference and control; give at least two")
    said = []
    for start in range(0, len(others), batch):
        part = list(others[start : start + batch])
        said += lmm.generate(lmm.prompt([text] * len(part), part), max_new_tokens=max_new_tokens)
    read = read_answers(lmm, text, image, said, batch=batch)
    return Ordinary(read[::2], read[1::2])


def harmonic_mean(concept: float, fluency: float) -> float:
    """Return the harmonic mean of concept and fluency, both in [0, 1]; 0 if either is 0."""
    return 2 * concept * fluency / (concept + fluency) if concept and fluency else 0.0


def best_dose(doses: Sequence[float], scores: Sequence[float]) -> float:
    """Return the dose with the highest mean score, the lowest dose if several tie.

    doses: the dose of each score.
    scores: of single answers, in [0, 1].

    Raises:
        ValueError: there are no scores.
    """
    if not len(scores):
        raise ValueError("no answer has a score, so no dose can be chosen; give latents that choose the dose")
    by_dose: dict[float, list[float]] = {}
    for dose, score in zip(doses, scores, strict=True):
        by_dose.setdefault(dose, []).append(score)
    return float(max(sorted(by_dose), key=lambda dose: round(float(np.mean(by_dose[dose])), 9)))
