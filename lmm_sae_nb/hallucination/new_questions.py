"""Does a fitted clamp correct answers to questions that it never saw? Fit it on half of the questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lmm_sae_nb.hallucination.answers import Shift, strength
from lmm_sae_nb.hallucination.cases import Answered, Case
from lmm_sae_nb.hallucination.fit import ASKED, FitSettings, fit
from lmm_sae_nb.hallucination.report import HeldOut, Method, equal_strength, over_draws, try_methods
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.support.intervals import bounds
from lmm_sae_nb.support.stages import Metrics


def half_of_questions(cases: Sequence[Case], seed: int = 0) -> list[str]:
    """Return half of the questions that cases ask: half of every group and taught answer, rounded down.

    Groups that have only one question with a taught answer are halved together.

    seed: of the draw.
    """
    kinds: dict[tuple[str, str], set[str]] = {}
    for case in cases:
        taught = case.tempting if case.contradicts else case.right
        kinds.setdefault((case.group, taught), set()).add(case.question)
    several = [questions for _, questions in sorted(kinds.items()) if len(questions) > 1]
    alone: dict[str, set[str]] = {}
    for (_, taught), questions in sorted(kinds.items()):
        if len(questions) == 1:
            alone.setdefault(taught, set()).update(questions)
    rng, half = np.random.default_rng(seed), []
    for questions in [*several, *(alone[taught] for taught in sorted(alone))]:
        half += rng.permutation(sorted(questions))[: len(questions) // 2].tolist()
    return half


@dataclass(frozen=True)
class NewQuestions:
    """A clamp that was fitted on half of the questions, tried on other images with both halves.

    fitted_on: the questions of the fit.
    latents: that the clamp sets.
    parts: held-out answers by `seen` (the same questions) and `new` (the others), to the methods `fitted`, `random`
        (latents of the same number and strength) and `direction` (fitted without an SAE). If the half has no wrong
        answer, nothing was fitted, and there are no methods.
    """

    fitted_on: list[str]
    latents: int
    parts: dict[str, HeldOut]

    @property
    def metrics(self) -> Metrics:
        """Hallucinations, balanced cured rates and harm of each part and method, with intervals.

        A fraction of no cases is left out.
        """
        metrics: Metrics = {"latents_clamped": self.latents, "questions_fitted_on": len(self.fitted_on)}
        for part, answers in self.parts.items():
            metrics[f"{part}_questions_hallucinations"] = int(answers.wrong.sum())
            for method in answers.methods:
                if answers.words:
                    metrics |= bounds(f"{part}_questions_{method}_balanced_cured", answers.balanced(method))
                if any(answers.untouched):
                    metrics |= bounds(f"{part}_questions_{method}_harmed", answers.harmed(method))
            if answers.words and "random" in answers.methods:
                metrics |= over_draws(f"{part}_questions_random_balanced", answers.by_draw("random"))
        return metrics


def try_new_questions(
    place: SAEInPlace,
    wrong: Sequence[Case],
    right: Sequence[Case],
    others: Sequence[Answered],
    held_out: Sequence[Case],
    live: Iterable[int],
    *,
    settings: FitSettings = FitSettings(),  # noqa: B008  (frozen)
    wrong_cases: int = 64,
    right_cases: int = 32,
    draws: int = 3,
    keep_error: bool = True,
    seed: int = 0,
) -> NewQuestions:
    """Fit a clamp on half of the questions, and try it on other images with these questions and with the other half.

    The largest clamp is taken, without a search, so the cases of the fit are the only ones that it saw. If no case of
    the half is answered wrong, nothing is fitted.

    wrong: cases to choose from that are answered wrong.
    right: cases to choose from that are answered right.
    others: questions that have nothing to do with the cases.
    held_out: cases with other images, about the same questions.
    live: latents for the control.
    settings: of the fit.
    wrong_cases: of `wrong` with these questions, the first ones.
    right_cases: of `right` with these questions, the first ones.
    draws: of the random latents.
    keep_error: whether what the SAE leaves unexplained stays in.
    seed: of the half and of the random latents.
    """
    half = half_of_questions([*wrong, *right], seed)
    known = [[case for case in group if case.question in half] for group in (wrong, right)]
    fitted = fit(place, known[0][:wrong_cases], known[1][:right_cases], others, ASKED, settings, keep_error=keep_error)
    clamp = fitted.clamps[max(fitted.clamps)] if fitted.clamps else ()
    size = strength(place, held_out[:8], clamp, ASKED, keep_error=keep_error)
    methods = {
        "fitted": Method((clamp,), ASKED),
        "random": Method(equal_strength(live, len(clamp), size, draws, seed), ASKED),
        "direction": Method((Shift(tuple(fitted.direction)),), ASKED),
    }
    methods = {name: method for name, method in methods.items() if fitted.clamps and method.settings}
    parts = {
        "seen": [case for case in held_out if case.question in half],
        "new": [case for case in held_out if case.question not in half],
    }
    return NewQuestions(
        half,
        len(clamp),
        {name: try_methods(place, cases, methods, keep_error=keep_error) for name, cases in parts.items()},
    )
