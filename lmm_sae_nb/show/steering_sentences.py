"""Say in sentences what clamped latents do (notebook 06), also where too few latents have a name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmm_sae_nb.show.panel_metrics import PanelMetric
from lmm_sae_nb.show.panel_sentences import against_controls, controls_in_short, steering_in_short
from lmm_sae_nb.show.report import PageResult, across_saes, over_saes, published
from lmm_sae_nb.support.intervals import read_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lmm_sae_nb.show.panel import Panel
    from lmm_sae_nb.show.seed_study import SeedStudy
    from lmm_sae_nb.support.stages import Metrics

STAGE = "steer"
WHOLE = 0.8  # steered answers have at least this part of the unsteered fluency, or many are broken
COUNT = "{:.0f}"
NAMED = {"objects named, of 100 (at most 30 latents)": PanelMetric("steer", "named_of_100")}
WAYS = {
    "latent": "clamped latents",
    "difference": "differences of means",
    "probe": "logistic probes",
    "prompt": "prompts",
}
CASES = {
    "feelings_named": "latents that make the model report their feeling",
    "stories_named": "latents that bring their feeling into a story",
}
FLUENCY = {"fluency_ratio": "fluency, relative to unsteered answers"}


def steering_findings(metrics: Metrics, highest_dose: float, study: SeedStudy | None = None) -> list[str]:
    """Return what clamped latents do: objects, feelings and stories, words that are read, kinds at the first ranks.

    metrics: of the stage `steer`.
    highest_dose: of those that were tried for objects.
    study: of other seeds, for the feelings; None if there is none.
    """
    return [
        *_of_objects(metrics, highest_dose),
        *_of_cases(metrics, study),
        *_of_words(metrics),
        *_of_ranks(metrics),
    ]


def steering_of_others(study: SeedStudy | None, panel: Panel | None, objects: Mapping[str, str]) -> list[str]:
    """Return what other ways to steer, SAEs of other seeds and control SAEs reach.

    study, panel: None if there is none; then nothing is said of its SAEs.
    objects: metric to its words, of those that the study has for objects.
    """
    return [
        *_other_ways(panel),
        *across_saes(study, STAGE, objects, COUNT.format),
        *across_saes(study, STAGE, CASES, COUNT.format),
        *across_saes(study, STAGE, FLUENCY, "{:.2f}".format),
        *against_controls(panel, NAMED, COUNT),
    ]


def steering_result(metrics: Metrics, study: SeedStudy | None = None, panel: Panel | None = None) -> PageResult:
    """Return the result of steering, beside the paper's.

    metrics: of the stage `steer`.
    study, panel: of other seeds, and of control SAEs; None if there is none.
    """
    ours = "fewer than three latents have a name, so none is clamped on a white image."
    why = "there are too few named latents."
    if metrics["objects_steered"]:
        ours = _objects_in_short(metrics, study)
        why = (
            f"probably because we clamp an early layer, at {metrics['dose']:g} times what any image causes. We did not "
            "test this."
        )
    paper = (
        f"{published(STAGE, 'changed_of_100'):.0f} of 100 object latents change the answer. How often an answer names "
        "the object is not reported, nor the dose."
    )
    controls = [controls_in_short(panel, NAMED, COUNT), *_other_ways(panel)]
    return PageResult(ours, paper, why, " ".join(filter(None, controls)))


# ---- objects --------------------------------------------------------------------------------------------------------


def _of_objects(m: Metrics, highest_dose: float) -> list[str]:
    if not m["objects_steered"]:
        return ["Fewer than three latents have a name, so none is clamped on a white image."]
    return [_objects_named(m, highest_dose), _objects_fluency(m), *_other_doses_and_changes(m), _clamp_values(m)]


def _objects_named(m: Metrics, highest_dose: float) -> str:
    apart = m["named_of_100_low"] > m["control_named_of_100_high"]
    limit = f" {m['dose']:g} is the end of our range of doses; more was not tried on this page."
    return (
        f"At dose {m['dose']:g}, {m['named_of_100']:.0f} of 100 object latents make the model name their object on a "
        f"white image. Random latents: {m['control_named_of_100']:.0f} of 100. The intervals "
        f"{'do not overlap' if apart else 'overlap'}.{limit if m['dose'] == highest_dose else ''}"
    )


def _objects_fluency(m: Metrics) -> str:
    of_named = read_mean(m, "named_fluency") if "named_fluency" in m else "unknown"
    return (
        f"The fluency of all answers is {read_mean(m, 'fluency')}, that of the answers that name the object "
        f"{of_named}. Unsteered answers have {read_mean(m, 'unsteered_fluency')}. "
        f"{m['fluent_named_of_100']:.0f} of 100 latents give an answer that names the object and has at least "
        f"{WHOLE:g} of the unsteered fluency."
    )


def _other_doses_and_changes(m: Metrics) -> list[str]:
    return [
        f"Without regard to fluency, the latents that choose would take dose {m['naming_dose']:g}: "
        f"{m['naming_dose_named_of_100']:.0f} of 100 reported latents name their object there.",
        f"{m['changed_of_100']:.0f} of 100 object latents change the answer, but so do "
        f"{m['control_changed_of_100']:.0f} of 100 random latents. A changed answer does not show that a name is "
        "right.",
    ]


def _clamp_values(m: Metrics) -> str:
    return (
        "A dose is relative to the latent's own maximum. Object latents are clamped to "
        f"{m['clamp_value']:.0f} on average, random latents to {m['control_clamp_value']:.0f}. Rows of `W_dec` have "
        "norm 1, so this is about the norm of the change in a token's reconstruction. With the values of the object "
        f"latents, {m['control_value_changed_of_100']:.0f} of 100 random latents change the answer. "
        f"{m['control_value_named_of_100']:.0f} of 100 of these answers name the object."
    )


def _objects_in_short(m: Metrics, study: SeedStudy | None) -> str:
    seeds = over_saes(study, STAGE, "named_of_100", COUNT.format)
    return (
        f"{m['named_of_100']:.0f} of 100 object latents (99% interval {m['named_of_100_low']:.0f} to "
        f"{m['named_of_100_high']:.0f}) make the model name their object, {m['fluent_named_of_100']:.0f} of them in a "
        f"fluent answer. Random latents at the same values: {m['control_value_named_of_100']:.0f} of 100 ("
        f"{m['control_value_named_of_100_low']:.0f} to {m['control_value_named_of_100_high']:.0f}). A clamp changes "
        f"the answer for {m['changed_of_100']:.0f} of 100 object latents, and for "
        f"{m['control_value_changed_of_100']:.0f} of 100 random latents at the same values."
        + (f" Named over seeds: {seeds}." if seeds else "")
    )


# ---- feelings and stories -------------------------------------------------------------------------------------------


def _of_cases(m: Metrics, study: SeedStudy | None) -> list[str]:
    if not m["feelings_steered"]:
        return ["Fewer than two latents are named for a feeling, so there is no case study."]
    return [
        _feelings(m, study),
        _stories(m),
        f"At any dose, whole sentence or not, {m['feelings_named_any_dose']} of {m['feelings_steered']} latents bring "
        f"the feeling into an answer, and {m['stories_named_any_dose']} into a story.",
    ]


def _feelings(m: Metrics, study: SeedStudy | None) -> str:
    seeds = over_saes(study, STAGE, "feelings_named", COUNT.format)
    return (
        f"{m['feelings_named']} of {m['feelings_steered']} latents named for a feeling make the model report it"
        f"{f' ({seeds})' if seeds else ''}, at the dose that the other latents choose. With the next feeling's latent, "
        f"it reports the first feeling for {m['feelings_control_named'] or 'none'}. The fluency is "
        f"{read_mean(m, 'feelings_fluency')}, that of unsteered answers {read_mean(m, 'feelings_unsteered_fluency')}."
    )


def _stories(m: Metrics) -> str:
    verdict = "So many steered stories are broken at the chosen dose."
    if m["stories_fluency_ratio"] >= WHOLE:
        verdict = "So steered stories stay about as whole as others."
    return (
        f"{m['stories_named']} of {m['stories_steered']} latents bring their feeling into a story (control: "
        f"{m['stories_control_named']}). The fluency is {read_mean(m, 'stories_fluency')}, that of unsteered stories "
        f"{read_mean(m, 'stories_unsteered_fluency')}. {verdict}"
    )


# ---- words, and kinds at the first ranks ----------------------------------------------------------------------------


def _of_words(m: Metrics) -> list[str]:
    if not m["word_latents"]:
        return ["Fewer than two different names are of objects or faces, so no name is read."]
    low, high = m["word_difference_low"], m["word_difference_high"]
    effect = "the interval contains 0, so we see no effect of the word"
    if low > 0 or high < 0:
        effect = f"on average, a latent is {'more' if low > 0 else 'less'} active on its name"
    return [
        f"When the model reads a latent's name, the latent reaches on average {m['word_on_name']:.1%} of its maximum "
        f"on patches; with other names {m['word_on_others']:.1%}. The mean difference within a latent is "
        f"{100 * m['word_difference']:.1f} points (99% interval {100 * low:.1f} to {100 * high:.1f}): {effect}.",
        f"{m['word_silent']} of {m['word_latents']} latents are silent on every name (the origin of the figure). "
        f"{m['word_more_on_name']} are more active on their name than on the mean of the others, "
        f"{m['word_more_on_others']} less. For the second, a response to one of the many other names is enough.",
    ]


def _of_ranks(m: Metrics) -> list[str]:
    usual = m["all_latents_low_level"]
    low, high = m["top_ranks_low_level_low"], m["top_ranks_low_level_high"]
    often = "more frequent" if low > usual else "less frequent" if high < usual else "neither more nor less frequent"
    return [
        f"Low-level kinds (colour, texture, material) name {m['top_ranks_low_level']:.0%} (99% interval over images "
        f"{low:.0%} to {high:.0%}) of the latents in ranks 1 to 10, and {usual:.0%} of all latents that notebook 03 "
        f"asked about: they are {often} in the first ranks. The paper says that low-level features often are highly "
        "active.",
        f"Scenes name {m['top_ranks_scene']:.0%} of the latents in ranks 1 to 10, and {m['all_latents_scene']:.0%} of "
        "all that it asked about.",
        f"The panel answers a moved slider in {m['panel_slider_seconds']:.2f} s.",
    ]


# ---- other ways -----------------------------------------------------------------------------------------------------


def _other_ways(panel: Panel | None) -> list[str]:
    if not (named := steering_in_short(panel, WAYS)):
        return []
    return [
        "Four ways to steer towards the same objects, each with the dose that suits it; objects named, of 100: "
        f"{named} Differences and probes are no latents: they are directions that learned from labels "
        "([A4](A4_controls_and_metrics))."
    ]
