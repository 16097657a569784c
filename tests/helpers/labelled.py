"""Label maps given patch by patch, and exemplars on them, to count by hand."""

import numpy as np
from PIL import Image

from lmm_sae_nb.interpret.exemplars import Exemplar

CONCEPTS = {"scene": ["sea", "sky"], "object": ["cat", "dog", "hat"], "colour": ["red", "blue"]}
SIDE, GRID = 24, (6, 6)
PLACES = [(0, 0), (4, 4), (0, 4), (4, 0), (2, 2)]


def row(**grids: np.ndarray) -> dict:
    """Label maps of 24 x 24 pixels from grids of 6 x 6 patches; empty where none is given."""
    empty = np.zeros(GRID, np.uint8)
    enlarged = {kind: np.kron(grids.get(kind, empty), np.ones((4, 4), np.uint8)) for kind in CONCEPTS}
    return {kind: Image.fromarray(grid.astype(np.uint8)) for kind, grid in enlarged.items()}


def exemplar(index: int, visible: np.ndarray) -> Exemplar:
    return Exemplar(index, Image.new("RGB", (SIDE, SIDE), (9, 9, 9)), visible.astype(np.float32), visible)


def box(top: int, left: int, height: int = 2, width: int = 2) -> np.ndarray:
    grid = np.zeros(GRID, bool)
    grid[top : top + height, left : left + width] = True
    return grid
