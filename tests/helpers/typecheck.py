"""The check of types and shapes that the whole suite runs under (pyproject.toml, --jaxtyping-packages)."""

from collections.abc import Mapping, Sequence

import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype
from datasets import Dataset
from PIL import Image

Sequence.register(Dataset)  # it has a length and items, and does not say so
OVERRIDES = FrozenDict(
    {
        int: int | np.integer,  # NumPy's numbers will do where Python's are wanted
        float: float | int | np.floating | np.integer,
        Sequence[Image.Image]: Sequence,  # to look at an item would read a file
        Sequence[Mapping]: Sequence,
    }
)
check = beartype(conf=BeartypeConf(hint_overrides=OVERRIDES))
