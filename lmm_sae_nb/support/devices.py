"""Where models are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DEFAULT = "cuda" if torch.cuda.is_available() else "cpu"


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device of this name; without a name a GPU if there is one, else the CPU."""
    return torch.device(name or DEFAULT)


def tolerance(dtype: torch.dtype) -> float:
    """Return how far two ways to compute an activation may be apart, relative to the highest one.

    In 16 bits TopK may keep another latent where two are nearly equal.

    dtype: of the model.
    """
    return {torch.bfloat16: 0.1, torch.float16: 0.01}.get(dtype, 0.001)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done its work, as before a clock is read: Python goes on while a GPU works."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def allow_tf32(on: bool, device: torch.device) -> Iterator[None]:
    """Let a GPU round the factors of float32 products to TF32 inside the `with`, or not; a CPU computes as before.

    TF32 keeps 10 bits behind the first one, where float32 keeps 23. An A100 multiplies with it eight times as fast.
    """
    settings, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    if device.type == "cuda":
        settings.allow_tf32 = on
    try:
        yield
    finally:
        if device.type == "cuda":
            settings.allow_tf32 = before
