"""SAEs of all kinds as many libraries write them; every way of being broken is told.

tests/fixtures/saes holds what those libraries wrote and computed themselves; tests/peers runs them.
"""

import json
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from lmm_sae_nb.sae import formats, weight_files
from lmm_sae_nb.sae.formats import FORMATS, READABLE, SAEWeights, format_of, read_sae, write_sae
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.stages import peak_memory

WIDTH, LATENTS, K = 4, 12, 3
SAES = Path(__file__).parents[1] / "fixtures" / "saes"
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


def weights(seed=0, dtype=torch.float32):
    return SAEWeights(*(tensor.to(dtype) for tensor in tensors(seed).values()), k=K)


def write(folder, config, weights=None):
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(tensors() if weights is None else weights, folder / "sae.safetensors")
    return folder


def same(found, expected):
    assert found.k == expected.k
    for ours, theirs in zip(found[:4], expected[:4], strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.slow
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


def test_rows_of_another_length_than_one_are_recorded(tmp_path):
    file = tensors()
    write_sae(tmp_path, SAEWeights(*file.values(), k=K))
    assert json.loads((tmp_path / "cfg.json").read_text())["normalize_decoder"] is False


@pytest.mark.parametrize(
    "change",
    [{"signed": True}, {"activation": "groupmax"}, {"transcode": True}, {"skip_connection": True}],
)
def test_another_kind_of_dictionary_is_refused(tmp_path, change):
    with pytest.raises(ValueError, match=f"cfg.json: {next(iter(change))} is .*: it .*; use an SAE with"):
        read_sae(write(tmp_path, SPARSIFY | change))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no SAE, .* sae\.safetensors .*01_train_sae"):
        read_sae(tmp_path / "nowhere")
    (write(tmp_path, PAPER) / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"cfg\.json is missing; .*01_train_sae"):
        read_sae(tmp_path)


def test_a_folder_of_seeds_or_hookpoints_names_them(tmp_path):
    for seed in ("seed0", "seed1"):
        write_sae(tmp_path / "layers.3" / seed, weights())
    with pytest.raises(ValueError, match="for each seed or hookpoint: seed0, seed1; give one of them"):
        read_sae(tmp_path / "layers.3")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_named(tmp_path, keep):
    path = write(tmp_path, PAPER) / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"sae\.safetensors is not a whole safetensors file"):
        read_sae(tmp_path)


def test_foreign_weights_are_named_with_what_was_expected(tmp_path):
    saelens = {"W_enc": torch.zeros(WIDTH, LATENTS), "W_dec": torch.zeros(LATENTS, WIDTH)}
    with pytest.raises(ValueError, match=r"no encoder\.weight \(it holds .*\); expected a whole SAE"):
        read_sae(write(tmp_path, PAPER, saelens))


def test_weights_of_other_shapes_than_the_config_says(tmp_path):
    with pytest.raises(ValueError, match=r"encoder\.weight is \(12, 4\), but 24 latents of width 4"):
        read_sae(write(tmp_path, PAPER | {"num_latents": 24}))


@pytest.mark.parametrize("config", [{}, {"d_in": 4}, {"d_in": 4, "k": "many"}, PAPER | {"d_in": None}])
def test_a_foreign_config_is_named(tmp_path, config):
    with pytest.raises(ValueError, match=r"cfg\.json is no config of an SAE .* expected d_in, k"):
        read_sae(write(tmp_path, config))


@pytest.mark.parametrize("change", [{"k": 0}, {"k": 13}, {"d_in": -4}])
def test_impossible_sizes_are_named(tmp_path, change):
    with pytest.raises(ValueError, match=r"cfg\.json: .* make no SAE"):
        read_sae(write(tmp_path, PAPER | change))


def test_a_truncated_config_is_named(tmp_path):
    (write(tmp_path, PAPER) / "cfg.json").write_text('{"d_in": 4,')
    with pytest.raises(ValueError, match=r"cfg\.json is not whole JSON"):
        read_sae(tmp_path)


@pytest.mark.parametrize("crash_in", ["save_tensors", "write_json"])
@pytest.mark.parametrize("new_k", [K, K + 1])
def test_a_crash_leaves_old_or_new_or_an_error_never_a_mixture(tmp_path, monkeypatch, crash_in, new_k):
    old, new = weights(0), weights(1)._replace(k=new_k)
    write_sae(tmp_path, old)

    def crash(*args):
        raise OSError("killed")

    monkeypatch.setattr(weight_files if crash_in == "save_tensors" else formats, crash_in, crash)
    with pytest.raises(OSError, match="killed"):
        write_sae(tmp_path, new)
    monkeypatch.undo()
    try:
        found = read_sae(tmp_path)
    except FileNotFoundError:
        assert new_k != K
    else:
        expected = new if torch.equal(found.W_enc, new.W_enc) else old
        assert found.k == expected.k and all(map(torch.equal, found[:4], expected[:4]))


# Every format.


@pytest.mark.parametrize("name", sorted(path.name for path in SAES.iterdir()))
def test_what_a_library_saved_computes_what_it_computed(name):
    k = 3 if name == "overcomplete" else None  # its file does not say it
    seen, sae = load_file(SAES / name / "seen.safetensors"), TopKSAE.load(SAES / name, k=k)
    latents = sae.encode(seen["x"])
    z = torch.zeros(len(seen["x"]), sae.n_latents).scatter(1, latents.indices, latents.acts)
    assert (seen["z"] > 0).sum() > len(seen["x"])  # the fixture tells something
    assert_close(z, seen["z"])
    assert_close(sae.decode(latents), seen["x_hat"])


def test_the_fixtures_hold_every_format():
    assert {format_of(folder) for folder in SAES.iterdir()} == set(READABLE)


@pytest.mark.parametrize("name", sorted(path.name for path in SAES.iterdir()))
def test_chosen_rows_are_those_of_the_whole_in_every_format(name):
    k = 3 if name == "overcomplete" else None
    whole, rows = read_sae(SAES / name, k=k), read_sae(SAES / name, [7, 2], k=k)
    for part in ("W_enc", "b_enc", "W_dec", *(["threshold"] if whole.threshold is not None else [])):
        assert_close(getattr(rows, part), getattr(whole, part)[[7, 2]])
    assert torch.equal(rows.b_dec, whole.b_dec)


def with_threshold(seed=0, dtype=torch.float32):
    threshold = torch.rand(LATENTS, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return weights(seed, dtype)._replace(threshold=threshold)


def test_an_sae_with_thresholds_comes_back_with_every_bit_and_its_places(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        write_sae(tmp_path, written := with_threshold(dtype=dtype), "saelens")
        same(read_sae(tmp_path), written)
        assert torch.equal(read_sae(tmp_path).threshold, written.threshold)
    assert read_sae(tmp_path, k_max=7).k == 7
    TopKSAE.load(tmp_path).save(tmp_path / "again")
    assert format_of(tmp_path / "again") == "saelens"


@pytest.mark.parametrize("form", ["sparsify", "dictionary_learning"])
def test_thresholds_are_not_written_where_they_would_be_lost(tmp_path, form):
    with pytest.raises(ValueError, match=f"format {form} is written for TopK SAEs only, .* use saelens"):
        write_sae(tmp_path, with_threshold(), form)
    assert not list(tmp_path.iterdir())


def test_weights_of_16_bits_are_folded_in_32(tmp_path):
    write_sae(tmp_path, written := weights(dtype=torch.bfloat16), "saelens")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"apply_b_dec_to_input": False}))
    found = read_sae(tmp_path)
    expected = written.b_enc.double() + written.W_enc.double() @ written.b_dec.double()
    assert_close(found.b_enc, expected.float())


def test_a_folder_of_several_layers_names_their_files_and_one_of_them_can_be_read(tmp_path):
    made = SAES / "qwen_scope-L0_3" / "layer7.sae.pt"
    for layer in (7, 8):
        (tmp_path / f"layer{layer}.sae.pt").write_bytes(made.read_bytes())
    with pytest.raises(ValueError, match=r"holds 2 SAEs: layer7\.sae\.pt, layer8\.sae\.pt; give the file of one"):
        read_sae(tmp_path)
    with pytest.raises(ValueError, match=r"layer8\.sae\.pt does not say how many .* such as SAE\.load\(path, k=50\)"):
        read_sae(tmp_path / "layer8.sae.pt")
    same(read_sae(tmp_path / "layer8.sae.pt", k=3), read_sae(made))
    with pytest.raises(ValueError, match="is an SAE with k 3, not 4; leave out k"):
        read_sae(made, k=4)


def test_an_overcomplete_sae_with_another_dictionary_is_refused(tmp_path):
    state = torch.load(SAES / "overcomplete_jumprelu" / "sae_a-model.pt")
    path = tmp_path / "any name.pt"
    for change, error in (
        ({"dictionary._weights": state["dictionary._weights"] * 2}, "was not normalised to length 1"),
        ({"encoder.final_block.1.weight": torch.ones(20)}, r"also holds encoder\.final_block\.1\.weight"),
    ):
        torch.save(state | change, path)
        with pytest.raises(ValueError, match=error):
            read_sae(path)
    torch.save({"dictionary.W": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"has no dictionary\._weights"):
        read_sae(path)


@pytest.mark.parametrize(
    ("name", "config", "change", "error"),
    [
        ("gemma_scope_2", "config.json", {"affine_connection": True}, "adds a linear map"),
        ("gemma_scope_2", "config.json", {"hf_hook_point_out": "model.layers.7.mlp"}, "so it is a transcoder"),
        ("llama_scope", "hyperparams.json", {"hook_point_out": "blocks.7.hook_mlp_out"}, "so it is a transcoder"),
        ("llama_scope", "hyperparams.json", {"norm_activation": "token-wise"}, "scales every token or batch"),
        ("llama_scope", "hyperparams.json", {"use_glu_encoder": True}, "a gate of its own"),
        ("llama_scope", "hyperparams.json", {"dataset_average_activation_norm": {}}, "is no config of an SAE"),
        ("llama_scope", "hyperparams.json", {"dataset_average_activation_norm": {"in": 0}}, "is no config of an SAE"),
        ("saelens_scaled", "activation_scaler.json", {"scaling_factor": None}, "scaling_factor is None; expected a"),
    ],
)
def test_what_cannot_be_folded_in_is_refused_with_the_reason(tmp_path, name, config, change, error):
    shutil.copytree(SAES / name, tmp_path / name)
    path = tmp_path / name / config
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=error):
        read_sae(tmp_path / name)


@pytest.mark.parametrize("name", sorted(path.name for path in SAES.iterdir()))
def test_a_file_of_any_format_that_was_cut_short_is_named(tmp_path, name):
    shutil.copytree(SAES / name, tmp_path / name)
    form = READABLE[format_of(tmp_path / name)]
    (path,) = (tmp_path / name).glob(form.weights)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"{path.name} is not a whole"):
        read_sae(tmp_path / name, k=3)


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 5),
    n_latents=st.integers(1, 9),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    there=st.sampled_from(sorted(FORMATS)),
    back=st.sampled_from(sorted(FORMATS)),
    data=st.data(),
)
def test_a_round_trip_through_two_formats_changes_no_bit(width, n_latents, seed, dtype, there, back, data):
    draw = torch.Generator().manual_seed(seed)
    shapes = (n_latents, width), (n_latents,), (n_latents, width), (width,)
    made = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    written = SAEWeights(*made, k=data.draw(st.integers(1, n_latents)))
    with tempfile.TemporaryDirectory() as folder:
        write_sae(f"{folder}/there", written, there)
        write_sae(f"{folder}/back", read_sae(f"{folder}/there"), back)
        same(read_sae(f"{folder}/back"), written)
        chosen = data.draw(st.lists(st.integers(0, n_latents - 1), max_size=4))
        rows = read_sae(f"{folder}/back", chosen)
        same(rows, written._replace(**{name: getattr(written, name)[chosen] for name in ("W_enc", "b_enc", "W_dec")}))


@pytest.mark.parametrize("change", [{}, {"apply_b_dec_to_input": False}, {"rescale_acts_by_decoder_norm": True}])
def test_rows_are_folded_as_the_whole_is(tmp_path, change):
    write_sae(tmp_path, weights(), "saelens")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | change))
    whole, rows = read_sae(tmp_path), read_sae(tmp_path, [7, 2])
    for name in ("W_enc", "b_enc", "W_dec"):
        assert_close(getattr(rows, name), getattr(whole, name)[[7, 2]])


def test_a_latent_that_does_not_exist_is_named(tmp_path):
    write_sae(tmp_path, weights())
    for latents in ([12], [-1]):
        with pytest.raises(ValueError, match=r"latents \[-?1\d?\]: .* has latents 0 to 11"):
            read_sae(tmp_path, latents)


@pytest.mark.skipif(peak_memory() is None, reason="this system does not tell a process its memory")
def test_rows_of_a_large_file_leave_the_rest_on_the_disk(tmp_path):
    """The published checkpoint's 4.3 GB, almost none of them on this disk: but for one row, the file is holes."""
    n_latents, width, row = 131_072, 4096, 70_001
    header, start = {}, 0
    for name, shape in {"W_dec": (n_latents, width), "b_dec": (width,), "encoder.bias": (n_latents,)}.items():
        stop = start + 4 * torch.Size(shape).numel()
        header[name], start = {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}, stop
    header["encoder.weight"] = header["W_dec"] | {"data_offsets": [start, start + 4 * n_latents * width]}
    text = json.dumps(header).encode()
    (tmp_path / "cfg.json").write_text(json.dumps(PAPER | {"num_latents": n_latents, "d_in": width}))
    with (tmp_path / "sae.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(8 + len(text) + 4 * row * width)
        file.write(struct.pack("<2f", 1.5, -2.5))
        file.truncate(8 + len(text) + start + 4 * n_latents * width)
    before = peak_memory()
    rows = read_sae(tmp_path, [5, row])
    assert rows.W_enc.shape == rows.W_dec.shape == (2, width)
    assert rows.W_dec[1, :3].tolist() == [1.5, -2.5, 0] and not rows.W_dec[0].any() and not rows.W_enc.any()
    assert peak_memory() - before < 64e6


@pytest.mark.parametrize("form", FORMATS)
def test_another_format_is_not_written_over(tmp_path, form):
    write_sae(tmp_path, weights(), form)
    for other in FORMATS.keys() - {form}:
        with pytest.raises(ValueError, match=f"holds an SAE in the format {form}; write {other} to a folder of its"):
            write_sae(tmp_path, weights(), other)
    write_sae(tmp_path, weights(1), form)
    same(read_sae(tmp_path), weights(1))


def test_a_folder_of_two_formats_is_refused(tmp_path):
    write_sae(tmp_path, weights())
    save_file(tensors(), tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="SAEs in the formats sparsify, saelens; keep each in a folder of its own"):
        read_sae(tmp_path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"W_dec": torch.zeros(11, 4)}, r"W_dec is \(11, 4\), but 12 latents of width 4 make it \(12, 4\)"),
        ({"b_dec": torch.zeros(5)}, r"b_dec is \(5,\), but .* width 4"),
        (
            {"b_enc": torch.zeros(LATENTS, dtype=torch.float16)},
            "mixes dtypes: encoder.weight is float32, encoder.bias is float16, .*bring all 4",
        ),
        ({"k": 13}, "width 4, k 13 and 12 latents make no SAE"),
    ],
)
def test_weights_that_make_no_sae_are_not_written(tmp_path, change, error):
    with pytest.raises(ValueError, match=error):
        write_sae(tmp_path, weights()._replace(**change))
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_names_the_known(tmp_path):
    with pytest.raises(ValueError, match="no format 'onnx'; choose one of sparsify, saelens, dictionary_learning"):
        write_sae(tmp_path, weights(), "onnx")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_file_cut_short_is_named_in_every_format(tmp_path, form, keep):
    write_sae(tmp_path, weights(), form)
    path = tmp_path / FORMATS[form].weights
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{FORMATS[form].weights} is not a whole"):
        read_sae(tmp_path)


def test_a_tensor_too_many_is_refused(tmp_path):
    with pytest.raises(ValueError, match="also holds W_skip, which an SAE of this kind does not have"):
        read_sae(write(tmp_path, PAPER, tensors() | {"W_skip": torch.zeros(WIDTH, WIDTH)}))


# SAELens.


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"architecture": "abstopk"}, "architecture is 'abstopk': it keeps the largest absolute values"),
        ({"architecture": "matching_pursuit"}, "it finds its latents one after the other"),
        ({"architecture": "temporal"}, "it reads more than one token"),
        ({"architecture": "gated"}, "has no b_mag"),
        ({"architecture": "jumprelu"}, "has no threshold"),
        ({"architecture": "skip_transcoder"}, "it predicts another activation"),
        ({"architecture": "hydra"}, "it is of a kind not known here"),
        ({"normalize_activations": "layer_norm"}, "it scales every token by its own length or spread"),
        ({"normalize_activations": "constant_norm_rescale"}, "it scales every token by its own"),
        ({"normalize_activations": "expected_average_only_in"}, "measured and not stored .*; fold it in with sae-lens"),
        ({"reshape_activations": "hook_z"}, "it reads the heads of an attention"),
        ({"metadata": {"sae_lens_version": "5.11.0"}}, "of SAELens 5.11.0, before 6; load it with sae-lens 6"),
        ({"metadata": {}}, "of SAELens unknown, before 6"),
        ({"k": None}, r"is no config of an SAE .* expected d_in, d_sae and k"),
    ],
)
def test_other_saes_of_saelens_are_refused_with_the_reason(tmp_path, change, error):
    write_sae(tmp_path, weights(), "saelens")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=error):
        read_sae(tmp_path)


# dictionary_learning.


@pytest.mark.parametrize(
    ("dict_class", "error"),
    [
        ("BatchTopKSAE", "the threshold is -1: it was not measured yet"),
        ("MatryoshkaBatchTopKSAE", "the threshold is -1: it was not measured yet"),
        ("CrossCoder", "dict_class is 'CrossCoder': it is of a kind not known here"),
        ("IdentityDict", "dict_class is 'IdentityDict': it is of a kind not known here"),
        ("AutoEncoderNew", r"has no decoder\.bias"),
    ],
)
def test_other_saes_of_dictionary_learning_are_refused_with_the_reason(tmp_path, dict_class, error):
    write_sae(tmp_path, weights(), "dictionary_learning")
    config = json.loads((tmp_path / "config.json").read_text())
    config["trainer"]["dict_class"] = dict_class
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=error):
        read_sae(tmp_path)


class Boom:
    def __reduce__(self):
        return Path.touch, (Path("boom"),)


@pytest.mark.parametrize(
    ("saved", "error"),
    [
        ({"step": 3, "ae": {}, "optimizer": {}, "config": {}, "norm_factor": 2.0}, "a backup from the middle of a"),
        ([torch.zeros(3)], "holds no state_dict"),
        ({"k": 3}, "holds no state_dict"),
        ({"k": torch.tensor(K + 1)}, "has k 4, config.json has k 3"),
        ({"bias": torch.zeros(3)}, "also holds bias"),
        (Boom(), "holds objects that would have to be run"),
    ],
)
def test_an_ae_pt_of_another_content_is_refused_and_not_run(tmp_path, monkeypatch, saved, error):
    monkeypatch.chdir(tmp_path)
    write_sae(tmp_path, weights(), "dictionary_learning")
    whole = torch.load(tmp_path / "ae.pt", weights_only=True)
    more = isinstance(saved, dict) and "ae" not in saved and "holds no" not in error
    torch.save(whole | saved if more else saved, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match=error):
        read_sae(tmp_path)
    assert not Path("boom").exists()


@pytest.mark.parametrize("kind", [RuntimeError, EOFError, ValueError])
def test_an_error_of_pytorch_that_has_no_text_is_told_by_its_kind(tmp_path, monkeypatch, kind):
    def without_text(*_, **__):
        raise kind

    write_sae(tmp_path, weights(), "dictionary_learning")
    monkeypatch.setattr(torch, "load", without_text)
    with pytest.raises(ValueError, match=rf"ae\.pt is not a whole file of tensors \({kind.__name__}\(\)\)"):
        read_sae(tmp_path)


def test_an_ae_pt_without_config_is_refused(tmp_path):
    write_sae(tmp_path, weights(), "dictionary_learning")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"ae\.pt alone does not say TopK or BatchTopK"):
        read_sae(tmp_path)


# Wrong numbers.


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", range(4))
def test_nan_and_infinite_weights_are_refused_with_the_tensor_and_the_latents(
    tmp_path, format, value, part, monkeypatch
):
    good = weights()
    write_sae(tmp_path / "good", good, format)
    bad = [tensor.clone() for tensor in good[:4]]
    bad[part][[1, 3]] = value  # latents 1 and 3, or two places of b_dec
    wrong = SAEWeights(*bad, k=K)
    what = rf"{FORMATS[format].names[part]} holds NaN or infinity at {'places' if part == 3 else 'latents'} 1, 3; "
    with pytest.raises(ValueError, match="the weights to write: " + what):
        write_sae(tmp_path / "good", wrong, format)
    same(read_sae(tmp_path / "good"), good)  # nothing was written
    with monkeypatch.context() as patch:
        patch.setattr(formats, "_require_finite", lambda *_, **__: None)
        write_sae(tmp_path / "bad", wrong, format)
    with pytest.raises(ValueError, match=rf"{FORMATS[format].weights}: " + what):
        read_sae(tmp_path / "bad")
    if part < 3:
        with pytest.raises(ValueError, match="at latents 3; "):
            read_sae(tmp_path / "bad", [5, 3])
        assert read_sae(tmp_path / "bad", [5, 2]).k == K  # these latents are whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 3.7}, "3.7 is no whole number"),
        ({"k": True}, "True is no whole number"),
        ({"k": "3"}, "'3' is no whole number"),
        ({"k": None}, "None is no whole number"),
        ({"k": 1e400}, "Infinity is no finite number"),
        ({"num_latents": 0, "expansion_factor": "x"}, "expansion_factor 'x' is no number"),
        ({"k": 13}, "k 13 and 12 latents make no SAE"),
    ],
)
def test_sizes_that_are_no_whole_numbers_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"cfg\.json.*{message}"):
        read_sae(write(tmp_path, PAPER | change))


def test_a_mixture_of_dtypes_names_every_side(tmp_path):
    mixed = tensors() | {"b_dec": tensors()["b_dec"].bfloat16()}
    with pytest.raises(ValueError, match=r"mixes .*encoder\.weight is float32, .*b_dec is bfloat16; bring all 4"):
        read_sae(write(tmp_path, PAPER, mixed))
    whole_numbers = {name: tensor.int() for name, tensor in tensors().items()}
    with pytest.raises(ValueError, match="weights of dtype int32; expected floating-point"):
        read_sae(write(tmp_path, PAPER, whole_numbers))


@pytest.mark.parametrize("format", FORMATS)
def test_a_config_with_another_k_than_the_weights_is_refused(tmp_path, format):
    write_sae(tmp_path, weights(), format)
    path = tmp_path / FORMATS[format].config
    path.write_text(path.read_text().replace(f'"k": {K}', f'"k": {K + 1}'))
    with pytest.raises(ValueError, match=rf"has k {K}, {FORMATS[format].config} has k {K + 1}; take both from one"):
        read_sae(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_no_flipped_bit_of_the_weights_is_read_as_whole(tmp_path, format):
    """One bit in every 16 bytes. What is accepted lies beside the numbers, and changes none."""
    write_sae(tmp_path, good := weights(), format)
    path = tmp_path / FORMATS[format].weights
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 16):
        flipped = bytearray(whole)
        flipped[place] ^= 16
        path.write_bytes(flipped)
        try:
            found = read_sae(tmp_path)
        except ValueError as error:
            refused += 1
            assert path.name in str(error)
        else:
            same(found, good)
    assert refused >= sum(tensor.numel() * tensor.element_size() for tensor in good[:4]) // 16 - 1


def test_a_full_disk_is_named_for_a_pickled_sae_too(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(weight_files, "free_bytes", lambda _: 12)
    with pytest.raises(
        OSError, match=r"ae\.pt cannot be written \(No space left.*\): it needs up to \d+ bytes, .* are free there"
    ):
        write_sae(tmp_path, weights(), "dictionary_learning")
    assert not list(tmp_path.iterdir())
