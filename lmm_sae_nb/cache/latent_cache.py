"""The cache on disk: every latent's top images, its activation on their patches, and its statistics."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lmm_sae_nb.cache.sparse_store import REMEDY, STORE, LatentStore
from lmm_sae_nb.cache.top_images import Ranking
from lmm_sae_nb.model.token_kinds import NoPatchGrid
from lmm_sae_nb.support.files import as_json, write_json
from lmm_sae_nb.support.tensor_files import open_tensors, save_rows, shapes_in

TENSORS, SHAPE, PARTIAL = "cache.safetensors", "cache.json", ".partial"


def write_cache(
    folder: Path, n_latents: int, n_top: int, described: dict[str, Any], blocks: Iterable[tuple[int, Ranking]]
) -> None:
    """Write a cache: cache.safetensors, and cache.json, which repeats `described` for people.

    described: images, patches, grid (or None), layer, model, skipped, store (or None), pictures (as `identity_of` gives
        it), converted if any were; also kept in the header of cache.safetensors, so that the two cannot be separated.
    blocks: the first latent of a block, and the ranking of its latents; consecutive.
    """
    patches = described["patches"]
    tokens = described["images"] * patches
    single, top = np.dtype(np.float32), (n_latents, n_top)
    layout = {
        "top_images": (np.dtype(np.int64), top), "top_means": (single, top),
        "patches": (np.dtype(np.float16), (*top, patches)),
        **dict.fromkeys(("frequency", "mean", "max"), (single, (n_latents,))),
    }  # fmt: skip

    def rows() -> Iterator[tuple[str, int, np.ndarray]]:
        for start, ranking in blocks:
            arrays = ranking.ordered()
            arrays["frequency"] = (arrays.pop("fired") / tokens).astype(np.float32)
            yield from ((name, start, array) for name, array in arrays.items())

    save_rows(folder / TENSORS, layout, rows(), {"cache": json.dumps(described)})
    write_json(folder / SHAPE, described)


def identity_of(images: Sequence) -> dict[str, Any] | None:
    """Return what `LatentCache.require_pictures` compares: identity, stamp and count; None if the images have none."""
    if getattr(images, "identity", None) is None:
        return None
    return {"identity": images.identity, "stamp": images.stamp, "count": len(images)}


class LatentCache:
    """The result of `cache_activations`. Nothing is read before it is used: `top` and `patch_map` read one row.

    images: how many were read.
    n_latents, n_top: of the SAE, and images kept for each latent.
    grid: rows and columns of the base patches, or None.
    layer: 0-based.
    skipped: number to fault of the images that could not be read.
    converted: how many images were converted to 8-bit RGB, in all and by kind; empty if none were.
    described: what cache.json repeats.
    """

    def __init__(self, folder: Path):
        self._folder, self._file = folder, open_tensors(folder / TENSORS)
        shapes, metadata = shapes_in(self._file), self._file.metadata() or {}
        names = {"top_images", "top_means", "patches", "frequency", "mean", "max"}
        if names - shapes.keys() or "cache" not in metadata:
            raise ValueError(f"{folder} is not a cache of activations; make it with notebooks/02_cache_activations.py")
        self.described: dict[str, Any] = json.loads(metadata["cache"])
        described = self.described
        self.images, self.layer = described["images"], described["layer"]
        self.grid = described["grid"] and tuple(described["grid"])
        self.skipped = {row["image"]: row["fault"] for row in described["skipped"]}
        self.converted: dict[str, int] = described.get("converted", {})
        self._stored = described["store"]
        self._pictures, self._accepted = described.get("pictures"), None
        self.n_latents, self.n_top, self._patches = shapes["patches"]

    @classmethod
    def load(cls, folder: str | Path) -> LatentCache:
        """Open the folder of a cache.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: it was cut short, is damaged, or is something else.
        """
        folder = Path(folder)
        for name in (SHAPE, TENSORS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing; run notebooks/02_cache_activations.py first")
        try:
            return cls(folder)
        except ValueError as error:
            raise ValueError(f"{error}; {REMEDY}") from error

    @classmethod
    def load_whole(cls, folder: Path) -> LatentCache:
        """Open a cache of which every file is whole, the store too; write cache.json again if it alone is damaged.

        Raises:
            FileNotFoundError, ValueError: another file is missing or damaged.
        """
        cache = cls(folder)
        if cache._stored:
            cache.store.require_whole()
        if not (folder / SHAPE).is_file() or (folder / SHAPE).read_bytes() != as_json(cache.described):
            write_json(folder / SHAPE, cache.described)
        return cache

    @property
    def readable(self) -> Int64[np.ndarray, " images"]:
        """Numbers of the images that were read: all but the skipped ones."""
        return np.setdiff1d(np.arange(self.images + len(self.skipped)), list(self.skipped))

    def require_pictures(self, images: Sequence) -> None:
        """Check that these are the pictures that the cache was made from, not others under the same numbers.

        images: as `open_images` opens them. Nothing is known of other sequences, so they are trusted.

        Raises:
            ValueError: pictures were added, removed, renamed, moved or changed since.
        """
        if images is self._accepted or getattr(images, "identity", None) is None:
            return
        then = self._pictures or {}
        if then.get("stamp") != images.stamp and then.get("identity") != images.identity:
            why = (
                f"{then['count']:,} then, {len(images):,} now: some were added, removed, renamed or changed"
                if then
                else "an older version made it, which did not say of which"
            )
            raise ValueError(
                f"the cache {self._folder} is of other pictures than those of {images.name} ({why}); run "
                "notebooks/02_cache_activations.py again"
            )
        self._accepted = images

    def top(self, latent: int) -> list[tuple[int, float]]:
        """Return the numbers of the latent's top images with their mean activations, the best first.

        There are `n_top`, or fewer if fewer images excite it.
        """
        self._check(latent, 0)
        images, means = (self._file.get_slice(name)[int(latent)].tolist() for name in ("top_images", "top_means"))
        return [(image, mean) for image, mean in zip(images, means, strict=True) if image >= 0]

    def patch_map(self, latent: int, rank: int) -> Float[Tensor, "rows cols"]:
        """Return the latent's activation on the base patches of its image of this rank (0 is the best), float32.

        Raises:
            NoPatchGrid: the model has no grid of patches.
            ValueError: the cache has no such latent or rank.
        """
        if self.grid is None:
            raise NoPatchGrid("this cache is of a model without a patch grid; only its mean activations have a meaning")
        self._check(latent, rank)
        return self._file.get_slice("patches")[int(latent), int(rank)].float().unflatten(0, self.grid)

    def _check(self, latent: int, rank: int) -> None:
        if not (0 <= latent < self.n_latents and 0 <= rank < self.n_top):
            raise ValueError(
                f"no latent {latent}, rank {rank}: the cache has {self.n_latents} latents, ranks 0 to {self.n_top - 1}"
            )

    @cached_property
    def top_images(self) -> Int64[Tensor, "latents n_top"]:
        """Numbers of images, the best first; -1 where fewer images excite a latent."""
        return self._whole("top_images")

    @cached_property
    def top_means(self) -> Float[Tensor, "latents n_top"]:
        """Mean activations over the base patches of these images."""
        return self._whole("top_means")

    @cached_property
    def frequency(self) -> Float[Tensor, " latents"]:
        """Fraction of base tokens on which each latent is active."""
        return self._whole("frequency")

    @cached_property
    def mean(self) -> Float[Tensor, " latents"]:
        """Mean activation of each latent over the base tokens on which it is active."""
        return self._whole("mean")

    @cached_property
    def max(self) -> Float[Tensor, " latents"]:
        """Highest activation of each latent."""
        return self._whole("max")

    @cached_property
    def live(self) -> Bool[Tensor, " latents"]:
        """Whether each latent is active on at least one base token."""
        return self.frequency > 0

    def _whole(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    @property
    def store(self) -> LatentStore:
        """The active latents of every base token.

        Raises:
            FileNotFoundError: they were not kept.
        """
        if not self._stored:
            raise FileNotFoundError(f"{self._folder} keeps no activations; make the cache with store='float16'")
        return LatentStore(self._folder / STORE, self._patches, self.images)
