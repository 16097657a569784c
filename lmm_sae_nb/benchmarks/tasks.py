"""Do tasks that wait for each other in a few processes side by side, each with one thread."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A call, and the tasks that must have ended well before.

    call: a function of a module; what it changes is on the disk.
    arguments: plain values.
    after: names of tasks.
    """

    call: Callable
    arguments: tuple = ()
    after: tuple[str, ...] = ()


def do_tasks(tasks: Mapping[str, Task], jobs: int, on_end: Callable[[str, Exception | None], object]) -> dict[str, str]:
    """Do the tasks, those that come first in the mapping first; one that failed stops only those that wait for it.

    tasks: by name.
    jobs: processes; 0 works in this process.
    on_end: called with a task's name and its error, or None.

    Returns: why each of the tasks failed that did.

    Raises:
        ValueError: a task waits for one that is not there, or tasks wait for each other in a circle.
    """
    failed: dict[str, str] = {}
    waiting, done = dict(tasks), set()
    if unknown := {name for task in tasks.values() for name in task.after} - tasks.keys():
        raise ValueError(f"tasks wait for {sorted(unknown)}, which are not among them; add these")
    executor = _Here() if jobs == 0 else _processes(jobs)
    running: dict[Future, str] = {}

    def end(name: str, error: Exception | None) -> None:
        if error is None:
            done.add(name)
        else:
            failed[name] = f"{type(error).__name__}: {error}"
        on_end(name, error)

    with executor as pool:
        while waiting or running:
            for name, task in list(waiting.items()):
                if broken := [each for each in task.after if each in failed]:
                    del waiting[name]
                    end(name, RuntimeError(f"{broken[0]} failed"))
                elif len(running) < max(jobs, 1) and done.issuperset(task.after):
                    del waiting[name]
                    running[pool.submit(task.call, *task.arguments)] = name
            if not running and waiting and not any(set(task.after) & failed.keys() for task in waiting.values()):
                raise ValueError(f"tasks {sorted(waiting)} wait for each other; remove the circle")
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                end(running.pop(future), future.exception())
    return failed


def _processes(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_one_thread)


def _one_thread() -> None:
    """Let this process use one thread, so that processes do not disturb each other."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


class _Here:
    """An executor that works in this process, at once."""

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_) -> None:
        pass

    def submit(self, call: Callable, *arguments) -> Future:
        future: Future = Future()
        try:
            future.set_result(call(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future
