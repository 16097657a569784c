"""Choose the latents that the explainer is asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64
from PIL import Image

from lmm_sae_nb.cache.encode_images import base_latents
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.support.files import existing, project_root
from lmm_sae_nb.support.images import open_rgb

WAYS = ("random", "most active", "images")


def choose_latents(
    cache: LatentCache, pictures: Sequence[Image.Image], count: int, asked: Mapping[str, object], *, seed: int,
    load: Callable[[], SAEInPlace],
) -> Int64[np.ndarray, " chosen"]:  # fmt: skip
    """Return the numbers of at most `count` latents that are live in a cache, ascending.

    cache: of one SAE.
    pictures: the images that were cached, by number.
    asked: `by`, one of WAYS. "random" draws latents. "most active" takes those of the highest mean activation over all
        base tokens of the cache. "images" takes those of the highest mean activation over the base tokens of the given
        `images`: numbers of pictures, or files. A latent that is silent on all of them is not taken.
    seed: of the random choice.
    load: loads the SAE in its place; called only for "images".

    Raises:
        ValueError: `by` is none of WAYS, or images are given for another way, or none for "images".
        IndexError, FileNotFoundError, UnreadableImage: there is no such image, or it cannot be read.
    """
    by, images = asked["by"], asked["images"]
    if by not in WAYS or (by == "images") != bool(images):
        raise ValueError(
            f"latents are chosen by {by!r} with the images {images}; choose {', '.join(map(repr, WAYS[:-1]))} without "
            "images, or 'images' with numbers of cached images or files"
        )
    live = np.flatnonzero(cache.live)
    if by == "random":
        return np.sort(np.random.default_rng(seed).choice(live, min(count, len(live)), replace=False))
    if by == "images":
        activity = mean_activations(load(), [_open(image, pictures) for image in images])
    else:
        activity = (cache.frequency * cache.mean).numpy()
    best = live[np.argsort(-activity[live], kind="stable")]
    return np.sort(best[activity[best] > 0][:count])


def mean_activations(place: SAEInPlace, images: Sequence[Image.Image]) -> Float[np.ndarray, " latents"]:
    """Return each latent's mean activation over the base tokens of all these images.

    Raises:
        ValueError, UnreadableImage: as `base_latents`.
    """
    sums, tokens = np.zeros(place.sae.n_latents), 0
    for latents in base_latents(place, images):
        np.add.at(sums, latents.indices.numpy().ravel(), latents.acts.double().numpy().ravel())
        tokens += latents.acts[..., 0].numel()
    return sums / tokens


def _open(image: object, pictures: Sequence[Image.Image]) -> Image.Image:
    """Open a picture by its number in the cache or by its file's path, from the project's root or absolute."""
    if isinstance(image, int):
        if not 0 <= image < len(pictures):
            raise IndexError(f"no image {image}: {len(pictures)} were cached, numbered from 0")
        return pictures[image]
    file = existing(project_root(), image) or Path(image)
    if not file.is_file():
        raise FileNotFoundError(f"{image} is no file; give a picture's path from the root, or its number in the cache")
    return open_rgb(file, str(image))
