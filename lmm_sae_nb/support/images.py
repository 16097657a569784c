"""Open pictures of a folder or data set by number, always as 8-bit RGB."""

from __future__ import annotations

import errno
import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import datasets
import numpy as np
from cachetools import LRUCache
from datasets import Dataset, DatasetDict
from PIL import Image, ImageOps, UnidentifiedImageError

from lmm_sae_nb.support.conversions import with_note
from lmm_sae_nb.support.files import LARGE, fingerprint
from lmm_sae_nb.support.saved_data import open_saved

ORIENTATION = 0x0112  # the EXIF tag
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
SMALLER = "Make it smaller, or set PIL.Image.MAX_IMAGE_PIXELS higher"
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class UnreadableImage(ValueError):
    """Raised for a picture that cannot be opened.

    name: of the picture.
    reason: why it cannot be opened.
    position: its place in a batch, if it was to be part of one.
    """

    position: int | None = None

    def __init__(self, name: str, reason: object):
        super().__init__(
            f"{name} is not a readable image ({reason}); repair it, take it out, or skip what is unreadable "
            "(unreadable: skip)"
        )
        self.name, self.reason = name, str(reason)


class UnfitImage(UnreadableImage):
    """Raised for a picture that the model's processor refuses, as some do with very long and narrow ones."""

    def __init__(self, name: str, reason: object):
        ValueError.__init__(
            self,
            f"{name} does not fit the model's processor ({reason}); bring all images to one size, "
            "LMM.load(name, image_size=(448, 448)), take it out, or skip it (unreadable: skip)",
        )
        self.name, self.reason = name, str(reason)


class Images(Sequence):
    """Pictures by number. Each is opened when it is needed, as RGB.

    items: what `open_rgb` opens.
    name: of the folder or data set, for messages.
    left_out: files of a folder that are not among the pictures, by name, each with the reason.

    Raises:
        UnreadableImage: from `images[i]`, if the picture cannot be opened.
        IndexError: from `images[i]`, if there is no such picture.
    """

    def __init__(self, items: Sequence, name: str, left_out: Mapping[str, str] | None = None):
        self._items, self.name, self.left_out = items, name, dict(left_out or {})

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: SupportsIndex) -> Image.Image:
        index = int(index)  # it may be a tensor
        if not -len(self) <= index < len(self):
            raise IndexError(f"no image {index}: there are {len(self)}, numbered from 0")
        return open_rgb(self._item(index), f"row {index}")

    def _item(self, index: int) -> Any:
        return self._items[index]


class FolderImages(Images):
    """The pictures of a folder, in the order of the files' names."""

    def __init__(self, files: Sequence[Path], folder: Path, left_out: Mapping[str, str] | None = None):
        super().__init__(files, str(folder), left_out)
        self._folder = folder

    def first(self, count: int) -> FolderImages:
        """Return the first pictures."""
        return FolderImages(self._items[:count], self._folder, self.left_out)

    @property
    def identity(self) -> str:
        """A hash of the files' names and contents. All of them are read; `stamp` is quick."""
        return _hash_of(f"{file.relative_to(self._folder).as_posix()} {fingerprint(file)}" for file in self._items)

    @property
    def stamp(self) -> str:
        """A hash of what the file system says of the files. While it is the same, so is the content."""
        return _hash_of(f"{file.relative_to(self._folder).as_posix()} {_state(file)}" for file in self._items)


class DatasetImages(Images):
    """The column `image` of a data set."""

    def __init__(self, rows: Dataset, name: str, identity: str):
        super().__init__(rows, name)
        self._identity = identity

    def _item(self, index: int) -> Any:
        return self._items[index]["image"]

    def first(self, count: int) -> DatasetImages:
        """Return the first pictures."""
        count = min(count, len(self))
        return DatasetImages(self._items.select(range(count)), self.name, f"the first {count} of {self._identity}")

    @property
    def identity(self) -> str:
        """A hash of the data set, and of the content of its files. The tables of a large one are not read."""
        held = () if self._is_large else map(fingerprint, self._held)
        return _hash_of([self._identity, *held, *(f"{file} {fingerprint(file)}" for file in self._files)])

    @property
    def stamp(self) -> str:
        """The same without reading these files."""
        return _hash_of([self._identity, *(f"{file} {_state(file)}" for file in (*self._held, *self._files))])

    @cached_property
    def _held(self) -> list[str]:
        """The files of the data set's tables; none if it is in memory."""
        return [each["filename"] for each in self._items.cache_files if Path(each["filename"]).is_file()]

    @property
    def _is_large(self) -> bool:
        return sum(Path(file).stat().st_size for file in self._held) > LARGE

    @cached_property
    def _files(self) -> list[str]:
        """Files that the data set names and does not hold."""
        kind, files = self._items.features["image"], []
        if isinstance(kind, datasets.Image):
            for batch in self._items.with_format("arrow").iter(1000):
                rows = batch.column("image")
                files += [row["path"].as_py() for row in rows if row.is_valid and not row["bytes"].is_valid]
        elif getattr(kind, "dtype", "") == "string":
            files = self._items["image"]
        return [file for file in files if file and Path(file).is_file()]


def _state(file: str | Path) -> str:
    try:
        found = Path(file).stat()
    except OSError as error:
        return error.strerror
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


def _hash_of(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def open_images(source: str | Path | Dataset) -> FolderImages | DatasetImages:
    """Open the pictures of a folder or data set; each comes as `rgb` makes it.

    source: a folder (as `find_pictures` searches it), a saved data set, or a data set.

    Raises:
        FileNotFoundError: the folder is missing.
        ValueError: a folder without images, or a data set without a column `image` or with several splits.
    """
    name = "the data set"
    if isinstance(source, str | Path):
        folder, name = Path(source), str(source)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is no folder; give a folder of images, or render Picture World: `make world`"
            )
        if not {"state.json", "dataset_dict.json"} & {file.name for file in folder.iterdir()}:
            files, left_out = find_pictures(folder)
            if not files:
                raise ValueError(
                    f"{folder} holds no image ({', '.join(sorted(ENDINGS))}); {in_words(left_out)}; give a folder "
                    "that does"
                )
            return FolderImages(files, folder, left_out)
        source = open_saved(folder)
    if isinstance(source, DatasetDict):
        raise ValueError(f"the data set has the splits {', '.join(source)}; give one of them")
    if "image" not in source.column_names:
        raise ValueError(f"the data set has columns {source.column_names}, none is `image`; rename the one that is")
    return DatasetImages(undecoded(source.select_columns("image")), name, source._fingerprint)


def undecoded(rows: Dataset) -> Dataset:
    """Return a data set whose pictures come as "bytes" and "path", for `open_rgb`, so that faults have a name."""
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image) and feature.decode:
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


# ---- folders --------------------------------------------------------------------------------------------------


def find_pictures(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Search a folder and those below it; return the pictures in the order of their names, and what is left out.

    Links are followed. Each file and each folder is read once, however many links lead to it, so that loops end; a name
    that is no link comes first. Hidden files and folders, whose names begin with a dot, are left out.

    Returns:
        The files, and a dictionary: the name of each file or folder that was left out, with the reason.
    """
    files: dict[Path, Path] = {}  # where a file really is, to its path in the folder
    left_out: dict[str, str] = {}
    visited, folders, links = set(), [folder], []

    def leave_out(path: Path, reason: str) -> None:
        left_out[path.relative_to(folder).as_posix()] = reason

    while folders or links:
        if not folders:  # all that is no link has been seen
            path, links = links[0], links[1:]
            if path.is_dir():
                folders.append(path)
            elif _is_picture(path, leave_out):
                real = path.resolve()
                if real in files:
                    leave_out(path, f"the same file as {files[real].relative_to(folder).as_posix()}")
                else:
                    files[real] = path
            continue
        here = folders.pop()
        real = here.resolve()
        if real in visited:
            leave_out(here, "a link to a folder that is read already")
            continue
        visited.add(real)
        try:
            inside = sorted(here.iterdir())
        except OSError as error:
            leave_out(here, f"a folder that cannot be read: {error.strerror}")
            continue
        for path in inside:
            if path.name.startswith("."):
                leave_out(path, "hidden")
            elif path.is_symlink():
                links.append(path)
            elif path.is_dir():
                folders.append(path)
            elif _is_picture(path, leave_out):
                files[path.resolve()] = path
        links.sort()
    return sorted(files.values()), dict(sorted(left_out.items()))


def _is_picture(path: Path, leave_out: Callable[[Path, str], None]) -> bool:
    if not path.exists():
        leave_out(path, "a link to nothing")
    elif not path.is_file():
        leave_out(path, "no regular file")
    elif path.suffix.lower() not in ENDINGS:
        leave_out(path, f"no picture by its ending {path.suffix!r}")
    else:
        return True
    return False


def in_words(left_out: Mapping[str, str], named: int = 5) -> str:
    """Say what was left out: how much, and the first names with their reasons."""
    rows = [f"{name} ({reason})" for name, reason in list(left_out.items())[:named]]
    more = f", and {len(left_out) - named:,} more" if len(left_out) > named else ""
    return f"{len(left_out):,} files or folders left out{': ' * bool(rows)}{', '.join(rows)}{more}"


class Chosen(Sequence):
    """Some of the pictures, by number. Each is opened when it is needed, for many photographs do not fit into memory.

    images: all pictures.
    numbers: of those that are chosen.
    """

    def __init__(self, images: Sequence[Image.Image], numbers: Iterable[SupportsIndex]):
        self._images, self._numbers = images, [int(number) for number in numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: SupportsIndex | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self._images[number] for number in self._numbers[index]]
        return self._images[self._numbers[index]]


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

    def __getattr__(self, name: str) -> Any:
        if name in ("name", "left_out", "identity", "stamp"):
            return getattr(self._images, name)
        raise AttributeError(name)

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
            opened = rgb(picture)
        opened.filename = name  # as Pillow calls it; for whoever refuses the picture later
        return opened
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


def picture_fault(data: bytes) -> str:
    """Return why bytes do not begin as a picture does; "" if they do. No pixel is decoded."""
    try:
        Image.open(io.BytesIO(data)).close()
    except Exception as error:  # Pillow raises many kinds
        return repr(error)
    return ""


def rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture to 8-bit RGB as a viewer would show it. Every picture goes this way into a model.

    It is turned as its EXIF tag says. Of an animation the first frame counts. Transparent pixels become white. 16-bit
    grey is divided by 257, not cut off; Pillow's 32-bit mode I counts as 16-bit, because its readers store 16 bits
    there. Other modes are converted by Pillow. A picture in memory that is plain RGB comes back itself, not a copy.
    What was done is noted in the picture (`conversions`).

    Raises:
        ValueError: no pixels, more than Pillow's limit `PIL.Image.MAX_IMAGE_PIXELS`, or pixels of unknown range:
            floating-point numbers, or integers of more than 16 bits.
    """
    _require_size(picture)
    done = []
    if getattr(picture, "is_animated", False):
        picture.seek(0)
        done.append("first_frame")
    _decode(picture)
    if picture.getexif().get(ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
        done.append("turned")
    if picture.mode == "F":
        raise ValueError("it has floating-point pixels of unknown range; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        return with_note(_from_16_bits(picture), [*done, "scaled"])
    if picture.has_transparency_data:
        picture = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
        is_clear = picture.getchannel("A").getextrema()[0] < 255
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        return with_note(picture, [*done, "on_white" if is_clear else "colours"])
    if picture.mode != "RGB":
        return with_note(picture.convert("RGB"), [*done, "colours"])
    if type(picture) is not Image.Image:
        picture = picture.copy()  # it does not depend on an open file
    return with_note(picture, done) if done else picture


def _decode(picture: Image.Image) -> None:
    """Read a picture's pixels.

    Pillow 13.0 maps an uncompressed TIFF file of some modes into memory, and scrambles it if its EXIF tag turns it. A
    file without a name is not mapped.
    """
    name = getattr(picture, "filename", "")
    if not name:
        picture.load()
        return
    picture.filename = ""
    try:
        picture.load()
    finally:
        picture.filename = name


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
