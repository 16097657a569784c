"""Keep the state of a pass on disk: each process its part, and all parts merge into one ranking, exactly."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lmm_sae_nb.cache.encode_images import require_one_count
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.cache.sparse_store import STORE, StoreWriter
from lmm_sae_nb.cache.top_images import Ranking, firings, merged
from lmm_sae_nb.sae.topk import Latents
from lmm_sae_nb.support.conversions import sum_conversions
from lmm_sae_nb.support.files import as_json, clear_temporaries, write_json
from lmm_sae_nb.support.tensor_files import open_tensors, read_arrays, save_rows

KEY = "key.json"  # says of which pass a folder is
RANKING = tuple(Ranking.__dataclass_fields__)
BLOCK = 2**26  # bytes of patch rows that are merged at a time


class PassPart:
    """The batches that one process has seen: their ranking, their entries of the store, and a file that keeps both.

    path: the file; if it is there, the part goes on from it.
    store: the type of stored activations, or None.
    """

    def __init__(self, path: Path, n_latents: int, n_top: int, store: str | None):
        self._path, self._sizes, self._store = path, (n_latents, n_top), store
        self.ranking: Ranking | None = None  # None until an image was read
        self.progress: dict[str, Any] = {"batches": [], "images": 0, "skipped": {}, "files": [], "converted": {}}
        self.writer: StoreWriter | None = None
        if path.is_file():
            self.progress = read_progress(path)
            if arrays := read_arrays(path):
                self._begin(Ranking(*(arrays.pop(name) for name in RANKING)))
                if self.writer:
                    self.writer.files, self.writer.pending = self.progress["files"], arrays

    def _begin(self, ranking: Ranking) -> None:
        self.ranking = ranking
        if self._store:
            patches = ranking.patches.shape[2]
            self.writer = StoreWriter(self._path.parent / STORE, self._sizes[0], patches, self._store)

    def add(
        self,
        batch: int,
        images: list[int],
        skipped: Mapping[int, str],
        latents: Latents | None,
        converted: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Add a batch.

        images: numbers of those that were read.
        skipped: numbers and faults of those that were not.
        converted: how many were converted to 8-bit RGB.
        latents: (images, patches, k); None if no image was read.

        Raises:
            ValueError: the images have another number of base tokens than those before.
        """
        if latents is not None:
            patches = latents.acts.shape[1]
            if self.ranking is None:
                self._begin(Ranking.empty(*self._sizes, patches))
            require_one_count({patches, self.ranking.patches.shape[2]})
            for numbers, new in firings(latents, images):
                self.ranking.update(new)
                if self.writer:
                    self.writer.add(new, numbers)
        self.progress["batches"].append(batch)
        self.progress["images"] += len(images)
        self.progress["skipped"] |= {str(number): fault for number, fault in skipped.items()}
        self.progress["converted"] = sum_conversions([self.progress["converted"], converted])

    def save(self, last: bool = False) -> None:
        """Write the part to its file, atomically.

        last: no batch follows; entries of the store that no file holds yet go into a file of their own.
        """
        arrays = {}
        if self.ranking is not None:
            arrays = {name: getattr(self.ranking, name) for name in RANKING}
            if self.writer:
                if last:
                    self.writer.flush()
                arrays |= self.writer.pending
                self.progress["files"] = self.writer.files
        layout = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        rows = ((name, 0, array) for name, array in arrays.items())
        save_rows(self._path, layout, rows, {"progress": json.dumps(self.progress)})


def read_progress(path: Path) -> dict[str, Any]:
    """Return what a part's file says of its batches, images, skipped images and files of the store."""
    return json.loads(open_tensors(path).metadata()["progress"])


def part_files(partial_folder: Path) -> list[Path]:
    """Return the files of all parts of a pass, in the order of their processes."""
    return sorted(partial_folder.glob("[!.]*.safetensors"))


def resume_or_clear(partial_folder: Path, key: dict[str, object]) -> None:
    """Keep the state of a pass with this key; delete any other, and whatever a killed process left half written.

    A part of the state that is damaged, or of whose store a file is missing or damaged, is deleted with a warning.
    """
    path, store, final = partial_folder / KEY, partial_folder / STORE, partial_folder.parent / STORE
    for folder in (partial_folder.parent, final, partial_folder, store):
        clear_temporaries(folder)
    if not path.is_file() or path.read_bytes() != as_json(key):
        shutil.rmtree(partial_folder, ignore_errors=True)
        write_json(path, key)
    moved = not (partial_folder.parent / KEY).is_file()  # `finish_pass` may have been killed while it moved files
    known = set()
    for part in part_files(partial_folder):
        try:
            files = read_progress(part)["files"]
            for name in files:
                is_moved = moved and not (store / name).is_file()
                open_tensors((final if is_moved else store) / name)
            known |= set(files)
        except (FileNotFoundError, ValueError) as damage:
            warnings.warn(f"the images of {part.name} are cached again: {damage}", stacklevel=3)
            part.unlink()
    for file in store.glob("*"):
        if file.name not in known:
            file.unlink()


def whole_cache(folder: Path, key: dict[str, object]) -> LatentCache | None:
    """Return the cache of the pass with this key if the folder holds all of it; None, with a warning if damaged."""
    path = folder / KEY
    if not path.is_file() or path.read_bytes() != as_json(key):
        return None
    try:
        return LatentCache.load_whole(folder)
    except (FileNotFoundError, ValueError) as damage:
        warnings.warn(f"the cache is made again: {damage}", stacklevel=3)
        return None


def write_pending(part: Path, n_latents: int, patches: int, store: str | None) -> list[str]:
    """Write the entries of the store that a part still holds, if no process went on with it.

    Returns:
        The names of the new files.
    """
    pending = {name: array for name, array in read_arrays(part).items() if name not in RANKING}
    if not pending:
        return []
    writer = StoreWriter(part.parent / STORE, n_latents, patches, store)
    writer.pending = pending
    writer.flush()
    return writer.files


def place_store(made: Path, final: Path, files: set[str]) -> None:
    """Move the new files of the store into the cache and delete those of an earlier cache; may be repeated."""
    if files:
        final.mkdir(parents=True, exist_ok=True)
    for file in made.glob("*"):
        file.replace(final / file.name)
    for file in final.glob("*"):
        if file.name not in files:
            file.unlink()
    if not files and final.is_dir():
        final.rmdir()


def merged_blocks(parts: Sequence[Path], n_latents: int) -> Iterator[tuple[int, Ranking]]:
    """Yield the merged ranking a block of latents at a time: the first latent, and the block.

    The files are opened anew for each block, so that no page of them stays in memory.
    """
    _, n_top, patches = open_tensors(parts[0]).get_slice("patches").get_shape()
    step = max(1, BLOCK // (2 * n_top * patches * len(parts)))
    for start in range(0, n_latents, step):
        rankings = []
        for path in parts:
            file = open_tensors(path)
            rankings.append(Ranking(*(file.get_slice(name)[start : start + step].numpy() for name in RANKING)))
        yield start, merged(rankings)
