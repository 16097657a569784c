"""An SAE of which one matrix is frozen: what stays, what learns, and what records say."""

import json

import pytest
import torch
from trainings import LMM_, SAMPLES, SETTINGS, train, train_several

from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.train.training import Recipe, train_saes

FROZEN = {"encoder": "W_enc", "decoder": "W_dec"}
SHARED = {name: value for name, value in SETTINGS.items() if name not in ("n_latents", "k", "lr")}


def first_weights():
    """The rows that both matrices start from."""
    return TopKSAE(LMM_.width, 40, 4, generator=torch.Generator().manual_seed(SETTINGS["seed"])).state_dict()


@pytest.mark.parametrize("part", FROZEN)
def test_the_frozen_matrix_keeps_its_first_rows_and_everything_else_learns(tmp_path, part):
    before, trained = first_weights(), train(tmp_path, {"frozen": part}).sae.state_dict()
    same = {name for name in before if torch.equal(before[name], trained[name])}
    assert same == {FROZEN[part]}
    saved = TopKSAE.load(tmp_path).state_dict()
    assert all(torch.equal(saved[name], trained[name]) for name in saved)


@pytest.mark.slow
def test_frozen_ones_beside_others_change_no_bit_of_them(tmp_path):
    recipes = {part or "none": Recipe(1, 40, 4, SETTINGS["lr"], part) for part in ("", *FROZEN)}
    together = train_saes(LMM_, SAMPLES, recipes, folder=tmp_path / "several", **SHARED)
    for name, recipe in recipes.items():
        alone = train(tmp_path / name, {"frozen": recipe.frozen})
        assert together[name].history[-1]["loss"] == alone.history[-1]["loss"]
        assert all(
            torch.equal(weights, alone.sae.state_dict()[part])
            for part, weights in together[name].sae.state_dict().items()
        )


@pytest.mark.parametrize("part", FROZEN)
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, part):
    def stop(rows):
        if len(rows) == 4:
            raise KeyboardInterrupt

    whole = train(tmp_path / "whole", {"frozen": part})
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", {"frozen": part, "on_log": stop})
    assert (tmp_path / "cut" / "checkpoint").is_dir()
    resumed = train(tmp_path / "cut", {"frozen": part})
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in whole.history]
    again = train(tmp_path / "cut", {"frozen": part})  # read, not trained
    for sae in (resumed.sae, again.sae):
        assert all(torch.equal(sae.state_dict()[name], weights) for name, weights in whole.sae.state_dict().items())


def test_a_checkpoint_of_another_choice_is_refused(tmp_path):
    def stop(rows):
        raise KeyboardInterrupt

    for first, then in (("", "encoder"), ("encoder", ""), ("encoder", "decoder")):
        folder = tmp_path / f"{first}-{then}"
        with pytest.raises(KeyboardInterrupt):
            train(folder, {"frozen": first, "on_log": lambda rows: stop(rows) if len(rows) == 3 else None})
        with pytest.raises(ValueError, match=f"frozen was {first or None!r}, is now {then or None!r}"):
            train(folder, {"frozen": then})


def test_records_without_a_frozen_part_are_those_of_earlier_versions(tmp_path):
    train_several(tmp_path)
    runs = [json.loads(path.read_text())["run"] for path in tmp_path.glob("*/history.json")]
    assert len(runs) == 3
    assert not any("frozen" in run for run in runs)
    assert Recipe(1, 40, 4, frozen="decoder").run(LMM_)["frozen"] == "decoder"


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="frozen is 'W_dec'; choose 'encoder' or 'decoder'"):
        Recipe(1, 40, 4, frozen="W_dec")
