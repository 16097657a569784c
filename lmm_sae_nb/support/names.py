"""Names that become files and folders: of runs, stages, SAEs and presets."""

from __future__ import annotations

import unicodedata

LONGEST = 100  # bytes; a file system allows 255, and endings are added
FORBIDDEN = frozenset('/\\<>:"|?*`$')  # on some system, or in a shell
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}  # of Windows


def folder_name(name: str, of: str) -> str:
    """Return a name that names one folder or file inside another, on every system; refuse any other.

    Letters of all languages, digits, spaces inside, and marks such as `-_.+()[]` are allowed.

    of: what has the name, for the error.

    Raises:
        ValueError: the name is empty, leads elsewhere, is hidden, too long, or has characters that some system refuses.
    """
    if wrong := _wrong(name):
        shown = repr(name) if len(repr(name)) <= 60 else repr(name)[:60] + "…"
        raise ValueError(
            f"{shown} cannot name {of}: {wrong}; use one folder name of letters, digits, - and _, such as 'my-run_2'"
        )
    return name


def _wrong(name: str) -> str:
    """Return what is wrong with a name; empty if nothing is."""
    if not name:
        return "it is empty"
    if name in (".", "..") or FORBIDDEN & set(name):
        return "it has separators or characters that a system reserves" if name.strip(".") else "it leads elsewhere"
    if any(unicodedata.category(character)[0] == "C" for character in name):
        return "it has control characters"
    if name[0] == "." or name[-1] == "." or name != name.strip():
        return "it begins or ends with a dot or a space"
    if name.partition(".")[0].lower() in DEVICES:
        return "Windows keeps this name for a device"
    return f"it has more than {LONGEST} bytes" if len(name.encode()) > LONGEST else ""
