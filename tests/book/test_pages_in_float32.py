"""Pages run at toy size on a pretend accelerator. Each dtype has a file, so that they run side by side."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
PAGES = ("01", "02", "03", "04")  # those that read the ground truth most; all pages run in bfloat16


def test_pages_run_on_an_accelerator_in_float32(root, tmp_path):
    command = [sys.executable, str(root / "tests/helpers/toy_pages.py"), str(tmp_path / "project"), "float32", *PAGES]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr[-4000:]
    assert "04_score_interpretations: " in done.stdout
