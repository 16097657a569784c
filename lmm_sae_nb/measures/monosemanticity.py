"""Monosemanticity score: are the images that excite a latent alike?

Source: sae-for-vlm (Pach et al., NeurIPS 2025, arXiv 2504.02821). For a latent with activation a_n on image n, and with
unit vectors e_n that say what the images are, the score is the mean similarity of two images, weighted by both
activations:

    MS = sum over n < m of a_n a_m (e_n . e_m)  /  sum over n < m of a_n a_m

It takes all pairs of images. But the square of a sum holds every product twice and each square once, so one pass over
the images gives the same:

    MS = (|sum a e|^2 - sum a^2) / ((sum a)^2 - sum a^2)

Departures: the code of sae-for-vlm scales activations to [0, 1] for each latent, which changes nothing where the lowest
activation is 0. Its vectors are those of DINOv2 or CLIP; here they are those of the embedded CLIP, and, as no system of
photographs can have them, the true ones: which fraction of the image each concept covers. The control gives each
latent's activations to random images.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from lmm_sae_nb.measures.image_latents import ImageLatents, mean_metrics, require_fit
from lmm_sae_nb.score.scores import Explained
from lmm_sae_nb.support.stages import Metrics
from lmm_sae_nb.truth.label_maps import LabelMaps


def monosemanticity_scores(
    acts: Float[np.ndarray, "images latents"], vectors: Float[np.ndarray, "images width"]
) -> Float[np.ndarray, " latents"]:
    """Return the score of each latent, in [-1, 1]; NaN for a latent that fewer than two images excite.

    acts: activation of each latent on each image, at least 0.
    vectors: of length 1; a vector of length 0 counts as like none.
    """
    acts, vectors = acts.astype(np.float64), vectors.astype(np.float64)
    squares = acts**2
    alike = ((acts.T @ vectors) ** 2).sum(1) - squares.T @ (vectors**2).sum(1)
    pairs = acts.sum(0) ** 2 - squares.sum(0)
    several = (acts > 0).sum(0) > 1
    return np.divide(alike, pairs, out=np.full(len(pairs), np.nan), where=several)


def concept_vectors(truth: LabelMaps, images: int, grid: tuple[int, int]) -> Float[np.ndarray, "images concepts"]:
    """Return for each of the first images the fraction of it that each concept covers, scaled to length 1."""
    covered = np.array([truth.coverage(number, grid).mean(1) for number in range(images)])
    return covered / np.maximum(np.linalg.norm(covered, axis=1, keepdims=True), 1e-12)


def monosemanticity(
    latents: ImageLatents, vectors: Mapping[str, Float[np.ndarray, "images width"]],
    explained: Mapping[int, Explained] | None = None, *, pool: str = "mean", seed: int = 0,
) -> Metrics:  # fmt: skip
    """Return the mean score of the live latents for each sort of vectors, beside the same with shuffled activations.

    monosemanticity_NAME: the mean over latents, with its 99% interval.
    monosemanticity_NAME_KIND: the same over the latents whose explanation has this kind.
    monosemanticity_NAME_shuffled: the same, each latent's activations given to random images.
    monosemanticity_latents: how many latents have a score.

    latents: activations on the images.
    vectors: NAME to vectors of these images, such as `ImageTextSimilarity.embed` and `concept_vectors` give them.
    explained: concept and kind of latents; None leaves the kinds out.
    pool: "mean" or "max": an image's activation is the mean or the highest over its patches.
    seed: of the shuffling.

    Raises:
        ValueError: another `pool`, vectors of other images, or fewer than two latents that two images excite.
    """
    if pool not in ("mean", "max"):
        raise ValueError(f"pool is {pool!r}; give 'mean' or 'max'")
    acts = latents.means if pool == "mean" else latents.maxima
    scored = np.flatnonzero((acts > 0).sum(0) > 1)
    if len(scored) < 2:
        raise ValueError(
            f"{len(scored)} latents are active on two or more of {latents.images} images; give more images"
        )
    acts = acts[:, scored]
    shuffled = np.random.default_rng(seed).permuted(acts, axis=0)
    kinds = [explained[n].kind if explained and n in explained else None for n in scored.tolist()]
    metrics: Metrics = {"monosemanticity_latents": len(scored)}
    for name, rows in vectors.items():
        require_fit(latents, **{f"{name}_vectors": rows})
        metrics |= mean_metrics(f"monosemanticity_{name}", monosemanticity_scores(acts, rows), kinds)
        metrics |= mean_metrics(f"monosemanticity_{name}_shuffled", monosemanticity_scores(shuffled, rows))
    return metrics
