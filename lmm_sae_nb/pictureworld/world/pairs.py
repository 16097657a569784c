"""Draw a scene again with one thing changed and every other pixel equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lmm_sae_nb.measures.selectivity import Pair
from lmm_sae_nb.pictureworld.world import art
from lmm_sae_nb.pictureworld.world.concepts import COLOURS, KINDS
from lmm_sae_nb.pictureworld.world.rendered import CONCEPTS, patch_counts
from lmm_sae_nb.pictureworld.world.scenes import (
    GROUNDS,
    HELD_OUT,
    PATCH,
    POOLS,
    SIDE,
    Drawing,
    Laid,
    Scene,
    compose,
    draw_item,
    draw_scene,
    patch_share,
)
from lmm_sae_nb.truth.common_concept import PATCH_SHOWS

PAIRS = HELD_OUT + 700_000  # first seed of the scenes that are drawn twice; nothing else uses seeds from here on
CARRIERS = {  # what changes, to the kinds of items whose name it is
    "texture": ("panel",), "material": ("block",), "face": ("face",), "word": ("sign",), "object": ("object", "shape"),
}  # fmt: skip
PER_KIND = {"object": 100, "item": 60} | dict.fromkeys(
    ("colour", "texture", "material", "face", "word", "scene"), 40
)  # there are many objects, and few of the others


@dataclass(frozen=True)
class Change:
    """One thing to change.

    kind: "colour" (of a shape or of a part), a kind of `CARRIERS`, "scene" (the background), or "item", which takes an
        item out.
    before, after: names; `after` is None if the item is taken out.
    number: of the item among `Drawing.laid`; None for the scene.
    part: whose colour changes; "whole" for a shape.
    """

    kind: str
    before: str
    after: str | None
    number: int | None = None
    part: str | None = None


def possible_changes(drawing: Drawing, kind: str) -> list[Change]:
    """Return every change of a kind that a drawing allows.

    A new name is not that of another item, and the new colour of a part is not that of another part. A new word fits on
    the same board in letters of the same size.

    Raises:
        ValueError: there is no such kind of change.
    """
    if kind not in PER_KIND:
        raise ValueError(f"nothing changes by {kind!r}; choose one of {', '.join(PER_KIND)}")
    if kind == "scene":
        return [Change(kind, drawing.background, name) for name in GROUNDS if name != drawing.background]
    taken, result = {laid.item.name for laid in drawing.laid}, []
    for number, laid in enumerate(drawing.laid):
        item = laid.item
        if kind == "item":
            result.append(Change(kind, item.name, None, number))
        elif kind == "colour":
            free = [colour for colour in COLOURS if colour not in item.colours.values()]
            result += [Change(kind, old, new, number, part) for part, old in item.colours.items() for new in free]
        elif item.kind in CARRIERS[kind]:
            free = [name for name in POOLS[item.kind] if name not in taken and (kind != "word" or _fits(name, laid))]
            result += [Change(kind, item.name, name, number) for name in free]
    return result


def _fits(word: str, laid: Laid) -> bool:
    """Return whether a word fits on a sign that was made for another one."""
    board = art.board(laid.item.name, laid.side)
    left, top, right, bottom = art.font(board.letters).getbbox(word.upper())
    return right - left <= board.width - 8 and bottom - top <= board.height - 12


def changed(drawing: Drawing, change: Change) -> Drawing:
    """Return the drawing with one thing changed.

    The random choices of the item, such as its shade, period or side, stay the same. Of a new background they are new.
    """
    if change.number is None:
        pixels, ground = art.background(change.after, SIDE, SIDE, np.random.default_rng([25, drawing.seed]))
        return replace(drawing, background=change.after, pixels=pixels, ground=ground)
    before, after = drawing.laid[: change.number], drawing.laid[change.number + 1 :]
    redrawn = () if change.after is None else (_redrawn(drawing.laid[change.number], change),)
    return replace(drawing, laid=before + redrawn + after)


def _redrawn(laid: Laid, change: Change) -> Laid:
    """Return the item as it is after the change, in the same place."""
    rng = np.random.default_rng()
    rng.bit_generator.state = laid.state
    if change.kind == "colour":
        item = replace(laid.item, colours=laid.item.colours | {change.part: change.after})
    else:
        item = replace(laid.item, name=change.after)
    if item.kind == "sign":
        sprite = art.sign(item.name, laid.side, rng, art.board(laid.item.name, laid.side))
    else:
        sprite = draw_item(item, laid.side, rng)
    return replace(laid, item=item, sprite=sprite)


def make_pair(drawing: Drawing, change: Change) -> Pair | None:
    """Return the scene before and after a change; None if it is hidden: if it covers a quarter of no patch.

    Raises:
        ValueError: the change is none, because the thing has this name already.
    """
    if change.before == change.after:
        raise ValueError(f"the {change.kind} is {change.before} already; change it to another one")
    before, after = compose(drawing), compose(changed(drawing, change))
    if patch_share((before.pixels != after.pixels).any(-1)).max() < PATCH_SHOWS:
        return None
    taken_out, put_in = (change.before,), (change.after,)
    if change.after is None:
        taken_out, put_in = _only_in(before, after), ()
    counts = [patch_counts(scene).astype(int) for scene in (before, after)]
    moved = (np.abs(counts[1] - counts[0]) >= PATCH_SHOWS * PATCH**2).any(1)
    touched = {CONCEPTS[row][1] for row in np.flatnonzero(moved)} - {*taken_out, *put_in}
    return Pair(before.image, after.image, change.kind, taken_out, put_in, frozenset(touched))


def _only_in(scene: Scene, other: Scene) -> tuple[str, ...]:
    """Return the names of what one scene shows and the other does not, but for colours: other things have them too."""
    shown, elsewhere = scene.concepts(), other.concepts()
    return tuple(name for kind in KINDS if kind != "colour" for name in sorted(shown[kind] - elsewhere[kind]))


def make_pairs(sizes: Mapping[str, int] = PER_KIND, first_seed: int = PAIRS) -> list[Pair]:
    """Return pairs of every kind, each of another scene.

    Concepts that few pairs have so far come first, so that every concept is put in and taken out about as often.

    sizes: pairs of each kind.
    first_seed: of the scenes; the default is held out.
    """
    missing, seen, result = Counter(sizes), Counter(), []
    while missing.total() > 0:
        drawing = draw_scene(first_seed)
        first_seed += 1
        if drawing is None:
            continue
        rng = np.random.default_rng([26, drawing.seed])
        options = {kind: found for kind in missing if missing[kind] > 0 and (found := possible_changes(drawing, kind))}
        if not options:
            continue
        kind = max(options, key=missing.__getitem__)
        drawn = [options[kind][i] for i in rng.permutation(len(options[kind]))]
        pair = make_pair(drawing, min(drawn, key=lambda change: seen[kind, change.before] + seen[kind, change.after]))
        if pair is not None:
            result.append(pair)
            missing[kind] -= 1
            seen.update((kind, name) for name in (*pair.taken_out, *pair.put_in))
    return result
