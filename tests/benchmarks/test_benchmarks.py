"""The comparison's runner: real child processes at a tiny shape, and how the bars are read."""

import copy
import sys

import pytest
import torch

from lmm_sae_nb.benchmarks import comparison, systems
from lmm_sae_nb.benchmarks.comparison import bars, compare, measured
from lmm_sae_nb.benchmarks.systems import SYSTEMS, Shape
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.files import read_json, write_json

TINY = Shape(64, 32, 256, 8)


def test_our_systems_are_measured_in_processes_of_their_own(tmp_path):
    found = compare(SAEInPlace(None, [TINY], (1,)), warm=1, least=2, budget=0)
    write_json(tmp_path / "benchmarks.json", found)
    assert read_json(tmp_path / "benchmarks.json") == found
    assert [row["system"] for row in found["results"]] == ["ours", "ours, plain torch"]
    for row in found["results"]:
        assert Shape(row["tokens"], row["width"], row["latents"], row["k"]) == TINY
        assert row["turns"] == 2
        assert row["step_ms"] > 0 and row["floor_ms"] > 0 and row["ratio"] > 0
        assert 50 < row["peak_mb"] < 4000
    assert {"cpu", "cores", "vectors", "system", "busy"} == found["machine"].keys()
    assert found["versions"]["torch"] == torch.__version__


def test_a_child_that_fails_says_why():
    with pytest.raises(
        RuntimeError, match=r"ours at \(64, 32, 4, 8\), 1 threads, failed:[\s\S]*k is 8, with 4 latents"
    ):
        measured(sys.executable, "ours", Shape(64, 32, 4, 8), 1)


@pytest.mark.parametrize("system", [name for name, (_, peer) in SYSTEMS.items() if not peer])
def test_a_timed_step_trains(system, monkeypatch):
    from lmm_sae_nb.sae import kernels

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


def test_bars_are_met_by_ratio_speed_and_memory_alike():
    good = [row("ours", 256, 2.0, 500), row("sparsify", 256, 4.0, 600), row("sae-lens", 256, 9.0, 501)]
    assert bars(good) == [
        {
            "width": 256,
            "ratio": 2.0,
            "at_most": 2.1,
            "faster": 2.0,
            "at_least": 1.6,
            "peak_mb": 500,
            "leanest_peer_mb": 501,
            "met": True,
        }
    ]
    for worse in (row("ours", 256, 2.2, 500), row("ours", 256, 2.0, 501)):
        assert not bars([worse, *good[1:]])[0]["met"]
    assert not bars([good[0], row("sparsify", 256, 3.1, 600)])[0]["met"]


def test_bars_leave_out_what_was_not_compared_and_our_own_other_way():
    assert bars([row("ours", 256, 2.0, 500), row("ours, plain torch", 256, 3.0, 600)]) == []
    assert bars([row("ours", 7, 2.0, 500), row("sparsify", 7, 4.0, 600)]) == []
    assert bars([row("ours", 256, 2.0, 500, threads=2), row("sparsify", 256, 4.0, 600, threads=2)]) == []


def test_the_committed_measurement_is_whole():
    found = read_json(comparison.project_root() / "book" / "benchmarks.json")
    rows = {(r["system"], r["tokens"], r["width"], r["latents"], r["k"], r["threads"]) for r in found["results"]}
    assert rows == {(name, *shape, n) for name in SYSTEMS for shape in comparison.SHAPES for n in (1, 2)}
    assert all(r["turns"] >= 3 for r in found["results"])


def test_the_peers_that_are_installed_are_those_that_are_run():
    named = {peer for _, peer in SYSTEMS.values() if peer}
    assert named == {pin.split("==")[0] for pin in comparison.PEERS}
    assert systems.Shape(1024, 4096, 32768, 256) in comparison.SHAPES
