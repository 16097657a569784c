"""Section 2.2: for every latent the images that excite it most, where in them, and how it fires; one exact pass.

The pass can be cut short at any moment and goes on where it was, and any number of processes can share it: the
result is the same to the byte.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from jaxtyping import Bool, Float, Int64
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from lmm_sae_nb.cache.resume import (
    KEY,
    Share,
    flush_left,
    is_whole,
    merged_blocks,
    place_store,
    resume_or_clear,
    shares_in,
    told_by,
    uneven,
)
from lmm_sae_nb.cache.sparse_store import STORE, VALUES, LatentStore
from lmm_sae_nb.cache.top_images import Ranking
from lmm_sae_nb.model.lmm import LMM, NoPatchGrid, Prompt, require_own
from lmm_sae_nb.sae.topk import Latents, TopKSAE, require_finite
from lmm_sae_nb.support.artifacts import TensorRows, code_fingerprints, hash_of, save_rows, write_json
from lmm_sae_nb.support.images import StreamedImages, UnreadableImage, open_images

__all__ = [
    "LatentCache",
    "activation_maps",
    "base_latents",
    "cache_activations",
    "cache_several",
    "forecast",
    "open_images",
]

TENSORS, SHAPE, PARTIAL = "cache.safetensors", "cache.json", ".partial"
Pictures = Sequence[Image.Image] | StreamedImages
Studied = tuple[TopKSAE, int]  # an SAE, and the layer that it reads


# ---- a batch at a time ----------------------------------------------------------------------------------------


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
    if hasattr(images, "__len__"):
        for batch in filter(wanted, range(-(-len(images) // size))):
            numbers = range(batch * size, min((batch + 1) * size, len(images)))
            yield batch, {number: partial(images.__getitem__, number) for number in numbers}
        return
    first = next(filter(wanted, count()))
    openers = enumerate(images.openers(first * size), first * size)
    for batch in count(first):
        if not (group := dict(islice(openers, size))):
            return
        if wanted(batch):
            yield batch, group


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
    lmm: LMM, sae: TopKSAE, images: Pictures, layer: int, batch_size: int = 16, title: str | None = None
) -> Iterator[Latents]:
    """Latents (batch, patches, k) of the base image tokens, on the CPU, a batch of images at a time.

    The prompt is the image alone, in the chat template. ValueError if images differ in the number of base tokens,
    hidden states are not finite, an image cannot be read, or as `require_own`.
    """
    require_own(lmm, sae, layer)
    seen = set()
    batches = _ahead(partial(_prepare, lmm, False), _batches(images, batch_size, lambda _: True))
    with tqdm(desc=title, total=_length(images), unit=" images", mininterval=2, disable=title is None) as bar:
        for batch in batches:
            latents = _encode(lmm, {"": (sae, layer)}, batch)[""]
            if len(seen := seen | {latents.acts.shape[1]}) > 1:
                raise uneven(seen)
            yield Latents(*(part.cpu() for part in latents))
            bar.update(len(batch.images))


def _length(images: Pictures) -> int | None:
    return len(images) if hasattr(images, "__len__") else None


@torch.no_grad()
def activation_maps(
    lmm: LMM, sae: TopKSAE, images: Sequence[Image.Image], layer: int, latents: Sequence[int], batch_size: int = 16
) -> Float[np.ndarray, "images latents rows cols"]:
    """Activations of some latents on the base patches of some images."""
    if lmm.grid is None:
        raise NoPatchGrid(f"{lmm.name} has no patch grid, so there are no maps to make; use mean activations instead")
    column = torch.full((sae.n_latents,), -1)
    column[torch.as_tensor(latents)] = torch.arange(len(latents))
    maps = torch.cat([_dense(part, column, len(latents)) for part in base_latents(lmm, sae, images, layer, batch_size)])
    return maps.unflatten(-1, lmm.grid).numpy()


def _dense(latents: Latents, column: Tensor, columns: int) -> Float[Tensor, "batch columns patches"]:
    """The activations of the latents that have a column, as rows of patches."""
    wanted = column[latents.indices]
    image, patch, slot = torch.nonzero(wanted >= 0, as_tuple=True)
    out = torch.zeros(latents.acts.shape[0], columns, latents.acts.shape[1])
    out[image, wanted[image, patch, slot], patch] = latents.acts[image, patch, slot].float()
    return out


# ---- what it will take ----------------------------------------------------------------------------------------


class Forecast(NamedTuple):
    """What a pass will take; seconds and disk are None for a stream, whose length is not known."""

    images_per_second: float  # of one process
    seconds: float | None
    disk: int | None  # bytes, at most, while it runs
    memory: int  # bytes beside the model and a batch's own tensors, of each process


def forecast(
    lmm: LMM, sae: TopKSAE, images: Pictures, layer: int, *, n_top: int = 5, batch_size: int = 16,
    store: str | None = None, unreadable: str = "refuse",
) -> Forecast:  # fmt: skip
    """Run two batches and time the second: what `cache_activations` with the same arguments will take."""
    studied = {"": (sae, layer)}
    _check(lmm, studied, images, n_top, batch_size, store, unreadable)
    timed, began = [], time.monotonic()
    batches = _ahead(partial(_prepare, lmm, unreadable == "skip"), _batches(images, batch_size, lambda _: True))
    for batch in islice(filter(lambda batch: batch.images, batches), 2):
        timed.append((_encode(lmm, studied, batch)[""].acts.shape, time.monotonic() - began))
        began = time.monotonic()
    if not timed:
        raise ValueError("no image could be read; give others")
    (pictures, patches, _), seconds = timed[-1]
    length, rate = _length(images), pictures / seconds
    memory = sae.n_latents * n_top * (2 * patches + 12) + 2**29
    if length is None:
        return Forecast(rate, None, None, memory)
    total = length / rate / _processes().num_processes
    return Forecast(rate, total, _disk(sae, length, n_top, patches, store), memory)


def _disk(sae: TopKSAE, images: int, n_top: int, patches: int, store: str | None) -> int:
    """Bytes on disk at most: the cache, a checkpoint of it in each process and a new one, and the store."""
    cache = sae.n_latents * (n_top * (2 * patches + 12) + 28)
    entries = images * patches * sae.k if store else 0
    return cache * (_processes().num_processes + 2) + entries * (4 + VALUES[store or "float16"].itemsize)


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.is_dir())).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the cache needs up to {needed / 1e9:.1f} GB at {folder}, {free / 1e9:.1f} GB are free: make room, give "
            "another folder, fewer images or a smaller n_top, or leave the store out (store=None)",
        )


# ---- the pass -------------------------------------------------------------------------------------------------


def cache_activations(
    lmm: LMM, sae: TopKSAE, images: Pictures, layer: int, *, folder: str | Path, **settings
) -> LatentCache:
    """`cache_several` of one SAE, straight into `folder`."""
    return cache_several(lmm, {"": (sae, layer)}, images, folder=folder, **settings)[""]


def cache_several(
    lmm: LMM,
    studied: Mapping[str, Studied],
    images: Pictures,
    *,
    n_top: int = 5,
    batch_size: int = 16,
    folder: str | Path,
    store: str | None = None,
    unreadable: str = "refuse",
    save_every: float = 300.0,
) -> dict[str, LatentCache]:
    """For every latent of some SAEs the `n_top` images of highest mean activation over the base tokens, in one pass.

    studied: each SAE with its layer, by the name of its cache's folder in `folder`; the model runs once for all, and
    each cache is that which its SAE has alone.
    Exact for every latent at once; of equal means (float32) the lower image number is ahead. store: "float16" or
    "float32" also keeps every base token's active latents (`LatentStore`). unreadable: "skip" leaves out images that
    cannot be opened and names them in cache.json. Numbers of images are always those of `images`.

    Memory beside the model and a batch's own tensors: n_latents * n_top * (2 * patches + 12) bytes for each SAE
    + 0.5 GB, whatever the number of images and the batch: 1.3 GB for 131,072 latents, 5 images, 576 patches.

    Every `save_every` seconds the state goes to disk; a pass that was cut short goes on from there when called again
    with the same code, model, SAE, images and arguments, and starts afresh otherwise; what is whole is not made again.
    Under accelerate each process takes its share of the batches and the first one merges them; the folder must be
    common to all. Whatever the processes and interruptions, a cache is the same to the byte, for the same batch_size;
    the store's activations are the same, cut into other files.

    ValueError if there are no images or SAEs, n_top < 1, an argument is not one of those above, or as `base_latents`;
    UnreadableImage; OSError if the disk has no room. What was there before stays until the new cache is whole.
    """
    _check(lmm, studied, images, n_top, batch_size, store, unreadable)
    folder, processes = Path(folder), _processes()
    keys = {
        name: _key(lmm, sae, images, layer, n_top, batch_size, store, unreadable)
        for name, (sae, layer) in studied.items()
    }
    whole = {name: LatentCache.load(folder / name) for name in studied if is_whole(folder / name, keys[name])}
    studied = {name: its for name, its in studied.items() if name not in whole}
    partials = {name: folder / name / PARTIAL for name in keys}
    processes.wait_for_everyone()  # nobody clears before all have looked
    if processes.is_main_process:
        for name in whole:
            shutil.rmtree(partials[name], ignore_errors=True)
        for name in studied:
            resume_or_clear(partials[name], keys[name])
    processes.wait_for_everyone()
    if not studied:
        return whole
    done = {
        name: {batch for path in shares_in(partials[name]) for batch in told_by(path)["batches"]} for name in studied
    }
    processes.wait_for_everyone()  # nobody writes before all have read

    rank, world = processes.process_index, processes.num_processes
    own_file = f"{rank:05d}.safetensors"
    shares = {name: Share(partials[name] / own_file, sae.n_latents, n_top, store) for name, (sae, _) in studied.items()}
    everywhere = set.intersection(*done.values())
    wanted = _batches(images, batch_size, lambda batch: batch % world == rank and batch not in everywhere)
    length, seen = _length(images), min(share.told["images"] for share in shares.values())
    with tqdm(desc="caching", total=length and -(-length // world), initial=seen, unit=" images",
              mininterval=2, disable=not processes.is_main_process) as bar:  # fmt: skip
        saved, needed = time.monotonic(), 0
        for batch in _ahead(partial(_prepare, lmm, unreadable == "skip"), wanted):
            missing = {name: its for name, its in studied.items() if batch.number not in done[name]}
            latents = _encode(lmm, missing, batch) if batch.images else {}
            if not needed and latents and length is not None:
                patches = next(iter(latents.values())).acts.shape[1]
                needed = sum(_disk(sae, length, n_top, patches, store) for sae, _ in studied.values())
                _require_room(folder, needed)
            for name in missing:
                shares[name].add(batch.number, batch.images, batch.skipped, latents.get(name))
            bar.update(len(batch.images) + len(batch.skipped))
            if time.monotonic() - saved >= save_every:
                for share in shares.values():
                    share.save()
                saved = time.monotonic()
    for share in shares.values():
        share.save(last=True)
    del shares, share  # their memory
    processes.wait_for_everyone()
    if processes.is_main_process:
        told = {"grid": lmm.grid, "model": Path(lmm.name).name}
        for name, (sae, layer) in studied.items():
            _finish(folder / name, sae.n_latents, n_top, store, told | {"layer": layer})
    processes.wait_for_everyone()
    whole |= {name: LatentCache.load(folder / name) for name in studied}
    return {name: whole[name] for name in keys}


def _processes() -> PartialState:
    """Who shares the pass, as accelerate started them; without a GPU it finds others only when told so."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def _check(
    lmm: LMM, studied: Mapping[str, Studied], images: Pictures, n_top: int, batch_size: int, store: str | None,
    unreadable: str,
) -> None:  # fmt: skip
    for sae, layer in studied.values():
        require_own(lmm, sae, layer)
    if _length(images) == 0 or not studied or n_top < 1 or batch_size < 1:
        raise ValueError(
            f"{_length(images)} images, {len(studied)} SAEs, n_top {n_top}, batch_size {batch_size}: there is nothing "
            "to rank; give at least one of each"
        )
    if store not in (None, *VALUES) or unreadable not in ("refuse", "skip"):
        raise ValueError(
            f"store={store!r}, unreadable={unreadable!r}: store is None, {' or '.join(map(repr, VALUES))}; unreadable "
            "is 'refuse' or 'skip'"
        )


def _key(lmm: LMM, sae: TopKSAE, images: Pictures, layer: int, *settings: object) -> dict[str, object]:
    """What a pass is of: one of another key cannot go on from its state."""
    config = hashlib.sha256(lmm.model.config.to_json_string().encode()).hexdigest()
    weights = hash_of([*sae.parameters(), *lmm.layer(layer).parameters()])
    source = getattr(images, "identity", None)
    if source is None:
        source = [hashlib.sha256(images[number].tobytes()).hexdigest() for number in (0, len(images) - 1)]
    return {"config": config, "weights": weights, "source": source, "images": _length(images), "k": sae.k,
            "code": code_fingerprints([sys.modules[__name__]]), "layer": layer,
            "image_size": lmm.image_size and list(lmm.image_size),
            "settings": list(settings)}  # fmt: skip


# ---- from shares to a cache -----------------------------------------------------------------------------------


def _finish(folder: Path, n_latents: int, n_top: int, store: str | None, described: dict[str, object]) -> None:
    """Merge the shares into the cache, put it and the store in their places, and clear the state away."""
    partial_folder = folder / PARTIAL
    shares = {path: told_by(path) for path in shares_in(partial_folder)}
    held = [path for path in shares if TensorRows(path).shapes]
    skipped = {int(number): fault for told in shares.values() for number, fault in told["skipped"].items()}
    seen = sum(told["images"] for told in shares.values())
    if not held:
        shutil.rmtree(partial_folder)
        raise ValueError(f"no image could be read, {len(skipped)} were skipped: {skipped}; give others")
    patches = {TensorRows(path).shapes["patches"][2] for path in held}
    if len(patches) > 1:
        raise uneven(patches)
    described |= {
        "images": seen, "patches": patches.pop(), "store": store,
        "skipped": [{"image": number, "fault": skipped[number]} for number in sorted(skipped)],
    }  # fmt: skip
    parts = {part for told in shares.values() for part in told["parts"]}
    parts |= {part for path in held for part in flush_left(path, n_latents, described["patches"], store)}
    (folder / KEY).unlink(missing_ok=True)  # until it is whole the folder is of neither pass
    place_store(partial_folder / STORE, folder / STORE, parts)
    write_cache(folder, n_latents, n_top, described, merged_blocks(held, n_latents))
    (partial_folder / KEY).replace(folder / KEY)  # the cache is whole; nothing goes on from what is left of the pass
    shutil.rmtree(partial_folder)


def write_cache(
    folder: Path, n_latents: int, n_top: int, described: dict[str, Any], blocks: Iterable[tuple[int, Ranking]]
) -> None:
    """Write rankings of consecutive blocks of latents, each with its first latent, as a cache.

    described: images, patches, grid (or None), layer, model, skipped, store (or None); kept in the same file, so that
    the two cannot part. cache.json repeats it for people.
    """
    patches = described["patches"]
    tokens = described["images"] * patches
    single, top = np.dtype(np.float32), (n_latents, n_top)
    layout = {
        "top_images": (np.dtype(np.int64), top), "top_means": (single, top),
        "patches": (np.dtype(np.float16), (*top, patches)),
        **dict.fromkeys(("frequency", "mean", "max"), (single, (n_latents,))),
    }  # fmt: skip

    def rows() -> Iterator[tuple[str, int, np.ndarray]]:
        for start, ranking in blocks:
            arrays = ranking.ordered()
            arrays["frequency"] = (arrays.pop("fired") / tokens).astype(np.float32)
            yield from ((name, start, array) for name, array in arrays.items())

    save_rows(folder / TENSORS, layout, rows(), {"cache": json.dumps(described)})
    write_json(folder / SHAPE, described)


class LatentCache:
    """What `cache_activations` found, read when asked for: opening reads a header, `top` and `patch_map` a row.

    images: how many were seen. n_latents, n_top: of how many latents the cache tells how many images. grid: rows and
    columns of the base patches, or None. skipped: number and fault of images that could not be read.
    """

    def __init__(self, folder: Path):
        self._folder, self._rows = folder, TensorRows(folder / TENSORS)
        names = {"top_images", "top_means", "patches", "frequency", "mean", "max"}
        if names - self._rows.shapes.keys() or "cache" not in self._rows.metadata:
            raise ValueError(f"{folder} is no cache of activations; make it with notebooks/02_cache_activations.py")
        told = json.loads(self._rows.metadata["cache"])
        self.images, self.grid, self.layer = told["images"], told["grid"] and tuple(told["grid"]), told["layer"]
        self.skipped = {row["image"]: row["fault"] for row in told["skipped"]}
        self._stored = told["store"]
        self.n_latents, self.n_top, self._patches = self._rows.shapes["patches"]

    @classmethod
    def load(cls, folder: str | Path) -> LatentCache:
        """Open a cache folder; FileNotFoundError if it is missing, ValueError if it is cut short or foreign."""
        folder = Path(folder)
        if not (folder / SHAPE).is_file():
            raise FileNotFoundError(f"{folder / SHAPE} is missing; run notebooks/02_cache_activations.py first")
        return cls(folder)

    def top(self, latent: int) -> list[tuple[int, float]]:
        """The images that excite a latent most, with their means, the first first; fewer if fewer do."""
        self._check(latent, 0)
        images, means = (self._rows.row(name, latent).tolist() for name in ("top_images", "top_means"))
        return [(image, mean) for image, mean in zip(images, means, strict=True) if image >= 0]

    def patch_map(self, latent: int, rank: int) -> Float[Tensor, "rows cols"]:
        """The latent's activation over the base patches of its image of this rank (0 is the first), float32.

        NoPatchGrid for a model without one; ValueError for a latent or rank that the cache does not have.
        """
        if self.grid is None:
            raise NoPatchGrid("this cache is of a model without a patch grid; only its mean activations have a meaning")
        self._check(latent, rank)
        return torch.from_numpy(self._rows.row("patches", latent, rank).astype(np.float32)).unflatten(0, self.grid)

    def _check(self, latent: int, rank: int) -> None:
        if not (0 <= latent < self.n_latents and 0 <= rank < self.n_top):
            raise ValueError(
                f"no latent {latent}, rank {rank}: the cache has {self.n_latents} latents, ranks 0 to {self.n_top - 1}"
            )

    @cached_property
    def top_images(self) -> Int64[Tensor, "latents n_top"]:
        """-1 where fewer images excite a latent."""
        return self._whole("top_images")

    @cached_property
    def top_means(self) -> Float[Tensor, "latents n_top"]:
        return self._whole("top_means")

    @cached_property
    def frequency(self) -> Float[Tensor, " latents"]:
        """Share of base tokens on which each latent is active."""
        return self._whole("frequency")

    @cached_property
    def mean(self) -> Float[Tensor, " latents"]:
        """Each latent's mean activation where it is active."""
        return self._whole("mean")

    @cached_property
    def max(self) -> Float[Tensor, " latents"]:
        return self._whole("max")

    @cached_property
    def live(self) -> Bool[Tensor, " latents"]:
        """Whether a latent fired at all."""
        return self.frequency > 0

    def _whole(self, name: str) -> Tensor:
        return torch.from_numpy(self._rows.whole(name))

    @property
    def store(self) -> LatentStore:
        """Every base token's active latents; FileNotFoundError if they were not kept."""
        if not self._stored:
            raise FileNotFoundError(f"{self._folder} keeps no activations; make the cache with store='float16'")
        return LatentStore(self._folder / STORE, self._patches)
