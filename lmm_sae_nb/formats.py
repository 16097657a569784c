"""SAE checkpoints on disk: the paper's published format, which is also sparsify's.

A folder holds cfg.json and sae.safetensors (encoder.weight, encoder.bias, W_dec, b_dec; a row is a latent).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from lmm_sae_nb.artifacts import as_json, open_tensors, read_json, save_tensors, write_json

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
# Variants that sparsify can write and that are not eq. 1 and 2, each with the value that leaves it out.
REFUSED = {"activation": "topk", "signed": False, "transcode": False, "skip_connection": False}


class SparsifyWeights(NamedTuple):
    """What a checkpoint of the published format holds."""

    W_enc: Float[Tensor, "latents width"]
    b_enc: Float[Tensor, " latents"]
    W_dec: Float[Tensor, "latents width"]
    b_dec: Float[Tensor, " width"]
    k: int


def write_sparsify(folder: str | Path, weights: SparsifyWeights) -> None:
    """Write `weights` as folder/cfg.json and folder/sae.safetensors, each whole or not at all.

    Only the keys that the paper's loader knows are written: it fails on any other. Weights go first, and a
    cfg.json of other sizes goes before them, so that no crash leaves a mixture that could be read.
    """
    n_latents, width = weights.W_enc.shape
    tensors = dict(zip(_shapes(n_latents, width), weights[:4], strict=True))
    lengths = weights.W_dec.detach().float().norm(dim=1)
    config = {
        "expansion_factor": max(1, n_latents // width),
        "normalize_decoder": bool((lengths - 1).abs().max() < 1e-3),
        "num_latents": n_latents,
        "k": weights.k,
        "multi_topk": False,
        "d_in": width,
    }
    if (path := Path(folder) / CONFIG).is_file() and path.read_bytes() != as_json(config):
        path.unlink()
    save_tensors(Path(folder) / WEIGHTS, tensors, {"format": "pt"})
    write_json(path, config)


def read_sparsify(folder: str | Path) -> SparsifyWeights:
    """Read a checkpoint of the published format, in its own dtype; settings it does not need are ignored.

    FileNotFoundError if one of the two files is missing; ValueError if one was cut short, weights are missing
    or of other shapes than cfg.json says, or it is another kind of dictionary (transcoder, groupmax, signed).
    """
    config_path, weights_path = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    if not config_path.is_file():
        raise FileNotFoundError(
            f"{config_path} is missing; an SAE's folder holds {CONFIG} and {WEIGHTS}: train one with "
            "notebooks/01_train_sae.py or download the layer's folder of a published one"
        )
    n_latents, width, k = _sizes(config_path)
    with open_tensors(weights_path) as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        for name, shape in _shapes(n_latents, width).items():
            if name not in found:
                raise ValueError(
                    f"{weights_path} has no {name} (it holds {', '.join(found)}); expected a whole SAE as "
                    "the paper or sparsify saves it: convert another format first"
                )
            if found[name] != shape:
                raise ValueError(
                    f"{weights_path}: {name} is {found[name]}, but {CONFIG} says {n_latents} latents of "
                    f"width {width}, so {shape}; take both files from the same checkpoint"
                )
        tensors = [file.get_tensor(name) for name in _shapes(n_latents, width)]
    return SparsifyWeights(*tensors, k=k)


def _shapes(n_latents: int, width: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint, in the order of `SparsifyWeights`."""
    return {
        "encoder.weight": (n_latents, width),
        "encoder.bias": (n_latents,),
        "W_dec": (n_latents, width),
        "b_dec": (width,),
    }


def _sizes(path: Path) -> tuple[int, int, int]:
    """Latents, width and k as cfg.json tells them; num_latents 0 means width times expansion_factor."""
    config = read_json(path)
    for key, plain in REFUSED.items():
        if config.get(key, plain) != plain:
            raise ValueError(
                f"{path}: {key} is {config[key]!r}, which is not the paper's SAE (eq. 1, 2); use one with "
                f"{key} {plain!r}"
            )
    try:
        width, k = int(config["d_in"]), int(config["k"])
        n_latents = int(config.get("num_latents") or width * int(config["expansion_factor"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no cfg.json of the paper's or sparsify's SAEs ({error!r}); expected d_in, k "
            f"and num_latents or expansion_factor, found {', '.join(config) or 'nothing'}"
        ) from error
    if width < 1 or not 1 <= k <= n_latents:
        raise ValueError(
            f"{path}: d_in {width}, k {k} and {n_latents} latents make no SAE; expected d_in >= 1 and k "
            "from 1 to the number of latents"
        )
    return n_latents, width, k
