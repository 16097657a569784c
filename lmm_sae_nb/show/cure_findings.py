"""Say in sentences what the cures of notebook 08 reach: on held-out cases, with new questions, in POPE and CHAIR."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmm_sae_nb.show.cure_sentences import UNKNOWN, cured_in_words, draws_in_words, empty_groups, fraction, interval
from lmm_sae_nb.show.report import over_saes

if TYPE_CHECKING:
    from lmm_sae_nb.hallucination.report import HeldOut, OtherAnswers
    from lmm_sae_nb.hallucination.search import Search
    from lmm_sae_nb.show.seed_study import SeedStudy
    from lmm_sae_nb.support.intervals import Mean
    from lmm_sae_nb.support.stages import Metrics

STAGE = "hallucination"
CONTROLS = ("random", "unrelated", "push", "prompt")  # of the fitted clamp
CURES = ("text", "fitted", "direction", "prompt")  # that POPE and CHAIR try
SEEN, NEW = "seen_questions", "new_questions"  # parts of the held-out cases, in the names of metrics


@dataclass(frozen=True)
class MeasuredCures:
    """What the page has measured.

    answers: of held-out cases, by method.
    titles: each method that was tried, and its words.
    metrics: of the stage `hallucination`.
    of_new: of the stage `new_questions`.
    field: of the stage `presence`, POPE and CHAIR.
    kinds: of the things that POPE asked about.
    search: that chose the fitted clamp.
    others: other questions, with the fitted clamp.
    questions: of the held-out cases.
    chosen_on: questions of the cases for the choice.
    """

    answers: HeldOut
    titles: Mapping[str, str]
    metrics: Metrics
    of_new: Metrics
    field: Metrics
    kinds: Sequence[str]
    search: Search
    others: OtherAnswers
    questions: Collection[str]
    chosen_on: Collection[str]

    def tried(self, methods: Sequence[str]) -> list[str]:
        """Return those of some methods that were tried; without draws, a control was not."""
        return [name for name in methods if name in self.titles]

    def draws(self, method: str) -> str:
        """Return a method's words and its balanced cured rate: "prompt, no SAE 0.20 [0.10, 0.30]"."""
        return f"{self.titles[method]} {draws_in_words(self.answers, method)}"

    def change(self, metric: str) -> str:
        """Return how a measure of POPE or CHAIR changes, with its interval."""
        ends = [self.field[f"{metric}{end}"] for end in ("", "_low", "_high")]
        return interval(ends, "{:+.2f}") if any(ends) else "0 (no change)"

    def against_direction(self) -> Mean | None:
        """Return the balanced cured rate of the fitted direction less that of the fitted latents.

        None if there is no hallucination, or nothing was fitted.
        """
        known = self.answers.words and "direction" in self.titles
        return self.answers.difference("fitted", "direction") if known else None


# ---- findings -------------------------------------------------------------------------------------------------------


def cure_findings(measured: MeasuredCures) -> list[str]:
    """Return what the page found about its cures: held-out cases first, then new questions, POPE and CHAIR."""
    answers = measured.answers
    return [
        f"The untouched model answers {_whole(measured.metrics, 'hallucination_rate')} of the contradicting cases "
        "wrongly.",
        *empty_groups(answers),
        *([*_text_clamp(measured), *_fitted_clamp(measured)] if answers.words else []),
        *_fitted_direction(measured),
        *_no_push(measured),
        _cost(measured),
        _new_questions(measured),
        *(_pope(measured, kind) for kind in measured.kinds),
        *_chair(measured),
    ]


def _text_clamp(measured: MeasuredCures) -> list[str]:
    answers, metrics = measured.answers, measured.metrics
    drawn = answers.by_draw("text_random") if "text_random" in measured.titles else []
    stronger = sum(rate >= metrics["text_balanced_cured_low"] for rate in drawn)
    verdict = ""
    if drawn:
        verdict = f" Controls: {measured.draws('text_random')}. " + (
            f"In {stronger} of these draws they cure about as much or more, so nothing shows that it matters that the "
            "latents stand for text."
            if stronger
            else "No random draw reaches the interval of the text latents."
        )
    return [
        f"{metrics['text_latents_clamped']} text latents at the patches cure {cured_in_words(answers, 'text')}: a "
        f"balanced rate of {fraction(metrics, 'text_balanced_cured')}.{verdict}",
        f"The text latents harm {fraction(metrics, 'text_harmed')} of the right answers, and keep "
        f"{_whole(metrics, 'text_other_answers_kept')} of the answers to other questions.",
    ]


def _fitted_clamp(measured: MeasuredCures) -> list[str]:
    answers, metrics, search = measured.answers, measured.metrics, measured.search
    raised = sum(trial.shift for trial in search.trials if trial.setting == search.chosen)
    controls, low = measured.tried(CONTROLS), metrics["fitted_balanced_cured_low"]
    not_beaten = [measured.titles[name] for name in controls if max(answers.by_draw(name)) >= low]
    return [
        f"{metrics['latents_clamped']} fitted latents at the words of the question cure "
        f"{cured_in_words(answers, 'fitted')}: a balanced rate of {fraction(metrics, 'fitted_balanced_cured')}. On "
        f"the cases of the search they raise the right answer's margin by {raised:.2f} logits on average.",
        f"Controls: {'; '.join(map(measured.draws, controls))}. "
        + (
            f"They do not clearly beat: {', '.join(not_beaten)}."
            if not_beaten
            else "The fitted latents beat every draw of all of them."
        ),
    ]


def _fitted_direction(measured: MeasuredCures) -> list[str]:
    if (gap := measured.against_direction()) is None:
        return []
    verdict = "beside the latents: no clear difference."
    if gap.low > 0:
        verdict = "more than the latents: the simple method is better."
    elif gap.high < 0:
        verdict = "beside the latents: the latents are better."
    return [
        "The direction that was fitted to the same cases, without an SAE, has "
        f"{fraction(measured.metrics, 'direction_balanced_cured')}. On the same cases this is "
        f"{interval(gap, '{:+.2f}')} {verdict}"
    ]


def _no_push(measured: MeasuredCures) -> list[str]:
    """Say what a push away from memory would spoil; nothing if no answer that agrees with memory is right."""
    if "fitted_harmed_agreeing" not in measured.metrics:
        return []
    agreeing = measured.answers.harmed("fitted", contradicts=False)
    return [
        "A push away from memory would cure both answers, too, and spoil answers that agree with memory. Of "
        f"{agreeing.cases} such answers the fitted clamp harms {interval(agreeing, '{:.0%}')}."
    ]


def _cost(measured: MeasuredCures) -> str:
    metrics = measured.metrics
    return (
        f"The cost of the fitted clamp: it harms {fraction(metrics, 'fitted_harmed')} of the right answers. Of "
        f"{len(measured.others.right)} other questions the model answers {_whole(metrics, 'other_questions_right')} "
        f"right, and {_whole(metrics, 'other_questions_right_after')} with the clamp; it keeps "
        f"{fraction(metrics, 'other_answers_kept')} of the answers."
    )


def _new_questions(measured: MeasuredCures) -> str:
    of_new, questions = measured.of_new, set(measured.questions)
    return (
        f"Held-out maps are asked {len(questions)} questions; {len(questions & set(measured.chosen_on))} of these also "
        f"occur in the choice. Fitted on {of_new['questions_fitted_on']} questions, a clamp of "
        f"{of_new['latents_clamped']} latents has a balanced cured rate of "
        f"{fraction(of_new, f'{SEEN}_fitted_balanced_cured')} on held-out maps with these questions. "
        f"{_unseen_questions(of_new)}"
    )


def _unseen_questions(of_new: Metrics) -> str:
    low, highest = f"{NEW}_fitted_balanced_cured_low", f"{NEW}_random_balanced_highest"
    if low not in of_new or highest not in of_new:
        return "We cannot say whether it helps with other questions: there is no case, or no control."
    return (
        "With the other questions, which this fit never saw, it has "
        f"{fraction(of_new, f'{NEW}_fitted_balanced_cured')}; random latents have "
        f"{of_new[f'{NEW}_random_balanced_lowest']:.2f} to {of_new[highest]:.2f}, and the fitted direction "
        f"{fraction(of_new, f'{NEW}_direction_balanced_cured')}. "
        + (
            "So it also helps with new questions about the same basins."
            if of_new[low] > of_new[highest]
            else "So we cannot say that it helps with new questions."
        )
    )


def _pope(measured: MeasuredCures, kind: str) -> str:
    field, titles, cures = measured.field, measured.titles, measured.tried(CURES)
    changes = "; ".join(f"{measured.change(f'{name}_{kind}_change')} ({titles[name]})" for name in cures)
    better = [titles[name] for name in cures if field[f"{name}_{kind}_change_low"] > 0]
    worse = [titles[name] for name in cures if field[f"{name}_{kind}_change_high"] < 0]
    random, popular, adversarial = (
        fraction(field, f"untouched_{kind}_{sampling}_accuracy") for sampling in ("random", "popular", "adversarial")
    )
    yes, yes_fitted = (fraction(field, f"{name}_{kind}_adversarial_yes") for name in ("untouched", "fitted"))
    return (
        f"POPE, {kind}s: the untouched model is right in {random} of the random, {popular} of the popular and "
        f"{adversarial} of the adversarial questions. Accuracy on all of them changes by {changes}. "
        f"Clearly better: {_listed(better)}. Clearly worse: {_listed(worse)}. Of the adversarial questions it answers "
        f"{yes} with *yes*, and with the fitted latents {yes_fitted}; 0.50 would be right."
    )


def _chair(measured: MeasuredCures) -> list[str]:
    """Say how much of what captions mention is absent; nothing without captions."""
    field, titles, cures = measured.field, measured.titles, measured.tried(CURES)
    if "captions" not in field:
        return []
    absent = [f"{fraction(field, f'{name}_chair_i')} ({titles.get(name, name)})" for name in ("untouched", *cures)]
    changes = [f"{measured.change(f'{name}_chair_s_change')} ({titles[name]})" for name in cures]
    worse = [titles[name] for name in cures if field[f"{name}_chair_s_change_low"] > 0]
    return [
        f"CHAIR: of the things that captions mention, these fractions are absent: {'; '.join(absent)}. The fraction of "
        f"captions that mention an absent thing changes by {'; '.join(changes)}. Clearly worse: {_listed(worse)}."
    ]


def _listed(methods: Sequence[str]) -> str:
    return "; ".join(methods) or "no method"


def _whole(metrics: Metrics, name: str) -> str:
    """Return a fraction in percent; if it is absent, there was no case, and the text says so."""
    return f"{metrics[name]:.0%}" if name in metrics else UNKNOWN


# ---- the result -----------------------------------------------------------------------------------------------------


def cure_in_short(measured: MeasuredCures, study: SeedStudy | None) -> str:
    """Return for the top of the page what the fitted clamp cures and harms, or that there is nothing to cure.

    study: the same page for several SAEs; None if there is none.
    """
    answers, metrics = measured.answers, measured.metrics
    of_pope = _pope_in_short(measured)
    if not answers.words:
        return (
            f"the model answers none of {metrics['maps']} held-out questions from memory, where the image contradicts "
            f"it. So there is nothing to cure.{of_pope}"
        )
    of_saes = over_saes(study, STAGE, "fitted_balanced_cured")
    both = "the mean of both" if len(answers.words) == 2 else "of each kind that there is"
    return (
        f"clamping {metrics['latents_clamped']} fitted latents at the words of the question cures "
        f"{cured_in_words(answers, 'fitted')}, on {metrics['maps']} new maps that contradict memory: a balanced cured "
        f"rate, {both}, of {fraction(metrics, 'fitted_balanced_cured')}. It harms "
        f"{fraction(metrics, 'fitted_harmed')} of the right answers and keeps "
        f"{fraction(metrics, 'other_answers_kept')} of the answers to other questions.{of_pope}"
        f"{f' Balanced over seeds: {of_saes}.' if of_saes else ''} Text latents at the patches, our version of the "
        f"paper's way, have a balanced rate of {fraction(metrics, 'text_balanced_cured')}."
    )


def cure_controls(measured: MeasuredCures) -> str:
    """Return for the top of the page the balanced cured rates of controls; empty if there is nothing to cure."""
    if not measured.answers.words:
        return ""
    of_text = measured.tried(["text_random"])
    return (
        "balanced cured rates to compare with. For the fitted latents: "
        + "; ".join(map(measured.draws, measured.tried(["random", "prompt"])))
        + "".join(f". For the text latents: {measured.draws(name)}" for name in of_text)
        + f".{_direction_in_short(measured)}"
    )


def _pope_in_short(measured: MeasuredCures) -> str:
    changes = " and ".join(f"{measured.change(f'fitted_{kind}_change')} ({kind}s)" for kind in measured.kinds)
    return changes and (f" The accuracy in POPE, questions whether something is in an image, changes by {changes}.")


def _direction_in_short(measured: MeasuredCures) -> str:
    if (gap := measured.against_direction()) is None:
        return ""
    verdict = "There is no clear difference"
    if gap.low > 0 or gap.high < 0:
        verdict = f"{'The simple method is' if gap.low > 0 else 'The latents are'} clearly better"
    return (
        " Without an SAE, a direction that was fitted to the same cases has "
        f"{fraction(measured.metrics, 'direction_balanced_cured')}: {interval(gap, '{:+.2f}')} against the fitted "
        f"latents. {verdict}."
    )
