"""How long oneDNN takes for the linear layers of a frozen model, and torch's own way (`lmm_sae_nb.frozen`).

`python -m lmm_sae_nb.benchmarks.products` writes book/products.json.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lmm_sae_nb.artifacts import project_root, write_json
from lmm_sae_nb.benchmarks.comparison import circumstances
from lmm_sae_nb.frozen import frozen, plain_products

SHAPES = {  # rows, width in, width out
    "Picture World, attention": (320, 256, 256),
    "Picture World, MLP": (320, 256, 576),
    "the same, 16 samples": (5120, 256, 576),
    "LLaMA3-8B, attention": (512, 4096, 4096),
}


def measure(turns: int = 21) -> list[dict[str, object]]:
    """Of each shape the median milliseconds on one thread of a product by oneDNN and of torch's own, taken in turns,
    and the median of their ratios, which a busy machine changes less."""
    torch.set_num_threads(1)
    rows = []
    for name, (tokens, wide, out) in SHAPES.items():
        layer, x = frozen(nn.Linear(wide, out, bias=False)), torch.randn(tokens, wide)
        pairs = [(_milliseconds(layer, x), _plain(layer, x)) for _ in range(turns + 1)][1:]
        ours, torchs = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        rows.append({"layer": name, "rows": tokens, "in": wide, "out": out,
                     "onednn_ms": ours, "torch_ms": torchs, "ratio": ratio})  # fmt: skip
    return rows


def _milliseconds(layer: Callable, x: torch.Tensor) -> float:
    repeats = max(1, 2**30 // (x.numel() * layer.out_features))
    began = time.perf_counter()
    for _ in range(repeats):
        layer(x)
    return 1000 * (time.perf_counter() - began) / repeats


def _plain(layer: Callable, x: torch.Tensor) -> float:
    with plain_products():
        return _milliseconds(layer, x)


def main() -> None:
    found = circumstances() | {"results": measure()}
    write_json(project_root() / "book" / "products.json", found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
