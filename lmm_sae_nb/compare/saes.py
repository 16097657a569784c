"""Train and cache several SAEs of one model, all in one pass over it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from PIL import Image

from lmm_sae_nb.cache.activations import cache_several
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.interpret.exemplars import ExemplarsByLatent
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.support.intervals import Mean
from lmm_sae_nb.train.evaluate import evaluate_saes, fvu_differences
from lmm_sae_nb.train.training import Recipe, train_saes


class CachedSAE(NamedTuple):
    """An SAE at its layer, with the cache of its latents.

    skipped: number of a training sample that could not be read to the name and fault of its picture.
    converted: how many pictures of training samples were converted to 8-bit RGB, as `count_conversions` says it.
    """

    place: SAEInPlace
    cache: LatentCache
    skipped: Mapping[int, str] = MappingProxyType({})
    converted: Mapping[str, int] = MappingProxyType({})

    def live_latents(self, seed: int) -> list[int]:
        """Return the latents that an image excites, in random order."""
        return np.random.default_rng(seed).permutation(np.flatnonzero(self.cache.live)).tolist()

    def exemplars(self, images: Sequence[Image.Image], **settings) -> ExemplarsByLatent:
        """Return each latent's exemplars.

        images: that were cached.
        settings: n_top, threshold and dim of `interpret.exemplars.exemplars`.
        """
        return ExemplarsByLatent(self.cache, images, **settings)


@contextmanager
def awake(*places: SAEInPlace) -> Iterator[None]:
    """Have these SAEs on the devices of their layers inside the `with`; afterwards they are back where they rested."""
    before = [place.sae.W_dec.device for place in places]
    for place in places:
        place.sae.to(place.device)
    try:
        yield
    finally:
        for place, device in zip(places, before, strict=True):
            place.sae.to(device)


def evaluate_awake(places: Mapping[str, SAEInPlace], samples: Sequence[Mapping]) -> dict[str, dict[str, float]]:
    """Evaluate SAEs that may rest on the CPU, as `evaluate_saes` does."""
    with awake(*places.values()):
        return evaluate_saes(places, samples)


def compare_fvus(places: Mapping[str, SAEInPlace], samples: Sequence[Mapping]) -> dict[str, Mean]:
    """Compare the FVU of SAEs of one layer that may rest on the CPU, as `fvu_differences` does."""
    with awake(*places.values()):
        return fvu_differences(places, samples)


def size_recipes(middle: Recipe, sizes: Iterable[int], ks: Iterable[int]) -> dict[str, Recipe]:
    """Return the recipes of SAEs that differ from `middle` in one size, as n_LATENTS and k_K.

    sizes: numbers of latents; the middle's is left out.
    ks: numbers of active latents per token; the middle's is left out.
    """
    by_n = {f"n_{n}": replace(middle, n_latents=n) for n in sizes if n != middle.n_latents}
    return by_n | {f"k_{k}": replace(middle, k=k) for k in ks if k != middle.k}


def kind_recipes(middle: Recipe, kinds: Iterable[str]) -> dict[str, Recipe]:
    """Return the recipes of SAEs that differ from `middle` in the kind of training alone, by kind.

    kinds: names in `train.kinds.KINDS`; the middle's is left out.
    """
    return {kind: replace(middle, kind=kind) for kind in kinds if kind != middle.kind}


def names_by_size(recipes: Mapping[str, Recipe], middle: Recipe, size: str) -> dict[int, str]:
    """Return the names of the SAEs that differ from `middle` in this size alone, and of `middle`, by size.

    size: "n_latents" or "k".
    """
    by_size = {}
    for name, recipe in recipes.items():
        value = getattr(recipe, size)
        if replace(middle, **{size: value}) == recipe:
            by_size[value] = name
    return dict(sorted(by_size.items()))


def train_and_cache(
    lmm: LMM, recipes: Mapping[str, Recipe], samples: Sequence[Mapping], images: Sequence[Image.Image], *,
    folder: str | Path, n_top: int = 5, unreadable: str = "refuse", at_once: int = 0, tf32: bool = True,
    workers: int = 1, **training,
) -> dict[str, CachedSAE]:  # fmt: skip
    """Train an SAE by each recipe and cache its latents: a pass over the samples, and one over the images.

    Each SAE and each cache is the one that it would be alone. A run that was stopped continues; what is complete is
    only read.

    recipes: by the name of the SAE's folder.
    samples: rows with image, question and answer.
    images: to cache.
    folder: gets a folder for each SAE, with its weights and its cache.
    n_top: images kept for each latent.
    unreadable: "skip" leaves out samples and images that cannot be read; "refuse" stops there.
    at_once: SAEs that learn in one pass, and then are cached in one; 0 stands for all. A GPU's memory limits it. With
        a number, each SAE rests on the CPU once it is cached, so that only those in training take memory (`awake`).
    tf32, workers: as of `train_saes` and `cache_several`.
    training: settings of `train_saes`.
    """
    studied, names = {}, list(recipes)
    both = {"folder": folder, "unreadable": unreadable, "tf32": tf32, "workers": workers}
    for start in range(0, len(names), at_once or len(names)):
        some = {name: recipes[name] for name in names[start : start + (at_once or len(names))]}
        trained = train_saes(lmm, samples, some, **both, **training)
        places = {
            name: SAEInPlace(lmm, result.sae.requires_grad_(False), some[name].layer)
            for name, result in trained.items()
        }
        caches = cache_several(places, images, n_top=n_top, **both)
        for place in places.values() if at_once else ():
            place.sae.to("cpu")
        studied |= {
            name: CachedSAE(place, caches[name], trained[name].skipped, trained[name].converted)
            for name, place in places.items()
        }
    return studied
