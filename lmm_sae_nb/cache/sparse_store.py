"""Keep the active latents of every base token on disk; read them by image or by a range of latents."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from lmm_sae_nb.cache.top_images import Firings
from lmm_sae_nb.support.tensor_files import open_tensors, save_rows, shapes_in

STORE = "store"  # the folder of these files, in the cache's folder
FILE_BYTES = 2**26  # of entries in a file, about; they are held in memory before they are written
NAMES = ("image", "start", "index", "value")  # of a file's tensors
REMEDY = "run notebooks/02_cache_activations.py again, it makes what is missing"
VALUES = {"float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}


class StoreWriter:
    """Write the entries of images, many images a file; entries that no file holds yet are in `pending`.

    A file holds `image` (rows,) int64, `start` (rows + 1,) int64, and for entries start[r] to start[r + 1] of
    image[r] `index` = latent * patches + patch, ascending, int32 (int64 where that is too small), and `value`.

    folder: of the files.
    value: "float16" or "float32".
    files: names of the files so far.
    """

    def __init__(self, folder: Path, n_latents: int, patches: int, value: str):
        self._folder, self._patches, self._value = folder, patches, VALUES[value]
        self._index = np.dtype(np.int32 if n_latents * patches < 2**31 else np.int64)
        self.files: list[str] = []
        self._rows: list[dict[str, np.ndarray]] = []

    def add(self, new: Firings, images: Sequence[int]) -> None:
        """Add all entries of these images; an image without entries gets a row, too."""
        place = np.searchsorted(images, new.images)
        order = np.argsort(place.astype(np.uint16), kind="stable")  # a radix sort
        counts = np.bincount(place, minlength=len(images))
        index = (new.latents * self._patches + new.patches)[order].astype(self._index)
        row = {"image": np.asarray(images, np.int64), "count": counts, "index": index}
        self._rows.append(row | {"value": new.acts[order].astype(self._value)})
        if sum(row["index"].nbytes + row["value"].nbytes for row in self._rows) >= FILE_BYTES:
            self.flush()

    @property
    def pending(self) -> dict[str, np.ndarray]:
        """The rows that no file holds yet, for a checkpoint; set them to continue from it."""
        names = self._rows[0] if self._rows else ()
        return {name: np.concatenate([row[name] for row in self._rows]) for name in names}

    @pending.setter
    def pending(self, rows: dict[str, np.ndarray]) -> None:
        self._rows = [rows] if rows else []

    def flush(self) -> None:
        """Write the pending rows as one file, named after its first image."""
        if not self._rows:
            return
        arrays = self.pending
        arrays["start"] = np.append(0, np.cumsum(arrays.pop("count")))
        name = f"{arrays['image'][0]:010d}.safetensors"
        layout = {key: (array.dtype, array.shape) for key, array in arrays.items()}
        save_rows(self._folder / name, layout, ((key, 0, array) for key, array in arrays.items()))
        self.files.append(name)
        self._rows = []


class LatentStore:
    """Read the files that `StoreWriter` wrote; they are opened, and their checksums checked, when they are first used.

    folder: of the files.
    patches: base tokens of an image.
    images: how many the files must hold together.
    """

    def __init__(self, folder: str | Path, patches: int, images: int):
        self._folder, self._patches, self._images = Path(folder), patches, images

    def require_whole(self) -> None:
        """Open all files.

        Raises:
            FileNotFoundError: there are none.
            ValueError: a file is missing or damaged.
        """
        _ = self._files

    @cached_property
    def _files(self) -> list[dict[str, np.ndarray]]:
        """The arrays of all files, mapped into memory: only the pages that are used are read."""
        files = []
        for file in sorted(self._folder.glob("[!.]*.safetensors")):
            try:
                with open_tensors(file) as tensors:
                    if missing := set(NAMES) - set(shapes_in(tensors)):
                        raise ValueError(f"{file} has no {', '.join(sorted(missing))}: it is no part of a store")
                    files.append({name: tensors.get_tensor(name).numpy() for name in NAMES})
            except ValueError as error:
                raise ValueError(f"{error}; {REMEDY}") from error
        if not files:
            raise FileNotFoundError(f"{self._folder} holds no stored activations; make the cache with store='float16'")
        held = np.concatenate([file["image"] for file in files])
        if len(held) != self._images or len(np.unique(held)) != len(held):
            raise ValueError(
                f"{self._folder} holds {len(np.unique(held)):,} images in {len(files)} files, the cache has "
                f"{self._images:,}: files are missing or of another cache; {REMEDY}"
            )
        return files

    def image(self, number: int) -> Firings:
        """Return the entries of an image, sorted by latent and patch.

        Raises:
            ValueError: the image is not stored.
        """
        for file in self._files:
            for row in np.flatnonzero(file["image"] == number):
                return self._entries(file, row, file["start"][row], file["start"][row + 1])
        raise ValueError(f"image {number} is not stored: it was skipped, or the cache is of other images")

    def latents(self, start: int, stop: int) -> Firings:
        """Return the entries of latents start to stop - 1 in all images, sorted by latent, image and patch."""
        pieces = []
        for file in self._files:
            for row, (first, last) in enumerate(zip(file["start"][:-1], file["start"][1:], strict=True)):
                index = file["index"][first:last]
                a, b = np.searchsorted(index, np.multiply((start, stop), self._patches, dtype=index.dtype))
                if b > a:
                    pieces.append(self._entries(file, row, first + a, first + b))
        if not pieces:
            return Firings(*(np.empty(0, np.int64) for _ in range(3)), np.empty(0, np.float32))
        entries = Firings(*map(np.concatenate, zip(*pieces, strict=True)))
        order = np.lexsort((entries.patches, entries.images, entries.latents))
        return Firings(*(column[order] for column in entries))

    def _entries(self, file: dict[str, np.ndarray], row: int, first: int, last: int) -> Firings:
        latents, patches = np.divmod(file["index"][first:last].astype(np.int64), self._patches)
        images = np.full(len(latents), file["image"][row])
        return Firings(latents, images, patches, file["value"][first:last].astype(np.float32))
