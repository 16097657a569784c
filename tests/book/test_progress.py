"""A build says how far it is: in place on a terminal, a line a minute in a log, and each page's time at the end."""

import io
import re

import pytest

from book.progress import Progress, minutes


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """A clock that stands still until a test moves it."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def screen(text: str) -> list[str]:
    """The lines that a terminal shows after this text, with the three control sequences that are used."""
    rows, at = [""], 0
    for part in re.findall(r"\x1b\[\d*[AJ]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\n":
            at += 1
            rows += [""] * (at + 1 - len(rows))
        elif part.endswith("A") and part[0] == "\x1b":
            at -= int(part[2:-1])
        elif part == "\x1b[J":
            rows[at:] = [""]
        elif part != "\r":
            rows[at] += part
    return [row for row in rows if row]


def test_on_a_terminal_each_running_page_has_one_line_below_all_other_output(clock):
    terminal = Terminal()
    progress = Progress(terminal, clock)
    with progress.page("06_steer", 30) as cell, progress.page("07_attribute", 20):
        for _ in range(3):
            cell()
        clock.now += 65
        progress.draw()
        progress.say(".  page:A2\n", terminal)
        assert screen(terminal.getvalue()) == [
            ".  page:A2",
            "06_steer  cell 3 of 30  1:05",
            "07_attribute  cell 0 of 20  1:05",
        ]
    assert screen(terminal.getvalue()) == [".  page:A2"]


def test_in_a_log_each_running_page_has_a_line_a_minute_without_control_characters(clock):
    log = io.StringIO()
    progress = Progress(log, clock)
    with progress.page("06_steer", 30) as cell:
        for _ in range(150):  # seconds
            clock.now += 1
            cell()
            progress.draw()
    assert log.getvalue() == "06_steer  cell 60 of 30  1:00\n06_steer  cell 120 of 30  2:00\n"


def test_the_summary_has_the_time_of_each_page_also_of_one_that_failed(clock):
    progress = Progress(io.StringIO(), clock)
    with progress.page("02_cache", 10):
        clock.now += 61.2
    with pytest.raises(RuntimeError), progress.page("01_train", 10):
        clock.now += 600
        raise RuntimeError
    assert progress.summary() == "01_train  10:00\n02_cache  1:01\n"


def test_a_time_is_minutes_and_seconds():
    assert [minutes(seconds) for seconds in (0, 59.4, 59.6, 3600)] == ["0:00", "0:59", "1:00", "60:00"]
