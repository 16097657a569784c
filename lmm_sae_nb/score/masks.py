"""Compare where a latent is active with where a concept is: masks over one image, and their IoU.

Both modes go through the same functions: `PAPER` does what the reference code does, `STRICT` asks for a closer fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from lmm_sae_nb.interpret.exemplars import Exemplar, most_activated, require_patches, upsample
from lmm_sae_nb.truth.label_maps import Candidates, Mask

# (indices of images, concept) -> for each image its candidate masks, the likeliest first
FindConcept = Callable[[Sequence[int], str], Sequence[Candidates]]


@dataclass(frozen=True)
class Mode:
    """How an activation and a concept are compared.

    name: "paper" or "strict".
    threshold: a patch is active above this fraction of the image's highest activation.
    nearest: enlarge patches as they are; else bilinear, where each pixel counts that is not wholly inactive.
    union: take all of a segmenter's candidates together; else the likeliest.
    region: show CLIP the active patches alone; else the whole image.
    """

    name: str
    threshold: float
    nearest: bool
    union: bool
    region: bool


PAPER = Mode("paper", threshold=0.0, nearest=False, union=True, region=False)
STRICT = Mode("strict", threshold=0.25, nearest=True, union=False, region=True)


def both_modes(threshold: float = STRICT.threshold) -> list[Mode]:
    """Return the modes `paper` and `strict`.

    threshold: of `strict`, in [0, 1).
    """
    return [PAPER, replace(STRICT, threshold=threshold)]


class ActivationMap(NamedTuple):
    """A latent's activation on one image.

    image_index: the image's place in the data set.
    size: (width, height) of the image in pixels.
    activation: of each base patch.
    """

    image_index: int
    size: tuple[int, int]
    activation: Float[np.ndarray, "rows cols"]


def exemplar_maps(exemplars: Sequence[Exemplar]) -> list[ActivationMap]:
    """Return the activation maps of exemplars.

    Raises:
        NoPatchGrid: the exemplars are whole images.
    """
    require_patches(exemplars)
    return [ActivationMap(each.image_index, each.image.size, each.activation) for each in exemplars]


def activation_mask(seen: ActivationMap, mode: Mode) -> Mask:
    """Return the pixels in which the latent counts as active.

    Bilinear is the reference code's way: patches of 0 and 224 in 8 bits, enlarged by Pillow, active below 224. One
    patch of 14 x 14 pixels becomes 780 pixels. The reference code makes images square first; here they keep their
    shape.
    """
    active = most_activated(seen.activation, mode.threshold)
    if mode.nearest:
        return upsample(active, seen.size)
    grid = Image.fromarray(np.where(active, 0, 224).astype(np.uint8))
    return np.asarray(grid.resize(seen.size, Image.Resampling.BILINEAR)) < 224


def concept_mask(candidates: Candidates, size: tuple[int, int], mode: Mode) -> Mask:
    """Return the pixels in which the concept counts as present; none without candidates.

    candidates: (candidates, height, width) bool, the likeliest first.
    size: (width, height) of the image in pixels.

    Raises:
        ValueError: the candidates are no masks of an image of this size.
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
    """Return |a and b| / |a or b|, in [0, 1]; 0 if both are empty, as in the reference code.

    Raises:
        ValueError: the masks differ in size.
    """
    if a.shape != b.shape:
        raise ValueError(f"masks of {a.shape} and {b.shape} pixels cannot be compared; bring both to the image's size")
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


def move_mask(mask: Mask, rng: np.random.Generator) -> Mask:
    """Return the mask at a random other place: of the same area, wrapped around at the borders."""
    return np.roll(mask, [int(rng.integers(side)) for side in mask.shape], (0, 1))


MaskOf = Callable[[ActivationMap, Mode], Mask]


def ious(
    maps: Sequence[ActivationMap], concept: str, find: FindConcept, mode: Mode, mask_of: MaskOf = activation_mask,
    rng: np.random.Generator | None = None,
) -> Float[np.ndarray, " images"]:  # fmt: skip
    """Return for each image the IoU of the latent's activation with the concept.

    An image on which the latent is silent scores 0, and `find` is not asked about it.

    maps: of one latent.
    find: says where the concept is.
    mask_of: gives the active pixels of a map in a mode.
    rng: moves each activation mask to a random place before it is compared; None leaves it where it is.

    Raises:
        ValueError: as `concept_mask`.
    """
    active = [n for n, seen in enumerate(maps) if seen.activation.max() > 0]
    values = np.zeros(len(maps))
    answers = find([maps[n].image_index for n in active], concept) if active else []
    for n, candidates in zip(active, answers, strict=True):
        mask = mask_of(maps[n], mode)
        mask = mask if rng is None else move_mask(mask, rng)
        values[n] = iou(mask, concept_mask(candidates, maps[n].size, mode))
    return values
