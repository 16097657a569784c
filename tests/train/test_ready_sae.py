"""A ready SAE takes the place of a training: same folder, same checks, no training."""

import shutil
from pathlib import Path

import pytest
import torch
import toy_pages
from torch.testing import assert_close
from trainings import LMM_, train

from lmm_sae_nb.pictureworld.world.datasets import render
from lmm_sae_nb.sae.formats import format_of
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import SAE
from lmm_sae_nb.support import notebooks
from lmm_sae_nb.support.files import read_json
from lmm_sae_nb.support.presets import preset
from lmm_sae_nb.support.stages import Stage
from lmm_sae_nb.train.ready import use_ready_sae


def made(folder: Path, seed: int = 0, *, form: str = "", **more) -> SAE:
    sae = SAE(LMM_.width, 12, 3, generator=torch.Generator().manual_seed(seed), **more)
    torch.nn.init.normal_(sae.b_dec)
    sae.save(folder, form)
    return sae


@pytest.mark.parametrize("form", ["sparsify", "saelens", "dictionary_learning"])
def test_the_stage_s_folder_holds_the_sae_as_if_it_were_trained(tmp_path, form):
    sae = made(tmp_path / "mine", form=form)
    ready, _ = use_ready_sae(LMM_, 1, sae=tmp_path / "mine", folder=tmp_path / "train")
    place = SAEInPlace(LMM_, SAE.load(tmp_path / "train"), 1)
    assert place.sae.trained_on == ready.sae.trained_on == (1, LMM_.fingerprint(1)) and ready.history == []
    x = torch.randn(5, LMM_.width)
    assert_close(place.sae(x), sae(x))
    with pytest.raises(ValueError, match="trained on layer 1, not 0"):
        SAEInPlace(LMM_, SAE.load(tmp_path / "train"), 0)


def test_one_folder_of_several_and_k_are_taken_from_what_is_asked(tmp_path):
    made(tmp_path / "hub" / "layers.0")
    sae = made(tmp_path / "hub" / "layers.1", seed=1)
    found, checked = use_ready_sae(LMM_, 1, sae=tmp_path / "hub", hookpoint="layers.1", folder=tmp_path / "train")
    assert torch.equal(found.sae.W_enc, sae.W_enc) and "`layers.1`: the output of layer 1" in checked
    jump = SAE(LMM_.width, 12, 4, threshold=torch.full((12,), 0.5))
    jump.save(tmp_path / "jump")
    found, checked = use_ready_sae(LMM_, 1, sae=tmp_path / "jump", k=7, folder=tmp_path / "train")
    assert found.sae.k == SAE.load(tmp_path / "train").k == 7 and torch.equal(found.sae.threshold, jump.threshold)
    assert format_of(tmp_path / "train") == "saelens" and "was not checked" in checked


def test_a_second_call_writes_nothing_and_another_sae_or_a_training_replaces_the_first(tmp_path):
    folder, source = tmp_path / "train", tmp_path / "mine"
    made(source)
    _, checked = use_ready_sae(LMM_, 1, sae=source, folder=folder)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert use_ready_sae(LMM_, 1, sae=source, folder=folder)[1] == checked
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    other = made(source, seed=2)
    found, _ = use_ready_sae(LMM_, 1, sae=source, folder=folder)
    assert torch.equal(found.sae.W_enc, other.W_enc) and torch.equal(SAE.load(folder).W_enc, other.W_enc)
    shutil.copytree(folder, tmp_path / "again")
    trained = train(folder, {})
    assert trained.history and read_json(folder / "history.json")["rows"] == trained.history
    assert torch.equal(SAE.load(folder).W_enc, trained.sae.W_enc)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    SAE(LMM_.width + 2, 12, 3).save(tmp_path / "wide")
    made(tmp_path / "layers.0")
    trained = train(tmp_path / "old", {})
    assert trained
    for sae, layer, error in (
        ("wide", 1, "reads width"),
        ("layers.0", 1, "output of layer 0 .*, not of layer 1; set layer to 0"),
        ("old", 0, "trained on layer 1, not 0"),
    ):
        with pytest.raises(ValueError, match=error):
            use_ready_sae(LMM_, layer, sae=tmp_path / sae, folder=tmp_path / "train")
    with pytest.raises(FileNotFoundError, match="there is no SAE at .*nowhere"):
        use_ready_sae(LMM_, 1, sae=tmp_path / "nowhere", folder=tmp_path / "train")
    assert not (tmp_path / "train").exists()
    _, checked = use_ready_sae(LMM_, 1, sae=tmp_path / "old", folder=tmp_path / "train")
    assert "trained on layer 1 of this model" in checked


@pytest.mark.slow
def test_page_01_measures_a_ready_sae_and_keeps_it_where_other_pages_read_it(tmp_path, monkeypatch, capsys):
    toy_pages.make_project(tmp_path / "desk", world=False)
    monkeypatch.chdir(tmp_path / "desk")
    render(Path("data/artifacts/tiny/world"), {"train": 8, "cache": 2, "heldout": 4, "traps": 2})
    SAE(256, 64, 4).save("data/saes/blocks.1.hook_resid_post", "saelens")
    (source,) = (path for path in notebooks.sources(Path()) if path.stem.startswith("01"))
    values = preset(toy_pages.HERE / "toy.yaml")[source.stem]
    values["ready"] = {"sae": "data/saes", "hookpoint": "blocks.1.hook_resid_post", "revision": "", "k": 0}
    toy_pages.run_page(source, values)
    metrics = Stage("toy", "train").metrics
    assert metrics["l0"] == 4 and "fvu_components" in metrics and "train_seconds" not in metrics
    assert SAE.load("data/artifacts/toy/train").trained_on.layer == 1
    assert "data/saes" in Stage("toy", "train").manifest["inputs"]
    with pytest.raises(ValueError, match="output of layer 1 .*, not of layer 2"):
        toy_pages.run_page(source, values | {"layer": 2})
