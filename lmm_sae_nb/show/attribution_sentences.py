"""Say in words how well each way of attribution agrees with ablation (notebook 07)."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lmm_sae_nb.attribute.agreement import agreement
from lmm_sae_nb.attribute.study import joined
from lmm_sae_nb.model.hookpoints import Hookpoint, in_order, titled
from lmm_sae_nb.show.cure_sentences import interval
from lmm_sae_nb.support.intervals import Mean, mean_interval, read_mean

if TYPE_CHECKING:
    from lmm_sae_nb.attribute.study import ComparedDecision
    from lmm_sae_nb.support.stages import Metrics

TINY = 1e-5  # logits; below, an effect is close to the rounding of float32
LARGEST = 0.05  # of the pairs: those whose size is compared
Ends = Mapping[Hookpoint, str]  # layer to the end of its metrics' names, in the order of depth


def attribution_sentences(
    compared: Sequence[ComparedDecision],
    metrics: Metrics,
    all_pairs: Sequence[Mapping[str, Any]],
    *,
    layer: Hookpoint,
    other_layers: Sequence[Hookpoint],
    ig_steps: int,
    many_steps: int,
) -> list[str]:
    """Return what the comparison of the ways of attribution found.

    compared: the drawn pairs of each decision.
    metrics: those of `agreement_metrics`, and `cost_ratio`.
    all_pairs: the layers of `book/ablations.json`, of which every pair is ablated; empty if there is no such file.
    layer: of the page's SAE, in plain form.
    other_layers: of the small SAEs.
    ig_steps: steps of integrated gradients.
    many_steps: steps in the decisions that have more; whether there are such is seen from the metrics.
    """
    ends = {each: "" if each == layer else f"_layer_{each}" for each in in_order([layer, *other_layers])}
    deepest = list(ends)[-1]
    ours, deep = ([one for one in compared if one.layer == each] for each in (layer, deepest))
    return [
        _rank(metrics),
        _size(ours),
        *([_elsewhere(metrics, ends)] if any(ends.values()) else []),
        *(_every_pair(each, metrics, ends) for each in all_pairs),
        *_near_rounding(deep, deepest),
        _cost(metrics),
        _common_path(metrics, ig_steps),
        *([_more_steps(ours, metrics, ig_steps, many_steps)] if "spearman_ig_many" in metrics else []),
        _separate_paths(metrics, ends),
    ]


def attribution_in_short(metrics: Metrics, all_pairs: Sequence[Mapping[str, Any]], hashes: Container[str]) -> str:
    """Return for the top of the page how well the linear form agrees with ablation, and what it costs.

    metrics, all_pairs: as for `attribution_sentences`.
    hashes: of the files of this page's SAEs; a layer that was measured with another SAE is of an earlier training.
    """
    return (
        f"the linear form, at the cost of {metrics['cost_ratio']:.1f} forward passes, has a rank correlation of "
        f"{_written(metrics, 'spearman_linear')} with ablation. These are {metrics['pairs']} drawn pairs of "
        f"{metrics['decisions']} decisions.{_every_pair_in_short(all_pairs, hashes)} For the 5% largest effects the "
        f"median of linear over exact is {metrics['ratio_linear_largest']:.2f}."
    )


def _every_pair_in_short(all_pairs: Sequence[Mapping[str, Any]], hashes: Container[str]) -> str:
    if not all_pairs:
        return ""
    layers = "; ".join(
        f"{each['spearman_linear']['mean']:.2f} at layer {each['layer']} "
        f"({each['sign_linear']['mean']:.0%} of the signs are right)"
        for each in all_pairs
    )
    earlier = any(each["sae"] not in hashes for each in all_pairs)
    return f" With all pairs ablated{', for SAEs of an earlier training,' if earlier else ''} it is {layers}."


# ---- one sentence for each topic ------------------------------------------------------------------------------------


def _rank(metrics: Metrics) -> str:
    return (
        "The linear form agrees with ablation in rank: the correlation within a decision is "
        f"{_written(metrics, 'spearman_linear')}, and {metrics['sign_linear']:.1%} of the signs are the same."
    )


def _size(ours: Sequence[ComparedDecision]) -> str:
    """Return how large the linear effects are beside the exact ones, for the pairs that ablation finds largest."""
    exact, linear = (np.array(joined(ours, way)) for way in ("exact", "linear"))
    largest = np.argsort(-np.abs(exact), kind="stable")[: max(1, round(LARGEST * len(exact)))]
    ratios = linear[largest] / exact[largest]
    low, high = np.quantile(ratios, (0.25, 0.75))
    return (
        f"In size: for the {len(largest)} largest effects (5% of the drawn pairs) the ratio of linear to exact has "
        f"the median {np.median(ratios):.2f}. Half of the ratios lie between {low:.2f} and {high:.2f}."
    )


def _elsewhere(metrics: Metrics, ends: Ends) -> str:
    ranks = (f"{_written(metrics, 'spearman_linear' + end)} at {titled(n)}" for n, end in ends.items() if end)
    return (
        f"Other layers, with fewer decisions: the rank correlation is {', '.join(ranks)}; equal signs are "
        f"{_by_layer(metrics, 'sign_linear', ends)}."
    )


def _every_pair(each: Mapping[str, Any], metrics: Metrics, ends: Ends) -> str:
    """Return what one layer shows if every pair is ablated, and whether the drawn pairs of the page agree with it."""
    full = Mean(**each["spearman_linear"])
    text = (
        f"With all pairs of layer {each['layer']} ablated, the linear form's rank correlation is {interval(full)}, "
        f"and {each['sign_linear']['mean']:.0%} of the signs are right."
    )
    if each["layer"] not in ends:
        return text
    drawn = read_mean(metrics, f"spearman_linear{ends[each['layer']]}")
    if drawn.low > full.high or full.low > drawn.high:
        return f"{text} The drawn pairs above give another number; this one is of more pairs."
    return f"{text} The drawn pairs above agree with this."


def _near_rounding(deep: Sequence[ComparedDecision], deepest: Hookpoint) -> list[str]:
    """Return how many effects at the deepest layer are tiny, and how many signs are right there; none or all: nothing.

    deep: the decisions of that layer.
    """
    exact, linear = (np.array(joined(deep, way)) for way in ("exact", "linear"))
    tiny, same = np.abs(exact) < TINY, np.sign(exact) == np.sign(linear)
    if tiny.all() or not tiny.any():
        return []
    return [
        f"At {titled(deepest)}, {tiny.mean():.0%} of the drawn pairs change the decision by less than {TINY:.5f} "
        f"logits, which is close to float32's rounding. Of these, {same[tiny].mean():.0%} of the signs are right; of "
        f"the others, {same[~tiny].mean():.0%}."
    ]


def _cost(metrics: Metrics) -> str:
    return (
        f"It costs {metrics['cost_ratio']:.1f} forward passes of the spliced model, for all pairs together: its "
        "forward and backward pass are both counted. Both ways start from the pixels, but the backward pass ends at "
        "the layer. The paper's code needs two forward passes and a backward pass for each latent."
    )


def _common_path(metrics: Metrics, ig_steps: int) -> str:
    linear, together = (read_mean(metrics, f"spearman_{way}") for way in ("linear", "ig"))
    order = "worse than" if together.high < linear.low else "about as well as"
    return (
        f"With {ig_steps} steps, integrated gradients on the common path rank pairs {order} the linear form: "
        f"{interval(together)} against {interval(linear)}."
    )


def _more_steps(ours: Sequence[ComparedDecision], metrics: Metrics, ig_steps: int, many_steps: int) -> str:
    """Return whether more steps of integrated gradients change the picture, on the decisions that have them."""
    both = [one for one in ours if one.ig_many is not None]
    linear = mean_interval([agreement(one.exact, one.linear).spearman for one in both])
    if read_mean(metrics, "spearman_ig_many").high < linear.low:
        cause = "Too few steps do not explain the difference to the linear form."
    else:
        cause = "So few decisions do not settle whether more steps would help."
    return (
        f"On {metrics['decisions_many_steps']} decisions we took {many_steps} steps, too. The correlation with "
        f"ablation is {_written(metrics, 'spearman_ig_many')} with {many_steps} steps and "
        f"{_written(metrics, 'spearman_ig_few')} with {ig_steps}; the linear form has {interval(linear)} there. The "
        f"correlation between the two numbers of steps is {_written(metrics, 'spearman_steps')}. {cause}"
    )


def _separate_paths(metrics: Metrics, ends: Ends) -> str:
    counts = ", ".join(f"{metrics[f'pairs_separate_paths{end}']:.0f}" for end in ends.values())
    return (
        "On a separate path for each pair they have a rank correlation with ablation of "
        f"{_by_layer(metrics, 'spearman_separate_paths', ends, 3)} (all pairs of a layer together, {counts} pairs). "
        f"Equal signs are {_by_layer(metrics, 'sign_separate_paths', ends)}."
    )


# ---- numbers --------------------------------------------------------------------------------------------------------


def _written(metrics: Metrics, name: str) -> str:
    """Return a metric with its interval."""
    return interval(read_mean(metrics, name))


def _by_layer(metrics: Metrics, name: str, ends: Ends, digits: int = 2) -> str:
    """Return a metric at each layer: "0.95 at layer 1, 0.90 at layer 4"."""
    return ", ".join(f"{metrics[name + end]:.{digits}f} at {titled(n)}" for n, end in ends.items())
