"""Say in sentences what a panel of SAEs shows: trained SAEs against controls, and methods beside each other."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lmm_sae_nb.show.panel_metrics import STEERED_BY_KIND, STEERED_KINDS, WAYS_BY_KIND, PanelMetric, of_kinds
from lmm_sae_nb.show.panel_views import method_rows

if TYPE_CHECKING:
    from lmm_sae_nb.show.panel import Panel
    from lmm_sae_nb.support.intervals import Mean


class Against(NamedTuple):
    """A metric of trained SAEs beside that of controls.

    trained: values of the SAEs that differ in their seed.
    controls: value of each control, by what it is.
    touching: whether the 99% interval of a trained SAE meets that of a control; None if there are no intervals.
    """

    trained: list[float]
    controls: dict[str, float]
    touching: bool | None

    @property
    def reaching(self) -> dict[str, float]:
        """The controls that are as high as the lowest trained SAE."""
        return {about: value for about, value in self.controls.items() if value >= min(self.trained)}

    @property
    def alone(self) -> str:
        """The only control that reaches the trained SAEs while all others stay far below; empty if there is none.

        Far below means: by more than the trained SAEs differ among themselves.
        """
        low = [value for value in self.controls.values() if value < min(self.trained)]
        spread = max(self.trained) - min(self.trained)
        far = bool(low) and max(low) < min(self.trained) - spread
        return next(iter(self.reaching)) if far and len(self.reaching) == 1 else ""

    def clause(self, form: str = "{:.2f}") -> str:
        """Return "0.86 to 0.91 against 0.81 to 0.86 (1 of 5 as high)", or name the one control that stands out."""
        head, high = ends(self.trained, form), self.reaching
        if self.alone:
            low = [value for about, value in self.controls.items() if about != self.alone]
            return f"{head} against {ends(low, form)}, and {form.format(high[self.alone])} in one ({self.alone})"
        text = f"{head} against {ends([*self.controls.values()], form)}"
        if min(self.controls.values()) > max(self.trained):
            return f"{text} (all are higher)"
        return f"{text} ({len(high)} of {len(self.controls)} as high)" if high else text


def against(panel: Panel | None, at: PanelMetric) -> Against | None:
    """Return a metric of trained SAEs and of controls; None if the panel lacks one of them."""
    if panel is None:
        return None
    seeds, controls = (
        {name: value for name in panel.group(group) if (value := panel.find(name, *at)) is not None}
        for group in ("seed", "control")
    )
    if not seeds or not controls:
        return None
    first, second = ([panel.interval(name, *at) for name in names] for names in (seeds, controls))
    touching = None
    if all(first) and all(second):
        touching = any(one.low <= other.high and other.low <= one.high for one in first for other in second)
    return Against(list(seeds.values()), {panel.saes[n].about: value for n, value in controls.items()}, touching)


def against_controls(panel: Panel | None, metrics: Mapping[str, PanelMetric], form: str = "{:.2f}") -> list[str]:
    """Return a sentence for each metric: trained SAEs, controls, and whether the metric tells them apart.

    panel: None, or one that lacks a metric, gives no sentence for it.
    metrics: words to metric; higher should be better.
    form: writes a number.
    """
    sentences = []
    for words, at in metrics.items():
        if (found := against(panel, at)) is None:
            continue
        if not found.reaching:
            verdict = "No control is as high" + (", but intervals of single SAEs overlap." if found.touching else ".")
        elif found.alone:
            verdict = "All controls but one are far lower."
        else:
            verdict = "So a high value does not show that an SAE learned something."
        sentences.append(
            f"{words[:1].upper()}{words[1:]}, {len(found.trained)} trained SAEs against {len(found.controls)} controls "
            f"([A4](A4_controls_and_metrics)): {found.clause(form)}. {verdict}"
        )
    return sentences


def controls_in_short(panel: Panel | None, metrics: Mapping[str, PanelMetric], form: str = "{:.2f}") -> str:
    """Return for the top of a page how far controls reach in some metrics, and what this means; empty without a panel.

    metrics, form: as for `against_controls`.
    """
    found = {words: each for words, at in metrics.items() if (each := against(panel, at)) is not None}
    if not found:
        return ""
    trained, controls = (max(len(each[n]) for each in found.values()) for n in (0, 1))
    clauses = "; ".join(f"{words} {each.clause(form)}" for words, each in found.items())
    empty = [words for words, each in found.items() if each.reaching and not each.alone]
    verdict = f" So high values of {_listed(empty)} do not show that an SAE learned something." if empty else ""
    latents = panel.recipe.get("sizes", {}).get("latents")
    size = f"; up to {latents} latents each" if latents else ""
    return (
        f"{trained} trained SAEs against {controls} control SAEs, which should fail "
        f"([A4](A4_controls_and_metrics){size}): {clauses}.{verdict}"
    )


def kinds_in_short(panel: Panel | None) -> list[str]:
    """Return sentences on steering by kind: trained SAEs against random latents, against controls, and other methods.

    panel: None, or one in which steering by kind is not measured, gives no sentence.
    """
    if panel is None or not (
        seeds := [name for name in panel.group("seed") if "steer_kinds" in panel.saes[name].parts]
    ):
        return []
    controls = [name for name in panel.group("control") if STEERED_BY_KIND.part in panel.saes[name].parts]
    parts, clear, beyond, reached = [], [], [], []
    for kind, at in ({"all kinds": STEERED_BY_KIND} | of_kinds(STEERED_BY_KIND, STEERED_KINDS)).items():
        if not (values := panel.values(seeds, at)):
            parts.append(f"{kind}: nothing")
            continue
        random = panel.values(seeds, PanelMetric(at.part, f"control_{at.metric}"))
        parts.append(f"{kind} {statistics.median(values):.0f} ({statistics.median(random):.0f})")
        pairs = [(panel.interval(n, *at), panel.interval(n, at.part, f"control_{at.metric}")) for n in seeds]
        above = sum(one is not None and one.low > other.high for one, other in pairs)
        clear += [f"{kind} ({above} of {len(values)} SAEs)"] if above else []
        if found := against(panel, at):
            (reached if found.reaching else beyond).append(kind)
    sentences = [
        "Steered by kind, latents of trained SAEs make the model name their concept, of 100 (median of "
        f"{len(seeds)}; in brackets: random latents at that dose): {', '.join(parts)}. The intervals of an SAE and of "
        f"its random latents lie apart for: {', '.join(clear) or 'no kind'}.",
        f"Every trained SAE names more than every control that was measured ({len(controls)}) for: "
        f"{', '.join(beyond) or 'no kind'}; a control is as high "
        f"for: {', '.join(reached) or 'no kind'}. With at most 12 latents of a kind, intervals are wide.",
    ]
    classical = {name: panel.interval(name, *STEERED_BY_KIND) for name in panel.group("classical")}
    if known := [f"{name.upper()} {_in_brackets(mean, '{:.0f}')}" for name, mean in classical.items() if mean]:
        sentences.append(f"In the SAE's place, all kinds together (named, of 100): {', '.join(known)}.")
    together = beside_each_other(panel, "direction_kinds", WAYS_BY_KIND, "steer_{}_named_of_100", "{:.0f}")
    if together:
        sentences.append(
            f"Methods beside each other, all kinds together (named, of 100): {together}. "
            + compared_with_first(panel, "direction_kinds", WAYS_BY_KIND, "steer_{}_named_above_latent")
        )
    return sentences


def beside_each_other(
    panel: Panel | None, part: str, methods: Mapping[str, str], metric: str, form: str = "{:.2f}"
) -> str:
    """Return "probe 0.73 [0.69, 0.76], best latent 0.50 [0.46, 0.54]": a metric of several methods, with its interval.

    panel: None, or one without this part, gives an empty text.
    part, methods: as for `method_rows`.
    metric: its name, with `{}` where the method's key stands.
    form: writes a number.
    """
    rows = method_rows(panel, part, methods, {"value": metric})
    return ", ".join(f"{row['']} {_in_brackets(row['value'], form)}" for row in rows if row["value"] is not None)


def compared_with_first(panel: Panel | None, part: str, methods: Mapping[str, str], metric: str) -> str:
    """Return "Better than best latent: logistic probe. No clear difference: difference of means.", by intervals.

    panel: None, or one without this part, gives an empty text.
    part, methods: as for `method_rows`; the first method is the one that the others are compared with.
    metric: name of the difference to the first method on the same cases, with `{}` where the method's key stands.
    """
    (_, first), *others = methods.items()
    rows = method_rows(panel, part, dict(others), {"less first": metric})
    signs: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for row in rows:
        if (mean := row["less first"]) is not None:
            signs[(mean.low > 0) - (mean.high < 0)].append(row[""])
    heads = {1: f"Better than {first}", 0: "No clear difference", -1: "Worse"}
    return " ".join(f"{heads[sign]}: {', '.join(words)}." for sign, words in signs.items() if words)


def detection_in_short(panel: Panel | None, detectors: Mapping[str, str]) -> str:
    """Return the F1 of detectors of concepts, and which are better than the first; empty without a panel.

    detectors: key in the names of metrics to name.
    """
    found = beside_each_other(panel, "direction_detection", detectors, "{}_f1")
    return found and f"{found}. {compared_with_first(panel, 'direction_detection', detectors, '{}_f1_above_latent')}"


def steering_in_short(panel: Panel | None, ways: Mapping[str, str]) -> str:
    """Return how often ways to steer name the object, and which are better than the first; empty without a panel.

    ways: key in the names of metrics to name.
    """
    found = beside_each_other(panel, "direction_steering", ways, "steer_{}_named_of_100", "{:.0f}")
    if not found:
        return ""
    return f"{found}. {compared_with_first(panel, 'direction_steering', ways, 'steer_{}_named_above_latent')}"


def _in_brackets(mean: Mean, form: str) -> str:
    value, low, high = map(form.format, mean)
    return f"{value} [{low}, {high}]"


def _listed(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def ends(values: Sequence[float], form: str) -> str:
    """Return "0.49 to 0.54": the lowest and the highest value, or the one value that both are."""
    low, high = (form.format(end) for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
