"""The command for a GPU runs at small size in every precision, and leaves out parts that come too late."""

import json
from types import SimpleNamespace

import pytest
import torch

from lmm_sae_nb.benchmarks import gpu
from lmm_sae_nb.full_scale.costs import Device
from lmm_sae_nb.sae.topk import TopKSAE

CPU = torch.device("cpu")
SPEED = Device("it", 1.0, 1e10, 1e10, 1e10, 1e10)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("precision", gpu.PRECISIONS)
def test_a_step_takes_time_in_every_precision(precision, dead):
    cost = gpu.step_cost(gpu.SMALL, precision, CPU, dead=dead, speed=SPEED)
    assert cost["ratio"] == pytest.approx(cost["seconds"] / cost["product_seconds"]) and cost["seconds"] > 0
    assert cost["fraction_of_peak"] == pytest.approx(2 * 64 * 32 * 256 / cost["seconds"] / 1e10)
    assert torch.get_float32_matmul_precision() == "highest", "the precision is what it was"


def test_the_prediction_of_a_step_by_hand():
    """64 tokens, width 32, 256 latents, k 4: product, TopK, sparse products, Adam."""
    seconds = [2 * 64 * 32 * 256, 4 * 4 * 64 * 256, 4 * 4 * 64 * 4 * 32, 4 * 18 * 2 * 256 * 32]
    assert gpu.predicted_step(gpu.SMALL, "tf32", SPEED, dead=False) == pytest.approx(sum(seconds) / 1e10)
    more = [2 * 64 * 32 * 32, 4 * 4 * 64 * 16 * 32]  # 32 dead latents, of which AuxK takes 16
    assert gpu.predicted_step(gpu.SMALL, "tf32", SPEED, dead=True) == pytest.approx(sum(seconds + more) / 1e10)


def test_rounding_counts_the_latents_that_stay(monkeypatch):
    """On a CPU TF32 changes nothing; bfloat16 keeps what sets of latents have in common."""
    found = gpu.rounding(gpu.SMALL, CPU)
    assert found["same_latents_tf32"] == 1 and found["fvu_tf32"] == found["fvu_float32"]
    kept, encode = [], TopKSAE.encode

    def noted(sae, x, k=None):
        latents = encode(sae, x, k)
        kept.append([set(row) for row in latents.indices.tolist()])
        return latents

    monkeypatch.setattr(TopKSAE, "encode", noted)
    same = gpu.rounding(gpu.SMALL, CPU)["same_latents_bfloat16"]
    exact, _, rounded = kept
    assert same == pytest.approx(sum(len(a & b) for a, b in zip(exact, rounded, strict=True)) / (64 * 4))


def test_a_part_that_comes_too_late_says_so():
    assert set(gpu.measure(gpu.SMALL, CPU, minutes=-1).values()) == {"the time was up"}


def test_a_page_s_metrics_stand_beside_those_of_the_cpu(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_train_sae.py").write_text("")
    (tmp_path / "data/artifacts/gpu/train").mkdir(parents=True)
    monkeypatch.setattr(gpu, "project_root", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="make world"):
        gpu.page_metrics("01")
    (tmp_path / "data/artifacts/tiny/world/train").mkdir(parents=True)
    known = {name: SimpleNamespace(values=[n, 9]) for n, name in enumerate(gpu.PAGES["01"][1])}
    monkeypatch.setattr(gpu, "read_study", lambda path: SimpleNamespace(stages={"train": known}))
    monkeypatch.setattr(gpu.notebooks, "parameters", lambda source: {"seeds_study": 0})
    monkeypatch.setattr(gpu.notebooks, "convert", lambda source, notebook: None)
    asked = []
    monkeypatch.setattr(gpu.notebooks, "execute", lambda notebook, out, values, **how: asked.append(values))
    monkeypatch.setattr(gpu, "Stage", lambda run, stage: SimpleNamespace(metrics=dict.fromkeys(known, 5)))
    row = gpu.page_metrics("01")
    assert asked == [{"run": "gpu", "seeds_study": ""}] and row.pop("seconds") >= 0
    assert list(row.values()) == [5, 0, 5, 1, 5, 2] and "fvu, on the CPU" in row
    assert json.loads(json.dumps(row)) == row
