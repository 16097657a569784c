"""What page 05 says in words follows from the numbers, also where they are others than those of `tiny`."""

import pytest
from scored import scores_of

from lmm_sae_nb.compare.depth import SteeredLatent
from lmm_sae_nb.compare.report import score_metrics
from lmm_sae_nb.compare.scored import ScoredSAE
from lmm_sae_nb.compare.sentences import (
    above_chance,
    fraction_difference,
    kind_shift_sentences,
    name_counts_sentences,
    steering_sentences,
    within_kinds_sentences,
)
from lmm_sae_nb.score.scores import Column, Comparison
from lmm_sae_nb.support.intervals import proportion

CLIP = Column("clip", "paper")


def of(hits: int, cases: int, level: float = 0.99):
    return proportion([n < hits for n in range(cases)], level)


def clamped(hits: int, cases: int) -> list[SteeredLatent]:
    return [SteeredLatent(n, "cat", "a cat" if n < hits else "a dog") for n in range(cases)]


def by_kind(**values: list[float]):
    """Scores of latents: kind to the score of each latent."""
    kinds = [kind for kind, row in values.items() for _ in row]
    return scores_of(kinds, {CLIP: [Comparison(value) for row in values.values() for value in row]})


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    [((48, 80), (56, 70), 0.0524, 0.3339), ((3, 10), (9, 10), 0.1705, 0.8090), ((0, 10), (10, 10), 0.6075, 1)],
)
def test_the_interval_of_a_difference_of_fractions_is_the_one_that_newcombe_published(one, other, low, high):
    """Statistics in Medicine 17 (1998), Table II, method 10."""
    found = fraction_difference(of(*one, 0.95), of(*other, 0.95))
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_few_latents_without_a_hit_do_not_differ_from_some_hits():
    counts, text = steering_sentences({1: clamped(7, 19), 3: clamped(4, 15), 5: [], 6: clamped(0, 7)})
    assert "7 of 19 at layer 1" in counts and "layer 5" not in counts
    assert "none of 7 steers. The interval reaches up to 49%" in text
    assert text.endswith("we cannot say that this differs from layer 1 or layer 3.")


def test_many_latents_differ_and_one_layer_is_compared_with_none():
    _, text = steering_sentences({1: clamped(90, 100), 3: clamped(50, 100), 6: clamped(52, 100)})
    assert "52 of 100 steer." in text and "less than at layer 1." in text and "differs from layer 3." in text
    _, text = steering_sentences({1: clamped(2, 100), 6: clamped(52, 100)})
    assert "more than at layer 1" in text and "cannot" not in text
    assert len(steering_sentences({6: clamped(1, 3)})) == 1
    assert steering_sentences({6: []}) == []


def test_kinds_that_vanish_appear_or_change_are_named_with_their_numbers():
    few = by_kind(colour=[1] * 3, word=[1] * 1)
    gone, unclear = kind_shift_sentences(few, by_kind(colour=[1] * 4), [1, 3, 6])
    assert gone == "From layer 1 to layer 6: the kind word is gone (1 of 4 names at layer 1)."
    assert unclear.startswith("No kind changes measurably") and "There are 4 and 4 names" in unclear
    many = by_kind(colour=[1] * 10, object=[1] * 90)
    shift, clear = kind_shift_sentences(many, by_kind(colour=[1] * 90, scene=[1] * 5, face=[1] * 5), [1, 6])
    assert "object is gone (90 of 100" in shift and "scene and face are new (10 of 100 names at layer 6)" in shift
    assert "ises measurably: colour, from 10% to 90%" in clear and "alls measurably: object" in clear
    same, _ = kind_shift_sentences(few, few, [1, 6])
    assert same == "From layer 1 to layer 6: no kind of names appears or vanishes."


def test_a_lead_over_all_that_kinds_without_a_row_make_is_ascribed_to_them():
    one = by_kind(scene=[40.0, 41, 42], colour=[45.0, 46, 47], object=[1.0, 2] * 5)
    first, whole, reason = within_kinds_sentences(
        one, by_kind(scene=[40.0, 41, 42], colour=[45.0, 46, 47]), ("A", "B"), CLIP
    )
    assert "scene does not differ measurably" in first and "No model clearly leads" in first
    assert whole.startswith("Over all kinds, the score of B is higher (26.")
    assert "10 of 16 names of A (mean score 1.5) are of kinds without a row" in reason
    assert "score of B does not differ" in reason


def test_a_model_that_leads_within_every_kind_is_named():
    low, high = by_kind(scene=[10.0, 11], colour=[20.0, 21]), by_kind(scene=[50.0, 51], colour=[60.0, 61])
    for pair, titles in (((low, high), ("A", "B")), ((high, low), ("B", "A"))):
        first, _ = within_kinds_sentences(*pair, titles, CLIP)
        assert first.endswith("B leads within each of these kinds.")
    mixed = by_kind(scene=[50.0, 51], colour=[1.0, 2])
    assert "No model clearly leads" in within_kinds_sentences(low, mixed, ("A", "B"), CLIP)[0]
    assert "no kind of names in common" in within_kinds_sentences(low, by_kind(word=[1.0, 2]), ("A", "B"), CLIP)[0]


def test_comparisons_are_counted_for_each_score():
    good = [Comparison(value, random=(0.0, 0.0), area=0.9) for value in (0.5, 0.6, 0.7)]
    scores = scores_of(["object"] * 3, {Column("iou", "paper"): good, CLIP: [Comparison(9.0, random=(1.0, 1.0))] * 3})
    scored = {"layer_1": ScoredSAE({}, scores), "layer_6": ScoredSAE({}, scores)}
    metrics = score_metrics(scored)
    assert above_chance(metrics, scored, "random") == (
        "4 of 4 comparisons (IoU, paper mode: 2 of 2 SAEs; CLIP score, paper mode: 2 of 2 SAEs)"
    )
    assert above_chance(metrics, scored, "moved") == "0 of 2 comparisons (IoU, paper mode: 0 of 2 SAEs)"


def test_names_of_each_sae_are_counted_where_a_truth_is_known():
    rows = {name: {n: {"outcome": "explained" if n < count else "refused"} for n in range(60)}
            for name, count in (("layer_3", 50), ("n_1", 14), ("k_8", 21))}  # fmt: skip
    metrics = {
        f"concept_accuracy_{name}{end}": value
        for name in rows
        for end, value in (("", 0.5), ("_low", 0.2), ("_high", 0.9))
    }
    (text,) = name_counts_sentences(metrics, rows, ["n_1", "layer_3", "k_8", "layer_3"], "layer_3")
    assert "50 names of the middle" in text and "14 to 21 names" in text and "0.70 wide" in text
    assert name_counts_sentences({}, rows, rows, "layer_3") == []
