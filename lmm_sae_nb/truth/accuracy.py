"""Whether explanations are true, and what was missed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.interpret.explainers import Outcome, Refiner
from lmm_sae_nb.support.intervals import bounds, proportion
from lmm_sae_nb.truth.common_concept import common
from lmm_sae_nb.truth.label_maps import PatchTruth
from lmm_sae_nb.truth.responses import RESPONSES, _patches, responds_to, shown_by


def with_truth(rows: Mapping[str, dict], shown: Mapping[int, Sequence[Exemplar]], truth: PatchTruth) -> dict[str, dict]:
    """Rows of explanations by latent, each with what its exemplars really have in common and what it responds to.

    true_kind and true_concept are None, and true_iou is 0, where they have nothing in common; all_common: whatever
    else they have in common, such as the colour of a thing.
    """
    told = {}
    for latent, row in rows.items():
        found = shown[int(latent)]
        best = shown_by(truth, found)
        shared = np.flatnonzero(common(*_patches(truth, found))) if found else ()
        told[latent] = row | {
            "true_kind": best and best.kind, "true_concept": best and best.concept,
            "true_iou": best.iou if best else 0.0,
            "all_common": [truth.names[n][1] for n in shared],
            "responds_to": responds_to(truth, found),
        }  # fmt: skip
    return told


def counted(rows: Mapping[str, dict]) -> dict[str, float]:
    """How many latents were asked about, how many came to each outcome, and the share explained with its interval."""
    outcomes = Counter(row["outcome"] for row in rows.values())
    found = {"asked": len(rows)} | {outcome.value: outcomes[outcome.value] for outcome in Outcome}
    return found | _share("explained_fraction", [row["outcome"] == "explained" for row in rows.values()])


def judged(rows: Mapping[str, dict]) -> dict[str, float]:
    """Of rows with their truth: how many explanations are right, how many refusals, and what the rest respond to.

    concept_accuracy: of the explained, those whose concept is the true one; concept_common: those whose concept is at
    least one of all that they have in common; refusal_precision: of the refused, those that have nothing in common;
    answerable_fraction: of all, those that have something; unexplained_*: counts by `RESPONSES`.
    A share of nothing is left out.
    """
    explained = [row for row in rows.values() if row["outcome"] == "explained"]
    refused = [row["true_concept"] is None for row in rows.values() if row["outcome"] == "refused"]
    rest = Counter(row["responds_to"] for row in rows.values() if row["outcome"] != "explained")
    return (
        _share("concept_accuracy", [row["concept"] == row["true_concept"] for row in explained])
        | _share("concept_common", [row["concept"] in row["all_common"] for row in explained])
        | _share("refusal_precision", refused)
        | _share("answerable_fraction", [row["true_concept"] is not None for row in rows.values()])
        | {f"unexplained_{what.replace(' ', '_')}": rest[what] for what in RESPONSES}
    )


def untaught(rows: Mapping[str, dict], taught: Collection[int]) -> dict[str, float]:
    """Of rows with their truth those of latents that the explainer did not learn from: asked_untaught,
    explained_fraction_untaught, concept_accuracy_untaught; nothing if it learned from none of them."""
    rest = {latent: row for latent, row in rows.items() if int(latent) not in taught}
    if len(rest) == len(rows):
        return {}
    explained = [row for row in rest.values() if row["outcome"] == "explained"]
    return (
        {"asked_untaught": len(rest)}
        | _share("explained_fraction_untaught", [row["outcome"] == "explained" for row in rest.values()])
        | _share("concept_accuracy_untaught", [row["concept"] == row["true_concept"] for row in explained])
    )


def coverage(rows: Mapping[str, dict], refine: Refiner) -> list[dict[str, float]]:
    """What every limit of sureness gives: least_sure, explained_fraction and concept_accuracy, highest limit first.

    rows: of `with_truth`, their answers refined anew, so that those whom a limit has refused count as well.
    """
    told = [row for row in rows.values() if row["sureness"] is not None]
    said = zip(told, refine([row["answer"] for row in told]), strict=True)
    ranked = sorted(((row["sureness"], its.text == row["true_concept"]) for row, its in said if its.text), reverse=True)
    right = np.cumsum([hit for _, hit in ranked])
    return [
        {"least_sure": sureness, "explained_fraction": n / len(rows), "concept_accuracy": float(right[n - 1]) / n}
        for n, (sureness, _) in enumerate(ranked, 1)
    ]


def _share(name: str, values: Sequence[bool]) -> dict[str, float]:
    """A share with its 99 % interval; of nothing there is none."""
    return bounds(name, proportion(values)) if values else {}


def confusion(rows: Mapping[str, dict]) -> dict[str, dict[str, int]]:
    """True kind of concept, or `nothing`, to how often it was given each kind, or was not explained."""
    table: dict[str, Counter] = {}
    for row in rows.values():
        given = row["kind"] or "no kind" if row["outcome"] == "explained" else row["outcome"]
        table.setdefault(row["true_kind"] or "nothing", Counter())[given] += 1
    return {kind: dict(given) for kind, given in table.items()}
