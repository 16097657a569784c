"""Whether explanations and refusals are right, and what was missed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.interpret.explainers import KINDS, Outcome, Refiner
from lmm_sae_nb.support.intervals import bounds, proportion
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


def outcome_metrics(rows: Rows) -> dict[str, float]:
    """Count the latents that were asked about and each outcome, with the fraction explained and its interval."""
    outcomes = Counter(row["outcome"] for row in rows.values())
    counts = {"asked": len(rows)} | {outcome.value: outcomes[outcome.value] for outcome in Outcome}
    return counts | fraction_metrics("explained_fraction", [_is_explained(row) for row in rows.values()])


def accuracy_metrics(rows: Rows) -> dict[str, float]:
    """Measure how many explanations are right, how many refusals, and what the other latents respond to.

    concept_accuracy: of the explained, those whose concept is the true one.
    concept_common: of the explained, those whose concept is one of all that the exemplars have in common.
    refusal_precision: of the refused, those whose exemplars have nothing in common.
    answerable_fraction: of all, those whose exemplars have something in common.
    unexplained_*: counts of the latents that were not explained, by `RESPONSES`.
    A fraction of no latents is left out, and everything where there is no ground truth.

    rows: as `add_truth` returns them.
    """
    if not _have_truth(rows):
        return {}
    explained = [row for row in rows.values() if _is_explained(row)]
    refused = [row["true_concept"] is None for row in rows.values() if row["outcome"] == "refused"]
    responses = Counter(row["responds_to"] for row in rows.values() if not _is_explained(row))
    return (
        fraction_metrics("concept_accuracy", [row["concept"] == row["true_concept"] for row in explained])
        | fraction_metrics("concept_common", [row["concept"] in row["all_common"] for row in explained])
        | fraction_metrics("refusal_precision", refused)
        | fraction_metrics("answerable_fraction", [row["true_concept"] is not None for row in rows.values()])
        | {f"unexplained_{response.replace(' ', '_')}": responses[response] for response in RESPONSES}
    )


def unseen_metrics(rows: Rows, in_training: Collection[int]) -> dict[str, float]:
    """Measure the same for the latents alone that the explainer was not trained on.

    There is nothing to measure if it was trained on none of them, or without ground truth.

    rows: as `add_truth` returns them.
    in_training: the latents that the explainer was trained on (`latents_in_training`).
    """
    unseen = {latent: row for latent, row in rows.items() if latent not in in_training}
    if len(unseen) == len(rows) or not _have_truth(rows):
        return {}
    explained = [row for row in unseen.values() if _is_explained(row)]
    return (
        {"asked_unseen": len(unseen)}
        | fraction_metrics("explained_fraction_unseen", [_is_explained(row) for row in unseen.values()])
        | fraction_metrics("concept_accuracy_unseen", [row["concept"] == row["true_concept"] for row in explained])
    )


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
    """Count the kinds that explanations gave, and the other outcomes, for each kind of true concept, or "nothing".

    Kinds stand in the order of Table 1, then further ones; every row has the same columns in the same order.
    """
    pairs = Counter(
        (row["true_kind"] or "nothing", (row["kind"] or "no kind") if _is_explained(row) else row["outcome"])
        for row in rows.values()
    )
    last = ("nothing", "no kind", *(outcome.value for outcome in Outcome))
    names = {name for pair in pairs for name in pair}
    order = [*KINDS, *sorted(names - {*KINDS, *last}), *last]
    true, given = ([name for name in order if any(pair[n] == name for pair in pairs)] for n in (0, 1))
    return {kind: {column: pairs[kind, column] for column in given} for kind in true}


def fraction_metrics(name: str, hits: Sequence[bool]) -> dict[str, float]:
    """Return a fraction with its 99 % interval as metrics; nothing if there are no cases."""
    return bounds(name, proportion(hits)) if hits else {}


def _have_truth(rows: Rows) -> bool:
    return all("true_concept" in row for row in rows.values())


def _is_explained(row: Mapping) -> bool:
    return row["outcome"] == Outcome.EXPLAINED.value
