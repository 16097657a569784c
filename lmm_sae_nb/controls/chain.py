"""The metrics of notebooks 01 to 07 for one SAE, part by part, with fewer latents, so that many SAEs can be compared.

Each part calls what the notebook of the same name calls. A part that has too little to measure returns what it has,
and says why. An SAE of a model with new weights (`dictionaries.untrained`) is measured in that model. There fidelity,
interpretation and scores say what can be had without learning; steering and attribution only say what a model without
knowledge does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from lmm_sae_nb.compare.depth import rank_agreement
from lmm_sae_nb.compare.saes import CachedSAE
from lmm_sae_nb.interpret.explain import as_rows
from lmm_sae_nb.interpret.explainers import Outcome
from lmm_sae_nb.interpret.open import Interpreter
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.score.latents import explained_latents, score_latents
from lmm_sae_nb.score.masks import FindConcept
from lmm_sae_nb.score.similarity import AllPairs
from lmm_sae_nb.score.tables import kind_tables, score_metrics
from lmm_sae_nb.steer.objects import FEW, steer_objects
from lmm_sae_nb.steer.steering import Scope
from lmm_sae_nb.support.intervals import bounds, mean_interval
from lmm_sae_nb.support.stages import Metrics
from lmm_sae_nb.train.evaluate import evaluate_sae
from lmm_sae_nb.truth.accuracy import accuracy_metrics, add_truth, fraction_metrics, other_names, outcome_metrics
from lmm_sae_nb.truth.detectors import detect_concepts, recall_metrics
from lmm_sae_nb.truth.label_maps import LabelMaps


@dataclass(frozen=True)
class PartResult:
    """What a part measured for one SAE.

    metrics: name to number.
    why: a sentence for each thing that could not be measured.
    rows: latent to its explanation, if the part explains latents.
    """

    metrics: Metrics
    why: list[str] = field(default_factory=list)
    rows: dict[int, dict] = field(default_factory=dict)


def fidelity(study: CachedSAE, samples: Sequence[Mapping], *, kinds: Sequence[str]) -> PartResult:
    """Measure what the SAE leaves unexplained and how much of the model's skill it keeps (notebooks 01 and 02).

    The metrics are those of `evaluate_sae`, and `live_latents` and `live_fraction`: latents that the cached images
    excite. `loss_recovered` is left out if zeros in the layer's place do not harm the model.

    samples: held-out rows with image, question and answer.
    kinds: of the tokens that count.
    """
    metrics, why = evaluate_sae(study.place, samples, kinds=kinds), []
    if metrics["loss_zero_low"] <= metrics["loss_clean_high"]:
        metrics = {name: value for name, value in metrics.items() if not name.startswith("loss_recovered")}
        why.append("loss recovered: zeros in the layer's place do not harm this model, so there is nothing to recover")
    live = study.cache.live
    return PartResult(metrics | {"live_latents": int(live.sum()), "live_fraction": float(live.float().mean())}, why)


def interpret(
    study: CachedSAE, images: Sequence[Image.Image], interpreter: Interpreter, truth: LabelMaps | None, *,
    latents: int = 300, n_top: int = 5, threshold: float = 0.25, dim: float = 0.0, least_confidence: float = 0.0,
    seed: int = 0,
) -> PartResult:  # fmt: skip
    """Let the explainer name random live latents, and compare with the truth (notebook 03).

    Beside the metrics of all latents stand those of each kind of name: `explained_KIND`, `concept_accuracy_KIND` and
    `concept_accuracy_guessed_KIND`.

    images: that were cached.
    truth: their label maps; None if there are none.
    latents: how many, all live ones if there are fewer.
    n_top, threshold, dim: of the exemplars.
    least_confidence: the interpreter's limit, which counts the refused latents by cause.
    seed: of the choice.
    """
    chosen = sorted(study.live_latents(seed)[:latents])
    if not chosen:
        return PartResult({"asked": 0}, ["names: no image excites a latent"])
    exemplars = study.exemplars(images, n_top=n_top, threshold=threshold, dim=dim).only(chosen)
    rows = add_truth(as_rows(interpreter.explain(exemplars)), exemplars, truth)
    metrics = outcome_metrics(rows, least_confidence) | accuracy_metrics(rows, seed) | names_by_kind(rows, seed)
    why = [] if metrics["explained"] else ["accuracy of names: no latent was explained"]
    return PartResult(metrics, why, rows)


def names_by_kind(rows: Mapping[int, Mapping], seed: int = 0) -> Metrics:
    """Count the explained latents of each kind of name, and measure how many names are right, and of guessed names.

    rows: as `add_truth` returns them; without a ground truth there are only the counts.
    seed: of the guesses.
    """
    named = {n: (row["concept"], row["kind"]) for n, row in rows.items() if row["outcome"] == Outcome.EXPLAINED.value}
    guesses, metrics = other_names(named, seed, different=False), {}
    for kind in sorted({kind for _, kind in named.values() if kind}):
        own = [n for n, (_, given) in named.items() if given == kind]
        metrics[f"explained_{kind}"] = len(own)
        if any("true_concept" not in rows[n] for n in own):  # there is no ground truth
            continue
        right = [rows[n]["concept"] == rows[n]["true_concept"] for n in own]
        guessed = [guesses[n] == rows[n]["true_concept"] for n in own if guesses[n]]
        metrics |= fraction_metrics(f"concept_accuracy_{kind}", right)
        metrics |= fraction_metrics(f"concept_accuracy_guessed_{kind}", guessed)
    return metrics


def detect(
    study: CachedSAE, images: Sequence[Image.Image], interpreter: Interpreter, truth: LabelMaps,
    heldout: Sequence[Image.Image], unseen: LabelMaps, *, n_top: int = 5, threshold: float = 0.25, dim: float = 0.0,
) -> PartResult:  # fmt: skip
    """Measure which concepts a latent detects, and which of these detectors carry the concept's name (notebook 03).

    Latents and thresholds are chosen on the cached images and measured on the held-out ones. Beside the metrics of
    `recall_metrics` stand those of each kind: `concepts_present_KIND`, `concepts_detected_KIND`,
    `concepts_detected_by_chance_KIND` and `concept_recall_KIND`.

    images: that were cached, all activations of which the cache keeps.
    truth, unseen: label maps of the cached and of the held-out images.
    n_top, threshold, dim: of the exemplars that the explainer sees.
    """
    detection = detect_concepts(study.place, study.cache, truth, heldout, unseen)
    exemplars = study.exemplars(images, n_top=n_top, threshold=threshold, dim=dim)
    rows = as_rows(interpreter.explain(exemplars.only(detection.latents()))) if detection.latents() else {}
    names = {latent: row["concept"] for latent, row in rows.items()}
    metrics = recall_metrics(detection, names)
    good = detection.good()
    sets = {
        "concepts_detected": {(each.kind, each.concept) for each in good},
        "concepts_detected_by_chance": {(each.kind, each.concept) for each in detection.good_by_chance()},
        "concept_recall": {(each.kind, each.concept) for each in good if names.get(each.latent) == each.concept},
    }
    for kind in sorted({kind for kind, _ in detection.present}):
        present = [name for name in detection.present if name[0] == kind]
        metrics[f"concepts_present_{kind}"] = len(present)
        for metric, found in sets.items():
            metrics |= fraction_metrics(f"{metric}_{kind}", [name in found for name in present])
    return PartResult(metrics, [], rows)


def score(
    study: CachedSAE, images: Sequence[Image.Image], rows: Mapping[int, Mapping], truth: LabelMaps,
    segmenters: Mapping[str, FindConcept], all_pairs: AllPairs | None, *, n_top: int = 5, threshold: float = 0.25,
    most: int | None = None, random_runs: int = 10, clip_runs: int = 10, seed: int = 0,
) -> PartResult:  # fmt: skip
    """Score the explained latents in both modes, with what chance gives (notebook 04).

    images: that were cached.
    rows: of `interpret`.
    segmenters, all_pairs, random_runs, clip_runs: as in `score_latents`.
    n_top, threshold: of the exemplars.
    most: latents, at random if more are explained.
    seed: of everything random.
    """
    try:
        explained = explained_latents(rows, truth, most=most, seed=seed)
    except ValueError as error:
        return PartResult({"latents_scored": 0}, [f"scores: {error}"])
    exemplars = study.exemplars(images, n_top=n_top, threshold=threshold)
    scores = score_latents(
        study.place, images, exemplars, explained, segmenters, all_pairs,
        threshold=threshold, n_top=n_top, random_runs=random_runs, clip_runs=clip_runs,
        skipped=study.cache.skipped, seed=seed,
    )  # fmt: skip
    return PartResult(score_metrics(scores, kind_tables(scores, seed)))


def steer(
    study: CachedSAE, rows: Mapping[int, Mapping], question: str, image: Image.Image, doses: Sequence[float], *,
    others: Sequence[Image.Image], count: int = 30, choosing: int = 15, kinds: Sequence[str], batch: int = 20,
    max_new_tokens: int = 24, seed: int = 0,
) -> PartResult:  # fmt: skip
    """Clamp object latents on an empty image and look for the object in the answer (notebook 06).

    The metrics are those of `ObjectSteering`, with `object_latents`, how many there are. If there are fewer than
    `count` and `choosing` together, a third of them choose the dose.

    rows: of `interpret`.
    others: images whose unsteered answers are the reference of fluency.
    count, choosing: latents that are reported, and others that choose the dose.
    kinds: of the tokens that are clamped.
    """
    objects = {n: row["concept"] for n, row in rows.items() if row["concept"] and row["kind"] == "object"}
    known = {"object_latents": len(objects)}
    if len(objects) < FEW:
        why = f"steering: {len(objects)} latents are named for an object, it takes {FEW}"
        return PartResult(known | {"objects_steered": 0}, [why])
    choosing = min(choosing, len(objects) // 3)
    steering = steer_objects(
        study.place, study.cache, objects, question, image, doses, count=min(count, len(objects) - choosing),
        choosing=choosing, scope=Scope(tuple(kinds)), others=others, batch=batch, max_new_tokens=max_new_tokens,
        seed=seed,
    )  # fmt: skip
    steered = len(steering.reported)
    why = [f"steering: only {steered} latents, as {len(objects)} are named for an object"] if steered < count else []
    return PartResult(known | steering.metrics, why)


def attribute(
    place: SAEInPlace, samples: Sequence[Mapping], *, decisions: int = 8, pairs: int = 32, seed: int = 0
) -> PartResult:
    """Compare linear attribution with ablation on a few decisions (notebook 07).

    samples: held-out rows with question and image.
    decisions: how many; the first token of the model's answer against the runner-up.
    pairs: active (token, latent) pairs that are ablated for each decision.
    seed: of the pairs.
    """
    found = rank_agreement({"": place}, samples, decisions=decisions, pairs=pairs, seed=seed)[""]
    known = [value for value in found if np.isfinite(value)]
    why = [f"attribution: {len(found) - len(known)} decisions that no pair changes"] if len(known) < len(found) else []
    metrics: Metrics = {"decisions": len(known)}
    if len(known) > 1:
        metrics |= bounds("spearman_linear", mean_interval(known, seed=seed))
    return PartResult(metrics, why)
