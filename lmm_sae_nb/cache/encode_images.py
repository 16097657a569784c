"""Encode images: run the model up to the layer, keep the base tokens, encode them with the SAE."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lmm_sae_nb.cache.resume import uneven
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.prompts import Prompt
from lmm_sae_nb.model.token_kinds import NoPatchGrid
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import Latents, TopKSAE
from lmm_sae_nb.support.images import UnreadableImage
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.tensor_files import require_finite

Pictures = Sequence[Image.Image]
Studied = tuple[TopKSAE, int]  # an SAE, and the layer that it reads


class _Batch(NamedTuple):
    """Images of one forward: their numbers, and by number the name and fault of those that cannot be read."""

    number: int
    images: list[int]
    skipped: dict[int, str]
    prompt: Prompt | None


def _batches(
    images: Pictures, size: int, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, dict[int, Callable[[], Image.Image]]]]:
    """The wanted batches: batch b holds images b * size to (b + 1) * size - 1, each as a call that opens it."""
    for batch in filter(wanted, range(-(-len(images) // size))):
        numbers = range(batch * size, min((batch + 1) * size, len(images)))
        yield batch, {number: partial(images.__getitem__, number) for number in numbers}


def _prepare(lmm: LMM, skip: bool, batch: int, openers: dict[int, Callable[[], Image.Image]]) -> _Batch:
    opened, skipped = {}, {}
    for number, opener in openers.items():
        try:
            opened[number] = opener()
        except UnreadableImage as fault:
            if not skip:
                raise
            skipped[number] = f"{fault.name}: {fault.reason}"
    prompt = lmm.prompt([""] * len(opened), list(opened.values())) if opened else None
    return _Batch(batch, list(opened), skipped, prompt)


def _ahead(fn: Callable, items: Iterable[tuple]) -> Iterator[Any]:
    """fn of each item in order, one item ahead of who asks: pictures are prepared while the model works."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque()
        for item in items:
            waiting.append(thread.submit(fn, *item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@torch.no_grad()
def _encode(lmm: LMM, studied: Mapping[str, Studied], batch: _Batch) -> dict[str, Latents]:
    """Latents (images, patches, k) of a batch's base tokens by each SAE; nothing behind these is computed."""
    base = batch.prompt.mask("base")
    last = int(base.any(0).nonzero().max()) + 1
    hidden = lmm.hidden_states(batch.prompt, [layer for _, layer in studied.values()], tokens=last)
    base = base[:, :last].to(lmm.device)
    if len(sizes := set(base.sum(1).tolist())) > 1:
        raise uneven(sizes)
    tokens = {layer: states[base].reshape(len(base), *sizes, -1) for layer, states in hidden.items()}
    for layer, states in tokens.items():
        require_finite(states, f"images {batch.images[0]} to {batch.images[-1]}, layer {layer}")
    return {name: sae.encode(tokens[layer]) for name, (sae, layer) in studied.items()}


def base_latents(
    place: SAEInPlace, images: Pictures, batch_size: int = 16, title: str | None = None
) -> Iterator[Latents]:
    """Latents (batch, patches, k) of the base image tokens, on the CPU, a batch of images at a time.

    The prompt is the image alone, in the chat template. ValueError if images differ in the number of base tokens,
    hidden states are not finite, an image cannot be read, or as `SAEInPlace`.
    """
    lmm, sae, layer = place.lmm, place.sae, place.layer
    seen = set()
    batches = _ahead(partial(_prepare, lmm, False), _batches(images, batch_size, lambda _: True))
    with progress_bar(desc=title, total=len(images), unit=" images", disable=title is None) as bar:
        for batch in batches:
            latents = _encode(lmm, {"": (sae, layer)}, batch)[""]
            if len(seen := seen | {latents.acts.shape[1]}) > 1:
                raise uneven(seen)
            yield Latents(*(part.cpu() for part in latents))
            bar.update(len(batch.images))


@torch.no_grad()
def activation_maps(
    place: SAEInPlace, images: Sequence[Image.Image], latents: Sequence[int], batch_size: int = 16
) -> Float[np.ndarray, "images latents rows cols"]:
    """Activations of some latents on the base patches of some images."""
    lmm, sae = place.lmm, place.sae
    if lmm.grid is None:
        raise NoPatchGrid(f"{lmm.name} has no patch grid, so there are no maps to make; use mean activations instead")
    column = torch.full((sae.n_latents,), -1)
    column[torch.as_tensor(latents)] = torch.arange(len(latents))
    maps = torch.cat([_dense(part, column, len(latents)) for part in base_latents(place, images, batch_size)])
    return maps.unflatten(-1, lmm.grid).numpy()


def _dense(latents: Latents, column: Tensor, columns: int) -> Float[Tensor, "batch columns patches"]:
    """The activations of the latents that have a column, as rows of patches."""
    wanted = column[latents.indices]
    image, patch, slot = torch.nonzero(wanted >= 0, as_tuple=True)
    out = torch.zeros(latents.acts.shape[0], columns, latents.acts.shape[1])
    out[image, wanted[image, patch, slot], patch] = latents.acts[image, patch, slot].float()
    return out
