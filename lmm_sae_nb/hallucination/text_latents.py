"""Latents that stand for written words, and which of them attribution recommends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lmm_sae_nb.attribute.attribution import clamping, decision
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.hallucination.cases import Case
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.steer.steering import Scope


def text_latents(
    explanations: Mapping[str, Mapping], vocabulary: Iterable[str], words: Iterable[str] = ()
) -> dict[int, str]:
    """The latents that the pipeline named after text: a concept of this vocabulary, or one with any of these words."""
    known, hints = {name.lower() for name in vocabulary}, {word.lower() for word in words}
    named = {int(latent): row["concept"] for latent, row in explanations.items() if row.get("concept")}
    return {n: name for n, name in named.items() if name.lower() in known or hints & set(name.lower().split())}


def shown_text(
    cache: LatentCache,
    rows: Sequence[Mapping],
    kind: str,
    names: Sequence[str],
    latents: Iterable[int],
    *,
    least: float = 0.25,
) -> dict[int, str]:
    """The latents whose activation on their top images lies on one concept of this kind, by the label maps of `rows`.

    A concept's share is that of the activation, over all top images, on its pixels; `least` is what one must have.
    """
    rows = rows.select_columns([kind]) if hasattr(rows, "select_columns") else rows  # a row's every picture is decoded
    label_map, found = lru_cache(256)(lambda image: np.asarray(rows[image][kind])), {}
    for latent in latents:
        shares, images = np.zeros(1 + len(names)), cache.top(latent)
        for rank, (image, _) in enumerate(images):
            labels, activation = label_map(image), np.asarray(cache.patch_map(latent, rank))
            sides = np.array(labels.shape) // activation.shape
            on_pixels = np.kron(activation / activation.sum(), np.ones(sides)) / sides.prod()
            shares += np.bincount(labels.ravel(), on_pixels.ravel(), minlength=len(shares)) / len(images)
        if shares[1:].max(initial=0.0) >= least:
            found[latent] = names[int(shares[1:].argmax())]
    return found


def promising(
    place: SAEInPlace,
    cases: Sequence[Case],
    values: Float[Tensor, " n_latents"],
    scope: Scope = Scope(),  # noqa: B008  (frozen)
) -> Float[Tensor, " n_latents"]:
    """By how many logits, on average, clamping each latent to its value would speak for the right answers, linearly."""
    lmm, sae = place.lmm, place.sae
    total = torch.zeros(sae.n_latents)
    for case in cases:
        choice = decision(lmm, case.question, case.image, case.right, case.tempting)
        total += clamping(place, choice, values, scope.of_prompt(choice.prompt)[0]) / len(cases)
    return total


def of_words(text: Mapping[int, str], predicted: Float[Tensor, " n_latents"]) -> dict[str, list[int]]:
    """The latents that stand for one word, for each word, the words by what their latents together promise."""
    found: dict[str, list[int]] = {}
    for latent, word in sorted(text.items()):
        found.setdefault(word, []).append(latent)
    return dict(sorted(found.items(), key=lambda item: -float(predicted[item[1]].sum())))
