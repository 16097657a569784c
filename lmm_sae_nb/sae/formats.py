"""SAE checkpoints on disk in the formats of sparsify (the paper's), SAELens 6 and dictionary_learning.

Each is a folder of two files, a config and the weights. FORMATS says how each library lays out the same four tensors.
`read_sae` finds the format by the files and returns the weights of eq. 1 and 2. It refuses other kinds of SAE.
"""

from __future__ import annotations

import errno
import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lmm_sae_nb.support.files import as_json, free_bytes, read_json, write_json, write_through
from lmm_sae_nb.support.tensor_files import check_once, open_tensors, save_tensors

NOT_WHOLE = (
    RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
ROWS = 4096  # rows that are looked at at a time


class SAEWeights(NamedTuple):
    """The weights of a TopK SAE, one row for each latent; see `TopKSAE`."""

    W_enc: Float[Tensor, "latents width"]
    b_enc: Float[Tensor, " latents"]
    W_dec: Float[Tensor, "latents width"]
    b_dec: Float[Tensor, " width"]
    k: int


class Settings(NamedTuple):
    """The settings in a checkpoint's config.

    centred: whether the encoder reads x - b_dec; otherwise it reads x.
    by_length: whether TopK compares activations times the length of the latent's dictionary row.
    """

    n_latents: int
    width: int
    k: int
    centred: bool = True
    by_length: bool = False


class Format(NamedTuple):
    """How a library lays out a TopK SAE.

    config, weights: names of the two files.
    names: names of W_enc, b_enc, W_dec and b_dec.
    transposed: the matrix in which a column is a latent; "" if there is none.
    spare: further tensors that do not change what the SAE computes.
    settings: reads the config.
    describe: makes the config.
    open: returns the tensors by name; each has a shape and reads only the rows that are indexed.
    save: writes the tensors.
    """

    config: str
    weights: str
    names: tuple[str, str, str, str]
    transposed: str
    spare: tuple[str, ...]
    settings: Callable[[Path, dict], Settings]
    describe: Callable[[SAEWeights], dict]
    open: Callable[[Path], Mapping]
    save: Callable[[Path, dict[str, Tensor], SAEWeights], None]


def read_sae(folder: str | Path, latents: Sequence[int] | None = None) -> SAEWeights:
    """Read an SAE in any of FORMATS onto the CPU, in the file's dtype.

    Settings that eq. 1 and 2 do not have are folded into the weights.

    folder: holds the config and the weights.
    latents: read only the rows of these latents, in this order; by default all. If a column is a latent, as in
        SAELens' W_enc, the system may read the whole matrix.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file was cut short or damaged; tensors are missing, unknown, of several dtypes, of other shapes
            than the config says, or hold NaN or infinity; a latent does not exist; or the folder holds another kind of
            SAE, several formats, or only folders of SAEs.
    """
    folder, settings = Path(folder), settings_of(folder)
    form = FORMATS[format_of(folder)]
    tensors = form.open(folder / form.weights)
    _check(str(folder / form.weights), form, settings, tensors)
    if latents is not None and not all(0 <= latent < settings.n_latents for latent in latents):
        raise ValueError(f"latents {list(latents)}: {folder} has latents 0 to {settings.n_latents - 1}")
    *rows, b_dec = (
        _take(tensors[name], latents if n < 3 else None, transposed=name == form.transposed)
        for n, name in enumerate(form.names)
    )
    for n, (name, tensor) in enumerate(zip(form.names, (*rows, b_dec), strict=True)):
        _require_finite(f"{folder / form.weights}: {name}", tensor, latents if n < 3 else None, of_latents=n < 3)
    return _fold(SAEWeights(*rows, b_dec, settings.k), settings)


def write_sae(folder: str | Path, weights: SAEWeights, format: str = "sparsify") -> None:
    """Write an SAE in one of FORMATS, each file atomically; tensors keep their bits.

    An old config of another SAE is deleted first and the new one is written last, so no crash leaves a readable
    mixture.

    Raises:
        ValueError: the format is unknown, shapes are wrong, dtypes differ, weights hold NaN or infinity, or the folder
            holds another format's SAE.
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise ValueError(f"no format {format!r}; choose one of {', '.join(FORMATS)}")
    if other := [name for name in _formats_in(folder) if name != format]:
        raise ValueError(f"{folder} holds an SAE in the format {other[0]}; write {format} to a folder of its own")
    form, origin, settings = FORMATS[format], "the weights to write", Settings(*weights.W_enc.shape, weights.k)
    _check_sizes(origin, settings)
    tensors = dict(zip(form.names, weights[:4], strict=True))
    tensors = {name: tensor.T if name == form.transposed else tensor for name, tensor in tensors.items()}
    _check(origin, form, settings, tensors)
    for n, (name, tensor) in enumerate(zip(form.names, weights[:4], strict=True)):
        _require_finite(f"{origin}: {name}", tensor, of_latents=n < 3)
    config = form.describe(weights)
    if (path := folder / form.config).is_file() and path.read_bytes() != as_json(config):
        path.unlink()
    form.save(folder / form.weights, tensors, weights)
    write_json(path, config)


def settings_of(folder: str | Path) -> Settings:
    """Read the config of a folder's SAE without its weights; errors as `read_sae`."""
    form = FORMATS[format_of(folder)]
    path = Path(folder) / form.config
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; an SAE's folder holds {form.config} and {form.weights}: train one with "
            "notebooks/01_train_sae.py or download the layer's folder of a published one"
        )
    return form.settings(path, read_json(path))


def format_of(folder: str | Path) -> str:
    """Return the name of the folder's format, found by the weights' file; errors as `read_sae`."""
    folder = Path(folder)
    formats = _formats_in(folder)
    if len(formats) == 1:
        return formats[0]
    if formats:
        raise ValueError(f"{folder} holds SAEs in the formats {', '.join(formats)}; keep each in a folder of its own")
    if inner := sorted(path.name for path in folder.glob("*/") if _formats_in(path)):
        raise ValueError(
            f"{folder} holds no SAE itself, but one for each seed or hookpoint: {', '.join(inner)}; give one of them"
        )
    files = ", ".join(f"{form.weights} ({name})" for name, form in FORMATS.items())
    raise FileNotFoundError(
        f"{folder} holds no SAE, none of the files {files}; train one with notebooks/01_train_sae.py or download the "
        "layer's folder of a published one"
    )


def _formats_in(folder: Path) -> list[str]:
    return [name for name, form in FORMATS.items() if (folder / form.weights).is_file()]


def _take(rows, latents: Sequence[int] | None, *, transposed: bool) -> Tensor:
    """Read a lazily readable tensor, or only the rows of some latents (the columns, if transposed)."""
    if latents is None:
        return (rows[:].T if transposed else rows[:]).clone(memory_format=torch.contiguous_format)
    if not latents:
        return _take(rows, [0], transposed=transposed)[:0]
    if transposed:
        return torch.cat([rows[:, latent : latent + 1] for latent in latents], 1).T.contiguous()
    return torch.cat([rows[latent : latent + 1] for latent in latents])


def _fold(weights: SAEWeights, settings: Settings) -> SAEWeights:
    """Return weights with the same latents and reconstruction that need no settings beyond eq. 1 and 2."""
    W_enc, b_enc, W_dec, b_dec, k = weights
    if not settings.centred:  # W x + b = W (x - b_dec) + (b + W b_dec)
        b_enc = (b_enc.double() + W_enc.double() @ b_dec.double()).to(b_enc.dtype)
    if settings.by_length:  # scale the activation by the row's length, and the row to length 1
        length = torch.linalg.vector_norm(W_dec.double(), dim=1).clamp_min(torch.finfo(W_dec.dtype).tiny)
        W_enc, W_dec = (W_enc * length[:, None]).to(W_enc.dtype), (W_dec / length[:, None]).to(W_dec.dtype)
        b_enc = (b_enc * length).to(b_enc.dtype)
    return SAEWeights(W_enc, b_enc, W_dec, b_dec, k)


def _check(origin: str, form: Format, settings: Settings, tensors: Mapping) -> None:
    """Raise ValueError unless the tensors are those of the format, in the shapes that the settings say."""
    n_latents, width, k, *_ = settings
    shapes = dict(zip(form.names, ((n_latents, width), (n_latents,), (n_latents, width), (width,)), strict=True))
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(
                f"{origin} has no {name} (it holds {', '.join(tensors)}); expected a whole SAE with {', '.join(shapes)}"
            )
        shape = shape[::-1] if name == form.transposed else shape
        if (actual := _shape(tensors[name])) != shape:
            raise ValueError(
                f"{origin}: {name} is {actual}, but {n_latents} latents of width {width} make it {shape}; take config "
                "and weights from the same checkpoint"
            )
    known = {*shapes, *form.spare, *(["k"] if isinstance(tensors.get("k"), Tensor) else [])}
    if more := tensors.keys() - known:
        raise ValueError(f"{origin} also holds {', '.join(sorted(more))}, which a TopK SAE does not have; use another")
    if "k" in tensors and int(tensors["k"]) != k:  # a safetensors file has it in its header
        raise ValueError(f"{origin} has k {int(tensors['k'])}, {form.config} has k {k}; take both from one checkpoint")
    dtypes = {name: str(tensors[name][:0].dtype).removeprefix("torch.") for name in shapes}
    if len(set(dtypes.values())) > 1:
        found = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{origin} mixes dtypes: {found}; bring all four tensors to one")
    if not next(iter(tensors[name][:0] for name in shapes)).dtype.is_floating_point:
        raise ValueError(f"{origin} holds weights of dtype {dtypes[form.names[0]]}; expected floating-point numbers")


def _require_finite(
    origin: str, tensor: Tensor, latents: Sequence[int] | None = None, *, of_latents: bool = True
) -> None:
    """Raise ValueError if a tensor holds NaN or infinity, and name the latents.

    latents: the numbers of its rows, by default from 0.
    of_latents: its rows are latents.
    """
    parts = tensor.detach().split(ROWS) if len(tensor) else ()
    if all(math.isfinite(float(part.sum(dtype=torch.float64))) for part in parts):  # quicker than to look at each
        return
    bad = torch.cat([~part.reshape(len(part), -1).isfinite().all(1) for part in parts])
    rows = bad.nonzero().flatten().tolist()
    rows = rows if latents is None else [latents[row] for row in rows]
    named = ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10:,} more" if len(rows) > 10 else "")
    raise ValueError(
        f"{origin} holds NaN or infinity at {'latents' if of_latents else 'places'} {named}; the training that made it "
        "went wrong, or the file is damaged: train or download it again"
    )


def _shape(tensor) -> tuple[int, ...]:
    return tuple(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())


def _settings(path: Path, config: dict, expected: str, sizes: Callable[[dict], tuple], **more: bool) -> Settings:
    """Return the settings of a config.

    expected: names the keys it should hold, for the error.
    sizes: takes the numbers of latents, width and k from the config.
    more: further settings.
    """
    try:
        settings = Settings(*map(_whole_number, sizes(config)), **more)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        keys = ", ".join(config) or "nothing"
        raise ValueError(f"{path} is no config of a TopK SAE ({error!r}); expected {expected}, found {keys}") from error
    _check_sizes(str(path), settings)
    return settings


def _whole_number(value: object) -> int:
    """Return a whole number as int; ValueError for a fraction, true, or a text."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _check_sizes(origin: str, settings: Settings) -> None:
    n_latents, width, k, *_ = settings
    if width < 1 or not 1 <= k <= n_latents:
        raise ValueError(
            f"{origin}: width {width}, k {k} and {n_latents} latents make no SAE; expected a width of at least 1 and "
            "k from 1 to the number of latents"
        )


OTHERS = {  # part of another kind's name -> what it does instead of keeping the k largest latents of every token
    "matryoshka": "keeps k latents a token only on average over a batch, in nested groups",
    "batchtopk": "keeps k latents a token only on average over a batch, by a threshold when it is used",
    "jumprelu": "keeps every latent above that latent's own threshold, however many",
    "gated": "has a second encoder that decides which latents are active",
    "abstopk": "keeps the largest absolute values, negative ones too",
    "groupmax": "keeps the largest latent of each of k groups",
    "transcoder": "predicts another activation than the one that it reads",
    "pursuit": "finds its latents one after the other",
    "temporal": "reads more than one token",
    "standard": "keeps every latent above 0, however many",
    "autoencoder": "keeps every latent above 0, however many",
}


def _require(path: Path, config: Mapping, key: str, wanted: str | bool, otherwise: str = "") -> None:
    """Raise ValueError if a config has this key with another value than `wanted`; it says what the SAE does instead."""
    value = config.get(key, wanted)
    if value != wanted:
        kind = str(value).lower().replace("_", "")
        why = otherwise or next((why for part, why in OTHERS.items() if part in kind), "is of a kind not known here")
        raise ValueError(
            f"{path}: {key} is {value!r}: it {why}. That is not eq. 1 and 2; use an SAE with {key} {wanted!r}"
        )


# sparsify, and the paper's own.


def _sparsify_settings(path: Path, config: dict) -> Settings:
    _require(path, config, "activation", "topk")
    _require(path, config, "signed", False, "keeps the largest absolute values, negative ones too")
    _require(path, config, "transcode", False, "predicts a module's output from its input")
    _require(path, config, "skip_connection", False, "adds a linear map of its input")
    return _settings(
        path,
        config,
        "d_in, k and num_latents or expansion_factor",
        lambda c: (c.get("num_latents") or _product(c["d_in"], c["expansion_factor"]), c["d_in"], c["k"]),
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


# SAELens 6.


def _saelens_settings(path: Path, config: dict) -> Settings:
    about = config.get("metadata") if isinstance(config.get("metadata"), dict) else {}
    version = str(config.get("sae_lens_version") or about.get("sae_lens_version") or "unknown")
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 6:
        raise ValueError(f"{path} is of SAELens {version}, before 6; load it with sae-lens 6 and save it again")
    if "architecture" not in config:
        raise ValueError(f"{path} names no architecture; expected 'topk', found {', '.join(config)}")
    _require(path, config, "architecture", "topk")
    scales = "scales every token by its own length or spread"
    if config.get("normalize_activations") in ("expected_average_only_in", "covariance_whitening"):
        scales = "scales its input by what is measured and not stored; fold it in with sae-lens and save it again"
    _require(path, config, "normalize_activations", "none", scales)
    _require(path, config, "reshape_activations", "none", "reads the heads of an attention, not a layer's output")
    return _settings(
        path,
        config,
        "d_in, d_sae and k",
        lambda c: (c["d_sae"], c["d_in"], c["k"]),
        centred=bool(config.get("apply_b_dec_to_input", True)),
        by_length=bool(config.get("rescale_acts_by_decoder_norm", False)),
    )


def _saelens_config(weights: SAEWeights) -> dict:
    n_latents, width = weights.W_dec.shape
    return {
        "architecture": "topk",
        "d_in": width,
        "d_sae": n_latents,
        "k": weights.k,
        "dtype": str(weights.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {"sae_lens_version": "6.0.0"},
    }


def _open_safetensors(path: Path) -> Mapping:
    try:
        file = open_tensors(path)
    except ValueError as error:
        raise ValueError(
            f"{error}: train the SAE again with notebooks/01_train_sae.py, or download it again"
        ) from error
    rows = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    k = (file.metadata() or {}).get("k", "")
    return rows | {"k": torch.tensor(int(k))} if k.isdecimal() else rows


def _save_safetensors(path: Path, tensors: dict[str, Tensor], weights: SAEWeights) -> None:
    """Write the tensors with a checksum; k stands in the header, too, to notice a config of another SAE."""
    save_tensors(path, tensors, {"format": "pt", "k": str(weights.k)})


# dictionary_learning.


def _dictionary_learning_settings(path: Path, config: dict) -> Settings:
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise ValueError(
            f"{path} has no trainer with a dict_class, and ae.pt alone does not say TopK or BatchTopK; take the "
            "config.json that was saved beside it"
        )
    _require(path, trainer, "dict_class", "AutoEncoderTopK")
    return _settings(
        path,
        trainer,
        "activation_dim, dict_size and k",
        lambda c: (c["dict_size"], c["activation_dim"], c["k"]),
    )


def _dictionary_learning_config(weights: SAEWeights) -> dict:
    n_latents, width = weights.W_dec.shape
    sizes = {"activation_dim": width, "dict_size": n_latents, "k": weights.k}
    return {"trainer": {"trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK", **sizes}}


def _open_pickled(path: Path) -> Mapping:
    """Map the tensors of a torch.save file into memory; no code in it is run (weights_only)."""
    try:
        check_once(path, _require_whole_records)
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except NOT_WHOLE as error:
        raise ValueError(
            f"{path} is not a whole file of tensors ({str(error).splitlines()[0]}): it was cut short, is something "
            "else, or holds objects that would have to be run; download it again or save its state_dict"
        ) from error
    if isinstance(state, dict) and "ae" in state:
        raise ValueError(
            f"{path} is a backup from the middle of a training (it holds {', '.join(map(str, state))}), whose weights "
            "may not be scaled back yet; use the ae.pt from the end of the training"
        )
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds no state_dict, that is names and tensors; save the dictionary's state_dict")
    return state


def _require_whole_records(path: Path) -> None:
    """Raise ValueError if a record of a torch.save file has a wrong checksum; torch writes them and does not check."""
    with zipfile.ZipFile(path) as records:
        if broken := records.testzip():
            raise ValueError(f"the checksum of {broken} is wrong")


def _save_pickled(path: Path, tensors: dict[str, Tensor], weights: SAEWeights) -> None:
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    whole |= {"k": torch.tensor(weights.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}  # -1: never measured
    size = sum(tensor.numel() * tensor.element_size() for tensor in whole.values())

    def write(temporary: Path) -> None:
        try:
            torch.save(whole, temporary)
        except RuntimeError as error:  # torch hides what the system said
            if free_bytes(path) > size:
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error

    write_through(path, write, size)


FORMATS = {
    "sparsify": Format(
        config="cfg.json",
        weights="sae.safetensors",
        names=("encoder.weight", "encoder.bias", "W_dec", "b_dec"),
        transposed="",
        spare=(),
        settings=_sparsify_settings,
        describe=_sparsify_config,
        open=_open_safetensors,
        save=_save_safetensors,
    ),
    "saelens": Format(
        config="cfg.json",
        weights="sae_weights.safetensors",
        names=("W_enc", "b_enc", "W_dec", "b_dec"),
        transposed="W_enc",
        spare=(),
        settings=_saelens_settings,
        describe=_saelens_config,
        open=_open_safetensors,
        save=_save_safetensors,
    ),
    "dictionary_learning": Format(
        config="config.json",
        weights="ae.pt",
        names=("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"),
        transposed="decoder.weight",
        spare=("k", "threshold"),
        settings=_dictionary_learning_settings,
        describe=_dictionary_learning_config,
        open=_open_pickled,
        save=_save_pickled,
    ),
}
