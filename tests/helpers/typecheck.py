"""The check of types and shapes that the whole suite runs under (pyproject.toml, --jaxtyping-packages)."""

from collections.abc import Sequence

import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype
from PIL import Image

OVERRIDES = FrozenDict(
    {
        int: int | np.integer,  # NumPy's numbers will do where Python's are wanted
        float: float | int | np.floating | np.integer,
        Sequence[Image.Image]: Sequence,  # to look at an item would read a file
    }
)
check = beartype(conf=BeartypeConf(hint_overrides=OVERRIDES))
