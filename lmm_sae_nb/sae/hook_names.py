"""The names by which other libraries say what an SAE reads, and the place in the model that each name means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from lmm_sae_nb.model.hookpoints import Hookpoint, parsed, plain, titled

EMBEDDINGS = "embeddings"
AFTER, BEFORE = "", "<"  # the output of a layer; its input, which is the output of the layer before
PARTS = {  # what a library says behind the layer's number -> AFTER, BEFORE, or our name of a part of the layer
    "": AFTER, "output": AFTER, "hook_resid_post": AFTER, "resid_post": AFTER,
    "input": BEFORE, "hook_resid_pre": BEFORE, "resid_pre": BEFORE,
    "mlp": "mlp", "mlp.output": "mlp", "hook_mlp_out": "mlp", "mlp_out": "mlp",
    "self_attn": "attention", "self_attn.output": "attention", "hook_attn_out": "attention", "attn_out": "attention",
    "attention_out": "attention",
    "post_feedforward_layernorm": "mlp", "post_feedforward_layernorm.output": "mlp",
}  # fmt: skip
UNNORMED = ("mlp", "mlp.output", "self_attn", "self_attn.output")  # what a module returns, before a norm behind it
MODULE = re.compile(r"(?P<before>[\w.]*?)(?:^|\.)?(?:layers|blocks|h)\.(?P<layer>\d+)(?:\.(?P<part>[\w.]+))?")
NUMBERED = re.compile(r"(?:(?P<part>[a-z_]+?)_)?layer[ _]?(?P<layer>\d+)")  # resid_post_layer_4, layer 4, layer_4
FOLDER = re.compile(r"(?:[\w.]+\.)?(?:layers|blocks|h)\.\d+(?:\.[\w.]+)?")
IMAGE_SIDE = ("vision", "visual", "image", "vit")  # parts of the names of modules that read pixels


def place_of(hook: str) -> str:
    """Return the place in the model that a library's hook name means, or "" if the name says nothing.

    The output of decoder layer 24 is "decoder.24", and the output of its MLP or attention "decoder.24.mlp" or
    "decoder.24.attention"; some families normalise it once more (`require_added`). The residual stream before layer 24
    is "decoder.23", before layer 0 "embeddings". Any other place in a layer keeps the library's own name of it, as
    "decoder.24.ln2.hook_normalized".

    hook: such as "blocks.24.hook_resid_post", "model.layers.24", "resid_post_layer_24" or "layer 24".
    """
    if hook in ("hook_embed", "embedding"):
        return EMBEDDINGS
    if parsed(hook):  # our own name
        return hook
    if match := MODULE.fullmatch(hook):
        if any(part in match["before"] for part in IMAGE_SIDE):
            return hook if PARTS.get(match["part"] or "", "?") else f"vision.{match['layer']}"
    elif not (match := NUMBERED.fullmatch(hook)):
        return ""
    layer, part = int(match["layer"]), match["part"] or ""
    part = PARTS.get(part, part)
    if part == BEFORE:
        return f"decoder.{layer - 1}" if layer else EMBEDDINGS
    return f"decoder.{layer}.{part}" if part else f"decoder.{layer}"


def layer_of(hook: str) -> Hookpoint | None:
    """Return the decoder layer, 0-based, or other hookpoint that a hook name means; None if it means no hookpoint."""
    place = place_of(hook)
    return plain(place) if parsed(place) else None


def require_layer(hook: str, layer: Hookpoint) -> None:
    """Check that an SAE's recorded hook name means this hookpoint.

    hook: a name that says nothing, such as "", is let through.
    layer: 0-based, or another hookpoint, in plain form.

    Raises:
        ValueError: it means another place.
    """
    reads = layer_of(hook)
    if not place_of(hook) or reads == layer:
        return
    if reads is None:
        raise ValueError(
            f"the SAE reads {hook!r}, which is not the output of {titled(layer)}, nor another hookpoint; "
            "use an SAE of the residual stream after a layer, or of an attention or MLP"
        )
    raise ValueError(
        f"the SAE reads {hook!r}, that is the output of {titled(reads)} (counted from 0), not of {titled(layer)}; set "
        f"layer to {reads}, or use an SAE of {titled(layer)}"
    )


def require_added(hook: str) -> None:
    """Check that an SAE reads what an attention or MLP adds, for a family that normalises it once more before.

    hook: the SAE's recorded hook name; sparsify and dictionary_learning name the module and so mean what it returns.

    Raises:
        ValueError: the SAE reads what the module returns.
    """
    match = MODULE.fullmatch(hook)
    if match and match["part"] in UNNORMED:
        raise ValueError(
            f"the SAE reads {hook!r}, what the module returns; this family normalises it once more before it adds it, "
            "and the hookpoint lies behind that norm. Use an SAE that reads behind the norm, or one of the residual "
            "stream after the layer"
        )


# ---- names in configs and paths -------------------------------------------------------------------------------------


def folder_hook(weights_or_config: Path) -> str:
    """Return the hook name that an SAE's folder is called by, as sparsify and SAELens do; "" if it is none.

    Also the folder above counts, as sparsify writes one for each seed into it.
    """
    folders = (weights_or_config.absolute().parent.name, weights_or_config.absolute().parent.parent.name)
    return next((name for name in folders if FOLDER.fullmatch(name) or parsed(name)), "")


def saelens_hook(path: Path, config: Mapping) -> str:
    """Return the hook name in a config of SAELens, or that of its folder."""
    about = config.get("metadata") if isinstance(config.get("metadata"), Mapping) else {}
    names = (part.get(key) for part in (about, config) for key in ("hook_name", "hook_point"))
    return next((name for name in names if isinstance(name, str) and name), folder_hook(path))


def dictionary_learning_hook(trainer: Mapping) -> str:
    """Return the name of the module in a config of dictionary_learning, or only its layer's number."""
    name, layer = trainer.get("submodule_name"), trainer.get("layer")
    if isinstance(name, str) and place_of(name):
        return name
    known = isinstance(layer, int) and not isinstance(layer, bool)
    if isinstance(name, str) and name in PARTS and known:
        return f"{name}_layer_{layer}"
    return f"layer {layer}" if known and layer >= 0 and not name else ""


def gemma_scope_hook(path: Path, config: Mapping) -> str:
    """Return the hook name of Gemma Scope (by its path) or Gemma Scope 2 (by its config, else its path).

    Gemma adds an MLP's output to the residual stream after one more norm, and its SAEs read behind that norm.
    """
    if isinstance(name := config.get("hf_hook_point_in"), str):
        return name
    folder = path.absolute().parent.as_posix()
    layers = re.findall(r"layer_(\d+)", folder)
    if not layers:
        return ""
    sites = {
        r"gemma-scope-[\w-]*res\b|resid_post": "output",
        r"gemma-scope-[\w-]*mlp\b|mlp_out": "post_feedforward_layernorm.output",
        r"gemma-scope-[\w-]*att\b|attn_out": "self_attn.o_proj.input",
    }
    site = next((site for pattern, site in sites.items() if re.search(pattern, folder)), "")
    return f"model.layers.{layers[-1]}.{site}" if site else f"layer {layers[-1]}"


def qwen_scope_hook(path: Path) -> str:
    """Return the hook name of Qwen-Scope, whose file layer7.sae.pt reads the residual stream after layer 7."""
    match = re.fullmatch(r"layer(\d+)\.sae\.pt", path.name)
    return f"blocks.{match[1]}.hook_resid_post" if match else ""
