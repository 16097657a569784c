"""One run at a time works on a folder; a run that was killed holds nothing."""

import errno
import os
import re
import signal
import socket
import time

import pytest
from forks import started

from lmm_sae_nb.support import locks
from lmm_sae_nb.support.locks import LOCK, FolderInUse, clear_left, hold, keep, let_go


def _hold_for_ever(folder):
    with hold(folder):
        time.sleep(60)


def _wait_for(folder):
    while not (folder / LOCK).is_file() or not (folder / LOCK).read_text():
        time.sleep(0.001)


def test_the_second_run_is_refused_with_the_time_process_and_host_of_the_first(tmp_path):
    process, end = started(_hold_for_ever, tmp_path)
    _wait_for(tmp_path)
    with pytest.raises(FolderInUse) as error, hold(tmp_path):
        pass
    who = rf"since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d.* \(process {process.pid} on {re.escape(socket.gethostname())}\)"
    assert re.fullmatch(
        rf"another run holds {re.escape(str(tmp_path))} {who}; wait for it, or delete .*\.lock if that process is gone",
        str(error.value),
    )
    os.kill(process.pid, signal.SIGKILL)  # as a crash
    process.join()
    end.close()
    with hold(tmp_path):
        assert f'"process": {os.getpid()}' in (tmp_path / LOCK).read_text()
    assert not list(tmp_path.iterdir())


def test_an_error_releases_the_folder(tmp_path):
    with pytest.raises(KeyError), hold(tmp_path / "new"):
        raise KeyError
    with hold(tmp_path / "new"), pytest.raises(FolderInUse), hold(tmp_path / "new"):
        pass


def test_a_lock_deleted_by_hand_is_free(tmp_path):
    process, end = started(_hold_for_ever, tmp_path)
    _wait_for(tmp_path)
    (tmp_path / LOCK).unlink()
    with hold(tmp_path):
        pass
    process.kill()
    process.join()
    end.close()


def test_a_disk_without_locks_is_named_and_used(tmp_path, monkeypatch):
    def no_locks(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.FileLock, "acquire", no_locks)
    with pytest.warns(UserWarning, match="knows no locks; do not start a second run there"), hold(tmp_path / "new"):
        (tmp_path / "new" / "made").touch()
    monkeypatch.undo()
    with hold(tmp_path / "new"):
        pass


def _kept_by_another(folder, gate):
    keep(folder)
    gate.touch()
    time.sleep(60)


def test_a_kept_folder_is_refused_to_others_and_not_to_its_own_process(tmp_path):
    keep(tmp_path)
    keep(tmp_path)  # a cell that is run again
    let_go(tmp_path)
    let_go(tmp_path)
    assert not list(tmp_path.iterdir())
    process, end = started(_kept_by_another, tmp_path, tmp_path / "kept")
    while not (tmp_path / "kept").exists():
        time.sleep(0.001)
    with pytest.raises(FolderInUse, match=f"process {process.pid} "):
        keep(tmp_path)
    process.kill()
    process.join()
    end.close()
    keep(tmp_path)
    let_go(tmp_path)


def test_the_lock_of_a_killed_process_is_cleared_and_one_that_is_held_is_not(tmp_path):
    (tmp_path / LOCK).write_text("of a process that is gone")
    clear_left(tmp_path)
    assert not (tmp_path / LOCK).exists()
    with hold(tmp_path):
        clear_left(tmp_path)
        assert (tmp_path / LOCK).exists()
    clear_left(tmp_path / "no folder")
