"""A training killed with SIGKILL at any moment and started again ends with the bits of one that never was."""

import json
import random
import signal
import time

import pytest
from trainings import children, told, train, train_and_die


@pytest.fixture(scope="module")
def context():
    return children()


@pytest.fixture(scope="module")
def uncut(context, tmp_path_factory):
    """The folder of a training that nothing happened to, how long it took, and its number of fsyncs and renames."""
    folder = tmp_path_factory.mktemp("uncut") / "run"
    run(context, train_and_die, folder, 0)
    began = time.monotonic()
    run(context, train, folder.parent / "again")
    return folder, time.monotonic() - began, json.loads((folder.parent / "calls.json").read_text())


def run(context, job, *args, kill_after=None):
    """A job in a child; how it ended: 0, or minus the signal that killed it."""
    child = context.Process(target=job, args=args)
    child.start()
    child.join(kill_after)
    if child.exitcode is None:
        child.kill()
        child.join()
    return child.exitcode


def test_killed_at_twenty_random_times(context, uncut, tmp_path):
    whole, seconds, _ = uncut
    assert told(whole) == told(whole.parent / "again")
    rng, killed = random.Random(7), 0
    for turn in range(60):
        folder = tmp_path / str(turn)
        while run(context, train, folder, kill_after=rng.uniform(0, 1.1 * seconds)) == -signal.SIGKILL:
            killed += 1
        assert told(folder) == told(whole)
        if killed >= 20:
            return
    pytest.fail(f"only {killed} of the trainings were still running when they were to be killed")


def test_killed_at_every_moment_of_writing(context, uncut, tmp_path):
    whole, _, calls = uncut
    a_checkpoint, the_end = range(calls // 2, calls // 2 + 13), range(calls - 10, calls + 1)
    for die_at in (1, *a_checkpoint, *the_end):
        folder = tmp_path / str(die_at)
        assert run(context, train_and_die, folder, die_at) == -signal.SIGKILL
        assert run(context, train, folder) == 0
        assert told(folder) == told(whole), f"killed at call {die_at} of {calls}"
