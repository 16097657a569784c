"""CLIP score of a latent's images with its explanation, beside chance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.score.iou import Compared
from lmm_sae_nb.score.masks import PAPER, STRICT, Mode, activation_mask, moved, spots
from lmm_sae_nb.support.images import pixel_hash

Grid = Callable[[Sequence[Image.Image], Sequence[str]], Float[np.ndarray, "images texts"]]  # cosines of each with each


def region(exemplar: Exemplar, mode: Mode, elsewhere: np.random.Generator | None = None) -> Image.Image:
    """What CLIP sees of an exemplar: the whole image, or (`mode.region`) the active patches with the rest black."""
    if not mode.region:
        return exemplar.image
    (spot,) = spots([exemplar])
    mask = activation_mask(spot, mode)
    mask = mask if elsewhere is None else moved(mask, elsewhere)
    return Image.fromarray(np.asarray(exemplar.image.convert("RGB")) * mask[..., None])


def clip_scores(
    similar: Grid, pictures: Iterable[Image.Image], concepts: Sequence[str], batch: int = 64
) -> Float[np.ndarray, "pictures concepts"]:
    """100 max(cosine, 0) of every picture with every concept, as torchmetrics' CLIPScore; pictures may be a stream.

    Of pictures with the same pixels one is looked at. ValueError for no pictures, or a similarity of another shape.
    """
    found, waiting, places, numbers = [], [], [], {}

    def score() -> None:
        cosines = np.asarray(similar(waiting, list(concepts)), np.float32)
        if cosines.shape != (len(waiting), len(concepts)):
            raise ValueError(
                f"the similarity gave shape {cosines.shape} for {len(waiting)} images and {len(concepts)} texts; it "
                "has to give a cosine for each of an image with a text"
            )
        found.append(100 * np.maximum(cosines, 0))
        waiting.clear()

    for picture in pictures:
        number = numbers.setdefault(pixel_hash(picture), len(numbers))
        if number == len(found) * batch + len(waiting):  # not seen before
            waiting.append(picture)
        places.append(number)
        if len(waiting) == batch:
            score()
    if waiting:
        score()
    if not found:
        raise ValueError("no pictures to compare with concepts; leave out latents that never fire")
    return np.concatenate(found)[places]


def latents_clip(
    similar: Grid, sets: Callable[[], Iterator[Sequence[Exemplar]]], concepts: Sequence[str],
    others: Sequence[str | None], mode: Mode, drawn: Iterable[Image.Image], *, runs: int = 30, seed: int = 0,
) -> list[Compared]:  # fmt: skip
    """CLIP score of each latent's concept with its own images (Table 1's CS), and beside it chance.

    sets: gives each latent's exemplars, anew at every call. Whole images have random images as baseline (`drawn`, as
    many for each run); highlighted regions have regions of the same area elsewhere in the same images.
    """
    vocabulary = sorted({*concepts, *filter(None, others)})
    column = {concept: n for n, concept in enumerate(vocabulary)}
    sizes: list[int] = []

    def regions() -> Iterator[Image.Image]:
        for own in sets():
            sizes.append(len(own))
            if not own:
                raise ValueError(f"{concepts[len(sizes) - 1]!r} has no image; give each concept at least one image")
            yield from (region(e, mode) for e in own)

    by_region = clip_scores(similar, regions(), vocabulary)
    if len(sizes) != len(concepts):
        raise ValueError(f"{len(concepts)} concepts, images of {len(sizes)}; give each concept at least one image")
    ends = np.cumsum(sizes)[:-1]
    seen = np.split(by_region, ends)
    if mode.region:
        rng = np.random.default_rng(seed)
        away = (region(e, mode, rng) for own in sets() for e in own)
        areas, randoms = np.split(clip_scores(similar, away, vocabulary), ends), None
    else:
        by_picture = clip_scores(similar, drawn, vocabulary)
        if len(by_picture) % runs:
            raise ValueError(f"{len(by_picture)} random images cannot be shared by {runs} runs; draw as many for each")
        areas, randoms = None, by_picture.reshape(runs, -1, len(vocabulary)).mean(1)
    return [
        Compared(
            float(seen[n][:, column[concept]].mean()),
            None if randoms is None else tuple(randoms[:, column[concept]].tolist()),
            None if areas is None else float(areas[n][:, column[concept]].mean()),
            None if other is None else float(seen[n][:, column[other]].mean()),
        )
        for n, (concept, other) in enumerate(zip(concepts, others, strict=True))
    ]


def all_clips(
    similar: Grid, exemplars: Mapping[int, Sequence[Exemplar]], concepts: Mapping[int, str],
    others: Mapping[int, str | None], drawn: Sequence[Image.Image], modes: Sequence[Mode] = (PAPER, STRICT),
    *, runs: int = 30, seed: int = 0,
) -> dict[str, dict[int, Compared]]:  # fmt: skip
    """`latents_clip` in every mode, as columns clip_MODE; exemplars: by latent."""
    names, wrong = list(concepts.values()), [others[latent] for latent in concepts]
    return {
        f"clip_{mode.name}": dict(
            zip(
                concepts,
                latents_clip(
                    similar, lambda: (exemplars[n] for n in concepts), names, wrong, mode, drawn, runs=runs, seed=seed
                ),
                strict=True,
            )
        )
        for mode in modes
    }
