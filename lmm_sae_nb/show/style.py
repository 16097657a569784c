"""The look of every figure: its width, its type size, and its colours."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

WIDTH = 7.4  # inches of a full figure; the book's pages are 740 px wide, and a figure has 100 px an inch
POINTS = 12  # of every text; 16.7 px, a little more than the captions
LINE = 0.23  # inches of a line of text

# Okabe and Ito's colours, which colour-blind readers can tell apart
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILLION, YELLOW, BLACK = "#56B4E9", "#D55E00", "#F0E442", "#000000"
GREY = "#8A8D91"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, GREY, YELLOW)

# A colour means the same on every page.
LATENT = BLUE  # the latent on its own images; what this book measured
CHANCE = GREY  # what chance gives; where there are several kinds of chance, each has its own colour (`ROLES`)
TARGET = PAPER = BLACK  # what the book wants to reach; what the paper reports
FOR, AGAINST = ORANGE, SKY  # a positive and a negative attribution
CONCEPT, BOTH = YELLOW, GREEN  # the mask of a concept; where it meets the mask of a latent (blue)
ROLES = {
    "own images": LATENT, "top": LATENT, "measured": LATENT,
    "random": CHANCE, "random images": CHANCE, "random live latents": CHANCE, "chance": CHANCE, "untouched": CHANCE,
    "area": VERMILLION, "moved": VERMILLION, "shuffled": PURPLE, "other name": PURPLE,
    "target": TARGET, "paper": PAPER, "published": PAPER,
}  # fmt: skip


def style() -> None:
    """Set the book's look for all figures that follow."""
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "font.size": POINTS,
            **{f"{part}.labelsize": POINTS for part in ("axes", "xtick", "ytick")},
            **{f"{part}.titlesize": POINTS for part in ("axes", "figure")},
            "legend.fontsize": POINTS,
            "legend.title_fontsize": POINTS,
            "legend.frameon": False,
            "figure.figsize": (WIDTH, 3.2),
            "figure.constrained_layout.use": True,
            "savefig.pad_inches": 0.02,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": plt.cycler(color=PALETTE),
        }
    )


def colours(names: Sequence[str]) -> dict[str, str]:
    """Give each name its colour: that of its role, or else the next of the palette that no role here has."""
    taken = {ROLES[name] for name in names if name in ROLES}
    free = [colour for colour in PALETTE if colour not in taken] or list(PALETTE)
    others = [name for name in names if name not in ROLES]
    given = {name: free[n % len(free)] for n, name in enumerate(others)}
    return {name: ROLES.get(name) or given[name] for name in names}


def one_axes(inches: float, width: float = WIDTH) -> Axes:
    """Return the axes of a new figure of this height."""
    return plt.subplots(figsize=(width, inches))[1]


def panels(count: int, columns: int = 2, inches: float = 2.8, **settings) -> list[Axes]:
    """Return `count` axes of a new figure of full width, `inches` high each, in rows of at most `columns`.

    settings: for `plt.subplots`, such as `sharey=True`.
    """
    columns = min(count, columns)
    rows = -(-count // columns)
    _, axes = plt.subplots(rows, columns, figsize=(WIDTH, rows * inches), squeeze=False, **settings)
    for ax in axes.flat[count:]:
        ax.axis("off")
    return list(axes.flat[:count])
