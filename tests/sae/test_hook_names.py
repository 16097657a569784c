"""An SAE of another library is used only at the place that its files name."""

import json
import shutil
from pathlib import Path

import pytest
from trainings import LMM_

from lmm_sae_nb.sae import hook_names
from lmm_sae_nb.sae.formats import read_sae, settings_of
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import SAE

SAES = Path(__file__).parents[1] / "fixtures" / "saes"
BY_FILES = {  # what the files that the libraries wrote say themselves
    "dictionary_learning": "decoder.4", "dictionary_learning_jumprelu": "decoder.4", "gemma_scope_2": "decoder.7",
    "llama_scope": "decoder.7", "qwen_scope-L0_3": "decoder.7", "saelens": "", "sparsify": "", "overcomplete": "",
    "gemma_scope": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("hook", "place"),
    [
        ("layers.24", "decoder.24"),
        ("model.layers.24", "decoder.24"),
        ("model.language_model.layers.24", "decoder.24"),
        ("transformer.h.3.mlp", "decoder.3.mlp"),
        ("layers.24.self_attn", "decoder.24.attention"),
        ("blocks.24.hook_resid_post", "decoder.24"),
        ("blocks.24.hook_resid_pre", "decoder.23"),
        ("blocks.0.hook_resid_pre", "embeddings"),
        ("hook_embed", "embeddings"),
        ("blocks.24.hook_mlp_out", "decoder.24.mlp"),
        ("blocks.24.hook_attn_out", "decoder.24.attention"),
        ("blocks.24.attn.hook_z", "decoder.24.attn.hook_z"),
        ("model.layers.24.post_feedforward_layernorm.output", "decoder.24.mlp"),
        ("model.layers.7.output", "decoder.7"),
        ("resid_post_layer_4", "decoder.4"),
        ("resid_pre_layer_4", "decoder.3"),
        ("layer 4", "decoder.4"),
        ("vision_tower.vision_model.encoder.layers.5", "vision.5"),
        ("decoder.5.mlp", "decoder.5.mlp"),
        ("my sae", ""),
        ("", ""),
    ],
)
def test_a_hook_name_means_one_place(hook, place):
    assert hook_names.place_of(hook) == place


@pytest.mark.parametrize("name", BY_FILES)
def test_the_files_of_a_library_say_what_is_read(name):
    k = 3 if name == "overcomplete" else None
    settings = settings_of(SAES / name, k=k)
    assert hook_names.place_of(settings.hook) == BY_FILES[name]
    assert read_sae(SAES / name, [1], k=k).hook == settings.hook == SAE.load(SAES / name, k=k).hook_name


@pytest.mark.parametrize(
    ("name", "folder", "place"),
    [
        ("sparsify", "model.layers.24", "decoder.24"),
        ("sparsify", "layers.24.mlp/seed1", "decoder.24.mlp"),
        ("sparsify", "layers of mine", ""),
        ("saelens", "blocks.3.hook_resid_pre", "decoder.2"),
        ("gemma_scope", "models--google--gemma-scope-2b-pt-res/snapshots/0a1/layer_20/width_16k/l0_71", "decoder.20"),
        ("gemma_scope", "models--google--gemma-scope-9b-it-res/layer_31/width_16k/average_l0_76", "decoder.31"),
        ("gemma_scope", "gemma-scope-2b-pt-mlp/layer_20/width_16k/average_l0_45", "decoder.20.mlp"),
        ("gemma_scope", "gemma-scope-2b-pt-att/layer_20/width_16k", "decoder.20.self_attn.o_proj.input"),
        ("gemma_scope", "downloads/layer_20/width_16k", "decoder.20"),
    ],
)
def test_the_folder_of_an_sae_says_what_is_read(tmp_path, name, folder, place):
    shutil.copytree(SAES / name, tmp_path / folder)
    assert hook_names.place_of(settings_of(tmp_path / folder).hook) == place


@pytest.mark.parametrize(
    ("name", "config", "change", "place"),
    [
        ("saelens", "cfg.json", {"hook_name": "blocks.5.hook_resid_post"}, "decoder.5"),
        ("saelens", "cfg.json", {"metadata": {"sae_lens_version": "6.0", "hook_name": "layers.6"}}, "decoder.6"),
        ("llama_scope", "hyperparams.json", dict.fromkeys(("hook_point_in", "hook_point_out"), "L7R"), ""),
        ("dictionary_learning", "config.json", {"submodule_name": "mlp_out_layer_4"}, "decoder.4.mlp"),
        ("dictionary_learning", "config.json", {"submodule_name": "resid_post"}, "decoder.4"),
        ("dictionary_learning", "config.json", {"submodule_name": "a block", "layer": None}, ""),
    ],
)
def test_the_config_of_an_sae_says_what_is_read(tmp_path, name, config, change, place):
    shutil.copytree(SAES / name, tmp_path / "sae")
    said = json.loads((path := tmp_path / "sae" / config).read_text())
    said.get("trainer", said).update(change)
    path.write_text(json.dumps(said))
    assert hook_names.place_of(settings_of(tmp_path / "sae").hook) == place


@pytest.mark.parametrize(
    ("hook", "error"),
    [
        ("blocks.2.hook_resid_post", r"that is the output of layer 2 .*, not of layer 1; set layer to 2"),
        ("layers.1.mlp", "output of decoder.1.mlp .*, not of layer 1; set layer to decoder.1.mlp"),
    ],
)  # fmt: skip
def test_an_sae_of_another_place_is_refused_with_both_and_the_remedy(tmp_path, hook, error):
    lmm = LMM_
    SAE(lmm.width, 8, 2).save(tmp_path / hook)
    with pytest.raises(ValueError, match=error):
        SAEInPlace(lmm, SAE.load(tmp_path / hook), 1)


def test_the_layer_of_a_recorded_hook_is_taken_if_none_is_given_and_any_is_if_none_is_recorded(tmp_path):
    lmm = LMM_
    for folder in ("blocks.2.hook_resid_pre", "mine"):
        SAE(lmm.width, 8, 2).save(tmp_path / folder)
    assert SAEInPlace(lmm, SAE.load(tmp_path / "blocks.2.hook_resid_pre"), 1).sae.hook_name
    assert SAEInPlace(lmm, SAE.load(tmp_path / "mine"), 0).sae.hook_name == ""
    assert hook_names.layer_of("blocks.2.hook_resid_pre") == 1
