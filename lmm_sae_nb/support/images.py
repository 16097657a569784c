"""Open pictures of a folder or data set by number, always as 8-bit RGB."""

from __future__ import annotations

import errno
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import datasets
import numpy as np
from cachetools import LRUCache
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image, ImageOps, UnidentifiedImageError

ORIENTATION = 0x0112  # the EXIF tag
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
SMALLER = "Make it smaller, or set PIL.Image.MAX_IMAGE_PIXELS higher"
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class UnreadableImage(ValueError):
    """Raised for a picture that cannot be opened.

    name: of the picture.
    reason: why it cannot be opened.
    """

    def __init__(self, name: str, reason: object):
        super().__init__(
            f"{name} is not a readable image ({reason}); repair it, take it out, or skip what is unreadable "
            "(unreadable: skip)"
        )
        self.name, self.reason = name, str(reason)


class Images(Sequence):
    """Pictures by number. Each is opened when it is needed, as RGB.

    source: files, or a data set with a column `image`.
    root: folder that the files' names are relative to, for `identity`.

    Raises:
        UnreadableImage: from `images[i]`, if the picture cannot be opened.
        IndexError: from `images[i]`, if there is no such picture.
    """

    def __init__(self, source: Sequence[Path] | Dataset, root: Path | None = None):
        self._source, self._root = source, root

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: SupportsIndex) -> Image.Image:
        index = int(index)  # it may be a tensor
        if not -len(self) <= index < len(self):
            raise IndexError(f"no image {index}: there are {len(self)}, numbered from 0")
        item = self._source[index]
        return open_rgb(item["image"] if isinstance(self._source, Dataset) else item, f"row {index}")

    @property
    def identity(self) -> str:
        """A hash that changes with the files (names, sizes, times) or the data set."""
        if isinstance(self._source, Dataset):
            return self._source._fingerprint
        files = [(file.relative_to(self._root).as_posix(), file.stat()) for file in self._source]
        lines = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in files)
        return hashlib.sha256(lines.encode()).hexdigest()


def open_images(source: str | Path | Dataset) -> Images:
    """Open the pictures of a folder or data set; each comes as `rgb` makes it.

    source: a folder (searched recursively, in the order of the files' names), a saved data set, or a data set.

    Raises:
        FileNotFoundError: the folder is missing.
        ValueError: a folder without images, or a data set without a column `image` or with several splits.
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
    """Pictures by number, of which the latest used stay in memory.

    Scores look at the same pictures again and again. Not safe for several threads.

    images: the pictures.
    room: bytes of decoded pictures to keep.
    """

    def __init__(self, images: Sequence[Image.Image], room: int = 2**28):
        self._images, self._held = images, LRUCache(room, _bytes_of)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: SupportsIndex) -> Image.Image:
        index = int(index)
        if (picture := self._held.get(index)) is None:
            picture = self._images[index]
            if _bytes_of(picture) > self._held.maxsize:
                return picture
            self._held[index] = picture
        return picture.copy()  # a caller may draw into it


def _bytes_of(picture: Image.Image) -> int:
    return 4 * picture.width * picture.height  # Pillow gives RGB a fourth byte


# ---- one picture ----------------------------------------------------------------------------------------------


def open_rgb(item: Any, name: str) -> Image.Image:
    """Open a picture as RGB.

    item: a path, a PIL image, or a data set's dictionary with "bytes" and "path".
    name: for the error, if the item has no path.

    Raises:
        UnreadableImage: it cannot be opened.
        MemoryError, OSError: this machine has no memory or no file handles left, which is no fault of the picture.
    """
    if isinstance(item, dict):
        data, path = item.get("bytes"), item.get("path")
        name = f"{name} ({Path(path).name})" if path else name
        item = io.BytesIO(data) if data is not None else path and Path(path)
    elif isinstance(item, str | Path):
        name, item = str(item), Path(item)
    if item is None:
        raise UnreadableImage(name, "it has no image")
    try:
        if isinstance(item, Image.Image):
            return rgb(item)
        with Image.open(item) as picture:
            return rgb(picture)
    except UnidentifiedImageError as error:  # its text differs from call to call
        raise UnreadableImage(name, "Pillow does not know its format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(name, f"{error} {SMALLER}") from error
    except MemoryError:
        raise
    except Exception as error:  # PIL raises many kinds for damaged files: OSError, SyntaxError, struct.error, ...
        if getattr(error, "errno", None) in EXHAUSTED:
            raise
        raise UnreadableImage(name, error) from error


def rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture to 8-bit RGB as a viewer would show it. Every picture goes this way into a model.

    It is turned as its EXIF tag says. Of an animation the first frame counts. Transparent pixels become white. 16-bit
    grey is divided by 257, not cut off; Pillow's 32-bit mode I counts as 16-bit, because its readers store 16 bits
    there. Other modes are converted by Pillow. A picture in memory that is plain RGB comes back itself, not a copy.

    Raises:
        ValueError: no pixels, more than Pillow's limit `PIL.Image.MAX_IMAGE_PIXELS`, or pixels of unknown range:
            floating-point numbers, or integers of more than 16 bits.
    """
    _require_size(picture)
    if getattr(picture, "is_animated", False):
        picture.seek(0)
    picture.load()
    if picture.getexif().get(ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise ValueError("it has floating-point pixels of unknown range; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        return _from_16_bits(picture)
    if picture.has_transparency_data:
        picture = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    if picture.mode != "RGB":
        return picture.convert("RGB")
    return picture if type(picture) is Image.Image else picture.copy()  # a copy does not depend on an open file


def _require_size(picture: Image.Image) -> None:
    if not picture.width or not picture.height:
        raise ValueError(f"{picture.width} x {picture.height} px: it has no pixels")
    limit = Image.MAX_IMAGE_PIXELS
    if limit and picture.width * picture.height > limit:
        raise ValueError(
            f"{picture.width} x {picture.height} px are {picture.width * picture.height:,} pixels, the limit is "
            f"{limit:,}. {SMALLER}"
        )


def _from_16_bits(picture: Image.Image) -> Image.Image:
    grey = np.asarray(picture)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError(
            f"it has integer pixels from {grey.min():,} to {grey.max():,}, of unknown range; save it with 8 or 16 bits"
        )
    shades = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if isinstance(clear := picture.info.get("transparency"), int):
        shades[grey == clear] = 255
    return Image.fromarray(shades).convert("RGB")


def pixel_hash(image: Image.Image) -> str:
    """Return the SHA-256 of an image's mode, size and pixels; equal images have equal hashes, whatever their files."""
    if image.mode in ("P", "PA"):  # its bytes are places in a palette
        image = image.convert("RGBA")
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()
