"""Run the steering experiments of sections 4.1 and 4.2 and of Appendix D, each as one function with a named result.

A dose is a clamp in units of the latent's maximum over the cached images, so that doses compare across latents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from lmm_sae_nb.cache.encode_images import activation_maps
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.interpret.explainers import mentions
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.steer.steering import Edit, Scope, answers
from lmm_sae_nb.support.intervals import Mean, bounds, mean_interval, proportion
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
    """

    concept: str
    latent: int
    prompt: str
    untouched: str
    doses: list[float]
    answers: list[str]

    @property
    def succeeds(self) -> bool:
        """Whether a clamped answer names the concept and differs from the untouched and from the spliced answer."""
        unclamped = {self.untouched, self.answers[0]}
        return any(mentions(answer, self.concept) and answer not in unclamped for answer in self.answers[1:])


def latents_named(cache: LatentCache, concepts: Mapping[int, str], wanted: Iterable[str]) -> dict[str, int]:
    """Return for each wanted concept the latent of that name with the highest mean activation on an image.

    A concept that no latent is named for is left out.

    concepts: latent to its name.
    """
    strength = {latent: float(cache.top_means[latent, 0]) for latent in concepts}
    found = {}
    for concept in wanted:
        named = [latent for latent, name in concepts.items() if name == concept]
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
    images: Mapping[str, Image.Image] | None = None,
    scope: Scope = Scope(),  # noqa: B008  (frozen)
    max_new_tokens: int = 48,
) -> list[CaseStudy]:
    """Ask one prompt while the latent of each concept is clamped, and keep what the SAE leaves unexplained.

    latents: concept to latent.
    doses: above 0.
    images: concept to the image that its prompt shows; without it the prompt has no image.
    scope: the tokens at which the latent is clamped.
    """
    lmm, doses = place.lmm, [0.0, *map(float, doses)]
    studies = []
    for concept, latent in latents.items():
        image = images[concept] if images else None
        untouched = lmm.generate(lmm.prompt(prompt, image), max_new_tokens=max_new_tokens)[0]
        settings = [at_dose(cache, latent, dose) for dose in doses]
        steered = answers(place, prompt, image, settings, scope, keep_error=True, max_new_tokens=max_new_tokens)
        studies.append(CaseStudy(concept, latent, prompt, untouched, doses, steered))
    return studies


def next_latents(latents: Mapping[str, int]) -> dict[str, int]:
    """Return for each concept the latent of the next one, for a control; nothing if there is only one concept.

    latents: concept to its latent; after the last concept comes the first.
    """
    numbers = list(latents.values())
    return dict(zip(latents, numbers[1:] + numbers[:1], strict=True)) if len(numbers) > 1 else {}


def repeats(answer: str) -> bool:
    """Whether more than half of an answer's words stood in it before."""
    words = [word.strip(".,!?").lower() for word in answer.split()]
    return 2 * len(set(words)) < len(words)


def case_metrics(prefix: str, studies: Sequence[CaseStudy]) -> Metrics:
    """Return how many latents were steered and succeeded, and how many clamped answers there are and repeat words.

    The names are `<prefix>_steered`, `_named`, `_answers` and `_repetitive`.
    """
    clamped = [answer for study in studies for answer in study.answers[1:]]
    return {
        f"{prefix}_steered": len(studies),
        f"{prefix}_named": sum(study.succeeds for study in studies),
        f"{prefix}_answers": len(clamped),
        f"{prefix}_repetitive": sum(map(repeats, clamped)),
    }


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

    concepts: latent to its name.
    template: the prompt, with `{}` where a name stands.

    Raises:
        ValueError: there are fewer than two different names, so there is no other word to compare with.
    """
    lmm, words = place.lmm, sorted(set(concepts.values()))
    if len(words) < 2:
        raise ValueError(f"the latents have the names {words}; give latents with at least two different names")
    prompt = lmm.prompt([template.format(word) for word in words])
    latents = place.sae.encode(lmm.hidden_states(prompt, place.layer).flatten(0, 1).float())
    text = prompt.mask("text").cpu()
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
    """
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


# ---- a hundred objects on a white image (Appendix D) --------------------------------------------------------------


@dataclass(frozen=True)
class SteeredAnswer:
    """The answer about an image while one latent is clamped.

    concept: the name that the answer is searched for.
    changed: whether the answer differs from that of the model with the SAE spliced in.
    names_concept: whether it has the concept's name.
    """

    latent: int
    concept: str
    dose: float
    answer: str
    changed: bool
    names_concept: bool


@dataclass(frozen=True)
class ObjectSteering:
    """Answers about one image while latents are clamped, one at a time.

    untouched: the answer of the model without the SAE.
    spliced: the answer with the SAE spliced in and nothing clamped.
    dose: the dose of the reported numbers. It is chosen on `choosing`, not on `objects`.
    objects: latents named for an object, at every dose.
    choosing: other latents named for an object, at every dose.
    random: as many live latents at random, at `dose`; they are searched for the names of `objects`.
    """

    untouched: str
    spliced: str
    dose: float
    objects: list[SteeredAnswer]
    choosing: list[SteeredAnswer]
    random: list[SteeredAnswer]

    @property
    def reported(self) -> list[SteeredAnswer]:
        """The answers of `objects` at the chosen dose."""
        return [row for row in self.objects if row.dose == self.dose]

    def curves(self, what: str) -> dict[str, dict[float, Mean]]:
        """Return for each group and dose the fraction of latents, with its interval.

        what: "names_concept" or "changed".
        """
        groups = {
            "object latents": self.objects,
            "other object latents, which choose the dose": self.choosing,
            "random live latents": self.random,
        }
        curves = {}
        for name, rows in groups.items():
            hits = {dose: [getattr(row, what) for row in rows if row.dose == dose] for dose in _doses(rows)}
            if hits:
                curves[name] = {dose: Mean(*proportion(hit)[:3]) for dose, hit in hits.items()}
        return curves

    @property
    def metrics(self) -> Metrics:
        """The numbers at the chosen dose, out of 100 latents, with their intervals."""
        metrics = {
            "objects_steered": len(self.reported),
            "dose": self.dose,
            "dose_chosen_on": len({row.latent for row in self.choosing}),
        }
        for prefix, rows in (("", self.reported), ("control_", self.random)):
            for what, title in (("names_concept", "named"), ("changed", "changed")):
                fraction = proportion([getattr(row, what) for row in rows])
                metrics |= {name: 100 * value for name, value in bounds(f"{prefix}{title}_of_100", fraction).items()}
        return metrics


def _doses(rows: Iterable[SteeredAnswer]) -> list[float]:
    return sorted({row.dose for row in rows})


def steer_objects(
    place: SAEInPlace,
    cache: LatentCache,
    concepts: Mapping[int, str],
    question: str,
    image: Image.Image,
    doses: Sequence[float],
    *,
    count: int = 100,
    scope: Scope = Scope(),  # noqa: B008
    batch: int = 16,
    max_new_tokens: int = 24,
    seed: int = 0,
) -> ObjectSteering:
    """Clamp latents named for an object, one at a time, while the model is asked about an image (Appendix D).

    `count` latents at random are reported; up to as many others choose the dose. The control is as many live latents
    at random, at that dose.

    concepts: latent to the object that it is named for.
    scope: the tokens at which a latent is clamped.
    batch: clamps that run side by side.
    seed: of the choice of latents.
    """
    lmm, rng = place.lmm, np.random.default_rng(seed)
    order = rng.permutation(sorted(concepts)).tolist()
    reported, choosing = order[:count], order[count : 2 * count]
    others = np.setdiff1d(np.flatnonzero(np.asarray(cache.live)), reported)
    control = rng.choice(others, len(reported), replace=len(others) < len(reported)).tolist()

    def ask(settings: Sequence[Sequence[Edit]]) -> list[str]:
        return answers(place, question, image, settings, scope, batch=batch, max_new_tokens=max_new_tokens)

    untouched = lmm.generate(lmm.prompt(question, image), max_new_tokens=max_new_tokens)[0]
    (spliced,) = ask([[]])

    def steer(latents: Iterable[int], searched: Iterable[str], doses: Iterable[float]) -> list[SteeredAnswer]:
        tries = [(*pair, float(dose)) for dose in doses for pair in zip(latents, searched, strict=True)]
        said = ask([at_dose(cache, latent, dose) for latent, _, dose in tries])
        return [
            SteeredAnswer(latent, concept, dose, answer, answer != spliced, mentions(answer, concept))
            for (latent, concept, dose), answer in zip(tries, said, strict=True)
        ]

    objects, chosen_on = (steer(group, [concepts[n] for n in group], doses) for group in (reported, choosing))
    dose = most_effective(doses, (row.dose for row in chosen_on if row.names_concept))
    random = steer(control, [concepts[n] for n in reported], [dose])
    return ObjectSteering(untouched, spliced, dose, objects, chosen_on, random)


def clamp_values(steering: ObjectSteering, cache: LatentCache) -> Metrics:
    """Return the mean value that object latents and random latents are clamped to at the chosen dose.

    A row of `W_dec` has norm 1, so the clamp of a silent latent adds a vector of this norm to the reconstruction.
    """
    return {
        name: float(np.mean([row.dose * float(cache.max[row.latent]) for row in rows]))
        for name, rows in (("clamp_value", steering.reported), ("control_clamp_value", steering.random))
    }


def most_effective(doses: Sequence[float], hits: Iterable[float]) -> float:
    """Return the dose with most hits, the lowest if several tie, the highest dose if there is no hit at all.

    hits: the dose of each success.
    """
    counted = Counter(hits)
    return float(max(sorted(doses), key=counted.__getitem__) if counted else max(doses))


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
            by_image = np.sum([self.top[kind] for kind in kinds if kind in self.top], 0)
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

    pictures: the images to draw from.
    cache: gives the frequency of every latent.
    kinds: latent to the kind of its concept, such as "object"; only these latents are ranked.
    images: as many are drawn at random.
    """
    latents = np.array(sorted(kinds))
    names = np.array([kinds[n] for n in latents.tolist()])
    drawn = np.random.default_rng(seed).choice(len(pictures), min(images, len(pictures)), replace=False).tolist()
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
    return {concept: rank_on_image(place, pictures[cache.top(n)[0][0]], n) for concept, n in latents.items()}
