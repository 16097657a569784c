"""Measure clamps on cases that took no part in the choice: what they cure, what they harm, beside controls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from lmm_sae_nb.hallucination.answers import Answers, Edits, Setting, first_tokens, under
from lmm_sae_nb.hallucination.cases import Case
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.steer.steering import Edit, Scope
from lmm_sae_nb.support.intervals import Mean, Proportion, bounds, mean_interval, mean_of_fractions, proportion
from lmm_sae_nb.support.stages import Metrics


@dataclass(frozen=True)
class Method:
    """A way to correct answers, which held-out cases try.

    settings: one, or several draws of a control.
    scope: the tokens that are clamped.
    before: words that are put before the question.
    """

    settings: tuple[Setting, ...]
    scope: Scope = Scope()
    before: str = ""


@dataclass(frozen=True)
class HeldOut:
    """Held-out cases, whether the untouched model answers each right, and whether it is right by each method.

    answer: the right answer.
    contradicts: whether the image contradicts what was taught.
    group: the heading of the case.
    untouched: whether the untouched model is right.
    methods: for each method, and each of its draws, whether the model is right.
    """

    answer: list[str]
    contradicts: list[bool]
    group: list[str]
    untouched: list[bool]
    methods: dict[str, list[list[bool]]]

    @property
    def words(self) -> list[str]:
        """The right answers of the hallucinations."""
        return sorted({word for word, wrong in zip(self.answer, self.wrong, strict=True) if wrong})

    @property
    def wrong(self) -> np.ndarray:
        """Which cases are hallucinations: answered wrong against what the image shows."""
        return np.array(self.contradicts, bool) & ~np.array(self.untouched, bool)

    @property
    def hallucinations(self) -> dict[str, int]:
        """The number of hallucinations for each right answer of a held-out case, 0 included."""
        answer = np.array(self.answer)
        return {word: int((self.wrong & (answer == word)).sum()) for word in sorted(set(self.answer))}

    def cured(self, method: str) -> dict[str, Proportion]:
        """Return for each right answer the fraction of hallucinations that a method turns right, over all its draws.

        A right answer without hallucinations is left out.
        """
        right, answer = np.array(self.methods[method], bool), np.array(self.answer)
        return {word: proportion(right[:, self.wrong & (answer == word)].ravel()) for word in self.words}

    def balanced(self, method: str) -> Mean:
        """Return the balanced cured rate: the mean of the fractions cured, in which each right answer counts the same.

        A push towards one answer cures one kind of case and none of the other, so it stays at 0.5 or below. If all
        hallucinations have one right answer, the rate is the fraction of these, and a push may reach 1.

        Raises:
            ValueError: there are no hallucinations.
        """
        return mean_of_fractions(list(self.cured(method).values()))

    def by_draw(self, method: str) -> list[float]:
        """Return the balanced cured rate of each draw; there must be hallucinations."""
        right, answer = np.array(self.methods[method], bool), np.array(self.answer)
        rates = [right[:, self.wrong & (answer == word)].mean(1) for word in self.words]
        return np.mean(rates, axis=0).tolist()

    def harmed_by_draw(self, method: str) -> list[float]:
        """Return the fraction of right answers that each draw turns wrong."""
        return (~np.array(self.methods[method], bool)[:, np.array(self.untouched, bool)]).mean(1).tolist()

    def difference(self, one: str, other: str) -> Mean:
        """Return the balanced cured rate of `other` less that of `one`, on the same cases, with its interval.

        Of a method with several draws the mean over draws counts for each case. A single case with some right answer
        leaves open all that its difference may be, from -1 to 1.
        """
        answer = np.array(self.answer)
        change = np.mean(self.methods[other], axis=0) - np.mean(self.methods[one], axis=0)
        of_words = [change[self.wrong & (answer == word)] for word in self.words]
        parts = [mean_interval(each) if len(each) > 1 else Mean(float(each[0]), -1.0, 1.0) for each in of_words]
        return mean_of_fractions([Proportion(*part, 0) for part in parts])

    def harmed(self, method: str, contradicts: bool | None = None) -> Proportion:
        """Return the fraction of right answers that a method turns wrong, over all its draws.

        contradicts: only of cases whose image contradicts what was taught, or agrees with it; None for all.

        Raises:
            ValueError: there are no such cases.
        """
        asked = np.array(self.untouched, bool)
        if contradicts is not None:
            asked &= np.array(self.contradicts, bool) == contradicts
        return proportion(~np.array(self.methods[method], bool)[:, asked].ravel())

    def cured_or_none(self, method: str) -> dict[str, Mean | None]:
        """Return what `cured` returns for each right answer of a held-out case; None where it has no hallucination."""
        cured = self.cured(method)
        return {word: Mean(*cured[word][:3]) if word in cured else None for word in self.hallucinations}

    def cured_or_range(self, method: str) -> Mean | None:
        """Return the balanced cured rate with its interval; of several draws the median, the lowest and the highest.

        Without hallucinations it is None.
        """
        if not self.words:
            return None
        return self.balanced(method) if len(self.methods[method]) == 1 else _range(self.by_draw(method))

    def harmed_or_range(self, method: str) -> Mean | None:
        """Return the fraction of right answers harmed, as `cured_or_range` returns that of wrong ones cured.

        Without right answers it is None.
        """
        if not any(self.untouched):
            return None
        harmed = self.harmed_by_draw(method)
        return Mean(*self.harmed(method)[:3]) if len(harmed) == 1 else _range(harmed)

    def cured_by_group(self, method: str) -> dict[str, dict[str, Mean]]:
        """Return, for each group, the fraction cured of its hallucinations, by their right answer."""
        groups, answer, right = np.array(self.group), np.array(self.answer), np.array(self.methods[method], bool)
        rows: dict[str, dict[str, Mean]] = {}
        for group in sorted(set(groups[self.wrong].tolist())):
            of_group = self.wrong & (groups == group)
            parts = {word: of_group & (answer == word) for word in self.words}
            rows[group] = {
                f"right answer {word}": Mean(*proportion(right[:, part].ravel())[:3])
                for word, part in parts.items()
                if part.any()
            }
        return rows

    @property
    def metrics(self) -> Metrics:
        """Counts, and for each method the balanced cured rate, its parts and the harm, with 99% intervals.

        A fraction of no cases is left out.
        """
        contradicts, before = np.array(self.contradicts, bool), np.array(self.untouched, bool)
        metrics: Metrics = {
            "hallucinations": int(self.wrong.sum()),
            "right_answers": int(before.sum()),
        }
        metrics |= {f"hallucinations_right_{word}": count for word, count in self.hallucinations.items()}
        for method in self.methods:
            metrics |= bounds(f"{method}_balanced_cured", self.balanced(method)) if self.words else {}
            for word, cured in self.cured(method).items():
                metrics |= bounds(f"{method}_cured_right_{word}", cured)
            if self.words:
                metrics |= over_draws(f"{method}_balanced", self.by_draw(method))
            if before.any():
                metrics |= bounds(f"{method}_harmed", self.harmed(method))
                metrics |= over_draws(f"{method}_harmed", self.harmed_by_draw(method))
            if (before & ~contradicts).any():
                metrics |= bounds(f"{method}_harmed_agreeing", self.harmed(method, contradicts=False))
        return metrics


def _range(values: Sequence[float]) -> Mean:
    """Return the median of several draws, with the lowest and the highest as its ends."""
    return Mean(float(np.median(values)), min(values), max(values))


def over_draws(name: str, values: Sequence[float]) -> Metrics:
    """Return the median, the lowest and the highest of several draws as metrics."""
    return dict(zip((f"{name}_median", f"{name}_lowest", f"{name}_highest"), _range(values), strict=True))


def answer_by(
    place: SAEInPlace, cases: Sequence[Case], methods: Mapping[str, Method], *, keep_error: bool = True
) -> dict[str, Answers]:
    """Answer each case by each method; the settings of a method are the rows of its answers.

    keep_error: whether what the SAE leaves unexplained stays in.
    """
    found: dict[str, Answers] = {}
    for before in dict.fromkeys(method.before for method in methods.values()):
        together = {name: each for name, each in methods.items() if each.before == before}
        asked = [replace(case, question=f"{before} {case.question}".strip()) for case in cases]
        settings = [(setting, method.scope) for method in together.values() for setting in method.settings]
        settings, scopes = zip((None, Scope()), *settings, strict=True)
        answers = first_tokens(place, asked, settings, scopes, keep_error=keep_error)
        sizes = [1, *(len(method.settings) for method in together.values())]
        parts = map(Answers._make, zip(*(rows.split(sizes) for rows in answers), strict=True))
        found |= zip(together, list(parts)[1:], strict=True)
    return {name: found[name] for name in methods}


def try_methods(
    place: SAEInPlace, cases: Sequence[Case], methods: Mapping[str, Method], *, keep_error: bool = True
) -> HeldOut:
    """Answer held-out cases untouched and by each method.

    keep_error: whether what the SAE leaves unexplained stays in.
    """
    everything = {"": Method((None,)), **methods}
    answers = answer_by(place, cases, everything, keep_error=keep_error)
    right = {name: answers[name].right.tolist() for name in everything}
    (untouched,) = right.pop("")
    about = ([getattr(case, name) for case in cases] for name in ("right", "contradicts", "group"))
    return HeldOut(*about, untouched, right)


def equal_strength(
    candidates: Iterable[int], count: int, strength: float, draws: int, seed: int = 0
) -> tuple[Edits, ...]:
    """Draw clamps of random latents that change the layer's output about as much as a clamp of this strength.

    Each of `count` latents is clamped to strength / sqrt(count). Rows of `W_dec` have norm 1 and are nearly orthogonal,
    so the sum of `count` of them has about the norm `strength`.

    candidates: the latents to draw from.
    strength: norm of the change.
    draws: number of clamps; if there are fewer candidates than `count`, there are none.
    """
    candidates = torch.tensor(sorted(candidates))
    if len(candidates) < count:
        return ()
    generator = torch.Generator().manual_seed(seed)
    value = strength / max(1, count) ** 0.5
    drawn = [candidates[torch.randperm(len(candidates), generator=generator)[:count]].tolist() for _ in range(draws)]
    return tuple(tuple(Edit(latent, value) for latent in latents) for latents in drawn)


@dataclass(frozen=True)
class OtherAnswers:
    """What a clamp does to questions that have nothing to do with the cases.

    right: whether the untouched model's answer is right.
    right_clamped: whether the answer under the clamp is right.
    kept: whether the two are the same, word for word.
    """

    right: list[bool]
    right_clamped: list[bool]
    kept: list[bool]


@torch.no_grad()
def answer_others(
    place: SAEInPlace,
    rows: Iterable[Mapping],
    methods: Mapping[str, Method],
    *,
    keep_error: bool = True,
    batch: int = 24,
) -> dict[str, OtherAnswers]:
    """Answer other questions in full, once untouched and once by each method.

    rows: with image, question and the right answer; capitals and spaces do not count.
    methods: each with one setting, which is no `Push`.
    keep_error: whether what the SAE leaves unexplained stays in.
    batch: questions at once.
    """
    lmm, rows = place.lmm, iter(rows)
    expected, before, after = [], [], {name: [] for name in methods}
    while block := list(islice(rows, batch)):
        prompt = lmm.prompt([row["question"] for row in block], [row["image"] for row in block])
        expected += [_bare(row["answer"]) for row in block]
        before += lmm.generate(prompt)
        for name, method in methods.items():
            (setting,) = method.settings
            with under(place, prompt, setting, method.scope, keep_error=keep_error):
                after[name] += lmm.generate(prompt)

    def right(answers: list[str]) -> list[bool]:
        return [_bare(answer) == true for answer, true in zip(answers, expected, strict=True)]

    return {
        name: OtherAnswers(right(before), right(answers), [a == b for a, b in zip(before, answers, strict=True)])
        for name, answers in after.items()
    }


def _bare(answer: str) -> str:
    """Return an answer without capitals and spaces."""
    return "".join(answer.lower().split())


def other_metrics(others: OtherAnswers, prefix: str = "") -> Metrics:
    """Return the fractions of other questions answered right before and after, and of answers kept, with intervals.

    Without other questions they are left out.

    prefix: of the names.
    """
    hits = {
        "other_questions_right": others.right,
        "other_questions_right_after": others.right_clamped,
        "other_answers_kept": others.kept,
    }
    return {
        name: value
        for title, marks in hits.items()
        if marks
        for name, value in bounds(f"{prefix}{title}", proportion(marks)).items()
    }
