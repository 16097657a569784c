"""Show how far a build is: a line for each page that runs, and at the end a line for each page with its time."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from doit.reporter import ConsoleReporter

MINUTE = 60.0  # seconds between two lines of a page in a log


@dataclass
class Running:
    """A page that runs now."""

    cells: int  # code cells
    began: float  # seconds, of the clock
    cell: int = 0  # the one that runs, counted from 1
    logged: float = 0.0  # when a log last had a line about it


class Progress:
    """The pages that run. Several threads may use it.

    On a terminal their lines stand below all other output and are redrawn each second. Elsewhere, as in a log, a line
    is added for each page once a minute.

    stream: where the lines go.
    clock: seconds, as `time.monotonic` gives them.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self.stream, self.clock = stream or sys.stderr, clock
        self.in_place = self.stream.isatty()
        self.running: dict[str, Running] = {}
        self.seconds: dict[str, float] = {}  # of the pages that ended
        self._lock = threading.RLock()
        self._ticker: threading.Thread | None = None

    @contextmanager
    def page(self, name: str, cells: int) -> Iterator[Callable[..., None]]:
        """Show a page while the `with` lasts; it gives a function to call when a code cell starts."""
        now = self.clock()
        running = Running(cells, now, logged=now)

        def next_cell(**_: object) -> None:
            running.cell += 1

        with self._lock:
            self.running[name] = running
            if not self._ticker:
                self._ticker = threading.Thread(target=self._tick, daemon=True)
                self._ticker.start()
        try:
            yield next_cell
        finally:
            with self._lock:
                del self.running[name]
                self.seconds[name] = self.clock() - now
                self.draw()

    def draw(self) -> None:
        """Redraw the lines on a terminal; in a log, add those that are due."""
        with self._lock:
            now = self.clock()
            if self.in_place:
                width = shutil.get_terminal_size().columns - 1
                lines = [line(name, page, now)[:width] for name, page in self.running.items()]
                up = f"\x1b[{len(lines)}A" if lines else ""  # what is written next starts above them
                self.stream.write("\r\x1b[J" + "".join(f"{each}\n" for each in lines) + up)
            else:
                due = {name: page for name, page in self.running.items() if now - page.logged >= MINUTE}
                for name, page in due.items():
                    page.logged = now
                    self.stream.write(line(name, page, now) + "\n")
            self.stream.flush()

    def say(self, text: str, stream: TextIO) -> None:
        """Write a text to a stream, above the lines of the pages."""
        with self._lock:
            if self.in_place:
                self.stream.write("\r\x1b[J")
                self.stream.flush()
            stream.write(text)
            stream.flush()
            if text.endswith("\n") and self.running:
                self.draw()

    def summary(self) -> str:
        """Return a line for each page that ended, with its time."""
        ended = sorted(self.seconds.items())
        return "".join(f"{name}  {minutes(seconds)}\n" for name, seconds in ended)

    def _tick(self) -> None:
        while True:
            with self._lock:
                if not self.running:
                    self._ticker = None
                    return
                self.draw()
            time.sleep(1)


def line(name: str, page: Running, now: float) -> str:
    """Return a page's line: its name, the cell that runs, and the time since it began."""
    return f"{name}  cell {page.cell} of {page.cells}  {minutes(now - page.began)}"


def minutes(seconds: float) -> str:
    """Return a time as minutes and seconds, such as 3:07."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


progress = Progress()


class Reporter(ConsoleReporter):
    """doit's output, above the lines of the pages that run, and behind it the time of each page."""

    desc = "progress of the pages"

    def write(self, text: str) -> None:
        progress.say(text, self.outstream)

    def complete_run(self) -> None:
        super().complete_run()
        if progress.seconds:
            self.write(progress.summary())
