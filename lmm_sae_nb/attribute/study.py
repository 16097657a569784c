"""Compare the ways of attribution on many decisions, at several layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from lmm_sae_nb.attribute.agreement import agreement, median_ratio, random_pairs
from lmm_sae_nb.attribute.attribution import exact, greedy_decision, in_float32, integrated, linear, separate_paths
from lmm_sae_nb.model.hookpoints import Hookpoint, plain
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.support.files import fingerprint
from lmm_sae_nb.support.intervals import bounds, mean_interval
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.train.training import Recipe, train_saes


@dataclass(frozen=True)
class ComparedDecision:
    """The attribution of random active pairs of one decision, by ablation and by three approximations, in logits.

    layer: whose SAE it is.
    exact: by ablation, a number for each pair.
    linear: by one forward and one backward.
    ig: by integrated gradients on the common path of all latents.
    separate_paths: by integrated gradients on each pair's own path; None where this was not computed.
    ig_many: as `ig` with many steps; None where this was not computed.
    spearman_steps: rank correlation of few steps with many, over all active pairs; None where it was not computed.
    """

    layer: Hookpoint
    exact: list[float]
    linear: list[float]
    ig: list[float]
    separate_paths: list[float | None]
    ig_many: list[float] | None = None
    spearman_steps: float | None = None


class SmallSAEs(NamedTuple):
    """SAEs that were trained in one pass, each at its layer.

    skipped: number of a sample that could not be read to the name and fault of its picture.
    converted: how many pictures of samples were converted to 8-bit RGB, as `count_conversions` says it.
    """

    places: list[SAEInPlace]
    skipped: Mapping[int, str]
    converted: Mapping[str, int]


def small_saes(
    lmm: LMM,
    samples: Sequence[Mapping],
    layers: Sequence[Hookpoint],
    *,
    n_latents: int,
    k: int,
    lr: float,
    steps: int,
    batch_tokens: int,
    dead_after_tokens: int,
    batch_samples: int = 16,
    k_aux: int = 0,
    seed: int,
    folder: str | Path,
    unreadable: str = "refuse",
) -> SmallSAEs:
    """Train a small SAE at each of these layers, all in one pass over the model; the same call again reads them.

    samples: rows with image, question and answer.
    layers: 0-based, or other hookpoints.
    n_latents, k: the size of each SAE.
    lr, steps, batch_tokens, dead_after_tokens, batch_samples, k_aux: as for `train_saes`.
    folder: gets a folder `layer_<n>` for each.
    unreadable: "skip" leaves out samples whose picture cannot be read; "refuse" stops there.
    """
    if not layers:
        return SmallSAEs([], {}, {})
    recipes = {f"layer_{layer}": Recipe(layer, n_latents=n_latents, k=k, lr=lr) for layer in layers}
    trained = train_saes(
        lmm, samples, recipes, steps=steps, batch_tokens=batch_tokens, dead_after_tokens=dead_after_tokens,
        batch_samples=batch_samples, k_aux=k_aux, seed=seed, unreadable=unreadable, folder=folder,
    )  # fmt: skip
    places = [
        SAEInPlace(lmm, result.sae.requires_grad_(False), recipes[name].layer) for name, result in trained.items()
    ]
    one = next(iter(trained.values()))  # all have seen the same samples
    return SmallSAEs(places, one.skipped, one.converted)


def compare_ways(
    places: Sequence[SAEInPlace],
    samples: Sequence[Sequence[Mapping]],
    *,
    pairs: int = 16,
    path_pairs: int = 1,
    ig_steps: int = 4,
    many_steps: int = 32,
    many_decisions: int = 0,
    batch: int = 5,
    seed: int = 0,
) -> list[ComparedDecision]:
    """Attribute decisions by ablation and by each approximation, at random active pairs.

    A decision is the first token of the model's own answer against the runner-up. All active pairs from which a path
    leads to the decision are equally likely to be drawn. So the rank correlation over the drawn ones estimates that
    over all of these.

    places: an SAE at its layer, one for each layer.
    samples: for each place, rows with question and image; each makes one decision.
    pairs: number drawn for each decision.
    path_pairs: number of these that are also integrated on separate paths.
    ig_steps: steps of integrated gradients.
    many_steps: steps of integrated gradients in the first `many_decisions` of the first place, to see what more do.
    batch: versions of a prompt that run side by side; a GPU's memory limits it.
    seed: of the draws; one source of randomness serves all decisions, in order.
    """
    generator = torch.Generator().manual_seed(seed)
    decisions = [(place, sample) for place, rows in zip(places, samples, strict=True) for sample in rows]
    many_decisions = min(many_decisions, len(samples[0]))
    return [
        _compare(place, sample, pairs, path_pairs, ig_steps, many_steps if n < many_decisions else 0, batch, generator)
        for n, (place, sample) in enumerate(progress_bar(decisions, desc="comparing", disable=len(decisions) < 10))
    ]


@in_float32
def _compare(
    place: SAEInPlace,
    sample: Mapping,
    pairs: int,
    path_pairs: int,
    ig_steps: int,
    many_steps: int,
    batch: int,
    generator: torch.Generator,
) -> ComparedDecision:
    """Compare the ways on one decision; without `many_steps` there are no integrated gradients with many steps."""
    choice = greedy_decision(place.lmm, sample["question"], sample["image"])
    approximation = linear(place, choice)
    drawn = random_pairs(approximation, pairs, generator)
    on_paths = random_pairs(approximation, path_pairs, generator, among=drawn)
    by_way = {
        "exact": exact(place, choice, drawn, batch=min(batch, 4)),
        "linear": approximation.values,
        "ig": integrated(place, choice, steps=ig_steps, batch=batch).values,
        "separate_paths": separate_paths(place, choice, on_paths, batch=batch),
    }
    between = None
    if many_steps:
        by_way["ig_many"] = integrated(place, choice, steps=many_steps, batch=batch).values
        active = approximation.latents.acts > 0
        between = agreement(by_way["ig_many"][active], by_way["ig"][active]).spearman
    plain = {name: _plain(values[drawn]) for name, values in by_way.items()}
    return ComparedDecision(place.layer, **plain, spearman_steps=between)


def _plain(values: torch.Tensor) -> list[float | None]:
    """Turn numbers into what JSON holds: 8 digits, None for NaN."""
    return [None if math.isnan(value) else round(value, 8) for value in values.tolist()]


def agreement_metrics(compared: Iterable[ComparedDecision], layer: Hookpoint, seed: int = 0) -> dict[str, float]:
    """Summarise how well each approximation agrees with ablation.

    `spearman_<way>` and `sign_<way>` are means over decisions, with 99% intervals, for the ways `linear` and `ig`.
    `separate_paths` has few pairs a decision, so all pairs of a layer are taken together. Layers other than `layer`
    have `_layer_<n>` at the end of the name.

    `ratio_linear_largest` is the median of linear over exact, over the 5% of a layer's pairs that ablation finds
    largest. For the decisions that have integrated gradients with many steps, `spearman_ig_many` and
    `spearman_ig_few` are the agreement of many and of few steps with ablation, and `spearman_steps` that of the two.

    layer: the layer that the page is about; `decisions` and `pairs` count its decisions and ablated pairs.
    seed: of the bootstrap.
    """
    layer = plain(layer)
    by_layer: dict[Hookpoint, list[ComparedDecision]] = {}
    for decision in compared:
        by_layer.setdefault(decision.layer, []).append(decision)
    ours = by_layer.get(layer, [])
    metrics: dict[str, float] = {"decisions": len(ours), "pairs": sum(len(decision.exact) for decision in ours)}
    for number, decisions in by_layer.items():
        end = "" if number == layer else f"_layer_{number}"
        for way in ("linear", "ig"):
            each = [agreement(decision.exact, getattr(decision, way)) for decision in decisions]
            metrics |= bounds(f"spearman_{way}{end}", mean_interval([one.spearman for one in each], seed=seed))
            metrics |= bounds(f"sign_{way}{end}", mean_interval([one.sign for one in each], seed=seed))
        together = agreement(joined(decisions, "exact"), joined(decisions, "separate_paths"))
        metrics[f"spearman_separate_paths{end}"] = together.spearman
        metrics[f"sign_separate_paths{end}"] = together.sign
        metrics[f"pairs_separate_paths{end}"] = together.pairs
    for number, decisions in by_layer.items():
        end = "" if number == layer else f"_layer_{number}"
        metrics[f"ratio_linear_largest{end}"] = median_ratio(joined(decisions, "exact"), joined(decisions, "linear"))
    if len(both := [decision for decision in ours if decision.ig_many is not None]) > 1:
        values = {
            "spearman_ig_many": [agreement(each.exact, each.ig_many).spearman for each in both],
            "spearman_ig_few": [agreement(each.exact, each.ig).spearman for each in both],
            "spearman_steps": [each.spearman_steps for each in both],
        }
        metrics["decisions_many_steps"] = len(both)
        for name, each in values.items():
            metrics |= bounds(name, mean_interval(each, seed=seed))
    return metrics


def joined(compared: Iterable[ComparedDecision], way: str) -> list[float]:
    """Join the pairs of several decisions in one list.

    way: the name of a field of `ComparedDecision`; None becomes NaN.
    """
    values = (value for decision in compared for value in getattr(decision, way))
    return [math.nan if value is None else value for value in values]


def sae_hashes(files: Iterable[Path]) -> list[str]:
    """Return the hashes of SAE files, as the long measurement of all pairs records them."""
    return [fingerprint(file) for file in files]
