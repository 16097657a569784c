"""What runs on the CPU runs on an accelerator. PyTorch cannot forget a device, so this needs a process of its own."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_calls_on_an_accelerator_give_what_they_give_on_the_cpu(root):
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "--timeout=600", "tests/helpers/on_accelerator.py"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout.splitlines()[-1]
