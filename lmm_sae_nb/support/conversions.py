"""Note what was done to a picture to make it 8-bit RGB, and count it. The note is in the picture's own `info`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from PIL import Image

NOTE = ("lmm_sae_nb", "converted")  # the key in `info`; what a file brings along has texts as keys
CONVERSIONS = {
    "turned": "turned as the EXIF tag says",
    "first_frame": "of several frames the first",
    "scaled": "16 bits scaled to 8",
    "on_white": "transparent pixels laid on white",
    "colours": "grey, a palette, CMYK or another mode brought to RGB",
}


def with_note(picture: Image.Image, done: Iterable[str]) -> Image.Image:
    """Return the picture with a note of what was done to it.

    picture: nobody else has it.
    done: names of CONVERSIONS, in addition to those that are noted already.
    """
    picture.info = {**picture.info, NOTE: (*conversions(picture), *done)}
    return picture


def conversions(picture: Image.Image) -> tuple[str, ...]:
    """Return what was done to a picture, as names of CONVERSIONS; empty if it was 8-bit RGB from the beginning."""
    return picture.info.get(NOTE, ())


def count_conversions(each: Iterable[Iterable[str]]) -> dict[str, int]:
    """Count the pictures that were converted, as "pictures", and those of each kind; empty if there are none.

    each: what `conversions` returns for each picture.
    """
    counts = Counter(name for done in each if done for name in ("pictures", *dict.fromkeys(done)))
    return {name: counts[name] for name in ("pictures", *CONVERSIONS) if counts[name]}


def sum_conversions(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add counts of different pictures."""
    total = sum(map(Counter, counts), Counter())
    return {name: total[name] for name in ("pictures", *CONVERSIONS) if total[name]}


def conversion_metrics(name: str, counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts as metrics: `<name>_converted`, and `<name>_converted_<kind>`; none if nothing was converted."""
    return {f"{name}_converted" + (f"_{kind}" if kind in CONVERSIONS else ""): n for kind, n in counts.items()}


def conversions_in_words(counts: Mapping[str, int]) -> str:
    """Say how many pictures were converted, and how; "" if none were."""
    kinds = [f"{counts[kind]:,} {words}" for kind, words in CONVERSIONS.items() if kind in counts]
    return f"{counts['pictures']:,} pictures converted to 8-bit RGB: {', '.join(kinds)}" if counts else ""
