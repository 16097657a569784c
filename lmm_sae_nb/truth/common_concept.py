"""The concept that a set of masked images has in common: the ground truth for an explanation.

There is one rule, for the accuracy of explanations and for the training sets of the embedded explainer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

PATCH_SHOWS = 0.25  # a patch shows a concept that covers this fraction of it
IMAGE_SHOWS = 0.5  # an image shows a concept that this fraction of its visible patches show
IMAGES_SHARE = 0.6  # images have a concept in common that this fraction of them show: three of five
LEAST_IOU = 0.1  # below it the visible patches are a place or a detail, not the concept
# How much IoU counts by kind, where several concepts are common. Letters are thinner than the sign that carries them.
# Stripes are what one sees of a striped panel, and wood of a block of wood. Every thing has a colour, so a colour is
# what images have in common only if the things differ.
KIND_WEIGHT = {"word": 2.0, "texture": 1.25, "material": 1.25, "colour": 0.5}


class CommonConcept(NamedTuple):
    """The concept that images have in common.

    kind: of Table 1, or another of the world.
    concept: the name.
    iou: how well it fits the visible patches, pooled over the images, in [0, 1].
    """

    kind: str
    concept: str
    iou: float


def names_of(concepts: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Return (kind, concept) of every row of a coverage, in the order of the concepts file."""
    return [(kind, name) for kind, names in concepts.items() for name in names]


def pooled_iou(
    visible: Bool[np.ndarray, "images patches"], coverage: Float[np.ndarray, "images concepts patches"]
) -> Float[np.ndarray, " concepts"]:
    """Return for every concept the sum over images of |visible and concept| over the sum of |visible or concept|.

    The sums are pooled, because in a mean over images one small mask that fits by accident outweighs four large ones
    that do not.

    visible: the patches that are not masked.
    coverage: the fraction of each patch that each concept covers, in [0, 1].
    """
    both = (coverage * visible[:, None]).sum((0, 2))
    either = visible.sum() + coverage.sum((0, 2)) - both
    return both / np.maximum(either, 1e-9)


def images_show(
    visible: Bool[np.ndarray, "images patches"], coverage: Float[np.ndarray, "images concepts patches"]
) -> Bool[np.ndarray, "images concepts"]:
    """Tell which concepts each image shows, in at least half of its visible patches."""
    n_visible = np.maximum(visible.sum(1), 1)[:, None]
    fraction = ((coverage >= PATCH_SHOWS) & visible[:, None]).sum(2) / n_visible
    return fraction >= IMAGE_SHOWS


def in_common(
    visible: Bool[np.ndarray, "images patches"], coverage: Float[np.ndarray, "images concepts patches"]
) -> Bool[np.ndarray, " concepts"]:
    """Tell which concepts the images have in common: those that at least three of five images show."""
    return images_show(visible, coverage).sum(0) >= math.ceil(IMAGES_SHARE * len(visible))


def best_common_concept(
    visible: Bool[np.ndarray, "images patches"],
    coverage: Float[np.ndarray, "images concepts patches"],
    names: Sequence[tuple[str, str]],
) -> CommonConcept | None:
    """Return the concept that the images have in common, or None.

    Of the concepts that are common (`in_common`) and whose pooled IoU is at least `LEAST_IOU`, it is the one of highest
    IoU, weighted by kind (`KIND_WEIGHT`); the first of several.

    visible: the patches that are not masked.
    coverage: the fraction of each patch that each concept covers, in [0, 1].
    names: (kind, concept) of each row of a coverage.

    Raises:
        ValueError: there is no image, or the shapes do not fit.
    """
    if not len(visible) or coverage.shape != (len(visible), len(names), visible.shape[1]):
        raise ValueError(
            f"{visible.shape} visible patches, {coverage.shape} covered by {len(names)} concepts; give at least one "
            "image, and the fraction of every concept for each of its patches"
        )
    iou = pooled_iou(visible, coverage)
    weighted = iou * [KIND_WEIGHT.get(kind, 1.0) for kind, _ in names]
    weighted[~in_common(visible, coverage) | (iou < LEAST_IOU)] = 0.0
    best = int(weighted.argmax())
    return CommonConcept(*names[best], float(iou[best])) if weighted[best] > 0 else None
