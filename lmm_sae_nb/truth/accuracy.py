"""Whether explanations and refusals are right, and what was missed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.interpret.explainers import KINDS, REFUSES, Outcome, Refiner
from lmm_sae_nb.support.intervals import bounds, proportion
from lmm_sae_nb.truth.common_concept import best_common_concept
from lmm_sae_nb.truth.label_maps import LabelMaps
from lmm_sae_nb.truth.responses import RESPONSES, common_concept, response_of

Rows = Mapping[int, dict]  # of explanations.json: latent to outcome, concept, kind, answer, confidence


def add_truth(rows: Rows, exemplars: Mapping[int, Sequence[Exemplar]], truth: LabelMaps | None) -> dict[int, dict]:
    """Add to each row what the latent's exemplars really have in common, and what the latent responds to.

    `true_kind` and `true_concept` are None, and `true_iou` is 0, if they have nothing in common. `all_common` lists
    every concept that they have in common, such as the colour of a thing. `responds_to` is one of `RESPONSES`.

    rows: explanations by latent.
    exemplars: by latent.
    truth: of the images that were cached; None, where there is no ground truth, adds nothing.
    """
    if truth is None:
        return dict(rows)
    result = {}
    for latent, row in rows.items():
        images = exemplars[latent]
        common = common_concept(truth, images)
        result[latent] = row | {
            "true_kind": common and common.kind, "true_concept": common and common.concept,
            "true_iou": common.iou if common else 0.0,
            "all_common": truth.in_common(images) if images else [],
            "responds_to": response_of(truth, images),
        }  # fmt: skip
    return result


def outcome_metrics(rows: Rows, least_confidence: float = 0.0) -> dict[str, float]:
    """Count the latents that were asked about and each outcome, with the fraction explained and its interval.

    refused_low_confidence: of the refused, those with a name, but a confidence below the limit. The explainer says of
    the other refused latents that it cannot explain them.

    least_confidence: the limit; 0 leaves this count out.
    """
    outcomes = Counter(row["outcome"] for row in rows.values())
    counts = {"asked": len(rows)} | {outcome.value: outcomes[outcome.value] for outcome in Outcome}
    if least_confidence > 0:
        counts["refused_low_confidence"] = sum(
            row["outcome"] == Outcome.REFUSED.value and row["confidence"] is not None
            and row["confidence"] < least_confidence and not REFUSES.search(row["answer"])
            for row in rows.values()
        )  # fmt: skip
    return counts | fraction_metrics("explained_fraction", [_is_explained(row) for row in rows.values()])


def accuracy_metrics(rows: Rows, seed: int = 0) -> dict[str, float]:
    """Measure how many explanations are right, how many refusals, and what the other latents respond to.

    concept_accuracy: of the explained, those whose concept is the true one.
    concept_accuracy_shuffled: the same with another name, the concept of another latent (`other_names`).
    concept_accuracy_guessed: the same with the name of a random latent of the same kind, which may be the same name.
    concept_common: of the explained, those whose concept is one of all that the exemplars have in common.
    concept_common_shuffled: the same with another name.
    refusal_precision: of the refused, those whose exemplars have nothing in common; details count as nothing.
    answerable_fraction: of all, those whose exemplars have something in common.
    unexplained_*: counts of the latents that were not explained, by `RESPONSES`.
    A fraction of no latents is left out, and everything where there is no ground truth.

    rows: as `add_truth` returns them.
    seed: of the draw of other names.
    """
    if not _have_truth(rows):
        return {}
    explained = {latent: row for latent, row in rows.items() if _is_explained(row)}
    others, guesses = _other_names(rows, seed), _other_names(rows, seed, different=False)
    refused = [row["true_concept"] is None for row in rows.values() if row["outcome"] == "refused"]
    responses = Counter(row["responds_to"] for row in rows.values() if not _is_explained(row))
    return (
        fraction_metrics("concept_accuracy", [row["concept"] == row["true_concept"] for row in explained.values()])
        | fraction_metrics("concept_accuracy_shuffled", [name == rows[n]["true_concept"] for n, name in others.items()])
        | fraction_metrics("concept_accuracy_guessed", [name == rows[n]["true_concept"] for n, name in guesses.items()])
        | fraction_metrics("concept_common", [row["concept"] in row["all_common"] for row in explained.values()])
        | fraction_metrics("concept_common_shuffled", [name in rows[n]["all_common"] for n, name in others.items()])
        | fraction_metrics("refusal_precision", refused)
        | fraction_metrics("answerable_fraction", [row["true_concept"] is not None for row in rows.values()])
        | {f"unexplained_{response.replace(' ', '_')}": responses[response] for response in RESPONSES}
    )


def unseen_metrics(rows: Rows, in_training: Collection[int], seed: int = 0) -> dict[str, float]:
    """Measure the same for the latents alone that the explainer was not trained on.

    Other names and guesses are those of `accuracy_metrics`, drawn from all latents.

    There is nothing to measure if it was trained on none of them, or without ground truth.

    rows: as `add_truth` returns them.
    in_training: the latents that the explainer was trained on (`latents_in_training`).
    seed: as in `accuracy_metrics`.
    """
    unseen = {latent: row for latent, row in rows.items() if latent not in in_training}
    if len(unseen) == len(rows) or not _have_truth(rows):
        return {}
    explained = [row for row in unseen.values() if _is_explained(row)]
    chances = {
        f"concept_accuracy_{name}_unseen": [
            other == rows[n]["true_concept"] for n, other in _other_names(rows, seed, different).items() if n in unseen
        ]
        for name, different in (("shuffled", True), ("guessed", False))
    }
    return (
        {"asked_unseen": len(unseen), "explained_unseen": len(explained)}
        | fraction_metrics("explained_fraction_unseen", [_is_explained(row) for row in unseen.values()])
        | fraction_metrics("concept_accuracy_unseen", [row["concept"] == row["true_concept"] for row in explained])
        | {key: value for name, hits in chances.items() for key, value in fraction_metrics(name, hits).items()}
    )


def concepts_by_chance(
    exemplars: Mapping[int, Sequence[Exemplar]], truth: LabelMaps, images: int, seed: int = 0
) -> dict[int, str | None]:
    """Return for each latent the true concept that the rule finds if its masks lie on random other images, or None.

    The rule of `common_concept` should find nothing there: how often it does says how easily it is met.

    exemplars: by latent.
    truth: of the images that were cached.
    images: how many of these there are.
    seed: of the draw of images.
    """
    rng, result = np.random.default_rng(seed), {}
    for latent in exemplars:
        shown = exemplars[latent]
        own = [each.image_index for each in shown]
        drawn = [index for index in rng.permutation(images)[: 2 * len(own)] if index not in own][: len(own)]
        found = None
        if drawn:
            visible = np.array([each.visible.ravel() for each in shown[: len(drawn)]], bool)
            coverage = np.array([truth.coverage(int(index), shown[0].visible.shape) for index in drawn])
            found = best_common_concept(visible, coverage, truth.names)
        result[latent] = found and found.concept
    return result


def chance_metrics(by_chance: Mapping[int, str | None]) -> dict[str, float]:
    """Return answerable_fraction_random, the fraction of latents of `concepts_by_chance` with a concept."""
    return fraction_metrics("answerable_fraction_random", [name is not None for name in by_chance.values()])


def accuracy_by_confidence(rows: Rows, refine: Refiner) -> list[dict[str, float]]:
    """Return what every limit of confidence gives: least_confidence, explained_fraction, concept_accuracy.

    The highest limit comes first. Answers are refined anew, so that those below today's limit count as well.

    rows: as `add_truth` returns them.
    refine: the refiner that was used.
    """
    with_confidence = [row for row in rows.values() if row["confidence"] is not None]
    concepts = refine([row["answer"] for row in with_confidence])
    ranked = sorted(
        (
            (row["confidence"], concept.text == row["true_concept"])
            for row, concept in zip(with_confidence, concepts, strict=True)
            if concept.text
        ),
        reverse=True,
    )
    right = np.cumsum([hit for _, hit in ranked])
    return [
        {"least_confidence": limit, "explained_fraction": n / len(rows), "concept_accuracy": float(right[n - 1]) / n}
        for n, (limit, _) in enumerate(ranked, 1)
    ]


def kinds_given(rows: Rows) -> dict[str, dict[str, int]]:
    """Count the kinds that explanations gave, and the other outcomes, for each kind of true concept.

    Rows and columns have the same kinds in the same order, those of Table 1 first. So right kinds lie on the diagonal,
    and so do right refusals: behind the kinds comes the row "nothing in common", and the column "refused".
    """
    nothing = "nothing in common"
    pairs = Counter(
        (row["true_kind"] or nothing, (row["kind"] or "no kind") if _is_explained(row) else row["outcome"])
        for row in rows.values()
    )
    outcomes = [outcome.value for outcome in Outcome if outcome is not Outcome.EXPLAINED]
    kinds = {name for pair in pairs for name in pair} - {nothing, "no kind", *outcomes}
    ordered = [kind for kind in KINDS if kind in kinds] + sorted(kinds - {*KINDS})
    columns = [*ordered, *outcomes, "no kind"]
    given = [name for name in columns if name in kinds or any(column == name for _, column in pairs)]
    return {kind: {column: pairs[kind, column] for column in given} for kind in (*ordered, nothing)}


def other_names(
    explained: Mapping[int, tuple[str, str | None]], seed: int = 0, *, different: bool = True
) -> dict[int, str | None]:
    """Return for each latent a concept of another latent, drawn at random; None if there is no such latent.

    It is of the same kind, if there is one: kinds with few concepts are guessed more easily, and some score higher.

    explained: latent to its concept and kind; their order decides the draws.
    seed: of the draws.
    different: draw only a concept that is not the latent's own. Without it a frequent concept is drawn often, so it can
        be right by chance.
    """
    rng, result = np.random.default_rng(seed), {}
    for latent, (concept, kind) in explained.items():
        others = [row for n, row in explained.items() if (row[0] != concept if different else n != latent)]
        pool = [row for row in others if row[1] == kind] or others
        result[latent] = pool[rng.integers(len(pool))][0] if pool else None
    return result


def _other_names(rows: Rows, seed: int, different: bool = True) -> dict[int, str]:
    """Return `other_names` of the explained latents, in the order in which they are scored; without those of None."""
    named = {latent: (row["concept"], row["kind"]) for latent, row in rows.items() if _is_explained(row)}
    ordered = dict(sorted(named.items(), key=lambda item: (item[1][0], item[1][1] or "", item[0])))
    return {n: name for n, name in other_names(ordered, seed, different=different).items() if name is not None}


def fraction_metrics(name: str, hits: Sequence[bool]) -> dict[str, float]:
    """Return a fraction with its 99% interval as metrics; nothing if there are no cases."""
    return bounds(name, proportion(hits)) if hits else {}


def _have_truth(rows: Rows) -> bool:
    return all("true_concept" in row for row in rows.values())


def _is_explained(row: Mapping) -> bool:
    return row["outcome"] == Outcome.EXPLAINED.value
