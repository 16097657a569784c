"""Run the steering experiments of sections 4.1 and 4.2, each as one function with a named result.

A dose is a clamp in units of the latent's maximum over the cached images, so that doses compare across latents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from lmm_sae_nb.cache.encode_images import activation_maps
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.interpret.explainers import mentions
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.steer.fluency import Ordinary, ReadAnswer, best_dose, harmonic_mean, read_answers
from lmm_sae_nb.steer.steering import Edit, Scope, answers
from lmm_sae_nb.support.intervals import bounds, mean_interval, proportion
from lmm_sae_nb.support.stages import Metrics

RANKS = ((0, 10), (10, 20), (20, 40), (40, 80))  # ranges of ranks, from 0, whose kinds are counted together
MOST_FREQUENT = 40  # latents of highest frequency, counted for comparison
LOW_LEVEL = ("colour", "texture", "material")  # kinds that the paper calls low-level


def at_dose(cache: LatentCache, latent: int, dose: float) -> list[Edit]:
    """Return the edit that clamps a latent to `dose` times its maximum; at dose 0 no edit, the SAE is only spliced in.

    cache: gives the latent's maximum over the cached images.
    """
    return [Edit(latent, dose * float(cache.max[latent]))] if dose else []


# ---- feelings and stories (section 4.1, Figures 5 and 6) ----------------------------------------------------------


@dataclass(frozen=True)
class CaseStudy:
    """The answers to one prompt while one latent is clamped at several doses.

    concept: the latent's name.
    untouched: the answer of the model without the SAE.
    doses: 0 first, where the SAE is spliced in and nothing is clamped.
    answers: one for each dose.
    read: the same answers as the untouched model reads them.
    ordinary: unsteered answers that name other concepts are the reference; the one that names this concept is the
        control.
    """

    concept: str
    latent: int
    prompt: str
    untouched: str
    doses: list[float]
    answers: list[str]
    read: list[ReadAnswer]
    ordinary: Ordinary

    @property
    def named(self) -> list[bool]:
        """Whether each answer names the concept and differs from the untouched and from the spliced answer."""
        unclamped = {self.untouched, self.answers[0]}
        return [mentions(answer, self.concept) and answer not in unclamped for answer in self.answers]

    @property
    def fluency(self) -> list[float]:
        """The fluency of each answer."""
        return [self.ordinary.fluency(read) for read in self.read]

    @property
    def harmonic(self) -> list[float]:
        """The harmonic mean of naming the concept (0 or 1) and of fluency, for each answer."""
        return [harmonic_mean(*pair) for pair in zip(self.named, self.fluency, strict=True)]


def latents_named(
    cache: LatentCache,
    concepts: Mapping[int, str],
    wanted: Iterable[str],
    named_by: Mapping[str, Sequence[str]] = {},  # noqa: B006  (only read)
) -> dict[str, int]:
    """Return for each wanted concept the latent of that name with the highest mean activation on an image.

    If no latent has this very name, those count that `named_by` finds and that count for no concept before. A concept
    that no latent is named for is left out.

    concepts: latent to its name.
    named_by: concept to words, such as "smile" for "happy". A name that has the concept or one of them names it, too.
    """
    strength = {latent: float(cache.top_means[latent, 0]) for latent in concepts}
    found = {}
    for concept in wanted:
        named = [latent for latent, name in concepts.items() if name == concept]
        if not named and concept in named_by:
            words = [concept, *named_by[concept]]
            free = {latent: name for latent, name in concepts.items() if latent not in found.values()}
            named = [latent for latent, name in free.items() if any(mentions(name, word) for word in words)]
        if named:
            found[concept] = max(named, key=strength.__getitem__)
    return found


def case_studies(
    place: SAEInPlace,
    cache: LatentCache,
    latents: Mapping[str, int],
    prompt: str,
    doses: Sequence[float],
    *,
    unsteered: str,
    image: Image.Image | None = None,
    scope: Scope = Scope(),  # noqa: B008  (frozen)
    keep_error: bool = True,
    max_new_tokens: int = 48,
) -> list[CaseStudy]:
    """Ask one prompt while the latent of each concept is clamped.

    With fewer than two concepts there are no case studies, because fluency has no reference.

    latents: concept to latent.
    doses: above 0.
    unsteered: a prompt with `{}` that asks for an answer about a concept. The untouched model's answers to it, for
        every concept, are the ordinary answers that fluency is measured against.
    image: the one that the prompt shows; without it the prompt has no image.
    scope: the tokens at which the latent is clamped.
    keep_error: as for `steered`.
    """
    lmm, doses = place.lmm, [0.0, *map(float, doses)]
    if len(latents) < 2:
        return []
    asked = lmm.generate(lmm.prompt([unsteered.format(name) for name in latents]), max_new_tokens=max_new_tokens)
    untouched = lmm.generate(lmm.prompt(prompt, image), max_new_tokens=max_new_tokens)[0]
    as_answers = read_answers(lmm, prompt, image, asked)
    studies = []
    for own, (concept, latent) in zip(as_answers, latents.items(), strict=True):
        settings = [at_dose(cache, latent, dose) for dose in doses]
        steered = answers(place, prompt, image, settings, scope, keep_error=keep_error, max_new_tokens=max_new_tokens)
        read = read_answers(lmm, prompt, image, steered)
        ordinary = Ordinary([other for other in as_answers if other is not own], [own])
        studies.append(CaseStudy(concept, latent, prompt, untouched, doses, steered, read, ordinary))
    return studies


def with_next_latents(studies: Sequence[CaseStudy]) -> list[CaseStudy]:
    """Return the control of case studies: each concept is searched for in the answers to the next concept's latent.

    Nothing is asked again, because all studies have the same prompt. After the last concept comes the first.
    """
    following = [*studies[1:], *studies[:1]]
    return [
        replace(study, latent=other.latent, answers=other.answers, read=other.read)
        for study, other in zip(studies, following, strict=True)
    ]


def left_out_doses(studies: Sequence[CaseStudy]) -> list[float]:
    """Return each study's dose: the one with the highest mean harmonic mean over the other studies.

    studies: at least two, with the same doses.
    """
    chosen = []
    for left_out in studies:
        others = [study for study in studies if study is not left_out]
        doses = [dose for study in others for dose in study.doses[1:]]
        chosen.append(best_dose(doses, [score for study in others for score in study.harmonic[1:]]))
    return chosen


def at_chosen_dose(studies: Sequence[CaseStudy]) -> list[dict[str, str]]:
    """Return for each study a row of a table: the concept, the dose by the other studies, and the answer."""
    return [
        {
            "clamped": study.concept,
            "dose": f"{dose:g}",
            "answer": study.answers[study.doses.index(dose)],
            "fluency": f"{study.fluency[study.doses.index(dose)]:.2f}",
        }
        for study, dose in zip(studies, left_out_doses(studies), strict=True)
    ]


def case_metrics(prefix: str, studies: Sequence[CaseStudy], seed: int = 0) -> Metrics:
    """Return concept, fluency and harmonic mean of case studies and of their control, with intervals.

    The dose of each study is the one that the other studies choose. The control has the next latent at this dose.
    Without studies there is only their number, 0.

    prefix: of the names.
    seed: of the intervals.
    """
    if not studies:
        return {f"{prefix}_steered": 0}
    chosen = left_out_doses(studies)
    metrics: Metrics = {f"{prefix}_steered": len(studies), f"{prefix}_dose": float(np.median(chosen))}
    for name, group in ((prefix, studies), (f"{prefix}_control", with_next_latents(studies))):
        at = [(study, study.doses.index(dose)) for study, dose in zip(group, chosen, strict=True)]
        metrics[f"{name}_named"] = sum(study.named[n] for study, n in at)
        metrics[f"{name}_named_any_dose"] = sum(any(study.named[1:]) for study in group)
        for what in ("fluency", "harmonic"):
            values = [getattr(study, what)[n] for study, n in at]
            metrics |= bounds(f"{name}_{what}", mean_interval(values, seed=seed))
        metrics[f"{name}_repeated"] = float(np.mean([study.read[n].repeated for study, n in at]))
    unsteered = [fluency for study in studies for fluency in study.ordinary.control_fluency]
    metrics |= bounds(f"{prefix}_unsteered_fluency", mean_interval(unsteered, seed=seed))
    metrics[f"{prefix}_reference_perplexity"] = float(np.median([study.ordinary.perplexity for study in studies]))
    metrics[f"{prefix}_fluency_ratio"] = metrics[f"{prefix}_fluency"] / metrics[f"{prefix}_unsteered_fluency"]
    return metrics


# ---- one latent for the picture and the word (section 4.1) --------------------------------------------------------


@dataclass(frozen=True)
class WordActivation:
    """How active a latent is where words are read, in units of its maximum on patches.

    on_name: where the latent's name is read.
    on_others: mean over the names of other latents.
    """

    latent: int
    concept: str
    on_name: float
    on_others: float


@torch.no_grad()
def word_activations(
    place: SAEInPlace, cache: LatentCache, concepts: Mapping[int, str], template: str
) -> list[WordActivation]:
    """Measure how active latents become when the model reads their names instead of seeing them.

    The highest activation on a text token of the prompt counts. There is no image.

    concepts: latent to its name. With fewer than two different names there is no other word to compare with, and no
        result.
    template: the prompt, with `{}` where a name stands.
    """
    lmm, words = place.lmm, sorted(set(concepts.values()))
    if len(words) < 2:
        return []
    prompt = lmm.prompt([template.format(word) for word in words])
    latents = place.sae.encode(lmm.hidden_states(prompt, place.layer).flatten(0, 1).float())
    text = place.mask(prompt, ["text"])
    rows = []
    for latent, concept in concepts.items():
        acts = torch.where(latents.indices == latent, latents.acts, 0).sum(-1).cpu().reshape(text.shape)
        by_word = (acts * text).amax(1) / float(cache.max[latent])
        name = words.index(concept)
        others = float(np.delete(by_word.numpy(), name).mean())
        rows.append(WordActivation(latent, concept, float(by_word[name]), others))
    return rows


def word_metrics(words: Sequence[WordActivation], seed: int = 0) -> Metrics:
    """Return means over latents and their paired difference with intervals, and what the names do to how many latents.

    A latent is more active on its name, more active on other names, or as active on both, nearly always silent.
    Without latents there is only their number, 0.
    """
    if not words:
        return {"word_latents": 0}
    on_name, on_others = (np.array([getattr(row, part) for row in words]) for part in ("on_name", "on_others"))
    return {
        "word_latents": len(words),
        **bounds("word_on_name", mean_interval(on_name, seed=seed)),
        **bounds("word_on_others", mean_interval(on_others, seed=seed)),
        **bounds("word_name_above_others", proportion(on_name > on_others)),
        **bounds("word_difference", mean_interval(on_name - on_others, seed=seed)),
        "word_more_on_name": int((on_name > on_others).sum()),
        "word_more_on_others": int((on_name < on_others).sum()),
        "word_silent": int(((on_name == 0) & (on_others == 0)).sum()),
    }


# ---- which latents come first (section 4.2, Appendix H) -----------------------------------------------------------


@dataclass(frozen=True)
class RankedKinds:
    """The kinds of concepts among the latents that are most active on an image.

    fractions: range of ranks to kind to its fraction. Two more rows compare: the latents of highest frequency, and all
        latents.
    top: kind to its fraction in the first range of ranks, one for each image with an active latent.
    """

    fractions: dict[str, dict[str, float]]
    top: dict[str, list[float]]

    @property
    def metrics(self) -> Metrics:
        """The fractions of scenes and of low-level kinds in the first ranks, with intervals, and among all latents."""
        metrics = {}
        groups = {kind: (kind,) for kind in ("scene", *LOW_LEVEL)} | {"low_level": LOW_LEVEL}
        for name, kinds in groups.items():
            none = np.zeros(max(map(len, self.top.values()), default=0))
            by_image = none + sum(np.array(self.top[kind]) for kind in kinds if kind in self.top)
            if np.size(by_image) > 1:
                metrics |= bounds(f"top_ranks_{name}", mean_interval(by_image))
                known = self.fractions["all latents"]
                metrics[f"all_latents_{name}"] = sum(known.get(kind, 0.0) for kind in kinds)
        return metrics


def kinds_by_rank(
    place: SAEInPlace,
    pictures: Sequence[Image.Image],
    cache: LatentCache,
    kinds: Mapping[int, str],
    *,
    images: int = 200,
    seed: int = 0,
) -> RankedKinds:
    """Rank latents by mean activation on each image, and return the fractions of kinds at each range of ranks.

    Latents that an image leaves silent have no rank on it.

    pictures: the cached images, to draw from those that can be read.
    cache: gives the frequency of every latent.
    kinds: latent to the kind of its concept, such as "object"; only these latents are ranked.
    images: as many are drawn at random.
    """
    cache.require_pictures(pictures)
    latents = np.array(sorted(kinds))
    names = np.array([kinds[n] for n in latents.tolist()])
    readable = cache.readable
    drawn = np.random.default_rng(seed).choice(readable, min(images, len(readable)), replace=False).tolist()
    means = activation_maps(place, [pictures[i] for i in drawn], latents.tolist()).mean((2, 3))
    order = np.argsort(-means, 1)
    ranked, active = names[order], np.take_along_axis(means, order, 1) > 0
    counts = {f"rank {a + 1}-{b}": Counter(ranked[:, a:b][active[:, a:b]].tolist()) for a, b in RANKS}
    counts["most frequent"] = Counter(names[np.argsort(-np.asarray(cache.frequency)[latents])[:MOST_FREQUENT]].tolist())
    counts["all latents"] = Counter(names.tolist())
    fractions = {
        name: {kind: count / found.total() for kind, count in sorted(found.items())}
        for name, found in counts.items()
        if found
    }
    first = slice(*RANKS[0])
    rows = [row[on] for row, on in zip(ranked[:, first], active[:, first], strict=True) if on.any()]
    return RankedKinds(
        fractions, {kind: [float((row == kind).mean()) for row in rows] for kind in counts["all latents"]}
    )


def rank_on_image(place: SAEInPlace, image: Image.Image, latent: int) -> int:
    """Return a latent's rank, from 1, among all latents by mean activation on an image's base patches."""
    means = activation_maps(place, [image], range(place.sae.n_latents))[0].mean((1, 2))
    return int((means > means[latent]).sum()) + 1


def ranks_on_top_images(
    place: SAEInPlace, cache: LatentCache, latents: Mapping[str, int], pictures: Sequence[Image.Image]
) -> dict[str, int]:
    """Return each concept's rank on the image that its latent responds to most.

    latents: concept to latent.
    pictures: the cached images.
    """
    cache.require_pictures(pictures)
    return {concept: rank_on_image(place, pictures[cache.top(n)[0][0]], n) for concept, n in latents.items()}
