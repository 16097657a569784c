"""Results of other SAEs are shown only beside an SAE of the same recipe."""

import json
from types import SimpleNamespace

import pytest

from lmm_sae_nb.show.panel import read_panel
from lmm_sae_nb.show.seed_study import read_study


@pytest.fixture
def run(root, tmp_path, monkeypatch):
    """Make a run whose notebook 01 had the studied parameters, or others."""
    recipe = json.loads((root / "book/seeds.json").read_text())["recipe"]["pages"]["01_train_sae"]
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)

    def made(**changes):
        (folder := tmp_path / "data/artifacts/mine/train").mkdir(parents=True, exist_ok=True)
        record = {"params": recipe | {"seed": 3} | changes, "inputs": {}}
        (folder / "manifest.json").write_text(json.dumps(record))
        return SimpleNamespace(run="mine")

    return made


@pytest.mark.parametrize(("read", "file"), [(read_study, "seeds.json"), (read_panel, "panel.json")])
def test_a_study_is_left_out_beside_an_sae_of_another_recipe(root, run, unchecked, read, file):
    assert read(root / "book" / file, run())
    for changes in ({"n_latents": 64}, {"model": "org/other"}):
        assert read(root / "book" / file, run(**changes)) is None
    assert read(root / "book" / file, SimpleNamespace(run="not begun")) is None
    assert read(root / "book" / file) and read("", run()) is None


def test_a_ready_sae_is_of_no_recipe(root, run, unchecked):
    ready = {"sae": "some/repository", "hookpoint": "", "revision": "", "k": 0}
    assert read_study(root / "book/seeds.json", run(ready=ready)) is None
