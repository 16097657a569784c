"""IoU of a latent's active patches with its concept, beside chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from lmm_sae_nb.cache.encode_images import activation_maps
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.score.masks import PAPER, STRICT, Mode, Spot, Where, ious


class Compared(NamedTuple):
    """A latent's score on its own images, and what chance gives in its place; None where that has no meaning.

    random: other images, by run; area: the same images, the activation moved elsewhere; shuffled: another's concept.
    """

    score: float
    random: tuple[float, ...] | None
    area: float | None
    shuffled: float | None

    def columns(self, name: str) -> dict[str, float]:
        """As named numbers for a table; the runs of `random` as their mean."""
        told = {name: self.score, f"{name}_area": self.area, f"{name}_shuffled": self.shuffled}
        told[f"{name}_random"] = None if self.random is None else float(np.mean(self.random))
        return {key: float(value) for key, value in told.items() if value is not None}


def latent_iou(
    own: Sequence[Spot], drawn: Sequence[Spot], concept: str, other: str | None, where: Where, mode: Mode,
    *, runs: int = 10, seed: int = 0,
) -> Compared:  # fmt: skip
    """Section 2.2: mean IoU of a latent's activation masks with its concept's masks, over its own images.

    drawn: the same latent on random images, equally many for each of `runs`. ValueError if there are no own images,
    or the drawn ones do not make up the runs.
    """
    if not own:
        raise ValueError(f"no exemplars to score {concept!r} with; leave out latents that never fire")
    if runs < 1 or not drawn or len(drawn) % runs:
        raise ValueError(f"{len(drawn)} random images cannot be shared by {runs} runs; draw as many for each")
    rng = np.random.default_rng(seed)
    return Compared(
        float(ious(own, concept, where, mode).mean()),
        tuple(ious(drawn, concept, where, mode).reshape(runs, -1).mean(1).tolist()),
        float(ious(own, concept, where, mode, elsewhere=rng).mean()),
        None if other is None else float(ious(own, other, where, mode).mean()),
    )


def drawn_spots(
    place: SAEInPlace, images: Sequence[Image.Image], latents: Sequence[int], numbers: Sequence[int]
) -> dict[int, list[Spot]]:
    """Each latent on the same images, by their numbers: at random, they are the baseline of `latent_iou`.

    NoPatchGrid for a model without one.
    """
    pictures = [images[number] for number in numbers]
    maps = activation_maps(place, pictures, latents)
    return {
        latent: [Spot(n, p.size, m) for n, p, m in zip(numbers, pictures, maps[:, column], strict=True)]
        for column, latent in enumerate(latents)
    }


def all_ious(
    places: Callable[[int], tuple[Sequence[Spot], Sequence[Spot]]], concepts: Mapping[int, str],
    others: Mapping[int, str | None], segmenters: Mapping[str, Where], modes: Sequence[Mode] = (PAPER, STRICT),
    *, runs: int = 10, seed: int = 0,
) -> dict[str, dict[int, Compared]]:  # fmt: skip
    """`latent_iou` of every latent, in every mode, by every segmenter: a dictionary a column.

    places: a latent's own and drawn images. Columns are called iou_MODE for the first segmenter and
    iou_MODE_SEGMENTER for the others. Latents with one concept are best next to each other.
    """
    names = {
        (mode, name): f"iou_{mode.name}" + f"_{name}" * bool(n) for mode in modes for n, name in enumerate(segmenters)
    }
    found: dict[str, dict[int, Compared]] = {column: {} for column in names.values()}
    for latent, concept in tqdm(concepts.items(), desc="segmenting", unit=" latents", mininterval=2):
        own, drawn = places(latent)
        for (mode, name), column in names.items():
            found[column][latent] = latent_iou(
                own, drawn, concept, others[latent], segmenters[name], mode, runs=runs, seed=seed + latent
            )
    return found
