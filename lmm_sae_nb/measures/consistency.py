"""Consistency of dictionaries: do SAEs that differ in their seed find the same directions?

Source: the mean maximal cosine (MMCS, Cunningham et al., arXiv 2309.08600), and one-to-one matching by the Hungarian
algorithm (Paulo and Belrose, arXiv 2501.16615; as pairwise MCC, Song et al., arXiv 2505.20254; the dictionary package
overcomplete has the same as a distance). With unit decoder rows d of one SAE and d' of another:

    max_cosine = mean over i of max over j of d_i . d'_j
    matched    = max over one-to-one maps m of the mean over i of d_i . d'_m(i)

Departures: only live latents count, in both SAEs. With a different number of live latents, the matching leaves out the
rest of the larger SAE. The control puts a random dictionary of equal size in the place of the second SAE. In a space of
few dimensions its maximal cosines are far above 0. Many rows stay near where they started: SAEs of one seed share these
starts, also an untrained one, so only SAEs of different seeds say anything.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

from lmm_sae_nb.measures.image_latents import mean_metrics
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.score.scores import Explained
from lmm_sae_nb.support.intervals import bounds, proportion
from lmm_sae_nb.support.stages import Metrics

SAME = 0.7  # cosine above which Paulo and Belrose call two matched latents the same


def maximal_cosines(
    one: Float[np.ndarray, "n width"], other: Float[np.ndarray, "m width"]
) -> Float[np.ndarray, " n"]:  # fmt: skip
    """Return for each row of `one` the highest cosine with a row of `other`."""
    return (_unit(one) @ _unit(other).T).max(1)


def matched_cosines(
    one: Float[np.ndarray, "n width"], other: Float[np.ndarray, "m width"]
) -> Float[np.ndarray, " pairs"]:  # fmt: skip
    """Return the cosines of the one-to-one matching of highest sum, in the order of the rows of `one` that have one."""
    cosines = _unit(one) @ _unit(other).T
    return cosines[linear_sum_assignment(cosines, maximize=True)]


def _unit(rows: Float[np.ndarray, "n width"]) -> Float[np.ndarray, "n width"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def live_directions(place: SAEInPlace, live: Bool[np.ndarray, " latents"]) -> Float[np.ndarray, "live width"]:
    """Return the decoder rows of the live latents, float32.

    Raises:
        ValueError: there are fewer than two.
    """
    if live.sum() < 2:
        raise ValueError(f"{live.sum()} of {len(live)} latents are live; give an SAE with at least two")
    return place.sae.W_dec.detach().float().cpu().numpy()[live]


def consistency(
    place: SAEInPlace, live: ArrayLike, other: SAEInPlace, other_live: ArrayLike,
    explained: Mapping[int, Explained] | None = None, *, seed: int = 0,
) -> Metrics:  # fmt: skip
    """Return how far the live directions of two SAEs agree, beside random directions in the other's place.

    consistency_max_cosine: mean over the SAE's latents of the highest cosine with a latent of the other.
    consistency_max_cosine_KIND: the same over the latents whose explanation has this kind.
    consistency_max_cosine_back: the same from the other SAE.
    consistency_matched: mean cosine of the one-to-one matching.
    consistency_same: fraction of the matched pairs with a cosine above `SAME`.
    *_random: the same with random directions, as many as the other SAE has live latents.

    place, other: SAEs of the same layer.
    live, other_live: whether each latent is active on an image, such as `LatentCache.live`.
    explained: concept and kind of latents of the first SAE; None leaves the kinds out.
    seed: of the random directions.

    Raises:
        ValueError: the SAEs have another width or layer, or fewer than two live latents.
    """
    widths = [each.sae.W_dec.shape[1] for each in (place, other)]
    if widths[0] != widths[1] or place.layer != other.layer:
        raise ValueError(
            f"the SAEs have widths {widths[0]} and {widths[1]} and layers {place.layer} and {other.layer}; directions "
            "of different spaces have no cosine, so give SAEs of one layer"
        )
    live = np.asarray(live, bool)
    rows, others = live_directions(place, live), live_directions(other, np.asarray(other_live, bool))
    random = np.random.default_rng(seed).standard_normal(others.shape).astype(np.float32)
    numbers = np.flatnonzero(live).tolist()
    kinds = [explained[n].kind if explained and n in explained else None for n in numbers]
    metrics: Metrics = {}
    for end, against in (("", others), ("_random", random)):
        matched = matched_cosines(rows, against)
        metrics |= mean_metrics(f"consistency_max_cosine{end}", maximal_cosines(rows, against), () if end else kinds)
        metrics |= mean_metrics(f"consistency_max_cosine_back{end}", maximal_cosines(against, rows))
        metrics |= mean_metrics(f"consistency_matched{end}", matched)
        metrics |= bounds(f"consistency_same{end}", proportion(matched > SAME))
    return metrics
