"""Latents as detectors of concepts: chosen on some images, measured on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy import sparse

from lmm_sae_nb.cache.encode_images import base_latents
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.truth.accuracy import _share
from lmm_sae_nb.truth.label_maps import PatchTruth

LADDER = (0, 0.02, 0.05, *np.arange(0.1, 1.0, 0.1))  # thresholds that are tried, in units of a latent's maximum


class Detector(NamedTuple):
    """A latent that fires above `threshold` where a concept is and nowhere else, as far as F1 says."""

    kind: str
    concept: str
    latent: int
    threshold: float
    f1: float


def choose_detectors(cache: LatentCache, truth: PatchTruth, *, best: int = 3, block: int = 256) -> list[Detector]:
    """For each concept the `best` latents and their thresholds by F1 on the cached scenes' base patches.

    Thresholds are of `LADDER`; latents that never hit are left out. FileNotFoundError if the cache keeps no
    activations (notebook 02's `store`).
    """
    shows = truth.shows(range(cache.images)).T.tocsc()
    showing, patches = shows.sum(0), truth.grid[0] * truth.grid[1]
    found: list[list[Detector]] = [[] for _ in truth.names]
    for start in range(0, cache.n_latents, block):
        stop = min(start + block, cache.n_latents)
        entries = cache.store.latents(start, stop)
        highest = cache.max[start:stop].numpy()
        f1, rung = _best_rung(entries, start, highest, shows, showing, patches)
        for row, (kind, name) in enumerate(truth.names):
            top = [n for n in np.argsort(-f1[:, row], kind="stable")[:best] if f1[n, row] > 0]
            found[row] += [
                Detector(kind, name, start + int(n), float(rung[n, row] * highest[n]), float(f1[n, row])) for n in top
            ]
    return [one for row in found for one in sorted(row, key=lambda one: -one.f1)[:best]]


def _best_rung(entries, start: int, highest: np.ndarray, shows, showing: np.ndarray, patches: int):
    """For latents start to start + len(highest): the best F1 (latents, concepts) over the ladder, and its rung."""
    f1 = np.zeros((len(highest), len(showing)))
    rung = np.zeros_like(f1)
    rows, columns = entries.latents - start, entries.images * patches + entries.patches
    level = entries.acts / highest[rows]
    for part in LADDER:
        on = level > part
        fired = sparse.csr_array(
            (np.ones(on.sum(), np.float32), (rows[on], columns[on])), (len(highest), shows.shape[0])
        )
        now = _f1((fired @ shows).toarray(), fired.sum(1)[:, None], showing)
        rung[now > f1] = part
        f1 = np.maximum(f1, now)
    return f1, rung


def _f1(hits: np.ndarray, fired: np.ndarray, showing: np.ndarray) -> np.ndarray:
    return 2 * hits / np.maximum(fired + showing, 1)


def measure_detectors(
    place: SAEInPlace, images: Sequence[Image.Image], truth: PatchTruth,
    detectors: Sequence[Detector], batch_size: int = 16,
) -> tuple[list[Detector], set[tuple[str, str]]]:  # fmt: skip
    """The same latents and thresholds with their F1 on other images, and the (kind, concept) that those show at all.

    images: those of `truth`, in its order.
    """
    sae = place.sae
    row = {name: n for n, name in enumerate(truth.names)}
    column = np.full(sae.n_latents, -1)
    latents = sorted({one.latent for one in detectors})
    column[latents] = np.arange(len(latents))
    acts = np.concatenate([_columns(part, column) for part in base_latents(place, images, batch_size)])
    shows = truth.shows(range(len(acts))).toarray().astype(bool)
    acts = acts.reshape(-1, len(latents))
    measured = []
    for one in detectors:
        on, is_there = acts[:, column[one.latent]] > one.threshold, shows[row[one.kind, one.concept]]
        f1 = _f1((on & is_there).sum(), on.sum(), is_there.sum())
        measured.append(one._replace(f1=float(f1)))
    return measured, {name for name, n in row.items() if shows[n].any()}


def _columns(latents, column: np.ndarray) -> Float[np.ndarray, "images patches latents"]:
    """The activations of the latents that have a column."""
    acts, where = latents.acts.float().numpy(), column[latents.indices.numpy()]
    dense = np.zeros((*acts.shape[:2], column.max() + 1), np.float32)
    image, patch, slot = np.nonzero(where >= 0)
    dense[image, patch, where[image, patch, slot]] = acts[image, patch, slot]
    return dense


def recalled(
    detectors: Sequence[Detector], present: set[tuple[str, str]], named: Mapping[int, str | None], least: float = 0.5
) -> dict[str, float]:
    """concepts_present: how many the held-out scenes show; concepts_detected: the share of them that a latent detects
    with an F1 above `least`; concept_recall: the share that such a latent detects whose explanation is its name.

    named: the concept that each latent was given, or None. ValueError if no concept is present.
    """
    if not present:
        raise ValueError("the held-out scenes show no concept; give scenes with label maps")
    good = [one for one in detectors if one.f1 > least and (one.kind, one.concept) in present]
    detected = {(one.kind, one.concept) for one in good}
    right = {(one.kind, one.concept) for one in good if named.get(one.latent) == one.concept}
    return {
        "concepts_present": len(present),
        **_share("concepts_detected", [name in detected for name in present]),
        **_share("concept_recall", [name in right for name in present]),
    }
