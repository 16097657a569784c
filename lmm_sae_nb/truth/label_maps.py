"""Label maps: which concept covers which pixels and patches of an image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float
from scipy import sparse

from lmm_sae_nb.interpret.exemplars import Exemplar, require_patches
from lmm_sae_nb.support.concepts import read_concepts
from lmm_sae_nb.truth.common_concept import PATCH_SHOWS, in_common, names_of

Mask = Bool[np.ndarray, "height width"]
Candidates = Bool[np.ndarray, "candidates height width"]
Coverage = Float[np.ndarray, "concepts patches"]


class LabelMaps:
    """The ground truth of a data set: for each image and each kind of concept a map of labels.

    Called with indices of images and a concept, it is a segmenter that makes no mistake. The last 4,096 maps that it
    needed stay in memory, and the coverage of every image that was asked for, without the concepts that are not there.

    rows: an image a row; for each kind a column with a label map (mode L: 0 is none, i is the i-th concept).
    concepts: kind to names, or the path of a JSON file with them.
    names: (kind, concept) of each row of a coverage.
    kinds: the kind of each row of a coverage.

    Raises:
        FileNotFoundError: the file of concepts is missing.
        ValueError: the rows have no label map of a kind, or the file is of another kind.
    """

    def __init__(self, rows: Sequence[Mapping], concepts: str | Path | Mapping[str, Sequence[str]]):
        if not isinstance(concepts, Mapping):
            concepts = read_concepts(concepts)
        self.concepts = {kind: list(names) for kind, names in concepts.items()}
        missing = set(self.concepts) - set(rows[0])
        if missing:
            raise ValueError(
                f"the data set has no label maps {sorted(missing)}; give one with ground truth, or no `concepts`"
            )
        self.names = names_of(self.concepts)
        self.kinds = np.array([kind for kind, _ in self.names])
        self._rows, self._of_kind = rows, dict.fromkeys(self.concepts, rows)
        if isinstance(rows, Dataset):  # which decodes every picture of a row, wanted or not
            self._rows = rows.select_columns(list(self.concepts))
            self._of_kind = {kind: rows.select_columns([kind]) for kind in self.concepts}
        self._labels = lru_cache(maxsize=4096)(lambda index, kind: np.asarray(self._of_kind[kind][index][kind]))
        self._known_coverage = lru_cache(maxsize=None)(self._nonzero_coverage)

    def coverage(self, index: int, grid: tuple[int, int]) -> Coverage:
        """Return the fraction of each patch that each concept covers, float32 in [0, 1], concepts as in `names`.

        index: of the image.
        grid: (rows, columns) of patches.
        """
        rows, fractions = self._known_coverage(index, grid)
        coverage = np.zeros((len(self.names), grid[0] * grid[1]), np.float32)
        coverage[rows] = fractions
        return coverage

    def _nonzero_coverage(self, index: int, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of a coverage that are not zero everywhere, by their numbers."""
        parts, row = [], self._rows[index]
        for kind in self.concepts:
            labels = np.asarray(row[kind])
            (height, width), size = labels.shape, 1 + len(self.concepts[kind])
            rows, columns = np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width
            patch = rows[:, None] * grid[1] + columns
            counts = np.bincount((patch * size + labels).ravel(), minlength=size * grid[0] * grid[1]).reshape(-1, size)
            parts.append((counts[:, 1:] / counts.sum(1, keepdims=True)).T)
        coverage = np.concatenate(parts).astype(np.float32)
        rows = np.flatnonzero(coverage.any(1))
        return rows, coverage[rows]

    def patches_showing(self, indices: Iterable[int], grid: tuple[int, int]) -> sparse.csr_array:
        """Return (concepts, images * patches): 1 where a patch shows a concept, which covers at least a quarter of it.

        indices: of images.
        grid: (rows, columns) of patches.
        """
        concepts, patches, columns = [], [], 0
        for index in indices:
            rows, fractions = self._known_coverage(index, grid)
            row, patch = np.nonzero(fractions >= PATCH_SHOWS)
            concepts.append(rows[row])
            patches.append(patch + columns)
            columns += grid[0] * grid[1]
        places = tuple(np.concatenate([np.empty(0, int), *parts]) for parts in (concepts, patches))
        ones = np.ones(len(places[0]), np.float32)
        return sparse.csr_array((ones, places), (len(self.names), columns))

    def visible_and_coverage(
        self, exemplars: Sequence[Exemplar]
    ) -> tuple[Bool[np.ndarray, ...], Float[np.ndarray, ...]]:
        """Return the visible patches of exemplars, and the coverage of their images.

        Raises:
            NoPatchGrid: the exemplars are whole images.
        """
        require_patches(exemplars)
        visible = np.array([exemplar.visible.ravel() for exemplar in exemplars], bool)
        return visible, np.array([self.coverage(each.image_index, each.visible.shape) for each in exemplars])

    def in_common(self, exemplars: Sequence[Exemplar]) -> list[str]:
        """Return all concepts that exemplars have in common, such as a thing and its colour.

        Raises:
            ValueError: there are no exemplars.
            NoPatchGrid: the exemplars are whole images.
        """
        if not exemplars:
            raise ValueError("no exemplars to judge by; leave out latents that are never active")
        common = in_common(*self.visible_and_coverage(exemplars))
        return [self.names[row][1] for row in np.flatnonzero(common)]

    def kinds_of(self, concept: str) -> list[str]:
        """Return the kinds that have a concept of this name; several if, say, a word is also a face."""
        return [kind for kind, names in self.concepts.items() if concept in names]

    def __call__(self, indices: Sequence[int], concept: str) -> list[Candidates]:
        """Return for each image where it shows the concept, as one candidate mask.

        Raises:
            ValueError: the data set has no concept of this name.
        """
        kinds = self.kinds_of(concept)
        if not kinds:
            raise ValueError(f"there is no ground truth for {concept!r}; it is no concept of this data set")
        code = {kind: 1 + self.concepts[kind].index(concept) for kind in kinds}
        return [
            np.logical_or.reduce([self._labels(index, kind) == code[kind] for kind in kinds])[None] for index in indices
        ]
