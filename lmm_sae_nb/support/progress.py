"""Progress bars that suit a notebook, a terminal and a log alike."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable

from tqdm import auto, notebook, std

MINUTE = 60.0  # seconds between two lines in a log
LOG_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Lines:
    """A text stream on which each state of a bar becomes a line of its own, without control characters."""

    encoding = "utf-8"

    def __init__(self, stream: io.TextIOBase):
        self.stream = stream

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(iterable: Iterable | None = None, **settings) -> std.tqdm:
    """Return a tqdm bar: a widget in a notebook, redrawn in place on a terminal, a line a minute in a log.

    settings: as of `tqdm`: `desc`, `total`, `unit`, `disable`, ...
    """
    if issubclass(auto.tqdm, notebook.tqdm_notebook) or sys.stderr.isatty():
        return auto.tqdm(iterable, **{"mininterval": 2.0, **settings})
    log = dict(file=_Lines(sys.stderr), mininterval=MINUTE, maxinterval=MINUTE, bar_format=LOG_LINE)
    return std.tqdm(iterable, **{**settings, **log})
