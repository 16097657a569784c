"""Every pair ablated: measured once, summarised, and recorded by layer."""

import pytest
import torch
from models import make

from lmm_sae_nb.attribute.agreement import agreement
from lmm_sae_nb.attribute.attribution import exact, greedy_decision, linear
from lmm_sae_nb.benchmarks.ablations import measure, record, summary
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.files import read_json

SAMPLE = {"question": "what is it ?", "image": None, "seed": 7}


def test_every_pair_is_measured_once_and_read_the_next_time(tmp_path):
    lmm = LMM(*make("llava_next"))
    saes = (TopKSAE(lmm.width, 30, 4, generator=torch.Generator().manual_seed(n)).requires_grad_(False) for n in (1, 9))
    place, other = (SAEInPlace(lmm, sae, 1) for sae in saes)
    row = measure(place, SAMPLE, tmp_path / "0")
    choice = greedy_decision(lmm, "what is it ?", None)
    parts, by_ablation = linear(place, choice), exact(place, choice)
    expected = agreement(by_ablation, parts.values)
    assert row["pairs"] == int((parts.latents.acts > 0).sum()) == int(by_ablation.isfinite().sum())
    assert (row["spearman_linear"], row["sign_linear"]) == pytest.approx(expected[:2], abs=1e-3)
    assert [file.name for file in (tmp_path / "0").iterdir()] == ["done.safetensors"]
    assert measure(other, SAMPLE, tmp_path / "0") == row  # read, not measured
    with pytest.raises(ValueError, match="holds the ablations of .*what is it.*, not of .*where.*; delete"):
        measure(place, SAMPLE | {"question": "where is it ?"}, tmp_path / "0")


def test_a_summary_has_the_means_and_all_decisions():
    row = {"pairs": 5, "spearman_linear": 0.8, "sign_linear": 0.9, "spearman_ig": 0.4, "sign_ig": 0.5}
    found = summary([row, row | {"spearman_linear": 0.0}], 1, {"sae": "a"})
    assert found["decisions"] == 2 and found["pairs"] == 10 and found["layer"] == 1 and found["sae"] == "a"
    assert found["spearman_linear"]["mean"] == pytest.approx(0.4)
    assert len(found["by_decision"]) == 2


def test_a_layers_row_gives_way_to_one_of_as_many_decisions(tmp_path):
    for layer, decisions, pairs in ((4, 2, 5), (1, 1, 2), (4, 1, 3), (4, 2, 7)):
        record(tmp_path / "rows.json", {"layer": layer, "decisions": decisions, "pairs": pairs})
    rows = [[row["layer"], row["decisions"], row["pairs"]] for row in read_json(tmp_path / "rows.json")["layers"]]
    assert rows == [[1, 1, 2], [4, 2, 7]]
