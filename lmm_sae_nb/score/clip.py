"""Score latents by the CLIP score of their images with their concept, and compare with chance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.score.masks import PAPER, STRICT, Mode, activation_mask, exemplar_maps, move_mask
from lmm_sae_nb.score.scores import Column, Comparison, Explained
from lmm_sae_nb.score.similarity import AllPairs, clip_score
from lmm_sae_nb.support.images import pixel_hash, rgb

PIXELS = 2**26  # of pictures that are held at once: 270 MB


def clip_input(exemplar: Exemplar, mode: Mode, rng: np.random.Generator | None = None) -> Image.Image:
    """Return the image that CLIP sees: the whole one, or (`mode.region`) the active patches with the rest black.

    rng: moves the active patches to a random place; None leaves them where they are.

    Raises:
        NoPatchGrid: a region is wanted of a whole image.
    """
    if not mode.region:
        return exemplar.image
    mask = activation_mask(exemplar_maps([exemplar])[0], mode)
    mask = mask if rng is None else move_mask(mask, rng)
    return Image.fromarray(np.asarray(rgb(exemplar.image)) * mask[..., None])


def clip_scores(
    all_pairs: AllPairs, pictures: Iterable[Image.Image], concepts: Sequence[str], batch: int = 64
) -> Float[np.ndarray, "pictures concepts"]:
    """Return the CLIP score of every picture with every concept.

    Pictures with the same pixels are compared once.

    all_pairs: gives the cosines.
    pictures: may be a stream.
    batch: pictures that are held at once, or fewer large ones.

    Raises:
        ValueError: there are no pictures, or the cosines have another shape.
    """
    scores, waiting, places, numbers, pixels = [], [], [], {}, 0

    def score() -> None:
        cosines = np.asarray(all_pairs(waiting, list(concepts)), np.float32)
        if cosines.shape != (len(waiting), len(concepts)):
            raise ValueError(
                f"the similarity gave shape {cosines.shape} for {len(waiting)} images and {len(concepts)} texts; it "
                "has to give a cosine for each image with each text"
            )
        scores.append(clip_score(cosines))
        waiting.clear()

    for picture in pictures:
        number = numbers.setdefault(pixel_hash(picture), len(numbers))
        if number == sum(map(len, scores)) + len(waiting):  # not seen before
            waiting.append(picture)
            pixels += picture.width * picture.height
        places.append(number)
        if len(waiting) == batch or pixels > PIXELS:
            score()
            pixels = 0
    if waiting:
        score()
    if not scores:
        raise ValueError("no pictures to compare with concepts; leave out latents that never fire")
    return np.concatenate(scores)[places]


def latents_clip(
    all_pairs: AllPairs, exemplars: Mapping[int, Sequence[Exemplar]], explained: Mapping[int, Explained],
    others: Mapping[int, str | None], mode: Mode, random: Iterable[Image.Image], *, runs: int = 30, seed: int = 0,
) -> dict[int, Comparison]:  # fmt: skip
    """Return the CLIP score of each latent's concept with its own images (Table 1's CS), and chance.

    Whole images are compared with random images. Highlighted regions are compared with regions of the same area
    elsewhere in the same images.

    exemplars: each latent's own images.
    others: another latent's concept, as `other_names` gives them.
    random: random images, equally many for each of `runs`.
    seed: of the places to which regions are moved.

    Raises:
        ValueError: a latent has no image, or the random ones cannot be divided among the runs.
    """
    concepts = [concept for concept, _ in explained.values()]
    vocabulary = sorted({*concepts, *(other for n in explained if (other := others[n]))})
    sizes: dict[int, int] = {}

    def inputs(rng: np.random.Generator | None = None) -> Iterator[Image.Image]:
        for latent, (concept, _) in explained.items():
            rows = exemplars[latent]
            if not rows:
                raise ValueError(f"{concept!r} has no image; give each concept at least one image")
            sizes[latent] = len(rows)
            yield from (clip_input(each, mode, rng) for each in rows)

    def by_latent(scores: np.ndarray) -> list[dict[str, float]]:
        means = (part.mean(0).tolist() for part in np.split(scores, np.cumsum(list(sizes.values()))[:-1]))
        return [dict(zip(vocabulary, row, strict=True)) for row in means]

    means = by_latent(clip_scores(all_pairs, inputs(), vocabulary))
    moved, runs_of = None, None
    if mode.region:
        moved = by_latent(clip_scores(all_pairs, inputs(np.random.default_rng(seed)), vocabulary))
    else:
        by_picture = clip_scores(all_pairs, random, vocabulary)
        if len(by_picture) % runs:
            raise ValueError(
                f"{len(by_picture)} random images cannot be divided among {runs} runs; draw as many for each"
            )
        by_run = by_picture.reshape(runs, -1, len(vocabulary)).mean(1).T.tolist()
        runs_of = dict(zip(vocabulary, map(tuple, by_run), strict=True))
    return {
        latent: Comparison(
            score=means[n][concept],
            random=runs_of[concept] if runs_of else None,
            area=moved[n][concept] if moved else None,
            shuffled=means[n][others[latent]] if others[latent] else None,
        )
        for n, (latent, (concept, _)) in enumerate(explained.items())
    }


def score_clips(
    all_pairs: AllPairs, exemplars: Mapping[int, Sequence[Exemplar]], explained: Mapping[int, Explained],
    others: Mapping[int, str | None], random: Sequence[Image.Image], modes: Sequence[Mode] = (PAPER, STRICT),
    *, runs: int = 30, seed: int = 0,
) -> dict[Column, dict[int, Comparison]]:  # fmt: skip
    """Return `latents_clip` in every mode; arguments and errors as there."""
    how = {"runs": runs, "seed": seed}
    return {
        Column("clip", mode.name): latents_clip(all_pairs, exemplars, explained, others, mode, random, **how)
        for mode in modes
    }
