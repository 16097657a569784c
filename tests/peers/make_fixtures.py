"""Write tests/fixtures/saes: small SAEs saved by the peers themselves, each with an input and what they make of it.

    python tests/peers/make_fixtures.py

in the peers' environment (test_peers_formats.py has the command that makes it). A folder holds the library's own
files and seen.safetensors: x, its dense latents z and the reconstruction x_hat, as the library computes them. Nobody
publishes the code that wrote Gemma Scope, Llama Scope and Qwen-Scope. Their files are laid out here as published, and
SAELens' own loaders read them and compute.
"""

import json
import shutil
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from dictionary_learning import dictionary
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig

PICTURES = ("overcomplete.models", "overcomplete.visualization")  # they need more packages, and an SAE needs none of it
with mock.patch.dict(sys.modules, dict.fromkeys(PICTURES, mock.MagicMock())):
    from overcomplete.sae import JumpSAE
    from overcomplete.sae import TopKSAE as OvercompleteTopKSAE

WIDTH, LATENTS, K = 6, 20, 3
SAES = Path(__file__).parent.parent / "fixtures" / "saes"


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Weights as no start has them: biases that are not 0, dictionary rows of different lengths, thresholds above 0."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weights in module.named_parameters():
            weights.copy_(torch.randn(weights.shape, generator=draw))
            if name == "threshold":
                weights.abs_()
            if name == "r_mag":
                weights.mul_(0.3)
    return module.eval()


def sparsify() -> tuple:
    sae = randomise(SparseCoder(WIDTH, SparseCoderConfig(num_latents=LATENTS, k=K)))

    def encode(x):
        found = sae.encode(x)
        return torch.zeros(len(x), LATENTS).scatter(1, found.top_indices, found.top_acts)

    return sae.save_to_disk, encode, lambda x: sae(x).sae_out


def saelens(kind=TopKSAE, config=TopKSAEConfig, **settings) -> tuple:
    settings |= {"k": K} if config is TopKSAEConfig else {}
    sae = randomise(kind(config(d_in=WIDTH, d_sae=LATENTS, **settings)))
    return sae.save_model, sae.encode, sae


def saelens_batchtopk() -> tuple:
    """A checkpoint in the middle of a training, with its threshold; what it exports for inference computes."""
    config = BatchTopKTrainingSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=K, rescale_acts_by_decoder_norm=True)
    sae = randomise(BatchTopKTrainingSAE(config))
    sae.topk_threshold.fill_(3.0)
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        exported = SAE.load_from_disk(folder)
    return sae.save_model, exported.encode, exported


def saelens_scaled() -> tuple:
    """A checkpoint whose input is scaled by a factor in a file beside it; folded in, it computes."""
    save, *_ = saelens(normalize_activations="expected_average_only_in")
    folded = randomise(TopKSAE(TopKSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=K)))
    folded.fold_activation_norm_scaling_factor(0.25)

    def save_both(folder):
        save(folder)
        ActivationScaler(scaling_factor=0.25).save(str(folder / "activation_scaler.json"))

    return save_both, folded.encode, folded


def dictionary_learning(kind=AutoEncoderTopK, *sizes, threshold=None) -> tuple:
    sae = randomise(kind(WIDTH, LATENTS, *sizes))
    if threshold is not None:
        sae.threshold.fill_(threshold)
    trainer = {"trainer_class": "Trainer", "dict_class": kind.__name__, "activation_dim": WIDTH, "dict_size": LATENTS}
    trainer |= {"k": K, "layer": 4, "lm_name": "none"}

    def save(folder):
        torch.save(sae.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}, indent=4))

    return save, sae.encode, sae


def overcomplete(kind=OvercompleteTopKSAE, **settings) -> tuple:
    torch.manual_seed(0)
    sae = kind(WIDTH, LATENTS, **settings)
    with torch.no_grad():
        sae.encoder.final_block[0].bias.normal_()
        if kind is JumpSAE:
            sae.thresholds.normal_()
    optimiser = torch.optim.Adam(sae.parameters(), lr=0.01)
    x = torch.randn(64, WIDTH)
    (x - sae(x)[2]).square().mean().backward()
    optimiser.step()  # so that dictionary rows are a step away from length 1, as after a training
    state = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    sae.eval()

    def save(folder):
        logs = defaultdict(list, loss=[1.0])
        whole = {"epoch": 2, "model_state": state, "optimizer_state": optimiser.state_dict(), "logs": logs}
        torch.save(whole if kind is OvercompleteTopKSAE else state, folder / "sae_a-model.pt")

    return save, lambda x: sae.encode(x)[1], lambda x: sae(x)[2]


def published(save, loader: str, repository: str, folder: str, **overrides) -> tuple:
    """Save an SAE as it is published, and let SAELens read it with its loader for that release."""

    def download(repo_id, filename, subfolder="", **_):
        return str(Path(place) / subfolder / filename)

    def shapes(repo_id, filename):
        return {"w_enc": [WIDTH, LATENTS], "w_dec": [LATENTS, WIDTH]}

    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = Path(place) / folder
        (inner.parent if inner.suffix == ".pt" else inner).mkdir(parents=True, exist_ok=True)
        save(inner.parent if inner.suffix == ".pt" else inner)
        patches = {"hf_hub_download": download, "get_safetensors_tensor_shapes": shapes}
        with mock.patch.multiple(loaders, **patches):
            config, state, _ = getattr(loaders, loader)(
                repository, folder, "cpu", cfg_overrides={"dtype": "float32", "device": "cpu"} | overrides
            )
    scale = None
    if config["normalize_activations"] == "expected_average_only_in":
        scale = WIDTH**0.5 / 17.125  # SAELens keeps it in its list of releases
        config["normalize_activations"] = "none"
    config["normalize_activations"] = config["normalize_activations"] or "none"
    sae = SAE.from_dict(loaders.handle_config_defaulting(config))
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    if scale:
        sae.fold_activation_norm_scaling_factor(scale)
    return save, sae.encode, sae


def parts(**thresholds) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (LATENTS, WIDTH), "b_enc": (LATENTS,), "W_dec": (LATENTS, WIDTH), "b_dec": (WIDTH,)}
    return {name: torch.randn(shape, generator=draw) for name, shape in (shapes | thresholds).items()}


def gemma_scope_2() -> tuple:
    made = parts(threshold=(LATENTS,))
    tensors = {
        "w_enc": made["W_enc"].T.contiguous(), "w_dec": made["W_dec"], "b_enc": made["b_enc"],
        "b_dec": made["b_dec"], "threshold": made["threshold"].abs(),
    }  # fmt: skip
    config = {
        "hf_hook_point_in": "model.layers.7.output", "hf_hook_point_out": "model.layers.7.output", "width": LATENTS,
        "model_name": "gemma-v3-4b-it", "architecture": "jump_relu", "l0": 20, "affine_connection": False,
        "type": "sae",
    }  # fmt: skip

    def save(folder):
        save_file(tensors, folder / "params.safetensors")
        (folder / "config.json").write_text(json.dumps(config))

    folder = "resid_post/layer_7_width_16k_l0_small"
    return published(save, "gemma_3_sae_huggingface_loader", "google/gemma-scope-2-4b-it", folder)


def gemma_scope() -> tuple:
    made = parts(threshold=(LATENTS,))
    arrays = made | {"W_enc": made["W_enc"].T, "threshold": made["threshold"].abs()}

    def save(folder):
        np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})

    return published(
        save, "gemma_2_sae_huggingface_loader", "google/gemma-scope-2b-pt-res", "layer_7/width_16k/average_l0_20",
        d_in=WIDTH, d_sae=LATENTS,
    )  # fmt: skip


def llama_scope() -> tuple:
    made = parts()
    W_dec = torch.nn.functional.normalize(made["W_dec"])
    tensors = {
        "encoder.weight": made["W_enc"], "encoder.bias": made["b_enc"], "decoder.weight": W_dec.T.contiguous(),
        "decoder.bias": made["b_dec"],
    }  # fmt: skip
    config = {
        "dtype": "torch.bfloat16", "hook_point_in": "blocks.7.hook_resid_post", "use_decoder_bias": True,
        "hook_point_out": "blocks.7.hook_resid_post", "apply_decoder_bias_to_pre_encoder": False,
        "expansion_factor": 8, "d_model": WIDTH, "d_sae": LATENTS, "act_fn": "jumprelu",
        "jump_relu_threshold": 2.5, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 17.125, "out": 17.125}, "decoder_exactly_fixed_norm": False,
        "sparsity_include_decoder_norm": True, "use_glu_encoder": False, "top_k": 50, "tp_size": 1,
    }  # fmt: skip

    def save(folder):
        (folder / "checkpoints").mkdir()
        save_file(tensors, folder / "checkpoints" / "final.safetensors")
        (folder / "hyperparams.json").write_text(json.dumps(config))

    folder = "Llama3_1-8B-Base-L7R-8x"
    return published(save, "llama_scope_sae_huggingface_loader", "fnlp/Llama3_1-8B-Base-LXR-8x", folder)


def qwen_scope() -> tuple:
    made = parts()
    state = made | {"W_dec": made["W_dec"].T.contiguous()}
    return published(
        lambda folder: torch.save(state, folder / "layer7.sae.pt"), "qwen_scope_sae_huggingface_loader",
        "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "layer7.sae.pt", d_in=WIDTH, d_sae=LATENTS,
        activation_fn_kwargs={"k": K},
    )  # fmt: skip


MADE = {
    "sparsify": sparsify,
    "saelens": saelens,
    "saelens_uncentred": lambda: saelens(apply_b_dec_to_input=False),
    "saelens_by_length": lambda: saelens(rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False),
    "saelens_standard": lambda: saelens(StandardSAE, StandardSAEConfig),
    "saelens_jumprelu": lambda: saelens(JumpReLUSAE, JumpReLUSAEConfig),
    "saelens_jumprelu_uncentred": lambda: saelens(JumpReLUSAE, JumpReLUSAEConfig, apply_b_dec_to_input=False),
    "saelens_gated": lambda: saelens(GatedSAE, GatedSAEConfig, apply_b_dec_to_input=False),
    "saelens_batchtopk": saelens_batchtopk,
    "saelens_scaled": saelens_scaled,
    "dictionary_learning": lambda: dictionary_learning(AutoEncoderTopK, K),
    "dictionary_learning_batchtopk": lambda: dictionary_learning(BatchTopKSAE, K, threshold=2.0),
    "dictionary_learning_matryoshka": lambda: dictionary_learning(
        MatryoshkaBatchTopKSAE, K, [5, LATENTS - 5], threshold=2.0
    ),
    "dictionary_learning_jumprelu": lambda: dictionary_learning(dictionary.JumpReluAutoEncoder),
    "dictionary_learning_gated": lambda: dictionary_learning(dictionary.GatedAutoEncoder),
    "dictionary_learning_standard": lambda: dictionary_learning(dictionary.AutoEncoder),
    "dictionary_learning_new": lambda: dictionary_learning(dictionary.AutoEncoderNew),
    "gemma_scope": gemma_scope,
    "gemma_scope_2": gemma_scope_2,
    "llama_scope": llama_scope,
    "qwen_scope-L0_3": qwen_scope,
    "overcomplete": lambda: overcomplete(top_k=K),
    "overcomplete_jumprelu": lambda: overcomplete(JumpSAE),
}

if __name__ == "__main__":
    shutil.rmtree(SAES, ignore_errors=True)
    for name, make in MADE.items():
        save, encode, reconstruct = make()
        folder = SAES / name
        folder.mkdir(parents=True)
        save(folder)
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            seen = {"x": x, "z": encode(x), "x_hat": reconstruct(x)}
        save_file({key: tensor.contiguous() for key, tensor in seen.items()}, folder / "seen.safetensors")
