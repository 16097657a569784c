"""Where a latent is active and where a concept is, as masks over one image, and how well the two fit.

Two modes run through the same functions: `PAPER` does what the reference code does, `STRICT` what one would call a fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from cachetools import LRUCache
from jaxtyping import Float
from PIL import Image

from lmm_sae_nb.interpret.exemplars import Exemplar, most_activated, require_patches, upsample
from lmm_sae_nb.truth.label_maps import Candidates, Mask

Where = Callable[
    [Sequence[int], str], Sequence[Candidates]
]  # images' numbers, concept -> what it may be, likeliest first


class Found(Protocol):
    """What a segmenter found in an image (`grounding.Candidates`): masks (n, height, width) and a score for each."""

    masks: Candidates
    scores: Float[np.ndarray, " n"]


Segmenter = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[Found]]  # images, and a concept for each


@dataclass(frozen=True)
class Mode:
    """How an activation and a concept are compared.

    threshold: a patch is active above this fraction of its image's highest activation. nearest: patches are enlarged as
    they are, or with bilinear interpolation, of which every pixel that is not wholly inactive counts. union: all of a
    segmenter's candidates together, or its likeliest. region: CLIP sees the active patches alone, or the whole image.
    """

    name: str
    threshold: float
    nearest: bool
    union: bool
    region: bool


PAPER = Mode("paper", threshold=0.0, nearest=False, union=True, region=False)


STRICT = Mode("strict", threshold=0.25, nearest=True, union=False, region=True)


class Spot(NamedTuple):
    """A latent on an image: the image's number in the data set, its size (width, height), the activation map."""

    number: int
    size: tuple[int, int]
    activation: Float[np.ndarray, "rows cols"]


def spots(exemplars: Sequence[Exemplar]) -> list[Spot]:
    """Where each exemplar is active; NoPatchGrid if they are whole images."""
    require_patches(exemplars)
    return [Spot(e.image_index, e.image.size, e.activation) for e in exemplars]


def activation_mask(spot: Spot, mode: Mode) -> Mask:
    """Where the latent counts as active, in pixels of the image.

    Bilinear is the reference code's: patches of 0 and 224 in 8 bits, enlarged by Pillow, active below 224; one patch of
    14 x 14 pixels becomes 780 pixels. There the images are first made square, here they keep their shape.
    """
    active = most_activated(spot.activation, mode.threshold)
    if mode.nearest:
        return upsample(active, spot.size)
    grid = Image.fromarray(np.where(active, 0, 224).astype(np.uint8))
    return np.asarray(grid.resize(spot.size, Image.Resampling.BILINEAR)) < 224


def concept_mask(candidates: Candidates, size: tuple[int, int], mode: Mode) -> Mask:
    """Where the concept counts as shown; nowhere if there are no candidates.

    ValueError for candidates that are no masks of an image of `size` = (width, height) pixels.
    """
    if candidates.ndim != 3 or candidates.dtype != bool or candidates.shape[1:] != size[::-1]:
        raise ValueError(
            f"the segmenter gave {candidates.dtype} of shape {candidates.shape} for an image of {size[0]} x {size[1]} "
            f"pixels; it has to give bool of shape (candidates, {size[1]}, {size[0]})"
        )
    if mode.union or not len(candidates):
        return candidates.any(0)
    return candidates[0]


def iou(a: Mask, b: Mask) -> float:
    """|a and b| / |a or b|, in [0, 1]; 0 if both are empty, as the reference code counts it.

    ValueError for masks of different sizes.
    """
    if a.shape != b.shape:
        raise ValueError(f"masks of {a.shape} and {b.shape} pixels cannot be compared; bring both to the image's size")
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


def moved(mask: Mask, rng: np.random.Generator) -> Mask:
    """The mask somewhere else in the image, at random: of exactly the same area, wrapped around at the borders."""
    return np.roll(mask, [int(rng.integers(side)) for side in mask.shape], (0, 1))


def ious(
    places: Sequence[Spot], concept: str, where: Where, mode: Mode, elsewhere: np.random.Generator | None = None
) -> Float[np.ndarray, " images"]:
    """For each image the IoU of the latent's activation with the concept; `elsewhere` moves the activation at random.

    The segmenter is not asked about images on which the latent is silent: they score 0. ValueError as `concept_mask`.
    """
    awake = [n for n, spot in enumerate(places) if spot.activation.max() > 0]
    found = np.zeros(len(places))
    answers = where([places[n].number for n in awake], concept) if awake else []
    for n, candidates in zip(awake, answers, strict=True):
        active = activation_mask(places[n], mode)
        active = active if elsewhere is None else moved(active, elsewhere)
        found[n] = iou(active, concept_mask(candidates, places[n].size, mode))
    return found


class Numbered:
    """A segmenter of pictures as one of a data set's rows; the answers used last, `room` bytes of them, are kept."""

    def __init__(self, segmenter: Segmenter, images: Sequence[Image.Image], room: int = 256 * 2**20):
        self._segmenter, self._images = segmenter, images
        self._kept: LRUCache[tuple[int, str], Candidates] = LRUCache(room, getsizeof=lambda masks: masks.nbytes)

    def __call__(self, numbers: Sequence[int], concept: str) -> list[Candidates]:
        masks = {n: self._kept[n, concept] for n in numbers if (n, concept) in self._kept}
        new = [number for number in dict.fromkeys(numbers) if number not in masks]
        answers = self._segmenter([self._images[number] for number in new], [concept] * len(new)) if new else []
        for number, found in zip(new, answers, strict=True):
            masks[number] = found.masks[np.argsort(-found.scores, kind="stable")]
            if masks[number].nbytes <= self._kept.maxsize:
                self._kept[number, concept] = masks[number]
        return [masks[number] for number in numbers]
