"""Show a panel of SAEs: as rows of tables and in figures."""

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
    """Return a row for each SAE: what it is, and each metric with its 99% interval, None where it has none.

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


def _spread(panel: Panel, saes: Sequence[str], at: PanelMetric) -> Spread | None:
    values = panel.values(saes, at)
    return Spread(statistics.median(values), min(values), max(values)) if values else None


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
            values = panel.values(panel.group(group), at)
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
    its 99% interval.

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
