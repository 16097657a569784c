"""How each library writes its SAEs: names of files and tensors, and the meaning of the config.

`FORMATS` can be read and written, `READ_ONLY` can be read. A format's `settings` refuses what cannot be brought to the
form of `folding`, with the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lmm_sae_nb.sae import hook_names, weight_files
from lmm_sae_nb.sae.folding import SAEWeights
from lmm_sae_nb.support.files import read_json

K_MAX = 512  # places for the active latents of a token where no file says how many; few SAEs need so many


class Layout(NamedTuple):
    """The names of an SAE's tensors in a file; "" for one that it does not have.

    W_enc, b_enc, W_dec, b_dec: as in `SAEWeights`; of a gated SAE, b_enc is b_mag. A bias without a name is 0.
    transposed: the matrices in which a column is a latent.
    threshold: one number, or one for each latent.
    r_mag, b_gate: of a gated SAE.
    spare: further tensors that do not change what the SAE computes.
    """

    W_enc: str
    b_enc: str
    W_dec: str
    b_dec: str
    transposed: tuple[str, ...] = ()
    threshold: str = ""
    r_mag: str = ""
    b_gate: str = ""
    spare: tuple[str, ...] = ()


class Settings(NamedTuple):
    """What a checkpoint says of its SAE.

    k: active latents per token; with a threshold, places for them.
    layout: of the tensors.
    threshold: of all latents, if it is not a tensor; None for TopK.
    centred: whether the encoder reads x - b_dec; otherwise it reads x.
    by_length: whether latents are chosen by activation times the length of the dictionary row.
    scale: factor of the input.
    hook: the library's name of the place that the SAE reads; "" if the files do not say it.
    """

    n_latents: int
    width: int
    k: int
    layout: Layout
    threshold: float | None = None
    centred: bool = True
    by_length: bool = False
    scale: float = 1.0
    hook: str = ""

    @property
    def has_threshold(self) -> bool:
        """Whether a latent is active above a threshold, and not by being among the k largest."""
        return self.threshold is not None or bool(self.layout.threshold or self.layout.b_gate)


class Asked(NamedTuple):
    """What the user says of an SAE because its file may not.

    k: active latents per token, of a TopK SAE.
    k_max: the most active latents of a token, of any other.
    """

    k: int | None = None
    k_max: int | None = None

    def places(self, n_latents: object) -> object:
        """Return the places for a token's active latents in an SAE with a threshold."""
        return min(K_MAX, n_latents) if self.k_max is None and isinstance(n_latents, int) else self.k_max


class Format(NamedTuple):
    """How a library lays out an SAE in a folder.

    config, weights: names of the two files, the latter as a pattern; "" if there is no config.
    settings: reads the config (empty if it is missing), the tensors by name, and what the user says.
    open: returns the tensors by name; each has a shape and reads only the rows that are indexed.
    beside: names of further files that `settings` may read.
    layout: what is written. None: nothing is.
    threshold: the name of the tensor of thresholds in what is written; "" if only TopK SAEs are.
    describe: makes the config.
    save: writes the tensors.
    """

    config: str
    weights: str
    settings: Callable[[Path, dict, Mapping, Asked], Settings]
    open: Callable[[Path], Mapping]
    beside: tuple[str, ...] = ()
    layout: Layout | None = None
    threshold: str = ""
    describe: Callable[[SAEWeights], dict] | None = None
    save: Callable[[Path, dict[str, Tensor], SAEWeights], None] | None = None

    @property
    def names(self) -> tuple[str, str, str, str]:
        """The names of W_enc, b_enc, W_dec and b_dec in what is written."""
        return self.layout[:4]


# ---- what a config says ---------------------------------------------------------------------------------------------


def _settings(path: Path, config: dict, expected: str, sizes: Callable[[dict], tuple], layout: Layout, **more):
    """Return the settings of a config.

    expected: names the keys it should hold, for the error.
    sizes: takes the numbers of latents, width and k from the config.
    more: further settings.
    """
    try:
        settings = Settings(*map(_whole_number, sizes(config)), layout, **more)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        keys = ", ".join(config) or "nothing"
        raise ValueError(f"{path} is no config of an SAE ({error!r}); expected {expected}, found {keys}") from error
    check_sizes(str(path), settings.n_latents, settings.width, settings.k)
    return settings


def _whole_number(value: object) -> int:
    """Return a whole number as int; ValueError for a fraction, true, or a text."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def check_sizes(origin: str, n_latents: int, width: int, k: int) -> None:
    """Raise ValueError if there is no SAE of these sizes."""
    if width < 1 or not 1 <= k <= n_latents:
        raise ValueError(
            f"{origin}: width {width}, k {k} and {n_latents} latents make no SAE; expected a width of at least 1 and "
            "k from 1 to the number of latents"
        )


def shape_of(tensor: object) -> tuple[int, ...]:
    """Return the shape of a tensor, or of one in a file."""
    return tuple(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())


def _rows_of(path: Path, tensors: Mapping, name: str) -> tuple[int, int]:
    """Return the shape of a matrix; ValueError if it is missing or none."""
    if name not in tensors or len(shape_of(tensors[name])) != 2:
        raise ValueError(f"{path} has no matrix {name} (it holds {', '.join(tensors)}); expected a whole SAE")
    return shape_of(tensors[name])


OTHERS = {  # part of another kind's name -> what it does
    "abstopk": "keeps the largest absolute values, negative ones too",
    "groupmax": "keeps the largest latent of each of k groups",
    "transcoder": "predicts another activation than the one that it reads",
    "pursuit": "finds its latents one after the other",
    "temporal": "reads more than one token",
}


def _require(path: Path, config: Mapping, key: str, wanted: object, otherwise: str = "") -> None:
    """Raise ValueError if a config has this key with another value than `wanted`; it says what the SAE does instead.

    wanted: a value, or several of which one is right.
    """
    right = wanted if isinstance(wanted, tuple) else (wanted,)
    value = config.get(key, right[0])
    if value not in right:
        kind = str(value).lower().replace("_", "")
        why = otherwise or next((why for part, why in OTHERS.items() if part in kind), "is of a kind not known here")
        raise ValueError(
            f"{path}: {key} is {value!r}: it {why}; use an SAE with {key} " + " or ".join(map(repr, right))
        )


# ---- sparsify, and the paper's own ----------------------------------------------------------------------------------

SPARSIFY = Layout("encoder.weight", "encoder.bias", "W_dec", "b_dec")


def _sparsify_settings(path: Path, config: dict, tensors: Mapping, asked: Asked) -> Settings:
    _require(path, config, "activation", "topk")
    _require(path, config, "signed", False, "keeps the largest absolute values, negative ones too")
    _require(path, config, "transcode", False, "predicts a module's output from its input")
    _require(path, config, "skip_connection", False, "adds a linear map of its input")
    return _settings(
        path,
        config,
        "d_in, k and num_latents or expansion_factor",
        lambda c: (c.get("num_latents") or _product(c["d_in"], c["expansion_factor"]), c["d_in"], c["k"]),
        SPARSIFY,
        hook=hook_names.folder_hook(path),
    )


def _product(width: object, factor: object) -> float:
    if not all(isinstance(number, int | float) for number in (width, factor)):
        raise ValueError(f"d_in {width!r} times expansion_factor {factor!r} is no number")
    return width * factor


def _sparsify_config(weights: SAEWeights) -> dict:
    """Return a config with only the keys that the paper's loader knows; it fails on any other."""
    n_latents, width = weights.W_dec.shape
    lengths = weights.W_dec.detach().float().norm(dim=1)
    return {
        "expansion_factor": max(1, n_latents // width),
        "normalize_decoder": bool((lengths - 1).abs().max() < 1e-3),
        "num_latents": n_latents,
        "k": weights.k,
        "multi_topk": False,
        "d_in": width,
    }


# ---- SAELens 6 ------------------------------------------------------------------------------------------------------

SCALER = "activation_scaler.json"
SAELENS = Layout("W_enc", "b_enc", "W_dec", "b_dec", ("W_enc",))
SAELENS_KINDS = {  # architecture -> layout, and the threshold of all latents
    "topk": (SAELENS, None),
    "standard": (SAELENS, 0.0),
    "jumprelu": (SAELENS._replace(threshold="threshold"), None),
    "gated": (SAELENS._replace(b_enc="b_mag", r_mag="r_mag", b_gate="b_gate"), None),
    "batchtopk": (SAELENS._replace(threshold="topk_threshold"), None),  # in training; then jumprelu
    "matryoshka_batchtopk": (SAELENS._replace(threshold="topk_threshold"), None),
}


def _saelens_settings(path: Path, config: dict, tensors: Mapping, asked: Asked) -> Settings:
    about = config.get("metadata") if isinstance(config.get("metadata"), dict) else {}
    version = str(config.get("sae_lens_version") or about.get("sae_lens_version") or "unknown")
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 6:
        raise ValueError(f"{path} is of SAELens {version}, before 6; load it with sae-lens 6 and save it again")
    if "architecture" not in config:
        raise ValueError(f"{path} names no architecture; expected one of {', '.join(SAELENS_KINDS)}")
    _require(path, config, "architecture", tuple(SAELENS_KINDS))
    _require(path, config, "reshape_activations", "none", "reads the heads of an attention, not a layer's output")
    kind = config["architecture"]
    layout, threshold = SAELENS_KINDS[kind]
    asked = asked._replace(k_max=asked.k_max or about.get("k_max"))  # k_max: only in what this project wrote
    return _settings(
        path,
        config,
        "d_in, d_sae and k" if kind == "topk" else "d_in and d_sae",
        lambda c: (c["d_sae"], c["d_in"], c["k"] if kind == "topk" else asked.places(c["d_sae"])),
        layout,
        threshold=threshold,
        centred=bool(config.get("apply_b_dec_to_input", True)),
        by_length=bool(config.get("rescale_acts_by_decoder_norm", False)),
        scale=_saelens_scale(path, config),
        hook=hook_names.saelens_hook(path, config),
    )


def _saelens_scale(path: Path, config: dict) -> float:
    """Return the factor that a SAELens SAE multiplies its input by; in a checkpoint it stands in a file of its own."""
    scaler = path.with_name(SCALER)
    if config.get("normalize_activations") == "expected_average_only_in" and scaler.is_file():
        factor = read_json(scaler).get("scaling_factor")
        if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < math.inf:
            raise ValueError(f"{scaler}: scaling_factor is {factor!r}; expected a number above 0")
        return float(factor)
    scales = "scales every token by its own length or spread"
    if config.get("normalize_activations") in ("expected_average_only_in", "covariance_whitening"):
        scales = (
            f"scales its input by what is measured and not stored (there is no {SCALER}); fold it in with "
            "sae-lens and save it again"
        )
    _require(path, config, "normalize_activations", "none", scales)
    return 1.0


def _saelens_config(weights: SAEWeights) -> dict:
    n_latents, width = weights.W_dec.shape
    topk = weights.threshold is None
    return {
        "architecture": "topk" if topk else "jumprelu",
        "d_in": width,
        "d_sae": n_latents,
        **({"k": weights.k} if topk else {}),
        "dtype": str(weights.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **({"rescale_acts_by_decoder_norm": False} if topk else {}),
        "metadata": {"sae_lens_version": "6.0.0"} | ({} if topk else {"k_max": weights.k}),
    }


# ---- dictionary_learning --------------------------------------------------------------------------------------------

DICTIONARY_LEARNING = Layout("encoder.weight", "encoder.bias", "decoder.weight", "b_dec", ("decoder.weight",))
_MATRICES = Layout("W_enc", "b_enc", "W_dec", "b_dec", ("W_enc",), threshold="threshold")
DICTIONARY_KINDS = {  # dict_class -> layout, threshold of all latents, centred
    "AutoEncoderTopK": (DICTIONARY_LEARNING._replace(spare=("k", "threshold")), None, True),
    "BatchTopKSAE": (DICTIONARY_LEARNING._replace(threshold="threshold", spare=("k",)), None, True),
    "MatryoshkaBatchTopKSAE": (_MATRICES._replace(spare=("k", "group_sizes")), None, True),
    "JumpReluAutoEncoder": (_MATRICES, None, False),
    "GatedAutoEncoder": (
        DICTIONARY_LEARNING._replace(b_enc="mag_bias", b_dec="decoder_bias", r_mag="r_mag", b_gate="gate_bias"),
        None,
        True,
    ),
    "AutoEncoder": (DICTIONARY_LEARNING._replace(b_dec="bias"), 0.0, True),
    "AutoEncoderNew": (DICTIONARY_LEARNING._replace(b_dec="decoder.bias"), 0.0, False),
}


def _dictionary_learning_settings(path: Path, config: dict, tensors: Mapping, asked: Asked) -> Settings:
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise ValueError(
            f"{path} has no trainer with a dict_class, and ae.pt alone does not say TopK or BatchTopK; take the "
            "config.json that was saved beside it"
        )
    _require(path, trainer, "dict_class", tuple(DICTIONARY_KINDS))
    layout, threshold, centred = DICTIONARY_KINDS[trainer["dict_class"]]
    topk = threshold is None and not (layout.threshold or layout.b_gate)
    if layout.threshold and isinstance(tensors.get("threshold"), Tensor) and bool((tensors["threshold"] == -1).all()):
        raise ValueError(
            f"{path}: the threshold is -1: it was not measured yet, in a training of fewer steps than "
            "threshold_start_step; train it for longer"
        )
    return _settings(
        path,
        trainer,
        "activation_dim, dict_size and k" if topk else "activation_dim and dict_size",
        lambda c: (c["dict_size"], c["activation_dim"], c["k"] if topk else asked.places(c["dict_size"])),
        layout,
        threshold=threshold,
        centred=centred,
        hook=hook_names.dictionary_learning_hook(trainer),
    )


def _dictionary_learning_config(weights: SAEWeights) -> dict:
    n_latents, width = weights.W_dec.shape
    sizes = {"activation_dim": width, "dict_size": n_latents, "k": weights.k}
    return {"trainer": {"trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK", **sizes}}


# ---- Gemma Scope and Gemma Scope 2 ----------------------------------------------------------------------------------


def _gemma_scope_settings(path: Path, config: dict, tensors: Mapping, asked: Asked) -> Settings:
    _require(path, config, "architecture", "jump_relu")
    _require(path, config, "type", "sae")
    _require(path, config, "affine_connection", False, "adds a linear map of its input")
    read, predicted = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if predicted not in (None, read):
        raise ValueError(f"{path}: it reads {read} and predicts {predicted}, so it is a transcoder; use an SAE")
    if "embedding" in path.parent.parts:
        raise ValueError(f"{path}: it reads token embeddings scaled by the model's width, no layer's output")
    if "scaling_factor" in tensors and not bool((tensors["scaling_factor"][:] == 1).all()):
        raise ValueError(f"{path}: it scales its activations by scaling_factor, which is not known here; use another")
    w = "w" if "w_enc" in tensors else "W"
    layout = Layout(
        f"{w}_enc", "b_enc", f"{w}_dec", "b_dec", (f"{w}_enc",), threshold="threshold", spare=("scaling_factor",)
    )
    width, n_latents = _rows_of(path, tensors, layout.W_enc)
    return _settings(
        path,
        config,
        "nothing",
        lambda _: (n_latents, width, asked.places(n_latents)),
        layout,
        centred=False,
        hook=hook_names.gemma_scope_hook(path, config),
    )


# ---- Llama Scope ----------------------------------------------------------------------------------------------------

LLAMA_SCOPE = Layout("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias", ("decoder.weight",))


def _llama_scope_settings(path: Path, config: dict, tensors: Mapping, asked: Asked) -> Settings:
    """Return the settings of a checkpoint of Language-Model-SAEs as Llama Scope published it.

    `jump_relu_threshold` is of activations in the input's own scale, so it is scaled as the input is (as SAELens does).
    """
    _require(path, config, "act_fn", ("jumprelu", "topk", "relu"))
    _require(path, config, "use_glu_encoder", False, "multiplies the encoder's output by a gate of its own")
    scales = "scales every token or batch by its own length"
    _require(path, config, "norm_activation", ("dataset-wise", "inference"), scales)
    if config.get("hook_point_out") not in (None, config.get("hook_point_in")):
        raise ValueError(
            f"{path}: it reads {config.get('hook_point_in')} and predicts {config['hook_point_out']}, so it is a "
            "transcoder; use an SAE"
        )
    kind, width = config.get("act_fn"), config.get("d_model")
    try:
        scale = 1.0
        if config.get("norm_activation") != "inference":
            scale = math.sqrt(width) / config["dataset_average_activation_norm"]["in"]
        threshold = {"topk": None, "relu": 0.0}.get(kind, 0.0)
        if kind == "jumprelu":
            threshold = config["jump_relu_threshold"] * scale
        if not (0 < scale < math.inf and 0 <= (threshold or 0) < math.inf):
            raise ValueError(f"a factor of {scale} and a threshold of {threshold}")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{path} is no config of an SAE ({error!r}); expected d_model, jump_relu_threshold and "
            f"dataset_average_activation_norm, found {', '.join(config) or 'nothing'}"
        ) from error
    return _settings(
        path,
        config,
        "d_model, d_sae and top_k",
        lambda c: (c["d_sae"], c["d_model"], c["top_k"] if kind == "topk" else asked.places(c["d_sae"])),
        LLAMA_SCOPE if config.get("use_decoder_bias", True) else LLAMA_SCOPE._replace(b_dec=""),
        threshold=threshold,
        centred=bool(config.get("apply_decoder_bias_to_pre_encoder", True)),
        by_length=bool(config.get("sparsity_include_decoder_norm", True)),
        scale=scale,
        hook=str(config.get("hook_point_in") or ""),
    )


# ---- Qwen-Scope -----------------------------------------------------------------------------------------------------

QWEN_SCOPE = Layout("W_enc", "b_enc", "W_dec", "b_dec", ("W_dec",), spare=("k",))


def _qwen_scope_settings(path: Path, config: dict, tensors: Mapping, asked: Asked) -> Settings:
    """Return the settings of a checkpoint of Qwen-Scope; k stands in the repository's name, as in `...-L0_50`."""
    named = re.findall(r"L0_(\d+)", str(path.absolute()))
    k = int(tensors["k"]) if "k" in tensors else int(named[-1]) if named else asked.k
    if k is None:
        raise ValueError(
            f"{path} does not say how many latents are active, and no folder above it has a name as '...-L0_50'; give "
            "k, such as SAE.load(path, k=50)"
        )
    n_latents, width = _rows_of(path, tensors, "W_enc")
    hook = hook_names.qwen_scope_hook(path)
    return _settings(path, config, "nothing", lambda _: (n_latents, width, k), QWEN_SCOPE, centred=False, hook=hook)


# ---- overcomplete ---------------------------------------------------------------------------------------------------


def _overcomplete_settings(path: Path, config: dict, tensors: Mapping, asked: Asked) -> Settings:
    """Return the settings of a state_dict of overcomplete with a linear encoder; it does not say k."""
    prefix = "encoder.final_block.0" if "encoder.final_block.0.weight" in tensors else "encoder"
    rows = f"{prefix}.weight" if f"{prefix}.weight" in tensors else "dictionary._weights"  # tied
    bias = f"{prefix}.bias" if f"{prefix}.bias" in tensors else ""
    threshold = "thresholds" if "thresholds" in tensors else ""
    if asked.k is None and not threshold:
        raise ValueError(
            f"{path} does not say how many latents are active; give k, such as SAE.load(path, k=50), which is right "
            "for Heinz217/mllm-retrieval-analysis-sae"
        )
    n_latents, width = _rows_of(path, tensors, "dictionary._weights")
    k = asked.places(n_latents) if threshold else asked.k
    layout = Layout(rows, bias, "dictionary._weights", "", threshold=threshold)
    return _settings(path, config, "nothing", lambda _: (n_latents, width, k), layout)


FORMATS = {
    "sparsify": Format(
        config="cfg.json",
        weights="sae.safetensors",
        settings=_sparsify_settings,
        open=weight_files.open_safetensors,
        layout=SPARSIFY,
        describe=_sparsify_config,
        save=weight_files.save_safetensors,
    ),
    "saelens": Format(
        config="cfg.json",
        weights="sae_weights.safetensors",
        settings=_saelens_settings,
        open=weight_files.open_safetensors,
        beside=(SCALER,),
        layout=SAELENS,
        threshold="threshold",
        describe=_saelens_config,
        save=weight_files.save_safetensors,
    ),
    "dictionary_learning": Format(
        config="config.json",
        weights="ae.pt",
        settings=_dictionary_learning_settings,
        open=weight_files.open_pickled,
        layout=DICTIONARY_LEARNING,
        describe=_dictionary_learning_config,
        save=weight_files.save_pickled,
    ),
}
READ_ONLY = {
    "gemma_scope": Format("", "params.npz", _gemma_scope_settings, weight_files.open_npz),
    "gemma_scope_2": Format("config.json", "params.safetensors", _gemma_scope_settings, weight_files.open_safetensors),
    "llama_scope": Format(
        "hyperparams.json", "checkpoints/final.safetensors", _llama_scope_settings, weight_files.open_safetensors
    ),
    "qwen_scope": Format("", "*.sae.pt", _qwen_scope_settings, weight_files.open_with_k),
    "overcomplete": Format("", "sae_*.pt", _overcomplete_settings, weight_files.open_overcomplete),
}
NO_CONFIG_NEEDED = ("gemma_scope_2",)  # its config only says what the file must be
