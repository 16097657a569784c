"""Let one process at a time work on a folder; the system releases the lock of a process that ends or is killed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}  # the system's numbers for a disk without locks
LOCK, STAGE_LOCK = ".lock", ".stage.lock"  # files of a training or a caching, and of a page's stage
_kept: dict[Path, FileLock] = {}  # by folder


class FolderInUse(OSError):
    """Raised for a folder that another run works on."""


@contextlib.contextmanager
def hold(folder: str | Path) -> Iterator[None]:
    """Hold a folder while the body runs.

    folder: it is made if it is missing, and deleted afterwards if the body has written nothing into it.

    Raises:
        FolderInUse: another run holds it; the message says which and since when.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    lock = _acquired(folder, LOCK)
    try:
        yield
    finally:
        _release(lock)
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def clear_left(folder: str | Path) -> None:
    """Delete the lock that a killed process left in a folder, if there is one; a lock that is held stays."""
    if (Path(folder) / LOCK).exists():
        with contextlib.suppress(OSError), hold(folder):
            pass


def keep(folder: str | Path) -> None:
    """Hold a stage's folder until `let_go`, or until this process ends; it may hold it already.

    Raises:
        FolderInUse: another process holds it.
    """
    path = Path(folder).absolute()
    if path not in _kept:
        _kept[path] = _acquired(path, STAGE_LOCK)


def let_go(folder: str | Path) -> None:
    """Release a folder that `keep` held; do nothing if it was not held."""
    if lock := _kept.pop(Path(folder).absolute(), None):
        _release(lock)


def _acquired(folder: Path, name: str) -> FileLock:
    path = folder.absolute() / name
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FolderInUse(
            f"another run holds {folder} {_holder(path)}; wait for it, or delete {path} if that process is gone"
        ) from error
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in WITHOUT_LOCKS:
            raise
        warnings.warn(f"the disk of {folder} knows no locks; do not start a second run there", stacklevel=4)
        return lock
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    with contextlib.suppress(OSError):
        path.write_text(json.dumps({"since": now, "process": os.getpid(), "host": socket.gethostname()}) + "\n")
    return lock


def _release(lock: FileLock) -> None:
    with contextlib.suppress(OSError):  # before the release: afterwards it may be another's
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _holder(path: Path) -> str:
    """Return since when who holds a lock, as far as its file says."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"since {holder['since']} (process {holder['process']} on {holder['host']})"
    except (OSError, ValueError, KeyError, TypeError):  # the other run has not written it yet
        return "since just now"
