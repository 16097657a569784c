"""Load models of transformers from folders and the hub, so that a damaged file is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lmm_sae_nb.support.tensor_files import open_tensors

LARGEST = 2**53  # of a whole number in a model's config; its sizes are far below


@contextmanager
def naming(name_or_path: str | Path) -> Iterator[None]:
    """Name the folder in whatever transformers raises for it. Errors of the hub have the model's name already.

    Raises:
        ValueError: the folder's files cannot be loaded.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if not Path(name_or_path).is_dir():
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:600]
        raise ValueError(
            f"the model in {name_or_path} cannot be loaded ({said}); if its files are damaged, or of another kind, "
            "restore or download them again"
        ) from error


def require_readable(folder: Path) -> None:
    """Check the files of a model's folder before transformers reads them: JSON is whole, and safetensors have whole
    headers.

    Weights have no checksum of ours. One that was changed makes another model, with another fingerprint, so stages are
    made again.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    for file in sorted(folder.glob("*.safetensors")):
        open_tensors(file)
    for file in sorted(folder.glob("*.json")):
        try:
            value = json.loads(file.read_bytes().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not whole JSON ({error}); restore or download it again") from None
        if file.name == "config.json" and (large := [number for number in _whole_numbers(value) if number > LARGEST]):
            raise ValueError(f"{file} has the number {large[0]:.3g}, which is no size; restore or download it again")


def _whole_numbers(value: object) -> Iterator[int]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _whole_numbers(each)
    elif type(value) is int:
        yield value


def load_model(kind: Any, name_or_path: str | Path, **settings: Any) -> PreTrainedModel:
    """Load a model with all its weights.

    kind: a class with `from_pretrained`.
    name_or_path: a folder, or a name on the hub.
    settings: of `from_pretrained`.

    Raises:
        ValueError: a file is damaged, or the files lack weights that the model has, which transformers would draw at
            random.
    """
    if Path(name_or_path).is_dir():
        require_readable(Path(name_or_path))
    with naming(name_or_path):
        model, found = kind.from_pretrained(name_or_path, output_loading_info=True, **settings)
    if missing := sorted(found["missing_keys"]):
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3:,} more" if len(missing) > 3 else "")
        raise ValueError(
            f"the files of {name_or_path} have no weights for {names}: they are damaged, or of another kind of model; "
            "download them again, or choose another model"
        )
    return model
