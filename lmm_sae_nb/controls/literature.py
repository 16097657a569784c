"""The measures of the literature for one SAE, in three parts; what cannot be measured is said and left out.

Held-out activations, vectors and cosines come in as arguments, because the SAEs of a panel share what they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float

from lmm_sae_nb.compare.saes import CachedSAE
from lmm_sae_nb.controls.chain import PartResult
from lmm_sae_nb.interpret.explainers import Outcome
from lmm_sae_nb.measures.absorption import NestedPair, absorption
from lmm_sae_nb.measures.consistency import consistency
from lmm_sae_nb.measures.detection_scoring import detection_scoring
from lmm_sae_nb.measures.image_latents import ImageLatents
from lmm_sae_nb.measures.modality import modality
from lmm_sae_nb.measures.monosemanticity import monosemanticity
from lmm_sae_nb.measures.probing import probing
from lmm_sae_nb.score.scores import Explained
from lmm_sae_nb.support.stages import Metrics
from lmm_sae_nb.truth.label_maps import LabelMaps


def measure_probes(
    study: CachedSAE, truth: LabelMaps, heldout: ImageLatents, unseen: LabelMaps, pairs: Sequence[NestedPair], *,
    seed: int = 0,
) -> PartResult:  # fmt: skip
    """Measure k-sparse probing and feature absorption.

    study: whose cache keeps all activations.
    truth, unseen: label maps of the cached and of the held-out images.
    heldout: activations on the held-out images.
    pairs: of nested concepts.
    seed: of the draw of random latents.
    """
    cached = ImageLatents.of_cache(study.cache)
    calls = {
        "probing": partial(probing, cached, truth, heldout, unseen, seed=seed),
        "absorption": partial(absorption, study.place.sae, cached, truth, heldout, unseen, pairs),
    }
    return _measured(calls)


def measure_names(
    rows: Mapping[int, Mapping], heldout: ImageLatents, unseen: LabelMaps,
    vectors: Mapping[str, Float[np.ndarray, "images width"]],
    cosines: Mapping[str, Float[np.ndarray, " images"]] | None, *, seed: int = 0,
) -> PartResult:  # fmt: skip
    """Measure monosemanticity, and detection scoring of the names that latents have.

    rows: explanations by latent, as of notebook 03.
    heldout: activations on the held-out images.
    unseen: label maps of these images.
    vectors, cosines: of these images, as for `monosemanticity` and `detection_scoring`.
    seed: of everything random.
    """
    explained = _named(rows)
    calls = {
        "monosemanticity": partial(monosemanticity, heldout, vectors, explained, seed=seed),
        "detection scoring": partial(detection_scoring, heldout, explained, unseen, cosines, seed=seed),
    }
    return _measured(calls)


def measure_directions(
    study: CachedSAE, other: CachedSAE | None, rows: Mapping[int, Mapping], samples: Sequence[Mapping], *, seed: int = 0
) -> PartResult:
    """Measure the modality score, and the consistency of the directions with an SAE of another seed.

    other: an SAE of the same layer, of another seed; None if there is none, as for an SAE of another model.
    rows: explanations by latent, as of notebook 03.
    samples: held-out rows with image, question and answer.
    seed: of everything random.
    """
    explained = _named(rows)
    calls = {"modality": partial(modality, study.place, samples, explained)}
    if other:
        live = study.cache.live.numpy(), other.cache.live.numpy()
        calls["consistency"] = partial(
            consistency, study.place, live[0], other.place, live[1], explained, seed=seed
        )  # fmt: skip
    result = _measured(calls)
    why = [] if other else ["consistency: there is no SAE of another seed in this space"]
    return PartResult(result.metrics, [*result.why, *why])


def _named(rows: Mapping[int, Mapping]) -> dict[int, Explained]:
    return {
        n: Explained(row["concept"], row["kind"])
        for n, row in rows.items()
        if row["outcome"] == Outcome.EXPLAINED.value and row["kind"]
    }


def _measured(calls: Mapping[str, Callable[[], Metrics]]) -> PartResult:
    """Return the metrics of all calls together, and for each that cannot measure why."""
    metrics, why = {}, []
    for name, call in calls.items():
        try:
            metrics |= call()
        except ValueError as error:
            why.append(f"{name}: {error}")
    return PartResult(metrics, why)
