"""Score latents by the IoU of their active patches with their concept, and compare with chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from lmm_sae_nb.cache.encode_images import activation_maps
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.score.masks import PAPER, STRICT, ActivationMap, FindConcept, MaskOf, Mode, activation_mask, ious
from lmm_sae_nb.score.scores import Column, Comparison, Explained
from lmm_sae_nb.support.images import Chosen
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.truth.label_maps import Mask


def latent_iou(
    maps: Sequence[ActivationMap], random_maps: Sequence[ActivationMap], concept: str, other: str | None,
    find: FindConcept, mode: Mode, *, runs: int = 10, seed: int = 0, mask_of: MaskOf = activation_mask,
) -> Comparison:  # fmt: skip
    """Return the mean IoU of a latent's activation with its concept over its own images (section 2.2), and chance.

    maps: the latent on its own images.
    random_maps: the latent on random images, equally many for each of `runs`.
    concept: the latent's name.
    other: another latent's name; None if there is none.
    find: says where a concept is.
    seed: of the places to which activations are moved.
    mask_of: gives the active pixels of a map in a mode.

    Raises:
        ValueError: there are no own images, or the random ones cannot be divided among the runs.
    """
    if not maps:
        raise ValueError(f"no exemplars to score {concept!r} with; leave out latents that never fire")
    if runs < 1 or not random_maps or len(random_maps) % runs:
        raise ValueError(f"{len(random_maps)} random images cannot be divided among {runs} runs; draw as many for each")
    how = find, mode, mask_of
    return Comparison(
        score=float(ious(maps, concept, *how).mean()),
        random=tuple(ious(random_maps, concept, *how).reshape(runs, -1).mean(1).tolist()),
        area=float(ious(maps, concept, *how, np.random.default_rng(seed)).mean()),
        shuffled=None if other is None else float(ious(maps, other, *how).mean()),
    )


class _Masks(dict):
    """The active pixels of the maps of one latent, each made once for all segmenters and names."""

    def __call__(self, seen: ActivationMap, mode: Mode) -> Mask:
        key = id(seen), mode
        if key not in self:
            self[key] = activation_mask(seen, mode)
        return self[key]


def maps_on(
    place: SAEInPlace, images: Sequence[Image.Image], latents: Sequence[int], indices: Sequence[int]
) -> dict[int, list[ActivationMap]]:
    """Return each latent's activation maps on the same images; random images are the chance in `latent_iou`.

    indices: of the images, in the data set.

    Raises:
        NoPatchGrid: the model has none.
    """
    pictures = Chosen(images, indices)
    maps, sizes = activation_maps(place, pictures, latents), [picture.size for picture in pictures]
    return {
        latent: [ActivationMap(i, size, m) for i, size, m in zip(indices, sizes, maps[:, column], strict=True)]
        for column, latent in enumerate(latents)
    }


def score_ious(
    maps: Callable[[int], tuple[Sequence[ActivationMap], Sequence[ActivationMap]]], explained: Mapping[int, Explained],
    others: Mapping[int, str | None], segmenters: Mapping[str, FindConcept], modes: Sequence[Mode] = (PAPER, STRICT),
    *, runs: int = 10, seed: int = 0,
) -> dict[Column, dict[int, Comparison]]:  # fmt: skip
    """Return `latent_iou` of every latent, in every mode, by every segmenter.

    It is fastest if latents with the same concept stand next to each other, as `explained_latents` gives them.

    maps: latent to its maps on its own images and on random ones.
    others: another latent's concept, as `other_names` gives them.
    segmenters: by name; the first is the reference, so its columns have no segmenter's name.
    """
    names = {name: name if number else "" for number, name in enumerate(segmenters)}
    columns = {
        Column("iou", mode.name, names[name]): (mode, find) for mode in modes for name, find in segmenters.items()
    }
    comparisons: dict[Column, dict[int, Comparison]] = {column: {} for column in columns}
    for latent, (concept, _) in progress_bar(explained.items(), desc="segmenting", unit=" latents"):
        (own_maps, random_maps), masks = maps(latent), _Masks()
        for column, (mode, find) in columns.items():
            comparisons[column][latent] = latent_iou(
                own_maps, random_maps, concept, others[latent], find, mode, runs=runs, seed=seed + latent, mask_of=masks
            )
    return comparisons
