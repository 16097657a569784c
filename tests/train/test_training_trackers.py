"""Each tracker gets every row; one that is not installed is named in the error."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest
from trainings import train


def test_a_tracker_that_is_not_known_or_not_installed_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no tracker 'mlflow'; choose one of none, tensorboard, trackio, wandb"):
        train(tmp_path / "run", {"tracker": "mlflow"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="the tracker wandb is not installed; pip install wandb"):
        train(tmp_path / "run", {"tracker": "wandb"})
    assert not (tmp_path / "run").exists()


def test_tensorboard(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = train(tmp_path / "run", {"tracker": "tensorboard"}).history
    events = reader.EventAccumulator(str(tmp_path / "run" / "logs" / "lmm-sae-nb")).Reload()
    assert [event.value for event in events.Scalars("fvu")] == pytest.approx([row["fvu"] for row in history])


def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    history = train(tmp_path / "run", {"tracker": "wandb"}).history
    (log,) = tmp_path.rglob("run-*.wandb")
    assert json.dumps(history[-1]["fvu"]).encode() in log.read_bytes()


def test_trackio(tmp_path):
    pytest.importorskip("trackio")
    program = "from pathlib import Path; from trainings import train; train(Path('run'), {'tracker': 'trackio'})"
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=settings, check=True)  # read when it is imported
    history = json.loads((tmp_path / "run" / "history.json").read_text())["rows"]
    with sqlite3.connect(tmp_path / "trackio" / "lmm-sae-nb.db") as db:
        rows = [json.loads(row[0]) for row in db.execute("select metrics from metrics order by step")]
    assert [row["fvu"] for row in rows] == pytest.approx([row["fvu"] for row in history])
