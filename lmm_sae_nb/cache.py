"""Section 2.2: for every latent the images that excite it most, where in them, and how it fires; one exact pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

from lmm_sae_nb.artifacts import open_tensors, read_json, save_tensors, write_json
from lmm_sae_nb.lmm import LMM, NoPatchGrid
from lmm_sae_nb.sae import Latents, TopKSAE, require_finite

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TENSORS, SHAPE = "cache.safetensors", "cache.json"


# ---- images ---------------------------------------------------------------------------------------------------


class Images(Sequence):
    """Pictures by number, opened when asked for, as RGB."""

    def __init__(self, source: Sequence[Path] | Dataset):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Image.Image:
        if not isinstance(self._source, Dataset):
            return _open(self._source[index])
        picture = self._source[int(index)]["image"]
        if picture is None:
            raise ValueError(f"row {index} of the data set has no image; filter such rows out")
        return picture.convert("RGB")


def open_images(source: str | Path | Dataset) -> Images:
    """The images of a folder (searched recursively, in order of their names), a saved data set or a data set.

    FileNotFoundError for a missing folder; ValueError for one without images or a data set without an `image`
    column. An unreadable or empty file is a ValueError that names it, when it is asked for.
    """
    if isinstance(source, str | Path):
        folder = Path(source)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is no folder; give a folder of images, or render Picture World: `make world`"
            )
        if not (folder / "state.json").is_file():
            files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
            if not files:
                raise ValueError(f"{folder} holds no image ({', '.join(sorted(ENDINGS))}); give a folder that does")
            return Images(files)
        source = load_from_disk(folder)
    if "image" not in source.column_names:
        raise ValueError(f"the data set has columns {source.column_names}, none is `image`; rename the one that is")
    return Images(source.select_columns("image"))


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{file} is not a readable image ({error}); repair it or take it out of the folder") from error


# ---- the pass -------------------------------------------------------------------------------------------------


def base_latents(
    lmm: LMM, sae: TopKSAE, images: Sequence[Image.Image], layer: int, batch_size: int = 16, title: str | None = None
) -> Iterator[Latents]:
    """Latents (batch, patches, k) of the base image tokens, a batch of images at a time.

    The prompt is the image alone, in the chat template. ValueError if images differ in the number of base tokens,
    hidden states are not finite, or the SAE has another width than the layer.
    """
    sae.require_width(lmm.width)
    count = None
    starts = range(0, len(images), batch_size)
    for start in tqdm(starts, desc=title, mininterval=2, disable=title is None):
        pictures = [images[i] for i in range(start, min(start + batch_size, len(images)))]
        prompt = lmm.prompt([""] * len(pictures), pictures)
        hidden = lmm.hidden_states(prompt, layer)
        base = prompt.mask("base").to(hidden.device)
        sizes = set(base.sum(1).tolist()) | ({count} if count else set())
        if len(sizes) > 1:
            raise ValueError(f"images have {sorted(sizes)} base tokens; bring them to one size first")
        count = sizes.pop()
        tokens = hidden[base].reshape(len(pictures), count, -1)
        require_finite(tokens, f"images {start} to {start + len(pictures) - 1}, layer {layer}")
        with torch.no_grad():
            yield Latents(*(part.cpu() for part in sae.encode(tokens)))


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


class _Top:
    """The running top-n images of every latent with their patch rows: exact, whatever the number of images."""

    def __init__(self, n_latents: int, n_top: int, patches: int):
        self.means = torch.zeros(n_latents, n_top)
        self.images = torch.full((n_latents, n_top), -1)
        self.patches = torch.zeros(n_latents, n_top, patches, dtype=torch.float16)

    def update(self, latents: Latents, first: int) -> None:
        """Take in a batch whose first image has the number `first`; of equal means the lower number stays ahead."""
        n_latents, n_top = self.means.shape
        batch, patches, _ = latents.acts.shape
        sums = torch.zeros(batch, n_latents)
        sums.scatter_add_(1, latents.indices.flatten(1), latents.acts.flatten(1).float())
        means = (sums / patches).T
        changed = torch.nonzero((means > self.means[:, -1:]).any(1)).flatten()
        if not len(changed):
            return
        both = torch.cat([self.means[changed], means[changed]], 1)
        kept = both.sort(dim=1, descending=True, stable=True)
        order = kept.indices[:, :n_top]
        numbers = torch.cat([self.images[changed], (first + torch.arange(batch)).expand(len(changed), -1)], 1)
        # Rows of patches only for what enters: (image, latent) -> its number in `rows`.
        row, rank = torch.nonzero((order >= n_top) & (kept.values[:, :n_top] > 0), as_tuple=True)
        image = order[row, rank] - n_top
        slot = torch.full((batch, n_latents), -1)
        slot[image, changed[row]] = torch.arange(len(row))
        at = slot.gather(1, latents.indices.flatten(1)).unflatten(1, latents.indices.shape[1:])
        i, patch, k = torch.nonzero(at >= 0, as_tuple=True)
        rows = torch.zeros(len(row), patches)
        rows[at[i, patch, k], patch] = latents.acts[i, patch, k].float()

        stay = order.clamp(max=n_top - 1)
        renewed = self.patches[changed].gather(1, stay[..., None].expand(-1, -1, patches))
        renewed[row, rank] = rows.half()
        self.patches[changed] = renewed
        self.means[changed] = kept.values[:, :n_top]
        self.images[changed] = torch.where(kept.values[:, :n_top] > 0, numbers.gather(1, order), -1)


def cache_activations(
    lmm: LMM,
    sae: TopKSAE,
    images: Sequence[Image.Image],
    layer: int,
    *,
    n_top: int = 5,
    batch_size: int = 16,
    folder: str | Path,
) -> LatentCache:
    """For every latent, the `n_top` images of highest mean activation over the base tokens, in one pass.

    Exact for every latent at once; memory is (n_latents, n_top, patches) float16 and a batch, whatever the number
    of images. The reference code stores every active latent of every patch and sorts afterwards.
    ValueError if there are no images, n_top < 1, or as `base_latents`.
    """
    if not len(images) or n_top < 1:
        raise ValueError(f"{len(images)} images, n_top {n_top}: there is nothing to rank; give at least one of each")
    top, seen = None, 0
    fired, total, highest = (torch.zeros(sae.n_latents, dtype=torch.float64) for _ in range(3))
    for latents in base_latents(lmm, sae, images, layer, batch_size, "caching"):
        top = top or _Top(sae.n_latents, n_top, latents.acts.shape[1])
        top.update(latents, seen)
        seen += len(latents.acts)
        index, acts = latents.indices.flatten(), latents.acts.flatten().double()
        fired.index_add_(0, index, (acts > 0).double())
        total.index_add_(0, index, acts)
        highest.scatter_reduce_(0, index, acts, "amax")
    if not bool(top.patches.isfinite().all()):
        raise ValueError(f"an activation of {float(highest.max()):.3g} exceeds float16's range; scale the SAE's input")
    tokens = seen * top.patches.shape[2]
    tensors = {
        "top_means": top.means, "top_images": top.images, "patches": top.patches, "frequency": (fired / tokens).float(),
        "mean": (total / fired.clamp_min(1)).float(), "max": highest.float(),
    }  # fmt: skip
    folder = Path(folder)
    save_tensors(folder / TENSORS, tensors)
    write_json(folder / SHAPE, {"images": seen, "grid": lmm.grid, "layer": layer, "model": Path(lmm.name).name})
    return LatentCache.load(folder)


class LatentCache:
    """What `cache_activations` found, opened lazily: patch maps are read from disk when asked for.

    images: how many were seen. top_images (n_latents, n_top) int64, -1 where fewer excite the latent; top_means
    alike, float32. frequency: share of base tokens on which a latent is active; mean: over those; max; all float32
    (n_latents,). live: bool, whether it fired at all.
    """

    def __init__(self, folder: Path):
        shape = read_json(folder / SHAPE)
        self._file = open_tensors(folder / TENSORS)
        missing = {"top_images", "top_means", "patches", "frequency", "mean", "max"} - set(self._file.keys())
        if missing or "grid" not in shape:
            raise ValueError(f"{folder} is no cache of activations; make it with notebooks/02_cache_activations.py")
        self.images, self.grid, self.layer = shape["images"], shape["grid"] and tuple(shape["grid"]), shape["layer"]
        for name in ("top_images", "top_means", "frequency", "mean", "max"):
            setattr(self, name, self._file.get_tensor(name))
        self.live = self.frequency > 0
        self._patches = self._file.get_slice("patches")

    @classmethod
    def load(cls, folder: str | Path) -> LatentCache:
        """Open a cache folder; FileNotFoundError if it is missing, ValueError if it is cut short or foreign."""
        folder = Path(folder)
        if not (folder / SHAPE).is_file():
            raise FileNotFoundError(f"{folder / SHAPE} is missing; run notebooks/02_cache_activations.py first")
        return cls(folder)

    def patch_map(self, latent: int, rank: int) -> Float[Tensor, "rows cols"]:
        """The latent's activation over the base patches of its image of this rank (0 is the first), float32.

        NoPatchGrid for a model without one; ValueError for a latent or rank that the cache does not have.
        """
        if self.grid is None:
            raise NoPatchGrid("this cache is of a model without a patch grid; only its mean activations have a meaning")
        latents, ranks = self.top_images.shape
        if not (0 <= latent < latents and 0 <= rank < ranks):
            raise ValueError(
                f"no latent {latent}, rank {rank}: the cache has {latents} latents, ranks 0 to {ranks - 1}"
            )
        return self._patches[latent, rank].float().unflatten(0, self.grid)
