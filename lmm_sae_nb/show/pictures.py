"""Images: sheets of them, heat maps, masks, and the exemplars of latents. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from PIL import Image

from lmm_sae_nb.show.style import AGAINST, BOTH, CONCEPT, FOR, GREY, LATENT, LINE, WIDTH, one_axes
from lmm_sae_nb.show.texts import height, wrapped
from lmm_sae_nb.support.images import rgb

if TYPE_CHECKING:
    from lmm_sae_nb.interpret.exemplars import Exemplar
    from lmm_sae_nb.measures.selectivity import Pair
    from lmm_sae_nb.score.examples import Overlap

EXEMPLARS = 5  # columns of a strip: the paper shows five images of a latent


def images(pictures: Sequence[Image.Image], titles: Sequence[str] = (), columns: int = 4) -> list[Axes]:
    """Draw a sheet of pictures with a title above each.

    pictures: any number; `columns` of them fill the width.
    titles: as many, or none.
    """
    lines = [wrapped(title, 0.95 * WIDTH / columns) for title in titles]
    axes = picture_axes(len(pictures), columns, lines=max((line.count("\n") + 1 for line in lines), default=0))
    for ax, picture in zip(axes, pictures, strict=True):
        ax.imshow(rgb(picture))
    for ax, title in zip(axes, lines, strict=bool(lines)):
        ax.set_title(title)
    return axes


def picture_axes(count: int, columns: int = 4, *, lines: int = 2) -> list[Axes]:
    """Return `count` axes for pictures, without frames.

    columns: that fill the width.
    lines: of a title above each picture.
    """
    side = WIDTH / columns
    columns = min(max(count, 1), columns)
    rows = max(1, -(-count // columns))
    _, axes = plt.subplots(rows, columns, figsize=(columns * side, rows * (side + lines * LINE)), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    return list(axes.flat[:count])


def picture_rows(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> np.ndarray:
    """Draw rows of up to five pictures, a title above each row."""
    titles = [wrapped(title) for title, _ in rows]
    axes = _strips(titles, [1] * len(rows))
    for row, (_, pictures) in zip(axes, rows, strict=True):
        for ax, picture in zip(row, pictures, strict=False):
            ax.imshow(rgb(picture))
    return axes


def exemplar_strip(rows: Sequence[tuple[str, Sequence[Exemplar]]]) -> np.ndarray:
    """Draw up to five exemplars of each latent as in Figure 2: the activation on the image and, below, the masked one.

    rows: (title, exemplars). Whole images, of a model without a patch grid, have one row.
    """
    heights = [1 if any(one.activation is None for one in exemplars) else 2 for _, exemplars in rows]
    axes = _strips([wrapped(title) for title, _ in rows] or ["none"], heights or [1])
    top = 0
    for (_, exemplars), rows_of_latent in zip(rows, heights, strict=True):
        for column, one in enumerate(exemplars[:EXEMPLARS]):
            if rows_of_latent == 2:
                heat_map(one.image, one.activation, ax=axes[top, column])
            axes[top + rows_of_latent - 1, column].imshow(one.masked)
            for ax in axes[top : top + rows_of_latent, column]:
                _frame(ax)  # else a white picture looks like none
        top += rows_of_latent
    return axes


def _frame(ax: Axes) -> None:
    ax.set_frame_on(True)
    for side in ax.spines.values():
        side.set(visible=True, color=GREY, linewidth=0.5)


def _strips(titles: Sequence[str], heights: Sequence[int]) -> np.ndarray:
    """Return axes for strips of pictures, each so many rows high, with a title above each strip.

    They are placed by hand: an automatic layout makes room for a long title between the columns.
    """
    side = WIDTH / EXEMPLARS
    room = [height([title]) + 0.12 for title in titles]
    high = sum(heights) * side + sum(room)
    figure = plt.figure(figsize=(WIDTH, high), layout="none")
    rows, y = [], high
    for title, inches, count in zip(titles, room, heights, strict=True):
        y -= inches
        for n in range(count):
            y -= side
            places = (
                (column * side / WIDTH, y / high, 0.97 * side / WIDTH, 0.97 * side / high)
                for column in range(EXEMPLARS)
            )
            rows.append([figure.add_axes(place, frameon=False, xticks=[], yticks=[]) for place in places])
            if n == 0:
                rows[-1][0].set_title(title, loc="left")
    return np.array(rows)


def heat_map(image: Image.Image, activation: np.ndarray, ax: Axes | None = None, alpha: float = 0.6) -> Axes:
    """Draw the activations of an image's patches on the grey image, transparent where nothing is active.

    activation: (rows, columns), at least 0.
    """
    image = rgb(image)
    ax = _grey(image, ax)
    highest = max(float(activation.max()), 1e-9)
    extent = (0, image.width, image.height, 0)
    ax.imshow(activation, cmap="inferno", extent=extent, alpha=alpha * (activation > 0), vmin=0, vmax=highest)
    return ax


def signed_map(
    image: Image.Image, values: np.ndarray, title: str = "", ax: Axes | None = None, highest: float | None = None
) -> Axes:
    """Draw signed values of an image's patches on the grey image: for in orange, against in blue.

    values: (rows, columns).
    highest: the size of a value that is drawn in full colour; the largest of `values` unless given.
    """
    image = rgb(image)
    ax = _grey(image, ax)
    highest = max(highest or float(np.abs(values).max()), 1e-9)
    shade = np.empty((*values.shape, 4))
    shade[..., :3] = np.where(values[..., None] > 0, to_rgb(FOR), to_rgb(AGAINST))
    shade[..., 3] = np.clip(np.abs(values) / highest, 0, 1) ** 0.5 * 0.85
    ax.imshow(shade, extent=(0, image.width, image.height, 0))
    ax.set_title(wrapped(title, 0.95 * WIDTH / 4))
    return ax


def signed_maps(image: Image.Image, maps: Mapping[str, np.ndarray]) -> list[Axes]:
    """Draw an image and, beside it, `signed_map` of each of several values, each in its own scale.

    maps: title to values, (rows, columns).
    """
    titles = ["image", *(wrapped(title, 0.95 * WIDTH / 4) for title in maps)]
    axes = picture_axes(len(titles), lines=max(title.count("\n") + 1 for title in titles))
    axes[0].imshow(rgb(image))
    axes[0].set_title("image")
    for ax, (title, values) in zip(axes[1:], maps.items(), strict=True):
        signed_map(image, values, title, ax=ax)
    return axes


def changed_pairs(rows: Sequence[tuple[str, Pair, np.ndarray]]) -> list[Axes]:
    """Draw for each pair of images its two images and, on the second, where a latent's activation changes.

    More activation is orange, less is blue, in a scale of its own for each pair.

    rows: (title of the change, pair, change), with the change as `selectivity.change_map` returns it; none draw
        nothing.
    """
    if not rows:
        return []
    titles = [wrapped(title, 0.95 * WIDTH / 3) for title, _, _ in rows]
    axes = picture_axes(3 * len(rows), 3, lines=max((title.count("\n") + 1 for title in titles), default=1))
    for n, (title, (_, pair, change)) in enumerate(zip(titles, rows, strict=True)):
        before, after, where = axes[3 * n : 3 * n + 3]
        before.imshow(rgb(pair.before))
        after.imshow(rgb(pair.after))
        signed_map(pair.after, change, title, ax=where)
        before.set_title(wrapped(f"with {', '.join(pair.taken_out)}", 0.95 * WIDTH / 3))
        after.set_title(wrapped(f"with {', '.join(pair.put_in)}" if pair.put_in else "without", 0.95 * WIDTH / 3))
    return axes


def overlap(
    image: Image.Image, activation: np.ndarray, concept: np.ndarray, title: str, ax: Axes | None = None,
    columns: int = 4,
) -> Axes:  # fmt: skip
    """Draw two masks on the grey image: activated in blue, the concept in yellow, both in green.

    activation, concept: (height, width), bool.
    columns: of such pictures that fill the width; the title is wrapped to one of them.
    """
    ax = _grey(image, ax)
    shade = np.zeros((*activation.shape, 4))
    parts = ((activation & ~concept, LATENT), (concept & ~activation, CONCEPT), (activation & concept, BOTH))
    for where, colour in parts:
        shade[where] = (*to_rgb(colour), 0.62)
    ax.imshow(shade)
    ax.set_title(wrapped(title, 0.95 * WIDTH / columns))
    return ax


def overlaps(found: Sequence[Overlap], exemplar: Exemplar | None = None) -> list[Axes]:
    """Draw `overlap` of each with its title above, in full rows where that is possible.

    exemplar: one whose activation is drawn as a heat map before them.
    """
    count = len(found) + (exemplar is not None)
    columns = 3 if count in (5, 6) else 4
    lines = [wrapped(one.title, 0.95 * WIDTH / columns).count("\n") + 1 for one in found]
    axes = picture_axes(count, columns, lines=max(lines, default=1))
    if exemplar is not None:
        heat_map(exemplar.image, exemplar.activation, ax=axes[0]).set_title("activation")
    for ax, one in zip(axes[exemplar is not None :], found, strict=True):
        overlap(one.image, one.active, one.concept, one.title, ax, columns)
    return axes


def _grey(image: Image.Image, ax: Axes | None) -> Axes:
    """Draw an image in grey, without a frame."""
    ax, image = ax or one_axes(2, width=2), rgb(image)
    ax.imshow(image.convert("L"), cmap="gray", extent=(0, image.width, image.height, 0), vmin=0, vmax=255)
    ax.axis("off")
    return ax
