"""Latents as detectors of concepts: chosen on the cached images, measured on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from PIL import Image
from scipy import sparse

from lmm_sae_nb.cache.encode_images import base_latents
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.cache.top_images import Firings
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import Latents
from lmm_sae_nb.truth.accuracy import fraction_metrics
from lmm_sae_nb.truth.label_maps import LabelMaps

THRESHOLDS = (0, 0.02, 0.05, *np.arange(0.1, 1.0, 0.1))  # that are tried, in units of a latent's maximum
DETECTS = 0.5  # F1 above which a latent detects a concept


@dataclass(frozen=True)
class Detector:
    """A latent that is to fire where a concept is, and nowhere else.

    kind, concept: what it is to detect.
    latent: its number.
    threshold: activation above which it counts as firing.
    f1: harmonic mean of precision and recall over patches, in [0, 1].
    """

    kind: str
    concept: str
    latent: int
    threshold: float
    f1: float


@dataclass(frozen=True)
class Detection:
    """How well latents detect the concepts of the world, on images that took no part in their choice.

    detectors: the candidates for each concept.
    present: (kind, concept) of every concept that the images show.
    by_chance: candidates that were chosen and measured in the same way, each image with the label map of another.
    """

    detectors: list[Detector]
    present: list[tuple[str, str]]
    by_chance: list[Detector] = field(default_factory=list)

    def good(self) -> list[Detector]:
        """Return the detectors whose F1 is above `DETECTS`, of concepts that are present."""
        return self._good(self.detectors)

    def good_by_chance(self) -> list[Detector]:
        """Return the same of the candidates by chance: latents that only fire about as often as the concept shows."""
        return self._good(self.by_chance)

    def _good(self, detectors: Sequence[Detector]) -> list[Detector]:
        present = set(self.present)
        return [each for each in detectors if each.f1 > DETECTS and (each.kind, each.concept) in present]

    def latents(self) -> list[int]:
        """Return the latents of the good detectors, in their order."""
        return sorted({each.latent for each in self.good()})


def detect_concepts(
    place: SAEInPlace, cache: LatentCache, truth: LabelMaps, images: Sequence[Image.Image], unseen: LabelMaps
) -> Detection:
    """Choose detectors of each concept on the cached images and measure them on others.

    As a control, do the same with the label maps of other images, both in the choice and in the measurement.

    place: model, SAE and layer.
    cache: of that SAE, with all activations (notebook 02's `store`).
    truth: label maps of the cached images.
    images: other images.
    unseen: their label maps.
    """
    chosen, by_chance = (choose_detectors(cache, truth, other_maps=other) for other in (False, True))
    return measure_detectors(place, images, unseen, chosen, by_chance)


def other_images(images: int) -> list[int]:
    """Return for each image the number of another one, half of all images away."""
    return np.roll(np.arange(images), images // 2).tolist()


def choose_detectors(
    cache: LatentCache, truth: LabelMaps, *, other_maps: bool = False, best: int = 3, block: int = 256
) -> list[Detector]:
    """Return for each concept the latents and thresholds of highest F1 on the patches of the cached images.

    cache: with all activations.
    truth: label maps of the cached images.
    other_maps: give each image the label map of another (`other_images`), so that no latent can know the concept.
    best: latents for each concept; those that never hit it are left out.
    block: latents that are in memory at the same time.

    Raises:
        FileNotFoundError: the cache keeps no activations.
    """
    maps = other_images(cache.images) if other_maps else range(cache.images)
    shows = truth.patches_showing(maps, cache.grid).T.tocsc()
    n_showing, n_patches = shows.sum(0), cache.grid[0] * cache.grid[1]
    candidates: list[list[Detector]] = [[] for _ in truth.names]
    for start in range(0, cache.n_latents, block):
        stop = min(start + block, cache.n_latents)
        entries, highest = cache.store.latents(start, stop), cache.max[start:stop].numpy()
        f1, threshold = best_thresholds(entries, start, highest, shows, n_showing, n_patches)
        for row, (kind, concept) in enumerate(truth.names):
            top = [n for n in np.argsort(-f1[:, row], kind="stable")[:best] if f1[n, row] > 0]
            candidates[row] += [
                Detector(kind, concept, start + int(n), float(threshold[n, row] * highest[n]), float(f1[n, row]))
                for n in top
            ]
    return [each for row in candidates for each in sorted(row, key=lambda each: -each.f1)[:best]]


def best_thresholds(
    entries: Firings, start: int, highest: np.ndarray, shows: sparse.csc_array, n_showing: np.ndarray, n_patches: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best F1 (latents, concepts) over `THRESHOLDS`, and the threshold that gives it, as a fraction of the
    latent's maximum.

    entries: the activations of latents start to start + len(highest).
    highest: each latent's maximum.
    shows: (images * patches, concepts), 1 where a patch shows a concept; n_showing: its sum.
    n_patches: of an image.
    """
    rows, columns = entries.latents - start, entries.images * n_patches + entries.patches
    exceeded = np.searchsorted(THRESHOLDS, entries.acts / highest[rows])  # so many thresholds; each entry counts once
    rows, columns, level = (part[exceeded > 0] for part in (rows * len(THRESHOLDS), columns, exceeded - 1))
    shape = len(highest), len(THRESHOLDS), len(n_showing)
    fires = sparse.csr_array(
        (np.ones(len(rows), np.float32), (rows + level, columns)), (shape[0] * shape[1], shows.shape[0])
    )
    hits, fired = (
        np.cumsum(counts.reshape(shape[0], shape[1], -1)[:, ::-1], 1)[:, ::-1]  # above a threshold, and all higher ones
        for counts in ((fires @ shows).toarray(), fires.sum(1))
    )
    scores = _f1(hits, fired, n_showing)
    best = scores.argmax(1)
    f1 = np.take_along_axis(scores, best[:, None], 1)[:, 0].astype(float)
    return f1, np.where(f1 > 0, np.array(THRESHOLDS)[best], 0.0)


def _f1(hits: ArrayLike, fired: ArrayLike, showing: ArrayLike) -> np.ndarray | np.floating:
    return 2 * hits / np.maximum(fired + showing, 1)


def measure_detectors(
    place: SAEInPlace, images: Sequence[Image.Image], truth: LabelMaps, detectors: Sequence[Detector],
    by_chance: Sequence[Detector] = (), batch_size: int = 16,
) -> Detection:  # fmt: skip
    """Measure detectors, at their thresholds, on other images.

    place: model, SAE and layer.
    images: as the rows of `truth`, in the same order.
    detectors: from `choose_detectors`; only their F1 changes.
    by_chance: the same with other maps; they are measured with the label maps of other images, too.
    batch_size: images at the same time.
    """
    row_of = {name: row for row, name in enumerate(truth.names)}
    column = np.full(place.sae.n_latents, -1)
    latents = sorted({each.latent for each in (*detectors, *by_chance)})
    column[latents] = np.arange(len(latents))
    acts = np.concatenate([_columns(batch, column) for batch in base_latents(place, images, batch_size)])
    n_images, acts = len(acts), acts.reshape(-1, len(latents))

    def measured(candidates: Sequence[Detector], maps: Sequence[int]) -> list[Detector]:
        shows, result = truth.patches_showing(maps, place.lmm.grid).toarray().astype(bool), []
        for each in candidates:
            fires, is_there = acts[:, column[each.latent]] > each.threshold, shows[row_of[each.kind, each.concept]]
            f1 = _f1((fires & is_there).sum(), fires.sum(), is_there.sum())
            result.append(replace(each, f1=float(f1)))
        return result

    there = truth.patches_showing(range(n_images), place.lmm.grid).sum(1) > 0
    return Detection(
        measured(detectors, range(n_images)), [name for name, row in row_of.items() if there[row]],
        measured(by_chance, other_images(n_images)),
    )  # fmt: skip


def _columns(latents: Latents, column: np.ndarray) -> Float[np.ndarray, "images patches latents"]:
    """Return the activations of the latents that have a column."""
    acts, columns = latents.acts.float().numpy(), column[latents.indices.numpy()]
    dense = np.zeros((*acts.shape[:2], column.max() + 1), np.float32)
    image, patch, slot = np.nonzero(columns >= 0)
    dense[image, patch, columns[image, patch, slot]] = acts[image, patch, slot]
    return dense


def recall_metrics(detection: Detection, concepts: Mapping[int, str | None]) -> dict[str, float]:
    """Measure how many concepts of the world a latent detects, and detects under its right name.

    concepts_present: how many concepts the images show.
    concepts_detected: fraction of them that a latent detects.
    concepts_detected_by_chance: the same with the label maps of other images; left out if it was not measured.
    concept_recall: fraction of them that a latent detects whose explanation is the concept.

    detection: from `detect_concepts`.
    concepts: latent to the concept of its explanation, or None.

    Raises:
        ValueError: the images show no concept.
    """
    if not detection.present:
        raise ValueError("the held-out images show no concept; give images with label maps")
    detected, named = _detected_and_named(detection, concepts)
    chance = {(each.kind, each.concept) for each in detection.good_by_chance()}
    by_chance = [name in chance for name in detection.present] if detection.by_chance else []
    return {
        "concepts_present": len(detection.present),
        **fraction_metrics("concepts_detected", [name in detected for name in detection.present]),
        **fraction_metrics("concepts_detected_by_chance", by_chance),
        **fraction_metrics("concept_recall", [name in named for name in detection.present]),
    }


def recall_by_kind(detection: Detection, concepts: Mapping[int, str | None]) -> dict[str, dict[str, int]]:
    """Count, for each kind of concept that is present, those named, those detected under another name, and the others.

    detection: from `detect_concepts`.
    concepts: latent to the concept of its explanation, or None.
    """
    detected, named = _detected_and_named(detection, concepts)
    counts: dict[str, dict[str, int]] = {}
    for name in detection.present:
        row = counts.setdefault(name[0], dict.fromkeys(("named", "detected, not named", "not detected"), 0))
        row["named" if name in named else "detected, not named" if name in detected else "not detected"] += 1
    return counts


def _detected_and_named(
    detection: Detection, concepts: Mapping[int, str | None]
) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    good = detection.good()
    named = {(each.kind, each.concept) for each in good if concepts.get(each.latent) == each.concept}
    return {(each.kind, each.concept) for each in good}, named
