"""Reading a scene of Picture World from its pixels and label maps alone, never from its facts.

What the tests of scenes and of questions compare with. `scene`, `chart` and `masked` keep what they made.
"""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from lmm_sae_nb.pictureworld import art
from lmm_sae_nb.pictureworld.concepts import COLOURS, COUNTRIES, EMOTIONS, KINDS, SHAPES, SIGN_WORDS
from lmm_sae_nb.pictureworld.scenes import PATCH, SIDE, Scene, make_map, make_masked, make_scene

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
    """The ink of a word, cut to its edges."""
    canvas = Image.new("L", (240, 48))
    ImageDraw.Draw(canvas).text((8, 8), word, fill=255, font=art.font(size))
    ink = np.asarray(canvas) > 127
    return ink[box(ink)]


def _likeness(ink: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two pieces of ink with their top left corners together."""
    if max(abs(a - b) for a, b in zip(ink.shape, other.shape, strict=True)) > 1:
        return 0.0
    height, width = np.maximum(ink.shape, other.shape)
    both = [np.pad(m, ((0, height - m.shape[0]), (0, width - m.shape[1]))) for m in (ink, other)]
    return (both[0] & both[1]).sum() / (both[0] | both[1]).sum()


def read(window: np.ndarray, pixels: np.ndarray, on_map: bool) -> tuple[str, float]:
    """The word whose drawing is most like the ink in a window, and how like it is, from 0 to 1."""
    crop = pixels[box(window)].astype(float)
    if on_map:  # capitalised, near black on pale land and on the basin's blue alike
        ink, drawings = crop.max(-1) < 115, {w: [_written(w.capitalize(), 16)] for w in COUNTRIES}
    else:
        distance = np.linalg.norm(crop - np.median(crop.reshape(-1, 3), axis=0), axis=-1)
        ink = distance > distance.max() / 2
        drawings = {w: [_written(w.upper(), size) for size in range(12, 27)] for w in SIGN_WORDS}
    ink = ink[box(ink)]
    likeness = {word: max(_likeness(ink, drawn) for drawn in versions) for word, versions in drawings.items()}
    best = max(likeness, key=likeness.get)
    return best, likeness[best]
