"""The concepts of a ground truth: `concepts.json`, each kind with its names."""

from __future__ import annotations

from pathlib import Path

from lmm_sae_nb.support.stages import read_typed


def read_concepts(path: str | Path) -> dict[str, list[str]]:
    """Return the names of each kind of concept, in the order of the label maps' numbers.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it holds something else than kinds with lists of names, or an empty name.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing; render the data sets first: `make world`")
    concepts = read_typed(path, dict[str, list[str]])
    for kind, names in concepts.items():
        if not names or not all(name.strip() for name in (kind, *names)):
            raise ValueError(f"{path}: the kind {kind!r} has no names, or an empty one; give each at least one name")
    return concepts
