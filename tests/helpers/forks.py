"""Functions run in forked processes of their own: nothing is imported again, and what they leave behind is gone."""

import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context

import torch


def _quietly(fn: Callable, out, args, kwargs) -> None:
    torch.set_num_threads(1)  # the parent's threads are not there
    try:
        out.send(fn(*args, **kwargs))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def started(fn: Callable, *args, **kwargs):
    """The running process, and the end of a pipe at which the result arrives."""
    context = get_context("fork")
    end, out = context.Pipe(duplex=False)
    process = context.Process(target=_quietly, args=(fn, out, args, kwargs))
    process.start()
    out.close()
    return process, end


def killed(after: float, fn: Callable, *args, **kwargs) -> bool:
    """Run `fn` in a forked process and kill it with SIGKILL after so many seconds; whether it had not ended before."""
    process, end = started(fn, *args, **kwargs)
    time.sleep(after)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    end.close()
    return process.exitcode == -signal.SIGKILL
