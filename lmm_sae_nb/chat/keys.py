"""Read an endpoint's key, and keep it out of every text."""

from __future__ import annotations

import base64
import os
import re
from urllib.parse import quote

KEY = "[key]"  # stands where the key stood
PIECE = 8  # so many characters of a key in a row are hidden, as of a key that was cut; fewer of a short key
NAME_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")  # as of a proxy


def read_key(variable: str, url: str) -> str:
    """Return the key that an environment variable holds, without white space at its ends; "" if none is wanted.

    variable: its name; "" if the endpoint wants no key.
    url: of the endpoint, for the error.

    Raises:
        ValueError: the variable is not set, or holds what is no key. The message does not show the key.
    """
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    wrong = (
        "is not set, or empty" if not key else
        "has quotes around its key; remove them" if key[0] in "\"'`" or key[-1] in "\"'`" else
        "has a key with white space inside, as of two keys or of a word before the key; leave only the key"
        if any(map(str.isspace, key)) else
        "has a key with characters other than printable ASCII, as a copied dash can be; copy the key again"
        if not (key.isascii() and key.isprintable()) else ""
    )  # fmt: skip
    if wrong:
        raise ValueError(
            f"the environment variable {variable}, which is to hold the key for {url}, {wrong}. Set it and start "
            'again, or set key_variable to "" if the endpoint wants no key'
        )
    return key


class Mask:
    """Hides a key in texts, also in part, in capitals or not, and as base64, hexadecimal or part of an address.

    key: "" hides nothing.
    """

    def __init__(self, key: str):
        data = key.encode()
        forms = [key, quote(key, safe=""), re.sub(r"\W", lambda mark: f"%{ord(mark[0]):02x}", key), data.hex()]
        for shift in range(3):  # of the bytes before the key, as of "Bearer "
            whole = base64.b64encode(bytes(shift) + data).decode()
            whole = whole[-(-shift * 8 // 6) : (shift + len(data)) * 8 // 6]  # what only the key decides
            forms += [whole, whole.translate(str.maketrans("+/", "-_"))]
        self._size = min(PIECE, max(4, len(key) // 3), len(key))
        low = [form.lower() for form in forms if len(form) >= self._size]
        self._pieces = {form[at : at + self._size] for form in low for at in range(len(form) - self._size + 1)}

    def __call__(self, text: str) -> str:
        """Return a text with `KEY` in the place of the key, and without names and passwords of addresses."""
        text = NAME_IN_URL.sub("[name]@", text)
        if not self._size:
            return text
        low, size, pieces = text.lower(), self._size, self._pieces
        if len(low) != len(text):  # in some languages a small letter is longer
            low = "".join(letter.lower() if len(letter.lower()) == 1 else letter for letter in text)
        shown, at, end = [], 0, 0
        for start in range(len(low) - size + 1):
            if low[start : start + size] in pieces:
                if start > end or not shown:
                    shown += [text[at if shown else 0 : start], KEY]
                end = at = start + size
        return "".join([*shown, text[at:]])
