"""Prepare the next items in threads while the caller uses the last one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any


def ahead(
    function: Callable, arguments: Iterable[tuple], workers: int = 1, tools: Sequence[object] = ()
) -> Iterator[Any]:
    """Yield the function's results, in the order of its arguments.

    Threads work on at most `workers` items beyond the one that the caller has. An error is raised where its result
    would have come. The arguments themselves are taken in the caller's thread.

    function: called with each item of `arguments`, unpacked.
    workers: threads; 0 computes each result when it is wanted.
    tools: what no two threads may use at once, one for each; the function gets one of them first.
    """
    if workers == 0:
        for each in arguments:
            yield function(*tools[:1], *each)
        return
    free: SimpleQueue = SimpleQueue()
    for tool in tools:
        free.put(tool)

    def work(each: tuple) -> Any:
        if not tools:
            return function(*each)
        tool = free.get()
        try:
            return function(tool, *each)
        finally:
            free.put(tool)

    pool, source, waiting = ThreadPoolExecutor(workers), iter(arguments), deque()
    try:
        is_open = True
        while is_open or waiting:
            while is_open and len(waiting) <= workers:
                try:
                    waiting.append(pool.submit(work, next(source)))
                except StopIteration:
                    is_open = False
                except Exception as error:
                    waiting.append(_failed(error))
                    is_open = False
            if waiting:
                yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _failed(error: Exception) -> Future:
    future: Future = Future()
    future.set_exception(error)
    return future
