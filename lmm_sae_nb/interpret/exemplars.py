"""Exemplars: the images that excite a latent most, and the patches that do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from cachetools import LRUCache
from jaxtyping import Bool, Float
from PIL import Image

from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.model.token_kinds import NoPatchGrid
from lmm_sae_nb.support.images import pixel_hash, rgb


@dataclass(frozen=True)
class Exemplar:
    """One of the images that excite a latent most.

    image_index: the image's number in the data set.
    image: RGB.
    activation: (rows, cols) float32 over the patch grid of the base image. None if the model has no patch grid (a
        Q-Former's has none): nothing says where in the image the latent is active.
    visible: (rows, cols) bool, the most activated patches. None if the model has no patch grid.
    dim: brightness that the other patches keep in `masked`, in [0, 1).

    Raises:
        ValueError: dim is outside [0, 1).
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
        """The image with all but the visible patches black, or dimmed; the whole image without a patch grid."""
        return self.image if self.visible is None else masked(self.image, self.visible, self.dim)


def require_patches(exemplars: Sequence[Exemplar]) -> None:
    """Make sure that exemplars have activation maps.

    Raises:
        NoPatchGrid: they are whole images.
    """
    if any(exemplar.activation is None for exemplar in exemplars):
        raise NoPatchGrid(
            "these exemplars are whole images, of a model without a patch grid (a Q-Former's query tokens mix all "
            "patches): there is no region to mask, and no IoU; take the CLIP score in the mode 'paper'"
        )


def most_activated(
    activation: Float[np.ndarray, "rows cols"], threshold: float = 0.25
) -> Bool[np.ndarray, "rows cols"]:
    """Return the patches whose activation exceeds a fraction of the image's highest; none where nothing is active.

    threshold: the fraction, in [0, 1). The reference code shows every patch that is not zero: threshold = 0.

    Raises:
        ValueError: threshold is outside [0, 1).
    """
    if not 0 <= threshold < 1:
        raise ValueError(
            f"threshold is {threshold}; give the part of the highest activation that counts, from 0 to below 1"
        )
    return activation > threshold * max(float(activation.max()), 0.0)


def upsample(patches: Bool[np.ndarray, "rows cols"], size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """Enlarge a patch grid to a mask over an image of `size` = (width, height) pixels, by nearest neighbour."""
    mask = Image.fromarray(np.asarray(patches, np.uint8)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(mask).astype(bool)


def masked(image: Image.Image, visible: Bool[np.ndarray, "rows cols"], dim: float = 0.0) -> Image.Image:
    """Darken all but the visible patches of an image.

    dim: brightness that the other patches keep, in [0, 1). The paper's text says black. Its reference code keeps 12%
        (dim = 0.12) and draws soft borders; these borders are hard.

    Raises:
        ValueError: dim is outside [0, 1).
    """
    _require_dim(dim)
    pixels = np.asarray(rgb(image))
    keep = upsample(visible, image.size)[..., None]
    return Image.fromarray(np.where(keep, pixels, np.rint(pixels * dim).astype(np.uint8)))


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
    """Return the latent's images of highest mean activation, highest first.

    Of images with the same pixels only the first counts. Without a patch grid the exemplars are whole images.

    cache: of one SAE.
    images: the images that were cached, by number.
    n_top: how many. Fewer come back if fewer excite the latent, or if the cache keeps no more.
    threshold: as in `most_activated`.
    dim: as in `masked`.

    Raises:
        ValueError: the cache does not have this latent, or is of other images.
    """
    cache.require_pictures(images)
    rows: list[Exemplar] = []
    seen: set[str] = set()
    for rank, (index, _) in enumerate(cache.top(latent)):
        if len(rows) == n_top:
            break
        image = images[index]
        if (pixels := pixel_hash(image)) in seen:
            continue
        seen.add(pixels)
        if cache.grid:
            activation = np.asarray(cache.patch_map(latent, rank), np.float32)
            rows.append(Exemplar(index, image, activation, most_activated(activation, threshold), dim))
        else:
            rows.append(Exemplar(index, image, None, None))
    return rows


class ExemplarsByLatent(Mapping[int, Sequence[Exemplar]]):
    """The exemplars of each latent, by its number.

    Images are opened at each look-up and not kept: those of thousands of latents do not fit into memory. The maps of
    the last 4,096 latents are kept.

    cache, images: as for `exemplars`.
    latents: which latents to offer, in this order; without them all of the cache.
    settings: n_top, threshold and dim of `exemplars`.

    Raises:
        ValueError: the cache is of other images.
    """

    def __init__(
        self, cache: LatentCache, images: Sequence[Image.Image], latents: Iterable[int] | None = None,
        **settings: float,
    ):  # fmt: skip
        cache.require_pictures(images)
        self.cache, self.images, self.settings = cache, images, settings
        self._latents = dict.fromkeys(range(cache.n_latents) if latents is None else latents)
        self._known: LRUCache[int, list[tuple]] = LRUCache(4096)

    def only(self, latents: Iterable[int]) -> ExemplarsByLatent:
        """Return the mapping of these latents alone, in this order."""
        return ExemplarsByLatent(self.cache, self.images, latents, **self.settings)

    def __getitem__(self, latent: int) -> list[Exemplar]:
        if latent not in self._latents:
            raise KeyError(latent)
        if latent in self._known:
            return [Exemplar(index, self.images[index], *maps) for index, *maps in self._known[latent]]
        found = exemplars(self.cache, self.images, latent, **self.settings)
        self._known[latent] = [(each.image_index, each.activation, each.visible, each.dim) for each in found]
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(self._latents)

    def __len__(self) -> int:
        return len(self._latents)
