"""Reading a scene of Picture World from its pixels and label maps alone, never from its facts.

What the tests of scenes and of questions compare with. `scene`, `chart` and `masked` keep what they made.
"""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from lmm_sae_nb.pictureworld.world import art
from lmm_sae_nb.pictureworld.world.concepts import COLOURS, COUNTRIES, EMOTIONS, KINDS, SHAPES, SIGN_WORDS
from lmm_sae_nb.pictureworld.world.scenes import PATCH, SIDE, Scene, make_map, make_masked, make_scene

scene, chart, masked = cache(make_scene), cache(make_map), cache(make_masked)
INSIDE = {"panel": "texture", "block": "material", "sign": "word"}
PALETTE = np.array(list(COLOURS.values()), float)
PLURALS = {"grapes", "cherries", "scissors", "glasses"}


def names(grid: np.ndarray, kind: str) -> list[str]:
    """The concepts of a kind that a label map holds."""
    return [KINDS[kind][number - 1] for number in np.unique(grid) if number]


def box(mask: np.ndarray) -> tuple[slice, slice]:
    """The smallest window that holds the mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def place(mask: np.ndarray) -> str:
    """In which third of the picture, down and across, the middle of the mask's window lies."""
    down, across = (min(2, max(0, round(((s.start + s.stop) / 2 - SIDE / 2) / 46) + 1)) for s in box(mask))
    rows, columns = ("top", "", "bottom")[down], ("left", "", "right")[across]
    return f"{rows}-{columns}" if rows and columns else rows or columns or "center"


def at(spot: str) -> str:
    return {"left": "on the left", "right": "on the right"}.get(
        spot, f"at the {spot}" if spot in ("top", "bottom") else f"in the {spot}"
    )


def article(noun: str) -> str:
    return noun if noun in PLURALS else ("an " if noun[0] in "aeiou" else "a ") + noun


def colour(pixels: np.ndarray) -> str:
    """The colour of the palette nearest to the middling one of these pixels (n, 3)."""
    return list(COLOURS)[((PALETTE - np.median(pixels, axis=0)) ** 2).sum(1).argmin()]


def things(scene: Scene) -> dict[str, tuple[np.ndarray, str]]:
    """By noun, in reading order: the mask and the phrase of everything that lies on the background."""
    found = {noun: scene.labels["object"] == KINDS["object"].index(noun) + 1
             for noun in names(scene.labels["object"], "object")}  # fmt: skip
    found |= {f"{emotion} face": scene.labels["face"] == EMOTIONS.index(emotion) + 1
              for emotion in names(scene.labels["face"], "face")}  # fmt: skip
    order = ["top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right"]
    inside = {noun: (mask, _phrase(noun, mask, scene)) for noun, mask in found.items()}
    return dict(sorted(inside.items(), key=lambda pair: order.index(place(pair[1][0]))))


def _phrase(noun: str, mask: np.ndarray, scene: Scene) -> str:
    if noun in SHAPES:
        return article(f"{colour(scene.pixels[mask])} {noun}")
    if noun in ("panel", "block"):
        return f"a {noun} of {names(scene.labels[INSIDE[noun]][mask], INSIDE[noun])[0]}"
    return article(noun)


def words(scene: Scene) -> dict[str, np.ndarray]:
    """By word: the window that the label map says it stands in."""
    grid = scene.labels["word"]
    return {word: grid == KINDS["word"].index(word) + 1 for word in names(grid, "word")}


def countries(scene: Scene) -> dict[str, np.ndarray]:
    """The labels of a map, without its title, in reading order."""
    found = {word: window for word, window in words(scene).items() if word in COUNTRIES}
    return dict(sorted(found.items(), key=lambda pair: (box(pair[1])[0].start > 96, box(pair[1])[1].start)))


def is_shaded(window: np.ndarray, pixels: np.ndarray) -> bool:
    """Whether the pixels just around a window of a map have the blue of the basin; land is pale."""
    rows, columns = box(window)
    around = np.zeros_like(window)
    around[rows.start - 2 : rows.stop + 2, max(0, columns.start - 2) : columns.stop + 2] = True
    return bool((pixels[around & ~window][:, 0] < 190).mean() > 0.5)


def patches(grid: np.ndarray) -> np.ndarray:
    """(SIDE, SIDE, ...) as (patches, PATCH * PATCH, ...)."""
    n = SIDE // PATCH
    cut = grid.reshape(n, PATCH, n, PATCH, -1).swapaxes(1, 2)
    return cut.reshape(n * n, PATCH * PATCH, *grid.shape[2:])


@cache
def _written(word: str, size: int) -> np.ndarray:
    """A word in white on black, cut to its edges."""
    canvas = Image.new("L", (240, 48))
    ImageDraw.Draw(canvas).text((8, 8), word, fill=255, font=art.font(size))
    return np.asarray(canvas)[box(np.asarray(canvas) > 0)].astype(float)


def _likeness(seen: np.ndarray, drawn: np.ndarray) -> float:
    """The best correlation of a drawn word with what is seen, wherever it is laid; 0 if it is of another size."""
    spare = np.subtract(seen.shape, drawn.shape)
    if spare.min() < 0 or spare.max() > 8:
        return 0.0
    laid = np.lib.stride_tricks.sliding_window_view(seen, drawn.shape).reshape(-1, drawn.size)
    laid, drawn = (flat - flat.mean(-1, keepdims=True) for flat in (laid, drawn.ravel()))
    return (laid @ drawn / np.linalg.norm(laid, axis=-1) / np.linalg.norm(drawn)).max()


def read(window: np.ndarray, pixels: np.ndarray, on_map: bool) -> tuple[str, float]:
    """The word whose drawing is most like what a window shows, and how like it is, at most 1."""
    crop = pixels[box(window)].astype(float)
    if on_map:  # capitalised, near black
        seen, drawings = -crop.sum(-1), {word: [_written(word.capitalize(), 16)] for word in COUNTRIES}
    else:
        seen = np.linalg.norm(crop - np.median(crop.reshape(-1, 3), axis=0), axis=-1)
        drawings = {word: [_written(word.upper(), size) for size in range(12, 27)] for word in SIGN_WORDS}
    likeness = {word: max(_likeness(seen, drawn) for drawn in versions) for word, versions in drawings.items()}
    best = max(likeness, key=likeness.get)
    return best, likeness[best]
