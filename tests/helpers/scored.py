"""Exemplars, label maps and comparisons that are small enough to score by hand."""

import numpy as np
from PIL import Image

from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.score.scores import Column, ColumnScores, Comparison, Explained, Scores

CONCEPTS = {"object": ["cat", "dog"], "face": ["happy"], "word": ["happy"]}


def exemplar(index: int, visible: np.ndarray, size: int = 8, colour=(9, 9, 9)) -> Exemplar:
    image = Image.new("RGB", (size, size), colour)
    return Exemplar(index, image, visible.astype(np.float32), visible)


def label_maps(**grids: np.ndarray) -> dict:
    """One row of a data set of 8 x 8 pixels with the label maps of `CONCEPTS`, empty where none is given."""
    empty = np.zeros((8, 8), np.uint8)
    return {kind: Image.fromarray(grids.get(kind, empty)) for kind in CONCEPTS}


def corner(rows: int, columns: int) -> np.ndarray:
    found = np.zeros((4, 4), bool)
    found[:rows, :columns] = True
    return found


def scores_of(kinds: list[str], columns: dict[Column, list[Comparison]]) -> Scores:
    """Scores of latents 0, 1, … with these kinds; each latent has a concept of its own."""
    explained = {n: Explained(f"concept {n}", kind) for n, kind in enumerate(kinds)}
    return Scores(explained, [ColumnScores(column, dict(enumerate(found))) for column, found in columns.items()])
