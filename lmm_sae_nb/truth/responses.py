"""What a latent responds to: a concept, the same place of every image, edges, or several concepts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float

from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.truth.common_concept import CommonConcept, best_common_concept, images_show, in_common
from lmm_sae_nb.truth.label_maps import LabelMaps

RESPONSES = ("one concept", "a detail", "a place", "edges", "several concepts", "none of these")
SAME_PLACE = 0.3  # mean IoU of the visible patches of two images; of patches at random it is below 0.1
ON_EDGES = 0.5  # fraction of the visible patches; of all patches about 0.2 are on an edge
BOTH_LABELS = 0.125  # fraction of a patch that each of two labels covers if an edge runs through the patch
SEVERAL = 3  # concepts at most
LEFT_OUT = 5  # one image in so many may show none of them


def common_concept(truth: LabelMaps, exemplars: Sequence[Exemplar]) -> CommonConcept | None:
    """Return the concept that a latent's exemplars have in common (`best_common_concept`), or None."""
    visible, coverage = truth.visible_and_coverage(exemplars)
    return best_common_concept(visible, coverage, truth.names) if len(visible) else None


def response_of(truth: LabelMaps, exemplars: Sequence[Exemplar]) -> str:
    """Return what a latent responds to, by its exemplars: the first of `RESPONSES` that holds.

    One concept: the exemplars have one in common (`common_concept`).
    A detail: they do, but the visible patches are a small part of it: their IoU with it is below `LEAST_IOU`.
    A place: the visible patches are in the same part of every image.
    Edges: the border of something runs through the visible patches.
    Several concepts: at most three, without colours, account for four images in five.
    None of these: all else, and a latent without exemplars.
    """
    visible, coverage = truth.visible_and_coverage(exemplars)
    if not len(visible):
        return "none of these"
    if best_common_concept(visible, coverage, truth.names):
        return "one concept"
    is_colour = truth.kinds == "colour"
    if in_common(visible, coverage)[~is_colour].any():
        return "a detail"
    pairs = [(one & two).sum() / max(1, (one | two).sum()) for one, two in combinations(visible, 2)]
    if pairs and np.mean(pairs) >= SAME_PLACE:
        return "a place"
    if (_on_edges(truth, coverage) & visible).sum() >= ON_EDGES * visible.sum():
        return "edges"
    few = _concepts_needed(images_show(visible, coverage[:, ~is_colour])) <= SEVERAL
    return "several concepts" if few else "none of these"


def _on_edges(
    truth: LabelMaps, coverage: Float[np.ndarray, "images concepts patches"]
) -> Bool[np.ndarray, "images patches"]:
    """Tell which patches have two labels of one kind; no label is a label too, and colours do not count."""
    edges = np.zeros((len(coverage), coverage.shape[2]), bool)
    for kind in set(truth.kinds) - {"colour"}:
        labels = coverage[:, truth.kinds == kind]
        unlabelled = 1 - labels.sum(1, keepdims=True)
        edges |= (np.concatenate([labels, unlabelled], 1) >= BOTH_LABELS).sum(1) > 1
    return edges


def _concepts_needed(shows: Bool[np.ndarray, "images concepts"]) -> float:
    """Count how many concepts, the most frequent first, leave out one image in five at most; infinity if none do."""
    allowed, needed = len(shows) // LEFT_OUT, 0
    while len(shows) > allowed:
        best = shows.sum(0).argmax()
        if not shows[:, best].any():
            return float("inf")
        shows, needed = shows[~shows[:, best]], needed + 1
    return needed
