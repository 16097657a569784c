"""The comparison of the ways: its numbers against each way called alone, its summary against one by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import make, noise
from pydantic import TypeAdapter
from scipy.stats import spearmanr

from lmm_sae_nb.attribute.attribution import exact, greedy_decision, integrated, linear
from lmm_sae_nb.attribute.study import ComparedDecision, agreement_metrics, compare_ways, joined, small_saes
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE

ROWS = [{"question": question, "image": noise(seed=n)} for n, question in enumerate(("why ?", "how ?", "is it so ?"))]


@pytest.fixture(scope="module")
def places() -> list[SAEInPlace]:
    lmm = LMM(*make("picture_world"))
    saes = [TopKSAE(lmm.width, 30, 4, generator=torch.Generator().manual_seed(n)).requires_grad_(False) for n in (1, 2)]
    return [SAEInPlace(lmm, sae, layer) for sae, layer in zip(saes, (1, 0), strict=True)]


@pytest.fixture(scope="module")
def compared(places) -> list[ComparedDecision]:
    return compare_ways(places, [ROWS, ROWS[:1]], pairs=6, path_pairs=2, seed=5, many_steps=9, many_decisions=2)


def test_many_steps_are_those_of_the_first_decisions_and_change_no_draw(places, compared):
    assert [decision.ig_many is not None for decision in compared] == [True, True, False, False]
    choice = greedy_decision(places[0].lmm, ROWS[1]["question"], ROWS[1]["image"])
    few, many = (integrated(places[0], choice, steps=steps) for steps in (4, 9))
    active = few.latents.acts > 0
    between = spearmanr(few.values[active].numpy(), many.values[active].numpy()).statistic
    assert compared[1].spearman_steps == pytest.approx(between, abs=1e-3)
    for value, rough in zip(compared[1].ig_many, compared[1].ig, strict=True):
        there = ((many.values - value).abs() < 1e-6) & ((few.values - rough).abs() < 1e-6)
        assert (there & active).any()
    alone = compare_ways(places[:1], [ROWS], pairs=6, path_pairs=2, seed=5)
    assert joined(alone, "linear") == pytest.approx(joined(compared[:3], "linear"), abs=1e-6)


def test_each_pair_has_the_numbers_of_each_way_alone(places, compared):
    assert [decision.layer for decision in compared] == [1, 1, 1, 0]
    for decision, row in zip(compared, ROWS, strict=False):
        choice = greedy_decision(places[0].lmm, row["question"], row["image"])
        parts = linear(places[0], choice)
        assert len(decision.exact) == 6
        assert sum(value is not None for value in decision.separate_paths) == 2
        for value, ablated in zip(decision.linear, decision.exact, strict=True):
            there = ((parts.values - value).abs() < 1e-6) & (parts.latents.acts > 0)
            assert there.any()
            alone = exact(places[0], choice, there)
            assert (alone[there] - ablated).abs().min() < 1e-5


def test_the_same_seed_draws_the_same_pairs_and_another_one_does_not(places, compared):
    again = compare_ways(places, [ROWS, ROWS[:1]], pairs=6, path_pairs=2, seed=5)
    assert joined(again, "linear") == pytest.approx(joined(compared, "linear"), abs=1e-6)
    other = compare_ways(places, [ROWS, ROWS[:1]], pairs=6, path_pairs=2, seed=6)
    assert joined(other, "linear") != pytest.approx(joined(compared, "linear"), abs=1e-6)


def test_the_result_is_read_back_from_json_as_it_was(compared):
    kind = TypeAdapter(list[ComparedDecision])
    assert kind.validate_json(kind.dump_json(compared)) == compared


def decision(layer: int, seed: int) -> ComparedDecision:
    exact, linear, ig = np.random.default_rng(seed).normal(size=(3, 5)).tolist()
    return ComparedDecision(layer, exact, linear, ig, [exact[0], None, -exact[2], None, exact[4]])


def test_the_summary_is_the_mean_over_decisions_and_separate_paths_are_joined():
    few = [decision(3, n) for n in range(4)] + [decision(7, n) for n in range(4, 7)]
    metrics = agreement_metrics(few, layer=3)
    assert metrics["decisions"] == 4 and metrics["pairs"] == 20
    for end, group in {"": few[:4], "_layer_7": few[4:]}.items():
        by_hand = [spearmanr(each.exact, each.ig).statistic for each in group]
        assert metrics[f"spearman_ig{end}"] == pytest.approx(np.mean(by_hand))
        signs = [np.mean(np.multiply(each.exact, each.linear) > 0) for each in group]
        assert metrics[f"sign_linear{end}"] == pytest.approx(np.mean(signs))
        assert metrics[f"sign_linear{end}_low"] <= metrics[f"sign_linear{end}"] <= metrics[f"sign_linear{end}_high"]
        assert metrics[f"sign_separate_paths{end}"] == pytest.approx(2 / 3)
        assert metrics[f"pairs_separate_paths{end}"] == 3 * len(group)
        pairs = [pair for each in group for pair in zip(each.exact, each.linear, strict=True)]
        ablated, approximated = max(pairs, key=lambda pair: abs(pair[0]))  # 5% of these few pairs is one
        assert metrics[f"ratio_linear_largest{end}"] == pytest.approx(approximated / ablated)
    assert all(math.isfinite(value) for value in metrics.values())
    assert "spearman_ig_many" not in metrics


def test_few_and_many_steps_are_compared_where_both_are_known():
    both = [replace(decision(3, n), ig_many=decision(3, n + 50).ig, spearman_steps=0.1 * n) for n in range(3)]
    metrics = agreement_metrics([*both, decision(3, 9)], layer=3)
    assert metrics["decisions_many_steps"] == 3 and metrics["spearman_steps"] == pytest.approx(0.1)
    for name, way in {"spearman_ig_many": "ig_many", "spearman_ig_few": "ig"}.items():
        by_hand = [spearmanr(each.exact, getattr(each, way)).statistic for each in both]
        assert metrics[name] == pytest.approx(np.mean(by_hand))


@pytest.mark.slow
def test_small_saes_are_trained_at_each_layer_and_read_the_next_time(places, tmp_path):
    samples = [row | {"answer": "so"} for row in ROWS]
    settings = dict(n_latents=12, k=2, lr=2e-3, steps=2, batch_tokens=1024, dead_after_tokens=50_000)
    settings |= dict(seed=0, folder=tmp_path)
    first = small_saes(places[0].lmm, samples, [0, 2], **settings)
    assert not first.skipped and not first.converted
    first = first.places
    assert [(place.layer, place.sae.n_latents) for place in first] == [(0, 12), (2, 12)]
    broken = [*samples, samples[0] | {"image": {"bytes": b"none", "path": None}}]
    skipping = settings | {"folder": tmp_path / "broken", "unreadable": "skip"}
    assert [*small_saes(places[0].lmm, broken, [0], **skipping).skipped] == [len(samples)]
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    again = small_saes(places[0].lmm, samples, [0, 2], **settings).places
    assert all(torch.equal(one.sae.W_dec, other.sae.W_dec) for one, other in zip(first, again, strict=True))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == times
    assert small_saes(places[0].lmm, samples, [], **settings).places == []
