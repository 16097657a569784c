"""SAE checkpoints on disk in the formats of many libraries, of all kinds that `activation` knows.

`libraries` says how each library lays out its tensors and what its config means. `read_sae` finds the format by the
files and returns weights that need no further setting (`folding`). It refuses other kinds of SAE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

import torch
from torch import Tensor

from lmm_sae_nb.sae import folding
from lmm_sae_nb.sae.folding import ROWS, SAEWeights
from lmm_sae_nb.sae.libraries import (
    FORMATS,
    NO_CONFIG_NEEDED,
    READ_ONLY,
    Asked,
    Format,
    Layout,
    Settings,
    check_sizes,
    shape_of,
)
from lmm_sae_nb.support.files import as_json, read_json, write_json

READABLE = FORMATS | READ_ONLY


def read_sae(
    source: str | Path, latents: Sequence[int] | None = None, *, k: int | None = None, k_max: int | None = None,
    device: torch.device | str = "cpu",
) -> SAEWeights:  # fmt: skip
    """Read an SAE in any of READABLE.

    Settings beyond eq. 1 and 2 and a threshold are folded into the weights. The dtype is the file's; weights of 16 bits
    that something is folded into become float32.

    source: a folder that holds the config and the weights, or the file of the weights where a folder holds several.
    latents: read only the rows of these latents, in this order; by default all. If a column is a latent, as in
        SAELens' W_enc, the system may read the whole matrix.
    k: active latents per token of a TopK SAE whose file does not say it.
    k_max: the most active latents that a token may have, of an SAE with a threshold; by default what
        `SAE.save` wrote, or 512. It costs memory; `SAE.encode` raises an error where it is too small.
    device: of the weights; the CPU's memory holds one tensor at a time on their way to a GPU.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file was cut short or damaged; tensors are missing, unknown, of several dtypes, of other shapes
            than the config says, or hold NaN or infinity; a latent does not exist; or there is another kind of SAE,
            several formats or files, or only folders of SAEs; k is missing, or another than the file's.
    """
    name, weights_file, settings, tensors = _open(Path(source), Asked(k, k_max))
    if k is not None and not settings.has_threshold and k != settings.k:
        raise ValueError(f"{source} is an SAE with k {settings.k}, not {k}; leave out k")
    layout, origin = settings.layout, str(weights_file)
    _check(origin, READABLE[name], settings, tensors)
    if latents is not None and not all(0 <= latent < settings.n_latents for latent in latents):
        raise ValueError(f"latents {list(latents)}: {source} has latents 0 to {settings.n_latents - 1}")
    found = {
        part: _take(tensors[tensor], None if part == "b_dec" else latents, transposed=tensor in layout.transposed).to(
            device
        )
        for part, tensor in _named(layout).items()
    }
    for part, tensor in _named(layout).items():
        of_latents = part != "b_dec" and found[part].dim() > 0
        _require_finite(f"{origin}: {tensor}", found[part], latents if of_latents else None, of_latents=of_latents)
    return _in_our_form(found, settings)._replace(hook=settings.hook)


def _in_our_form(found: Mapping[str, Tensor], settings: Settings) -> SAEWeights:
    """Return the weights that need no setting, from the tensors of a file by their part in `Layout`."""
    W_enc, W_dec = found["W_enc"], found["W_dec"]
    b_enc = found.get("b_enc", W_enc.new_zeros(len(W_enc)))
    b_dec = found.get("b_dec", W_dec.new_zeros(W_dec.shape[1]))
    threshold = found.get("threshold")
    if settings.threshold is not None:
        threshold = torch.full_like(b_enc, settings.threshold, dtype=torch.float32)
    if threshold is not None:
        threshold = threshold.expand_as(b_enc).to(b_enc.dtype).clamp_min(0).clone()
    weights = SAEWeights(W_enc, b_enc, W_dec, b_dec, settings.k, threshold)
    if "b_gate" in found or settings.by_length or settings.scale != 1 or not settings.centred:
        weights = folding.exact(weights)
    if "b_gate" in found:
        weights = folding.gated(weights, found["r_mag"].to(weights.b_enc), found["b_gate"].to(weights.b_enc))
    if settings.by_length:
        weights = folding.unit_rows(weights)
    if settings.scale != 1:
        weights = folding.scaled(weights, settings.scale)
    return weights if settings.centred else folding.centred(weights)


def write_sae(folder: str | Path, weights: SAEWeights, format: str = "sparsify") -> None:
    """Write an SAE in one of FORMATS, each file atomically; tensors keep their bits.

    An old config of another SAE is deleted first and the new one is written last, so no crash leaves a readable
    mixture.

    Raises:
        ValueError: the format is unknown or cannot hold thresholds, shapes are wrong, dtypes differ, weights hold NaN
            or infinity, or the folder holds another format's SAE.
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise ValueError(f"no format {format!r}; choose one of {', '.join(FORMATS)}")
    form, origin, layout = FORMATS[format], "the weights to write", FORMATS[format].layout
    if weights.threshold is not None:
        if not form.threshold:
            able = ", ".join(name for name, other in FORMATS.items() if other.threshold)
            raise ValueError(f"the format {format} is written for TopK SAEs only, this one has a threshold; use {able}")
        layout = layout._replace(threshold=form.threshold)
    if other := [name for name in _formats_in(folder) if name != format]:
        raise ValueError(f"{folder} holds an SAE in the format {other[0]}; write {format} to a folder of its own")
    settings = Settings(*weights.W_enc.shape, weights.k, layout)
    check_sizes(origin, settings.n_latents, settings.width, settings.k)
    tensors = {tensor: getattr(weights, part) for part, tensor in _named(layout).items()}
    tensors = {name: tensor.T if name in layout.transposed else tensor for name, tensor in tensors.items()}
    _check(origin, form, settings, tensors)
    for part, tensor in _named(layout).items():
        _require_finite(f"{origin}: {tensor}", getattr(weights, part), of_latents=part != "b_dec")
    config = form.describe(weights)
    if (path := folder / form.config).is_file() and path.read_bytes() != as_json(config):
        path.unlink()
    form.save(folder / form.weights, tensors, weights)
    write_json(path, config)


def settings_of(source: str | Path, *, k: int | None = None, k_max: int | None = None) -> Settings:
    """Read what the files say of an SAE without its weights; arguments and errors as `read_sae`."""
    return _open(Path(source), Asked(k, k_max))[2]


def format_of(source: str | Path) -> str:
    """Return the name of the format in a folder, or of a file of weights, found by names; errors as `read_sae`."""
    return _find(Path(source))[0]


# ---- the files ------------------------------------------------------------------------------------------------------


def _open(source: Path, asked: Asked) -> tuple[str, Path, Settings, Mapping]:
    """Return the format's name, the file of the weights, what is said of the SAE, and its tensors by name."""
    name, weights_file = _find(source)
    form = READABLE[name]
    base = weights_file.parents[len(PurePath(form.weights).parts) - 1]
    path = base / form.config if form.config else weights_file
    if not path.is_file() and name not in NO_CONFIG_NEEDED:
        raise FileNotFoundError(
            f"{path} is missing; an SAE's folder holds {form.config} and {form.weights}: train one with "
            "notebooks/01_train_sae.py or download the layer's folder of a published one"
        )
    config = read_json(path) if form.config and path.is_file() else {}
    tensors = form.open(weights_file)
    return name, weights_file, form.settings(path, config, tensors, asked), tensors


def _find(source: Path) -> tuple[str, Path]:
    """Return the format's name and the file of the weights."""
    if source.is_file():
        named = [name for name, form in READABLE.items() if source.match(form.weights)]
        if not named and source.suffix != ".pt":
            files = ", ".join(f"{form.weights} ({name})" for name, form in READABLE.items())
            raise ValueError(f"{source} is no file of an SAE's weights; those are {files}")
        return (named or ["overcomplete"])[0], source
    found = {name: sorted(source.glob(form.weights)) for name, form in READABLE.items()}
    found = {name: files for name, files in found.items() if files}
    if len(found) > 1:
        raise ValueError(f"{source} holds SAEs in the formats {', '.join(found)}; keep each in a folder of its own")
    for name, files in found.items():
        if len(files) > 1:
            raise ValueError(
                f"{source} holds {len(files)} SAEs: {', '.join(file.name for file in files)}; give the file of one"
            )
        return name, files[0]
    if inner := sorted(path.name for path in source.glob("*/") if _formats_in(path)):
        raise ValueError(
            f"{source} holds no SAE itself, but one for each seed or hookpoint: {', '.join(inner)}; give one of them"
        )
    files = ", ".join(f"{form.weights} ({name})" for name, form in READABLE.items())
    raise FileNotFoundError(
        f"{source} holds no SAE, none of the files {files}; train one with notebooks/01_train_sae.py or download the "
        "layer's folder of a published one"
    )


def _formats_in(folder: Path) -> list[str]:
    return [name for name, form in READABLE.items() if any(folder.glob(form.weights))]


def _take(rows, latents: Sequence[int] | None, *, transposed: bool) -> Tensor:
    """Read a lazily readable tensor, or only the rows of some latents (the columns, if transposed)."""
    if not shape_of(rows):  # one number for all latents
        return rows.clone()
    if latents is None:
        return (rows[:].T if transposed else rows[:]).clone(memory_format=torch.contiguous_format)
    if not latents:
        return _take(rows, [0], transposed=transposed)[:0]
    if transposed:
        return torch.cat([rows[:, latent : latent + 1] for latent in latents], 1).T.contiguous()
    return torch.cat([rows[latent : latent + 1] for latent in latents])


# ---- what is wrong with them ----------------------------------------------------------------------------------------


def _named(layout: Layout) -> dict[str, str]:
    """Return the names of the tensors that a layout has, by the field of `Layout`."""
    parts = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "r_mag", "b_gate")
    return {part: getattr(layout, part) for part in parts if getattr(layout, part)}


def _check(origin: str, form: Format, settings: Settings, tensors: Mapping) -> None:
    """Raise ValueError unless the tensors are those of the layout, in the shapes that the settings say."""
    n_latents, width, k, layout = settings[:4]
    named = _named(layout)
    shapes = {"W_enc": (n_latents, width), "W_dec": (n_latents, width), "b_dec": (width,)}
    for part, name in named.items():
        if name not in tensors:
            raise ValueError(
                f"{origin} has no {name} (it holds {', '.join(tensors)}); expected a whole SAE with "
                f"{', '.join(named.values())}"
            )
        shape = shapes.get(part, (n_latents,))
        shape = shape[::-1] if name in layout.transposed else shape
        actual = shape_of(tensors[name])
        if actual != shape and not (part == "threshold" and actual == ()):
            raise ValueError(
                f"{origin}: {name} is {actual}, but {n_latents} latents of width {width} make it {shape}; take config "
                "and weights from the same checkpoint"
            )
    known = {*named.values(), *layout.spare, *(["k"] if isinstance(tensors.get("k"), Tensor) else [])}
    if more := tensors.keys() - known:
        raise ValueError(
            f"{origin} also holds {', '.join(sorted(more))}, which an SAE of this kind does not have; use another"
        )
    if not settings.has_threshold and "k" in tensors and int(tensors["k"]) != k:  # safetensors: in the header
        raise ValueError(f"{origin} has k {int(tensors['k'])}, {form.config} has k {k}; take both from one checkpoint")
    dtypes = {
        name: str(tensors[name][:0].dtype).removeprefix("torch.") for name in named.values() if shape_of(tensors[name])
    }
    if len(set(dtypes.values())) > 1:
        found = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{origin} mixes dtypes: {found}; bring all {len(dtypes)} tensors to one")
    if not tensors[layout.W_enc][:0].dtype.is_floating_point:
        raise ValueError(f"{origin} holds weights of dtype {dtypes[layout.W_enc]}; expected floating-point numbers")


def _require_finite(
    origin: str, tensor: Tensor, latents: Sequence[int] | None = None, *, of_latents: bool = True
) -> None:
    """Raise ValueError if a tensor holds NaN or infinity, and name the latents.

    latents: the numbers of its rows, by default from 0.
    of_latents: its rows are latents.
    """
    tensor = tensor.detach().reshape(-1) if tensor.dim() == 0 else tensor.detach()
    parts = tensor.split(ROWS) if len(tensor) else ()
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
