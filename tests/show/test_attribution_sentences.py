"""Sentences on the ways of attribution: against numbers read by hand."""

import pytest

from lmm_sae_nb.attribute.study import ComparedDecision
from lmm_sae_nb.show.attribution_sentences import attribution_in_short, attribution_sentences
from lmm_sae_nb.support.intervals import Mean, bounds

STARTS = {
    "rank": "The linear form agrees",
    "size": "In size",
    "elsewhere": "Other layers",
    "every pair": "With all pairs",
    "rounding": "At layer",
    "cost": "It costs",
    "common path": "With 4 steps",
    "more steps": "On 2 decisions",
    "separate paths": "On a separate path",
}


def measured(**given) -> dict:
    """Metrics by name; one with an interval is given as (mean, low, high)."""
    metrics = {}
    for name, value in given.items():
        metrics |= bounds(name, Mean(*value)) if isinstance(value, tuple) else {name: value}
    return metrics


OURS = measured(
    decisions=2, pairs=60, cost_ratio=1.84, ratio_linear_largest=0.904,
    spearman_linear=(0.95, 0.9, 0.98), sign_linear=(0.985, 0.97, 1.0), spearman_ig=(0.5, 0.4, 0.6),
    spearman_separate_paths=0.9996, sign_separate_paths=1.0, pairs_separate_paths=20,
)  # fmt: skip
AT_4 = measured(
    spearman_linear_layer_4=(0.8, 0.7, 0.9), sign_linear_layer_4=0.91, spearman_separate_paths_layer_4=0.998,
    sign_separate_paths_layer_4=0.875, pairs_separate_paths_layer_4=8,
)  # fmt: skip
MANY = measured(
    decisions_many_steps=2, spearman_ig_many=(0.3, 0.2, 0.4), spearman_ig_few=(0.25, 0.1, 0.35),
    spearman_steps=(0.97, 0.94, 0.99),
)  # fmt: skip


def decision(exact: list[float], linear: list[float], layer: int = 1, many: bool = False) -> ComparedDecision:
    return ComparedDecision(layer, exact, linear, linear, [None] * len(exact), linear if many else None)


LARGE = [decision([8.0, -4.0, 2.0] + [0.1] * 57, [4.0, -4.0, 3.0] + [7.0] * 57)]


def told(compared=LARGE, metrics=OURS, all_pairs=(), other_layers=(), many_steps=16) -> dict[str, list[str]]:
    """The sentences by what they are about, in the order in which they come."""
    sentences = attribution_sentences(
        compared, metrics, all_pairs, layer=1, other_layers=other_layers, ig_steps=4, many_steps=many_steps
    )
    found = {}
    for sentence in sentences:
        (about,) = (name for name, start in STARTS.items() if sentence.startswith(start))
        found.setdefault(about, []).append(sentence)
    assert sum(found.values(), []) == sentences
    return found


def full(layer: int, low: float, mean: float, high: float, sae: str = "") -> dict:
    """A layer as `book/ablations.json` has it."""
    ranks = {"mean": mean, "low": low, "high": high}
    return {"layer": layer, "sae": sae, "spearman_linear": ranks, "sign_linear": {"mean": 0.75}}


def test_one_layer_alone_is_told_in_five_sentences():
    assert [text for (text,) in told().values()] == [
        "The linear form agrees with ablation in rank: the correlation within a decision is 0.95 [0.90, 0.98], and "
        "98.5% of the signs are the same.",
        "In size: for the 3 largest effects (5% of the drawn pairs) the ratio of linear to exact has the median 1.00. "
        "Half of the ratios lie between 0.75 and 1.25.",
        "It costs 1.8 forward passes of the spliced model, for all pairs together: its forward and backward pass are "
        "both counted. Both ways start from the pixels, but the backward pass ends at the layer. The paper's code "
        "needs two forward passes and a backward pass for each latent.",
        "With 4 steps, integrated gradients on the common path rank pairs worse than the linear form: 0.50 [0.40, "
        "0.60] against 0.95 [0.90, 0.98].",
        "On a separate path for each pair they have a rank correlation with ablation of 1.000 at layer 1 (all pairs of "
        "a layer together, 20 pairs). Equal signs are 1.00 at layer 1.",
    ]


def test_of_few_pairs_the_size_of_one_is_told():
    assert "the 1 largest effects" in told([decision([1.0, -3.0, 2.0], [5.0, -1.5, 5.0])])["size"][0]


@pytest.mark.parametrize(("high", "words"), [(0.89, "worse than"), (0.9, "about as well as")])
def test_integrated_gradients_are_worse_only_if_the_intervals_lie_apart(high, words):
    metrics = OURS | measured(spearman_ig=(0.8, 0.7, high))
    assert f"rank pairs {words} the linear form: 0.80" in told(metrics=metrics)["common path"][0]


def test_other_layers_are_named_in_the_order_of_depth():
    at_0 = {name.replace("_4", "_0"): value for name, value in AT_4.items()}
    found = told(metrics=OURS | AT_4 | at_0, other_layers=[4, 0])
    assert found["elsewhere"] == [
        "Other layers, with fewer decisions: the rank correlation is 0.80 [0.70, 0.90] at layer 0, 0.80 [0.70, 0.90] "
        "at layer 4; equal signs are 0.91 at layer 0, 0.98 at layer 1, 0.91 at layer 4."
    ]
    assert "of 0.998 at layer 0, 1.000 at layer 1, 0.998 at layer 4" in found["separate paths"][0]
    assert "(all pairs of a layer together, 8, 20, 8 pairs)" in found["separate paths"][0]


def test_drawn_pairs_are_compared_with_all_pairs_of_the_same_layer():
    layers = [full(1, 0.7, 0.8, 0.89), full(4, 0.91, 0.92, 0.93), full(1, 0.98, 0.99, 1.0), full(9, 0.1, 0.2, 0.3)]
    lower, higher, same, unknown = told(metrics=OURS | AT_4, all_pairs=layers, other_layers=[4])["every pair"]
    assert lower == (
        "With all pairs of layer 1 ablated, the linear form's rank correlation is 0.80 [0.70, 0.89], and 75% of the "
        "signs are right. The drawn pairs above give another number; this one is of more pairs."
    )
    assert higher.endswith("0.92 [0.91, 0.93], and 75% of the signs are right. The drawn pairs above give another "
                           "number; this one is of more pairs.")  # fmt: skip
    assert same.endswith("0.99 [0.98, 1.00], and 75% of the signs are right. The drawn pairs above agree with this.")
    assert unknown.endswith("of layer 9 ablated, the linear form's rank correlation is 0.20 [0.10, 0.30], and 75% of "
                            "the signs are right.")  # fmt: skip


def test_tiny_effects_are_told_of_the_deepest_layer_alone():
    deep = decision([1e-6, -1e-6, 1e-6, 9e-6, 0.5], [2e-6, 1e-6, 2e-6, 1e-6, 0.4], layer=4)
    assert told([*LARGE, deep], OURS | AT_4, other_layers=[4])["rounding"] == [
        "At layer 4, 80% of the drawn pairs change the decision by less than 0.00001 logits, which is close to "
        "float32's rounding. Of these, 75% of the signs are right; of the others, 100%."
    ]
    shallow = decision([1e-6, 2.0, 3.0], [1e-6, 2.0, 3.0])
    large = decision([0.2, 0.3, 0.5], [0.2, 0.3, 0.4], layer=4)
    assert "rounding" not in told([shallow, large], OURS | AT_4, other_layers=[4])


def test_if_all_effects_are_tiny_their_fraction_is_not_told():
    assert "rounding" not in told([decision([1e-6, 2e-6, 3e-6], [1e-6, 2e-6, 3e-6])])


ROUGH = [decision([1.0, 2.0, 3.0], [1.0, 3.0, 2.0], many=many) for many in (True, True)]  # a rank correlation of 0.5


def test_more_steps_are_compared_on_the_decisions_that_have_them():
    reversed_order = decision([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert told([*ROUGH, reversed_order], OURS | MANY)["more steps"] == [
        "On 2 decisions we took 16 steps, too. The correlation with ablation is 0.30 [0.20, 0.40] with 16 steps and "
        "0.25 [0.10, 0.35] with 4; the linear form has 0.50 [0.50, 0.50] there. The correlation between the two "
        "numbers of steps is 0.97 [0.94, 0.99]. Too few steps do not explain the difference to the linear form."
    ]


def test_where_the_intervals_overlap_more_steps_settle_nothing():
    metrics = OURS | MANY | measured(spearman_ig_many=(0.4, 0.2, 0.5))
    (text,) = told(ROUGH, metrics, many_steps=100)["more steps"]
    assert "with 100 steps" in text and text.endswith("So few decisions do not settle whether more steps would help.")


def test_all_sentences_come_in_their_order():
    deep = decision([1e-6, 1.0, 2.0], [1e-6, 1.0, 2.0], layer=4)
    layers = [full(1, 0.7, 0.8, 0.89), full(4, 0.7, 0.8, 0.89)]
    assert list(told([*ROUGH, deep], OURS | AT_4 | MANY, layers, [4])) == list(STARTS)


def test_the_result_has_the_layers_of_which_every_pair_was_ablated():
    layers = [full(1, 0.7, 0.8, 0.89, sae="one"), full(4, 0.91, 0.92, 0.93, sae="four")]
    start = (
        "the linear form, at the cost of 1.8 forward passes, has a rank correlation of 0.95 [0.90, 0.98] with "
        "ablation. These are 60 drawn pairs of 2 decisions."
    )
    end = " For the 5% largest effects the median of linear over exact is 0.90."
    every = "it is 0.80 at layer 1 (75% of the signs are right); 0.92 at layer 4 (75% of the signs are right)."
    earlier = " With all pairs ablated, for SAEs of an earlier training, "
    assert attribution_in_short(OURS, [], ["one"]) == start + end
    assert attribution_in_short(OURS, layers, ["one", "four"]) == f"{start} With all pairs ablated {every}{end}"
    assert attribution_in_short(OURS, layers, ["one"]) == start + earlier + every + end
