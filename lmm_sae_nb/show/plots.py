"""Every figure. Takes results, returns axes, computes nothing; nothing of the package is imported at run time."""

from __future__ import annotations

import difflib
import html
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display
from matplotlib.axes import Axes
from PIL import Image

if TYPE_CHECKING:
    from lmm_sae_nb.interpret.exemplars import Exemplar
    from lmm_sae_nb.support.intervals import Mean

BLUE, ORANGE, GREY, GREEN = "#3465a4", "#e07b28", "#8a8d91", "#3f8f4f"


def style() -> None:
    """The book's look, for the settings cell of a notebook."""
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 9,
            "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, GREY, "#a0429a", "#b8860b"]),
            "figure.constrained_layout.use": True,
        }
    )


def images(
    pictures: Sequence[Image.Image], titles: Sequence[str] = (), columns: int = 6, side: float = 1.5
) -> np.ndarray:
    """A sheet of pictures, `side` inches each, with a title above each."""
    rows = -(-len(pictures) // columns)
    size = (columns * side, rows * side * (1.18 if titles else 1.0))
    _, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for n, picture in enumerate(pictures):
        ax = axes.flat[n]
        ax.imshow(picture)
        if titles:
            ax.set_title(titles[n], fontsize=7)
    return axes


def curve(
    rows: Sequence[Mapping[str, float]], y: str, x: str = "step", *, label: str | None = None, ax: Axes | None = None
) -> Axes:
    """One logged quantity over another."""
    ax = ax or plt.subplots(figsize=(4, 2.6))[1]
    ax.plot([row[x] for row in rows], [row[y] for row in rows], label=label or y, lw=1.4)
    ax.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
    return ax


TRAINING = ("loss", "fvu", "dead_fraction", "l0", "tokens_per_second")  # what a training's history is drawn by


def training(history: Sequence[Mapping[str, float]], names: Sequence[str] = TRAINING, x: str = "step") -> np.ndarray:
    """A panel for each logged quantity of a training, side by side."""
    _, axes = plt.subplots(1, len(names), figsize=(min(3 * len(names), 12), 2.4), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        curve(history, name, x, ax=ax)
    return axes[0]


@contextmanager
def live(
    names: Sequence[str], x: str = "step", every: float = 3.0
) -> Iterator[Callable[[Sequence[Mapping[str, float]]], None]]:
    """While the `with` lasts: a callback that shows `training` of the history so far, at most once in `every` seconds.

    In a notebook the figure is redrawn in place; it goes when the `with` ends well, for the page draws the final one.
    """
    handle, shown = display(HTML(""), display_id=True), float("-inf")

    def on_log(history: Sequence[Mapping[str, float]]) -> None:
        nonlocal shown
        if handle and len(history) > 1 and time.monotonic() - shown >= every:
            figure = training(history, names, x)[0].figure
            handle.update(figure)
            plt.close(figure)
            shown = time.monotonic()

    yield on_log
    if handle:
        handle.update(HTML(""))


def shares(results: Mapping[str, Mapping[str, float]], ax: Axes | None = None) -> Axes:
    """Shares with their intervals, one row each; `least`, where given, is marked as what was aimed at.

    results: name to {fraction, low, high, and perhaps least}, all in [0, 1].
    """
    ax = ax or plt.subplots(figsize=(6, 0.24 * len(results) + 0.7))[1]
    for y, row in enumerate(results.values()):
        ax.plot([row["low"], row["high"]], [y, y], color=BLUE, lw=2, alpha=0.5)
        ax.plot(row["fraction"], y, "o", color=BLUE, ms=4)
        if "least" in row:
            ax.plot(row["least"], y, "|", color=ORANGE, ms=9, mew=2)
    ax.set(yticks=range(len(results)), yticklabels=[n.replace("_", " ") for n in results], xlim=(-0.02, 1.02))
    ax.invert_yaxis()
    ax.set_xlabel("fraction right, 99 % interval (orange: target)")
    ax.grid(axis="x", alpha=0.25)
    return ax


def exemplar_strip(rows: Sequence[tuple[str, Sequence[Exemplar]]], side: float = 1.35, columns: int = 5) -> np.ndarray:
    """Figure 2's exemplars: for each (title, exemplars), the images with their activation and, below, masked.

    Whole images, of a model without a patch grid, are one row.
    """
    heights = [1 if any(exemplar.activation is None for exemplar in found) else 2 for _, found in rows]
    high = max(1, sum(heights))
    _, axes = plt.subplots(high, columns, figsize=(columns * side, high * side * 1.06), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    if not rows:
        axes[0, 0].set_title("there are none", loc="left", fontsize=8)
    top = 0
    for (title, exemplars), height in zip(rows, heights, strict=True):
        for column, exemplar in enumerate(exemplars[:columns]):
            if height == 2:
                heat_map(exemplar.image, exemplar.activation, ax=axes[top, column])
            axes[top + height - 1, column].imshow(exemplar.masked)
        axes[top, 0].set_title(title, loc="left", fontsize=8, parse_math=False)  # it may be a model's words
        top += height
    return axes


def heat_map(image: Image.Image, activation: np.ndarray, ax: Axes | None = None, alpha: float = 0.6) -> Axes:
    """An image with its patches' activations (rows, cols) laid over it, transparent where nothing is active."""
    ax = ax or plt.subplots(figsize=(2, 2))[1]
    extent = (0, image.width, image.height, 0)
    ax.imshow(image.convert("L"), cmap="gray", extent=extent, vmin=0, vmax=255)
    highest = max(float(activation.max()), 1e-9)
    ax.imshow(activation, cmap="inferno", extent=extent, alpha=alpha * (activation > 0), vmin=0, vmax=highest)
    ax.axis("off")
    return ax


def signed_map(
    image: Image.Image, values: np.ndarray, title: str = "", ax: Axes | None = None, highest: float | None = None
) -> Axes:
    """An image with signed values (rows, cols) over it: for in orange, against in blue, nothing transparent."""
    ax = ax or plt.subplots(figsize=(2, 2))[1]
    extent = (0, image.width, image.height, 0)
    highest = max(highest or float(np.abs(values).max()), 1e-9)
    ax.imshow(image.convert("L"), cmap="gray", extent=extent, vmin=0, vmax=255)
    colours = np.empty((*values.shape, 4))
    colours[..., :3] = np.where(values[..., None] > 0, _rgb(ORANGE), _rgb(BLUE))
    colours[..., 3] = np.clip(np.abs(values) / highest, 0, 1) ** 0.5 * 0.85
    ax.imshow(colours, extent=extent)
    ax.set_title(title, fontsize=7)
    ax.axis("off")
    return ax


def signed_maps(image: Image.Image, maps: Mapping[str, np.ndarray], columns: int = 4, side: float = 1.9) -> np.ndarray:
    """Show an image, then each map (rows, cols) over it as `signed_map` does, its name above."""
    axes = images([image] * (1 + len(maps)), ["image"] + [""] * len(maps), columns=columns, side=side)
    for ax, (title, values) in zip(axes.flat[1:], maps.items(), strict=False):
        signed_map(image, values, title, ax=ax)
    return axes


def _rgb(shade: str) -> tuple[float, float, float]:
    return tuple(int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5))


def token_html(tokens: Sequence[str], values: Sequence[float]) -> str:
    """Tokens as HTML, escaped, shaded by their value: for in orange, against in blue; the numbers on hovering."""
    highest = max((abs(value) for value in values), default=0.0) or 1.0
    spans = []
    for token, value in zip(tokens, values, strict=True):
        red, green, blue = (round(255 * part) for part in _rgb(ORANGE if value > 0 else BLUE))
        shade = f"background:rgba({red},{green},{blue},{abs(value) / highest:.2f})"
        spans.append(f'<span style="{shade};padding:0 2px" title="{value:+.3f}">{html.escape(token)}</span>')
    return '<p style="line-height:1.9">' + " ".join(spans) + "</p>"


def texts(rows: Mapping[str, Sequence[tuple[Sequence[str], Sequence[float]]]]) -> HTML:
    """Under each title (escaped) some texts, each as its tokens and their values: `token_html`."""
    return HTML(
        "".join(
            f"<small>{html.escape(title)}</small>" + "".join(token_html(*text) for text in found)
            for title, found in rows.items()
        )
    )


def agreement(
    exact: np.ndarray, approximations: Mapping[str, np.ndarray], unit: str = "logits", side: float = 2.6
) -> np.ndarray:
    """Approximated against exact values, a panel for each approximation, with the line on which they agree."""
    _, axes = plt.subplots(1, len(approximations), figsize=(side * len(approximations), side), squeeze=False)
    for ax, (name, values) in zip(axes[0], approximations.items(), strict=True):
        ends = [min(exact.min(), values.min()), max(exact.max(), values.max())]
        ax.plot(ends, ends, color=GREY, lw=1)
        ax.plot(exact, values, ".", ms=2, alpha=0.4, rasterized=True)
        ax.set(xlabel=f"exact, {unit}", ylabel=f"{name}, {unit}")
    return axes[0]


def overlap(
    image: Image.Image, activation: np.ndarray, concept: np.ndarray, title: str, ax: Axes | None = None
) -> Axes:
    """Two masks (height, width) on an image: activated in orange, the concept's in blue, both in green."""
    ax = ax or plt.subplots(figsize=(2, 2))[1]
    colour = np.zeros((*activation.shape, 4))
    for where, shade in ((activation & ~concept, ORANGE), (concept & ~activation, BLUE), (activation & concept, GREEN)):
        colour[where] = (*_rgb(shade), 0.62)
    ax.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255)
    ax.imshow(colour)
    ax.set_title(title, fontsize=7)
    ax.axis("off")
    return ax


def means(results: Mapping[str, Mapping[str, Mean]], xlabel: str, ax: Axes | None = None) -> Axes:
    """Means with intervals, grouped: results maps a group (a row) to {series: Mean}."""
    ax = ax or plt.subplots(figsize=(6, 0.4 * len(results) + 0.8))[1]
    series = list(dict.fromkeys(name for row in results.values() for name in row))
    for s, name in enumerate(series):
        y = [n + 0.16 * (s - (len(series) - 1) / 2) for n, row in enumerate(results.values()) if name in row]
        found = [row[name] for row in results.values() if name in row]
        error = np.array([[m.mean - m.low, m.high - m.mean] for m in found]).T
        ax.errorbar([m.mean for m in found], y, xerr=error, fmt="o", ms=4, capsize=2, label=name)
    ax.set(yticks=range(len(results)), yticklabels=list(results), xlabel=xlabel)
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.25)
    ax.legend(frameon=False, fontsize=8)
    return ax


def histogram(values: np.ndarray, xlabel: str, *, log: bool = False, ax: Axes | None = None) -> Axes:
    """How values are distributed; `log` for a logarithmic axis (zeros left out)."""
    ax = ax or plt.subplots(figsize=(4, 2.4))[1]
    values = np.asarray(values, float)
    if log:
        values = values[values > 0]
        ax.set_xscale("log")
    bins = np.geomspace(values.min(), values.max(), 40) if log and len(values) else 40
    ax.hist(values, bins=bins, color=BLUE, alpha=0.85)
    ax.set(xlabel=xlabel, ylabel="latents")
    return ax


def stacked(
    results: Mapping[str, Mapping[str, float]], xlabel: str, *, limit: float | None = None, ax: Axes | None = None
) -> Axes:
    """A bar for each row, made of its parts; `limit` is drawn as a line that a bar should not cross."""
    ax = ax or plt.subplots(figsize=(6, 0.32 * len(results) + 0.9))[1]
    parts = list(dict.fromkeys(name for row in results.values() for name in row))
    colours = plt.colormaps["tab20"](np.linspace(0, 0.95, max(2, len(parts))))
    left = np.zeros(len(results))
    for name, colour in zip(parts, colours, strict=False):
        values = np.array([row.get(name, 0.0) for row in results.values()])
        ax.barh(range(len(results)), values, left=left, label=name, color=colour)
        left += values
    if limit is not None:
        ax.axvline(limit, color=GREY, ls="--", lw=1)
    ax.set(yticks=range(len(results)), yticklabels=list(results), xlabel=xlabel)
    ax.invert_yaxis()
    ax.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def compared(results: Mapping[str, Mapping[str, float]], xlabel: str, ax: Axes | None = None) -> Axes:
    """The same quantity known in several ways, a row each: results maps a row to {way: value}; from 0."""
    ax = ax or plt.subplots(figsize=(4.5, 0.4 * len(results) + 0.9))[1]
    ways = list(dict.fromkeys(name for row in results.values() for name in row))
    for y, row in enumerate(results.values()):
        ax.plot([min(row.values()), max(row.values())], [y, y], color=GREY, lw=1)
    for way in ways:
        ax.plot([row[way] for row in results.values()], range(len(results)), "o", ms=6, label=way)
    ax.set(yticks=range(len(results)), yticklabels=list(results), xlabel=xlabel)
    ax.set_xlim(left=0)
    ax.set_ylim(len(results) - 0.5, -0.5)
    ax.grid(axis="x", alpha=0.25)
    ax.legend(frameon=False, fontsize=7)
    return ax


def bars(results: Mapping[str, Mapping[str, float]], xlabel: str, *, log: bool = False, ax: Axes | None = None) -> Axes:
    """A bar with its number for each thing, grouped: results maps a group to {thing: value}, things alike coloured."""
    things = list(dict.fromkeys(name for row in results.values() for name in row))
    colours = dict(zip(things, plt.rcParams["axes.prop_cycle"].by_key()["color"] * len(things), strict=False))
    ax = ax or plt.subplots(figsize=(6, 0.16 * sum(map(len, results.values())) + 0.4 * len(results) + 0.8))[1]
    y, middles = 0, []
    for row in results.values():
        places = [y + n for n in range(len(row))]
        drawn = ax.barh(places, list(row.values()), 0.85, color=[colours[name] for name in row])
        labels = [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in row.values()]
        ax.bar_label(drawn, labels, padding=2, fontsize=6)
        middles.append(sum(places) / len(places))
        y += len(row) + 1
    if log:
        ax.set_xscale("log")
    ax.set(yticks=middles, yticklabels=list(results), xlabel=xlabel)
    ax.margins(x=0.12)
    if not ax.yaxis_inverted():  # as an axis that is shared may be already
        ax.invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in things]
    ax.legend(handles, things, frameon=False, fontsize=6)
    return ax


def table(rows: Sequence[Mapping[str, object]], caption: str = "") -> HTML:
    """Rows as an HTML table, their keys as its head; text is escaped, numbers have three digits, None is a dash.

    A mean or a share has its interval below it. A column with a text in it is set left, others right.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    left = {name for name in names if any(isinstance(row.get(name), str) for row in rows)}

    def cell(name: str, told: str, tag: str = "td") -> str:
        side = "left" if name in left else "right"
        return f"<{tag} style='text-align:{side};padding:0 .4em'>{told}</{tag}>"

    def said(value: object) -> str:
        if hasattr(value, "low"):
            mean, interval = str(value).split(" ", 1)
            return f"{mean}<br><small style='white-space:nowrap;font-size:78%'>{interval}</small>"
        return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))

    head = "".join(cell(name, html.escape(name), "th") for name in names)
    body = "".join("<tr>" + "".join(cell(name, said(row.get(name))) for name in names) + "</tr>" for row in rows)
    told = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return HTML(f"<table style='font-size:90%'>{told}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def calibration(
    known: Mapping[str, Sequence[float]], measured: Mapping[str, Sequence[float]], xlabel: str, ylabel: str,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """The same quantity measured (y) and known (x), a dot for each thing, a colour for each group, both in [0, 1]."""
    ax = ax or plt.subplots(figsize=(4.4, 3.4))[1]
    ax.plot([0, 1], [0, 1], color=GREY, lw=1)
    colours = plt.colormaps["tab10"](np.arange(len(known)) % 10)
    for colour, (group, values) in zip(colours, known.items(), strict=True):
        ax.plot(values, measured[group], ".", ms=5, alpha=0.7, color=colour, label=group)
    ax.set(xlabel=xlabel, ylabel=ylabel, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    ax.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def places(count: int, columns: int = 6, side: float = 1.7) -> np.ndarray:
    """`count` axes for pictures, `side` inches each, in rows of at most `columns`, without frames."""
    columns = min(count, columns)
    rows = -(-count // columns)
    _, axes = plt.subplots(rows, columns, figsize=(columns * side, rows * side * 1.12), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    return axes.flat[:count]


def mean_panels(panels: Mapping[str, Mapping[str, Mapping[str, Mean]]]) -> np.ndarray:
    """`means`, a panel beside the other for each of several quantities that have the same groups."""
    groups = max(map(len, panels.values()))
    _, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 0.44 * groups + 0.8), squeeze=False)
    for ax, (xlabel, results) in zip(axes[0], panels.items(), strict=True):
        means(results, xlabel, ax=ax)
    return axes[0]


def counts(table: Mapping[str, Mapping[str, int]], xlabel: str, ylabel: str, ax: Axes | None = None) -> Axes:
    """A cross table: rows to {column: count}, every row shaded by its shares."""
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    grid = np.array([[row.get(name, 0) for name in columns] for row in table.values()])
    ax = ax or plt.subplots(figsize=(0.7 * len(columns) + 1.4, 0.32 * len(table) + 1.2))[1]
    ax.imshow(grid / np.maximum(grid.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
    for (y, x), count in np.ndenumerate(grid):
        if count:
            ax.text(x, y, count, ha="center", va="center", fontsize=8)
    ax.set_xticks(range(len(columns)), columns, rotation=35, ha="right", parse_math=False)
    ax.set_yticks(range(len(table)), list(table))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def doses(curves: Mapping[str, Mapping[float, Mean]], xlabel: str, ylabel: str, ax: Axes | None = None) -> Axes:
    """Shares with their intervals over doses, on a logarithmic axis: curves maps a name to {dose: Mean}."""
    ax = ax or plt.subplots(figsize=(5, 3))[1]
    for name, curve in curves.items():
        (line,) = ax.plot(list(curve), [m.mean for m in curve.values()], "o-", ms=4, label=name)
        error = np.array([[m.mean - m.low, m.high - m.mean] for m in curve.values()]).T
        ax.errorbar(list(curve), [m.mean for m in curve.values()], error, fmt="none", capsize=2, color=line.get_color())
    at = sorted({dose for curve in curves.values() for dose in curve})
    ax.set_xscale("log", base=2)
    ax.set(xticks=at, xticklabels=[f"{dose:g}" for dose in at], xlabel=xlabel, ylabel=ylabel, ylim=(0, 1))
    ax.legend(frameon=False, fontsize=8)
    return ax


def beside(x: Sequence[float], y: Sequence[float], xlabel: str, ylabel: str, ax: Axes | None = None) -> Axes:
    """One value against another in the same unit, with the line on which they are equal."""
    ax = ax or plt.subplots(figsize=(3, 3))[1]
    highest = max([*x, *y])
    ax.plot([0, highest], [0, highest], color=GREY, lw=1)
    ax.plot(x, y, ".", ms=4, alpha=0.6)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax


def marked(before: str, after: str) -> str:
    """HTML of `after`, escaped, in which the words that `before` does not have in this place are marked."""
    old, new = before.split(), after.split()
    words = []
    for tag, _, _, start, stop in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        text = html.escape(" ".join(new[start:stop]))
        if text:
            words.append(text if tag == "equal" else f"<mark>{text}</mark>")
    return " ".join(words)


def steering_strip(rows: Sequence[tuple[float, str]], before: str) -> str:
    """A table, as HTML, of the answers at several strengths, (strength, answer), below the untouched model's, `before`.

    The words of an answer that `before` does not have in their place are marked; everything is escaped.
    """
    lines = [
        ("untouched", html.escape(before)),
        *((f"× {strength:g}", marked(before, said)) for strength, said in rows),
    ]
    body = "".join(f"<tr><th>{name}</th><td style='text-align:left'>{said}</td></tr>" for name, said in lines)
    return f"<table>{body}</table>"
