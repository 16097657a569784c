"""Choose the latents to score, and score them: by IoU, by CLIP score, and beside each what chance gives."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.score.clip import score_clips
from lmm_sae_nb.score.iou import maps_on, score_ious
from lmm_sae_nb.score.masks import PAPER, STRICT, FindConcept, both_modes, exemplar_maps
from lmm_sae_nb.score.scores import Column, ColumnScores, Comparison, Explained, Scores, latents_by_kind
from lmm_sae_nb.score.similarity import AllPairs
from lmm_sae_nb.support.images import Chosen
from lmm_sae_nb.truth.accuracy import other_names
from lmm_sae_nb.truth.label_maps import LabelMaps

T = TypeVar("T")


def explained_latents(
    rows: Mapping[int | str, Mapping], truth: LabelMaps | None = None, *, most: int | None = None, seed: int = 0
) -> dict[int, Explained]:
    """Return concept and kind of the latents that were explained, latents with the same concept next to each other.

    A kind that the explanation does not give is taken from the ground truth; else it is "other".

    rows: latent to its row in explanations.json.
    truth: if given, a latent whose concept it does not know is left out.
    most: take so many at random, if there are more.
    seed: of the draw.

    Raises:
        ValueError: fewer than two latents are left.
    """
    explained: dict[int, Explained] = {}
    for latent, row in rows.items():
        concept = row["concept"] if row.get("outcome", "explained") == "explained" else None
        kinds = truth.kinds_of(concept) if truth and concept else []
        if concept and (kinds or not truth):
            explained[int(latent)] = Explained(concept, row.get("kind") or (kinds or ["other"])[0])
    if len(explained) < 2:
        raise ValueError(
            f"{len(explained)} of {len(rows)} latents have an explanation that can be scored, scores need two; "
            "run notebooks/03_interpret_features.py with more latents"
        )
    kept = sample(sorted(explained), most, seed)
    return dict(sorted(((latent, explained[latent]) for latent in kept), key=lambda item: (item[1], item[0])))


def sample(items: Sequence[T], most: int | None, seed: int) -> list[T]:
    """Return `most` of the items at random, in their order; all if there are no more, or `most` is None."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[n] for n in np.sort(np.random.default_rng(seed).choice(len(items), most, replace=False))]


def sample_by_kind(explained: Mapping[int, Explained], each: int, seed: int = 0) -> list[int]:
    """Return `each` latents of every kind at random; all of a kind that has no more."""
    groups = {kind: latents for kind, latents in latents_by_kind(explained).items() if kind != "total"}
    return [latent for latents in groups.values() for latent in sample(latents, each, seed)]


def score_latents(
    place: SAEInPlace, images: Sequence[Image.Image], exemplars: Mapping[int, Sequence[Exemplar]],
    explained: Mapping[int, Explained], segmenters: Mapping[str, FindConcept], all_pairs: AllPairs | None = None, *,
    threshold: float = STRICT.threshold, n_top: int = 5, random_runs: int = 10, clip_runs: int = 30,
    skipped: Collection[int] = (), seed: int = 0,
) -> Scores:  # fmt: skip
    """Score every latent in both modes, on its own images and by chance (section 3.2): the data of Table 1.

    The IoU is by each segmenter. A model without a patch grid has no IoU; its only score is the CLIP score of whole
    images.

    place: the model, which computes the latents on random images.
    images: that were cached.
    exemplars: each latent's own images.
    explained: the latents, as `explained_latents` gives them.
    segmenters: by name, as `open_segmenters` gives them; the first is the reference.
    all_pairs: cosines of images and texts, as `open_similarity` gives them; None: no CLIP score.
    threshold: of an image's highest activation, in the strict mode.
    n_top: random images in a run.
    random_runs, clip_runs: draws of random images, for the IoU and for the CLIP score.
    skipped: images that cannot be read.
    seed: of everything random.

    Raises:
        ValueError: a latent has no exemplars.
    """
    modes = both_modes(threshold) if place.lmm.grid else [PAPER]
    others, rng = other_names(explained, seed), np.random.default_rng(seed)
    readable = np.setdiff1d(np.arange(len(images)), list(skipped))
    drawn, drawn_for_clip = (rng.choice(readable, runs * n_top).tolist() for runs in (random_runs, clip_runs))
    comparisons: dict[Column, dict[int, Comparison]] = {}
    if place.lmm.grid:
        random = maps_on(place, images, list(explained), drawn)
        comparisons |= score_ious(
            lambda latent: (exemplar_maps(exemplars[latent]), random[latent]),
            explained, others, segmenters, modes, runs=random_runs, seed=seed,
        )  # fmt: skip
    if all_pairs:
        pictures = Chosen(images, drawn_for_clip)
        comparisons |= score_clips(all_pairs, exemplars, explained, others, pictures, modes, runs=clip_runs, seed=seed)
    return Scores(dict(explained), [ColumnScores(column, latents) for column, latents in comparisons.items()])
