"""Section 2.2: for every latent the images that excite it most, where in them, and how it fires; one exact pass.

The pass can be cut short at any moment and goes on where it was, and any number of processes can share it: the
result is the same to the byte.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import sys
import time
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from lmm_sae_nb.cache.encode_images import Pictures, Studied, _ahead, _batches, _encode, _prepare
from lmm_sae_nb.cache.latent_cache import PARTIAL, LatentCache, write_cache
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
from lmm_sae_nb.cache.sparse_store import STORE, VALUES
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.stages import code_fingerprints
from lmm_sae_nb.support.tensor_files import hash_of, open_tensors, shapes_in


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
    length, rate = len(images), pictures / seconds
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


def cache_activations(place: SAEInPlace, images: Pictures, *, folder: str | Path, **settings) -> LatentCache:
    """`cache_several` of one SAE, straight into `folder`."""
    lmm, sae, layer = place.lmm, place.sae, place.layer
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
    length, seen = len(images), min(share.told["images"] for share in shares.values())
    with progress_bar(desc="caching", total=length and -(-length // world), initial=seen, unit=" images",
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
        SAEInPlace(lmm, sae, layer)  # checks that they belong together
    if len(images) == 0 or not studied or n_top < 1 or batch_size < 1:
        raise ValueError(
            f"{len(images)} images, {len(studied)} SAEs, n_top {n_top}, batch_size {batch_size}: there is nothing "
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
    return {"config": config, "weights": weights, "source": source, "images": len(images), "k": sae.k,
            "code": code_fingerprints([sys.modules[__name__]]), "layer": layer,
            "image_size": lmm.image_size and list(lmm.image_size),
            "settings": list(settings)}  # fmt: skip


def _finish(folder: Path, n_latents: int, n_top: int, store: str | None, described: dict[str, object]) -> None:
    """Merge the shares into the cache, put it and the store in their places, and clear the state away."""
    partial_folder = folder / PARTIAL
    shares = {path: told_by(path) for path in shares_in(partial_folder)}
    shapes = {path: shapes_in(open_tensors(path)) for path in shares}
    held = [path for path in shares if shapes[path]]
    skipped = {int(number): fault for told in shares.values() for number, fault in told["skipped"].items()}
    seen = sum(told["images"] for told in shares.values())
    if not held:
        shutil.rmtree(partial_folder)
        raise ValueError(f"no image could be read, {len(skipped)} were skipped: {skipped}; give others")
    patches = {shapes[path]["patches"][2] for path in held}
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
