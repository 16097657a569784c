"""Show a panel of SAEs: as rows of a table, and as dots by group."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from matplotlib.axes import Axes

from lmm_sae_nb.show.style import PALETTE, WIDTH, literal, panels, wrapped

if TYPE_CHECKING:
    from lmm_sae_nb.show.panel import Panel
    from lmm_sae_nb.support.intervals import Mean

GROUPS = {  # of a panel, with their names in a figure, the best-known first
    "seed": "trained", "half": "half-trained", "size": "other sizes", "classical": "PCA, NMF", "control": "controls",
}  # fmt: skip


class PanelMetric(NamedTuple):
    """A metric of the panel: the part that measured it, and its name."""

    part: str
    metric: str


class Spread(NamedTuple):
    """The median of several SAEs, with the lowest and the highest value; a table shows it as it shows an interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


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
        rows.append({"": panel.saes[name].about} | values)
    return rows


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
    known = [(row[""], [form.format(number) for number in row["value"]]) for row in rows if row["value"] is not None]
    return ", ".join(f"{words} {mean} [{low}, {high}]" for words, (mean, low, high) in known)


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
        ax.set(yticks=range(len(groups)), yticklabels=[literal(name) for name in groups.values()])
        ax.set_ylim(len(groups) - 0.5, -0.5)
        ax.set_title(wrapped(title, WIDTH / across - 1.2))
        ax.set_xlim(left=min(0, ax.get_xlim()[0]))
    return axes


def against_controls(panel: Panel | None, metrics: Mapping[str, PanelMetric]) -> list[str]:
    """Return a sentence for each metric: the values of trained SAEs and of controls, and whether they overlap.

    panel: None, or one that lacks a metric, gives no sentence for it.
    metrics: words to metric.
    """
    sentences = []
    for words, at in metrics.items() if panel else ():
        trained, controls = (_values(panel, panel.group(group), at) for group in ("seed", "control"))
        if not trained or not controls:
            continue
        apart = min(trained) > max(controls) or max(trained) < min(controls)
        random = panel.find("random", *at) if "random" in panel.saes else None
        dictionary = "" if random is None else f", a random dictionary {random:.2f}"
        sentences.append(
            f"{words[:1].upper()}{words[1:]}: {len(trained)} trained SAEs have {_ends(trained)}, {len(controls)} "
            f"control SAEs {_ends(controls)}{dictionary}. "
            + ("This tells them apart" if apart else "So this does not tell a trained SAE from a control")
            + " ([A4](A4_controls_and_metrics))."
        )
    return sentences


def _ends(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def reached_by_controls(panel: Panel | None, metrics: Mapping[str, PanelMetric]) -> str:
    """Return a sentence that names the metrics in which a control is as high as a trained SAE; empty if there is none.

    panel: None gives no sentence.
    metrics: words to metric; higher is better.
    """
    reached = []
    for words, at in metrics.items() if panel else ():
        trained = _values(panel, panel.group("seed"), at)
        controls = {name: panel.find(name, *at) for name in panel.group("control")}
        known = {name: value for name, value in controls.items() if value is not None}
        if trained and known and max(known.values()) >= min(trained):
            best = max(known, key=known.__getitem__)
            reached.append(f"{words} ({known[best]:.2f}: {panel.saes[best].about}; trained SAEs {_ends(trained)})")
    if not reached:
        return ""
    return f"Control SAEs, which should fail, do as well in {' and '.join(reached)}; see [A4](A4_controls_and_metrics)."
