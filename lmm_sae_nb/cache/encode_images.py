"""Encode images: run the model up to the layer, keep the base tokens, encode them with the SAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lmm_sae_nb.model.hookpoints import Hookpoint, titled
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.prompts import Prompt, prepared
from lmm_sae_nb.model.token_kinds import NoPatchGrid
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import Latents
from lmm_sae_nb.support.ahead import ahead
from lmm_sae_nb.support.conversions import conversions, count_conversions
from lmm_sae_nb.support.images import UnreadableImage
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.tensor_files import require_finite

Pictures = Sequence[Image.Image]
Openers = dict[int, Callable[[], Image.Image]]  # an image's number to a call that opens it


class Batch(NamedTuple):
    """The images that go through the model at once."""

    number: int
    images: list[int]  # their numbers, ascending
    skipped: dict[int, str]  # number of an image that cannot be read, to its name and fault
    prompt: Prompt | None  # None if no image could be read
    converted: dict[str, int]  # how many were converted to 8-bit RGB, as `count_conversions` says it


def batches_of(
    images: Pictures, size: int, wanted: Callable[[int], bool] = lambda _: True
) -> Iterator[tuple[int, Openers]]:
    """Yield the numbers of the wanted batches with their images, not yet opened.

    size: batch b holds images b * size to (b + 1) * size - 1.
    wanted: called with the number of a batch.
    """
    for batch in filter(wanted, range(-(-len(images) // size))):
        numbers = range(batch * size, min((batch + 1) * size, len(images)))
        yield batch, {number: partial(images.__getitem__, number) for number in numbers}


def opened_batches(
    lmm: LMM, batches: Iterator[tuple[int, Openers]], *, skip: bool = False, workers: int = 1
) -> Iterator[Batch]:
    """Yield batches in order, opened and processed in threads while the model encodes the last one.

    skip: as of `open_batch`, whose errors are raised.
    workers: threads, each with one batch in memory; 0 opens a batch when it is wanted.
    """
    tools = lmm.copies(workers) if workers > 1 else [lmm]
    return ahead(partial(open_batch, skip=skip), batches, workers, tools)


def open_batch(lmm: LMM, number: int, openers: Openers, *, skip: bool = False) -> Batch:
    """Open the images of a batch and make their prompts: each image alone, in the chat template.

    skip: leave out images that cannot be read, or that the processor refuses.

    Raises:
        UnreadableImage: there is such an image, without `skip`.
    """
    images, skipped, prompt = list(openers), {}, None
    done: dict[int, tuple[str, ...]] = {}

    def opened(image: int) -> Image.Image:
        picture = prepared(openers[image](), None)
        done[image] = conversions(picture)
        return picture

    while images and prompt is None:
        try:
            prompt = lmm.prompt([""] * len(images), [partial(opened, image) for image in images])
        except UnreadableImage as fault:
            if not skip or fault.position is None:
                raise
            skipped[images.pop(fault.position)] = f"{fault.name}: {fault.reason}"
    return Batch(number, images, skipped, prompt, count_conversions(done[image] for image in images))


@torch.no_grad()
def batch_states(
    lmm: LMM, layers: Sequence[Hookpoint], batch: Batch
) -> dict[Hookpoint, Float[Tensor, "images patches width"]]:
    """Return for each layer its output at the base tokens; the model runs once.

    Attention is causal, so nothing behind the last base token is computed, and tiles behind it are not looked at.

    layers: 0-based, or other hookpoints; at least one.
    batch: with at least one image.

    Raises:
        ValueError: images differ in the number of base tokens, or hidden states are not finite.
    """
    hidden = lmm.hidden_states(batch.prompt, list(layers), base_only=True)
    base = batch.prompt.mask("base")
    counts = set(base.sum(1).tolist())
    require_one_count(counts)
    tokens = {
        layer: states[base[:, : states.shape[1]]].reshape(len(base), *counts, -1) for layer, states in hidden.items()
    }
    for layer, states in tokens.items():
        require_finite(states, f"images {batch.images[0]} to {batch.images[-1]}, {titled(layer)}")
    return tokens


@torch.no_grad()
def encode_batch(places: Mapping[str, SAEInPlace], batch: Batch) -> dict[str, Latents]:
    """Return for each SAE the latents (images, patches, k) of the base tokens; the model runs once.

    places: at least one; all with the same model.
    batch: with at least one image.

    Raises:
        ValueError: as `batch_states`, or activations are not finite.
    """
    lmm = next(iter(places.values())).lmm
    tokens = batch_states(lmm, [place.layer for place in places.values()], batch)
    encoded = {name: place.sae.encode(tokens[place.layer]) for name, place in places.items()}
    for name, latents in encoded.items():
        require_finite_latents(latents, name)
    return encoded


def require_finite_latents(latents: Latents, name: str = "") -> None:
    """Raise ValueError if an SAE gives activations that are NaN or infinite; its input is finite.

    name: of the SAE.
    """
    if not bool(latents.acts.isfinite().all()):
        raise ValueError(
            f"the SAE{f' {name}' if name else ''} gives activations that are NaN or infinite: its weights hold such "
            "numbers, or its products overflow; train it again with a lower lr, or load it in float32"
        )


def require_one_count(counts: set[int]) -> None:
    """Check that all images have the same number of base tokens.

    Raises:
        ValueError: they differ; the message says what to do.
    """
    if len(counts) > 1:
        raise ValueError(
            f"images have {sorted(counts)} base tokens; bring them to one size: LMM.load(name, image_size=(448, 448))"
        )


def base_states(
    lmm: LMM, layer: Hookpoint, images: Pictures, batch_size: int = 16
) -> Float[Tensor, "images patches width"]:
    """Return a layer's output at the base tokens of images, float32, on the CPU: all that an SAE there can read.

    The prompt is the image alone, in the chat template.

    layer: 0-based, or another hookpoint.

    Raises:
        ValueError: there are no images, or as `batch_states`.
        UnreadableImage: an image cannot be read.
    """
    batches = opened_batches(lmm, batches_of(images, batch_size))
    parts = [batch_states(lmm, [layer], batch)[layer].float().cpu() for batch in batches]
    if not parts:
        raise ValueError("there are no images to read hidden states of; give at least one")
    require_one_count({part.shape[1] for part in parts})
    return torch.cat(parts)


def base_latents(
    place: SAEInPlace, images: Pictures, batch_size: int = 16, title: str | None = None
) -> Iterator[Latents]:
    """Yield the latents (batch, patches, k) of the base image tokens, on the CPU, a batch of images at a time.

    The prompt is the image alone, in the chat template.

    title: of a progress bar; there is none without it.

    Raises:
        ValueError: as `encode_batch`.
        UnreadableImage: an image cannot be read.
    """
    counts = set()
    batches = opened_batches(place.lmm, batches_of(images, batch_size))
    with progress_bar(desc=title, total=len(images), unit=" images", disable=title is None) as bar:
        for batch in batches:
            latents = encode_batch({"": place}, batch)[""]
            counts.add(latents.acts.shape[1])
            require_one_count(counts)
            yield Latents(*(part.cpu() for part in latents))
            bar.update(len(batch.images))


@torch.no_grad()
def activation_maps(
    place: SAEInPlace, images: Pictures, latents: Sequence[int], batch_size: int = 16
) -> Float[np.ndarray, "images latents rows cols"]:
    """Return the activations of the given latents on the base patches of the given images.

    Raises:
        NoPatchGrid: the model has no grid of patches.
        ValueError: as `encode_batch`.
    """
    lmm, sae = place.lmm, place.sae
    if lmm.grid is None:
        raise NoPatchGrid(f"{lmm.name} has no patch grid, so there are no maps to make; use mean activations instead")
    column = torch.full((sae.n_latents,), -1)
    column[torch.as_tensor(latents)] = torch.arange(len(latents))
    maps = torch.cat([_dense(part, column, len(latents)) for part in base_latents(place, images, batch_size)])
    return maps.unflatten(-1, lmm.grid).numpy()


def _dense(latents: Latents, column: Tensor, columns: int) -> Float[Tensor, "batch columns patches"]:
    """Return the activations of the latents that have a column (-1: none) as rows of patches."""
    wanted = column[latents.indices]
    image, patch, slot = torch.nonzero(wanted >= 0, as_tuple=True)
    out = torch.zeros(latents.acts.shape[0], columns, latents.acts.shape[1])
    out[image, wanted[image, patch, slot], patch] = latents.acts[image, patch, slot].float()
    return out
