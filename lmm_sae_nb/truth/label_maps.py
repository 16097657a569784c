"""Label maps: which concept covers which pixels and patches of an image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from scipy import sparse

from lmm_sae_nb.interpret.exemplars import Exemplar, require_patches
from lmm_sae_nb.support.files import read_json
from lmm_sae_nb.truth.common_concept import SHOWS, common, names_of

Mask = Bool[np.ndarray, "height width"]
Candidates = Bool[np.ndarray, "candidates height width"]

Shares = Float[np.ndarray, "concepts patches"]


class PatchTruth:
    """The share of each base patch of an image that each concept covers: `truth[index]`, (concepts, patches) float32.

    names: (kind, concept) of each row; kinds: the kind alone. Each label map is read once.
    """

    def __init__(self, masks: TrueMasks, grid: tuple[int, int]):
        self.names, self.grid = names_of(masks.concepts), grid
        self.kinds = np.array([kind for kind, _ in self.names])
        self._masks = masks
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # few concepts are in an image

    def __getitem__(self, index: int) -> Shares:
        if index not in self._known:
            shares = self._masks.covered(index, self.grid)
            rows = np.flatnonzero(shares.any(1))
            self._known[index] = rows, shares[rows]
        rows, shares = self._known[index]
        whole = np.zeros((len(self.names), shares.shape[1]), np.float32)
        whole[rows] = shares
        return whole

    def shows(self, indices: Iterable[int]) -> sparse.csr_array:
        """(concepts, images * patches): 1 where a patch shows a concept, which is to cover a quarter of it."""
        return sparse.csr_array(np.concatenate([self[n] >= SHOWS for n in indices], 1).astype(np.float32))


class TrueMasks:
    """Ground truth as a segmenter: the label maps of a data set, one column for each kind of concept.

    `rows` has an image a row and, for each kind in the concepts file, a label map (mode L, 0 = none, i = the
    i-th concept of that kind). FileNotFoundError without the file; ValueError for rows without label maps.
    """

    def __init__(self, rows: Sequence[Mapping], concepts: str | Path | Mapping[str, Sequence[str]]):
        if not isinstance(concepts, Mapping):
            if not Path(concepts).is_file():
                raise FileNotFoundError(f"{concepts} is missing; render the data sets first: `make world`")
            concepts = read_json(concepts)
        self.concepts = {kind: list(names) for kind, names in concepts.items()}
        self._rows = rows
        missing = set(self.concepts) - set(rows[0])
        if missing:
            raise ValueError(
                f"the data set has no label maps {sorted(missing)}; give one with ground truth, or no `concepts`"
            )
        self.labels = lru_cache(maxsize=512)(self._labels)
        self.covered = lru_cache(maxsize=512)(self._covered)

    def _labels(self, index: int) -> dict[str, np.ndarray]:
        row = self._rows[index]
        return {kind: np.asarray(row[kind]) for kind in self.concepts}

    def _covered(self, index: int, grid: tuple[int, int]) -> Float[np.ndarray, "concepts patches"]:
        """The share of each patch of an image that each concept covers, concepts in the order of `names_of`."""
        found = []
        for kind, labels in self.labels(index).items():
            (height, width), size = labels.shape, 1 + len(self.concepts[kind])
            rows, columns = np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width
            patch = rows[:, None] * grid[1] + columns
            counts = np.bincount((patch * size + labels).ravel(), minlength=size * grid[0] * grid[1]).reshape(-1, size)
            found.append((counts[:, 1:] / counts.sum(1, keepdims=True)).T)
        return np.concatenate(found).astype(np.float32)

    def kinds_of(self, concept: str) -> list[str]:
        """The kinds that know a concept of this name; several if a word is also a face."""
        return [kind for kind, names in self.concepts.items() if concept in names]

    def __call__(self, numbers: Sequence[int], concept: str) -> list[Candidates]:
        """Where each image shows the concept, one candidate; ValueError for one outside the world's vocabulary."""
        kinds = self.kinds_of(concept)
        if not kinds:
            raise ValueError(f"there is no ground truth for {concept!r}; it is no concept of this data set")
        code = {kind: 1 + self.concepts[kind].index(concept) for kind in kinds}
        maps = [self.labels(number) for number in numbers]
        return [np.logical_or.reduce([labels[k] == code[k] for k in kinds])[None] for labels in maps]

    def common(self, exemplars: Sequence[Exemplar]) -> set[str]:
        """The concepts that the exemplars have in common (`shown.common`); several where one lies in another.

        ValueError if there are no exemplars.
        """
        if not exemplars:
            raise ValueError("no exemplars to judge by; leave out latents that never fire")
        require_patches(exemplars)
        visible = np.stack([e.visible.ravel() for e in exemplars])
        covered = np.stack([self.covered(e.image_index, e.visible.shape) for e in exemplars])
        named = zip(names_of(self.concepts), common(visible, covered), strict=True)
        return {name for (_, name), shared in named if shared}
