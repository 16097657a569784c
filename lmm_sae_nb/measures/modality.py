"""Modality score: does a latent respond to images or to text?

Source: Papadimitriou et al. (arXiv 2504.11695). With the mean activation m of a latent over the tokens of each side:

    score = m(image) / (m(image) + m(text))

A mean over tokens, not a sum: so the number of tokens of a side does not decide. The score is 1 for a latent of images
alone and 0 for one of text alone.

Departures: they encode one embedding for each image and caption of a CLIP. Here a token of the layer is a case. Image
tokens are those that show pixels, of the base image and of the tiles; text tokens are those of question, answer and
chat template. Newline and special tokens are of neither side. `cache/sides.py` asks a similar question of firing rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float

from lmm_sae_nb.cache.sides import IMAGE
from lmm_sae_nb.measures.image_latents import mean_metrics
from lmm_sae_nb.model.samples import prompts
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.score.scores import Explained
from lmm_sae_nb.support.intervals import bounds, proportion
from lmm_sae_nb.support.stages import Metrics

SIDES = {"image": IMAGE, "text": ("text",)}  # the kinds of token of each side
ONE_SIDED = 0.9  # a latent is of images if its score is above this, of text if it is below 1 minus this
BINS = 10  # of the distribution


@torch.no_grad()
def mean_by_side(
    place: SAEInPlace, samples: Sequence[Mapping], batch_samples: int = 16
) -> dict[str, Float[np.ndarray, " latents"]]:
    """Return the mean activation of each latent over the tokens of each side.

    samples: rows with image, question and answer.
    batch_samples: samples that go through the model at once.

    Raises:
        ValueError: the samples have no token of a side.
    """
    sums = {side: np.zeros(place.sae.n_latents) for side in SIDES}
    tokens = dict.fromkeys(SIDES, 0)
    for prompt in prompts(place.lmm, samples, range(len(samples)), batch_samples):
        hidden = place.lmm.hidden_states(prompt, place.layer)
        for side, kinds in SIDES.items():
            acts, indices = (part.cpu() for part in place.sae.encode(hidden[place.mask(prompt, kinds)]))
            weights = acts.double().numpy().ravel()
            sums[side] += np.bincount(indices.numpy().ravel(), weights=weights, minlength=place.sae.n_latents)
            tokens[side] += len(acts)
    if not all(tokens.values()):
        raise ValueError(f"there are {tokens['image']} image and {tokens['text']} text tokens; give samples with both")
    return {side: sums[side] / tokens[side] for side in SIDES}


def modality_scores(means: Mapping[str, Float[np.ndarray, " latents"]]) -> Float[np.ndarray, " latents"]:
    """Return the score of each latent, in [0, 1]; NaN for a latent that is never active."""
    total = means["image"] + means["text"]
    return np.divide(means["image"], total, out=np.full(len(total), np.nan), where=total > 0)


def modality(
    place: SAEInPlace, samples: Sequence[Mapping], explained: Mapping[int, Explained] | None = None,
    *, batch_samples: int = 16,
) -> Metrics:  # fmt: skip
    """Return the scores of all latents that the samples excite: their mean and their distribution.

    modality: mean over latents, with its 99% interval.
    modality_KIND: the same over the latents whose explanation has this kind.
    modality_image: fraction of the latents with a score above `ONE_SIDED`.
    modality_text: fraction with a score below 1 - `ONE_SIDED`.
    modality_both: fraction with a score between.
    modality_bin_0 ... modality_bin_9: fraction of the latents with a score from 0 to 0.1, and so on.
    modality_latents: how many latents have a score.

    place: model, SAE and layer.
    samples: rows with image, question and answer that no training has seen.
    explained: concept and kind of latents; None leaves the kinds out.
    batch_samples: samples that go through the model at once.

    Raises:
        ValueError: the samples have no token of a side, or excite fewer than two latents.
    """
    scores = modality_scores(mean_by_side(place, samples, batch_samples))
    active = np.flatnonzero(~np.isnan(scores))
    if len(active) < 2:
        raise ValueError(f"{len(samples)} samples excite {len(active)} latents; give more samples or another SAE")
    scores = scores[active]
    kinds = [explained[n].kind if explained and n in explained else None for n in active.tolist()]
    image, text = scores > ONE_SIDED, scores < 1 - ONE_SIDED
    metrics: Metrics = {"modality_latents": len(active)} | mean_metrics("modality", scores, kinds)
    for name, hits in (("image", image), ("text", text), ("both", ~image & ~text)):
        metrics |= bounds(f"modality_{name}", proportion(hits))
    counts, _ = np.histogram(scores, BINS, (0.0, 1.0))
    return metrics | {f"modality_bin_{n}": count / len(scores) for n, count in enumerate(counts.tolist())}
