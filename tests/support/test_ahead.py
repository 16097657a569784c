"""Items prepared in threads come in order, with their errors, and no more of them than memory may hold."""

import threading

import pytest
import torch

from lmm_sae_nb.support.ahead import ahead
from lmm_sae_nb.support.devices import allow_tf32


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_and_no_more_are_made_than_the_workers_may_hold(workers):
    taken = []

    def arguments():
        for n in range(20):
            taken.append(n)
            yield (n,)

    for n, result in enumerate(ahead(lambda n: 10 * n, arguments(), workers)):
        assert result == 10 * n
        assert len(taken) - (n + 1) <= workers


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("at", ["function", "arguments"])
def test_an_error_comes_where_its_result_would_have_come(workers, at):
    def fail(n):
        if n == 4:
            raise ValueError("row 4")
        return n

    rows = ((n,) for n in range(9))
    if at == "function":
        results = ahead(fail, rows, workers)
    else:
        results = ahead(lambda n: n, ((fail(n),) for (n,) in rows), workers)
    seen = []
    with pytest.raises(ValueError, match="row 4"):  # noqa: PT012
        for result in results:
            seen.append(result)
    assert seen == [0, 1, 2, 3]


def test_no_two_threads_use_one_tool_at_once_and_leaving_early_ends_all_threads():
    before, busy = threading.active_count(), {"a": threading.Lock(), "b": threading.Lock()}

    def use(tool, n):
        assert busy[tool].acquire(blocking=False)
        try:
            return n, sum(range(2000))
        finally:
            busy[tool].release()

    results = ahead(use, ((n,) for n in range(10**9)), 2, ["a", "b"])
    assert [next(results)[0] for _ in range(200)] == list(range(200))
    results.close()
    assert threading.active_count() == before


def test_tf32_is_set_for_a_gpu_alone_and_set_back_after_an_error():
    settings = torch.backends.cuda.matmul
    for before in (False, True):
        settings.allow_tf32 = before
        try:
            with allow_tf32(not before, torch.device("cpu")):
                assert settings.allow_tf32 == before
            with pytest.raises(ValueError, match="stop"), allow_tf32(not before, torch.device("cuda")):
                assert settings.allow_tf32 != before
                raise ValueError("stop")
            assert settings.allow_tf32 == before
        finally:
            settings.allow_tf32 = False
