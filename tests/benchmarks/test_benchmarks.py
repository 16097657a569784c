"""The comparison: real child processes at a tiny shape, and how targets are checked."""

import copy
import sys

import pytest
import torch

from lmm_sae_nb.benchmarks.comparison import by_shape, check_targets, compare, measured
from lmm_sae_nb.benchmarks.systems import SYSTEMS, Shape
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.files import read_json, write_json

TINY = Shape(64, 32, 256, 8)


@pytest.mark.slow
def test_our_systems_are_measured_each_in_a_separate_process(tmp_path):
    found = compare(None, [TINY], (1,), warm=1, least=2, budget=0)
    write_json(tmp_path / "benchmarks.json", found)
    assert read_json(tmp_path / "benchmarks.json") == found
    assert [row["system"] for row in found["results"]] == ["ours", "ours, plain torch"]
    for row in found["results"]:
        assert Shape(row["tokens"], row["width"], row["latents"], row["k"]) == TINY
        assert row["turns"] == 2
        assert row["step_ms"] > 0 and row["floor_ms"] > 0 and row["ratio"] > 0
        assert 50 < row["peak_mb"] < 4000
    assert {"cpu", "cores", "vectors", "system", "busy"} == found["machine"].keys()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # +cu130 is not in both


@pytest.mark.slow
def test_a_child_that_fails_says_why():
    with pytest.raises(
        RuntimeError, match=r"ours at \(64, 32, 4, 8\), 1 threads, failed:[\s\S]*k is 8, with 4 latents"
    ):
        measured(sys.executable, "ours", Shape(64, 32, 4, 8), 1)


@pytest.mark.parametrize("system", [name for name, (_, peer) in SYSTEMS.items() if not peer])
def test_a_timed_step_trains(system, monkeypatch):
    from lmm_sae_nb.sae import adam, kernels, losses  # noqa: F401  before TopKSAE has a stand-in

    monkeypatch.setattr(kernels, "COMPILED", True)  # and put back what the system switches
    before = TopKSAE(32, 256, 8)
    made = []
    monkeypatch.setattr("lmm_sae_nb.sae.topk.TopKSAE", lambda *sizes: made.append(copy.deepcopy(before)) or made[-1])
    SYSTEMS[system][0](TINY)(torch.randn(64, 32))
    (trained,) = made
    for name, weights in before.named_parameters():
        assert not torch.equal(weights, trained.get_parameter(name)), name


def row(system, width, ratio, peak_mb, threads=1):
    return {"system": system, "width": width, "threads": threads, "ratio": ratio, "peak_mb": peak_mb}


def test_a_target_is_met_by_ratio_speed_and_memory_together():
    good = [row("ours", 256, 2.0, 500), row("sparsify", 256, 4.0, 600), row("sae-lens", 256, 9.0, 501)]
    (found,) = check_targets(good)
    assert (found["faster"], found["leanest_peer_mb"], found["met"]) == (2.0, 501, True)
    for worse in (row("ours", 256, 2.2, 500), row("ours", 256, 2.0, 501)):
        assert not check_targets([worse, *good[1:]])[0]["met"]
    assert not check_targets([good[0], row("sparsify", 256, 3.1, 600)])[0]["met"]


def test_widths_without_a_peer_and_other_numbers_of_threads_are_left_out():
    assert check_targets([row("ours", 256, 2.0, 500), row("ours, plain torch", 256, 3.0, 600)]) == []
    assert check_targets([row("ours", 7, 2.0, 500), row("sparsify", 7, 4.0, 600)]) == []
    assert check_targets([row("ours", 256, 2.0, 500, threads=2), row("sparsify", 256, 4.0, 600, threads=2)]) == []


def test_a_table_by_shape_keeps_one_number_of_threads():
    sizes = {"tokens": 1, "latents": 8, "k": 2}
    rows = [
        row("ours", 4, 1.5, 10) | sizes,
        row("peer", 4, 3.0, 20) | sizes,
        row("ours", 4, 9.9, 10, threads=2) | sizes,
    ]
    assert list(by_shape(rows, "ratio").values()) == [{"ours": 1.5, "peer": 3.0}]
