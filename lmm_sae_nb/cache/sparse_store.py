"""Every base token's active latents on disk, image by image, readable by image and by range of latents."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from lmm_sae_nb.cache.top_images import Firings
from lmm_sae_nb.support.tensor_files import open_tensors, save_rows

STORE = "store"  # the folder of these files, in a cache's
PART = 2**26  # bytes of entries a file, about: what is held in memory before it is written
VALUES = {"float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}


class StoreWriter:
    """Takes in images and writes them a file at a time; what is not written yet is in `pending`.

    A file holds `image` (rows,) int64, `start` (rows + 1,) int64, and for entries start[r] to start[r + 1] of
    image[r] `index` = latent * patches + patch, ascending, int32 (int64 where that is too small), and `value`.
    """

    def __init__(self, folder: Path, n_latents: int, patches: int, value: str):
        self._folder, self._patches, self._value = folder, patches, VALUES[value]
        self._index = np.dtype(np.int32 if n_latents * patches < 2**31 else np.int64)
        self.parts: list[str] = []
        self._rows: list[dict[str, np.ndarray]] = []

    def add(self, new: Firings, images: Sequence[int]) -> None:
        """Take in all entries of these images, one image a row, also where none is active."""
        place = np.searchsorted(images, new.images)
        order = np.argsort(place.astype(np.uint16), kind="stable")  # a radix sort
        counts = np.bincount(place, minlength=len(images))
        index = (new.latents * self._patches + new.patches)[order].astype(self._index)
        row = {"image": np.asarray(images, np.int64), "count": counts, "index": index}
        self._rows.append(row | {"value": new.acts[order].astype(self._value)})
        if sum(row["index"].nbytes + row["value"].nbytes for row in self._rows) >= PART:
            self.flush()

    @property
    def pending(self) -> dict[str, np.ndarray]:
        """Rows that no file holds yet, for a checkpoint; setting it goes on from there."""
        names = self._rows[0] if self._rows else ()
        return {name: np.concatenate([row[name] for row in self._rows]) for name in names}

    @pending.setter
    def pending(self, rows: dict[str, np.ndarray]) -> None:
        self._rows = [rows] if rows else []

    def flush(self) -> None:
        """Write what is pending as one file, named after its first image."""
        if not self._rows:
            return
        arrays = self.pending
        arrays["start"] = np.append(0, np.cumsum(arrays.pop("count")))
        name = f"{arrays['image'][0]:010d}.safetensors"
        layout = {key: (array.dtype, array.shape) for key, array in arrays.items()}
        save_rows(self._folder / name, layout, ((key, 0, array) for key, array in arrays.items()))
        self.parts.append(name)
        self._rows = []


class LatentStore:
    """The files that `StoreWriter` wrote, opened lazily."""

    def __init__(self, folder: str | Path, patches: int):
        self._folder, self._patches = Path(folder), patches

    @cached_property
    def _parts(self) -> list[dict[str, np.ndarray]]:
        """Arrays on the files' pages: nothing but what is touched is read."""
        found = []
        for file in sorted(self._folder.glob("[!.]*.safetensors")):
            with open_tensors(file) as tensors:
                found.append({name: tensors.get_tensor(name).numpy() for name in ("image", "start", "index", "value")})
        if not found:
            raise FileNotFoundError(f"{self._folder} holds no stored activations; make the cache with store='float16'")
        return found

    def image(self, number: int) -> Firings:
        """An image's entries, by latent and patch; ValueError for one that is not stored."""
        for part in self._parts:
            for row in np.flatnonzero(part["image"] == number):
                return self._entries(part, row, part["start"][row], part["start"][row + 1])
        raise ValueError(f"image {number} is not stored: it was skipped, or the cache is of other images")

    def latents(self, start: int, stop: int) -> Firings:
        """The entries of latents start to stop - 1 in all images, by latent, image and patch."""
        found = []
        for part in self._parts:
            for row, (first, last) in enumerate(zip(part["start"][:-1], part["start"][1:], strict=True)):
                index = part["index"][first:last]
                a, b = np.searchsorted(index, np.multiply((start, stop), self._patches, dtype=index.dtype))
                if b > a:
                    found.append(self._entries(part, row, first + a, first + b))
        if not found:
            return Firings(*(np.empty(0, np.int64) for _ in range(3)), np.empty(0, np.float32))
        entries = Firings(*map(np.concatenate, zip(*found, strict=True)))
        order = np.lexsort((entries.patches, entries.images, entries.latents))
        return Firings(*(column[order] for column in entries))

    def _entries(self, part: dict[str, np.ndarray], row: int, first: int, last: int) -> Firings:
        latents, patches = np.divmod(part["index"][first:last].astype(np.int64), self._patches)
        images = np.full(len(latents), part["image"][row])
        return Firings(latents, images, patches, part["value"][first:last].astype(np.float32))
