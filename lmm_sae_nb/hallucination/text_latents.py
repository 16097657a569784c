"""Latents that stand for written words, and what attribution predicts of clamping them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from lmm_sae_nb.attribute.attribution import clamping, decision
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.hallucination.cases import Case
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.steer.steering import Scope


@dataclass(frozen=True)
class Candidates:
    """Latents that stand for text.

    words: for each word, its latents; the word whose latents together have the highest predicted gain is first.
    gain: for each of these latents, the predicted rise of the right answer's margin, in logits, if it is clamped.
    named: number of latents that were found by their explanation; the label maps found the others.
    """

    words: dict[str, list[int]]
    gain: dict[int, float]
    named: int

    def best(self, count: int) -> dict[str, list[int]]:
        """Return the first `count` words with their latents."""
        return dict(list(self.words.items())[:count])


def find_candidates(
    place: SAEInPlace,
    cases: Sequence[Case],
    cache: LatentCache,
    explanations: Mapping[int, Mapping],
    label_maps: Dataset | None,
    *,
    concepts: Mapping[str, Sequence[str]],
    text_kinds: Sequence[str],
    text_words: Iterable[str],
    dose: float,
    highest: int,
    scope: Scope,
) -> Candidates:
    """Find latents that stand for text, and predict for each how clamping it changes the answers to `cases`.

    A latent stands for text if its explanation says so, or if it is active on written words by the label maps. Only
    the `highest` latents by predicted gain are compared with label maps.

    cases: wrong answers that a clamp should correct.
    cache: the latents on the cached images.
    explanations: latent to the row of notebook 03, with `concept`.
    label_maps: the cached images' rows, with a column for each kind of concept; None without a ground truth.
    concepts: kind to names, the ground truth's; empty without one.
    text_kinds: kinds of concept that are text.
    text_words: an explanation with one of these words names text, too.
    dose: clamp value in units of each latent's maximum.
    scope: the tokens that are clamped.
    """
    maxima = torch.tensor(np.asarray(cache.max))
    gain = predicted_gain(place, cases, dose * maxima, scope)
    elsewhere = {name for kind, names in concepts.items() if kind not in text_kinds for name in names}
    vocabulary = [name for kind in text_kinds for name in concepts.get(kind, ()) if name not in elsewhere]
    text = named_after_text(explanations, vocabulary, text_words)
    named = len(text)
    likely = gain.topk(min(highest, len(gain))).indices.tolist()
    for kind in dict.fromkeys(text_kinds):
        if label_maps is not None and kind in label_maps.column_names:
            text = on_written_words(cache, label_maps, kind, concepts[kind], likely) | text
    words = latents_by_word(text, gain)
    return Candidates(words, {latent: float(gain[latent]) for latent in sorted(text)}, named)


def named_after_text(
    explanations: Mapping[int, Mapping], vocabulary: Iterable[str], words: Iterable[str] = ()
) -> dict[int, str]:
    """Return the latents that an explanation names after text, with this name.

    vocabulary: concepts that are text.
    words: an explanation that has one of these words names text, too.
    """
    known, hints = {name.lower() for name in vocabulary}, {word.lower() for word in words}
    named = {latent: row["concept"] for latent, row in explanations.items() if row.get("concept")}
    return {n: name for n, name in named.items() if name.lower() in known or hints & set(name.lower().split())}


def on_written_words(
    cache: LatentCache,
    label_maps: Dataset,
    kind: str,
    names: Sequence[str],
    latents: Iterable[int],
    *,
    at_least: float = 0.25,
) -> dict[int, str]:
    """Return the latents whose activation on their top images lies on one concept, with the concept's name.

    label_maps: a row for each cached image; in column `kind`, pixel value n stands for names[n - 1].
    names: the concepts of this kind.
    latents: to look at.
    at_least: fraction of the activation, over all top images, that must lie on the concept's pixels.
    """
    maps = label_maps.select_columns([kind])  # a row would decode all of its pictures
    label_map = lru_cache(256)(lambda image: np.asarray(maps[image][kind]))
    words = {}
    for latent in latents:
        fractions, images = np.zeros(1 + len(names)), cache.top(latent)
        for rank, (image, _) in enumerate(images):
            labels, activation = label_map(image), np.asarray(cache.patch_map(latent, rank))
            patch = np.array(labels.shape) // activation.shape
            on_pixels = np.kron(activation / activation.sum(), np.ones(patch)) / patch.prod()
            fractions += np.bincount(labels.ravel(), on_pixels.ravel(), minlength=len(fractions)) / len(images)
        if fractions[1:].max(initial=0.0) >= at_least:
            words[latent] = names[int(fractions[1:].argmax())]
    return words


def predicted_gain(
    place: SAEInPlace,
    cases: Sequence[Case],
    values: Float[Tensor, " n_latents"],
    scope: Scope = Scope(),  # noqa: B008  (frozen)
) -> Float[Tensor, " n_latents"]:
    """Predict by how many logits clamping each latent raises the margin of the right answers, on average, linearly.

    It costs one forward and one backward for each case, and covers all latents, silent ones too.

    values: the clamp of each latent.
    scope: the tokens that are clamped.
    """
    lmm, sae = place.lmm, place.sae
    total = torch.zeros(sae.n_latents)
    for case in cases:
        choice = decision(lmm, case.question, case.image, case.right, case.tempting)
        total += clamping(place, choice, values, scope.of_prompt(choice.prompt)[0]) / len(cases)
    return total


def latents_by_word(text: Mapping[int, str], gain: Float[Tensor, " n_latents"]) -> dict[str, list[int]]:
    """Group latents by the word that they stand for; the word with the highest sum of gains comes first."""
    groups: dict[str, list[int]] = {}
    for latent, word in sorted(text.items()):
        groups.setdefault(word, []).append(latent)
    return dict(sorted(groups.items(), key=lambda item: -float(gain[item[1]].sum())))
