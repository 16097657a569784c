"""Pairs: one thing changes, every other pixel and every other fact stays, byte for byte."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from lmm_sae_nb.pictureworld.world.concepts import KINDS, NUMBER
from lmm_sae_nb.pictureworld.world.pairs import PAIRS, PER_KIND, changed, make_pair, make_pairs, possible_changes
from lmm_sae_nb.pictureworld.world.scenes import PLACES, SIDE, compose, draw_scene, make_scene

SAME_OUTLINE = ("colour", "texture", "material", "word")  # the thing keeps its silhouette
EACH = 12  # scenes for each kind of change


def cases(kind: str):
    """Drawings of held-out scenes with one change each."""
    seed, found = PAIRS, 0
    while found < EACH:
        drawing, seed = draw_scene(seed), seed + 1
        options = possible_changes(drawing, kind) if drawing else []
        if options:
            found += 1
            yield drawing, options[seed % len(options)]


def near(mask: np.ndarray) -> np.ndarray:
    """The mask and the four pixels around it, where an emoji blends with what is behind it."""
    return ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=4)


def region(drawing, change, scenes) -> np.ndarray:
    """Where the thing is in either scene, by the label maps."""
    place = drawing.laid[change.number].item.place
    at = np.logical_or.reduce([scene.where == 1 + PLACES.index(place) for scene in scenes])
    if change.part not in (None, "whole"):
        at &= scenes[0].labels["part"] == NUMBER["part"][change.part]
    return near(at)


def test_a_seed_is_the_scene_of_its_drawing():
    for seed in range(40):
        drawing = draw_scene(seed)
        if drawing is None:
            assert make_scene(seed).chart is not None
        else:
            assert np.array_equal(compose(drawing).pixels, make_scene(seed).pixels)


@pytest.mark.parametrize("kind", [kind for kind in PER_KIND if kind != "scene"])
def test_all_pixels_but_those_of_the_thing_are_equal_byte_for_byte(kind):
    differs = 0
    for drawing, change in cases(kind):
        before, after = compose(drawing), compose(changed(drawing, change))
        assert before.pixels.tobytes() == make_scene(drawing.seed).pixels.tobytes()
        outside = ~region(drawing, change, (before, after))
        assert before.pixels[outside].tobytes() == after.pixels[outside].tobytes(), change
        window = drawing.laid[change.number].window
        unequal = np.argwhere((before.pixels != after.pixels).any(-1))
        differs += len(unequal) > 0
        for axis, span in enumerate(window):
            assert (span.start <= unequal[:, axis]).all() and (unequal[:, axis] < span.stop).all(), change
        for name, grid in before.labels.items():
            assert np.array_equal(grid[outside], after.labels[name][outside]), (change, name)
    assert differs == EACH


def test_a_new_background_leaves_the_pixels_of_all_items_equal():
    for drawing, change in cases("scene"):
        before, after = compose(drawing), compose(changed(drawing, change))
        inside = ~near(before.where == 0)
        assert before.pixels[inside].tobytes() == after.pixels[inside].tobytes()
        ground = before.where == 0
        assert (after.labels["scene"][ground] == NUMBER["scene"][change.after]).all()
        assert after.background == change.after and before.background == change.before
        for name in ("object", "part", "texture", "face", "word"):
            assert np.array_equal(before.labels[name], after.labels[name])
        assert np.array_equal(before.where, after.where)


@pytest.mark.parametrize("kind", SAME_OUTLINE)
def test_the_outline_stays_and_the_label_map_has_the_new_name_where_the_old_one_was(kind):
    for drawing, change in cases(kind):
        before, after = compose(drawing), compose(changed(drawing, change))
        assert np.array_equal(before.where, after.where)
        for name in set(KINDS) - {kind, "colour"}:
            assert np.array_equal(before.labels[name], after.labels[name]), (change, name)
        here = region(drawing, change, (before,))
        old, new = (number for number in (NUMBER[kind][change.before], NUMBER[kind][change.after]))
        was, is_ = (before.labels[kind] == old) & here, (after.labels[kind] == new) & here
        if kind == "colour":  # a part is smaller than the room around it, and has an edge of another shade
            assert is_.sum() > 0.5 * was.sum()
        else:
            assert (was & (before.where > 0)).sum() == is_.sum() or kind == "material"
            assert (after.labels[kind][was & (before.where > 0)] == new).all() or kind == "material"


def test_a_change_back_gives_the_scene_itself():
    for kind in ("colour", "texture", "material", "face", "object"):
        for drawing, change in cases(kind):
            back = replace(change, before=change.after, after=change.before)
            again = compose(changed(changed(drawing, change), back))
            assert again.pixels.tobytes() == compose(drawing).pixels.tobytes(), change


def test_what_is_behind_an_item_shows_when_it_is_taken_out():
    for drawing, change in cases("item"):
        without = compose(changed(drawing, change))
        assert len(without.items) == len(drawing.laid) - 1
        if len(drawing.laid) == 1:
            assert without.pixels.tobytes() == drawing.pixels.tobytes()
        assert 1 + PLACES.index(drawing.laid[change.number].item.place) not in without.where


def test_a_pair_says_what_was_put_in_taken_out_and_touched():
    for kind in PER_KIND:
        for drawing, change in cases(kind):
            pair = make_pair(drawing, change)
            if pair is None:
                continue
            before, after = compose(drawing).concepts(), compose(changed(drawing, change)).concepts()
            assert pair.kind == kind and change.before in {*pair.taken_out, *pair.touched}  # a floor is of wood, too
            assert pair.put_in == (() if kind == "item" else (change.after,))
            if kind == "item":
                for name in pair.taken_out:
                    assert any(name in before[k] and name not in after[k] for k in KINDS if k != "colour")
            else:
                assert change.after in after[kind]
            assert not pair.touched & {*pair.put_in, *pair.taken_out}


def test_a_composite_goes_with_its_parts_and_a_sign_with_its_word():
    seen = set()
    for drawing in filter(None, map(draw_scene, range(PAIRS, PAIRS + 60))):
        for change in possible_changes(drawing, "item"):
            item = drawing.laid[change.number].item
            inside = {"composite": [item.name, *item.colours], "sign": ["sign", item.name]}.get(item.kind)
            if inside:
                pair = make_pair(drawing, change)
                parts_elsewhere = {p for other in drawing.laid if other.item is not item for p in other.item.colours}
                assert set(pair.taken_out) == set(inside) - parts_elsewhere
                seen.add(item.kind)
    assert seen == {"composite", "sign"}


def test_a_change_that_nobody_sees_gives_no_pair():
    for drawing, change in cases("texture"):
        below = drawing.laid[change.number]
        hidden = replace(drawing, laid=(below, below))
        assert make_pair(hidden, replace(change, number=0)) is None
        assert make_pair(hidden, replace(change, number=1)) is not None


def test_changes_that_are_none_are_refused():
    drawing, change = next(cases("texture"))
    with pytest.raises(ValueError, match=f"is {change.before} already"):
        make_pair(drawing, replace(change, after=change.before))
    with pytest.raises(ValueError, match="'smell'"):
        possible_changes(drawing, "smell")


def test_pairs_are_as_many_as_asked_spread_over_concepts_and_held_out():
    sizes = dict.fromkeys(PER_KIND, 8)
    pairs, again = make_pairs(sizes), make_pairs(sizes)
    assert [pair.kind for pair in pairs] == [pair.kind for pair in again]
    assert all(one.after.tobytes() == two.after.tobytes() for one, two in zip(pairs, again, strict=True))
    assert {kind: sum(pair.kind == kind for pair in pairs) for kind in sizes} == sizes
    assert len({pair.before.tobytes() for pair in pairs}) == len(pairs)
    textures = {name for pair in pairs if pair.kind == "texture" for name in (*pair.put_in, *pair.taken_out)}
    assert textures == set(KINDS["texture"])
    assert all(pair.before.size == (SIDE, SIDE) for pair in pairs)
    assert PAIRS >= 1_700_000  # seeds of no other data set, exam or page
