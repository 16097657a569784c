"""Texts in figures: drawn as they are, in letters that the font has, and no longer than their place."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import matplotlib.pyplot as plt
from matplotlib.font_manager import FontProperties, findfont, get_font

from lmm_sae_nb.show.style import LINE, POINTS, WIDTH

CHARACTERS = 10  # of the book's type in an inch, about
LINES = 12  # of a wrapped title
LONGEST = 5_000  # characters of a text that are looked at
CUT = "…"
MISSING = "□"  # in place of a character that cannot be drawn
RIGHT_TO_LEFT = re.compile("[{0}](?:[{0} ]*[{0}])?".format("\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc"))


class Literal(str):
    """A text that is ready to be drawn: `literal` and `wrapped` leave it as it is."""


def literal(text: object, inches: float = WIDTH) -> str:
    r"""Return a text as matplotlib draws it character by character; a line that is too long ends with an ellipsis.

    Nothing is read as mathematics: `$` becomes `\$`. A character that the font lacks, or that cannot be drawn, becomes
    a box.

    inches: that a line may take.
    """
    if isinstance(text, Literal):
        return text
    return _escaped([_cut(line, inches) for line in _cleaned(text).splitlines()])


def one_line(text: object, inches: float = WIDTH / 2) -> str:
    """Return a text as `literal` does, on one line, for a legend or the rows of a chart."""
    return text if isinstance(text, Literal) else literal(" ".join(_cleaned(text).split()), inches)


def wrapped(text: object, inches: float = WIDTH, most: int = LINES) -> str:
    """Return a text as `literal` does, in lines that fit into so many inches, at most `most` of them."""
    if isinstance(text, Literal):
        return text
    characters = max(8, int(inches * CHARACTERS))
    lines = _lines(text := _cleaned(text), characters)
    while characters > 2 and max(map(width, lines), default=0) > inches + 0.1:  # letters wider than most
        characters = int(0.8 * characters)
        lines = _lines(text, characters)
    if len(lines) > most:
        lines = [*lines[: most - 1], _cut(lines[most - 1] + CUT, inches)]
    return _escaped(lines)


def _lines(text: str, characters: int) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, characters) or [""]]


def height(texts: Sequence[str]) -> float:
    """Return the inches that the highest of some wrapped texts needs."""
    return LINE * max((text.count("\n") + 1 for text in texts if text), default=0)


def width(line: str) -> float:
    """Return the inches that a line of the book's type takes, before `$` is escaped."""
    return sum(map(_advance, line)) * POINTS / 72


def _escaped(lines: Sequence[str]) -> Literal:
    r"""Return cleaned lines with `$` as `\$`, right-to-left letters in the order in which they are seen.

    A text that begins with `_` gets a hair space before it: matplotlib would leave it out of a legend.
    """
    text = "\n".join(RIGHT_TO_LEFT.sub(lambda run: run[0][::-1], line) for line in lines)
    return Literal(("\u200a" if text.startswith("_") else "") + text.replace("$", r"\$"))


def _cleaned(text: object) -> str:
    """Return a text in letters that the font has, without invisible characters."""
    text = str(text)
    cut = text[:LONGEST] + CUT * (len(text) > LONGEST)
    composed = unicodedata.normalize("NFC", cut.replace("\r\n", "\n").replace("\r", "\n").replace("\t", " "))
    return "".join(map(_drawable, composed))


def _drawable(character: str) -> str:
    """Return a character, nothing for an invisible one, or a box for one that cannot be drawn."""
    category = unicodedata.category(character)
    if character == "\n":
        return character
    if category[0] != "C" and ord(character) in _characters(tuple(plt.rcParams["font.family"])):
        return character
    if category in ("Zl", "Zp"):
        return "\n"
    return "" if category in ("Cf", "Mn", "Me") else MISSING


def _cut(line: str, inches: float) -> str:
    """Return a line, shortened to so many inches if it is longer, with an ellipsis."""
    if width(line) <= inches:
        return line
    room, kept = inches - width(CUT), 0
    for character in line:
        room -= _advance(character) * POINTS / 72
        if room < 0:
            break
        kept += 1
    return line[:kept].rstrip() + CUT


@lru_cache(maxsize=8)
def _characters(families: tuple[str, ...]) -> frozenset[int]:
    """Return the characters that the fonts have."""
    fonts = (get_font(findfont(FontProperties(family=[family]))) for family in families)
    return frozenset(code for font in fonts for code in font.get_charmap())


@lru_cache(maxsize=4096)
def _advance(character: str) -> float:
    """Return how wide a character is, in units of the type's size."""
    font = get_font(findfont(FontProperties(family=plt.rcParams["font.family"])))
    font.set_size(100, 72)
    return font.load_char(ord(character)).linearHoriAdvance / 65536 / 100
