"""Measure what changes with depth: the part of image tokens, steering, and the quality of linear attribution."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image

from lmm_sae_nb.attribute.agreement import agreement, random_pairs
from lmm_sae_nb.attribute.attribution import exact, greedy_decision, linear
from lmm_sae_nb.compare.saes import CachedSAE, awake
from lmm_sae_nb.interpret.explainers import mentions
from lmm_sae_nb.model.hookpoints import Hookpoint
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.score.scores import Explained
from lmm_sae_nb.steer.steering import Edit, Scope, answers


@torch.no_grad()
def effect_of_image_tokens(lmm: LMM, sample: Mapping, layers: Iterable[Hookpoint]) -> dict[Hookpoint, float]:
    """Return for each layer the largest change of the answer's logits when the states of image tokens become zero.

    sample: with image and question.
    layers: 0-based; the layer's output is changed.
    """
    prompt = lmm.prompt(sample["question"], sample["image"])
    image_tokens = prompt.mask("base", "tiles", "newline")[..., None]
    clean, changes = lmm.last_logits(prompt), {}
    for layer in layers:
        with lmm.spliced(layer, lambda hidden: hidden.masked_fill(image_tokens.to(hidden.device), 0)):
            changes[layer] = float((lmm.last_logits(prompt) - clean).abs().max())
    return changes


@dataclass(frozen=True)
class SteeredLatent:
    """The answer about an empty image while one latent is clamped.

    concept: the latent's name.
    """

    latent: int
    concept: str
    answer: str

    @property
    def named(self) -> bool:
        """Whether the answer mentions the concept."""
        return mentions(self.answer, self.concept)


def steer_objects(
    study: CachedSAE, explained: Mapping[int, Explained], *, question: str, n_latents: int, dose: float,
    kinds: Sequence[str], image_size: int, seed: int = 0,
) -> list[SteeredLatent]:  # fmt: skip
    """Ask about a white image while a latent that is named for an object is clamped at its tokens, one after the other.

    explained: latents with their concepts and kinds.
    n_latents: how many latents, at random if there are more.
    dose: the clamp, in units of the latent's maximum over the cached images.
    kinds: of the tokens that are clamped.
    image_size: side of the white image, in pixels.
    seed: of the choice.
    """
    objects = [latent for latent, (_, kind) in explained.items() if kind == "object"]
    chosen = np.random.default_rng(seed).permutation(objects).tolist()[:n_latents]
    white = Image.new("RGB", (image_size, image_size), "white")
    settings = [[Edit(latent, dose * float(study.cache.max[latent]))] for latent in chosen]
    with awake(study.place):
        said = answers(study.place, question, white, settings, Scope(tuple(kinds)), batch=20, max_new_tokens=24)
    concepts = [explained[latent].concept for latent in chosen]
    return [SteeredLatent(*each) for each in zip(chosen, concepts, said, strict=True)]


def rank_agreement(
    places: Mapping[str, SAEInPlace], samples: Iterable[Mapping], *, decisions: int, pairs: int, seed: int = 0
) -> dict[str, list[float]]:
    """Return for each SAE how linear attribution ranks random active pairs, compared with ablating each of them.

    A decision is the first token of the model's answer against the runner-up. The number is Spearman's rank
    correlation, one for each decision. A decision in which all effects are equal has none and is left out.

    places: SAEs of one model.
    samples: with question and image; those without an image are left out.
    decisions: how many samples.
    pairs: active (token, latent) pairs of each decision.
    seed: of the pairs; one source of randomness serves all SAEs, in order.
    """
    lmm = next(iter(places.values())).lmm
    asked = islice((row for row in samples if row["image"] is not None), decisions)
    choices = [greedy_decision(lmm, row["question"], row["image"]) for row in asked]
    generator, correlations = torch.Generator().manual_seed(seed), {}
    for name, place in places.items():
        correlations[name] = []
        with awake(place):
            for choice in choices:
                approximation = linear(place, choice)
                drawn = random_pairs(approximation, pairs, generator)
                correlation = agreement(exact(place, choice, drawn), approximation.values).spearman
                if np.isfinite(correlation):
                    correlations[name].append(correlation)
    return correlations
