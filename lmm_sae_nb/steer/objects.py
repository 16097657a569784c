"""Make the model name objects on a white image, one at a time (section 4.1, Appendix D).

`SteeredQuestion` asks and reads; a `Way` says how the model is made to name a concept. A clamped latent is one way,
and so are an added direction and a prompt (`lmm_sae_nb.controls.direction_steering`). So all ways are measured alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from PIL import Image

from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.interpret.explainers import mentions
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.steer.experiments import at_dose
from lmm_sae_nb.steer.fluency import Ordinary, answers_about_others, best_dose, harmonic_mean, read_answers
from lmm_sae_nb.steer.steering import Scope, answers
from lmm_sae_nb.support.intervals import Mean, bounds, mean_interval, proportion
from lmm_sae_nb.support.stages import Metrics

FEW = 3  # latents below which nothing is measured: two to report, one to choose the dose
FLUENT = 0.8  # an answer is fluent if it has this much of the mean fluency of unsteered answers


class Try(NamedTuple):
    """One steered answer to ask for.

    number: of what brings the concept: a latent, or a row of directions.
    concept: the name that the answer is searched for.
    dose: how strong it is; the unit depends on the way.
    """

    number: int
    concept: str
    dose: float


Way = Callable[[Sequence[Try]], list[str]]  # a way to make the model name concepts: tries -> its answers


@dataclass(frozen=True)
class SteeredAnswer:
    """The answer about an image while one latent is clamped, or while the model is steered in another way.

    latent: its number; for another way, the number of the `Try`.
    concept: the name that the answer is searched for.
    changed: whether the answer differs from the one at dose 0.
    names_concept: whether it has the concept's name.
    fluency: from 0 to 1, against ordinary answers.
    repeated: fraction of repeated 3-grams of words.
    """

    latent: int
    concept: str
    dose: float
    answer: str
    changed: bool
    names_concept: bool
    fluency: float
    repeated: float

    @property
    def harmonic(self) -> float:
        """The harmonic mean of naming the concept (0 or 1) and of fluency."""
        return harmonic_mean(self.names_concept, self.fluency)


@dataclass(frozen=True)
class SteeredQuestion:
    """A question about an image that a model answers while it is steered.

    others: images whose unsteered answers are the reference of fluency and its control.
    batch: answers that run side by side.
    max_new_tokens: after so many tokens an answer is cut.
    """

    lmm: LMM
    text: str
    image: Image.Image
    others: Sequence[Image.Image]
    batch: int = 16
    max_new_tokens: int = 24

    @cached_property
    def untouched(self) -> str:
        """The answer of the model as it is."""
        return self.lmm.generate(self.lmm.prompt(self.text, self.image), max_new_tokens=self.max_new_tokens)[0]

    @cached_property
    def ordinary(self) -> Ordinary:
        """The unsteered answers about other images, read as answers about this one."""
        how = dict(batch=self.batch, max_new_tokens=self.max_new_tokens)
        return answers_about_others(self.lmm, self.text, self.image, self.others, **how)

    def steer(self, way: Way, tries: Sequence[Try], unsteered: str) -> list[SteeredAnswer]:
        """Ask for steered answers and read them.

        unsteered: the answer at dose 0; an answer that differs from it has changed.
        """
        said = way(tries)
        read = read_answers(self.lmm, self.text, self.image, said, batch=self.batch)
        return [
            SteeredAnswer(
                *each,
                answer,
                answer != unsteered,
                mentions(answer, each.concept),
                self.ordinary.fluency(as_read),
                as_read.repeated,
            )
            for each, answer, as_read in zip(tries, said, read, strict=True)
        ]


def at_doses(concepts: Mapping[int, str], numbers: Iterable[int], doses: Sequence[float]) -> list[Try]:
    """Return a try for each number at each dose.

    concepts: number to name.
    """
    numbers = list(numbers)
    return [Try(number, concepts[number], float(dose)) for dose in doses for number in numbers]


def chosen_doses(choosing: Sequence[SteeredAnswer]) -> tuple[float, float]:
    """Return the dose of the highest mean harmonic mean, and the dose at which most answers name their concept.

    Raises:
        ValueError: there are no answers.
    """
    tried = [row.dose for row in choosing]
    return best_dose(tried, [row.harmonic for row in choosing]), best_dose(
        tried, [row.names_concept for row in choosing]
    )


@dataclass(frozen=True)
class Steering:
    """Answers about one image while the model is steered towards objects, one at a time.

    untouched: the answer of the model as it is.
    spliced: the answer at dose 0. For latents the SAE is then spliced in.
    ordinary: unsteered answers about other images, read as answers about this one.
    dose: the dose of the reported numbers, chosen by the harmonic mean on `choosing`, not on `objects`.
    naming_dose: the dose at which most of `choosing` name their object, however the sentences look.
    objects: the reported objects, at least at these two doses.
    choosing: other objects, at every dose.
    random: the control at `dose`: something random in each object's place, searched for the same names.
    """

    untouched: str
    spliced: str
    ordinary: Ordinary
    dose: float
    naming_dose: float
    objects: list[SteeredAnswer]
    choosing: list[SteeredAnswer]
    random: list[SteeredAnswer]

    @property
    def reported(self) -> list[SteeredAnswer]:
        """The answers of `objects` at the chosen dose."""
        return [row for row in self.objects if row.dose == self.dose]

    @property
    def controls(self) -> dict[str, list[SteeredAnswer]]:
        """The answers of each control, by the prefix of their metrics."""
        return {"control_": self.random}

    @property
    def metrics(self) -> Metrics:
        """The numbers at the chosen dose, with their intervals; named and changed out of 100 objects.

        Without reported objects there is only their number, 0.
        """
        if not self.reported:
            return {"objects_steered": 0}
        metrics = {
            "objects_steered": len(self.reported),
            "dose": self.dose,
            "dose_chosen_on": len({row.latent for row in self.choosing}),
        }
        for prefix, rows in {"": self.reported, **self.controls}.items():
            metrics |= answer_metrics(rows, prefix)
            metrics[f"{prefix}repeated"] = float(np.mean([row.repeated for row in rows]))
        unsteered = self.ordinary.control_fluency
        metrics |= bounds("unsteered_fluency", _mean("fluency", unsteered))
        metrics["unsteered_repeated"] = float(np.mean([read.repeated for read in self.ordinary.control]))
        metrics["reference_perplexity"] = self.ordinary.perplexity
        metrics["fluency_ratio"] = metrics["fluency"] / metrics["unsteered_fluency"]
        named = [row.fluency for row in self.reported if row.names_concept]
        metrics |= bounds("named_fluency", _mean("fluency", named)) if named else {}
        metrics["fluent_named_of_100"] = 100 * float(
            np.mean(
                [row.names_concept and row.fluency >= FLUENT * metrics["unsteered_fluency"] for row in self.reported]
            )
        )
        most = [row for row in self.objects if row.dose == self.naming_dose]
        metrics["naming_dose"] = self.naming_dose
        metrics |= _of_100("naming_dose_named", most, "names_concept")
        metrics |= bounds("naming_dose_fluency", _mean("fluency", [row.fluency for row in most]))
        return metrics


@dataclass(frozen=True)
class ObjectSteering(Steering):
    """Answers about one image while latents are clamped, one at a time.

    objects: latents named for an object, at the two chosen doses.
    choosing: other latents named for an object, at every dose.
    random: as many live latents at random, at `dose`; they are searched for the names of `objects`.
    random_at_value: the same random latents, each clamped to the value of the object latent in the same place.
    """

    random_at_value: list[SteeredAnswer]

    @property
    def controls(self) -> dict[str, list[SteeredAnswer]]:
        """The answers of both controls, by the prefix of their metrics."""
        return {"control_": self.random, "control_value_": self.random_at_value}

    @property
    def groups(self) -> dict[str, list[SteeredAnswer]]:
        """The groups of answers that a figure compares, by what is clamped."""
        return {
            "object latents": self.objects,
            "other object latents, which choose the dose": self.choosing,
            "random live latents": self.random,
        }

    def curves(self, what: str) -> dict[str, dict[float, Mean]]:
        """Return for each group and dose the mean over latents, with its interval.

        what: "names_concept", "changed", "fluency" or "harmonic".
        """
        curves = {}
        for name, rows in self.groups.items():
            values = {dose: [getattr(row, what) for row in rows if row.dose == dose] for dose in _doses(rows)}
            if values:
                curves[name] = {dose: _mean(what, row) for dose, row in values.items()}
        return curves


def _mean(what: str, values: Sequence[float]) -> Mean:
    """Return the mean with the interval that fits: Wilson's for a fraction of hits, else the bootstrap's."""
    if what in ("names_concept", "changed"):
        return Mean(*proportion(values)[:3])
    return mean_interval(values) if len(values) > 1 else Mean(*[float(values[0])] * 3)


def answer_metrics(rows: Sequence[SteeredAnswer], prefix: str = "", end: str = "") -> Metrics:
    """Return how many of 100 answers name their concept and changed, and the means of fluency and harmonic mean.

    rows: at least one; each number has its 99% interval.
    prefix, end: of the names.
    """
    metrics = {}
    for name, what in (("named", "names_concept"), ("changed", "changed")):
        metrics |= _of_100(f"{prefix}{name}", rows, what, end)
    for what in ("fluency", "harmonic"):
        metrics |= bounds(f"{prefix}{what}{end}", _mean(what, [getattr(row, what) for row in rows]))
    return metrics


def _of_100(name: str, rows: Sequence[SteeredAnswer], what: str, end: str = "") -> Metrics:
    """Return how many answers of 100 are hits, with the interval, as `<name>_of_100<end>`."""
    fraction = proportion([getattr(row, what) for row in rows])
    return {key: 100 * value for key, value in bounds(f"{name}_of_100{end}", fraction).items()}


def _doses(rows: Iterable[SteeredAnswer]) -> list[float]:
    return sorted({row.dose for row in rows})


def steer_by(
    way: Way,
    asked: SteeredQuestion,
    concepts: Mapping[int, str],
    doses: Sequence[float],
    *,
    reported: Sequence[int],
    choosing: Sequence[int],
    control: Sequence[int],
    curves: bool = True,
    chosen_on: Sequence[SteeredAnswer] = (),
) -> Steering:
    """Steer towards concepts in one way, at the dose that other concepts choose.

    concepts: number to name.
    reported: numbers of the concepts that are reported.
    choosing: numbers of other concepts, which choose the dose.
    control: a number in the place of each reported one; its answer is searched for the reported name.
    curves: report every dose, not only the chosen ones.
    chosen_on: steered answers about other concepts, to another question, which choose the dose if `choosing` is empty.

    Raises:
        ValueError: no concept chooses the dose.
    """
    (unsteered,) = way([Try(0, "", 0.0)])
    chosen_on = asked.steer(way, at_doses(concepts, choosing, doses), unsteered) if len(choosing) else [*chosen_on]
    dose, naming_dose = chosen_doses(chosen_on)
    shown = doses if curves else sorted({dose, naming_dose})
    objects = asked.steer(way, at_doses(concepts, reported, shown), unsteered)
    tries = [Try(other, concepts[number], dose) for other, number in zip(control, reported, strict=True)]
    random = asked.steer(way, tries, unsteered)
    return Steering(asked.untouched, unsteered, asked.ordinary, dose, naming_dose, objects, chosen_on, random)


def steer_objects(
    place: SAEInPlace,
    cache: LatentCache,
    concepts: Mapping[int, str],
    question: str,
    image: Image.Image,
    doses: Sequence[float],
    *,
    others: Sequence[Image.Image],
    count: int = 100,
    choosing: int = 50,
    scope: Scope = Scope(),  # noqa: B008
    keep_error: bool = False,
    batch: int = 16,
    max_new_tokens: int = 24,
    seed: int = 0,
) -> ObjectSteering:
    """Clamp latents named for an object, one at a time, while the model is asked about an image (Appendix D).

    Up to `choosing` latents are clamped at every dose and choose it; up to `count` others, at random, are reported at
    the chosen doses. If there are too few, a third of them chooses; with fewer than three nothing is clamped. There are
    two controls with as many live latents at random: at that dose, and at the values of the reported latents.

    concepts: latent to the object that it is named for.
    others: images whose unsteered answers are the reference of fluency and its control.
    scope: the tokens at which a latent is clamped.
    keep_error: as for `steered`.
    batch: clamps that run side by side.
    seed: of the choice of latents.
    """
    rng, asked = np.random.default_rng(seed), SteeredQuestion(place.lmm, question, image, others, batch, max_new_tokens)
    if len(concepts) < FEW:
        return ObjectSteering(asked.untouched, "", asked.ordinary, 0.0, 0.0, [], [], [], [])
    count = min(count, len(concepts) - min(choosing, len(concepts) // 3))
    order = rng.permutation(sorted(concepts)).tolist()
    reported, choosers = order[:count], order[count : count + choosing]
    live = np.setdiff1d(np.flatnonzero(np.asarray(cache.live)), reported)
    control = rng.choice(live, len(reported), replace=len(live) < len(reported)).tolist()
    clamp = clamping(place, cache, asked, scope, keep_error=keep_error)
    numbers = dict(reported=reported, choosing=choosers, control=control)
    found = steer_by(clamp, asked, concepts, doses, **numbers, curves=False)
    tries = [
        Try(other, concepts[latent], found.dose * float(cache.max[latent] / cache.max[other]))
        for other, latent in zip(control, reported, strict=True)
    ]
    return ObjectSteering(**vars(found), random_at_value=asked.steer(clamp, tries, found.spliced))


def clamping(
    place: SAEInPlace, cache: LatentCache, asked: SteeredQuestion, scope: Scope, *, keep_error: bool = False
) -> Way:
    """Return the way that clamps a latent to a dose in units of its maximum.

    cache: gives each latent's maximum over the cached images.
    scope: the tokens at which the latent is clamped.
    keep_error: as for `steered`.
    """

    def clamp(tries: Sequence[Try]) -> list[str]:
        settings = [at_dose(cache, each.number, each.dose) for each in tries]
        how = dict(keep_error=keep_error, batch=asked.batch, max_new_tokens=asked.max_new_tokens)
        return answers(place, asked.text, asked.image, settings, scope, **how)

    return clamp


def clamp_values(steering: ObjectSteering, cache: LatentCache) -> Metrics:
    """Return the mean value that object latents and random latents are clamped to at the chosen dose.

    A row of `W_dec` has norm 1, so the clamp of a silent latent adds a vector of this norm to the reconstruction.
    """
    if not steering.reported:
        return {}
    return {
        name: float(np.mean([row.dose * float(cache.max[row.latent]) for row in rows]))
        for name, rows in (("clamp_value", steering.reported), ("control_clamp_value", steering.random))
    }
