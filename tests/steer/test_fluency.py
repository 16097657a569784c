"""Perplexity, repetitions, fluency and the choice of a dose against computations by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from models import llava_next, noise

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.steer import fluency
from lmm_sae_nb.steer.fluency import (
    Ordinary,
    ReadAnswer,
    answers_about_others,
    best_dose,
    harmonic_mean,
    perplexities,
    read_answers,
    repeated_trigrams,
)


@pytest.fixture(scope="module")
def lmm():
    torch.manual_seed(0)
    return LMM(*llava_next())


@pytest.mark.parametrize("image", [None, noise(40, 30, 1)], ids=["text", "image"])
def test_perplexity_is_that_of_the_tokens_behind_the_question_with_the_end_token(lmm, image):
    answers = ["a cat", "why a dog is what it is ?", "a cat", "is"]
    by_hand = []
    for answer in answers:  # each alone, token by token
        question, whole = lmm.prompt("what ?", image), lmm.prompt("what ?", image, answers=answer)
        start, tokens = question.inputs["input_ids"].shape[1], whole.inputs["input_ids"][0].tolist()
        last = max(n for n, token in enumerate(tokens) if token == lmm.tokenizer.eos_token_id)
        likely = torch.log_softmax(lmm.logits(whole)[0].double(), -1)
        losses = [-float(likely[n - 1, tokens[n]]) for n in range(start, last + 1)]
        assert len(losses) >= 2
        by_hand.append(math.exp(sum(losses) / len(losses)))
    assert perplexities(lmm, "what ?", image, answers, batch=2) == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize(
    ("answer", "fraction"),
    [("", 0), ("sad sad", 0), ("a b c", 0), ("a a a a", 1 / 2), ("A b c a B c", 1 / 4), ("x x x x x x x", 4 / 5)],
)
def test_repeated_trigrams_are_counted(answer, fraction):
    words = answer.lower().split()
    counts = Counter(" ".join(words[n : n + 3]) for n in range(len(words) - 2))
    assert sum(count - 1 for count in counts.values()) == pytest.approx(fraction * max(counts.total(), 1))
    assert repeated_trigrams(answer) == pytest.approx(fraction)


def test_fluency_falls_with_perplexity_and_with_repetitions_and_is_at_most_one():
    assert ReadAnswer("", 4.0, 0.0).fluency(8.0) == 1
    assert ReadAnswer("", 16.0, 0.0).fluency(8.0) == 0.5
    assert ReadAnswer("", 16.0, 0.25).fluency(8.0) == pytest.approx(0.375)
    assert ReadAnswer("", math.inf, 0.0).fluency(8.0) == 0


def test_the_control_of_ordinary_answers_is_not_in_the_reference(lmm):
    image, others = noise(40, 30, 0), [noise(40, 30, seed) for seed in range(1, 6)]
    found = answers_about_others(lmm, "what ?", image, others, batch=2, max_new_tokens=3)
    alone = [lmm.generate(lmm.prompt("what ?", other), max_new_tokens=3)[0] for other in others]
    assert [read.answer for read in found.reference] == alone[::2]
    assert [read.answer for read in found.control] == alone[1::2]
    expected = read_answers(lmm, "what ?", image, alone)
    assert [read.perplexity for read in found.control] == pytest.approx(
        [read.perplexity for read in expected[1::2]], rel=1e-3
    )
    with pytest.raises(ValueError, match="at least two"):
        answers_about_others(lmm, "what ?", image, others[:1])


def test_the_reference_is_the_median_perplexity():
    def read(perplexity):
        return ReadAnswer("", perplexity, 0.0)

    ordinary = Ordinary([read(1.0), read(4.0), read(100.0)], [read(8.0), read(2.0)])
    assert ordinary.perplexity == 4 and ordinary.control_fluency == [0.5, 1]
    assert ordinary.fluency(read(16.0)) == 0.25


def test_the_harmonic_mean_is_zero_without_the_concept():
    assert harmonic_mean(0, 1) == harmonic_mean(1, 0) == 0
    assert harmonic_mean(True, 0.5) == pytest.approx(1 / np.mean([1, 1 / 0.5]))


def test_the_dose_of_the_highest_mean_is_chosen_and_the_lowest_of_a_tie():
    assert best_dose([4, 1, 4, 1, 2], [0.2, 0.6, 0.4, 0.0, 0.3]) == 1
    assert best_dose([4, 4, 2, 2], [1.0, 0.0, 0.4, 0.5]) == 4
    with pytest.raises(ValueError, match="no answer"):
        best_dose([], [])


def test_an_answer_that_occurs_twice_is_read_once(lmm, monkeypatch):
    sizes = []
    real = fluency.LMM.cross_entropy
    monkeypatch.setattr(LMM, "cross_entropy", lambda self, p, d: sizes.append(len(p.answer_mask)) or real(self, p, d))
    perplexities(lmm, "what ?", None, ["a cat"] * 5 + ["a dog"])
    assert sizes == [2]
