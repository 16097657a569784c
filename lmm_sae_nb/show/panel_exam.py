"""Examine metrics over a panel of SAEs: which of them tells trained SAEs from controls?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING

from lmm_sae_nb.measures.discriminability import Discriminability, compare_metrics, separation
from lmm_sae_nb.show.panel_metrics import BY_STEERING, EXAMINED, OBJECT_LATENTS, STEERING, PanelMetric
from lmm_sae_nb.show.panel_sentences import against, ends
from lmm_sae_nb.show.panel_views import panel_values
from lmm_sae_nb.show.report import percent
from lmm_sae_nb.support.intervals import read_mean

if TYPE_CHECKING:
    from lmm_sae_nb.show.panel import Panel
    from lmm_sae_nb.support.stages import Metrics

NEW_LAYERS = "untrained_layers"  # the control that keeps the trained image encoder
OTHER_MODELS = ("untrained", NEW_LAYERS)  # controls of a model with new weights
FIRST = ("concepts detected", "concepts named", "names right")  # the truth
LEFT_OUT = {"nmf": ("FVU",)}  # it would hide all other differences
NAMED = "objects named, of 100"


@dataclass(frozen=True)
class Exam:
    """The metrics of a panel, examined.

    panel: None if there is none; then nothing is examined.
    values: SAE to title to value.
    metrics: what was found of each metric. The first ones are the truth; the others are sorted by separation.
    """

    panel: Panel | None
    values: Mapping[str, Mapping[str, float]]
    metrics: Sequence[Discriminability]

    def column(self, title: str, group: str, but: Sequence[str] = ()) -> list[float]:
        """Return a metric of a group's SAEs, but for some of them."""
        found = (self.values[name].get(title) for name in self.panel.group(group) if name not in but)
        return [value for value in found if value is not None]

    def spread(self, title: str, group: str = "seed", form: str = "{:.2f}", but: Sequence[str] = ()) -> str:
        """Return "0.49 to 0.54": the lowest and the highest value of a group."""
        return ends(self.column(title, group, but), form)

    def without(self, *controls: str) -> dict[str, float]:
        """Return how well each metric separates the trained SAEs from the other controls; 0 and 1 are complete."""
        names = [each.metric for each in self.metrics]
        return {n: separation(self.column(n, "seed"), self.column(n, "control", controls)) for n in names}

    def chance(self, title: str) -> float:
        """Return how often a random order separates the SAEs that have a metric completely."""
        trained, controls = (len(self.column(title, group)) for group in ("seed", "control"))
        return 2 / comb(trained + controls, trained)


def examine(panel: Panel | None, columns: Mapping[str, PanelMetric] = EXAMINED) -> Exam:
    """Examine the metrics of a panel, against the fractions of concepts named and of right names.

    panel: None gives an exam without metrics.
    columns: title to metric.
    """
    values = panel_values(panel, columns)
    for name, titles in LEFT_OUT.items():
        values |= {name: {n: x for n, x in values[name].items() if n not in titles}} if name in values else {}
    if panel is None:
        return Exam(panel, values, [])
    found = compare_metrics(
        values, list(columns), FIRST[1:], seeds=panel.group("seed"), controls=panel.group("control")
    )  # fmt: skip
    rank = {title: n for n, title in enumerate(FIRST)}
    found.sort(key=lambda each: (rank.get(each.metric, len(FIRST)), -abs(each.separation - 0.5)))
    return Exam(panel, values, found)


# ---- sentences ------------------------------------------------------------------------------------------------------


def random_beside_trained(trained: Metrics, random: Metrics) -> list[str]:
    """Return a sentence on the names of a random dictionary beside those of a trained SAE; none without a truth."""
    if "concept_accuracy" not in random:
        return []
    by_chance, right = (read_mean(of, "concept_accuracy") for of in (random, trained))
    verdict = "The intervals do not overlap: the trained SAE is better."
    if by_chance.high > right.low:
        verdict = (
            "The intervals overlap: a high fraction of right names alone does not show that an SAE learned something."
        )
    text = (
        f"Of the explained latents of a random dictionary, {percent(by_chance)} have the right name; "
        f"of this run's SAE, {percent(right)}. {verdict}"
    )
    if all("concept_accuracy_guessed" in of for of in (random, trained)):
        guessed = " and ".join(percent(read_mean(of, "concept_accuracy_guessed")) for of in (random, trained))
        text += f" Guessed names are right for {guessed}."
    return [text]


def exam_sentences(exam: Exam) -> list[str]:
    """Return what trained SAEs and controls reach, and which metrics tell them apart; nothing without a panel."""
    return [*_reached(exam), *_told_apart(exam)] if exam.panel else []


def exam_in_short(exam: Exam) -> str:
    """Return for the top of a page what trained SAEs and controls reach, and which metrics tell them apart."""
    if exam.panel is None:
        return ""
    apart, new_layers = _complete(exam), exam.values.get(NEW_LAYERS)
    kept = new_layers and f", and one control that keeps the trained image encoder {new_layers['concepts named']:.2f}"
    return (
        f" In the panel, {len(exam.column('concepts named', 'seed'))} trained SAEs detect and name "
        f"{exam.spread('concepts named')} of the concepts, controls "
        f"{exam.spread('concepts named', 'control', but=(NEW_LAYERS,))}{kept or ''}. Clamped object latents name "
        f"their object in {exam.spread(NAMED, form='{:.0f}')} of 100 cases, those of controls in "
        f"{exam.spread(NAMED, 'control', '{:.0f}')}{_at_highest_dose(exam.panel)}. Of {len(exam.metrics)} metrics, "
        f"{len(apart)} put all trained SAEs on one side of all controls: {'; '.join(apart) or 'none'}."
    )


def explained_by_steering(panel: Panel | None) -> list[str]:
    """Return a sentence on the latents that were explained by steering; none without a panel."""
    found = {title.removeprefix("steering: "): against(panel, at) for title, at in BY_STEERING.items()}
    clauses = [f"{title} {each.clause()}" for title, each in found.items() if each]
    if not clauses:
        return []
    return [f"Latents explained by steering: {'; '.join(clauses)}. Few latents are behind the right names."]


def _reached(exam: Exam) -> list[str]:
    touching, new_layers = _touching(exam, NAMED), exam.values.get(NEW_LAYERS)
    kept = new_layers and (
        f" But the control with new language layers detects {new_layers['concepts detected']:.2f} and names "
        f"{new_layers['concepts named']:.2f}. It keeps the trained image encoder."
    )
    return [
        f"Trained SAEs detect {exam.spread('concepts detected')} of the concepts, and detect and name "
        f"{exam.spread('concepts named')}. Controls detect "
        f"{exam.spread('concepts detected', 'control', but=(NEW_LAYERS,))} and name "
        f"{exam.spread('concepts named', 'control', but=(NEW_LAYERS,))}.{kept or ''}",
        f"Object latents of trained SAEs make the model name their object in {exam.spread(NAMED, form='{:.0f}')} of "
        f"100 cases, those of controls in {exam.spread(NAMED, 'control', '{:.0f}')}{_at_highest_dose(exam.panel)}. Of "
        f"a trained SAE {_clamped(exam.panel, 'seed')} object latents are clamped, of a control "
        f"{_clamped(exam.panel, 'control')}{', so intervals of single SAEs overlap' if touching else ''}."
        f"{_cannot_answer(exam)}",
    ]


def _cannot_answer(exam: Exam) -> str:
    mute = [name for name in OTHER_MODELS if name in exam.values]
    if not mute:
        return ""
    left = len(exam.column(NAMED, "control", mute))
    have = "have models that cannot answer" if len(mute) > 1 else "has a model that cannot answer"
    return f" {len(mute)} of the controls {have}, so {left} count{'s' if left == 1 else ''}."


def _told_apart(exam: Exam) -> list[str]:
    apart, fewer, same_model = _complete(exam), exam.without(NEW_LAYERS), exam.without(*OTHER_MODELS)
    then = [name for name in fewer if fewer[name] in (0, 1) and name not in apart]
    last = [name for name in fewer if same_model[name] in (0, 1) and name not in (*apart, *then)]
    details = {
        name: f"{exam.spread(name, form='{:.3g}')} against {exam.spread(name, 'control', '{:.3g}')} of "
        f"{len(exam.column(name, 'control'))} controls; {percent(exam.chance(name), 1)}"
        for name in apart
    } | {name: f"{exam.spread(name)} against {exam.spread(name, 'control', but=OTHER_MODELS)}" for name in last}
    expected = sum(exam.chance(each.metric) for each in exam.metrics)
    rest = [name for name in fewer if name not in (*apart, *then, *last)]
    return [
        f"{len(apart)} of {len(exam.metrics)} metrics put every trained SAE on one side of every control: "
        f"{'; '.join(f'{name} ({details[name]})' for name in apart)}. The percentage is how often this happens if the "
        f"order of the SAEs is random; over all metrics we expect {expected:.2f}. Intervals of single SAEs do not "
        f"overlap for: {'; '.join(name for name in apart if not _touching(exam, name)) or 'none'}.",
        "Consistency and modality count little here: random decoder rows cannot be consistent, and modality is no "
        "measure of quality.",
        f"Without the control with new language layers, these do so, too: {'; '.join(then) or 'none'}.",
        "Against the three controls of the same model alone, these do, too: "
        f"{'; '.join(f'{name} ({details[name]})' for name in last) or 'none'}.",
        f"These do not: {'; '.join(rest) or 'none'}.",
    ]


def _complete(exam: Exam) -> list[str]:
    return [each.metric for each in exam.metrics if each.separation in (0, 1)]


def _touching(exam: Exam, title: str) -> bool:
    """Whether intervals of a trained SAE and of a control overlap, or are not known."""
    found = against(exam.panel, EXAMINED[title])
    return found is None or found.touching is not False


def _clamped(panel: Panel, group: str) -> str:
    return ends(panel.values(panel.group(group), OBJECT_LATENTS["clamped"]), "{:.0f}")


def _at_highest_dose(panel: Panel) -> str:
    titles = ("named at the highest dose", "answers it changes")
    named, changed = (panel.values(panel.group("control"), STEERING[title]) for title in titles)
    if not named:
        return ""
    return (
        f" (at the highest dose {ends(named, '{:.0f}')}, although it changes {ends(changed, '{:.0f}')} of 100 answers)"
    )
