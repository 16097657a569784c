"""Activations that others have cached: the paper's layout and delphi's, read latent by latent or as a `LatentCache`.

Both are a folder of a module, with a file for each range of latents, START_END.safetensors, END included in the name.
Each holds `locations` (entries, 3) and `activations` (entries,), only what is not 0 (above 1e-5), in no useful order.

| | the paper's | delphi's |
|---|---|---|
| a location is | image, position after the first token, latent | row of tokens, position, latent minus START |
| locations, activations | int64, float32 | uint16 or uint32, float16 |
| also there | nothing | `tokens` (rows, positions) if kept, and config.json |
| latent END | lost: the writer leaves it out | there |

In the paper's, positions 0 to 575 are the base image's patches, row by row; what follows are tiles and newlines. A
latent that its file has lost was not silent: it is unknown, and asking for it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from lmm_sae_nb.cache.latent_cache import LatentCache, write_cache
from lmm_sae_nb.cache.top_images import Firings, Ranking
from lmm_sae_nb.support.tensor_files import open_tensors


class Split(NamedTuple):
    """One file: the latents start to stop - 1, numbered from `offset`."""

    path: Path
    start: int
    stop: int
    offset: int


class SplitCache:
    """Activations in files by range of latents; a file is read when one of its latents is asked for.

    n_latents: from 0 to the last file's end.
    """

    def __init__(self, splits: list[Split], loses_last: bool):
        self._splits, self._loses_last = splits, loses_last
        self.n_latents = splits[-1].stop
        self._held: tuple[Split, Firings] | None = None

    @cached_property
    def lost(self) -> list[int]:
        """Latents whose activations no file holds; looks through all of them."""
        held = {latent for split in self._splits for latent in range(split.start, split.stop)}
        if self._loses_last:
            held -= {split.stop - 1 for split in self._splits if split.stop - 1 not in _entries(split).latents}
        return sorted(set(range(self.n_latents)) - held)

    def latent(self, latent: int) -> Firings:
        """A latent's entries by image and position, positions as stored; ValueError for one that is lost."""
        split = next((split for split in self._splits if split.start <= latent < split.stop), None)
        if split is None:
            first = self._splits[0].start
            raise ValueError(f"no latent {latent}: the files hold latents {first} to {self.n_latents - 1}")
        if self._held is None or self._held[0] != split:
            self._held = split, _entries(split)
        found = self._held[1]
        first, last = np.searchsorted(found.latents, (latent, latent + 1))
        if self._loses_last and latent == split.stop - 1 and first == last:
            raise ValueError(f"latent {latent} is lost: {split.path} was written without it, whether it fired or not")
        return Firings(*(column[first:last] for column in found))

    def as_cache(
        self, folder: str | Path, *, images: int, patches: int = 576, grid: tuple[int, int] | None = (24, 24),
        n_top: int = 5, layer: int | None = None, model: str = "",
    ) -> LatentCache:  # fmt: skip
        """Write the same answers as `cache_activations` gives: top images by mean over the first `patches` positions.

        images: how many were cached, silent ones too. A lost latent gets no images and a frequency of 0, and its
        number stands in cache.json under "lost". Memory: the entries of one file, and its ranking. ValueError for an
        image beyond `images`, a grid of other patches, or files that do not begin at 0.
        """
        if grid is not None and grid[0] * grid[1] != patches:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} has not {patches} patches; or give grid=None")
        if self._splits[0].start:
            raise ValueError(f"the files begin at latent {self._splits[0].start}; give all of them, from latent 0")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        described = {
            "images": images, "patches": patches, "grid": grid, "layer": layer, "model": model, "skipped": [],
            "store": None, "lost": self.lost,
        }  # fmt: skip
        write_cache(folder, self.n_latents, n_top, described, self._rankings(images, patches, n_top))
        return LatentCache.load(folder)

    def _rankings(self, images: int, patches: int, n_top: int) -> Iterator[tuple[int, Ranking]]:
        for split in self._splits:
            entries = _entries(split)
            if len(entries.images) and entries.images.max() >= images:
                raise ValueError(f"{split.path} has an image {entries.images.max()}, but images={images}: count all")
            base = (entries.patches < patches) & (entries.acts > 0)
            kept = Firings(*(column[base] for column in entries))
            ranking = Ranking.empty(split.stop - split.start, n_top, patches)
            ranking.update(kept._replace(latents=kept.latents - split.start))
            yield split.start, ranking


def read_paper_cache(folder: str | Path) -> SplitCache:
    """Open a module's folder as the paper's code writes it, such as model.layers.24.

    A file without entries of its last latent has lost it, as all of the paper's own have. FileNotFoundError if there
    are no files; ValueError if some are missing between others or, when it is read, for one of another layout.
    """
    return SplitCache([Split(path, start, end + 1, 0) for path, start, end in _files(folder)], loses_last=True)


def read_delphi_cache(folder: str | Path) -> SplitCache:
    """Open a hookpoint's folder as delphi writes it.

    A position is a token's place in its row; `as_cache` takes a row for an image. Errors as `read_paper_cache`.
    """
    return SplitCache([Split(path, start, end + 1, start) for path, start, end in _files(folder)], loses_last=False)


def _files(folder: str | Path) -> list[tuple[Path, int, int]]:
    """The files with the first and last latent of their names, in that order."""
    named = ((path, re.fullmatch(r"(\d+)_(\d+)", path.stem)) for path in Path(folder).glob("*.safetensors"))
    found = sorted(((path, int(name[1]), int(name[2])) for path, name in named if name), key=lambda file: file[1])
    if not found:
        raise FileNotFoundError(f"{folder} holds no START_END.safetensors; give the folder of one module's activations")
    for (one, _, end), (other, start, _) in zip(found[:-1], found[1:], strict=True):
        if start != end + 1:
            raise ValueError(f"{one.name} and {other.name} in {folder} do not follow on each other; give all the files")
    return found


def _entries(split: Split) -> Firings:
    """All of a file's entries, by latent, image and position."""
    open_tensors(split.path)  # ValueError for a file cut short
    with safe_open(split.path, "np") as file:  # torch can do little with uint16
        if not {"locations", "activations"} <= set(file.keys()):
            raise ValueError(f"{split.path} holds {', '.join(file.keys())}; expected locations and activations")
        locations, acts = file.get_tensor("locations"), file.get_tensor("activations").astype(np.float32)
    order = np.lexsort((locations[:, 1], locations[:, 0], locations[:, 2]))
    images, positions, latents = (locations[order, column].astype(np.int64) for column in range(3))
    latents += split.offset
    if len(latents) and not split.start <= latents[0] <= latents[-1] < split.stop:
        raise ValueError(
            f"{split.path} would hold latents {latents[0]} to {latents[-1]}: its numbers are another layout's. The "
            "paper's are absolute (read_paper_cache), delphi's are counted from the file's first (read_delphi_cache)"
        )
    return Firings(latents, images, positions, acts[order])
