"""Decide for every latent whether it responds to images, to text, or to both."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from scipy.stats import hypergeom

from lmm_sae_nb.cache.texts import TextCache
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.token_kinds import SAE_KINDS

IMAGE = ("base", "tiles")  # the kinds of token that show pixels


class Sides(NamedTuple):
    """The latents of each side; a latent that is never active is in none."""

    image_only: Bool[np.ndarray, " latents"]
    text_only: Bool[np.ndarray, " latents"]
    both: Bool[np.ndarray, " latents"]
    undetermined: Bool[np.ndarray, " latents"]  # active on too few tokens to decide


def sides(cache: TextCache, min_ratio: float = 0.1, max_probability: float = 0.01) -> Sides:
    """Assign every active latent to a side.

    A latent responds to a side if its rate per token there is at least `min_ratio` times its rate on the other side.
    A latent counts as one-sided only if chance is a bad explanation: with its activations assigned to tokens at random
    (hypergeometric), so few on the other side would have a probability below `max_probability`. Otherwise it is
    undetermined. Activations come in clusters, so the true probability is somewhat higher.

    min_ratio: above 0, at most 1.

    Raises:
        ValueError: `min_ratio` is out of range, or there are no image or no text tokens.
    """
    if not 0 < min_ratio <= 1:
        raise ValueError(f"min_ratio is {min_ratio}; give a fraction of the other side's rate, above 0 and at most 1")
    rows = dict(zip(SAE_KINDS, cache.fired, strict=True))
    image, text = sum(rows[kind] for kind in IMAGE), rows["text"]
    image_tokens, text_tokens = sum(cache.tokens[kind] for kind in IMAGE), cache.tokens["text"]
    if not (image_tokens and text_tokens):
        raise ValueError(f"there are {image_tokens} image and {text_tokens} text tokens; give samples that have both")
    active, tokens = image + text, image_tokens + text_tokens
    no_text = text / text_tokens < min_ratio * image / image_tokens
    no_image = image / image_tokens < min_ratio * text / text_tokens
    surely_no_text = hypergeom.cdf(text, tokens, text_tokens, active) < max_probability
    surely_no_image = hypergeom.cdf(image, tokens, image_tokens, active) < max_probability
    return Sides(
        image_only=no_text & surely_no_text,
        text_only=no_image & surely_no_image,
        both=(active > 0) & ~no_text & ~no_image,
        undetermined=no_text & ~surely_no_text | no_image & ~surely_no_image,
    )


def side_metrics(by_side: Sides) -> dict[str, float]:
    """Return how many latents each side has, and which fraction of the determined ones, as metrics."""
    counts = {name: int(latents.sum()) for name, latents in by_side._asdict().items()}
    determined = max(1, sum(counts.values()) - counts["undetermined"])
    fractions = {f"latents_{name}_fraction": n / determined for name, n in counts.items() if name != "undetermined"}
    return {f"latents_{name}": n for name, n in counts.items()} | fractions


def side_rows(lmm: LMM, cache: TextCache) -> dict[str, dict]:
    """Return for every active latent its side and its top text tokens, as plain values for the feature browser."""
    side = {n: name for name, latents in sides(cache)._asdict().items() for n in np.flatnonzero(latents).tolist()}
    words = {n: [lmm.tokenizer.decode([word.token]) for word in cache.top_words(n)] for n in side}
    return {str(n): {"responds to": side[n].replace("_", " "), "text tokens": words[n]} for n in sorted(side)}
