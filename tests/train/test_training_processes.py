"""One process and several train the same SAE: real processes, forked by a notebook or started by accelerate."""

import io
import os
import sys

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from forks import started
from trainings import SAMPLES, run, told, train, train_and_die, train_together

from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.train.launch import _message, _send, job, launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert run(train, folder) == 0
    return folder


def assert_same(one, other):
    """Weights and histories agree to rounding, which Adam makes the larger where a gradient is almost nothing."""
    for ours, theirs in zip(TopKSAE.load(one).parameters(), TopKSAE.load(other).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)  # Adam steps are 2e-3
    for ours, theirs in zip(told(one)[1], told(other)[1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, {}),
        (2, {"accumulate": 2, "steps": 3}),
        (3, {"batch_tokens": 8, "buffer_tokens": 24, "batch_samples": 1}),  # shares of a batch differ, some are empty
    ],
)
def test_forked_processes_train_the_same_sae(alone, tmp_path, processes, settings):
    if settings:
        alone = tmp_path / "alone"
        assert run(train, alone, settings) == 0
    assert run(train_together, tmp_path / "together", processes, settings) == 0
    assert_same(alone, tmp_path / "together")


def test_two_processes_continue_what_one_began(alone, tmp_path):
    assert run(train_and_die, tmp_path / "run", 30) < 0
    assert list((tmp_path / "run" / "checkpoint").iterdir())
    assert run(train_together, tmp_path / "run", 2, {}) == 0
    assert_same(alone, tmp_path / "run")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "samples"
    features = Features(image=Image(), question=Value("string"), answer=Value("string"))
    rows = [{**row, "question": "what is on the left ?", "answer": "a red ball"} for row in SAMPLES]
    Dataset.from_list(rows, features=features).save_to_disk(str(path))
    return path


def test_accelerate_launch_trains_the_same_sae_and_sends_its_rows(root, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(root))
    model, told_rows = root / "data/models/tiny-llava-next", []
    settings = dict(n_latents=96, k=8, steps=4, batch_tokens=256, buffer_tokens=512, batch_samples=2, log_every=1)
    on_log = lambda rows: told_rows.append(len(rows))  # noqa: E731
    together = launch(2, model, dataset, 4, folder=tmp_path / "together", on_log=on_log, **settings)
    job(model, dataset, 4, folder=tmp_path / "alone", **settings)
    assert_same(tmp_path / "alone", tmp_path / "together")
    assert told_rows == [1, 2, 3, 4] == [row["step"] for row in together.history]


def test_an_error_in_a_process_is_raised(root, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(root))
    with pytest.raises(RuntimeError, match="2 processes failed: FileNotFoundError: .*nowhere"):
        launch(2, root / "data/models/tiny-llava-next", tmp_path / "nowhere", 4, folder=tmp_path)


def _send_many(pipe: int) -> None:
    sys.stdout = io.TextIOWrapper(io.FileIO(pipe, "w"), write_through=True)  # as it is under `python -u`
    for step in range(20_000):
        _send(row={"step": step, "loss": 0.5})


def test_messages_of_several_processes_stay_in_lines():
    """As torch's launcher starts them: unbuffered, into one pipe."""
    reading, writing = os.pipe()
    processes = [started(_send_many, writing)[0] for _ in range(2)]
    os.close(writing)
    with open(reading) as told:
        lines = told.readlines()
    for process in processes:
        process.join()
    assert sorted(_message(line)["row"]["step"] for line in lines) == sorted([*range(20_000)] * 2)
    assert _message("{'a': 1}\n") == _message('{"a": 1}{"a": 1}\n') == _message("loading\n") == {}
