"""Open data sets that `Dataset.save_to_disk` saved, and refuse damaged ones by the name of the file."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict, load_from_disk

from lmm_sae_nb.support.files import parse_json, read_whole

DESCRIPTIONS = ("dataset_dict.json", "state.json", "dataset_info.json")
AGAIN = "restore it, or save the data set again with Dataset.save_to_disk"


def open_saved(folder: str | Path) -> Dataset | DatasetDict:
    """Open a saved data set as plain values; its tables are checked, but for the bytes of the pictures.

    Such files have no checksum of ours. One that was changed and still is a data set is another data set: a page's
    stage knows its inputs by their content, and is made again.

    Raises:
        FileNotFoundError: there is none, or files are missing.
        ValueError: a file is damaged; the message names it, or its folder.
    """
    folder = Path(folder)
    for file in (folder / name for name in DESCRIPTIONS):
        if file.is_file() and not isinstance(parse_json(read_whole(file), file), dict):
            raise ValueError(f"{file} holds no description of a data set; {AGAIN}")
    try:
        opened = load_from_disk(str(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} holds no whole data set ({error}); {AGAIN}") from error
    except Exception as error:  # any that pyarrow and datasets raise for damaged files
        file = next((file for file in sorted(folder.rglob("*.arrow")) if _is_damaged(file)), folder)
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{file} cannot be read as a data set ({said}); {AGAIN}") from error
    for part in opened.values() if isinstance(opened, DatasetDict) else [opened]:
        try:
            part.data.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{_files_of(part) or folder} is damaged ({error}); {AGAIN}") from error
    if isinstance(opened, DatasetDict):
        return opened
    is_plain = opened.format["type"] is None and opened.format["columns"] == opened.column_names
    return opened if is_plain else opened.with_format(None)


def _is_damaged(file: Path) -> bool:
    try:
        with pa.memory_map(str(file)) as source:
            pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError):
        return True
    return False


def _files_of(data: Dataset) -> str:
    return ", ".join(each["filename"] for each in data.cache_files[:3])
