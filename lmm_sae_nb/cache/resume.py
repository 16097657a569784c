"""What each process makes of its share of a pass: it survives in a file, and shares merge into one ranking, exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lmm_sae_nb.cache.sparse_store import STORE, StoreWriter
from lmm_sae_nb.cache.top_images import Ranking, firings, merged
from lmm_sae_nb.sae.topk import Latents
from lmm_sae_nb.support.files import as_json, clear_temporaries, write_json
from lmm_sae_nb.support.tensor_files import open_tensors, read_arrays, save_rows

KEY = "key.json"
RANKING = tuple(Ranking.__dataclass_fields__)
BLOCK = 2**26  # bytes of patch rows that are merged at a time


def uneven(sizes: Iterable[int]) -> ValueError:
    return ValueError(
        f"images have {sorted(sizes)} base tokens; bring them to one size: LMM.load(name, image_size=(448, 448))"
    )


class Share:
    """What one process has made of its batches so far, and the file that it survives in."""

    def __init__(self, path: Path, n_latents: int, n_top: int, store: str | None):
        self._path, self._sizes, self._store = path, (n_latents, n_top), store
        self.ranking: Ranking | None = None
        self.told: dict[str, Any] = {"batches": [], "images": 0, "skipped": {}, "parts": []}
        self.writer: StoreWriter | None = None
        if path.is_file():
            self.told = told_by(path)
            if arrays := read_arrays(path):
                self._begin(Ranking(*(arrays.pop(name) for name in RANKING)))
                if self.writer:
                    self.writer.parts, self.writer.pending = self.told["parts"], arrays

    def _begin(self, ranking: Ranking) -> None:
        self.ranking = ranking
        if self._store:
            patches = ranking.patches.shape[2]
            self.writer = StoreWriter(self._path.parent / STORE, self._sizes[0], patches, self._store)

    def add(self, batch: int, images: list[int], skipped: dict[int, str], latents: Latents | None) -> None:
        """Take in a batch: its images, and the faults of those that were left out.

        ValueError if they have another number of base tokens than those before.
        """
        if latents is not None:
            patches = latents.acts.shape[1]
            if self.ranking is None:
                self._begin(Ranking.empty(*self._sizes, patches))
            if patches != self.ranking.patches.shape[2]:
                raise uneven({patches, self.ranking.patches.shape[2]})
            for numbers, new in firings(latents, images):
                self.ranking.update(new)
                if self.writer:
                    self.writer.add(new, numbers)
        self.told["batches"].append(batch)
        self.told["images"] += len(images)
        self.told["skipped"] |= {str(number): fault for number, fault in skipped.items()}

    def save(self, last: bool = False) -> None:
        """Write all of it, atomically; after the last batch the store's pending images as a file of their own."""
        arrays = {}
        if self.ranking is not None:
            arrays = {name: getattr(self.ranking, name) for name in RANKING}
            if self.writer:
                if last:
                    self.writer.flush()
                arrays |= self.writer.pending
                self.told["parts"] = self.writer.parts
        layout = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        rows = ((name, 0, array) for name, array in arrays.items())
        save_rows(self._path, layout, rows, {"told": json.dumps(self.told)})


def told_by(path: Path) -> dict[str, Any]:
    return json.loads(open_tensors(path).metadata()["told"])


def shares_in(partial_folder: Path) -> list[Path]:
    return sorted(partial_folder.glob("[!.]*.safetensors"))


def resume_or_clear(partial_folder: Path, key: dict[str, object]) -> None:
    """Keep the state of a pass with this key, but for store files that no state knows; clear any other.

    What a killed process had half written, here and in the cache's folder above, goes too.
    """
    path = partial_folder / KEY
    clear_temporaries(partial_folder.parent, deep=True)
    if not path.is_file() or path.read_bytes() != as_json(key):
        shutil.rmtree(partial_folder, ignore_errors=True)
        write_json(path, key)
    known = {part for share in shares_in(partial_folder) for part in told_by(share)["parts"]}
    for file in (partial_folder / STORE).glob("*"):
        if file.name not in known:
            file.unlink()


def is_whole(folder: Path, key: dict[str, object]) -> bool:
    """Whether the folder holds the whole cache of the pass with this key."""
    path = folder / KEY
    return path.is_file() and path.read_bytes() == as_json(key)


def flush_left(share: Path, n_latents: int, patches: int, store: str | None) -> list[str]:
    """Write what a share has pending for the store, if no process went on with it; the names of the files."""
    pending = {name: array for name, array in read_arrays(share).items() if name not in RANKING}
    if not pending:
        return []
    writer = StoreWriter(share.parent / STORE, n_latents, patches, store)
    writer.pending = pending
    writer.flush()
    return writer.parts


def place_store(made: Path, final: Path, parts: set[str]) -> None:
    """Move the store's new files to where they belong and take away those of an earlier cache; again, if cut short."""
    if parts:
        final.mkdir(parents=True, exist_ok=True)
    for file in made.glob("*"):
        file.replace(final / file.name)
    for file in final.glob("*"):
        if file.name not in parts:
            file.unlink()
    if not parts and final.is_dir():
        final.rmdir()


def merged_blocks(shares: Sequence[Path], n_latents: int) -> Iterator[tuple[int, Ranking]]:
    """The merged ranking, a block of latents at a time; files are opened for each block, so that no page stays."""
    _, n_top, patches = open_tensors(shares[0]).get_slice("patches").get_shape()
    step = max(1, BLOCK // (2 * n_top * patches * len(shares)))
    for start in range(0, n_latents, step):
        parts = []
        for path in shares:
            file = open_tensors(path)
            parts.append(Ranking(*(file.get_slice(name)[start : start + step].numpy() for name in RANKING)))
        yield start, merged(parts)
