"""Compose scenes: each is a pure function of its seed, with pixels, masks and facts.

Splits are ranges of seeds. Held-out seeds start at 1,000,000, and no model learns from them. There is one exception:
a masked scene draws the scene behind it from all seeds below 2**31. A test goes through the whole recipe: none of the
scenes drawn in training is one that is reported on. `book/lab_notebook.md` says which decisions were made after a look
at held-out scenes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from lmm_sae_nb.pictureworld.world import art
from lmm_sae_nb.pictureworld.world.art import Sprite
from lmm_sae_nb.pictureworld.world.concepts import (
    BASINS,
    COMPOSITES,
    EMOJI_OBJECTS,
    EMOTIONS,
    KINDS,
    MATERIALS,
    NUMBER,
    PLACES,
    SCENES,
    SHAPES,
    SIGN_WORDS,
    TEXTURES,
    with_article,
)  # fmt: skip

SIDE = 192  # pixels
PATCH = 16  # pixels; the eye's patch, and the grain of masked scenes
TRAIN, VALIDATION, HELD_OUT = 0, 900_000, 1_000_000  # first seed of each split
GROUNDS = tuple(name for name in SCENES if name != "map")  # backgrounds that items lie on

# Centre (y, x) of each place, in pixels, and the largest item that fits there.
_CENTRES = {
    "center": (96, 96), "left": (96, 50), "right": (96, 142), "top": (50, 96), "bottom": (142, 96),
    "top-left": (50, 50), "top-right": (50, 142), "bottom-left": (142, 50), "bottom-right": (142, 142),
}  # fmt: skip
_QUARTERS = ("top-left", "top-right", "bottom-left", "bottom-right")
_PAIRS = (("left", "right"), ("top", "bottom"))


@dataclass
class Item:
    """One thing in a scene. `kind` is object, shape, composite, face, panel, block or sign; `name` is what is
    particular about it (dog, star, house, happy, stripes, wood, STOP's word)."""

    kind: str
    name: str
    place: str
    colours: dict[str, str] = field(default_factory=dict)  # part (or "whole") -> colour name

    @property
    def phrase(self) -> str:
        """Return the item in an answer, with its article."""
        if self.kind == "shape":
            return with_article(f"{self.colours['whole']} {self.name}")
        return {
            "face": with_article(f"{self.name} face"), "panel": f"a panel of {self.name}",
            "block": f"a block of {self.name}", "sign": "a sign",
        }.get(self.kind, with_article(self.name))  # fmt: skip

    @property
    def noun(self) -> str:
        """Return the word that *is there a …* and *where is the …* use."""
        return {"face": f"{self.name} face", "panel": "panel", "block": "block", "sign": "sign"}.get(
            self.kind, self.name
        )


@dataclass(frozen=True)
class Laid:
    """An item where it lies on a scene.

    sprite: its picture.
    corner: top and left pixel of the sprite.
    side: pixels that the sprite was drawn for.
    state: of the random generator before the sprite was drawn, so that it can be drawn again.
    """

    item: Item
    sprite: Sprite
    corner: tuple[int, int]
    side: int
    state: dict

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the scene under the sprite."""
        return tuple(slice(c, c + s) for c, s in zip(self.corner, self.sprite.size, strict=True))


@dataclass(frozen=True)
class Drawing:
    """The parts of a scene, before they are laid over each other: `compose` makes the scene.

    pixels, ground: of the background: colours (SIDE, SIDE, 3), and concept numbers of its materials (SIDE, SIDE).
    laid: the items, the lowest first.
    """

    seed: int
    background: str
    pixels: np.ndarray
    ground: np.ndarray
    laid: tuple[Laid, ...]


@dataclass
class Chart:
    """The facts of a map: which basin it is titled with, which labels it shows where, and which lie inside."""

    basin: str
    labels: dict[str, str]  # place -> country
    inside: frozenset[str]  # countries whose label lies in the shaded basin

    def covers(self, country: str) -> bool:
        """Return the right answer of *according to the image, does the basin cover the country?*"""
        return country in self.inside


@dataclass
class Scene:
    seed: int
    background: str
    items: list[Item]
    pixels: np.ndarray  # (SIDE, SIDE, 3) uint8
    labels: dict[str, np.ndarray]  # kind -> (SIDE, SIDE) uint8 concept numbers, 0 = none
    where: np.ndarray  # (SIDE, SIDE) uint8: place (from 1, in the order of PLACES) of the item at a pixel, 0 = none
    chart: Chart | None = None
    shown: tuple[str, str] | None = None  # (kind, concept) left visible when the rest is black

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    def mask(self, kind: str, concept: str) -> np.ndarray:
        """Return (SIDE, SIDE) bool: the pixels that show the concept. ValueError for an unknown kind or concept."""
        if concept not in NUMBER.get(kind, {}):
            raise ValueError(f"Picture World has no {kind!r} concept {concept!r}; kinds are {', '.join(KINDS)}")
        return self.labels[kind] == NUMBER[kind][concept]

    def concepts(self) -> dict[str, set[str]]:
        """Return every concept that at least one pixel shows, by kind."""
        return {kind: {KINDS[kind][n - 1] for n in np.unique(grid) if n} for kind, grid in self.labels.items()}


def make_scene(seed: int, kinds: Sequence[str] = ()) -> Scene | None:
    """Return the scene of a seed: about one in seven a map, the others a background with nought to four items.

    kinds: return None if no item is of one of these kinds. Such a scene is not drawn to its end.
    """
    drawing = draw_scene(seed, kinds)
    if drawing is not None:
        return compose(drawing)
    return None if kinds else make_map(seed)


def draw_scene(seed: int, kinds: Sequence[str] = ()) -> Drawing | None:
    """Return the parts of a seed's scene; None if it is a map, which has no items.

    kinds: return None, too, if no item is of one of these kinds.
    """
    rng = np.random.default_rng([20, seed])
    if rng.random() < 0.14:
        return None
    places = _layout(rng)
    return _draw(seed, rng, places, kinds=kinds) if places or not kinds else None


def make_crowd(seed: int) -> Scene:
    """Return a scene with nine small items, never used in questions: it teaches the eye many things at once."""
    rng = np.random.default_rng([21, seed])
    places = [f"{32 + 64 * row},{32 + 64 * column}" for row in range(3) for column in range(3)]
    return compose(_draw(seed, rng, places, unique=False))


def make_signs(seed: int) -> Scene:
    """Return a scene with six large things, most of them signs: it teaches the eye to read."""
    rng = np.random.default_rng([24, seed])
    places = [f"{y},{x}" for y in (32, 96, 160) for x in (48, 144)]
    return compose(_draw(seed, rng, places, unique=False, odds={**_KIND_ODDS, "sign": 1.6}))


def make_map(seed: int) -> Scene:
    """Return a map: a title with a basin's name, four labelled countries, and the basin shaded over one to three."""
    rng = np.random.default_rng([22, seed])
    basin = list(BASINS)[rng.integers(len(BASINS))]
    lands = [str(land) for land in rng.permutation(sum(BASINS[basin], ()))[:4]]
    chart = Chart(
        basin,
        dict(zip(_QUARTERS, lands, strict=False)),
        frozenset(lands[i] for i in rng.permutation(4)[: rng.integers(1, 4)]),
    )
    return _draw_map(seed, chart, rng)


def make_masked(seed: int, scene: Scene | None = None) -> Scene:
    """Return a scene of which only the patches of one concept are visible, as the exemplars of section 2.2 show it.

    As real latents make them: some patches of the concept may be missing and a few others visible.
    """
    rng = np.random.default_rng([23, seed])
    scene = scene or make_scene(int(rng.integers(2**31)))
    chosen = _maskable(scene, rng)
    if chosen is None:
        return make_masked(seed + 500_000_000)
    kind, concept, share = chosen
    visible = share > rng.uniform(0.15, 0.5) * share.max()
    visible &= rng.random(visible.shape) > rng.uniform(0, 0.35)
    visible |= rng.random(visible.shape) < rng.choice([0, 0, 0.01, 0.03])
    if not (visible & (share > 0)).any():
        visible |= share == share.max()
    keep = np.kron(visible, np.ones((PATCH, PATCH), bool))
    labels = {name: np.where(keep, grid, 0).astype(np.uint8) for name, grid in scene.labels.items()}
    return Scene(
        scene.seed,
        scene.background,
        scene.items,
        scene.pixels * keep[..., None],
        labels,
        scene.where * keep,
        scene.chart,
        (kind, concept),
    )


def patch_share(mask: np.ndarray) -> np.ndarray:
    """Return share of each patch (rows, columns) that a (SIDE, SIDE) bool mask covers."""
    rows, columns = mask.shape[0] // PATCH, mask.shape[1] // PATCH
    return mask.reshape(rows, PATCH, columns, PATCH).mean((1, 3))


def _maskable(scene: Scene, rng: np.random.Generator) -> tuple[str, str, np.ndarray] | None:
    """Return a concept of the scene that one could recognise alone: its kind, name and patch shares."""
    present = scene.concepts()
    weight = {"object": 5, "face": 3, "texture": 3, "material": 2, "word": 4, "part": 3, "scene": 1}
    options = [
        (kind, name)
        for kind in weight
        for name in sorted(present[kind])
        if name not in ("sign", "panel", "block", "blank")
    ]
    if not options:
        return None
    chances = np.array([weight[kind] for kind, _ in options], float)
    kind, name = options[rng.choice(len(options), p=chances / chances.sum())]
    share = patch_share(scene.mask(kind, name))
    return (kind, name, share) if share.max() > 0.25 else None


# ---- scenes with items ----------------------------------------------------------------------------------------


def _layout(rng: np.random.Generator) -> list[str]:
    """Return where the items are: none, one anywhere, two side by side or above each other, or two to four in the
    quarters.
    """
    dice = rng.random()
    if dice < 0.06:
        return []
    if dice < 0.28:
        return [list(_CENTRES)[rng.integers(len(_CENTRES))]]
    if dice < 0.46:
        return list(_PAIRS[rng.integers(2)])
    return [_QUARTERS[i] for i in sorted(rng.permutation(4)[: rng.choice([2, 3, 4], p=[0.2, 0.4, 0.4])])]


_KIND_ODDS = {
    "object": 0.44,
    "shape": 0.13,
    "composite": 0.11,
    "face": 0.09,
    "panel": 0.08,
    "block": 0.07,
    "sign": 0.08,
}
POOLS = {
    "object": tuple(EMOJI_OBJECTS), "shape": SHAPES, "composite": tuple(COMPOSITES), "face": EMOTIONS,
    "panel": TEXTURES, "block": MATERIALS, "sign": SIGN_WORDS,
}  # fmt: skip
_ONCE = (
    "face",
    "panel",
    "block",
    "sign",
    "composite",
)  # at most one of each in a scene, so that *the face* is one


def _pick_items(rng: np.random.Generator, places: list[str], unique: bool, odds: dict[str, float]) -> list[Item]:
    items: list[Item] = []
    kinds, chances = list(odds), np.array(list(odds.values()))
    chances /= chances.sum()
    while len(items) < len(places):
        kind = kinds[rng.choice(len(kinds), p=chances)]
        name = POOLS[kind][rng.integers(len(POOLS[kind]))]
        if unique and (any(i.name == name for i in items) or kind in _ONCE and any(i.kind == kind for i in items)):
            continue
        parts = COMPOSITES[name] if kind == "composite" else ("whole",) if kind == "shape" else ()
        colours = dict(zip(parts, art.pick_colours(rng, len(parts)), strict=False))
        items.append(Item(kind, name, places[len(items)], colours))
    return items


def draw_item(item: Item, side: int, rng: np.random.Generator) -> Sprite:
    """Return the picture of an item, for so many pixels a side."""
    if item.kind == "shape":
        return art.shape(item.name, item.colours["whole"], side, rng)
    if item.kind == "composite":
        return art.composite(item.name, item.colours, side, rng)
    draw = {
        "object": art.emoji_object,
        "face": art.face,
        "panel": art.panel,
        "block": art.block,
        "sign": art.sign,
    }[item.kind]
    return draw(item.name, side, rng)


def _draw(
    seed: int,
    rng: np.random.Generator,
    places: list[str],
    unique: bool = True,
    odds: dict[str, float] = _KIND_ODDS,
    kinds: Sequence[str] = (),
) -> Drawing | None:
    """Return a scene with an item at each place, in parts; None if kinds are given, and no item is of one of them."""
    background = GROUNDS[rng.integers(len(GROUNDS))]
    pixels, ground = art.background(background, SIDE, SIDE, rng)
    items = _pick_items(rng, places, unique, odds)
    if kinds and not any(item.kind in kinds for item in items):
        return None
    laid = []
    for item in items:
        smallest, largest = (44, 62) if not unique else (76, 112) if len(places) == 1 else (60, 86)
        side = int(rng.integers(smallest, largest))
        if item.kind == "sign":
            side = int(max(side, 64 if len(places) > 6 else 84))
        state = rng.bit_generator.state
        sprite = draw_item(item, side, rng)
        laid.append(Laid(item, sprite, _spot(item.place, sprite, rng), side, state))
    return Drawing(seed, background, pixels, ground, tuple(laid))


def compose(drawing: Drawing) -> Scene:
    """Return the scene of a drawing: its items laid over the background, the last on top."""
    pixels = drawing.pixels.copy()
    labels = {kind: np.zeros((SIDE, SIDE), np.uint8) for kind in KINDS}
    labels["scene"][:] = NUMBER["scene"][drawing.background]
    labels["material"][:] = drawing.ground
    where = np.zeros((SIDE, SIDE), np.uint8)
    for laid in drawing.laid:
        _lay(pixels, labels, laid)
        place = laid.item.place
        where[laid.window][laid.sprite.alpha > 0.5] = 1 + PLACES.index(place) if place in PLACES else 0
    labels["colour"] = art.colour_map(pixels)
    return Scene(drawing.seed, drawing.background, [laid.item for laid in drawing.laid], pixels, labels, where)


def _spot(place: str, sprite: Sprite, rng: np.random.Generator) -> tuple[int, int]:
    """Top and left pixel of the sprite, near its place's centre and wholly inside the scene."""
    y, x = _CENTRES[place] if place in _CENTRES else map(int, place.split(","))
    corner = np.array([y, x]) - np.array(sprite.size) / 2 + rng.uniform(-6, 6, 2)
    return tuple(int(np.clip(c, 0, SIDE - s)) for c, s in zip(corner, sprite.size, strict=False))


def _lay(pixels: np.ndarray, labels: dict[str, np.ndarray], laid: Laid) -> None:
    """Blend a sprite over the scene; where it covers, the labels below it are gone."""
    sprite, window = laid.sprite, laid.window
    alpha = sprite.alpha[..., None]
    pixels[window] = (sprite.rgb * alpha + pixels[window] * (1 - alpha) + 0.5).astype(np.uint8)
    covered = sprite.alpha > 0.5
    for kind, grid in labels.items():
        view = grid[window]
        view[covered] = sprite.labels[kind][covered] if kind in sprite.labels else 0


# ---- maps -----------------------------------------------------------------------------------------------------

_LAND = ((236, 226, 190), (214, 230, 196), (244, 214, 196), (226, 214, 236), (250, 238, 170), (206, 226, 224))
_TITLE = 22  # pixels


def _draw_map(seed: int, chart: Chart, rng: np.random.Generator) -> Scene:
    wobble = np.sin(np.arange(SIDE) * rng.uniform(0.03, 0.07) + rng.uniform(0, 6)) * rng.uniform(1, 5)
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    across, down = SIDE / 2 + rng.uniform(-4, 4), _TITLE + (SIDE - _TITLE) / 2 + rng.uniform(-4, 4)
    edge_x, edge_y = across + wobble[y], down + wobble[x]
    region = 2 * (y > edge_y) + (x > edge_x)
    land = np.array(_LAND, np.uint8)[rng.permutation(len(_LAND))[:4]]
    pixels = land[region]
    centres = [(row + rng.uniform(-5, 5), col) for row in (_TITLE + 43, SIDE - 43) for col in (48, 144)]

    inside = np.zeros((SIDE, SIDE), bool)
    for quarter, country in enumerate(chart.labels.values()):
        if chart.covers(country):
            cy, cx = centres[quarter]
            inside |= ((y - cy) / rng.uniform(32, 38)) ** 2 + ((x - cx) / rng.uniform(44, 52)) ** 2 < 1
    ripple = np.where((y + 3 * np.sin(x * 0.3)) % 8 < 3, 0.72, 0.5)[..., None]
    shaded = pixels * (1 - ripple) + np.array((70, 150, 200)) * ripple
    pixels = np.where(inside[..., None], shaded, pixels).astype(np.uint8)
    pixels[(np.abs(x - edge_x) < 1) | (np.abs(y - edge_y) < 1)] = (120, 100, 90)
    pixels[:_TITLE] = (250, 250, 244)
    pixels[_TITLE - 1 : _TITLE + 1] = (60, 60, 60)

    labels = {kind: np.zeros((SIDE, SIDE), np.uint8) for kind in KINDS}
    labels["scene"][:] = NUMBER["scene"]["map"]
    canvas = Image.fromarray(pixels)
    draw = ImageDraw.Draw(canvas)
    where = np.zeros((SIDE, SIDE), np.uint8)
    _write(draw, labels, chart.basin, (_TITLE / 2 - 1, SIDE / 2), 16)
    for (place, country), (cy, cx) in zip(chart.labels.items(), centres, strict=False):
        window = _write(draw, labels, country, (cy, cx + rng.uniform(-3, 3)), 16)
        where[window] = 1 + PLACES.index(place)
    pixels = np.asarray(canvas)
    labels["colour"] = art.colour_map(pixels)
    return Scene(seed, "map", [], pixels.copy(), labels, where, chart)


def _write(
    draw: ImageDraw.ImageDraw,
    labels: dict[str, np.ndarray],
    word: str,
    centre: tuple[float, float],
    size: int,
):
    text, (cy, cx) = word.capitalize(), centre
    left, top, right, bottom = draw.textbbox((0, 0), text, font=art.font(size))
    x, y = int(np.clip(cx - (right - left) / 2, 2, SIDE - 2 - (right - left))), int(cy - (bottom - top) / 2)
    draw.text((x - left, y - top), text, font=art.font(size), fill=(24, 24, 30))
    window = np.s_[max(0, y - 1) : y + bottom - top + 1, max(0, x - 1) : x + right - left + 1]
    labels["word"][window] = NUMBER["word"][word]
    labels["scene"][window] = 0
    return window


_DRAWN = ("sign", "composite")
RARE = dict.fromkeys((1, 9, 18), _DRAWN)  # turns in twenty that wait for a scene with one of these: rare and hard
MORE = RARE | {0: _DRAWN, 4: ("composite",), 7: ("panel",), 11: ("sign",), 14: _DRAWN}
PARTS = MORE | dict.fromkeys((0, 2, 10, 12, 14, 15), ("composite",))


def make_drilled(seed: int, turn: int, drills: Mapping[int, tuple[str, ...]] = MORE) -> Scene:
    """Return the scene of one of twenty turns: two maps, drills (scenes with an item of certain kinds), and plain
    scenes, of which one in seven is a map too.
    """
    if turn in (6, 16):
        return make_map(seed)
    kinds = drills.get(turn, ())
    scene = make_scene(seed, kinds)
    while scene is None:
        seed += 7919
        scene = make_scene(seed % VALIDATION, kinds)
    return scene


def make_lesson(seed: int, turn: int, drills: Mapping[int, tuple[str, ...]] = MORE) -> Scene:
    """Return the same, but that three turns are masked scenes."""
    return make_masked(seed) if turn in (3, 8, 13) else make_drilled(seed, turn, drills)
