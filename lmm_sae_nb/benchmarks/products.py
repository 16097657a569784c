"""How long oneDNN takes for the linear layers of a frozen model, and torch's own way (`lmm_sae_nb.model.frozen`).

`python -m lmm_sae_nb.benchmarks.products` writes book/products.json.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from lmm_sae_nb.benchmarks.comparison import circumstances
from lmm_sae_nb.model.frozen import frozen, onednn_is_faster, plain_products
from lmm_sae_nb.support.files import project_root, write_json

SHAPES = {  # rows, width in, width out
    "Picture World, attention": (320, 256, 256),
    "Picture World, MLP": (320, 256, 576),
    "the same, 16 samples": (5120, 256, 576),
    "LLaMA3-8B, attention": (512, 4096, 4096),
}


def measure(turns: int = 21) -> list[dict[str, object]]:
    """Of each shape the median milliseconds of a product by oneDNN and of torch's own, taken in turns, and the median
    of their ratios, which a busy machine changes less. RuntimeError where torch's own is all there is.

    What oneDNN prepares for a number of rows it keeps for the next time; the last row tells what numbers cost that it
    has not met before.
    """
    if not onednn_is_faster():
        raise RuntimeError("on this processor the linear layers are left to torch, and there is nothing to compare")
    rows = [_row(name, [tokens] * turns, wide, out) for name, (tokens, wide, out) in SHAPES.items()]
    name, (tokens, wide, out) = "Picture World, MLP, a new number of rows every time", SHAPES["Picture World, MLP"]
    return [*rows, _row(name, range(tokens - 2 * turns, tokens - turns), wide, out, warm=False)]


def _row(name: str, numbers: Sequence[int], wide: int, out: int, warm: bool = True) -> dict[str, object]:
    layer = frozen(nn.Linear(wide, out, bias=False))
    inputs = [torch.randn(rows, wide) for rows in numbers]
    repeats = max(1, 2**30 // (inputs[0].numel() * out)) if warm else 1
    if warm:
        _seconds(layer, inputs[0], 1)
    turns = [(_seconds(layer, x, repeats), _plain_seconds(layer, x, repeats)) for x in inputs]
    ours, torchs = (1000 * statistics.median(seconds) for seconds in zip(*turns, strict=True))
    ratio = statistics.median(mine / theirs for mine, theirs in turns)
    return {"layer": name, "rows": max(numbers), "in": wide, "out": out,
            "onednn_ms": ours, "torch_ms": torchs, "ratio": ratio}  # fmt: skip


def _seconds(layer: nn.Module, x: torch.Tensor, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        layer(x)
    return (time.perf_counter() - began) / repeats


def _plain_seconds(layer: nn.Module, x: torch.Tensor, repeats: int) -> float:
    with plain_products():
        return _seconds(layer, x, repeats)


def main() -> None:
    torch.set_num_threads(1)
    found = circumstances() | {"results": measure()}
    write_json(project_root() / "book" / "products.json", found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
