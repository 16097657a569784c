"""What a set of masked images shows: the ground truth that an explanation is held against.

One rule for whoever needs it: the judge of explanations and the lessons of the embedded explainer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

SHOWS = 0.25  # of a patch that a concept must cover for the patch to show it
PURE = 0.5  # of the visible patches that must show a concept for the image to show it
MOST = 0.6  # of the images that must show a concept for it to be what they have in common: three of five
LEAST_IOU = 0.1  # below it the visible patches are a place or a detail, not the concept
# How much IoU counts by kind, where several concepts are common. Letters are thinner than the sign that carries them;
# a panel of stripes is seen for its stripes, a block of wood for its wood; and every thing has a colour, which is what
# images have in common only if the things are not.
WEIGHT = {"word": 2.0, "texture": 1.25, "material": 1.25, "colour": 0.5}


class Shown(NamedTuple):
    """The concept that visible patches show best, its kind, and how well (pooled IoU)."""

    kind: str
    concept: str
    iou: float


def names_of(concepts: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(kind, concept) of every row of `covered`, in the order of the concepts file."""
    return [(kind, name) for kind, names in concepts.items() for name in names]


def pooled_iou(
    visible: Bool[np.ndarray, "images patches"], covered: Float[np.ndarray, "images concepts patches"]
) -> Float[np.ndarray, " concepts"]:
    """Sum over the images of |visible and concept| by the sum of |visible or concept|, for every concept.

    covered: the share of each patch that a concept covers. Pooled, because in a mean over images one small mask that
    fits by accident outweighs four large ones that do not.
    """
    both = (covered * visible[:, None]).sum((0, 2))
    either = visible.sum() + covered.sum((0, 2)) - both
    return both / np.maximum(either, 1e-9)


def common(
    visible: Bool[np.ndarray, "images patches"], covered: Float[np.ndarray, "images concepts patches"]
) -> Bool[np.ndarray, " concepts"]:
    """Which concepts the images have in common: most of them show them, each in half of what is visible."""
    n_visible = np.maximum(visible.sum(1), 1)[:, None]
    share = ((covered >= SHOWS) & visible[:, None]).sum(2) / n_visible
    return (share >= PURE).sum(0) >= math.ceil(MOST * len(visible))


def best_shown(
    visible: Bool[np.ndarray, "images patches"],
    covered: Float[np.ndarray, "images concepts patches"],
    names: Sequence[tuple[str, str]],
) -> Shown | None:
    """The concept that the visible patches of the images show best; None if they have nothing in common.

    Of the concepts that are common (`common`) and fit (pooled IoU of at least `LEAST_IOU`) the one of highest IoU,
    weighted by kind (`WEIGHT`); of equals the first. ValueError for no images or other shapes.
    """
    if not len(visible) or covered.shape != (len(visible), len(names), visible.shape[1]):
        raise ValueError(
            f"{visible.shape} visible patches, {covered.shape} covered by {len(names)} concepts; give at least one "
            "image, and the share of every concept for each of its patches"
        )
    iou = pooled_iou(visible, covered)
    weighted = iou * [WEIGHT.get(kind, 1.0) for kind, _ in names]
    weighted[~common(visible, covered) | (iou < LEAST_IOU)] = 0.0
    best = int(weighted.argmax())
    return Shown(*names[best], float(iou[best])) if weighted[best] > 0 else None
