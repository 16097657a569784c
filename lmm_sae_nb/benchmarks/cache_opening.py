"""Measure how long it takes to open a cache of the paper's size and to read one latent's top images and patch maps.

`python -m lmm_sae_nb.benchmarks cache-opening` writes book/cache_opening.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lmm_sae_nb.benchmarks.comparison import circumstances
from lmm_sae_nb.cache.latent_cache import LatentCache, write_cache
from lmm_sae_nb.cache.top_images import Ranking
from lmm_sae_nb.support.files import project_root, write_json


def measure(
    *, n_latents: int = 131_072, n_top: int = 5, side: int = 24, images: int = 46_684, latents: int = 50, seed: int = 0
) -> dict[str, float]:
    """Measure the milliseconds from a closed file to one latent's images and maps.

    n_latents, n_top, side, images: size of the made-up cache; a patch map has side x side patches.
    latents: how many are read, at random.
    seed: of the cache's content and of the choice of latents.

    Returns: cold_* with the file's pages dropped from the system's memory before each read, warm_median without.
    """
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        described = {"images": images, "patches": side**2, "grid": (side, side), "layer": 0, "model": "", "skipped": [],
                     "store": None}  # fmt: skip
        write_cache(Path(folder), n_latents, n_top, described, _made_up(n_latents, n_top, side**2, images, rng))
        file = Path(folder) / "cache.safetensors"
        os.sync()
        chosen = [int(latent) for latent in rng.choice(n_latents, latents, replace=False)]
        _milliseconds(folder, chosen[0])  # not counted: Python loads modules, and the file is checked
        cold = [_drop(file) or _milliseconds(folder, latent) for latent in chosen]
        for latent in chosen:  # not counted: the last drop emptied the memory for all of them
            _milliseconds(folder, latent)
        warm = [_milliseconds(folder, latent) for latent in chosen]
        return {
            "latents": n_latents, "n_top": n_top, "patches": side**2, "megabytes": file.stat().st_size / 1e6,
            "read": latents, "cold_median": statistics.median(cold), "cold_highest": max(cold),
            "within_5_ms": sum(ms <= 5 for ms in cold) / latents, "warm_median": statistics.median(warm),
        }  # fmt: skip


def _made_up(n_latents: int, n_top: int, patches: int, images: int, rng: np.random.Generator) -> Iterator:
    for start in range(0, n_latents, 4096):
        ranking = Ranking.empty(min(4096, n_latents - start), n_top, patches)
        ranking.means[:] = rng.random(ranking.means.shape)
        ranking.images[:] = rng.integers(0, images, ranking.images.shape)
        ranking.patches[:] = rng.random(ranking.patches.shape, np.float32)
        yield start, ranking


def _drop(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def _milliseconds(folder: str, latent: int) -> float:
    began = time.perf_counter()
    cache = LatentCache.load(folder)
    maps = [cache.patch_map(latent, rank) for rank, _ in enumerate(cache.top(latent))]
    seconds = time.perf_counter() - began
    if len(maps) != cache.n_top or not all(bool(patches.any()) for patches in maps):
        raise RuntimeError(f"latent {latent} was not read")
    return 1000 * seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this command's options to a parser; it has none."""


def main(options: argparse.Namespace) -> None:
    """Run the command."""
    record = circumstances() | measure()
    write_json(project_root() / "book" / "cache_opening.json", record)
    print(json.dumps(record, indent=2))
