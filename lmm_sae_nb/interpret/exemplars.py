"""Exemplars: the images that excite a latent most, with the patches that do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.model.token_kinds import NoPatchGrid
from lmm_sae_nb.support.images import pixel_hash


@dataclass(frozen=True)
class Exemplar:
    """One of the images that excite a latent most.

    activation: (rows, cols) float32 over the base image's patch grid; visible: (rows, cols) bool, its most
    activated patches; dim: the share of their brightness that the others keep in `masked`. Of a model without a patch
    grid (a Q-Former's) nothing tells where in the image: activation and visible are None.
    """

    image_index: int
    image: Image.Image
    activation: Float[np.ndarray, "rows cols"] | None
    visible: Bool[np.ndarray, "rows cols"] | None
    dim: float = 0.0

    def __post_init__(self):
        _require_dim(self.dim)

    @cached_property
    def masked(self) -> Image.Image:
        """The image with all but the visible patches black, or dimmed; the whole one without a patch grid."""
        return self.image if self.visible is None else masked(self.image, self.visible, self.dim)


def require_patches(exemplars: Sequence[Exemplar]) -> None:
    """NoPatchGrid if exemplars are whole images, of which no region can be told."""
    if any(exemplar.activation is None for exemplar in exemplars):
        raise NoPatchGrid(
            "these exemplars are whole images, of a model without a patch grid (a Q-Former's query tokens mix all "
            "patches): there is no region to mask, and no IoU; take the CLIP score in the mode 'paper'"
        )


def most_activated(
    activation: Float[np.ndarray, "rows cols"], threshold: float = 0.25
) -> Bool[np.ndarray, "rows cols"]:
    """Patches whose activation exceeds `threshold` of the image's highest; none where nothing is active.

    ValueError unless 0 <= threshold < 1. The reference code shows every non-zero patch, which is threshold = 0.
    """
    if not 0 <= threshold < 1:
        raise ValueError(
            f"threshold is {threshold}; give the part of the highest activation that counts, from 0 to below 1"
        )
    return activation > threshold * max(float(activation.max()), 0.0)


def upsample(patches: Bool[np.ndarray, "rows cols"], size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """The patch grid as a mask over an image of `size` = (width, height) pixels, by nearest neighbour."""
    mask = Image.fromarray(np.asarray(patches, np.uint8)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(mask).astype(bool)


def masked(image: Image.Image, visible: Bool[np.ndarray, "rows cols"], dim: float = 0.0) -> Image.Image:
    """The image with all but the visible patches black, or with `dim` of their brightness, in [0, 1).

    The paper says black; the reference code leaves 12 % (dim = 0.12), with soft borders, which these are not.
    """
    _require_dim(dim)
    pixels = np.asarray(image.convert("RGB"))
    shown = upsample(visible, image.size)[..., None]
    return Image.fromarray(np.where(shown, pixels, np.rint(pixels * dim).astype(np.uint8)))


def _require_dim(dim: float) -> None:
    if not 0 <= dim < 1:
        raise ValueError(f"dim is {dim}; give the brightness that hidden patches keep, from 0 (black) to below 1")


def exemplars(
    cache: LatentCache,
    images: Sequence[Image.Image],
    latent: int,
    *,
    n_top: int = 5,
    threshold: float = 0.25,
    dim: float = 0.0,
) -> list[Exemplar]:
    """The latent's `n_top` different images of highest mean activation, highest first.

    Of images with the same pixels only the first counts; fewer than `n_top` come back if fewer excite the latent, or
    the cache keeps no more to take their place. Without a patch grid they are whole images. ValueError for a latent
    that the cache does not have.
    """
    found: list[Exemplar] = []
    seen: set[str] = set()
    for rank, (index, _) in enumerate(cache.top(latent)):
        if len(found) == n_top:
            break
        image = images[index]
        if (pixels := pixel_hash(image)) not in seen:
            seen.add(pixels)
            activation = np.asarray(cache.patch_map(latent, rank), np.float32) if cache.grid else None
            found.append(_exemplar(index, image, activation, threshold, dim))
    return found


class LazyExemplars(Mapping[int, Sequence[Exemplar]]):
    """Each latent's exemplars, made when they are looked at and not kept: those of thousands do not fit into memory."""

    def __init__(self, look: Callable[[int], Sequence[Exemplar]], latents: Sequence[int]):
        self._look, self._latents = look, dict.fromkeys(latents)

    def __getitem__(self, latent: int) -> Sequence[Exemplar]:
        if latent not in self._latents:
            raise KeyError(latent)
        return self._look(latent)

    def __iter__(self) -> Iterator[int]:
        return iter(self._latents)

    def __len__(self) -> int:
        return len(self._latents)


def exemplars_on(
    images: Sequence[Image.Image], indices: Sequence[int], activations: Sequence[np.ndarray], *, threshold: float = 0.25
) -> list[Exemplar]:
    """The same for any images: `indices` into `images`, and one activation map (rows, cols) for each."""
    return [
        _exemplar(index, images[index], activation, threshold, 0.0)
        for index, activation in zip(indices, activations, strict=True)
    ]


def _exemplar(index: int, image: Image.Image, activation: np.ndarray | None, threshold: float, dim: float) -> Exemplar:
    if activation is None:
        return Exemplar(index, image, None, None)
    return Exemplar(index, image, activation, most_activated(activation, threshold), dim)
