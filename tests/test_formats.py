"""Checkpoints as the paper and sparsify write them; every way of being broken has its own clear error."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from lmm_sae_nb import formats
from lmm_sae_nb.formats import SparsifyWeights, read_sparsify, write_sparsify
from lmm_sae_nb.sae import TopKSAE

WIDTH, LATENTS, K = 4, 12, 3
PAPER = {
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": LATENTS,
    "k": K,
    "multi_topk": False,
    "d_in": WIDTH,
    "signed": False,
}
SPARSIFY = {
    "activation": "topk",
    "expansion_factor": LATENTS // WIDTH,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": WIDTH,
}


def tensors(seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "encoder.weight": (LATENTS, WIDTH),
        "encoder.bias": (LATENTS,),
        "W_dec": (LATENTS, WIDTH),
        "b_dec": (WIDTH,),
    }
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def write(folder, config, weights=None):
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(tensors() if weights is None else weights, folder / "sae.safetensors")
    return folder


@pytest.mark.parametrize("config", [PAPER, SPARSIFY, PAPER | {"a_later_key": 1}])
def test_a_published_checkpoint_computes_what_its_own_code_does(tmp_path, config):
    file = tensors()
    sae = TopKSAE.load(write(tmp_path, config))
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    pre = torch.relu(torch.nn.functional.linear(x - file["b_dec"], file["encoder.weight"], file["encoder.bias"]))
    top = pre.topk(K, sorted=False)
    x_hat = torch.zeros(5, LATENTS).scatter(1, top.indices, top.values) @ file["W_dec"] + file["b_dec"]
    assert_close(sae(x), x_hat)


def test_the_paper_s_loader_can_read_what_is_written(tmp_path):
    sae = TopKSAE(WIDTH, LATENTS, K)
    sae.save(tmp_path)
    config, file = json.loads((tmp_path / "cfg.json").read_text()), load_file(tmp_path / "sae.safetensors")
    known = {"expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk", "d_in"}
    assert set(config) == known  # its loader fails on any other key
    assert (config["num_latents"], config["k"], config["d_in"]) == (LATENTS, K, WIDTH)
    assert config["normalize_decoder"] is True
    assert {name: tensor.shape for name, tensor in file.items()} == {n: t.shape for n, t in tensors().items()}
    assert torch.equal(file["encoder.weight"], sae.W_enc)


def test_rows_that_are_not_of_length_one_are_told(tmp_path):
    file = tensors()
    write_sparsify(tmp_path, SparsifyWeights(*file.values(), k=K))
    assert json.loads((tmp_path / "cfg.json").read_text())["normalize_decoder"] is False


@pytest.mark.parametrize(
    "change",
    [{"signed": True}, {"activation": "groupmax"}, {"transcode": True}, {"skip_connection": True}],
)
def test_another_kind_of_dictionary_is_refused(tmp_path, change):
    with pytest.raises(ValueError, match=f"cfg.json: {next(iter(change))} is"):
        read_sparsify(write(tmp_path, SPARSIFY | change))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cfg\.json is missing; .*01_train_sae"):
        read_sparsify(tmp_path / "nowhere")
    (write(tmp_path, PAPER) / "sae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"sae\.safetensors is missing"):
        read_sparsify(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_named(tmp_path, keep):
    path = write(tmp_path, PAPER) / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"sae\.safetensors is not a whole safetensors file"):
        read_sparsify(tmp_path)


def test_foreign_weights_are_named_with_what_was_expected(tmp_path):
    saelens = {"W_enc": torch.zeros(WIDTH, LATENTS), "W_dec": torch.zeros(LATENTS, WIDTH)}
    with pytest.raises(ValueError, match=r"no encoder\.weight \(it holds .*\); expected .* paper"):
        read_sparsify(write(tmp_path, PAPER, saelens))


def test_weights_of_other_shapes_than_the_config_says(tmp_path):
    with pytest.raises(ValueError, match=r"encoder\.weight is \(12, 4\), but cfg\.json says 24 latents"):
        read_sparsify(write(tmp_path, PAPER | {"num_latents": 24}))


@pytest.mark.parametrize("config", [{}, {"d_in": 4}, {"d_in": 4, "k": "many"}, PAPER | {"d_in": None}])
def test_a_foreign_config_is_named(tmp_path, config):
    with pytest.raises(ValueError, match=r"cfg\.json is no cfg\.json .* expected d_in, k"):
        read_sparsify(write(tmp_path, config))


@pytest.mark.parametrize("change", [{"k": 0}, {"k": 13}, {"d_in": -4}])
def test_impossible_sizes_are_named(tmp_path, change):
    with pytest.raises(ValueError, match=r"cfg\.json: .* make no SAE"):
        read_sparsify(write(tmp_path, PAPER | change))


def test_a_truncated_config_is_named(tmp_path):
    (write(tmp_path, PAPER) / "cfg.json").write_text('{"d_in": 4,')
    with pytest.raises(ValueError, match=r"cfg\.json is not whole JSON"):
        read_sparsify(tmp_path)


@pytest.mark.parametrize("crash_in", ["save_tensors", "write_json"])
@pytest.mark.parametrize("new_k", [K, K + 1])
def test_a_crash_leaves_old_or_new_or_an_error_never_a_mixture(tmp_path, monkeypatch, crash_in, new_k):
    old, new = SparsifyWeights(*tensors(0).values(), k=K), SparsifyWeights(*tensors(1).values(), k=new_k)
    write_sparsify(tmp_path, old)

    def crash(*args):
        raise OSError("killed")

    monkeypatch.setattr(formats, crash_in, crash)
    with pytest.raises(OSError, match="killed"):
        write_sparsify(tmp_path, new)
    monkeypatch.undo()
    try:
        found = read_sparsify(tmp_path)
    except FileNotFoundError:
        assert new_k != K
    else:
        expected = new if torch.equal(found.W_enc, new.W_enc) else old
        assert found.k == expected.k and all(map(torch.equal, found[:4], expected[:4]))
