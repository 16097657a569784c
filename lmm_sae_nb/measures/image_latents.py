"""The activations of all latents on the base patches of some images: made once for an SAE, read by every measure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from PIL import Image
from scipy import sparse
from torch import Tensor

from lmm_sae_nb.cache.encode_images import base_states
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.cache.top_images import Firings
from lmm_sae_nb.model.token_kinds import NoPatchGrid
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.support.intervals import bounds, mean_interval
from lmm_sae_nb.support.stages import Metrics
from lmm_sae_nb.truth.label_maps import LabelMaps


@dataclass(frozen=True)
class ImageLatents:
    """The activations of latents on the base patches of images.

    acts: (images * patches, latents) float32, the patches of an image in a row; sparse, without zeros.
    grid: rows and columns of the patches of an image.
    """

    acts: sparse.csr_array
    grid: tuple[int, int]

    @classmethod
    @torch.no_grad()
    def of_states(
        cls, place: SAEInPlace, states: Float[Tensor, "images patches width"], batch_size: int = 64
    ) -> ImageLatents:
        """Encode the states of images, which SAEs of one layer can share.

        states: of the layer at the base patches (`cache.encode_images.base_states`).
        batch_size: images that are encoded at once.

        Raises:
            NoPatchGrid: the model has no patch grid.
        """
        grid, parts = _require_grid(place.lmm.grid), []
        for some in states.split(batch_size):
            acts, indices = place.sae.encode(some.flatten(0, 1).to(place.device))
            parts.append((acts.float().cpu().numpy(), indices.cpu().numpy()))
        data, columns = (np.concatenate(each) for each in zip(*parts, strict=True))
        starts = np.arange(len(data) + 1) * data.shape[1]
        acts = sparse.csr_array((data.ravel(), columns.ravel(), starts), (len(data), place.sae.n_latents))
        acts.eliminate_zeros()
        return cls(acts, grid)

    @classmethod
    def of_images(cls, place: SAEInPlace, images: Sequence[Image.Image], batch_size: int = 16) -> ImageLatents:
        """Run the model on images and keep the activations.

        images: usually held-out scenes.
        batch_size: images that go through the model at once.

        Raises:
            NoPatchGrid: the model has no patch grid.
        """
        _require_grid(place.lmm.grid)
        return cls.of_states(place, base_states(place.lmm, place.layer, images, batch_size))

    @classmethod
    def of_cache(cls, cache: LatentCache) -> ImageLatents:
        """Read the activations of all cached images. An image that was skipped excites no latent.

        Raises:
            FileNotFoundError: the cache keeps no activations.
            NoPatchGrid: the model has no patch grid.
        """
        grid, store = _require_grid(cache.grid), cache.store
        patches = grid[0] * grid[1]
        parts = [store.image(number) for number in range(cache.images) if number not in cache.skipped]
        rows = np.concatenate([(part.images * patches + part.patches).astype(np.int32) for part in parts])
        columns = np.concatenate([part.latents.astype(np.int32) for part in parts])
        acts = np.concatenate([part.acts for part in parts])
        return cls(sparse.csr_array((acts, (rows, columns)), (cache.images * patches, cache.n_latents)), grid)

    @property
    def n_latents(self) -> int:
        return self.acts.shape[1]

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def images(self) -> int:
        """How many images there are."""
        return self.acts.shape[0] // self.patches

    @cached_property
    def maxima(self) -> Float[np.ndarray, "images latents"]:
        """The highest activation of each latent on each image, float32."""
        highest = np.zeros(self.images * self.n_latents, np.float32)
        np.maximum.at(highest, self._places, self.acts.data)
        return highest.reshape(self.images, self.n_latents)

    @cached_property
    def means(self) -> Float[np.ndarray, "images latents"]:
        """The mean activation of each latent over the patches of each image, float32."""
        sums = np.bincount(self._places, weights=self.acts.data, minlength=self.images * self.n_latents)
        return (sums / self.patches).astype(np.float32).reshape(self.images, self.n_latents)

    @cached_property
    def live(self) -> Bool[np.ndarray, " latents"]:
        """Whether each latent is active on at least one patch."""
        return self.maxima.any(0)

    def columns(self, latents: ArrayLike) -> Float[np.ndarray, "patches latents"]:
        """Return the activations of a few latents on all patches of all images, dense."""
        return self._by_latent[:, np.asarray(latents)].toarray()

    def firings(self, start: int, stop: int) -> Firings:
        """Return the entries of latents start to stop - 1, as `LatentStore.latents` does."""
        part = self._by_latent[:, start:stop]
        latents = start + np.repeat(np.arange(stop - start), np.diff(part.indptr))
        images, patches = np.divmod(part.indices.astype(np.int64), self.patches)
        return Firings(latents, images, patches, part.data)

    @cached_property
    def _by_latent(self) -> sparse.csc_array:
        return self.acts.tocsc()

    @property
    def _places(self) -> np.ndarray:
        """For each entry image * latents + latent."""
        rows = np.repeat(np.arange(self.acts.shape[0]), np.diff(self.acts.indptr))
        return rows // self.patches * self.n_latents + self.acts.indices


def _require_grid(grid: tuple[int, int] | None) -> tuple[int, int]:
    if grid is None:
        raise NoPatchGrid("these measures compare patches with label maps; give a model with a patch grid")
    return grid


def images_showing(truth: LabelMaps, images: int, grid: tuple[int, int]) -> Bool[np.ndarray, "images concepts"]:
    """Tell which concepts each of the first images shows, on at least one patch."""
    shows = truth.patches_showing(range(images), grid).tocoo()
    result = np.zeros((images, len(truth.names)), bool)
    result[shows.col // (grid[0] * grid[1]), shows.row] = True
    return result


def mean_metrics(name: str, values: Iterable[float], kinds: Iterable[str | None] = ()) -> Metrics:
    """Return the mean of values with its 99% interval, and the same for each kind as name_KIND.

    A mean of fewer than two values has no interval and is left out.

    kinds: of each value; None belongs to no kind. Without kinds there is the mean of all alone.
    """
    values, kinds = list(values), list(kinds)
    groups: dict[str, list[float]] = {}
    for value, kind in zip(values, kinds, strict=False):
        if kind is not None:
            groups.setdefault(f"{name}_{kind}", []).append(value)
    metrics: Metrics = {}
    for label, group in {name: values, **groups}.items():
        if len(group) > 1:
            metrics |= bounds(label, mean_interval(group))
    return metrics


def require_fit(latents: ImageLatents, **others: Mapping | Sequence | np.ndarray) -> None:
    """Check that other things have a row for each image.

    Raises:
        ValueError: a number of rows differs.
    """
    for name, rows in others.items():
        if len(rows) != latents.images:
            raise ValueError(f"there are {len(rows)} {name} and {latents.images} images; give one for each image")
