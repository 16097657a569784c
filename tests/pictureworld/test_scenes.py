"""Scenes: functions of their seed, whose masks and facts are what the pixels show, in splits that never meet."""

import inspect
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import worlds
from matplotlib.path import Path as Outline
from PIL import Image
from scipy import ndimage

from lmm_sae_nb.pictureworld import __main__ as commands
from lmm_sae_nb.pictureworld.instructblip import train as instructblip_train
from lmm_sae_nb.pictureworld.llava import train_eye, train_language
from lmm_sae_nb.pictureworld.world import scenes
from lmm_sae_nb.pictureworld.world.concepts import COLOURS, COMPOSITES, EMOJI_FACES, EMOJI_OBJECTS, KINDS, SHAPES
from lmm_sae_nb.pictureworld.world.datasets import SPLITS
from lmm_sae_nb.pictureworld.world.questions import caption
from lmm_sae_nb.pictureworld.world.scenes import HELD_OUT, SIDE, TRAIN, VALIDATION

FURNISHED = [seed for seed in range(300) if not worlds.scene(seed).chart]
CHARTS = range(60)
MASKED = range(100)


def every(kind: str):
    """Each item of a kind, its scene, and its mask."""
    for scene in map(worlds.scene, FURNISHED):
        for item in scene.items:
            if item.kind == kind:
                yield item, scene, worlds.things(scene)[item.noun][0]


def inner(mask: np.ndarray) -> np.ndarray:
    """The mask without the two pixels at its edge, where colours blend."""
    return ndimage.binary_erosion(mask, iterations=2)


# --- A function of the seed ---------------------------------------------------------------------------------

DIGEST = """
import hashlib, json, sys
from lmm_sae_nb.pictureworld.world import scenes
def digest(scene):
    grids = (scene.pixels, scene.where, *scene.labels.values())
    facts = repr((scene.items, scene.shown, scene.chart and (scene.chart.labels, sorted(scene.chart.inside))))
    return hashlib.sha256(b"".join(grid.tobytes() for grid in grids) + facts.encode()).hexdigest()
makers = (scenes.make_scene, scenes.make_map, scenes.make_masked, scenes.make_crowd, scenes.make_signs)
order = [(make, seed) for make in makers for seed in (1, 7, 900_001, 1_000_002)]
print(json.dumps({f"{make.__name__} {seed}": digest(make(seed)) for make, seed in order[:: int(sys.argv[1])]}))
"""


def test_a_seed_gives_the_same_scene_in_every_process_and_order(root):
    def child(step: str) -> dict[str, str]:
        environment = os.environ | {"PYTHONHASHSEED": "1" + step.removeprefix("-")}
        done = subprocess.run([sys.executable, "-c", DIGEST, step], cwd=root, env=environment, stdout=subprocess.PIPE)
        return json.loads(done.stdout)

    forwards, backwards = child("1"), child("-1")
    assert forwards == backwards
    assert len(set(forwards.values())) == len(forwards) == 20


@pytest.mark.parametrize(
    ("make", "seed", "says", "quarters"),
    [
        (
            worlds.scene,
            4,
            "a blank scene with an angry face at the top and an orange triangle at the bottom .",
            [[252, 239, 226], [252, 235, 217], [253, 238, 222], [254, 244, 234]],
        ),
        (
            worlds.scene,
            VALIDATION,
            "a sea scene with a pig in the top-left , a sign in the top-right , a chair in the bottom-left "
            "and a guitar in the bottom-right .",
            [[163, 184, 203], [146, 155, 186], [70, 118, 168], [82, 135, 187]],
        ),
        (
            worlds.chart,
            HELD_OUT,
            "a map of the nile basin with egypt , kenya , ghana and mali .",
            [[165, 187, 211], [225, 218, 191], [235, 224, 168], [161, 194, 189]],
        ),
        (
            worlds.masked,
            HELD_OUT,
            "a room scene with a snail in the center .",
            [[119, 109, 93], [106, 96, 82], [97, 76, 55], [123, 93, 65]],
        ),
    ],
)
def test_the_world_is_still_the_one_that_the_shipped_model_learned(make, seed, says, quarters):
    scene = make(seed)
    assert caption(scene) == says
    means = scene.pixels.reshape(2, SIDE // 2, 2, SIDE // 2, 3).mean((1, 3)).reshape(4, 3)  # colours, by quarter
    assert means == pytest.approx(np.array(quarters), abs=1)


# --- Splits -------------------------------------------------------------------------------------------------


DRILLED = [SimpleNamespace(kind=kind) for kind in ("sign", "panel", "composite")]  # what drills look for


def bare_scene(seed: int, kinds: tuple[str, ...]) -> SimpleNamespace | None:
    """In the place of a drawn scene: one in four without a wanted item."""
    items = DRILLED[: seed % 4]
    wanted = not kinds or any(item.kind in kinds for item in items)
    return SimpleNamespace(items=items, pixels=np.zeros(1)) if wanted else None


@pytest.fixture(scope="module")
def trained_on() -> dict[str, set[int]]:
    """Every seed that the recipe's courses draw, first to last, by the function that draws it."""
    seen = {name: set() for name in ("make_scene", "make_map", "make_masked", "make_crowd", "make_signs")}

    def recorder(name: str):
        def make(seed: int, kinds: tuple[str, ...] = ()):
            seen[name].add(seed)
            return bare_scene(seed, kinds)

        return make

    courses, sizes = [], {}
    for train in (train_language.train_language, train_eye.train_tower):
        sizes |= {train.__name__: inspect.signature(train).parameters["batch"].default}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_language, "train_language", lambda _, **asked: courses.append(asked))
        patch.setattr(train_eye, "train_tower", lambda _, *start, **asked: courses.append(asked | {"tower": start}))
        for course, (steps, _) in commands.COURSES.items():
            commands.study(course, Path("nowhere"), steps, 1.0)
        for name in seen:
            patch.setattr(scenes, name, recorder(name))
        for module in (train_language, train_eye):
            patch.setattr(module, "patch_labels", lambda scene: np.zeros(1))
        patch.setattr(train_language, "lesson", lambda *_: [])
        patch.setattr(train_language, "aside", lambda *_: None)
        patch.setattr(train_language, "pack", lambda *_: dict.fromkeys(train_language.Sequence._fields[2:]))
        for asked in courses:
            if "tower" in asked:
                first, makers = (400_000, train_eye._READING) if asked["tower"] else (0, train_eye._MIXED)
                stream = train_eye.Glimpses(first, [recorder(make.__name__) for make in makers])
                drawn = asked["steps"] * sizes["train_tower"]
            else:
                stream = train_language.Lessons(None, asked.get("first_seed", 0), asked.get("drills", scenes.RARE))
                drawn = asked["steps"] * sizes["train_language"]
            assert sum(1 for _ in itertools.islice(stream, drawn)) == drawn
        queries = (
            inspect.signature(instructblip_train.train_queries).parameters["batch"].default * commands.QUERIES_STEPS
        )
        for first, drawn in ((0, queries), (instructblip_train.FOLDED, instructblip_train.FOLDING_PICTURES)):
            for n in range(first, first + drawn):
                scenes.make_lesson(TRAIN + n % 800_000, n % 20)
    return seen


def behind(masked: set[int]) -> set[int]:
    """The scenes that these masked scenes may show a piece of: the first choice of each, and two in reserve."""
    return {
        int(np.random.default_rng([23, seed + again * 500_000_000]).integers(2**31))
        for seed in masked
        for again in range(3)
    }


@pytest.mark.parametrize("turn", [0, 2, 4, 6, 9])
def test_a_drill_is_the_first_scene_of_its_chain_that_has_a_wanted_item(turn):
    kinds = scenes.MORE.get(turn)
    for seed in range(turn, 100, 20):
        expected, n = scenes.make_map(seed) if turn in (6, 16) else scenes.make_scene(seed), 0
        while kinds and not any(item.kind in kinds for item in expected.items):
            n += 1
            expected = scenes.make_scene((seed + 7919 * n) % VALIDATION)
        found = scenes.make_drilled(seed, turn)
        assert found.seed == expected.seed and found.items == expected.items
        assert np.array_equal(found.pixels, expected.pixels) and np.array_equal(found.where, expected.where)
        assert all(np.array_equal(found.labels[kind], grid) for kind, grid in expected.labels.items())


def test_splits_are_ranges_of_seeds():
    assert SPLITS == {"train": TRAIN, "cache": VALIDATION, "heldout": HELD_OUT}
    assert TRAIN < VALIDATION < HELD_OUT == 1_000_000


def test_training_draws_only_training_seeds(trained_on):
    for name, seeds in trained_on.items():
        assert len(seeds) > 1000, name
        assert min(seeds) >= TRAIN and max(seeds) < VALIDATION, name


def test_every_seed_that_a_stream_can_come_to_is_a_training_seed(monkeypatch):
    drawn = []

    def bare(seed: int, kinds: tuple[str, ...] = ()):
        drawn.append(seed)
        return bare_scene(seed, kinds)

    for name in ("make_scene", "make_map", "make_masked"):
        monkeypatch.setattr(scenes, name, bare)
    for seed in range(800_000):  # after which a stream's seeds come round again, as its turns do
        scenes.make_lesson(TRAIN + seed, seed % 20, scenes.PARTS)
    assert min(drawn) >= TRAIN and max(drawn) < VALIDATION
    assert len(drawn) > 800_000


def test_no_scene_that_is_reported_on_was_trained_on_behind_a_mask(trained_on):
    """Masked scenes draw the scene behind them from all seeds below 2**31, so this is checked, not built in."""
    reported = {*range(VALIDATION, VALIDATION + 2_400), *range(HELD_OUT, HELD_OUT + 500)}
    trained = behind(trained_on["make_masked"]) | trained_on["make_scene"]
    assert not trained & reported
    assert not trained & behind(set(range(HELD_OUT, HELD_OUT + 500)))  # the exam's own masked scenes


# --- Variety ------------------------------------------------------------------------------------------------


def test_every_kind_of_table_1_is_there_in_variety():
    seen = {kind: set() for kind in KINDS}
    for scene in [*map(worlds.scene, range(300)), *map(worlds.chart, CHARTS)]:
        for kind, grid in scene.labels.items():
            seen[kind] |= set(worlds.names(grid, kind))
            assert grid.shape == (SIDE, SIDE) and grid.dtype == np.uint8
    least = {"scene": 9, "object": 70, "part": 10, "material": 7, "texture": 8, "colour": 8, "face": 8, "word": 30}
    for kind, number in least.items():
        assert len(seen[kind]) >= number, (kind, len(seen[kind]))
        assert seen[kind] <= set(KINDS[kind])
    assert {"wheels", "door", "window", "roof", "leaves", "handle"} <= seen["part"]
    assert {"brick", "wood", "grass", "water", "metal", "sand", "snow"} <= set(KINDS["material"]) == seen["material"]
    assert {"happy", "sad", "angry", "hungry", "scared", "loving", "sick", "sleepy"} == seen["face"]


# --- Scenes with items --------------------------------------------------------------------------------------


def test_what_lies_on_the_ground_is_what_the_masks_show_where_they_show_it():
    for scene in map(worlds.scene, FURNISHED):
        things = worlds.things(scene)
        assert {(item.noun, item.place) for item in scene.items} == {
            (noun, worlds.place(mask)) for noun, (mask, _) in things.items()
        }, scene.seed
        for item in scene.items:
            mask = things[item.noun][0]
            assert set(scene.where[mask]) == {scenes.PLACES.index(item.place) + 1}
            for edge, half in (("top", np.s_[:96]), ("left", np.s_[:, :96])):
                if edge in item.place and len(scene.items) > 1:
                    assert mask[half].mean() > 0.9 * mask.mean() * 2, (scene.seed, item)
        ground = scene.where == 0
        assert not scene.labels["object"][ground].any() and not scene.labels["face"][ground].any()
        assert set(scene.labels["scene"][~ground]) <= {0}
        assert set(scene.labels["scene"][ground]) == {KINDS["scene"].index(scene.background) + 1}


def silhouette(shape: str, height: int, width: int) -> np.ndarray | None:
    """A shape that fills a window, from its textbook definition; None for the heart, which has several."""
    y, x = (np.mgrid[0:height, 0:width] + 0.5) / np.array([height, width])[:, None, None]
    if shape == "star":
        star = Outline.unit_regular_star(5, innerCircle=0.42).vertices * [1, -1]  # y goes down
        low, high = star.min(0), star.max(0)
        return Outline((star - low) / (high - low)).contains_points(np.c_[x.ravel(), y.ravel()]).reshape(x.shape)
    return {
        "circle": np.hypot(x - 0.5, y - 0.5) < 0.5,
        "square": x >= 0,
        "triangle": abs(x - 0.5) < y / 2,
        "diamond": abs(x - 0.5) + abs(y - 0.5) < 0.5,
    }.get(shape)


def test_a_shape_is_one_blob_of_its_silhouette_in_its_colour():
    seen = set()
    for item, scene, mask in every("shape"):
        assert ndimage.label(mask, np.ones((3, 3)))[1] == 1, (scene.seed, item)
        assert worlds.colour(scene.pixels[inner(mask)]) == item.colours["whole"]
        known = np.array(COLOURS[item.colours["whole"]])
        assert (abs(scene.pixels[inner(mask)] - known).max(-1) <= 0.07 * known.max() + 2).mean() > 0.95
        number = list(COLOURS).index(item.colours["whole"]) + 1
        assert (scene.labels["colour"][inner(mask)] == number).mean() > 0.95, (scene.seed, item)
        seen.add(item.name)
        if item is not scene.items[-1]:  # a later thing may hide its edge
            continue
        crop = mask[worlds.box(mask)]
        if (ideal := silhouette(item.name, *crop.shape)) is not None:
            assert (crop & ideal).sum() / (crop | ideal).sum() > 0.93, (scene.seed, item)
        else:  # a heart: two lobes, a notch between them, one point below, both sides alike
            assert ndimage.label(crop[1])[1] == 2 and ndimage.label(crop[-2])[1] == 1
            assert (crop == crop[:, ::-1]).mean() > 0.95
            assert crop.any(0).all() and crop[: len(crop) // 2].sum() > crop[len(crop) // 2 :].sum()
    assert seen == set(SHAPES)


def drawn_at(code: str, mask: np.ndarray, folder: Path):
    """Every size and side-for-side turn of an emoji whose visible pixels are exactly this mask, laid over it."""
    window = worlds.box(mask)
    crop, picture = mask[window], Image.open(folder / f"{code}.png").convert("RGBA")
    for side in range(60, 112):
        small = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))
        for rgba in (small, small[:, ::-1]):
            seen = rgba[..., 3] > 127
            if (cut := seen[(frame := worlds.box(seen))]).shape == crop.shape and (cut == crop).all():
                yield window, rgba[frame]


def test_an_emoji_mask_is_the_alpha_of_its_art_and_its_pixels_are_the_art(root):
    folder, found = root / "data" / "pictureworld" / "art", 0
    for kind in ("object", "face"):
        for item, scene, mask in every(kind):
            if item is not scene.items[-1] or scene.seed > 150:  # the last one laid hides, and is not hidden
                continue
            codes = (EMOJI_OBJECTS[item.name],) if kind == "object" else EMOJI_FACES[item.name]
            fits = [fit for code in codes for fit in drawn_at(code, mask, folder)]
            assert fits, (scene.seed, item)
            off = []
            for window, rgba in fits:
                solid = rgba[..., 3] == 255
                off.append(abs(scene.pixels[window].astype(int) - rgba[..., :3])[solid].max())
            assert min(off) == 0, (scene.seed, item)
            found += 1
    assert found > 50


def test_a_composites_parts_lie_within_it_each_in_its_colour():
    seen = set()
    for item, scene, mask in every("composite"):
        parts = scene.labels["part"]
        assert not parts[~mask].any()
        assert set(worlds.names(parts, "part")) == set(COMPOSITES[item.name]) == set(item.colours)
        assert len(set(item.colours.values())) == len(item.colours)
        assert (parts[mask] > 0).mean() > 0.93  # the rest is edge
        for part, ink in item.colours.items():
            region = parts == KINDS["part"].index(part) + 1
            assert region.sum() >= 25, (scene.seed, item, part)
            assert worlds.colour(scene.pixels[region]) == ink, (scene.seed, item, part)
        seen.add(item.name)
    assert seen == set(COMPOSITES)
    for scene in map(worlds.scene, FURNISHED):
        assert scene.labels["part"].any() == any(item.kind == "composite" for item in scene.items)


def texture_of(ink: np.ndarray) -> str:
    """The texture of a two-coloured square (bool), told by how it repeats."""
    constant = [(ink == ink[:1]).all(), (ink == ink[:, :1]).all()]  # down, across, and along the two diagonals
    constant += [(ink[1:, 1:] == ink[:-1, :-1]).all(), (ink[1:, :-1] == ink[:-1, 1:]).all()]
    if any(constant):
        return "stripes"
    for one in (ink, ~ink):
        rows, columns = one.all(1), one.all(0)
        if rows.any() and columns.any() and (one == rows[:, None] | columns).all():  # lines from edge to edge
            return "grid"
    if ((ink == ink[0]).all(1) | (ink != ink[0]).all(1)).all():  # each row is the first one or its opposite
        return "checks"
    y, x = np.indices(ink.shape) - (np.array(ink.shape)[:, None, None] - 1) / 2
    far = np.hypot(y, x).astype(int)
    mixed = [min(part.mean(), 1 - part.mean()) for part in (ink[far == r] for r in range(4, len(ink) // 2))]
    if np.mean(mixed) < 0.12:  # the colour depends on the distance from the middle
        return "rings"
    for one in (ink, ~ink):  # separate marks, alike, on a ground that holds together
        marks, count = ndimage.label(one)
        inner_marks = [m for m in ndimage.find_objects(marks) if all(s.start > 0 and s.stop < len(ink) for s in m)]
        if count >= 4 and len(inner_marks) >= 2:
            widths = [set(one[mark].sum(1)) for mark in inner_marks]  # a cross has rows of 3 and full ones only
            return "crosses" if all(len(found) == 2 and 3 in found for found in widths) else "dots"
    tops = [np.flatnonzero(ink[1:, column] & ~ink[:-1, column]) for column in range(ink.shape[1])]
    moves = np.abs([min(b - a[0], key=abs) for a, b in zip(tops, tops[1:], strict=False) if len(a) and len(b)])
    return "waves" if (moves == 0).mean() > 0.2 or (moves == 2).sum() > 1 else "zigzags"  # round, or one slope


def test_a_panel_shows_its_texture_in_two_inks():
    seen = Counter()
    for item, scene, mask in every("panel"):
        assert worlds.names(scene.labels["texture"], "texture") == [item.name]
        assert ((scene.labels["texture"] > 0) == mask).all()
        inks, counts = np.unique(scene.pixels[inner(inner(mask))], axis=0, return_counts=True)
        assert len(inks) == 2 and counts.min() > 0.1 * counts.sum(), (scene.seed, item)
        if item is scene.items[-1]:
            rows, columns = worlds.box(mask)
            square = scene.pixels[rows.start + 5 : rows.stop - 5, columns.start + 5 : columns.stop - 5]
            seen[item.name, texture_of((square == inks[0]).all(-1))] += 1
    assert {name for name, _ in seen} == set(KINDS["texture"])
    assert all(name == told for name, told in seen), seen


def test_a_block_looks_like_its_material():
    typical = {
        "brick": (176, 105, 88), "wood": (160, 108, 64), "grass": (84, 158, 62), "water": (62, 134, 196),
        "metal": (158, 164, 172), "sand": (226, 200, 142), "snow": (238, 244, 250), "stone": (124, 122, 118),
    }  # fmt: skip
    for item, scene, mask in every("block"):
        assert worlds.names(scene.labels["material"][mask], "material") == [item.name]
        shown = scene.pixels[ndimage.binary_erosion(mask, iterations=4)].mean(0)
        nearest = min(typical, key=lambda name: np.linalg.norm(shown - typical[name]))
        assert nearest == item.name, (scene.seed, item, shown)


def test_signs_are_legible():
    for item, scene, mask in every("sign"):
        ((word, window),) = worlds.words(scene).items()
        assert word == item.name
        assert (window <= mask).all()
        read, likeness = worlds.read(window, scene.pixels, on_map=False)
        assert read == item.name and likeness > 0.8, (scene.seed, item, read, likeness)


# --- Maps ---------------------------------------------------------------------------------------------------


def test_maps_show_their_facts():
    for scene in map(worlds.chart, CHARTS):
        facts, shown = scene.chart, worlds.countries(scene)
        assert not scene.items and set(worlds.words(scene)) == {*facts.labels.values(), facts.basin}
        assert {worlds.place(window): country for country, window in shown.items()} == facts.labels, scene.seed
        assert 1 <= len(facts.inside) <= 3
        for country, window in shown.items():
            assert worlds.is_shaded(window, scene.pixels) == facts.covers(country), (scene.seed, country)
            read, likeness = worlds.read(window, scene.pixels, on_map=True)
            assert read == country and likeness > 0.9, (scene.seed, country, read, likeness)
            assert (scene.pixels[window].max(-1) < 70).mean() > 0.1
        title = worlds.words(scene)[facts.basin]
        assert worlds.box(title)[0].stop <= 22 and (scene.pixels[title].max(-1) < 70).mean() > 0.1
        written = scene.labels["word"] > 0
        assert (scene.labels["scene"][~written] == KINDS["scene"].index("map") + 1).all()
        assert not any(scene.labels[kind].any() for kind in ("object", "part", "material", "texture", "face"))


# --- Masked scenes ------------------------------------------------------------------------------------------


def test_a_masked_scene_is_black_but_for_whole_patches_that_show_its_concept():
    hidden = 0
    for seed in MASKED:
        whole = worlds.scene(seed)
        scene = scenes.make_masked(seed, whole)
        if scene.seed != seed:  # nothing in that scene could be told alone, so another was taken
            continue
        kind, concept = scene.shown
        assert scene.mask(kind, concept).any() and not scene.mask(kind, concept)[~whole.mask(kind, concept)].any()
        shown, full = worlds.patches(scene.pixels), worlds.patches(whole.pixels)
        black = (shown == 0).all((1, 2))
        assert (shown[~black] == full[~black]).all()
        hidden += black.sum()
        for name in (*KINDS, None):
            grid, truth = (scene.labels[name], whole.labels[name]) if name else (scene.where, whole.where)
            grid, truth = worlds.patches(grid), worlds.patches(truth)
            assert not grid[black].any() and (grid[~black] == truth[~black]).all()
        share = worlds.patches(whole.mask(kind, concept)).mean(1)
        assert share[~black].max() > 0
    assert hidden > 50 * len(MASKED)


def test_an_unknown_concept_is_refused():
    with pytest.raises(ValueError, match="no 'object' concept 'unicorn'; kinds are scene, object"):
        worlds.scene(FURNISHED[0]).mask("object", "unicorn")
    with pytest.raises(ValueError, match="no 'animal' concept"):
        worlds.scene(FURNISHED[0]).mask("animal", "dog")
