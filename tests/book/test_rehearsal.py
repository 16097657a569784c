"""What a user of the preset `small` types, on a local hub with narrow random models under their true names.

`python tests/helpers/rehearse.py FOLDER --preset paper` does the same for `paper`, with its numbers of latents and
processes. It takes too long and too much memory for CI.
"""

import os
import subprocess
import sys

import pytest

from lmm_sae_nb.support.notebooks import sources
from lmm_sae_nb.support.presets import preset

SIZES = (int, float)


def differences(one: object, other: object, path: str = ""):
    """The values of two presets that differ, with their places."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one.keys() | other.keys():
            yield from differences(one.get(name), other.get(name), f"{path}.{name}")
    elif one != other:
        yield path, one, other


@pytest.mark.parametrize(("name", "file"), [("small", "rehearsal.yaml"), ("paper", "rehearsal_paper.yaml")])
def test_a_rehearsal_differs_from_its_preset_by_sizes_alone(root, name, file):
    given = preset(root / f"notebooks/params/{name}.yaml")
    changed = list(differences(given, preset(root / "tests/helpers" / file)))
    assert changed
    for path, before, after in changed:
        for value in (before, after):
            parts = value if isinstance(value, list) else [value]
            assert all(isinstance(each, SIZES) for each in parts), f"{path}: {before!r} became {after!r}"


@pytest.mark.slow
def test_prepare_and_make_book_run_for_small_from_a_local_hub(root, tmp_path):
    """Page 08 runs twice: with questions of both answers, none of one is answered wrong; then with none that is."""
    command = [sys.executable, str(root / "tests/helpers/rehearse.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    shown = {page.stem for page in (tmp_path / "project/book/_build/html/notebooks").glob("*.html")}
    assert shown == {source.stem for source in sources(root)}
