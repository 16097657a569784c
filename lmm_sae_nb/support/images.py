"""Pictures from a folder or a data set, by number, opened when asked for, always as plain 8-bit RGB."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from cachetools import LRUCache
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image, ImageOps, UnidentifiedImageError

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class UnreadableImage(ValueError):
    """A picture that cannot be opened; `name` tells which, `reason` why."""

    def __init__(self, name: str, reason: object):
        super().__init__(
            f"{name} is not a readable image ({reason}); repair it, take it out, or skip what is unreadable"
        )
        self.name, self.reason = name, str(reason)


class Images(Sequence):
    """Pictures by number, opened when asked for, as RGB; UnreadableImage for one that cannot be.

    identity: a hash that changes with the files (names, sizes, times) or the data set.
    """

    def __init__(self, source: Sequence[Path] | Dataset, root: Path | None = None):
        self._source, self._root = source, root

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Image.Image:
        if not -len(self) <= index < len(self):
            raise IndexError(f"no image {index}: there are {len(self)}, numbered from 0")
        item = self._source[int(index)]
        return open_rgb(item["image"] if isinstance(self._source, Dataset) else item, f"row {index}")

    @property
    def identity(self) -> str:
        if isinstance(self._source, Dataset):
            return self._source._fingerprint
        files = [(file.relative_to(self._root).as_posix(), file.stat()) for file in self._source]
        told = "\n".join(f"{name} {its.st_size} {its.st_mtime_ns}" for name, its in files)
        return hashlib.sha256(told.encode()).hexdigest()


def open_images(source: str | Path | Dataset) -> Images:
    """The images of a folder (searched recursively, in order of their names), of a saved data set or a data set.

    Every picture comes as `rgb` makes it. FileNotFoundError for a missing folder; ValueError for one without
    images, or a data set without an `image` column or of several splits.
    """
    if isinstance(source, str | Path):
        folder = Path(source)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is no folder; give a folder of images, or render Picture World: `make world`"
            )
        if not {"state.json", "dataset_dict.json"} & {file.name for file in folder.iterdir()}:
            files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
            if not files:
                raise ValueError(f"{folder} holds no image ({', '.join(sorted(ENDINGS))}); give a folder that does")
            return Images(files, folder)
        source = load_from_disk(folder)
    if isinstance(source, DatasetDict):
        raise ValueError(f"the data set has the splits {', '.join(source)}; give one of them")
    if "image" not in source.column_names:
        raise ValueError(f"the data set has columns {source.column_names}, none is `image`; rename the one that is")
    if isinstance(source.features["image"], datasets.Image):
        source = source.cast_column("image", datasets.Image(decode=False))  # opened here, so that faults have a name
    return Images(source.select_columns("image"))


class Remembered(Sequence):
    """Pictures by number of which those looked at last stay in memory, as they were read, up to `room` bytes.

    For scores, which look at the same ones again and again; what looks at each once gains nothing. For one thread.
    """

    def __init__(self, images: Sequence[Image.Image], room: int = 2**28):
        self._images, self._held = images, LRUCache(room, _bytes_of)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Image.Image:
        if (picture := self._held.get(index)) is None:
            picture = self._images[index]
            if _bytes_of(picture) > self._held.maxsize:
                return picture
            self._held[index] = picture
        return picture.copy()  # nobody draws into another's


def _bytes_of(picture: Image.Image) -> int:
    return 4 * picture.width * picture.height  # Pillow gives RGB a fourth byte


# ---- one picture ----------------------------------------------------------------------------------------------


def open_rgb(item: Any, name: str) -> Image.Image:
    """A picture from a path, a PIL image, or a data set's {"bytes", "path"}; UnreadableImage with its name."""
    if isinstance(item, dict):
        held, path = item.get("bytes"), item.get("path")
        name = f"{name} ({Path(path).name})" if path else name
        item = io.BytesIO(held) if held is not None else path and Path(path)
    elif isinstance(item, str | Path):
        name, item = str(item), Path(item)
    if item is None:
        raise UnreadableImage(name, "it has no image")
    try:
        if isinstance(item, Image.Image):
            return rgb(item)
        with Image.open(item) as picture:
            return rgb(picture)
    except UnidentifiedImageError as error:  # whose text is not the same twice
        raise UnreadableImage(name, "of no kind that Pillow knows") from error
    except Exception as error:  # what PIL raises for damaged files: OSError, SyntaxError, struct.error, and more
        raise UnreadableImage(name, error) from error


def rgb(picture: Image.Image) -> Image.Image:
    """A picture as one sees it, in 8-bit RGB, its first frame if it moves.

    Turned upright as its EXIF tag says. What is transparent shows white. 16-bit grey is divided by 257, not cut off;
    Pillow's 32-bit mode I counts as 16-bit, which is what its readers put there. CMYK and others as Pillow converts.
    ValueError for one without pixels, and for floating-point pixels, whose range is not known.
    """
    if not picture.width or not picture.height:
        raise ValueError(f"{picture.width} x {picture.height} px: there is nothing to see")
    if getattr(picture, "is_animated", False):
        picture.seek(0)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise ValueError("floating-point pixels, of unknown range; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        grey = np.asarray(picture).clip(0, 65535)
        return Image.fromarray(((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of an image's mode, size and pixels: of equal images equal, whatever file they come from."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
