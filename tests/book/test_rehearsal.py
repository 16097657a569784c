"""What a user of the preset `small` types, on a local hub with narrow random models under their true names."""

import os
import subprocess
import sys

import pytest

from lmm_sae_nb.support.presets import preset

SIZES = (int, float)


def differences(one: object, other: object, path: str = ""):
    """The values of two presets that differ, with their places."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one.keys() | other.keys():
            yield from differences(one.get(name), other.get(name), f"{path}.{name}")
    elif one != other:
        yield path, one, other


def test_the_rehearsal_differs_from_the_preset_by_sizes_alone(root):
    small = preset(root / "notebooks/params/small.yaml")
    changed = list(differences(small, preset(root / "tests/helpers/rehearsal.yaml")))
    assert changed
    for path, before, after in changed:
        for value in (before, after):
            parts = value if isinstance(value, list) else [value]
            assert all(isinstance(each, SIZES) for each in parts), f"{path}: {before!r} became {after!r}"


@pytest.mark.slow
def test_prepare_and_pages_of_small_run_from_a_local_hub(root, tmp_path):
    """05 takes longer than all others together. 08 needs a model that was taught something wrong."""
    pages = "01_", "02_", "03_", "04_", "06_", "07_"
    command = [sys.executable, str(root / "tests/helpers/rehearse.py"), str(tmp_path), *pages]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    for page in pages:
        assert f"\n{page}" in done.stdout
