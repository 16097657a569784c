"""Steer towards concepts of every kind, each kind with a question of its own.

Notebook 06 steers towards objects. Here the same is done for scenes, materials, words and other kinds, with fewer
latents each. An answer names a concept if it has the concept's word, as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lmm_sae_nb.compare.saes import CachedSAE
from lmm_sae_nb.controls.chain import FEW, PartResult
from lmm_sae_nb.controls.direction_steering import WAYS, compare_ways
from lmm_sae_nb.controls.directions import LabelledStates
from lmm_sae_nb.interpret.explainers import mentions
from lmm_sae_nb.steer.objects import SteeredAnswer, SteeredQuestion, Steering, Try, answer_metrics, clamping, steer_by
from lmm_sae_nb.steer.steering import Scope
from lmm_sae_nb.support.intervals import bounds, mean_interval
from lmm_sae_nb.support.stages import Metrics
from lmm_sae_nb.truth.detectors import choose_detectors
from lmm_sae_nb.truth.label_maps import LabelMaps

DOSES = (4, 16, 64)
# questions that say the concept, before, in or behind the question of its kind
FORMS = ("Imagine that you see {{}}. {question}", "There is {{}} in this image. {question}", "{question} {{}}.")
NO_QUESTION = "the model has learned no question that such a concept answers"


# ---- latents of an SAE ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Latents of one kind, in two parts that share no concept.

    reported: latents whose answers are reported.
    choosing: latents of other concepts, which choose the dose.
    """

    reported: list[int]
    choosing: list[int]


def split_by_concept(latents: Mapping[int, str], count: int, choosing: int, seed: int = 0) -> Split:
    """Divide latents so that no concept both chooses the dose and is reported.

    A third of the concepts chooses. With fewer than three concepts, none does.

    latents: latent to its concept.
    count, choosing: at most so many latents are reported, and choose.
    seed: of the order of concepts and latents.
    """
    rng = np.random.default_rng(seed)
    concepts = rng.permutation(sorted(set(latents.values()))).tolist()
    first, order = set(concepts[: len(concepts) // 3]), rng.permutation(sorted(latents)).tolist()
    return Split(
        [n for n in order if latents[n] not in first][:count], [n for n in order if latents[n] in first][:choosing]
    )


def steer_kinds(
    study: CachedSAE, rows: Mapping[int, Mapping], asked: Mapping[str, SteeredQuestion | None], *,
    doses: Sequence[float] = DOSES, count: int = 12, choosing: int = 6, scope: Scope = Scope(("tiles", "newline")),  # noqa: B008
    seed: int = 0,
) -> PartResult:  # fmt: skip
    """Clamp latents of each kind, one at a time, and look for their concepts in the answers to the kind's question.

    Other concepts of the kind choose its dose. A kind of fewer than three concepts takes the dose that the concepts of
    objects choose. Concepts that the answer names without a clamp are left out. As a control, random live latents are
    clamped at the same dose, and searched for the same names.

    The metrics of a kind are `latents_KIND` (that have a name of this kind), `steered_KIND`, `concepts_KIND`,
    `dose_KIND`, `dose_chosen_on_KIND` (latents; 0 for the dose of objects), those of `answer_metrics`,
    `control_named_of_100_KIND`, `control_fluency_KIND` and `unsteered_fluency_KIND`. Without a kind in their name they
    are those of all kinds together.

    rows: of `chain.interpret`.
    asked: kind to its question; None if there is none. The kind "object" should be among them.
    count, choosing: latents of a kind that are reported, and of other concepts that choose the dose, at most.
    scope: the tokens at which a latent is clamped.
    seed: of the choice of latents.
    """
    metrics, why, found = {}, [], {}
    for kind in sorted(asked, key=lambda kind: kind != "object"):  # objects first, for their dose
        named = {n: row["concept"] for n, row in rows.items() if row["concept"] and row["kind"] == kind}
        metrics[f"latents_{kind}"] = len(named)
        chosen_on = found["object"].choosing if "object" in found else []
        try:
            steering, own = _steer_kind(study, named, asked[kind], doses, chosen_on, count, choosing, scope, seed)
        except ValueError as error:
            why.append(f"steering by kind, {kind}: {error}")
            metrics[f"steered_{kind}"] = 0
            continue
        found[kind] = steering
        if not own:
            why.append(f"steering by kind, {kind}: it has the dose of objects, as its latents name too few concepts")
        metrics |= _metrics_of_kind(kind, steering, own=own)
    metrics["steered"] = sum(len(each.reported) for each in found.values())
    if found:
        metrics |= answer_metrics([row for each in found.values() for row in each.reported])
        metrics |= _named_and_fluent([row for each in found.values() for row in each.random], "control_")
    return PartResult(metrics, why)


def _steer_kind(
    study: CachedSAE, named: Mapping[int, str], asked: SteeredQuestion | None, doses: Sequence[float],
    chosen_on: list[SteeredAnswer], count: int, choosing: int, scope: Scope, seed: int,
) -> tuple[Steering, bool]:  # fmt: skip
    """Steer towards the concepts of one kind, and say whether they chose the dose; ValueError says what is missing."""
    if asked is None:
        raise ValueError(NO_QUESTION)
    way = clamping(study.place, study.cache, asked, scope)
    (plain,) = way([Try(0, "", 0.0)])
    new = {n: concept for n, concept in named.items() if not mentions(plain, concept)}
    said = (
        f", not counting {len(named) - len(new)} whose name the unclamped answer has" if len(new) < len(named) else ""
    )
    if len(new) < FEW:
        raise ValueError(f"{len(new)} latents have such a name{said}; it takes {FEW}")
    split = split_by_concept(new, count, choosing, seed)
    if not (split.choosing or chosen_on):
        raise ValueError(f"latents name {len(set(new.values()))} concepts, and no object chooses the dose")
    live = np.setdiff1d(np.flatnonzero(np.asarray(study.cache.live)), sorted(named))
    if not len(live):
        raise ValueError("every live latent has such a name, so there is no control")
    rng, n = np.random.default_rng(seed), len(split.reported)
    found = steer_by(
        way, asked, new, doses, reported=split.reported, choosing=split.choosing, curves=False, chosen_on=chosen_on,
        control=rng.choice(live, n, replace=len(live) < n).tolist(),
    )  # fmt: skip
    return found, bool(split.choosing)


def _metrics_of_kind(kind: str, found: Steering, *, own: bool) -> Metrics:
    """The metrics of one kind; `own`: concepts of the kind chose its dose."""
    return {
        f"steered_{kind}": len(found.reported),
        f"concepts_{kind}": len({row.concept for row in found.reported}),
        f"dose_{kind}": found.dose,
        f"dose_chosen_on_{kind}": len({row.latent for row in found.choosing}) if own else 0,
        **answer_metrics(found.reported, end=f"_{kind}"),
        **_named_and_fluent(found.random, "control_", f"_{kind}"),
        **bounds(f"unsteered_fluency_{kind}", mean_interval(found.ordinary.control_fluency)),
    }


def _named_and_fluent(rows: Sequence[SteeredAnswer], prefix: str = "", end: str = "") -> Metrics:
    """The numbers of `answer_metrics` without the changed answers and the harmonic mean."""
    numbers = answer_metrics(rows, prefix, end)
    return {name: value for name, value in numbers.items() if name.startswith((f"{prefix}named", f"{prefix}fluency"))}


# ---- methods that are no SAEs ---------------------------------------------------------------------------------------


def kind_baselines(
    study: CachedSAE, names: Mapping[str, Mapping[int, str]], images: Sequence[Image.Image], truth: LabelMaps,
    asked: Mapping[str, SteeredQuestion | None], *, doses: Sequence[float] = DOSES, count: int = 12, choosing: int = 6,
    fitted: int = 1_000, seed: int = 0, **settings,
) -> PartResult:  # fmt: skip
    """Steer towards concepts of each kind by latents, directions and prompts, as `compare_ways` does for objects.

    For each of `WAYS` the metrics are `steer_WAY_named_of_100_KIND`, `steer_WAY_fluency_KIND`,
    `steer_WAY_control_named_of_100_KIND`, `steer_WAY_dose_KIND`, and `steer_WAY_named_above_latent_KIND`, the mean
    difference from the latent named for the same concept. Without a kind in their name they are those of all kinds
    together. `steer_concepts_KIND` is how many concepts are reported.

    names: kind to its named latents, with their concepts.
    images: that were cached.
    truth: their label maps.
    asked: kind to its question; None if there is none.
    count, choosing: concepts of a kind that are reported, and others that choose doses and forms, at most.
    fitted: directions are fitted on the first so many images.
    seed: of every choice.
    settings: of `compare_ways`.
    """
    place, metrics, why, found = study.place, {}, [], {}
    cached = LabelledStates.read(place.lmm, place.layer, [images[n] for n in range(min(fitted, len(images)))], truth)
    detectors = choose_detectors(study.cache, truth, best=1)
    for kind, question in asked.items():
        try:
            if question is None:
                raise ValueError(NO_QUESTION)
            forms = [form.format(question=question.text) for form in FORMS]
            found[kind] = compare_ways(
                study, names.get(kind, {}), truth, cached, question, kind=kind, detectors=detectors, doses=doses,
                forms=forms, count=count, choosing=choosing, seed=seed, **settings,
            )  # fmt: skip
        except ValueError as error:
            why.append(f"steering by kind, {kind}: {error}")
    for kind, each in found.items():
        metrics[f"steer_concepts_{kind}"] = len(each.ways["latent"].reported)
        for way in WAYS:
            metrics[f"steer_{way}_dose_{kind}"] = each.ways[way].dose
            metrics |= _way_metrics(way, [each.ways], f"_{kind}")
    metrics["steer_concepts"] = sum(len(each.ways["latent"].reported) for each in found.values())
    for way in WAYS if found else ():
        metrics |= _way_metrics(way, [each.ways for each in found.values()])
    return PartResult(metrics, why)


def _way_metrics(way: str, kinds: Sequence[Mapping[str, Steering]], end: str = "") -> Metrics:
    """The metrics of one way over one or several kinds; `kinds` holds all ways of each."""
    rows = [row for ways in kinds for row in ways[way].reported]
    random = [row for ways in kinds for row in ways[way].random]
    metrics = _named_and_fluent(rows, f"steer_{way}_", end) | _named_and_fluent(random, f"steer_{way}_control_", end)
    if way != "latent":
        latent = [row for ways in kinds for row in ways["latent"].reported]
        above = np.subtract([float(row.names_concept) for row in rows], [float(row.names_concept) for row in latent])
        metrics |= bounds(f"steer_{way}_named_above_latent{end}", mean_interval(above))
    return metrics
