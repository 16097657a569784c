"""Several SAEs from one pass over the model are the same as trained alone, also after kills and faults."""

import json
import signal

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make
from trainings import (
    LMM_,
    RECIPES,
    SAMPLES,
    SETTINGS,
    run,
    told,
    train_and_die,
    train_one_of_several,
    train_several,
    train_together,
)

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.samples import pictured
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.train.token_buffer import Stream
from lmm_sae_nb.train.training import Recipe, train_saes


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncut") / "run"
    assert run(train_and_die, folder, 0, train_several) == 0
    return folder, json.loads((folder.parent / "calls.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("others", [{}, {"accumulate": 2, "steps": 3}])
def test_each_has_the_bits_that_it_has_alone(tmp_path, name, others):
    assert run(train_several, tmp_path / "several", others) == 0
    assert run(train_one_of_several, tmp_path / "alone", name, others) == 0
    assert told(tmp_path / "several" / name) == told(tmp_path / "alone")
    runs = [json.loads((folder / "history.json").read_text())["run"] for folder in tmp_path.glob("*/**/")
            if folder.name in ("alone", name)]  # fmt: skip
    assert len(runs) == 2 and runs[0] == runs[1]


@pytest.mark.slow
def test_each_knows_what_it_was_trained_on(uncut):
    for name, recipe in RECIPES.items():
        assert TopKSAE.load(uncut[0] / name).trained_on == (recipe.layer, LMM_.fingerprint(recipe.layer))
    assert not (uncut[0] / "checkpoint").exists()


def test_the_model_runs_once_for_all(tmp_path, monkeypatch):
    calls, hidden_states = [], type(LMM_).hidden_states

    def counted(self, prompt, layers, **how):
        calls.append(layers)
        return hidden_states(self, prompt, layers, **how)

    monkeypatch.setattr(type(LMM_), "hidden_states", counted)
    train_several(tmp_path / "several")
    together = len(calls)
    assert all(layers == [0, 2] for layers in calls)
    train_one_of_several(tmp_path / "alone", "low")
    assert len(calls) == 2 * together


@settings(deadline=None, max_examples=12)
@given(layers=st.lists(st.integers(0, 2), min_size=1, max_size=5), part=st.integers(0, 5))
def test_layers_lie_side_by_side_and_one_named_twice_is_there_once(layers, part):
    stream = Stream(LMM_, SAMPLES, layers, ("base", "text"), 3, 2)
    tokens = stream(part)
    assert tokens.shape[1] == len(set(layers)) * LMM_.width
    for layer, states in stream.by_layer(tokens).items():
        assert states.is_contiguous()
        assert torch.equal(states, Stream(LMM_, SAMPLES, layer, ("base", "text"), 3, 2)(part))


def test_samples_with_an_image_are_found_and_a_model_that_needs_one_learns_from_them(tmp_path):
    features = Features(image=Image(), question=Value("string"), answer=Value("string"))
    saved = Dataset.from_list(SAMPLES, features=features)
    with_image = [row["question"] for row in SAMPLES if row["image"]]
    assert [row["question"] for row in pictured(saved)] == [row["question"] for row in pictured(SAMPLES)] == with_image
    assert [row["question"] for row in pictured(saved.select([4, 2, 0, 1]))] == ["what is 2 ?", "what is 1 ?"]
    lmm, recipes = LMM(*make("instructblip")), {"one": Recipe(1, 24, 3)}
    with pytest.raises(ValueError, match="a Q-Former takes no text without an image, give one to each"):
        train_saes(lmm, SAMPLES, recipes, steps=2, batch_tokens=64, folder=tmp_path)
    assert (
        train_saes(lmm, pictured(saved), recipes, steps=2, batch_tokens=64, folder=tmp_path)["one"].sae.n_latents == 24
    )


@pytest.mark.slow
def test_killed_at_every_moment_of_writing(uncut, tmp_path):
    whole, calls = uncut
    a_checkpoint, the_end = range(calls // 2, calls // 2 + 13, 4), range(calls - 20, calls + 1, 3)
    for die_at in (1, *a_checkpoint, *the_end):
        folder = tmp_path / str(die_at)
        assert run(train_and_die, folder, die_at, train_several) == -signal.SIGKILL
        assert run(train_several, folder) == 0
        assert told_of_all(folder) == told_of_all(whole), f"killed at call {die_at} of {calls}"


def told_of_all(folder):
    return {name: told(folder / name) for name in RECIPES} | {"there": sorted(path.name for path in folder.iterdir())}


@pytest.mark.slow
def test_two_processes_train_the_same_saes(uncut, tmp_path):
    assert run(train_together, tmp_path / "together", 2, {}, train_several) == 0
    for name in RECIPES:
        one, other = (TopKSAE.load(folder / name) for folder in (uncut[0], tmp_path / "together"))
        for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)  # Adam steps are 2e-3


@pytest.mark.slow
def test_a_checkpoint_of_other_recipes_is_refused(tmp_path, monkeypatch):
    assert run(train_and_die, tmp_path / "run", 60, train_several) < 0
    assert list((tmp_path / "run" / "checkpoint").iterdir())
    monkeypatch.setitem(RECIPES, "wide", Recipe(1, 60, 3, 1e-3))
    with pytest.raises(ValueError, match=r"another run: wide layer was 0, is now 1; wide model was .*delete"):
        train_several(tmp_path / "run")


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_what_misses_one_is(tmp_path, monkeypatch):
    one = train_several(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("lmm_sae_nb.train.steps._step", None)
        assert train_several(tmp_path)["high"].history == one["high"].history
        (tmp_path / "high" / "history.json").unlink()
        with pytest.raises(TypeError):
            train_several(tmp_path)
    again = train_several(tmp_path)
    assert torch.equal(again["low"].sae.W_dec, one["low"].sae.W_dec)


def test_every_new_row_is_logged_by_name(tmp_path):
    rows = []
    train_several(tmp_path, {"on_log": lambda histories: rows.append({n: h[-1]["step"] for n, h in histories.items()})})
    assert rows == [dict.fromkeys(RECIPES, step) for step in range(1, SETTINGS["steps"] + 1)]


def test_trackers_get_the_rows_of_each(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trained = train_several(tmp_path, {"tracker": "tensorboard"})
    events = reader.EventAccumulator(str(tmp_path / "logs" / "lmm-sae-nb")).Reload()
    for name, its in trained.items():
        values = [event.value for event in events.Scalars(f"{name}/fvu")]
        np.testing.assert_allclose(values, [row["fvu"] for row in its.history], rtol=1e-6)


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({}, "7 samples, 0 recipes"),
        ({"checkpoint": Recipe(0, 8, 2)}, r"\['checkpoint'\] cannot name SAEs"),
        ({"../up": Recipe(0, 8, 2)}, "a name is also a folder's"),
        ({"one": Recipe(7, 8, 2)}, "no layer 7: .* layers 0 to 2"),
        ({"one": Recipe(0, 8, 9)}, "k is 9, with 8 latents"),
    ],
)
def test_recipes_that_cannot_be_are_refused(tmp_path, recipes, message):
    with pytest.raises(ValueError, match=message):
        train_saes(LMM_, SAMPLES, recipes, steps=1, batch_tokens=16, folder=tmp_path)


def test_an_error_names_the_sae_that_met_it(tmp_path):
    recipes = RECIPES | {"wild": Recipe(1, 40, 4, 1e30)}
    with pytest.raises(ValueError, match="the loss of wild is not finite"):
        train_saes(LMM_, SAMPLES, recipes, steps=5, batch_tokens=64, folder=tmp_path)
