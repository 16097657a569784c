"""Write tests/fixtures/saes: small SAEs saved by the peers themselves, each with an input and what they make of it.

    python tests/peers/make_fixtures.py

in the peers' environment (test_peers_formats.py has the command that makes it). A folder holds the library's own
files and seen.safetensors: x, its dense latents z and the reconstruction x_hat, as the library computes them.
"""

import json
import shutil
from pathlib import Path

import torch
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from sae_lens import TopKSAE, TopKSAEConfig
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig

WIDTH, LATENTS, K = 6, 20, 3
SAES = Path(__file__).parent.parent / "fixtures" / "saes"


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Weights as no start has them: biases that are not 0, dictionary rows of different lengths."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in module.parameters():
            weights.copy_(torch.randn(weights.shape, generator=draw))
    return module.eval()


def sparsify() -> tuple:
    sae = randomise(SparseCoder(WIDTH, SparseCoderConfig(num_latents=LATENTS, k=K)))

    def encode(x):
        found = sae.encode(x)
        return torch.zeros(len(x), LATENTS).scatter(1, found.top_indices, found.top_acts)

    return sae.save_to_disk, encode, lambda x: sae(x).sae_out


def saelens(**settings) -> tuple:
    sae = randomise(TopKSAE(TopKSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=K, **settings)))
    return sae.save_model, sae.encode, sae


def dictionary_learning() -> tuple:
    sae = randomise(AutoEncoderTopK(WIDTH, LATENTS, K))
    trainer = {"trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK"}
    trainer |= {"activation_dim": WIDTH, "dict_size": LATENTS, "k": K, "layer": 4, "lm_name": "none"}

    def save(folder):
        torch.save(sae.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}, indent=4))

    return save, sae.encode, sae


MADE = {
    "sparsify": sparsify,
    "saelens": saelens,
    "saelens_uncentred": lambda: saelens(apply_b_dec_to_input=False),
    "saelens_by_length": lambda: saelens(rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False),
    "dictionary_learning": dictionary_learning,
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
