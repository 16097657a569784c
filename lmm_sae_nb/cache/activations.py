"""Find for every latent the images that excite it most, where in them, and how often it is active: one exact pass.

A pass that was cut short continues where it stopped, and several processes can work on one pass. Neither changes a
byte of the result.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from lmm_sae_nb.cache.encode_images import Pictures, batches_of, encode_batch, opened_batches, require_one_count
from lmm_sae_nb.cache.latent_cache import PARTIAL, LatentCache, identity_of, write_cache
from lmm_sae_nb.cache.resume import (
    KEY,
    PassPart,
    merged_blocks,
    part_files,
    place_store,
    read_progress,
    resume_or_clear,
    whole_cache,
    write_pending,
)
from lmm_sae_nb.cache.sparse_store import STORE, VALUES
from lmm_sae_nb.model.hookpoints import weights_of
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.support.conversions import sum_conversions
from lmm_sae_nb.support.devices import allow_tf32
from lmm_sae_nb.support.files import free_bytes, in_units
from lmm_sae_nb.support.images import UnreadableImage, pixel_hash
from lmm_sae_nb.support.locks import clear_left, hold
from lmm_sae_nb.support.names import folder_name
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.stages import code_fingerprints
from lmm_sae_nb.support.tensor_files import hash_of, open_tensors, shapes_in


def cache_activations(place: SAEInPlace, images: Pictures, *, folder: str | Path, **settings) -> LatentCache:
    """Cache the activations of one SAE straight into `folder`; arguments and errors as `cache_several`."""
    return cache_several({"": place}, images, folder=folder, **settings)[""]


def cache_several(
    places: Mapping[str, SAEInPlace],
    images: Pictures,
    *,
    n_top: int = 5,
    batch_size: int = 16,
    folder: str | Path,
    store: str | None = None,
    unreadable: str = "refuse",
    save_every: float = 300.0,
    workers: int = 1,
    tf32: bool = True,
) -> dict[str, LatentCache]:
    """Find for every latent of some SAEs the `n_top` images of highest mean activation over the base tokens.

    The model runs once for all SAEs, and each cache is the one that its SAE has alone. The result is exact for every
    latent. Of equal means (float32) the lower image number comes first.

    A pass that was cut short continues from its last saved state when it is called again with the same code, model,
    SAE, images and arguments; otherwise it starts afresh. A cache that is whole is not made again; one with a missing
    or damaged file is, with a warning. Under accelerate
    each process takes a part of the batches, and the first process merges them; the folder must be common to all. For
    the same `batch_size` the cache is the same to the byte, whatever the processes and interruptions; the store has
    the same activations, perhaps cut into other files.

    Memory beside the model and a batch's own tensors: n_latents * n_top * (2 * patches + 12) bytes for each SAE and
    0.5 GB, whatever the number of images: 1.3 GB for 131,072 latents, 5 images, 576 patches.

    places: each SAE with its model and layer, by the name of its folder in `folder`; all with one and the same model.
    images: their numbers count from 0, in this order.
    n_top: images kept for each latent.
    batch_size: images that go through the model at once.
    store: "float16" or "float32" also keeps every base token's active latents (`LatentStore`); None does not.
    unreadable: "skip" leaves out images that cannot be opened and names them in cache.json; "refuse" stops there.
    save_every: seconds between saved states.
    workers: threads that open and process the next images, each a batch; 0 for none.
    tf32: let a GPU compute the products of float32 in TF32; it may keep another latent where two are nearly equal.

    Raises:
        ValueError: no images, no SAEs or more than one model, a name or another argument out of range, or as
            `encode_batch`.
        UnreadableImage: an image cannot be opened, with "refuse".
        OSError: the disk has no room. An earlier cache stays until the new one is whole.
        FolderInUse: another run caches into this folder.
    """
    _check(places, images, n_top, batch_size, store, unreadable)
    folder, processes = Path(folder), _processes()
    on_gpu = ["tf32"] if tf32 and next(iter(places.values())).device.type == "cuda" else []
    keys = {name: _key(place, images, n_top, batch_size, store, unreadable, *on_gpu) for name, place in places.items()}
    whole = _whole(folder, keys)
    leftovers = any((folder / name / PARTIAL).exists() for name in keys)
    processes.wait_for_everyone()  # nobody clears before all have looked
    if len(whole) == len(keys) and not leftovers:
        if processes.is_main_process:
            clear_left(folder)
        return whole
    with hold(folder) if processes.is_main_process else nullcontext():
        settings = {"n_top": n_top, "batch_size": batch_size, "store": store, "save_every": save_every}
        settings |= {"skip": unreadable == "skip", "workers": workers, "tf32": tf32}
        return _cache(places, images, keys, folder, processes, **settings)


def _whole(folder: Path, keys: Mapping[str, dict]) -> dict[str, LatentCache]:
    """Return the caches that are whole, by name."""
    caches = {name: whole_cache(folder / name, key) for name, key in keys.items()}
    return {name: cache for name, cache in caches.items() if cache is not None}


def _cache(
    places: Mapping[str, SAEInPlace],
    images: Pictures,
    keys: Mapping[str, dict],
    folder: Path,
    processes: PartialState,
    *,
    n_top: int,
    batch_size: int,
    store: str | None,
    skip: bool,
    save_every: float,
    workers: int,
    tf32: bool,
) -> dict[str, LatentCache]:
    """Do the pass for the caches that are not whole; arguments as of `cache_several`, whose work this is."""
    pictures = identity_of(images)  # before any is read
    whole = _whole(folder, keys)  # another run may have held the folder until now
    places = {name: place for name, place in places.items() if name not in whole}
    partials = {name: folder / name / PARTIAL for name in keys}
    processes.wait_for_everyone()  # nobody clears before all have looked
    if processes.is_main_process:
        for name in whole:
            shutil.rmtree(partials[name], ignore_errors=True)
        for name in places:
            resume_or_clear(partials[name], keys[name])
    processes.wait_for_everyone()
    if not places:
        return whole
    done = {
        name: {batch for path in part_files(partials[name]) for batch in read_progress(path)["batches"]}
        for name in places
    }
    processes.wait_for_everyone()  # nobody writes before all have read

    rank, world = processes.process_index, processes.num_processes
    parts = {
        name: PassPart(partials[name] / f"{rank:05d}.safetensors", place.sae.n_latents, n_top, store)
        for name, place in places.items()
    }
    lmm = next(iter(places.values())).lmm
    finished = set.intersection(*done.values())
    wanted = batches_of(images, batch_size, lambda batch: batch % world == rank and batch not in finished)
    seen = min(part.progress["images"] for part in parts.values())
    title = {"desc": "caching", "unit": " images", "disable": not processes.is_main_process}
    with progress_bar(total=-(-len(images) // world), initial=seen, **title) as bar:
        saved, is_first = time.monotonic(), True
        for batch in opened_batches(lmm, wanted, skip=skip, workers=workers):
            missing = {name: place for name, place in places.items() if batch.number not in done[name]}
            with allow_tf32(tf32, lmm.device):
                latents = encode_batch(missing, batch) if batch.images else {}
            if is_first and latents:
                patches = next(iter(latents.values())).acts.shape[1]
                sizes = (len(images), n_top, patches, store, world)
                _require_room(folder, sum(_bytes_on_disk(place, *sizes) for place in places.values()))
                is_first = False
            for name in missing:
                parts[name].add(batch.number, batch.images, batch.skipped, latents.get(name), batch.converted)
            bar.update(len(batch.images) + len(batch.skipped))
            if time.monotonic() - saved >= save_every:
                for part in parts.values():
                    part.save()
                saved = time.monotonic()
    for part in parts.values():
        part.save(last=True)
    del parts, part  # their memory
    processes.wait_for_everyone()
    if processes.is_main_process:
        for name, place in places.items():
            described = {"grid": lmm.grid, "model": Path(lmm.name).name, "layer": place.layer, "pictures": pictures}
            finish_pass(folder / name, place.sae.n_latents, n_top, store, described)
    processes.wait_for_everyone()
    whole |= {name: LatentCache.load(folder / name) for name in places}
    return {name: whole[name] for name in keys}


def finish_pass(folder: Path, n_latents: int, n_top: int, store: str | None, described: dict[str, object]) -> None:
    """Merge the parts of a pass into the cache, move it and the store to their places, and delete the state.

    described: grid, model, layer and pictures, for `write_cache`.

    Raises:
        ValueError: no image could be read, or images differ in the number of base tokens.
    """
    partial_folder = folder / PARTIAL
    parts = {path: read_progress(path) for path in part_files(partial_folder)}
    shapes = {path: shapes_in(open_tensors(path)) for path in parts}
    held = [path for path in parts if shapes[path]]
    skipped = {int(number): fault for part in parts.values() for number, fault in part["skipped"].items()}
    if not held:
        shutil.rmtree(partial_folder)
        raise ValueError(f"no image could be read, {len(skipped)} were skipped: {skipped}; give other images")
    counts = {shapes[path]["patches"][2] for path in held}
    require_one_count(counts)
    described |= {
        "images": sum(part["images"] for part in parts.values()), "patches": counts.pop(), "store": store,
        "skipped": [{"image": number, "fault": skipped[number]} for number in sorted(skipped)],
    }  # fmt: skip
    if converted := sum_conversions(part["converted"] for part in parts.values()):
        described["converted"] = converted
    files = {name for part in parts.values() for name in part["files"]}
    files |= {name for path in held for name in write_pending(path, n_latents, described["patches"], store)}
    (folder / KEY).unlink(missing_ok=True)  # from here until the cache is whole, the folder is of neither pass
    place_store(partial_folder / STORE, folder / STORE, files)
    write_cache(folder, n_latents, n_top, described, merged_blocks(held, n_latents))
    (partial_folder / KEY).replace(folder / KEY)  # the cache is whole
    shutil.rmtree(partial_folder)


def _processes() -> PartialState:
    """Return the processes of this pass, as accelerate started them; on CPUs they must be asked for explicitly."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def _check(
    places: Mapping[str, SAEInPlace], images: Pictures, n_top: int, batch_size: int, store: str | None, unreadable: str
) -> None:
    if not len(images) or not places or n_top < 1 or batch_size < 1:
        raise ValueError(
            f"{len(images)} images, {len(places)} SAEs, n_top {n_top}, batch_size {batch_size}: there is nothing to "
            "rank; give at least one of each"
        )
    for name in places:
        if name:
            folder_name(name, "an SAE")
    if len({id(place.lmm) for place in places.values()}) > 1:
        raise ValueError(f"the SAEs {', '.join(places)} are of several models; cache those of each model in a pass")
    if store not in (None, *VALUES) or unreadable not in ("refuse", "skip"):
        raise ValueError(
            f"store={store!r}, unreadable={unreadable!r}: store is None, {' or '.join(map(repr, VALUES))}; unreadable "
            "is 'refuse' or 'skip'"
        )


def _key(place: SAEInPlace, images: Pictures, *settings: object) -> dict[str, object]:
    """Return what a pass is made from; a pass with another key cannot continue from its state."""
    lmm, sae, layer = place.lmm, place.sae, place.layer
    config = hashlib.sha256(lmm.model.config.to_json_string().encode()).hexdigest()
    weights = hash_of([*sae.state_dict().values(), *weights_of(lmm.model, layer)])
    source = getattr(images, "identity", None)
    if source is None:
        source = hashlib.sha256("".join(_pixels(images, number) for number in range(len(images))).encode()).hexdigest()
    return {"config": config, "weights": weights, "source": source, "images": len(images), "k": sae.k,
            "code": code_fingerprints([sys.modules[__name__]]), "layer": layer,
            "image_size": lmm.image_size and list(lmm.image_size),
            "settings": list(settings)}  # fmt: skip


def _pixels(images: Pictures, number: int) -> str:
    try:
        return pixel_hash(images[number])
    except UnreadableImage as fault:
        return str(fault)


def _bytes_on_disk(place: SAEInPlace, images: int, n_top: int, patches: int, store: str | None, processes: int) -> int:
    """Return how much a pass needs at most: the cache, a state of each process and a new one, and the store."""
    cache = place.sae.n_latents * (n_top * (2 * patches + 12) + 28)
    entries = images * patches * place.sae.k if store else 0
    return cache * (processes + 2) + entries * (4 + VALUES[store or "float16"].itemsize)


def _require_room(folder: Path, needed: int) -> None:
    if needed > (free := free_bytes(folder)):
        raise OSError(
            errno.ENOSPC,
            f"the cache needs up to {in_units(needed)} at {folder}, {in_units(free)} are free: make room, give another "
            "folder, fewer images or a smaller n_top, or leave the store out (store=None)",
        )
