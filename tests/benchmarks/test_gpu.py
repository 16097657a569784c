"""The command for a GPU runs at small size in every precision, and leaves out parts that come too late."""

import pytest
import torch

from lmm_sae_nb.benchmarks import gpu


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("precision", gpu.PRECISIONS)
def test_a_step_takes_time_in_every_precision(precision, dead):
    cost = gpu.step_cost(gpu.SMALL, precision, torch.device("cpu"), dead=dead)
    assert cost["ratio"] == pytest.approx(cost["seconds"] / cost["product_seconds"]) and cost["seconds"] > 0
    assert torch.get_float32_matmul_precision() == "highest", "the precision is what it was"


def test_a_part_that_comes_too_late_says_so():
    assert set(gpu.measure(gpu.SMALL, torch.device("cpu"), minutes=-1).values()) == {"the time was up"}
