"""Summarise the comparison: the metrics of its stage, and rows for tables and figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from lmm_sae_nb.compare.depth import SteeredLatent
from lmm_sae_nb.compare.scored import ScoredSAE
from lmm_sae_nb.model.hookpoints import Hookpoint
from lmm_sae_nb.score.scores import Column, Comparison, Scores, latents_by_kind
from lmm_sae_nb.score.tables import MeanComparison, kind_table
from lmm_sae_nb.support.files import read_json
from lmm_sae_nb.support.intervals import Mean, bounds, difference_interval, mean_interval, proportion, read_mean
from lmm_sae_nb.support.stages import Metrics
from lmm_sae_nb.truth.accuracy import accuracy_metrics, outcome_metrics

Totals = dict[Column, MeanComparison]
TITLES = {
    Column("iou", "paper"): "IoU, paper mode",
    Column("iou", "strict"): "IoU, strict mode",
    Column("clip", "paper"): "CLIP score, paper mode",
    Column("clip", "strict"): "CLIP score, strict mode",
}


SERIES = {"own images": "", "moved": "_area", "random images": "_random"}  # of a figure, and how its metrics end


def totals(scores: Scores, seed: int = 0) -> Totals:
    """Return the means over all latents of one SAE, for each column.

    seed: of the bootstrap.
    """
    return {column: kind_table(scores, column, seed)["total"] for column in scores.columns}


def gains(comparisons: Iterable[Comparison], chance: str) -> list[float] | None:
    """Return each latent's score less what chance gives; None if a latent has no such chance.

    chance: "random" (random images) or "area" (the activation moved within the same image).
    """
    pairs = [(row.score, getattr(row, chance)) for row in comparisons]
    return None if any(other is None for _, other in pairs) else [one - float(np.mean(other)) for one, other in pairs]


def score_metrics(scored: Mapping[str, ScoredSAE], seed: int = 0) -> Metrics:
    """Return the scores of each SAE as COLUMN_NAME, with what chance gives and whether the score is above it.

    COLUMN_NAME_gain and COLUMN_NAME_moved_gain are the score less that of random images and less that of the moved
    activation, mean over latents. COLUMN_NAME_above_random and COLUMN_NAME_above_moved are 1 if the interval of this
    difference lies above 0. latents_NAME counts the scored latents.
    """
    metrics: Metrics = {}
    for name, each in scored.items():
        metrics[f"latents_{name}"] = len(each.scores.explained)
        for column, row in totals(each.scores, seed).items():
            metrics |= row.metrics(f"{column}_{name}")
            for chance, gain, word in (("random", "gain", "random"), ("area", "moved_gain", "moved")):
                if (values := gains(each.scores[column].values(), chance)) is not None:
                    above = mean_interval(values, seed=seed)
                    metrics |= bounds(f"{column}_{name}_{gain}", above)
                    metrics[f"{column}_{name}_above_{word}"] = int(above.low > 0)
    return metrics


def rise_metrics(low: Scores, high: Scores, seed: int = 0) -> Metrics:
    """Return how much each score rises from one layer to another, as COLUMN_rise with its interval.

    COLUMN_gain_rise is the rise of what a score has above random images, latent by latent, and COLUMN_moved_rise of
    what it has above the moved activation. Deep layers may have names that fit any image; then chance rises too.
    """
    metrics: Metrics = {}
    for column in low.columns:
        one, other = ([row.score for row in scores[column].values()] for scores in (low, high))
        metrics |= bounds(f"{column}_rise", difference_interval(one, other, seed=seed))
        for chance, name in (("random", "gain_rise"), ("area", "moved_rise")):
            pair = [gains(scores[column].values(), chance) for scores in (low, high)]
            if None not in pair:
                metrics |= bounds(f"{column}_{name}", difference_interval(*pair, seed=seed))
    return metrics


def quality_metrics(name: str, evaluation: Metrics, explanations: Mapping[int, Mapping]) -> Metrics:
    """Return how good one SAE is: fvu, dead_fraction, loss_recovered, explained_fraction, concept_accuracy; _NAME.

    evaluation: of `evaluate_saes`.
    explanations: latent to its row; without the true concept there is no concept_accuracy.
    """
    quality = evaluation | outcome_metrics(explanations)
    if all("true_concept" in row for row in explanations.values()):
        quality |= accuracy_metrics(explanations)
    wanted = ("fvu", "dead_fraction", "loss_recovered", "explained_fraction", "concept_accuracy")
    return {
        f"{quantity}_{name}{end}": quality[quantity + end]
        for quantity in wanted
        for end in ("", "_low", "_high")
        if quantity + end in quality
    }


def depth_metrics(steered: Mapping[str, Sequence[SteeredLatent]], ranks: Mapping[str, Sequence[float]]) -> Metrics:
    """Return steered_NAME, the fraction of answers that name the object, and spearman_NAME, a mean over decisions.

    What has too few cases for an interval is left out.
    """
    metrics: Metrics = {}
    for name, latents in steered.items():
        if latents:
            metrics |= bounds(f"steered_{name}", proportion([each.named for each in latents]))
        if len(ranks[name]) > 1:
            metrics |= bounds(f"spearman_{name}", mean_interval(ranks[name]))
    return metrics


# Rows for tables and figures.


def direction(difference: Mean) -> str:
    """Return the word for a difference: "rises" or "falls" if its interval leaves out 0, else "does not change"."""
    return "rises" if difference.low > 0 else "falls" if difference.high < 0 else "does not change measurably"


def rise_rows(metrics: Metrics, layers: Sequence[Hookpoint]) -> list[dict[str, str | Mean]]:
    """Return each rise with its direction in words, for `plots.table`.

    layers: in order of depth; the rise is from the first to the last.
    """
    rows, verb = [], f"from layer {layers[0]} to layer {layers[-1]}, the score"
    for column, title in TITLES.items():
        for end, words in (("rise", ""), ("moved_rise", ", less moved"), ("gain_rise", ", less random images")):
            if (name := f"{column}_{end}") in metrics:
                rise = read_mean(metrics, name)
                rows.append({"score": title + words, verb: direction(rise), "difference": rise})
    return rows


def layer_rows(metrics: Metrics, layers: Sequence[Hookpoint], published: Mapping[str, float]) -> list[dict]:
    """Return Table 3 as rows for `plots.table`: each score, what each chance gives, and the paper's numbers.

    layers: in order of depth.
    published: metric to the paper's number.
    """
    rows = []
    for column, title in TITLES.items():
        if f"{column}_layer_{layers[0]}" not in metrics:
            continue
        ends = {title: "", "… moved": "_area", "… less moved": "_moved_gain", "… on random images": "_random"}
        values = {words: _by_layer(metrics, column, end, layers) for words, end in ends.items()}
        values |= {
            "… in the paper": {n: published.get(f"{column}_layer_{n}") for n in layers},
            "… on random images, in the paper": {n: published.get(f"{column}_layer_{n}_random") for n in layers},
        }
        for score, by_layer in values.items():
            if any(value is not None for value in by_layer.values()):
                rows.append({"score": score} | {f"layer {n}": value for n, value in by_layer.items()})
    return rows


def _by_layer(
    metrics: Metrics, column: Column, end: str, layers: Sequence[Hookpoint]
) -> dict[Hookpoint, Mean | float | None]:
    names = {n: f"{column}_layer_{n}{end}" for n in layers}
    return {n: read_mean(metrics, name) if name in metrics else None for n, name in names.items()}


def quantity_rows(metrics: Metrics, layers: Sequence[Hookpoint], titles: Mapping[str, str]) -> list[dict]:
    """Return a row for each quantity, with a column for each layer, for `plots.table`.

    titles: metric, without the layer, to the title of its row; one that no layer has is left out.
    """
    rows = []
    for name, title in titles.items():
        known = {n: read_mean(metrics, f"{name}_layer_{n}") for n in layers if f"{name}_layer_{n}" in metrics}
        rows += [{"quantity": title} | {f"layer {n}": known.get(n) for n in layers}] if known else []
    return rows


def depth_panels(metrics: Metrics, layers: Sequence[Hookpoint], quantity: str) -> dict[str, dict[str, dict[str, Mean]]]:
    """Return the scores of one quantity, on own images and by each chance, for `plots.mean_panels`.

    quantity: "iou" or "clip".
    """
    panels = {}
    for column, title in TITLES.items():
        if column.quantity != quantity or f"{column}_layer_{layers[0]}" not in metrics:
            continue
        series = {words: _by_layer(metrics, column, end, layers) for words, end in SERIES.items()}
        panels[title] = {
            f"layer {n}": {words: means[n] for words, means in series.items() if means[n] is not None} for n in layers
        }
    return panels


def kind_fractions(scores: Scores) -> dict[str, float]:
    """Return the fraction of latents that are named for each kind of concept, those of Table 1 first."""
    groups = latents_by_kind(scores.explained)
    total = len(groups.pop("total"))
    return {kind: len(latents) / total for kind, latents in groups.items()}


def shared_concepts(scored: Mapping[str, ScoredSAE]) -> dict[str, dict[str, int]]:
    """Return the concepts that a latent of every SAE is named for, each with one latent by the SAE's name."""
    latents = {
        name: {each.concept: latent for latent, each in result.scores.explained.items()}
        for name, result in scored.items()
    }
    shared = sorted(set.intersection(*map(set, latents.values())))
    return {concept: {name: by_concept[concept] for name, by_concept in latents.items()} for concept in shared}


def size_curves(metrics: Metrics, names: Mapping[int, str], titles: Mapping[str, str]) -> dict[str, dict[int, Mean]]:
    """Return quantities over a size, for `plots.dose_curves`.

    names: size to the SAE's name, as `names_by_size` gives them.
    titles: metric, without the SAE's name, to the title of its curve; a metric that is missing is left out.
    """
    curves: dict[str, dict[int, Mean]] = {}
    for quantity, title in titles.items():
        for size, name in names.items():
            if f"{quantity}_{name}" in metrics:
                value = read_mean(metrics, f"{quantity}_{name}")
                curves.setdefault(title, {})[size] = value if isinstance(value, Mean) else Mean(value, value, value)
    return curves


def changes_per_doubling(metrics: Metrics, names: Mapping[int, str]) -> dict[int, float]:
    """Return by how much the FVU changes for each doubling, as a fraction: each size against the size before.

    names: size to the SAE's name, in order, as `names_by_size` gives them; the first size has no change.
    """
    sizes, changes = list(names), {}
    for before, size in pairwise(sizes):
        ratio = metrics[f"fvu_{names[size]}"] / metrics[f"fvu_{names[before]}"]
        changes[size] = ratio ** (1 / math.log2(size / before)) - 1
    return changes


def doubling_rows(metrics: Metrics, names: Mapping[int, str], title: str) -> list[dict[str, str | float | None]]:
    """Return the FVU of each size, and by how much it changes for each doubling from the size before.

    names: size to the SAE's name, in order, as `names_by_size` gives them.
    title: of the size.
    """
    changes = {size: f"{change:+.1%}" for size, change in changes_per_doubling(metrics, names).items()}
    return [
        {title: f"{size:,}", "FVU": metrics[f"fvu_{name}"], "change per doubling": changes.get(size)}
        for size, name in names.items()
    ]


KIND_TITLES = {"topk": "TopK", "batch_topk": "BatchTopK", "matryoshka": "Matryoshka"}
KIND_QUANTITIES = {  # metric, without the SAE's name, to its column
    "fvu": "FVU", "dead_fraction": "silent on held-out tokens", "l0": "active latents per token",
    "explained_fraction": "explained, of those asked about", "concept_accuracy": "names right",
}  # fmt: skip


def kind_rows(metrics: Metrics, names: Mapping[str, str]) -> list[dict[str, str | Mean | float]]:
    """Return a row for each kind of training, for `plots.table`; what no SAE has is left out.

    names: kind to the SAE's name.
    """
    known = {
        quantity: title
        for quantity, title in KIND_QUANTITIES.items()
        if any(f"{quantity}_{name}" in metrics for name in names.values())
    }
    return [
        {"training": KIND_TITLES[kind]}
        | {
            title: read_mean(metrics, metric) if (metric := f"{quantity}_{name}") in metrics else None
            for quantity, title in known.items()
        }
        for kind, name in names.items()
    ]


def kind_metrics(
    names: Mapping[str, str], evaluation: Mapping[str, Metrics], rows: Mapping[str, Mapping[int, Mapping]],
    fvu: Mapping[str, Mean], seed: int = 0,
) -> Metrics:  # fmt: skip
    """Return l0_NAME, the active latents per token, and how each further kind of training differs from the first.

    The differences are fvu_difference_NAME, explained_fraction_difference_NAME and, where the truth is known,
    concept_accuracy_difference_NAME. One of fewer than two latents is left out.

    names: kind to the SAE's name; the first is what the others are compared with.
    evaluation: of `evaluate_saes`, by name.
    rows: explanations, by name.
    fvu: of `fvu_differences`, by name.
    seed: of the bootstraps.
    """
    first, *others = names.values()
    metrics: Metrics = {f"l0_{name}": evaluation[name]["l0"] for name in names.values()} if others else {}
    for name in others:
        metrics |= bounds(f"fvu_difference_{name}", fvu[name]) if name in fvu else {}
        pairs = {
            "explained_fraction": [_are_explained(rows[each]) for each in (first, name)],
            "concept_accuracy": [_right_names(rows[each]) for each in (first, name)],
        }  # fmt: skip
        for quantity, pair in pairs.items():
            if min(map(len, pair)) > 1:
                metrics |= bounds(f"{quantity}_difference_{name}", difference_interval(*pair, seed=seed))
    return metrics


def _are_explained(rows: Mapping[int, Mapping]) -> list[bool]:
    return [row["outcome"] == "explained" for row in rows.values()]


def _right_names(rows: Mapping[int, Mapping]) -> list[bool]:
    """Return for each explained latent whether its name is the true concept; nothing where the truth is not known."""
    known = [row for row in rows.values() if row["outcome"] == "explained" and "true_concept" in row]
    return [row["concept"] == row["true_concept"] for row in known]


def exam_rows(folders: Mapping[str, str | Path]) -> list[dict[str, str | float | None]]:
    """Return the fraction of right answers in each family of questions, a column for each model.

    folders: model to its folder; a model without an `exam.json` is left out.
    """
    fractions: dict[str, dict[str, float]] = {}
    for model, folder in folders.items():
        if (file := Path(folder) / "exam.json").is_file():
            for family, row in read_json(file).items():
                if isinstance(row, dict) and "fraction" in row:
                    fractions.setdefault(family.replace("_", " "), {})[model] = row["fraction"]
    return [{"questions": family} | row for family, row in fractions.items()]
