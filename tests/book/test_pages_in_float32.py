"""Pages run at toy size on a pretend accelerator. Each dtype has a file, so that they run side by side."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_every_page_runs_on_an_accelerator_in_float32_behind_an_mlp(root, tmp_path):
    command = [sys.executable, str(root / "tests/helpers/toy_pages.py"), str(tmp_path / "project"), "float32"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr[-4000:]
    assert "A4_controls_and_metrics: " in done.stdout
