"""A training killed with SIGKILL at any moment and started again ends with the same bits as one without a kill."""

import json
import random
import signal
import time

import pytest
from trainings import run, told, train, train_and_die

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    """The folder of a training that nothing happened to, how long it took, and its number of fsyncs and renames."""
    folder = tmp_path_factory.mktemp("uncut") / "run"
    run(train_and_die, folder, 0)
    began = time.monotonic()
    run(train, folder.parent / "again")
    return folder, time.monotonic() - began, json.loads((folder.parent / "calls.json").read_text())


def test_killed_at_twenty_random_times(uncut, tmp_path):
    whole, seconds, _ = uncut
    assert told(whole) == told(whole.parent / "again")
    rng, killed = random.Random(7), 0
    for turn in range(60):
        folder = tmp_path / str(turn)
        while run(train, folder, kill_after=rng.uniform(0, 1.1 * seconds)) == -signal.SIGKILL:
            killed += 1
        assert told(folder) == told(whole)
        if killed >= 20:
            return
    pytest.fail(f"only {killed} of the trainings were still running when they were to be killed")


def test_killed_at_every_moment_of_writing(uncut, tmp_path):
    whole, _, calls = uncut
    a_checkpoint, the_end = range(calls // 2, calls // 2 + 13, 2), range(calls - 10, calls + 1, 2)
    for die_at in (1, *a_checkpoint, *the_end):
        folder = tmp_path / str(die_at)
        assert run(train_and_die, folder, die_at) == -signal.SIGKILL
        assert run(train, folder) == 0
        assert told(folder) == told(whole), f"killed at call {die_at} of {calls}"
