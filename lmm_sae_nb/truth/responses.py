"""What a latent responds to: its concept, the same place, edges, or several things."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float

from lmm_sae_nb.interpret.exemplars import Exemplar, require_patches
from lmm_sae_nb.truth.common_concept import PURE, SHOWS, Shown, best_shown, common
from lmm_sae_nb.truth.label_maps import PatchTruth

RESPONSES = ("one concept", "a detail", "a place", "edges", "several concepts", "nothing")


SAME_PLACE = 0.3  # mean IoU of the visible patches of two images; of patches at random it is below 0.1


ON_EDGES = 0.5  # of the visible patches; of all patches about 0.2 are


BESIDE = 0.125  # of a patch that each of two labels must cover for an edge to run through it


SEVERAL = 3  # concepts that together leave out one image in five at most


def shown_by(truth: PatchTruth, exemplars: Sequence[Exemplar]) -> Shown | None:
    """The concept that a latent's exemplars show best by the rule of `best_shown`; None if they have none in common."""
    visible, shares = _patches(truth, exemplars)
    return best_shown(visible, shares, truth.names) if len(visible) else None


def _patches(
    truth: PatchTruth, exemplars: Sequence[Exemplar]
) -> tuple[Bool[np.ndarray, "images patches"], Float[np.ndarray, "images concepts patches"]]:
    require_patches(exemplars)
    visible = np.array([exemplar.visible.ravel() for exemplar in exemplars], bool)
    return visible, np.array([truth[exemplar.image_index] for exemplar in exemplars])


def responds_to(truth: PatchTruth, exemplars: Sequence[Exemplar]) -> str:
    """What a latent responds to, by its exemplars: the first of `RESPONSES` that holds.

    One concept: they have one in common (`shown_by`). A detail: they do, but it fits the visible patches worse than
    that rule allows. A place: patches are visible in the same part of the images. Edges: patches are, through
    which the border of something runs. Several concepts: at most three, colours apart, account for four images in
    five. Nothing: all else, and a latent without exemplars.
    """
    visible, shares = _patches(truth, exemplars)
    if not len(visible):
        return "nothing"
    if best_shown(visible, shares, truth.names):
        return "one concept"
    coloured = truth.kinds == "colour"
    if common(visible, shares)[~coloured].any():
        return "a detail"
    pairs = [(one & two).sum() / max(1, (one | two).sum()) for one, two in combinations(visible, 2)]
    if pairs and np.mean(pairs) >= SAME_PLACE:
        return "a place"
    if (_edges(truth, shares) & visible).sum() >= ON_EDGES * visible.sum():
        return "edges"
    return "several concepts" if _account(visible, shares[:, ~coloured]) <= SEVERAL else "nothing"


def _edges(truth: PatchTruth, shares: np.ndarray) -> Bool[np.ndarray, "images patches"]:
    """Patches with two labels of one kind, no label being one too; colours apart."""
    found = np.zeros((len(shares), shares.shape[2]), bool)
    for kind in set(truth.kinds) - {"colour"}:
        parts = shares[:, truth.kinds == kind]
        none = 1 - parts.sum(1, keepdims=True)
        found |= (np.concatenate([parts, none], 1) >= BESIDE).sum(1) > 1
    return found


def _account(visible: Bool[np.ndarray, "images patches"], shares: np.ndarray) -> float:
    """How many concepts, taken greedily, leave out one image in five at most; infinity if none do."""
    patches = np.maximum(visible.sum(1), 1)[:, None]
    shows = ((shares >= SHOWS) & visible[:, None]).sum(2) / patches >= PURE
    taken = 0
    while len(shows) > len(visible) // 5:
        best = shows.sum(0).argmax()
        if not shows[:, best].any():
            return float("inf")
        shows, taken = shows[~shows[:, best]], taken + 1
    return taken
