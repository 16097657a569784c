"""Draw things: sprites with label maps, and backgrounds.

A `Sprite` is a small picture with an alpha channel and, for each kind of concept it shows, a map of concept
numbers. All randomness comes from the generator handed in, so a scene is a function of its seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lmm_sae_nb.pictureworld.world.concepts import COLOURS, COMPOSITES, EMOJI_FACES, EMOJI_OBJECTS, NUMBER

FINE = 2  # drawn things are drawn this many times larger and reduced, for smooth edges


def art_folder() -> Path:
    """Return the shipped emoji art: `data/pictureworld/art` of the checkout this package runs from."""
    folder = Path(__file__).resolve().parents[3] / "data" / "pictureworld" / "art"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the Picture World art is missing: {folder} does not exist. It is part of the repository; install the "
            "package from a clone with `pip install -e .`"
        )
    return folder


@dataclass
class Sprite:
    """A picture to be laid on a scene: `rgb` (h, w, 3) uint8, `alpha` (h, w) float in [0, 1], and concept
    numbers (h, w) uint8 by kind, 0 for none."""

    rgb: np.ndarray
    alpha: np.ndarray
    labels: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        return self.alpha.shape


def _labelled(rgb: np.ndarray, alpha: np.ndarray, **numbers: int) -> Sprite:
    seen = alpha > 0.5
    return Sprite(rgb, alpha, {kind: np.where(seen, number, 0).astype(np.uint8) for kind, number in numbers.items()})


# ---- emoji ----------------------------------------------------------------------------------------------------


@cache
def _emoji(code: str) -> Image.Image:
    return Image.open(art_folder() / f"{code}.png").convert("RGBA").copy()


def _emoji_sprite(code: str, side: int, flip: bool, **numbers: int) -> Sprite:
    art = _emoji(code).resize((side, side), Image.Resampling.BILINEAR)
    if flip:
        art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(art)
    return _labelled(pixels[..., :3], pixels[..., 3] / np.float32(255), **numbers)


def emoji_object(name: str, side: int, rng: np.random.Generator) -> Sprite:
    return _emoji_sprite(EMOJI_OBJECTS[name], side, rng.random() < 0.5, object=NUMBER["object"][name])


def face(emotion: str, side: int, rng: np.random.Generator) -> Sprite:
    drawings = EMOJI_FACES[emotion]
    return _emoji_sprite(drawings[rng.integers(len(drawings))], side, rng.random() < 0.5, face=NUMBER["face"][emotion])


# ---- colours --------------------------------------------------------------------------------------------------


def shade(colour: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """Return the colour, a little lighter or darker, so that a colour is more than one RGB value."""
    factor = 1 + rng.uniform(-0.06, 0.06)
    return tuple(int(np.clip(c * factor, 0, 255)) for c in COLOURS[colour])


def pick_colours(rng: np.random.Generator, n: int, without: tuple[str, ...] = ()) -> list[str]:
    names = [name for name in COLOURS if name not in without]
    return [names[i] for i in rng.permutation(len(names))[:n]]


def _name_of_rgb(rgb: np.ndarray) -> np.ndarray:
    """Colour number of each RGB value (..., 3) in [0, 1]: the truth that colour masks are made of."""
    high, low = rgb.max(-1), rgb.min(-1)
    spread = high - low
    safe = np.where(spread == 0, 1, spread)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.select([high == r, high == g], [((g - b) / safe) % 6, (b - r) / safe + 2], (r - g) / safe + 4) * 60
    saturation = spread / np.where(high == 0, 1, high)
    number = NUMBER["colour"]
    pale = saturation < 0.16
    rules = [
        (high < 0.2, "black"),
        (pale & (high > 0.86), "white"),
        (pale, "grey"),
        ((hue >= 8) & (hue < 48) & (high < 0.66), "brown"),
        (
            (hue >= 300) & (hue < 346) | ((hue >= 346) | (hue < 8)) & (saturation < 0.55) & (high > 0.8),
            "pink",
        ),
        ((hue >= 346) | (hue < 14), "red"),
        (hue < 41, "orange"),
        (hue < 68, "yellow"),
        (hue < 172, "green"),
        (hue < 252, "blue"),
    ]
    return np.select([test for test, _ in rules], [number[name] for _, name in rules], number["purple"]).astype(
        np.uint8
    )


@cache
def _colour_table() -> np.ndarray:
    axis = (np.arange(64) * 4 + 2) / np.float32(255)
    return _name_of_rgb(np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1))


def colour_map(pixels: np.ndarray) -> np.ndarray:
    """Colour number of every pixel of (h, w, 3) uint8, by hue, saturation and brightness."""
    fine = pixels >> 2
    return _colour_table()[fine[..., 0], fine[..., 1], fine[..., 2]]


# ---- materials and textures -----------------------------------------------------------------------------------

_TILE = 256


def _noise(rng: np.random.Generator, scale: int, side: int = _TILE) -> np.ndarray:
    """Smooth noise in [-1, 1] that repeats at its edges, with features of about `scale` pixels."""
    coarse = rng.uniform(-1, 1, (side // scale, side // scale)).astype(np.float32)
    wrapped = np.pad(coarse, ((0, 1), (0, 1)), mode="wrap")
    image = Image.fromarray(wrapped).resize((side + scale, side + scale), Image.Resampling.BILINEAR)
    return np.asarray(image)[:side, :side]


def _stained(base: tuple[int, int, int], *layers: tuple[np.ndarray, float]) -> np.ndarray:
    light = sum(layer * strength for layer, strength in layers)
    return np.clip(np.asarray(base, np.float32) + light[..., None], 0, 255).astype(np.uint8)


@cache
def _material_tile(name: str) -> np.ndarray:
    """Return (256, 256, 3) uint8 of a material; the same in every process."""
    rng = np.random.default_rng(sum(map(ord, name)))
    y, x = np.mgrid[0:_TILE, 0:_TILE].astype(np.float32)
    grain = rng.uniform(-1, 1, (_TILE, _TILE)).astype(np.float32)
    soft, wide = _noise(rng, 4), _noise(rng, 32)
    if name == "brick":
        row = (y // 8).astype(int)
        mortar = (y % 8 < 1.5) | ((x + 8 * (row % 2)) % 16 < 1.5)
        tile = _stained((168, 78, 58), (grain, 8), (wide, 14))
        tile[mortar] = (205, 196, 186)
    elif name == "wood":
        rings = np.sin((y + 6 * _noise(rng, 64) + 2 * soft) * 0.9)
        tile = _stained((164, 112, 66), (rings, 20), (grain, 5))
        tile[(y % 32) < 1.5] = (92, 58, 32)
    elif name == "grass":
        blades = np.sin(x * 1.7 + 3 * soft) * np.sin(y * 0.55 + 2 * soft)
        tile = _stained((84, 158, 62), (blades, 30), (grain, 14))
    elif name == "water":
        tile = _stained((62, 134, 196), (np.sin(y * 0.55 + 2.2 * np.sin(x * 0.12) + soft), 22), (wide, 8))
    elif name == "metal":
        brushed = np.repeat(rng.uniform(-1, 1, (_TILE, 1)).astype(np.float32), _TILE, axis=1)
        tile = _stained((158, 164, 172), (brushed, 12), (np.sin((x + y) * 0.05), 26))
        tile[((x % 32 - 16) ** 2 + (y % 32 - 16) ** 2) < 5] = (90, 96, 104)
    elif name == "sand":
        tile = _stained((226, 200, 142), (grain, 20), (np.sin(y * 0.3 + 2 * wide), 6))
    elif name == "snow":
        tile = _stained((238, 244, 250), (soft, 6), (wide, 6))
        tile[grain > 0.985] = (190, 214, 240)
    else:  # stone: the borders of random cells
        points = rng.uniform(0, _TILE, (110, 2)).astype(np.float32)
        offset = np.abs(points[:, None, None, :] - np.stack([y, x], -1)[None])
        near = np.sort(np.minimum(offset, _TILE - offset).__pow__(2).sum(-1), axis=0)[:2] ** 0.5
        tile = _stained((136, 134, 130), (grain, 8), (wide, 22))
        tile[near[1] - near[0] < 2.2] = (74, 72, 70)
    return tile


def material(name: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random piece (height, width, 3) uint8 of a material."""
    tile = _material_tile(name)
    top, left = rng.integers(_TILE, size=2)
    return tile.take(np.arange(top, top + height), 0, mode="wrap").take(np.arange(left, left + width), 1, mode="wrap")


def texture(name: str, side: int, colours: list[tuple[int, int, int]], rng: np.random.Generator) -> np.ndarray:
    """Return a square (side, side, 3) uint8 of a texture in two colours, with random period and phase."""
    period = rng.integers(10, 17)
    y, x = np.mgrid[0:side, 0:side] + rng.integers(period, size=2)[:, None, None]
    if name == "stripes":
        across = (x, y, x + y, x - y)[rng.integers(4)]
        ink = across % period < period / 2
    elif name == "dots":
        ink = (x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < (period * 0.33) ** 2
    elif name == "checks":
        ink = (x // (period // 2 + 2) + y // (period // 2 + 2)) % 2 == 0
    elif name == "waves":
        ink = (y + 4 * np.sin(x * 2 * math.pi / (1.6 * period))) % period < period / 2
    elif name == "zigzags":
        ink = (y + np.abs(x % (2 * period) - period) * 0.9) % period < period / 2
    elif name == "grid":
        ink = (x % period < 3) | (y % period < 3)
    elif name == "rings":
        ink = np.hypot(x - x.mean(), y - y.mean()) % period < period / 2
    else:  # crosses
        u, v = np.abs(x % period - period // 2), np.abs(y % period - period // 2)
        ink = (np.minimum(u, v) < 1.6) & (np.maximum(u, v) < period * 0.36)
    return np.where(ink[..., None], colours[0], colours[1]).astype(np.uint8)


def _rounded(side: int) -> np.ndarray:
    mask = Image.new("L", (side * FINE, side * FINE))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, side * FINE - 1, side * FINE - 1), side * FINE // 7, fill=255)
    return np.asarray(mask.resize((side, side), Image.Resampling.BOX)) / np.float32(255)


def panel(name: str, side: int, rng: np.random.Generator) -> Sprite:
    """Return a square panel that shows a texture."""
    light, dark = ("white", "yellow", "pink", "orange"), ("red", "green", "blue", "purple", "brown", "black")
    inks = [shade(pool[rng.integers(len(pool))], rng) for pool in (light, dark)]
    if rng.random() < 0.5:
        inks.reverse()
    pixels = texture(name, side, inks, rng)
    return _labelled(pixels, _rounded(side), object=NUMBER["object"]["panel"], texture=NUMBER["texture"][name])


def block(name: str, side: int, rng: np.random.Generator) -> Sprite:
    """Return a square block of a material, with an edge that tells it from the ground."""
    pixels = material(name, side, side, rng).copy()
    for edge in (np.s_[:3], np.s_[-3:], np.s_[:, :3], np.s_[:, -3:]):
        pixels[edge] = pixels[edge] // 2
    return _labelled(pixels, _rounded(side), object=NUMBER["object"]["block"], material=NUMBER["material"][name])


# ---- words ----------------------------------------------------------------------------------------------------


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"), size)


class Board(NamedTuple):
    """The board of a sign in pixels, and the size of its letters."""

    letters: int
    width: int
    height: int


def board(word: str, side: int) -> Board:
    """Return the board that a word needs: the largest letters that fit into so many pixels a side."""
    size = next(s for s in range(26, 11, -1) if font(s).getlength(word.upper()) <= side - 12 or s == 12)
    left, top, right, bottom = font(size).getbbox(word.upper())
    return Board(size, min(side, right - left + 12), bottom - top + 14)


def sign(word: str, side: int, rng: np.random.Generator, on: Board | None = None) -> Sprite:
    """Return a sign on a post with a word on it, legible at 192 px.

    on: the board; by default the one that the word needs.
    """
    size, width, height = on or board(word, side)
    left, top, right, bottom = font(size).getbbox(word.upper())
    paper, ink = (
        ("white", "black"),
        ("yellow", "black"),
        ("green", "white"),
        ("blue", "white"),
        ("red", "white"),
    )[rng.integers(5)]
    image = Image.new("RGBA", (width, height + 18))
    draw = ImageDraw.Draw(image)
    draw.rectangle((width // 2 - 3, height, width // 2 + 2, height + 18), fill=(110, 100, 96, 255))
    draw.rounded_rectangle((0, 0, width - 1, height - 1), 5, fill=(*shade(paper, rng), 255), outline=(40, 40, 40, 255))
    draw.text(
        ((width - right + left) // 2 - left, 7 - top),
        word.upper(),
        font=font(size),
        fill=(*COLOURS[ink], 255),
    )
    pixels = np.asarray(image)
    sprite = _labelled(pixels[..., :3], pixels[..., 3] / np.float32(255), object=NUMBER["object"]["sign"])
    letters = np.zeros(sprite.size, np.uint8)
    letters[4 : height - 4, 4 : width - 4] = NUMBER["word"][word]
    sprite.labels["word"] = letters
    return sprite


# ---- shapes and composites ------------------------------------------------------------------------------------


class _Easel:
    """Draws polygons, boxes and ellipses in unit coordinates, on the picture and on the part map alike."""

    def __init__(self, side: int):
        self.side = side
        self._scale = side * FINE
        self._colour = Image.new("RGBA", (self._scale, self._scale))
        self._part = Image.new("L", (self._scale, self._scale))
        self._brushes = ImageDraw.Draw(self._colour), ImageDraw.Draw(self._part)

    def _draw(
        self, how: str, points: list[tuple[float, float]], rgb: tuple[int, int, int], part: int, **options
    ) -> None:
        placed = [(x * (self._scale - 1), y * (self._scale - 1)) for x, y in points]
        edge = tuple(c * 2 // 3 if max(rgb) > 60 else 96 for c in rgb)  # a black thing has a grey edge
        on_colour, on_part = self._brushes
        if how == "polygon":
            on_colour.polygon(placed, fill=(*rgb, 255), outline=(*edge, 255), width=2)
        else:
            getattr(on_colour, how)(placed, fill=(*rgb, 255), outline=(*edge, 255), width=2)
        getattr(on_part, how)(placed, fill=part)

    def box(self, x0: float, y0: float, x1: float, y1: float, rgb, part: int = 1) -> None:
        self._draw("rectangle", [(x0, y0), (x1, y1)], rgb, part)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, rgb, part: int = 1) -> None:
        self._draw("ellipse", [(x0, y0), (x1, y1)], rgb, part)

    def polygon(self, points: list[tuple[float, float]], rgb, part: int = 1) -> None:
        self._draw("polygon", points, rgb, part)

    def ring(self, x0: float, y0: float, x1: float, y1: float, rgb, part: int, width: float) -> None:
        for brush, fill in zip(self._brushes, ((*rgb, 255), part), strict=False):
            box = [v * (self._scale - 1) for v in (x0, y0, x1, y1)]
            brush.arc(box, 0, 360, fill=fill, width=int(width * self._scale))

    def sprite(self, name: str) -> Sprite:
        small = np.asarray(self._colour.resize((self.side, self.side), Image.Resampling.BOX))
        part = np.asarray(self._part.resize((self.side, self.side), Image.Resampling.NEAREST))
        alpha = small[..., 3] / np.float32(255)
        # BOX averages colour over transparent pixels too; undo it so that edges do not darken.
        rgb = np.clip(small[..., :3] / np.maximum(alpha, 1e-3)[..., None], 0, 255).astype(np.uint8)
        sprite = _labelled(rgb, alpha, object=NUMBER["object"][name])
        if part.max() > 1:
            sprite.labels["part"] = np.where(alpha > 0.5, part, 0).astype(np.uint8)
        return sprite


def shape(name: str, colour: str, side: int, rng: np.random.Generator) -> Sprite:
    """Return a filled shape in one colour."""
    easel, rgb = _Easel(side), shade(colour, rng)
    turn = [2 * math.pi * i / 10 - math.pi / 2 for i in range(10)]
    if name == "circle":
        easel.ellipse(0.04, 0.04, 0.96, 0.96, rgb)
    elif name == "square":
        easel.box(0.08, 0.08, 0.92, 0.92, rgb)
    elif name == "triangle":
        easel.polygon([(0.5, 0.06), (0.96, 0.92), (0.04, 0.92)], rgb)
    elif name == "star":
        radii = (0.5, 0.21) * 5
        easel.polygon([(0.5 + r * math.cos(a), 0.53 + r * math.sin(a)) for a, r in zip(turn, radii, strict=True)], rgb)
    elif name == "heart":
        t = np.linspace(0, 2 * math.pi, 60)
        x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        easel.polygon(list(zip(0.5 + x / 35, 0.46 - y / 35, strict=False)), rgb)
    else:  # diamond
        easel.polygon([(0.5, 0.02), (0.86, 0.5), (0.5, 0.98), (0.14, 0.5)], rgb)
    return easel.sprite(name)


def composite(name: str, colours: dict[str, str], side: int, rng: np.random.Generator) -> Sprite:
    """Return a drawn thing whose parts each have a colour: `colours` maps part to colour name."""
    easel = _Easel(side)
    ink = {part: (shade(colour, rng), NUMBER["part"][part]) for part, colour in colours.items()}
    _DRAWINGS[name](easel, ink)
    return easel.sprite(name)


def _house(easel: _Easel, ink) -> None:
    easel.box(0.68, 0.08, 0.82, 0.40, *ink["chimney"])
    easel.box(0.12, 0.42, 0.88, 0.98, *ink["wall"])
    easel.polygon([(0.5, 0.06), (1.0, 0.46), (0.0, 0.46)], *ink["roof"])
    easel.box(0.20, 0.58, 0.40, 0.98, *ink["door"])
    easel.box(0.52, 0.56, 0.80, 0.80, *ink["window"])


def _truck(easel: _Easel, ink) -> None:
    easel.box(0.0, 0.22, 0.60, 0.76, *ink["cargo"])
    easel.polygon([(0.62, 0.38), (0.86, 0.38), (1.0, 0.60), (1.0, 0.76), (0.62, 0.76)], *ink["cabin"])
    easel.polygon([(0.68, 0.42), (0.84, 0.42), (0.93, 0.58), (0.68, 0.58)], *ink["window"])
    for left in (0.10, 0.68):
        easel.ellipse(left, 0.68, left + 0.24, 0.92, *ink["wheels"])


def _tree(easel: _Easel, ink) -> None:
    easel.box(0.40, 0.55, 0.60, 0.99, *ink["trunk"])
    easel.ellipse(0.08, 0.18, 0.62, 0.68, *ink["leaves"])
    easel.ellipse(0.38, 0.18, 0.92, 0.68, *ink["leaves"])
    easel.ellipse(0.22, 0.01, 0.78, 0.50, *ink["leaves"])


def _mug(easel: _Easel, ink) -> None:
    easel.ring(0.52, 0.28, 0.98, 0.78, *ink["handle"], width=0.13)
    easel.box(0.08, 0.12, 0.70, 0.94, *ink["cup"])


def _flower(easel: _Easel, ink) -> None:
    easel.box(0.45, 0.45, 0.55, 0.99, *ink["stem"])
    easel.ellipse(0.08, 0.64, 0.46, 0.86, *ink["leaves"])
    easel.ellipse(0.54, 0.64, 0.92, 0.86, *ink["leaves"])
    for i in range(6):
        x, y = 0.5 + 0.19 * math.cos(i * math.pi / 3), 0.29 + 0.19 * math.sin(i * math.pi / 3)
        easel.ellipse(x - 0.14, y - 0.14, x + 0.14, y + 0.14, *ink["petals"])


def _boat(easel: _Easel, ink) -> None:
    easel.polygon([(0.46, 0.04), (0.92, 0.62), (0.46, 0.62)], *ink["sail"])
    easel.polygon([(0.42, 0.14), (0.42, 0.62), (0.08, 0.62)], *ink["sail"])
    easel.polygon([(0.0, 0.66), (1.0, 0.66), (0.82, 0.96), (0.18, 0.96)], *ink["hull"])


def _chair(easel: _Easel, ink) -> None:
    easel.box(0.16, 0.60, 0.28, 0.98, *ink["legs"])
    easel.box(0.76, 0.60, 0.88, 0.98, *ink["legs"])
    easel.box(0.14, 0.02, 0.32, 0.56, *ink["back"])
    easel.box(0.12, 0.50, 0.92, 0.68, *ink["seat"])


def _cart(easel: _Easel, ink) -> None:
    easel.polygon([(0.66, 0.44), (0.96, 0.06), (1.0, 0.16), (0.74, 0.52)], *ink["handle"])
    easel.polygon([(0.0, 0.34), (0.80, 0.34), (0.70, 0.72), (0.10, 0.72)], *ink["tray"])
    for left in (0.10, 0.46):
        easel.ellipse(left, 0.66, left + 0.28, 0.94, *ink["wheels"])


_DRAWINGS = {
    "house": _house,
    "truck": _truck,
    "tree": _tree,
    "mug": _mug,
    "flower": _flower,
    "boat": _boat,
    "chair": _chair,
    "cart": _cart,
}
assert _DRAWINGS.keys() == COMPOSITES.keys()


# ---- backgrounds ----------------------------------------------------------------------------------------------


def _sky(height: int, width: int, top: tuple[int, int, int], bottom: tuple[int, int, int]) -> np.ndarray:
    mix = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    rows = np.asarray(top, np.float32) * (1 - mix) + np.asarray(bottom, np.float32) * mix
    return np.repeat(rows, width, axis=1).astype(np.uint8)


def background(scene: str, height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (height, width, 3) uint8 and material numbers (height, width) uint8 of an empty scene."""
    if scene == "blank":
        return np.full((height, width, 3), 255, np.uint8), np.zeros((height, width), np.uint8)
    top, bottom = _SKIES[scene]
    pixels, ground = _sky(height, width, top, bottom), np.zeros((height, width), np.uint8)
    horizon = int(height * rng.uniform(*_HORIZON[scene]))
    hills = horizon + (
        rng.uniform(2, 7) * np.sin(np.arange(width) * rng.uniform(0.02, 0.05) + rng.uniform(0, 6))
    ).astype(int)
    below = np.arange(height)[:, None] >= hills[None]

    def cover(name: str, where: np.ndarray) -> None:
        pixels[where] = material(name, height, width, rng)[where]
        ground[where] = NUMBER["material"][name]

    _furnish(scene, pixels, below, horizon, rng, cover)
    return pixels, ground


_SKIES = {
    "meadow": ((120, 182, 236), (206, 230, 246)), "beach": ((96, 176, 238), (226, 240, 248)),
    "desert": ((246, 190, 120), (252, 226, 176)), "forest": ((66, 116, 78), (112, 156, 96)),
    "city": ((176, 188, 204), (232, 220, 208)), "night": ((12, 16, 44), (40, 44, 92)),
    "winter": ((188, 206, 226), (226, 234, 244)), "sea": ((134, 194, 236), (210, 232, 244)),
    "mountain": ((150, 190, 226), (224, 234, 240)), "room": ((226, 206, 176), (236, 218, 192)),
}  # fmt: skip
_HORIZON = {
    "meadow": (0.42, 0.6), "beach": (0.62, 0.74), "desert": (0.45, 0.6), "forest": (0.74, 0.84), "city": (0.84, 0.9),
    "night": (0.8, 0.9), "winter": (0.5, 0.66), "sea": (0.28, 0.42), "mountain": (0.5, 0.62), "room": (0.66, 0.76),
}  # fmt: skip


def _furnish(scene: str, pixels: np.ndarray, below: np.ndarray, horizon: int, rng: np.random.Generator, cover) -> None:
    height, width = below.shape
    y, x = np.mgrid[0:height, 0:width]
    if scene == "meadow":
        cover("grass", below)
    elif scene == "beach":
        cover("water", (y > height * 0.42) & ~below)
        cover("sand", below)
    elif scene == "desert":
        cover("sand", below)
    elif scene == "forest":
        for left in np.arange(rng.integers(4, 14), width, 34):
            trunk = (x >= left) & (x < left + 11) & ~below
            pixels[trunk] = (88 + 22 * ((y + x) % 5 == 0)[trunk])[:, None] * np.array([1, 0.72, 0.5])
        cover("grass", below)
    elif scene == "city":
        left = -int(rng.integers(0, 20))
        while left < width:
            wide, tall = int(rng.integers(22, 40)), int(height * rng.uniform(0.3, 0.72))
            tower = (x >= left) & (x < left + wide - 2) & (y > height - tall)
            grey = int(rng.integers(84, 128))
            pixels[tower] = (grey, grey, grey + 10)
            pixels[tower & ((x - left) % 9 > 4) & ((y - height) % 11 > 6) & (y < height - 12)] = (
                244,
                222,
                138,
            )
            left += wide
        pixels[below] = (72, 72, 78)
    elif scene == "night":
        stars = rng.integers(0, (horizon, width), (46, 2))
        pixels[stars[:, 0], stars[:, 1]] = (250, 250, 220)
        moon_y, moon_x = rng.uniform(16, 40), rng.uniform(20, width - 20)
        pixels[np.hypot(y - moon_y, x - moon_x) < 12] = (240, 236, 200)
        pixels[below] = (20, 26, 36)
    elif scene == "winter":
        cover("snow", below)
        flakes = rng.integers(0, (height, width), (90, 2))
        pixels[flakes[:, 0], flakes[:, 1]] = (255, 255, 255)
    elif scene == "sea":
        cover("water", below)
    elif scene == "mountain":
        peaks = np.full(width, height)
        for centre in np.linspace(0, width, 4) + rng.uniform(-22, 22, 4):
            slope = rng.uniform(0.8, 1.3)
            peaks = np.minimum(peaks, height * rng.uniform(0.16, 0.4) + slope * np.abs(np.arange(width) - centre))
        cover("stone", (y >= peaks[None]) & ~below)
        cover("grass", below)
    elif scene == "room":
        pixels[(x % 24 < 2) & ~below] = (206, 184, 152)
        cover("wood", y >= horizon)
