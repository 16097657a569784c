"""Steer without an SAE: add a direction to the hidden states, or say the concept in the prompt.

Clamped latents are steered beside it, towards the same objects, with the same question, image and measures as in
notebook 06. So a difference is one of the methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lmm_sae_nb.compare.saes import CachedSAE
from lmm_sae_nb.controls.directions import LabelledStates, logistic_probes, mean_differences
from lmm_sae_nb.interpret.explainers import mentions
from lmm_sae_nb.model.hookpoints import Hookpoint
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.prompts import Prompt
from lmm_sae_nb.steer.experiments import latents_named
from lmm_sae_nb.steer.objects import SteeredQuestion, Steering, Try, Way, clamping, steer_by
from lmm_sae_nb.steer.steering import Scope
from lmm_sae_nb.support.images import Chosen
from lmm_sae_nb.support.intervals import bounds, mean_interval
from lmm_sae_nb.support.stages import Metrics
from lmm_sae_nb.truth.detectors import Detector, choose_detectors
from lmm_sae_nb.truth.label_maps import LabelMaps

QUESTION = "What do you see in this image?"  # of Appendix D
# questions that say the concept; those that choose the dose choose the form
FORMS = (
    "Imagine that you see a {}. What do you see in this image?",
    "There is a {} in this image. What do you see in this image?",
    "What do you see in this image? A {}.",
    "Tell me about the {} in this image.",
)
DOSES = (1, 2, 4, 8, 16, 32, 64)

# ---- ways to steer --------------------------------------------------------------------------------------------------


@contextmanager
def added(
    lmm: LMM, layer: Hookpoint, prompt: Prompt, vectors: Float[Tensor, "batch width"], scope: Scope
) -> Iterator[None]:
    """Run the model on this prompt, or generate from it, with a vector added to the layer's output.

    vectors: one for each sample of the batch.
    scope: the tokens that it is added to.
    """
    device = lmm.device_of(layer)
    chosen, vectors = scope.of_prompt(prompt).to(device), vectors.to(device)

    def rewrite(hidden: Float[Tensor, "batch tokens width"]) -> Tensor:
        if hidden.shape[:2] == chosen.shape:
            return hidden + chosen[..., None] * vectors[:, None].to(hidden.dtype)
        return hidden + scope.of_generated * vectors[:, None].to(hidden.dtype)  # one generated token

    with lmm.spliced(layer, rewrite):
        yield


def adding(
    layer: Hookpoint, directions: Float[np.ndarray, "rows width"], length: float, asked: SteeredQuestion, scope: Scope
) -> Way:
    """Return the way that adds a row of `directions` at the layer, made as long as `length` times the dose.

    scope: the tokens that it is added to.
    """
    lmm = asked.lmm
    unit = torch.from_numpy(directions / np.linalg.norm(directions, axis=1, keepdims=True)).float()

    @torch.no_grad()
    def add(tries: Sequence[Try]) -> list[str]:
        said = []
        for start in range(0, len(tries), asked.batch):
            part = tries[start : start + asked.batch]
            prompt = lmm.prompt([asked.text] * len(part), [asked.image] * len(part))
            doses = torch.tensor([each.dose * length for each in part])
            vectors = unit[[each.number for each in part]] * doses[:, None]
            with added(lmm, layer, prompt, vectors, scope):
                said += lmm.generate(prompt, max_new_tokens=asked.max_new_tokens)
        return said

    return add


def prompting(asked: SteeredQuestion, concepts: Mapping[int, str], forms: Sequence[str]) -> Way:
    """Return the way that asks with the concept in the question.

    concepts: number to the name that the question says.
    forms: questions with `{}`. A dose of 1 stands for the first form, 2 for the second; 0 asks `asked.text`.
    """

    def ask(tries: Sequence[Try]) -> list[str]:
        texts = [forms[int(each.dose) - 1].format(concepts[each.number]) if each.dose else asked.text for each in tries]
        said = []
        for start in range(0, len(texts), asked.batch):
            part = texts[start : start + asked.batch]
            prompt = asked.lmm.prompt(part, [asked.image] * len(part))
            said += asked.lmm.generate(prompt, max_new_tokens=asked.max_new_tokens)
        return said

    return ask


# ---- all ways beside each other -------------------------------------------------------------------------------------

WAYS = {
    "latent": "SAE latent named for the object, clamped",
    "decoder": "decoder row of this latent, added",
    "detector": "SAE latent that detects the object best, clamped",
    "difference": "difference of means, added",
    "probe": "logistic probe, added",
    "prompt": "prompt",
}


@dataclass(frozen=True)
class SteeringComparison:
    """How each way steers towards the same objects.

    ways: `WAYS` by their keys; each reports the same concepts in the same order.
    length: the norm of what a dose of 1 adds.
    """

    ways: dict[str, Steering]
    length: float

    @property
    def metrics(self) -> Metrics:
        """The metrics of each way, and its mean difference from the latent named for the same concept."""
        latent = self.ways["latent"]
        metrics: Metrics = {"steer_length": self.length, "steer_concepts": len(latent.reported)}
        for name, found in self.ways.items():
            for key, value in found.metrics.items():
                of_all = "unsteered" in key or key == "reference_perplexity"
                metrics[f"steer_{key}" if of_all else f"steer_{name}_{key}"] = value
            if name != "latent":
                for what, key in (("names_concept", "named"), ("harmonic", "harmonic")):
                    here, there = ([float(getattr(row, what)) for row in rows.reported] for rows in (found, latent))
                    above = np.subtract(here, there)
                    metrics |= bounds(f"steer_{name}_{key}_above_latent", mean_interval(above))
        return metrics


def compare_ways(
    study: CachedSAE, names: Mapping[int, str], truth: LabelMaps, cached: LabelledStates, asked: SteeredQuestion,
    *, doses: Sequence[float] = DOSES, forms: Sequence[str] = FORMS, scope: Scope = Scope(("tiles", "newline")),  # noqa: B008
    count: int = 40, choosing: int = 20, least: int = 5, kind: str = "object",
    detectors: Sequence[Detector] | None = None, seed: int = 0, **probe,
) -> SteeringComparison:  # fmt: skip
    """Steer towards the same objects in every way, each at the dose that other objects choose.

    The objects are those that a latent is named for and that enough cached scenes show. Directions know from labels
    where an object is, a named latent does not; so the latent that detects it best by the same labels is clamped, too.
    Left out are objects that the answer names without steering. With another `kind`, read its concepts for objects.

    A dose of 1 adds a vector as long as the mean maximum of the named latents. This is about what their clamps add at
    dose 1, because rows of `W_dec` have norm 1. The controls are random live latents, random rows of `W_dec`, random
    directions, and prompts that say the next object; they are searched for the same names.

    study: an SAE with the cache of its latents.
    names: latent to the object that it is named for.
    truth: label maps of the cached images.
    cached: states of cached images at the SAE's layer, to fit directions on.
    doses: of latents and directions.
    forms: of prompts.
    scope: the tokens that are steered; a prompt has no scope.
    count: objects that are reported; at most two thirds, so that the others can choose.
    choosing: other objects, which choose doses and the form.
    least: cached images that must show an object.
    kind: of the concepts.
    detectors: the best latent of each concept on the cached images; None: `choose_detectors` finds them.
    seed: of the choice of objects, of the controls, and of the patches that probes are fitted on.
    probe: other settings of `logistic_probes`.

    Raises:
        ValueError: fewer than three objects are named and shown, or no latent is left for the control.
    """
    place, cache = study.place, study.cache
    rng, scenes = np.random.default_rng(seed), cached.scenes
    column = {name: n for n, (one, name) in enumerate(cached.names) if one == kind and scenes[n] >= least}
    found = choose_detectors(cache, truth, best=1) if detectors is None else detectors
    best = {each.concept: each.latent for each in found if each.kind == kind}
    plain = [asked.untouched, *clamping(place, cache, asked, scope)([Try(0, "", 0.0)])]
    new = [name for name in column if name in best and not any(mentions(answer, name) for answer in plain)]
    latents = latents_named(cache, names, new)
    if len(latents) < 3:
        raise ValueError(
            f"a latent is named for {len(latents)} {kind}s that {least} cached images show; steering needs at least "
            "three: give more explanations or more images"
        )
    order = rng.permutation(sorted(latents)).tolist()
    count = min(count, 2 * len(order) // 3)
    chosen = order[: count + choosing]
    concepts, n, reported = dict(enumerate(chosen)), len(chosen), list(range(count))
    named, detectors, fit = ([known[name] for name in chosen] for known in (latents, best, column))
    free = np.setdiff1d(np.flatnonzero(np.asarray(cache.live)), [*named, *detectors])
    if not len(free):
        raise ValueError(f"all live latents are steered towards {n} {kind}s, so there is no control; steer fewer")
    others = rng.choice(free, n, replace=len(free) < n).tolist()
    random = rng.normal(size=(n, place.sae.width)).astype(np.float32)
    length, W_dec = float(cache.max[named].mean()), place.sae.W_dec.detach().float().cpu().numpy()

    def add(directions: np.ndarray) -> Way:
        return adding(place.layer, directions, length, asked, scope)

    def clamp(latents: Sequence[int]) -> Way:
        way = clamping(place, cache, asked, scope)
        return lambda tries: way([each._replace(number=latents[each.number]) for each in tries])

    ways = {
        "latent": clamp([*named, *others]),
        "decoder": add(W_dec[[*named, *others]]),
        "detector": clamp([*detectors, *others]),
        "difference": add(np.concatenate([mean_differences(cached, fit, least), random])),
        "probe": add(np.concatenate([logistic_probes(cached, fit, least, seed=seed, **probe), random])),
        "prompt": prompting(asked, concepts, forms),
    }
    following = [*reported[1:], reported[0]]
    answers = {
        name: steer_by(
            way, asked, concepts, range(1, 1 + len(forms)) if name == "prompt" else doses,
            reported=reported, choosing=range(len(reported), n), curves=False,
            control=following if name == "prompt" else [n + each for each in reported],
        )
        for name, way in ways.items()
    }  # fmt: skip
    return SteeringComparison(answers, length)


def steering_baselines(
    study: CachedSAE, names: Mapping[int, str], images: Sequence[Image.Image], truth: LabelMaps,
    *, question: str = QUESTION, size: int = 192, fitted: int = 1_000, others: int = 100, batch: int = 20,
    max_new_tokens: int = 24, seed: int = 0, **settings,
) -> Metrics:  # fmt: skip
    """Return the metrics of steering by latents, directions and prompts on a white image.

    names: latent to the object that it is named for.
    images: that were cached.
    truth: their label maps.
    size: side of the white image, in pixels.
    fitted: directions are fitted on the first so many images.
    others: images of `images`, at random, whose unsteered answers are the reference of fluency and its control.
    batch: answers that run side by side.
    max_new_tokens: after so many tokens an answer is cut.
    seed: of every choice.
    settings: of `compare_ways`.

    Raises:
        ValueError: as `compare_ways`.
    """
    lmm, white = study.place.lmm, Image.new("RGB", (size, size), "white")
    drawn = np.random.default_rng(seed).permutation(study.cache.readable)[:others].tolist()
    asked = SteeredQuestion(lmm, question, white, Chosen(images, drawn), batch, max_new_tokens)
    cached = LabelledStates.read(lmm, study.place.layer, [images[n] for n in range(min(fitted, len(images)))], truth)
    return compare_ways(study, names, truth, cached, asked, seed=seed, **settings).metrics
