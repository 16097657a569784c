"""Texts of data and models inside HTML and Markdown: shown as they are, never read as markup."""

from __future__ import annotations

import html
import re
import unicodedata

NO_MATH = "mathjax_ignore tex2jax_ignore"  # classes of an element in which JupyterLab reads no formulas between $ and $
# An escape, a link to a page of the book, or a character that begins something else than emphasis and code
MARKS = re.compile(r"\\.|(?<!!)\[[^\[\]\\]*\]\([\w./#-]+\)|\](?=[(\[:])|[<&${]")
PLAIN = re.compile(r"[\w.:*+/ -]+")  # a name that a code span shows as it is


def escaped(text: object) -> str:
    """Return a text for HTML. A character that no document can hold becomes the replacement character."""
    return html.escape(_printable(str(text)))


def as_text(text: object) -> str:
    """Return a text for a sentence in Markdown, on one line, in which nothing is formatting, a link or a picture."""
    return re.sub(r"([\\`*_\[\]~#|!])", r"\\\1", " ".join(_printable(str(text)).split()))


def sentence(text: str) -> str:
    """Return a sentence in Markdown with emphasis, code and links to pages of the book; all else is shown as it is.

    HTML, formulas, roles, pictures and links to other places are not read as such. It stays on one line.
    """
    line = " ".join(_printable(text).split())
    written = {"<": "&lt;", "&": "&amp;"}
    return MARKS.sub(lambda mark: mark[0] if len(mark[0]) > 1 else written.get(mark[0], f"\\{mark[0]}"), line)


def code(name: str) -> str:
    """Return a name for Markdown, in a table too, in the type of code."""
    if PLAIN.fullmatch(name):
        return f"`{name}`"
    return "<code>" + "".join(c if c.isalnum() else f"&#{ord(c)};" for c in _printable(name)) + "</code>"


def _printable(text: str) -> str:
    """Return a text without control characters and halves of surrogate pairs, which no page can hold."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t\r" else c for c in text)
