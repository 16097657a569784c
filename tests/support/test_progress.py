"""Progress bars say how far work is, also where there is no screen to draw on."""

import io
import sys

from lmm_sae_nb.support.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_whole_lines_and_no_control_characters(capsys):
    for _ in progress_bar(progress_bar(range(5), desc="outer"), desc="inner"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert all(line.isprintable() and line.strip() for line in lines)
    assert {line.split(" [")[0] for line in lines} == {"outer: 0/5", "inner: 0/5", "outer: 5/5", "inner: 5/5"}


def test_a_log_gets_no_line_for_each_step(capsys):
    for _ in progress_bar(range(10_000), desc="steps"):
        pass
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_disabled_bar_writes_nothing(capsys):
    assert list(progress_bar(range(3), disable=True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_in_place(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in progress_bar(range(3), desc="steps"):
        pass
    assert "\r" in sys.stderr.getvalue() and "3/3" in sys.stderr.getvalue()
