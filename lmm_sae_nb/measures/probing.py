"""k-sparse probing: do a few latents together say if an image shows a concept?

Source: Gurnee et al. (arXiv 2305.01610), as SAEBench (arXiv 2503.09532) and sae-probes use it. A 2026 audit (arXiv
2605.18229) finds it the most reliable of SAEBench's metrics. For each concept the k latents are chosen whose mean
activation differs most between examples with and without the concept:

    score(i) = | mean of a_i over images with the concept - mean of a_i over images without |

A logistic regression on these k activations is then fitted, and measured on examples that it has not seen.

Departures: an example is an image, and a latent's activation on it the highest over the base patches, not a mean over
tokens. Both classes get the same weight in the fit, because most concepts are rare here. The control fits the same
regression on k random live latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression

from lmm_sae_nb.measures.detection_scoring import auroc
from lmm_sae_nb.measures.image_latents import ImageLatents, images_showing, mean_metrics
from lmm_sae_nb.support.stages import Metrics
from lmm_sae_nb.truth.label_maps import LabelMaps

MEASURED = ("balanced_accuracy", "f1", "auroc")


@dataclass(frozen=True)
class Probe:
    """A probe of one concept on a few latents, as measured on held-out images.

    kind, concept: what the probe predicts.
    latents: their numbers, the best first.
    balanced_accuracy: mean of the fractions right of the images with and without the concept, in [0, 1].
    f1: harmonic mean of precision and recall, in [0, 1].
    auroc: probability that an image with the concept scores higher than one without, in [0, 1].
    """

    kind: str
    concept: str
    latents: list[int]
    balanced_accuracy: float
    f1: float
    auroc: float


def best_latents(
    acts: Float[np.ndarray, "images latents"], shows: Bool[np.ndarray, " images"]
) -> list[int]:  # fmt: skip
    """Return the latents, those whose mean activation differs most with the concept first; the lower of equal ones."""
    difference = np.abs(acts[shows].mean(0) - acts[~shows].mean(0))
    return np.argsort(-difference, kind="stable").tolist()


def fit_probe(
    acts: Float[np.ndarray, "images k"], shows: Bool[np.ndarray, " images"],
    unseen: Float[np.ndarray, "unseen k"], unseen_shows: Bool[np.ndarray, " unseen"],
) -> dict[str, float]:  # fmt: skip
    """Fit a logistic regression on activations and return `MEASURED` on other images.

    Activations are divided by the highest of each latent, so that the penalty treats latents alike.
    """
    scale = np.maximum(acts.max(0), 1e-12)
    model = LogisticRegression(class_weight="balanced", max_iter=200).fit(acts / scale, shows)
    margin = model.decision_function(unseen / scale)
    says_yes = margin > 0
    hits = int((says_yes & unseen_shows).sum())
    recalls = says_yes[unseen_shows].mean(), (~says_yes[~unseen_shows]).mean()
    f1 = 2 * hits / max(int(says_yes.sum() + unseen_shows.sum()), 1)
    return dict(zip(MEASURED, (float(np.mean(recalls)), f1, auroc(margin, unseen_shows)), strict=True))


def frequent_concepts(
    shows: Bool[np.ndarray, "images concepts"], unseen: Bool[np.ndarray, "unseen concepts"],
    least_cached: int, least_unseen: int,
) -> list[int]:  # fmt: skip
    """Return the rows of concepts that enough images show, and enough do not, of both sets.

    Raises:
        ValueError: there are fewer than two such concepts.
    """
    enough = np.minimum(shows.sum(0), (~shows).sum(0)) >= least_cached
    enough &= np.minimum(unseen.sum(0), (~unseen).sum(0)) >= least_unseen
    if enough.sum() < 2:
        raise ValueError(
            f"{enough.sum()} concepts are on {least_cached} of {len(shows)} cached and {least_unseen} of {len(unseen)} "
            "held-out images, and not on as many; give more images, or lower limits"
        )
    return np.flatnonzero(enough).tolist()


def fit_probes(
    cached: ImageLatents, truth: LabelMaps, heldout: ImageLatents, unseen: LabelMaps, ks: Sequence[int] = (1, 2, 5),
    *, random: np.random.Generator | None = None, least_cached: int = 20, least_unseen: int = 5,
) -> dict[int, list[Probe]]:  # fmt: skip
    """Choose and fit probes on cached images and measure them on held-out images: for each k one a concept.

    random: draws the latents from the live ones instead; None chooses the best.
    Other arguments and errors as `probing`.
    """
    live = np.flatnonzero(cached.live)
    if len(live) < max(ks):
        raise ValueError(f"{len(live)} latents are live, and a probe takes {max(ks)}; give an SAE with more")
    shows = images_showing(truth, cached.images, cached.grid)
    other = images_showing(unseen, heldout.images, heldout.grid)
    acts, unseen_acts, probes = cached.maxima[:, live], heldout.maxima[:, live], {k: [] for k in ks}
    for row in frequent_concepts(shows, other, least_cached, least_unseen):
        ranked = random.permutation(len(live)).tolist() if random is not None else best_latents(acts, shows[:, row])
        for k in ks:
            few = ranked[:k]
            measured = fit_probe(acts[:, few], shows[:, row], unseen_acts[:, few], other[:, row])
            probes[k].append(Probe(*truth.names[row], live[few].tolist(), **measured))
    return probes


def probing(
    cached: ImageLatents, truth: LabelMaps, heldout: ImageLatents, unseen: LabelMaps, ks: Sequence[int] = (1, 2, 5),
    *, least_cached: int = 20, least_unseen: int = 5, seed: int = 0,
) -> Metrics:  # fmt: skip
    """Return how well k latents predict each concept of an image, mean over concepts.

    probe_K_MEASURE: mean over concepts of each of `MEASURED`, with its 99% interval.
    probe_K_MEASURE_KIND: the same over the concepts of a kind.
    probe_K_MEASURE_random: the same with k random live latents.
    probe_concepts: how many concepts there are.

    cached: activations on the cached images; latents are chosen and probes fitted on these.
    truth: label maps of the cached images.
    heldout: activations on held-out images; probes are measured on these.
    unseen: label maps of the held-out images.
    ks: latents of a probe.
    least_cached: cached images that must show a concept, and that must not.
    least_unseen: the same of held-out images.
    seed: of the draw of random latents.

    Raises:
        ValueError: fewer than two concepts are frequent enough, or there are too few live latents.
    """
    limits = {"least_cached": least_cached, "least_unseen": least_unseen}
    probes = fit_probes(cached, truth, heldout, unseen, ks, **limits)
    control = fit_probes(cached, truth, heldout, unseen, ks, random=np.random.default_rng(seed), **limits)
    metrics: Metrics = {"probe_concepts": len(probes[ks[0]])}
    for k in ks:
        for name in MEASURED:
            label, of = f"probe_{k}_{name}", lambda probe, name=name: getattr(probe, name)
            metrics |= mean_metrics(label, map(of, probes[k]), [probe.kind for probe in probes[k]])
            metrics |= mean_metrics(f"{label}_random", map(of, control[k]))
    return metrics
