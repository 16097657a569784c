"""Curves, bars, dots and histograms. A function takes results, computes nothing and returns axes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from lmm_sae_nb.show.style import (
    CHANCE,
    GREY,
    LATENT,
    LINE,
    PALETTE,
    TARGET,
    WIDTH,
    colours,
    one_axes,
    panels,
)  # fmt: skip
from lmm_sae_nb.show.texts import Literal, height, literal, one_line, width, wrapped
from lmm_sae_nb.support.intervals import read_mean

if TYPE_CHECKING:
    from lmm_sae_nb.hallucination.search import Limits, Search
    from lmm_sae_nb.show.seed_study import SeedStudy
    from lmm_sae_nb.steer.objects import ObjectSteering
    from lmm_sae_nb.support.intervals import Mean
    from lmm_sae_nb.support.stages import Stage

MARKERS = "osD^vP*X"  # of the series of a chart, so that colour is not all that tells them apart
WORDS = {
    "step": "optimiser step",
    "fvu": "variance unexplained (FVU)",
    "dead_fraction": "fraction of dead latents",
    "l0": "active latents per token",
}
TICKS = 0.75  # inches for the widest numbers beside an axis
TRAINING = ("loss", "fvu", "dead_fraction", "l0", "tokens_per_second")  # quantities in a training's history


def curve(
    rows: Sequence[Mapping[str, float]], y: str, x: str = "step", *, label: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw one logged quantity over another.

    rows: each with the keys `x` and `y`.
    label: for a legend; the axis is labelled by the key in any case.
    """
    ax = ax or one_axes(3.0)
    ax.plot([row[x] for row in rows], [row[y] for row in rows], label=one_line(label or y), lw=1.6)
    _axis_labels(ax, _words(x), _words(y))
    return ax


def training(history: Sequence[Mapping[str, float]], names: Sequence[str] = TRAINING, x: str = "step") -> list[Axes]:
    """Draw a panel for each logged quantity of a training, in rows of three; its title is the quantity."""
    axes = panels(len(names), columns=3, inches=2.2)
    for ax, name in zip(axes, names, strict=True):
        curve(history, name, x, ax=ax).set(ylabel="", title=wrapped(_words(name), WIDTH / 3 - TICKS, 3))
    return axes


@contextmanager
def live(
    names: Sequence[str], x: str = "step", every: float = 15.0
) -> Iterator[Callable[[Sequence[Mapping[str, float]]], None]]:
    """Give a callback that draws `training` of the history so far, at most once in `every` seconds.

    In a notebook the figure is redrawn in place. It goes when the `with` ends well, for the page draws the final one.
    """
    handle, drawn = display(HTML(""), display_id=True), float("-inf")

    def on_log(history: Sequence[Mapping[str, float]]) -> None:
        nonlocal drawn
        if handle and len(history) > 1 and time.monotonic() - drawn >= every:
            figure = training(history, names, x)[0].figure
            handle.update(figure)
            plt.close(figure)
            drawn = time.monotonic()

    yield on_log
    if handle:
        handle.update(HTML(""))


def proportions(results: Mapping[str, Mapping[str, float]], ax: Axes | None = None) -> Axes:
    """Draw fractions with their 99% intervals, one row each.

    results: name to {fraction, low, high, and perhaps least: the target, a black mark}, all in [0, 1].
    """
    ax = ax or one_axes(0.29 * len(results) + 0.9)
    for y, row in enumerate(results.values()):
        ax.plot([row["low"], row["high"]], [y, y], color=LATENT, lw=2.5, alpha=0.5)
        ax.plot(row["fraction"], y, "o", color=LATENT, ms=5)
        if "least" in row:
            ax.plot(row["least"], y, "|", color=TARGET, ms=13, mew=2)
    target = "; black: target" if any("least" in row for row in results.values()) else ""
    _rows(ax, results, f"fraction, 99% interval{target}")
    ax.set_xlim(-0.02, 1.02)
    return ax


def means(results: Mapping[str, Mapping[str, Mean | None]], xlabel: str, ax: Axes | None = None) -> Axes | None:
    """Draw means with their intervals, a row for each group.

    results: group to {series: mean}; a series has one colour and marker. Instead of None stands "no case". Without
        groups nothing is drawn.
    """
    if not results:
        return None
    series = _names(results)
    room = WIDTH - max(width(one_line(name)) for name in results)  # the middle of the legend is that of the axes
    fitting = sum(width(one_line(name, WIDTH / 3)) + 0.6 for name in series) <= room
    ncols = len(series) if fitting else _legend_columns(series, room)
    more = LINE * (-(-len(series) // ncols) - 1)  # lines of the legend
    ax = ax or one_axes(max(LINE + 0.1, 0.12 * len(series) + 0.08) * len(results) + 1.2 + more)
    shades = colours(series)
    for s, name in enumerate(series):
        at = [n + 0.18 * (s - (len(series) - 1) / 2) for n in range(len(results))]
        y = [at[n] for n, row in enumerate(results.values()) if row.get(name)]
        means = [row[name] for row in results.values() if row.get(name)]
        for n, row in enumerate(results.values()):
            if name in row and row[name] is None:
                where = dict(transform=ax.get_yaxis_transform(), va="center", size="small")
                ax.text(0.01, at[n], "no case", color=shades[name], **where)
        ax.errorbar(
            [m.mean for m in means], y, xerr=_error(means), fmt=MARKERS[s % len(MARKERS)], ms=5, capsize=2,
            color=shades[name], label=one_line(name, WIDTH / 3),
        )  # fmt: skip
    _rows(ax, results, xlabel)
    below = 0.9 + LINE * ax.get_xlabel().count("\n")  # inches
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -below / ax.figure.get_figheight()), ncols=ncols)
    return ax


def ways_of_explaining(metrics: Mapping[str, float], what: str = "right") -> Axes:
    """Draw how often exemplars, steering and both name the true concept, for all latents and by kind of concept.

    metrics: of `steering_accuracy`.
    what: "right" (of the latents that have a true concept) or "accuracy" (of those that get a name).
    """
    head = f"steering_{what}"
    kinds = [name.removeprefix(f"{head}_") for name in metrics if name.startswith(f"{head}_")]
    groups = {"all kinds": head} | {kind: f"{head}_{kind}" for kind in kinds if f"{head}_{kind}_low" in metrics}
    results = {
        group: {
            way: read_mean(metrics, name.replace("steering", way))
            for way in ("exemplars", "steering", "both")
            if name.replace("steering", way) in metrics
        }
        for group, name in groups.items()
    }
    return means(results, "fraction of latents that get their true concept as name, 99% interval")


def mean_panels(results: Mapping[str, Mapping[str, Mapping[str, Mean]]]) -> list[Axes]:
    """Draw `means` in two panels beside each other for several quantities of the same groups; one legend below.

    results: quantity, as the label of its axis, to what `means` takes.
    """
    series = list(dict.fromkeys(name for groups in results.values() for name in _names(groups)))
    groups = max(map(len, results.values()))
    axes = panels(len(results), inches=max(LINE + 0.1, 0.12 * len(series) + 0.08) * groups + 1.4, sharey=True)
    for ax, (xlabel, rows) in zip(axes, results.items(), strict=True):
        means(rows, "", ax=ax).get_legend().remove()
        ax.set_xlabel(wrapped(xlabel, WIDTH / 2.5, 2))
    known = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    axes[0].figure.legend(known.values(), known, loc="outside lower center", ncols=_legend_columns(list(known)))
    return axes


def histogram(
    values: np.ndarray, xlabel: str, *, ylabel: str = "latents", log: bool = False, ax: Axes | None = None
) -> Axes:
    """Draw how values are distributed.

    log: with a logarithmic axis, zeros left out.
    """
    ax = ax or one_axes(3.0)
    values = np.asarray(values, float)
    if log:
        values = values[values > 0]
        ax.set_xscale("log")
    bins = np.geomspace(values.min(), values.max(), 40) if log and len(values) else 40
    ax.hist(values, bins=bins, color=LATENT)
    _axis_labels(ax, xlabel, ylabel)
    return ax


def stacked(
    results: Mapping[str, Mapping[str, float]], xlabel: str, *, limit: float | None = None, ax: Axes | None = None
) -> Axes:
    """Draw a bar for each row, made of its parts; the legend is below.

    results: row to {part: value}.
    limit: a dashed line that a bar should not cross.
    """
    parts = _names(results)
    columns = _legend_columns(parts)
    ax = ax or one_axes(0.38 * len(results) + 0.9 + LINE * -(-len(parts) // columns))
    left = np.zeros(len(results))
    for n, name in enumerate(parts):
        values = np.array([row.get(name, 0.0) for row in results.values()])
        hatch = "" if n < len(PALETTE) else "///"
        colour = PALETTE[n % len(PALETTE)]
        ax.barh(range(len(results)), values, left=left, label=one_line(name), color=colour, hatch=hatch, ec="white")
        left += values
    if limit is not None:
        ax.axvline(limit, color=TARGET, ls="--", lw=1)
    _rows(ax, results, xlabel)
    ax.figure.legend(loc="outside lower center", ncols=columns)
    return ax


def compared(results: Mapping[str, Mapping[str, float]], xlabel: str, ax: Axes | None = None) -> Axes:
    """Draw the same quantity, known in several ways, as dots of one row, from 0; the legend is below.

    results: row to {way: value}.
    """
    ax = ax or one_axes(0.4 * len(results) + 1.4)
    ways = _names(results)
    shades = colours(ways)
    for y, row in enumerate(results.values()):
        ax.plot([min(row.values()), max(row.values())], [y, y], color=GREY, lw=1)
    for marker, way in zip(MARKERS, ways, strict=False):
        values = [row[way] for row in results.values()]
        ax.plot(values, range(len(results)), marker, ms=7, color=shades[way], label=one_line(way), clip_on=False)
    _rows(ax, results, xlabel)
    ax.set_xlim(left=0)
    if not ax.figure.legends:  # one for all panels
        ax.figure.legend(loc="outside lower center", ncols=_legend_columns(ways))
    return ax


def other_saes(
    study: SeedStudy | None, stage: Stage, metrics: Mapping[str, str], xlabel: str, highest: float = 1.0
) -> Axes | None:
    """Draw metrics of a study of several SAEs, a row each: a grey dot for each SAE, a coloured one for this run.

    Without a study, or if it has none of the metrics, nothing is drawn.

    stage: of this run, with its metrics.
    metrics: name to words.
    highest: end of the axis, which begins at 0.
    """
    rows = {name: words for name, words in metrics.items() if study and study.find(stage.name, name)}
    if not rows:
        return None
    inches = 0.45 * WIDTH
    ax = one_axes(sum(height([wrapped(words, inches)]) + 0.16 for words in rows.values()) + 1.2)
    for y, name in enumerate(rows):
        measured = study.find(stage.name, name)
        known = dict(color=CHANCE, label=f"{len(study.seeds)} SAEs")
        ax.plot(measured.known, [y] * len(measured.known), "o", ms=8, alpha=0.5, mew=0, clip_on=False, **known)
        ax.plot(measured.median, y, "|", color=TARGET, ms=16, mew=2, label="their median")
        if name in stage.metrics:
            ax.plot(stage.metrics[name], y, "D", color=LATENT, ms=6, label="this page's SAE", clip_on=False)
    _rows(ax, {wrapped(words, inches): 0 for words in rows.values()}, xlabel)
    ax.set_xlim(0, highest)
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))  # one of each
    ax.figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return ax


def bars(results: Mapping[str, Mapping[str, float]], xlabel: str, ax: Axes | None = None) -> Axes:
    """Draw a bar with its number for each thing, grouped; a thing has one colour, and the legend is below.

    results: group to {thing: value}.
    """
    things = _names(results)
    shades = colours(things)
    ax = ax or one_axes(LINE * sum(map(len, results.values())) + 0.4 * len(results) + 1.2)
    y, middles = 0, []
    for row in results.values():
        places = [y + n for n in range(len(row))]
        drawn = ax.barh(places, list(row.values()), 0.85, color=[shades[name] for name in row])
        labels = [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in row.values()]
        ax.bar_label(drawn, labels, padding=2)
        middles.append(sum(places) / len(places))
        y += len(row) + 1
    groups = [one_line(name, 0.4 * WIDTH) for name in results]
    ax.set(yticks=middles, yticklabels=groups)
    _axis_labels(ax, xlabel, beside=groups)
    ax.margins(x=0.15)
    if not ax.yaxis_inverted():  # an axis that is shared may be inverted already
        ax.invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=shades[name]) for name in things]
    if not ax.figure.legends:  # one for all panels
        names = list(map(one_line, things))
        ax.figure.legend(handles, names, loc="outside lower center", ncols=_legend_columns(things))
    return ax


def calibration(
    known: Mapping[str, ArrayLike], measured: Mapping[str, ArrayLike], xlabel: str, ylabel: str,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Draw a measured quantity over the true one, both in [0, 1], with the line on which they agree.

    known: group to the true values, one dot each; a group has one colour and marker.
    measured: the same groups.
    """
    ax = ax or one_axes(4.4)
    ax.plot([0, 1], [0, 1], color=GREY, lw=1)
    for n, (group, values) in enumerate(known.items()):
        colour, marker = PALETTE[n % len(PALETTE)], MARKERS[n % len(MARKERS)]
        ax.plot(values, measured[group], marker, ms=4, alpha=0.7, color=colour, label=one_line(group, 0.3 * WIDTH))
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    _axis_labels(ax, xlabel, ylabel, beside=[f"{one_line(group, 0.3 * WIDTH)}    " for group in known])
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def agreement(exact: np.ndarray, approximations: Mapping[str, np.ndarray], unit: str = "logits") -> list[Axes]:
    """Draw approximated over exact attributions, a panel for each approximation, with the line on which they agree.

    All axes have the same range.

    exact: (n,).
    approximations: name to (n,).
    """
    count = len(approximations)
    axes = panels(count, columns=2, inches=3.4) if count > 1 else [one_axes(3.8, width=4.6)]
    everything = [exact, *approximations.values()]
    ends = [np.nanmin(everything), np.nanmax(everything)]
    margin = 0.04 * (ends[1] - ends[0])
    limits = (ends[0] - margin, ends[1] + margin)
    for ax, (name, values) in zip(axes, approximations.items(), strict=True):
        ax.plot(ends, ends, color=GREY, lw=1)
        ax.plot(exact, values, ".", ms=3, alpha=0.4, color=LATENT, rasterized=True)
        ax.set(xlim=limits, ylim=limits)
        _axis_labels(ax, f"by ablation, {unit}", f"{name}, {unit}")
    return axes


def scatter(x: ArrayLike, y: ArrayLike, xlabel: str, ylabel: str, ax: Axes | None = None) -> Axes:
    """Draw one quantity over another of the same unit, from 0, with the line on which they are equal.

    Without values a sentence says so.
    """
    ax = ax or one_axes(3.8, width=4.2)
    if not len(x):
        ax.text(0.5, 0.5, "there is nothing to compare", ha="center", transform=ax.transAxes)
    highest = max([*x, *y], default=1)
    ax.plot([0, highest], [0, highest], color=GREY, lw=1)
    ax.plot(x, y, ".", ms=6, alpha=0.6, color=LATENT)
    _axis_labels(ax, xlabel, ylabel)
    return ax


def search_trials(outcome: Search, limits: Limits, ax: Axes | None = None) -> Axes:
    """Draw what each setting of a search cures and harms, a row for each; the best cure is on top.

    outcome: the trials; a quantity that was not measured has no dot, and the chosen setting is printed in bold.
        Without trials a sentence says so.
    limits: dashed lines, in the colour of what they limit.
    """
    trials = sorted((trial for trial in outcome.trials if trial.setting.edits), key=lambda trial: -trial.cured)
    ax = ax or one_axes((LINE + 0.05) * len(trials) + 1.4)
    labels = {"cured": "wrong answers cured", "harmed": "right answers harmed", "changed": "other answers changed"}
    shades = colours(list(labels))
    for marker, (name, label) in zip(MARKERS, labels.items(), strict=False):
        dots = [(value, y) for y, trial in enumerate(trials) if (value := getattr(trial, name)) is not None]
        ax.plot([x for x, _ in dots], [y for _, y in dots], marker, ms=6, color=shades[name], label=label)
    for name in ("harmed", "changed"):
        ax.axvline(getattr(limits, name), color=shades[name], ls="--", lw=1)
    rows = [f"{' + '.join(trial.setting.words)}, × {trial.setting.dose:g}" for trial in trials]
    _rows(ax, dict.fromkeys(rows), "fraction (dashed: the limits)")
    for label, trial in zip(ax.get_yticklabels(), trials, strict=True):
        label.set_fontweight("bold" if trial.setting == outcome.chosen else "normal")
    if not trials:
        ax.text(0.5, 0.5, "no case, or no clamp to try", ha="center", transform=ax.transAxes)
        ax.set_ylim(0.5, -0.5)
    ax.set_xlim(left=-0.02)
    ax.figure.legend(loc="outside lower center", ncols=_legend_columns(list(labels.values())))
    return ax


def cross_table(rows: Mapping[str, Mapping[str, int]], xlabel: str, ylabel: str, ax: Axes | None = None) -> Axes:
    """Draw a table of counts; each row is shaded by its fractions.

    rows: row to {column: count}.
    """
    columns = _names(rows)
    grid = np.array([[row.get(name, 0) for name in columns] for row in rows.values()])
    ax = ax or one_axes(0.34 * len(rows) + 1.8)
    ax.imshow(grid / np.maximum(grid.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
    for (y, x), count in np.ndenumerate(grid):
        if count:
            ax.text(x, y, count, ha="center", va="center")
    ax.set_xticks(range(len(columns)), [one_line(name, 0.25 * WIDTH) for name in columns], rotation=35, ha="right")
    names = [one_line(name, 0.4 * WIDTH) for name in rows]
    ax.set_yticks(range(len(rows)), names)
    _axis_labels(ax, xlabel, ylabel, beside=names)
    return ax


def dose_curves(
    curves: Mapping[str, Mapping[float, Mean]], xlabel: str, ylabel: str, *, mark: float | None = None,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Draw fractions with their intervals over doses or sizes, on a logarithmic axis.

    curves: name to {dose: mean}.
    mark: a dose that a dashed line marks.
    """
    ax = ax or one_axes(3.4)
    shades = colours(list(curves))
    for marker, (name, row) in zip(MARKERS, curves.items(), strict=False):
        error = _error(list(row.values()))
        ax.errorbar(
            list(row), [m.mean for m in row.values()], error, fmt=f"{marker}-", ms=5, capsize=2, color=shades[name],
            label=one_line(name),
        )  # fmt: skip
    at = sorted({dose for row in curves.values() for dose in row} | ({mark} - {None}))
    if mark is not None:
        ax.axvline(mark, color=GREY, ls="--", lw=1)
    ax.set_xscale("log", base=2)
    ax.set(xticks=at, xticklabels=[f"{dose:g}" for dose in at], ylim=(0, 1))
    _axis_labels(ax, xlabel, ylabel)
    ax.legend()
    return ax


def dose_response(steering: ObjectSteering) -> list[Axes]:
    """Draw over the dose how many answers name the concept, how fluent answers are, and the harmonic mean of the two.

    A dotted line marks the chosen dose, a dashed line the fluency of unsteered answers. Without steered answers nothing
    is drawn.
    """
    if not steering.reported:
        return []
    axes = panels(3, columns=1, inches=2.1, sharex=True)
    titles = {"names_concept": "concept\n(fraction named)", "fluency": "fluency", "harmonic": "harmonic mean"}
    for ax, (what, title) in zip(axes, titles.items(), strict=True):
        dose_curves(steering.curves(what), "", title, ax=ax)
        ax.axvline(steering.dose, color=GREY, ls=":", lw=1)
        ax.set_ylim(0, 1.08)
        ax.get_legend().remove()
    unsteered = float(np.mean(steering.ordinary.control_fluency))
    axes[1].axhline(unsteered, color=GREY, ls="--", lw=1)
    axes[1].text(0.01, unsteered, "unsteered answers", transform=axes[1].get_yaxis_transform(), va="bottom", color=GREY)
    axes[-1].set_xlabel("dose")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=_legend_columns(labels))
    return axes


def size_panels(
    results: Mapping[str, tuple[Mapping[str, Mapping[float, Mean]], float]], ylabel: str = "fraction",
    mark: str = "marked size",
) -> list[Axes]:  # fmt: skip
    """Draw `dose_curves` in panels beside each other for several kinds of size; one legend below.

    results: the label of the axis to the curves and to the size that a dashed line marks.
    mark: the name of the dashed line in the legend.
    """
    axes = panels(len(results), inches=3.8, sharey=True)
    for ax, (xlabel, (curves, marked)) in zip(axes, results.items(), strict=True):
        dose_curves(curves, "", "", mark=marked, ax=ax).get_legend().remove()
        ax.set_xlabel(wrapped(xlabel, WIDTH / 2.5, 2))
    axes[0].set_ylabel(literal(ylabel))
    handles, labels = axes[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color=GREY, ls="--", lw=1))
    labels.append(one_line(mark))
    axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=_legend_columns(labels))
    return axes


def _words(name: str) -> str:
    return WORDS.get(name, name.replace("_", " "))


def _names(rows: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Return the keys of all rows, each once, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows.values() for name in row))


def _error(means: Sequence[Mean]) -> np.ndarray:
    """Return how far the ends of intervals lie from their means, (2, n)."""
    return np.array([[m.mean - m.low, m.high - m.mean] for m in means]).reshape(-1, 2).T


def _rows(ax: Axes, results: Mapping[str, object], xlabel: str) -> None:
    """Label the rows of a chart, the first one on top."""
    grid = ax.get_gridspec()
    inches = 0.38 * WIDTH if grid and grid.ncols > 1 else 0.5 * WIDTH
    labels = [name if isinstance(name, Literal) else one_line(name.replace("_", " "), inches) for name in results]
    ax.set(yticks=range(len(results)), yticklabels=labels, ylim=(len(results) - 0.5, -0.5))
    _axis_labels(ax, xlabel, beside=labels)
    ax.grid(axis="x", alpha=0.25)


def _axis_labels(ax: Axes, xlabel: str, ylabel: str = "", beside: Sequence[str] = ()) -> None:
    """Label axes, with texts that fit into the figure, or into this panel's part of it.

    beside: texts that stand left or right of the axes.
    """
    grid = ax.get_gridspec()
    columns, rows = (grid.ncols, grid.nrows) if grid else (1, 1)
    across, up = ax.figure.get_size_inches()
    room = across / columns - max((width(line) for text in beside for line in text.splitlines()), default=0.4) - 0.5
    ax.set(xlabel=wrapped(xlabel, max(room, 1), 2), ylabel=literal(ylabel, 0.7 * up / rows))


def _legend_columns(labels: Sequence[str], inches: float = WIDTH) -> int:
    """Return how many entries of a legend stand in one row of a full figure, or of so many inches."""
    labels = [one_line(text) for text in labels]
    longest = max((max(len(text) / 10, width(text)) for text in labels), default=0.1) + 0.7  # of the text and its mark
    return max(1, min(len(labels), int(inches / longest)))
