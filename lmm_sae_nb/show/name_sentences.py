"""Say in sentences how many latents get a name, and how many names are right (notebook 03)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmm_sae_nb.show.panel_metrics import PanelMetric
from lmm_sae_nb.show.panel_sentences import against_controls, controls_in_short, detection_in_short
from lmm_sae_nb.show.report import PageResult, across_saes, over_saes, percent, published
from lmm_sae_nb.support.intervals import read_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lmm_sae_nb.show.panel import Panel
    from lmm_sae_nb.show.seed_study import SeedStudy
    from lmm_sae_nb.support.stages import Metrics

STAGE = "interpret"
NAMES = {
    "latents explained": PanelMetric("interpret", "explained_fraction"),
    "names right": PanelMetric("interpret", "concept_accuracy"),
    "concepts detected and named": PanelMetric("detect", "concept_recall"),
}
DETECTORS = {"latent": "best latent", "difference": "difference of means", "probe": "logistic probe"}


def name_findings(metrics: Metrics) -> list[str]:
    """Return how many latents get a name, and where the truth is known, how many names and refusals are right.

    metrics: of the stage `interpret`. Where there is no ground truth, they say nothing about right names.
    """
    return [
        *_outcomes(metrics),
        *_right_names(metrics),
        *_unseen(metrics),
        *_limits_of_the_rule(metrics),
        *_refusals(metrics),
    ]


def names_of_others(study: SeedStudy | None, panel: Panel | None, names: Mapping[str, str]) -> list[str]:
    """Return what SAEs of other seeds, control SAEs and detectors without an SAE reach.

    study, panel: None if there is none; then nothing is said of its SAEs.
    names: metric to its words, of those that the study has.
    """
    return [*across_saes(study, STAGE, names), *against_controls(panel, NAMES), *_detectors(panel)]


def name_result(metrics: Metrics, study: SeedStudy | None = None, panel: Panel | None = None) -> PageResult:
    """Return how many latents get a name and how many names are right, beside the paper's.

    metrics: of the stage `interpret`.
    study, panel: of other seeds, and of control SAEs; None if there is none.
    """
    seeds = over_saes(study, STAGE, "concept_accuracy")
    ours = f"{_named_in_short(metrics)}{f' Right names over seeds: {seeds}.' if seeds else ''}"
    people, model = (percent(published("judge", name)) for name in ("judged_people", "judged"))
    world = ""
    if "concepts_present" in metrics:
        world = f"The held-out scenes of Picture World show {metrics['concepts_present']} concepts. "
    controls = [controls_in_short(panel, NAMES), *_detectors(panel)]
    return PageResult(
        f"{ours} In brackets: 99% intervals.",
        "it explains 5,000 latents and does not report how many were refused. "
        f"People accept {people} of the names, GPT-4o {model} (Table 2).",
        "to accept a name is weaker than our test, which asks for the one true concept; "
        f"[notebook 04](04_score_interpretations) has the number to compare. {world}Our explainer was trained to name "
        "the concepts of its world.",
        " ".join(filter(None, controls)),
    )


# ---- findings -------------------------------------------------------------------------------------------------------


def _outcomes(m: Metrics) -> list[str]:
    return [
        f"The explainer names {m['explained']:,} of {m['asked']:,} latents ({percent(m['explained_fraction'])}). It "
        f"refuses {m['refused']:,}, {m.get('refused_low_confidence', 0):,} of these because its confidence is too low."
    ]


def _right_names(m: Metrics) -> list[str]:
    sentences = []
    if "concept_accuracy" in m:
        sentences.append(
            f"{percent(read_mean(m, 'concept_accuracy'), 1)} of the names are the true concept (in brackets: the 99% "
            f"interval). {percent(m['concept_common'])} are at least one of the concepts that the images have in "
            "common."
        )
    if "concept_accuracy_guessed" in m:
        other = _if_known(m, "; another name is right in {}", "concept_accuracy_shuffled", 1)
        sentences.append(
            "Guessed names, those of random latents of the same kind, are right in "
            f"{percent(read_mean(m, 'concept_accuracy_guessed'), 1)}{other}."
        )
    return sentences


def _unseen(m: Metrics) -> list[str]:
    if "concept_accuracy_unseen" not in m:
        return []
    guessed = _if_known(m, "; of guessed names {}", "concept_accuracy_guessed_unseen", 1)
    return [
        f"Its training had masks of {m['asked'] - m['asked_unseen']:,} of the latents. It names "
        f"{m['explained_unseen']:,} of the other {m['asked_unseen']:,}. "
        f"{percent(read_mean(m, 'concept_accuracy_unseen'), 1)} of these names are right{guessed}."
    ]


def _limits_of_the_rule(m: Metrics) -> list[str]:
    if "concept_accuracy" not in m:
        return []
    return [
        f"{percent(m['answerable_fraction'])} of the latents have a true concept. No explainer can rightly name more. "
        "With the same masks on random images, the rule finds a concept for "
        f"{percent(read_mean(m, 'answerable_fraction_random'))}.",
        f"Of {m['concepts_present']} concepts in the held-out scenes, {percent(m['concepts_detected'])} have a latent "
        f"that detects them, {percent(m['concept_recall'])} one that also carries their name. With the label maps of "
        f"other scenes, {percent(read_mean(m, 'concepts_detected_by_chance'))} have such a latent.",
    ]


def _refusals(m: Metrics) -> list[str]:
    if "refusal_precision" not in m:
        return []
    return [
        f"{percent(m['refusal_precision'])} of the refusals are right: these images have nothing in common, or only a "
        "detail."
    ]


# ---- in short, and without an SAE -----------------------------------------------------------------------------------


def _named_in_short(m: Metrics) -> str:
    if "concept_accuracy_unseen" not in m:
        return f"the explainer names {m['explained']:,} of {m['asked']:,} live latents{_right_by_chance(m)}."
    return (
        "the explainer was trained on masks of some of the latents. It names "
        f"{m['explained_unseen']:,} of the other {m['asked_unseen']:,}{_right_by_chance(m, '_unseen')}. Of all "
        f"{m['asked']:,} live latents it names {m['explained']:,}; {percent(read_mean(m, 'concept_accuracy'))} of "
        "these names are right."
    )


def _right_by_chance(m: Metrics, end: str = "") -> str:
    """Return how many names are right, and how many by two kinds of chance; empty if they were not measured."""
    if f"concept_accuracy_guessed{end}" not in m:
        return ""
    own, guessed = (percent(read_mean(m, f"concept_accuracy{kind}{end}")) for kind in ("", "_guessed"))
    other = _if_known(m, ", another latent's name in {}", f"concept_accuracy_shuffled{end}")
    return f"; {own} of these names are right. By chance: guessed names of the same kind are right in {guessed}{other}"


def _if_known(m: Metrics, text: str, name: str, digits: int = 0) -> str:
    """Return a text with a fraction in the place of `{}`; empty if it was not measured, as with a single name."""
    return text.format(percent(read_mean(m, name), digits)) if name in m else ""


def _detectors(panel: Panel | None) -> list[str]:
    if not (found := detection_in_short(panel, DETECTORS)):
        return []
    return [
        f"As detectors of a concept, mean F1 on held-out scenes: {found} The last two need no SAE, but labels to learn "
        "from."
    ]
