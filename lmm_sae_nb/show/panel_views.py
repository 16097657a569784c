"""Show a panel of SAEs: as rows of a table, as dots, and in sentences that compare trained SAEs with controls."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from lmm_sae_nb.show.panel_metrics import (
    BY_KIND,
    ONE_TABLE,
    STEERED_BY_KIND,
    STEERED_KINDS,
    WAYS_BY_KIND,
    PanelMetric,
    of_kinds,
)
from lmm_sae_nb.show.style import BLUE, GREY, ORANGE, PALETTE, WIDTH, panels
from lmm_sae_nb.show.texts import one_line, wrapped

if TYPE_CHECKING:
    from lmm_sae_nb.measures.discriminability import Discriminability
    from lmm_sae_nb.show.panel import Panel
    from lmm_sae_nb.support.intervals import Mean

GROUPS = {  # of a panel, with their names in a figure, the best-known first
    "seed": "trained", "half": "half-trained", "size": "other sizes", "classical": "PCA, NMF", "control": "controls",
}  # fmt: skip
# methods without an SAE, with their keys in the metrics of detection and of steering
SIMPLE = {
    "one latent for each concept": ("latent", "detector"),
    "no SAE: difference of means": ("difference", "difference"),
    "no SAE: logistic probe": ("probe", "probe"),
    "no SAE: prompt": ("", "prompt"),
}


class Spread(NamedTuple):
    """The median of several SAEs, with the lowest and the highest value; a table shows it as it shows an interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


def panel_rows(
    panel: Panel | None, columns: Mapping[str, PanelMetric], groups: Sequence[str] = tuple(GROUPS)
) -> list[dict[str, str | float | Mean | Spread | None]]:
    """Return a row for each SAE: what it is, and each metric with its 99 % interval, None where it has none.

    The SAEs that differ only in their seed share the first row: the median, with the lowest and the highest value.

    panel: None gives no rows.
    columns: title to metric.
    groups: of the other rows; by default all.
    """
    if panel is None:
        return []
    seeds = panel.group("seed")
    others = [name for name in panel.saes if panel.saes[name].group in groups and name not in seeds]
    rows = [{"": f"trained, {len(seeds)} seeds"} | {title: _spread(panel, seeds, at) for title, at in columns.items()}]
    for name in others:
        values = {title: panel.interval(name, *at) or panel.find(name, *at) for title, at in columns.items()}
        control = "control: " if panel.saes[name].group == "control" else ""
        rows.append({"": control + panel.saes[name].about} | values)
    return rows


def all_methods(panel: Panel | None) -> list[dict[str, str | float | Mean | Spread | None]]:
    """Return the one table of all methods: trained SAEs, control SAEs, PCA and NMF, and methods without an SAE.

    The columns are those of `ONE_TABLE`. A method without an SAE has no latents to name, and no region for an IoU.

    panel: None gives no rows; one without methods that need no SAE has only the rows of SAEs.
    """
    rows = panel_rows(panel, ONE_TABLE, ("control", "classical"))
    if panel is None or "model" not in panel.saes:
        return rows
    for words, (detector, way) in SIMPLE.items():
        of = dict.fromkeys(ONE_TABLE) | {
            "concepts detected": PanelMetric("direction_detection", f"{detector}_detected"),
            "objects named, of 100": PanelMetric("direction_steering", f"steer_{way}_named_of_100"),
            "fluency": PanelMetric("direction_steering", f"steer_{way}_fluency"),
        }
        rows.append({"": words} | {title: at and panel.interval("model", *at) for title, at in of.items()})
    return rows


def steered_kinds(
    panel: Panel | None, metric: str = "named_of_100", kinds: Sequence[str] = STEERED_KINDS
) -> list[dict[str, str | float | Mean | Spread | None]]:
    """Return a metric of steering for each kind of concept. The rows: SAEs, PCA, NMF, and methods without an SAE.

    panel: None gives no rows.
    metric: "named_of_100", "control_named_of_100" or "fluency".
    kinds: the columns; "" is all kinds together.
    """
    names = {kind or "all kinds": f"{metric}_{kind}".strip("_") for kind in kinds}
    columns = {kind: PanelMetric(STEERED_BY_KIND.part, name) for kind, name in names.items()}
    measured = panel and replace(
        panel, saes={name: sae for name, sae in panel.saes.items() if STEERED_BY_KIND.part in sae.parts}
    )
    rows = panel_rows(measured, columns, ("control", "classical")) if measured and measured.saes else []
    if panel is None or "model" not in panel.saes:
        return rows
    return rows + [
        {"": words}
        | {kind: panel.interval("model", "direction_kinds", f"steer_{way}_{name}") for kind, name in names.items()}
        for way, words in WAYS_BY_KIND.items()
    ]


def not_measured(panel: Panel | None, part: str) -> list[dict[str, str]]:
    """Return why a part could not measure something, with the SAEs that this holds for; each reason has one row.

    panel: None gives no rows.
    """
    saes: dict[str, list[str]] = {}
    for sae in panel.saes.values() if panel else ():
        for why in sae.parts[part].why if part in sae.parts else ():
            saes.setdefault(why, []).append(sae.about)
    return [{"reason": why, "SAEs": "; ".join(of)} for why, of in saes.items()]


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
        if not (values := _values(panel, seeds, at)):
            parts.append(f"{kind}: nothing")
            continue
        random = _values(panel, seeds, PanelMetric(at.part, f"control_{at.metric}"))
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


def _in_brackets(mean: Mean, form: str) -> str:
    value, low, high = map(form.format, mean)
    return f"{value} [{low}, {high}]"


def _spread(panel: Panel, saes: Sequence[str], at: PanelMetric) -> Spread | None:
    values = _values(panel, saes, at)
    return Spread(statistics.median(values), min(values), max(values)) if values else None


def _values(panel: Panel, saes: Sequence[str], at: PanelMetric) -> list[float]:
    return [value for value in (panel.find(name, *at) for name in saes) if value is not None]


def method_rows(
    panel: Panel | None, part: str, methods: Mapping[str, str], columns: Mapping[str, str]
) -> list[dict[str, str | float | Mean | None]]:
    """Return a row for each method of a part that compares several: its name, and each metric with its interval.

    panel: None, or one without this part, gives no rows.
    part: one that needs no SAE, or one of the first trained SAE.
    methods: key in the names of metrics to name.
    columns: title to metric, with `{}` where the method's key stands.
    """
    of = next((name for name, sae in panel.saes.items() if part in sae.parts), None) if panel else None
    if of is None:
        return []
    return [
        {"": words}
        | {title: panel.interval(of, part, at.format(key)) or panel.find(of, part, at.format(key))
           for title, at in columns.items()}
        for key, words in methods.items()
    ]  # fmt: skip


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


def panel_values(panel: Panel | None, columns: Mapping[str, PanelMetric]) -> dict[str, dict[str, float]]:
    """Return the metrics of every SAE that has one, by the SAE's name and the column's title.

    panel: None gives nothing.
    columns: title to metric.
    """
    if panel is None:
        return {}
    found = {
        name: {title: panel.find(name, *at) for title, at in columns.items()}
        for name, sae in panel.saes.items()
        if sae.group in GROUPS
    }
    return {name: {title: x for title, x in row.items() if x is not None} for name, row in found.items()}


def panel_dots(panel: Panel | None, columns: Mapping[str, PanelMetric], across: int = 2) -> list[Axes]:
    """Draw a panel for each metric, with a row for each group of SAEs and a dot for each SAE.

    panel: None draws nothing.
    columns: title to metric.
    across: panels in a row of the figure.
    """
    if panel is None:
        return []
    groups = {group: name for group, name in GROUPS.items() if panel.group(group)}
    axes = panels(len(columns), columns=across, inches=0.28 * len(groups) + 0.9, sharey=True)
    for ax, (title, at) in zip(axes, columns.items(), strict=True):
        for y, (group, colour) in enumerate(zip(groups, PALETTE, strict=False)):
            values = _values(panel, panel.group(group), at)
            ax.plot(values, [y] * len(values), "o", ms=8, mew=0, alpha=0.6, color=colour, clip_on=False)
        ax.set(yticks=range(len(groups)), yticklabels=[one_line(name) for name in groups.values()])
        ax.set_ylim(len(groups) - 0.5, -0.5)
        ax.set_title(wrapped(title, WIDTH / across - 1.2, 3))
        ax.set_xlim(left=min(0, ax.get_xlim()[0]))
    return axes


def kind_panels(
    panel: Panel | None, saes: Mapping[str, str], metrics: Mapping[str, PanelMetric] = BY_KIND
) -> list[Axes]:
    """Draw a panel for each metric, with a row for each kind of concept, and a mark for trained and for other SAEs.

    The mark of the trained SAEs is their median, with a line from the lowest to the highest. That of another SAE has
    its 99 % interval.

    panel: None draws nothing.
    saes: name in the panel to words; the first three colours of the palette are those of trained and of these.
    metrics: title to metric; `of_kinds` gives those of each kind.
    """
    if panel is None:
        return []
    seeds, series = panel.group("seed"), ["trained", *saes.values()]
    axes = panels(len(metrics), inches=8 * 0.5 + 0.8, sharey=True)
    for ax, (title, at) in zip(axes, metrics.items(), strict=True):
        kinds = of_kinds(at)
        for y, one in enumerate(kinds.values()):
            marks = {"trained": _spread(panel, seeds, one)} | {
                words: panel.interval(name, *one) for name, words in saes.items()
            }
            for n, words in enumerate(series):
                if (mark := marks[words]) is None:
                    continue
                place, colour = y + 0.22 * (n - (len(series) - 1) / 2), PALETTE[n]
                ax.plot(mark[1:], [place, place], color=colour, lw=1.8, alpha=0.6)
                ax.plot(mark[0], place, "osD^"[n], color=colour, ms=5, label=one_line(words))
        ax.set(
            yticks=range(len(kinds)),
            yticklabels=list(map(one_line, kinds)),
            ylim=(len(kinds) - 0.5, -0.5),
            xlim=(-0.02, 1.02),
        )
        ax.set_title(wrapped(title, WIDTH / 2, 3))
        ax.grid(axis="x", alpha=0.25)
    known = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    axes[0].figure.legend(known.values(), known, loc="outside lower center", ncols=len(series))
    return axes


def metric_exam(exam: Sequence[Discriminability], fewer: Mapping[str, float], without: str) -> list[Axes]:
    """Draw the exam of metrics, a row each: rank correlation with the truth, separation from controls, and noise.

    exam: of at least one metric; the first one is on top.
    fewer: metric to its separation from fewer controls.
    without: words for the control that is left out there.
    """
    if not exam:
        return []
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 0.4 * len(exam) + 2.2), sharey=True, width_ratios=(2.1, 1.2, 0.9))
    for n, name in enumerate(dict.fromkeys(name for each in exam for name in each.agreement)):
        known = [(y, each.agreement[name]) for y, each in enumerate(exam) if name in each.agreement]
        known = [(y + 0.2 * (n - 0.5), mean) for y, mean in known if mean.mean == mean.mean]
        colour = (BLUE, ORANGE)[n % 2]
        for y, mean in known:
            axes[0].plot([mean.low, mean.high], [y, y], color=colour, lw=1.8, alpha=0.6)
        axes[0].plot(
            [mean.mean for _, mean in known], [y for y, _ in known], "os"[n % 2], color=colour, ms=5,
            label=one_line(f"with {name}"),
        )  # fmt: skip
    rows = range(len(exam))
    few = [fewer.get(each.metric) for each in exam]
    axes[1].plot(few, rows, "D", ms=8, mfc="none", mec=GREY, label=one_line(f"all but {without}"))
    axes[1].plot([each.separation for each in exam], rows, "o", color=PALETTE[2], ms=5, label="all controls")
    axes[2].plot([each.noise for each in exam], rows, "^", color=PALETTE[3], ms=6, clip_on=False)
    axes[0].axvline(0, color=GREY, lw=1)
    axes[1].axvline(0.5, color=GREY, lw=1)
    axes[0].set(xlim=(-1.05, 1.05), xticks=(-1, 0, 1), xlabel="rank correlation")
    axes[1].set(xlim=(-0.08, 1.08), xticks=(0, 0.5, 1), xlabel="separation")
    axes[2].set(xlim=(0, max(1.15 * max(each.noise for each in exam), 0.1)), xlabel="noise")
    labels = [wrapped(each.metric, 2.4, 2) for each in exam]
    axes[0].set(yticks=rows, yticklabels=labels, ylim=(len(exam) - 0.5, -0.5))
    for ax in axes:
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(axis="y", alpha=0.25)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
    handles = [pair for ax in axes[:2] for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    figure.legend([h for h, _ in handles], [label for _, label in handles], loc="outside lower center", ncols=2)
    return list(axes)


class Against(NamedTuple):
    """A metric of trained SAEs beside that of controls.

    trained: values of the SAEs that differ in their seed.
    controls: value of each control, by what it is.
    touching: whether the 99 % interval of a trained SAE meets that of a control; None if there are no intervals.
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
        head, high = _ends(self.trained, form), self.reaching
        if self.alone:
            low = [value for about, value in self.controls.items() if about != self.alone]
            return f"{head} against {_ends(low, form)}, and {form.format(high[self.alone])} in one ({self.alone})"
        text = f"{head} against {_ends([*self.controls.values()], form)}"
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


def _listed(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _ends(values: Sequence[float], form: str) -> str:
    ends = [form.format(end) for end in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)
