"""Detect concepts without an SAE: by a difference of means and by a logistic probe, beside the best SAE latent.

All three read the same hidden states. They are fitted on the cached scenes, and so are their thresholds. Held-out
scenes measure them. As a control, all is done again with the label maps of other scenes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from PIL import Image
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from lmm_sae_nb.cache.encode_images import base_states
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.compare.saes import CachedSAE
from lmm_sae_nb.model.hookpoints import Hookpoint
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.intervals import bounds, mean_interval, proportion
from lmm_sae_nb.support.stages import Metrics
from lmm_sae_nb.truth.detectors import DETECTS, choose_detectors, other_images
from lmm_sae_nb.truth.label_maps import LabelMaps

BLOCK = 32  # concepts whose scores are in memory at the same time


# ---- hidden states and what they show ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledStates:
    """The hidden states of patches, and which concepts each patch shows.

    states: float32, one image's patches after the other.
    shows: 1 where a patch shows a concept.
    names: (kind, concept) of each column of `shows`.
    images: how many images; each has the same number of patches.
    """

    states: Float[np.ndarray, "patches width"]
    shows: sparse.csc_array
    names: list[tuple[str, str]]
    images: int

    @classmethod
    def read(cls, lmm: LMM, layer: Hookpoint, images: Sequence[Image.Image], truth: LabelMaps) -> LabelledStates:
        """Run the model up to the layer and keep its output at the base patches.

        images: as the rows of `truth`, in the same order.
        """
        states = base_states(lmm, layer, images).flatten(0, 1).numpy()
        shows = truth.patches_showing(range(len(images)), lmm.grid).T.tocsc()
        return cls(states, shows, truth.names, len(images))

    def with_other_maps(self) -> LabelledStates:
        """Return the same states with each image's labels exchanged for those of another (`other_images`)."""
        patches = np.arange(len(self.states)).reshape(self.images, -1)
        return replace(self, shows=self.shows.tocsr()[patches[other_images(self.images)].ravel()].tocsc())

    @property
    def scenes(self) -> Int[np.ndarray, " concepts"]:
        """How many images show each concept in at least one patch."""
        entries, per_image = self.shows.tocoo(), len(self.states) // self.images
        pairs = np.unique(np.stack([entries.col, entries.row // per_image]), axis=1)
        return np.bincount(pairs[0], minlength=len(self.names))

    def there(self, concepts: Sequence[int]) -> Bool[np.ndarray, "some patches"]:
        """Return whether each patch shows each of these concepts."""
        return self.shows[:, concepts].T.toarray() > 0

    def require(self, concepts: Sequence[int], least: int) -> None:
        """Check that enough images show these concepts.

        concepts: columns of `shows`.
        least: images that must show a concept.

        Raises:
            ValueError: there are no concepts, or too few images show one.
        """
        scenes = self.scenes
        if few := [f"{self.names[n][1]} ({scenes[n]})" for n in concepts if scenes[n] < least]:
            raise ValueError(
                f"fewer than {least} of {self.images} images show {', '.join(few)}; leave these concepts out, or give "
                "more images"
            )
        if not len(concepts):
            raise ValueError(f"no concept is shown by {least} of {self.images} images; give more images")


# ---- directions -----------------------------------------------------------------------------------------------------


def mean_differences(
    patches: LabelledStates, concepts: Sequence[int], least: int = 5
) -> Float[np.ndarray, "some width"]:
    """Return for each concept the mean state of the patches that show it minus the mean of all others.

    concepts: columns of `patches.shows`.
    least: images that must show a concept.

    Raises:
        ValueError: too few images show a concept.
    """
    patches.require(concepts, least)
    shows, every = patches.shows[:, concepts], len(patches.states)
    centred = patches.states - patches.states.mean(0, dtype=np.float64).astype(np.float32)
    sums, total, counts = shows.T @ centred, centred.sum(0, dtype=np.float64), shows.sum(0)[:, None]
    return (sums / counts - (total - sums) / np.maximum(every - counts, 1)).astype(np.float32)


def logistic_probes(
    patches: LabelledStates, concepts: Sequence[int], least: int = 5, *,
    most: int = 4_000, C: float = 0.1, iterations: int = 50, seed: int = 0,
) -> Float[np.ndarray, "some width"]:  # fmt: skip
    """Return for each concept the weights of a logistic regression, as a direction in the space of the states.

    It is fitted on standardised states, and both classes weigh the same. Its intercept is left out, because the
    threshold is chosen on all patches.

    concepts: columns of `patches.shows`.
    least: images that must show a concept.
    most: patches that a probe is fitted on, at random; at most half of them show the concept.
    C: inverse strength of the penalty on the squared weights. The default was chosen on cached scenes alone.
    iterations: of the optimiser, at most.
    seed: of the draw of patches.

    Raises:
        ValueError: too few images show a concept.
    """
    patches.require(concepts, least)
    rng, rows = np.random.default_rng(seed), []
    mean = patches.states.mean(0, dtype=np.float64)
    scale = np.maximum(patches.states.std(0, dtype=np.float64), 1e-9)
    for there in (patches.there([concept])[0] for concept in concepts):
        showing, others = (rng.permutation(np.flatnonzero(part)) for part in (there, ~there))
        showing = showing[: most // 2]
        drawn = np.concatenate([showing, others[: most - len(showing)]])
        probe = LogisticRegression(C=C, class_weight="balanced", max_iter=iterations)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the last iterations hardly change a detector
            probe.fit(((patches.states[drawn] - mean) / scale).astype(np.float32), there[drawn])
        rows.append(probe.coef_[0] / scale)
    return np.array(rows, np.float32)


# ---- how well scores detect a concept -------------------------------------------------------------------------------


def auroc(scores: Float[np.ndarray, " patches"], there: Bool[np.ndarray, " patches"]) -> float:
    """Return how often a patch that shows the concept has a higher score than one that does not; ties count half.

    Raises:
        ValueError: all patches show the concept, or none does.
    """
    showing, others = scores[there], np.sort(scores[~there])
    if not (len(showing) and len(others)):
        raise ValueError(f"{len(showing)} of {len(scores)} patches show the concept; give patches with and without it")
    ranks = np.searchsorted(others, showing, "left") + np.searchsorted(others, showing, "right")
    return float(ranks.mean() / (2 * len(others)))


def best_threshold(scores: Float[np.ndarray, " patches"], there: Bool[np.ndarray, " patches"]) -> float:
    """Return the threshold of highest F1; a score above it detects the concept.

    The best threshold lies just below the score of a patch that shows the concept, so only these are tried.

    Raises:
        ValueError: no patch shows the concept.
    """
    showing, others = np.sort(scores[there]), np.sort(scores[~there])
    if not len(showing):
        raise ValueError(f"none of {len(scores)} patches shows the concept, so no threshold can be chosen")
    hits = len(showing) - np.searchsorted(showing, showing, "left")
    false = len(others) - np.searchsorted(others, showing, "left")
    best = showing[np.argmax(2 * hits / (hits + false + len(showing)))]
    return float(np.nextafter(best, -np.inf, dtype=scores.dtype))


def f1(fires: Bool[np.ndarray, " patches"], there: Bool[np.ndarray, " patches"]) -> float:
    """Return the harmonic mean of precision and recall, 0 if nothing fires and nothing is there."""
    return float(2 * (fires & there).sum() / max(fires.sum() + there.sum(), 1))


@dataclass(frozen=True)
class Detected:
    """How well one method detects one concept on held-out scenes.

    auroc: over patches, from 0 to 1; chance is 0.5.
    f1: over patches, from 0 to 1, at the threshold that was chosen on the cached scenes.
    """

    kind: str
    concept: str
    auroc: float
    f1: float


def _measured(
    names: Sequence[tuple[str, str]],
    scores: Float[np.ndarray, "some patches"],
    thresholds: Sequence[float],
    there: Bool[np.ndarray, "some patches"],
) -> list[Detected]:
    """Measure a row of scores for each concept against the patches that show it."""
    return [
        Detected(*name, auroc(row, shown), f1(row > threshold, shown))
        for name, row, threshold, shown in zip(names, scores, thresholds, there, strict=True)
    ]


def direction_detection(
    directions: Float[np.ndarray, "some width"],
    concepts: Sequence[int],
    cached: LabelledStates,
    heldout: LabelledStates,
) -> list[Detected]:
    """Choose a threshold along each direction on the cached patches, and measure it on held-out ones.

    concepts: the column of `cached.shows` of each direction.
    heldout: shows each of these concepts somewhere.
    """
    result = []
    for start in range(0, len(concepts), BLOCK):
        block, some = directions[start : start + BLOCK], list(concepts[start : start + BLOCK])
        seen, unseen = (block @ patches.states.T for patches in (cached, heldout))
        chosen = [best_threshold(*pair) for pair in zip(seen, cached.there(some), strict=True)]
        result += _measured([cached.names[n] for n in some], unseen, chosen, heldout.there(some))
    return result


def latent_detection(
    sae: TopKSAE,
    cache: LatentCache,
    truth: LabelMaps,
    heldout: LabelledStates,
    concepts: Sequence[int],
    *,
    other_maps: bool = False,
) -> list[Detected]:
    """Choose the best latent of each concept on the cached images, with its threshold, and measure it on held-out ones.

    Notebook 03 measures the three best of each concept; here each method has one detector for each concept. A concept
    that no latent ever hits has an AUROC of 0.5 and an F1 of 0.

    cache: of this SAE, with all activations.
    truth: label maps of the cached images.
    heldout: shows each of these concepts somewhere.
    concepts: rows of `truth.names`.
    other_maps: choose with the label maps of other images; then give `heldout` such maps, too.
    """
    best = {(each.kind, each.concept): each for each in choose_detectors(cache, truth, other_maps=other_maps, best=1)}
    latents = sorted({each.latent for each in best.values()})
    acts = _activations(sae, heldout.states, latents)
    names = [truth.names[n] for n in concepts]
    rows = [latents.index(best[name].latent) if name in best else len(latents) for name in names]
    scores = np.concatenate([acts, np.zeros_like(acts, shape=(1, len(heldout.states)))])[rows]
    thresholds = [best[name].threshold if name in best else 0.0 for name in names]
    return _measured(names, scores, thresholds, heldout.there(concepts))


@torch.no_grad()
def _activations(
    sae: TopKSAE, states: Float[np.ndarray, "patches width"], latents: Sequence[int]
) -> Float[np.ndarray, "some patches"]:
    """Return the activations of some latents on states."""
    column = np.full(sae.n_latents, -1)
    column[list(latents)] = np.arange(len(latents))
    encoded = sae.encode(torch.from_numpy(states).to(sae.W_enc.device))
    columns, acts = column[encoded.indices.cpu().numpy()], encoded.acts.float().cpu().numpy()
    result = np.zeros((len(latents), len(states)), np.float32)
    patch, slot = np.nonzero(columns >= 0)
    result[columns[patch, slot], patch] = acts[patch, slot]
    return result


# ---- all methods beside each other ----------------------------------------------------------------------------------

METHODS = {"difference": "difference of means", "probe": "logistic probe", "latent": "best SAE latent"}


@dataclass(frozen=True)
class DetectionComparison:
    """How well each method detects the concepts that the held-out scenes show.

    methods: `METHODS` by their keys; each has the same concepts in the same order.
    by_chance: the same, fitted and measured with the label maps of other scenes.
    """

    methods: dict[str, list[Detected]]
    by_chance: dict[str, list[Detected]]

    @property
    def metrics(self) -> Metrics:
        """AUROC, F1 and the fraction detected, with 99% intervals over concepts, for all kinds and by kind.

        `*_above_latent` is the mean difference from the best SAE latent of the same concept.
        """
        rows = self.methods["latent"]
        metrics: Metrics = {"detection_concepts": len(rows)}
        for kind in (None, *dict.fromkeys(row.kind for row in rows)):
            end = f"_{kind}" if kind else ""
            chosen = [n for n, row in enumerate(rows) if kind in (None, row.kind)]
            for name, found in self._named():
                for what in ("auroc", "f1"):
                    values = np.array([getattr(found[n], what) for n in chosen])
                    metrics |= _mean(f"{name}_{what}{end}", values)
                    if name in METHODS and name != "latent":
                        latent = np.array([getattr(rows[n], what) for n in chosen])
                        metrics |= _mean(f"{name}_{what}_above_latent{end}", values - latent)
                hits = [found[n].f1 > DETECTS for n in chosen]
                metrics |= bounds(f"{name}_detected{end}", proportion(hits))
        return metrics

    def _named(self) -> list[tuple[str, list[Detected]]]:
        return [*self.methods.items(), *((f"{name}_by_chance", rows) for name, rows in self.by_chance.items())]


def compare_detectors(
    study: CachedSAE, truth: LabelMaps, cached: LabelledStates, heldout: LabelledStates,
    *, least: int = 5, seed: int = 0, **probe,
) -> DetectionComparison:  # fmt: skip
    """Detect each concept that the held-out scenes show by each method.

    A direction needs scenes to be fitted on. It has an AUROC of 0.5 and an F1 of 0 for a concept that too few cached
    scenes show.

    study: an SAE with the cache of its latents, for the best latent of each concept.
    truth: label maps of the cached images.
    cached: states of the cached images at the SAE's layer, which choose directions, latents and thresholds.
    heldout: states of other images, which measure them.
    least: cached images that must show a concept.
    seed: of the patches that probes are fitted on.
    probe: other settings of `logistic_probes`.

    Raises:
        ValueError: the held-out images show no concept, or the cached images show each of them too rarely.
    """
    if not (counts := heldout.shows.sum(0)).any():
        raise ValueError("the held-out images show no concept; give images with label maps")
    result = []
    for other_maps in (False, True):
        fit, measure = (part.with_other_maps() if other_maps else part for part in (cached, heldout))
        concepts = np.flatnonzero((counts > 0) & (counts < len(heldout.states))).tolist()
        scenes = fit.scenes
        fitted = [n for n in concepts if scenes[n] >= least]
        directions = {
            "difference": mean_differences(fit, fitted, least),
            "probe": logistic_probes(fit, fitted, least, seed=seed, **probe),
        }
        unfitted = {cached.names[n]: Detected(*cached.names[n], 0.5, 0.0) for n in concepts}
        rows = {}
        for name, vectors in directions.items():
            found = direction_detection(vectors, fitted, fit, measure)
            rows[name] = list((unfitted | {(row.kind, row.concept): row for row in found}).values())
        rows["latent"] = latent_detection(study.place.sae, study.cache, truth, measure, concepts, other_maps=other_maps)
        result.append(rows)
    return DetectionComparison(*result)


def detection_baselines(
    study: CachedSAE, images: Sequence[Image.Image], truth: LabelMaps, others: Sequence[Image.Image],
    unseen: LabelMaps, **settings,
) -> Metrics:  # fmt: skip
    """Return the metrics of a difference of means, of logistic probes and of the best latents as detectors.

    images: that were cached.
    truth: their label maps.
    others: held-out images.
    unseen: their label maps.
    settings: of `compare_detectors`.

    Raises:
        ValueError: as `compare_detectors`.
    """
    lmm, layer = study.place.lmm, study.place.layer
    cached, heldout = (LabelledStates.read(lmm, layer, *pair) for pair in ((images, truth), (others, unseen)))
    return compare_detectors(study, truth, cached, heldout, **settings).metrics


def _mean(name: str, values: ArrayLike) -> Metrics:
    """Return a mean as metrics, with its interval if there are two values or more."""
    return bounds(name, mean_interval(values)) if len(values) > 1 else {name: float(values[0])}
