"""Name the places of a model whose output an SAE can read: a hookpoint is a decoder layer's number, or a name.

- `24` or `"decoder.24"`: the output of a decoder layer, counted from 0;
- `"decoder.24.attention"` and `"decoder.24.mlp"`: what the layer's attention or MLP adds to the residual stream. Gemma
  and GLM-4V normalise it once more before they add it: there it is the output of this norm;
- `"vision.5"`: the output of a layer of the vision tower. Only `base` tokens have a state there: that of their patch;
- `"projector"`: the image's `base` and `tiles` tokens as they enter the decoder, behind the projector and whatever the
  family does there, such as merging, scaling or unpadding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from lmm_sae_nb.model.token_kinds import KINDS

Hookpoint = int | str

PARTS = ("vision", "projector", "decoder")  # in the order of a forward pass
INNER = ("attention", "mlp", "")  # in the order of a layer's forward; "" is the layer's own output
MODULES = {  # what transformers' decoder layers call them
    "attention": ("self_attn", "linear_attn", "self_attention", "attn"),
    "mlp": ("mlp", "feed_forward", "block_sparse_moe", "ffn"),
}
NORMS = {  # behind a module, before its output is added to the residual stream
    "attention": ("post_self_attn_layernorm",),
    "mlp": ("post_feedforward_layernorm", "post_mlp_layernorm"),
}
FORM = re.compile(r"(decoder)\.(\d+)(?:\.(attention|mlp))?|(vision)\.(\d+)|(projector)")


class Parsed(NamedTuple):
    """A hookpoint taken apart.

    part: one of PARTS.
    layer: of the part, 0-based; 0 for the projector.
    inner: one of INNER.
    """

    part: str
    layer: int = 0
    inner: str = ""

    @property
    def order(self) -> tuple[int, int, int]:
        """When it is computed in a forward pass: an earlier hookpoint has a lower one."""
        return PARTS.index(self.part), self.layer, INNER.index(self.inner)


def parsed(hookpoint: Hookpoint) -> Parsed | None:
    """Take a hookpoint apart; None if no model has one of this form."""
    if not isinstance(hookpoint, str):
        return Parsed("decoder", hookpoint) if hookpoint >= 0 and not isinstance(hookpoint, bool) else None
    if (found := FORM.fullmatch(hookpoint)) is None:
        return None
    decoder, layer, inner, vision, number, projector = found.groups()
    return Parsed(decoder or vision or projector, int(layer or number or 0), inner or "")


def plain(hookpoint: Hookpoint) -> Hookpoint:
    """Return the form in which a hookpoint is recorded: a number for a decoder layer, a name for all others."""
    known = parsed(hookpoint)
    return hookpoint if known is None or known.part != "decoder" or known.inner else known.layer


def in_order(hookpoints: Iterable[Hookpoint]) -> list[Hookpoint]:
    """Return each hookpoint once, in plain form, in the order in which a forward pass computes them."""
    return sorted({plain(each) for each in hookpoints}, key=lambda each: parsed(each).order)


def layers_below(hookpoint: Hookpoint) -> int:
    """Return how many decoder layers run until a hookpoint is computed; the one that it lies in counts."""
    known = parsed(hookpoint)
    return known.layer + 1 if known.part == "decoder" else 0


def kinds_at(hookpoint: Hookpoint) -> tuple[str, ...]:
    """Return the kinds of token that have a state at a hookpoint."""
    return {"vision": ("base",), "projector": ("base", "tiles"), "decoder": KINDS}[parsed(hookpoint).part]


def require_kinds(hookpoint: Hookpoint, kinds: Iterable[str]) -> None:
    """Check that tokens of these kinds have states at a hookpoint.

    Raises:
        ValueError: some have none.
    """
    known = kinds_at(hookpoint)
    if missing := [kind for kind in kinds if kind in KINDS and kind not in known]:
        raise ValueError(
            f"{hookpoint} has no states of the tokens {', '.join(missing)}; give kinds: [{', '.join(known)}]"
        )


def published_as(hookpoint: Hookpoint) -> str:
    """Return the folder of a hookpoint in a repository of SAEs, as sparsify calls it; other texts as they are."""
    known = parsed(hookpoint)
    if known is None or known.part != "decoder":
        return str(hookpoint)
    inner = {"attention": ".self_attn", "mlp": ".mlp", "": ""}[known.inner]
    return f"layers.{known.layer}{inner}"


def titled(hookpoint: Hookpoint) -> str:
    """Return a hookpoint as a sentence names it: `layer 24`, or its name."""
    return f"layer {hookpoint}" if isinstance(plain(hookpoint), int) else str(hookpoint)


def decoder_of(model: PreTrainedModel) -> nn.Module | None:
    """Return the module that holds the decoder layers, `layers`; None if there is no plain stack of them."""
    decoder = model.get_decoder()
    while not hasattr(decoder, "layers"):  # Llama 4's decoder has a head and a decoder of its own
        inner = getattr(decoder, "model", None)
        if not isinstance(inner, nn.Module) or inner is decoder:
            return None
        decoder = inner
    return decoder


def module_of(model: PreTrainedModel, hookpoint: Hookpoint) -> nn.Module | None:
    """Return the module whose output a hookpoint is; None if the model has none, and for the projector."""
    known = parsed(hookpoint)
    layer = _layer_of(model, known)
    if layer is None or not known.inner:
        return layer
    return _norm_behind(layer, known.inner) or _first(layer, MODULES[known.inner])


def is_normed(model: PreTrainedModel, hookpoint: Hookpoint) -> bool:
    """Say whether the family normalises the output of attention or MLP once more before it adds it."""
    known = parsed(hookpoint)
    layer = _layer_of(model, known)
    return layer is not None and _norm_behind(layer, known.inner) is not None


def _layer_of(model: PreTrainedModel, known: Parsed | None) -> nn.Module | None:
    """Return the layer that a hookpoint lies in; None if the model has none, and for the projector."""
    if known is None or known.part == "projector":
        return None
    layers = decoder_of(model).layers if known.part == "decoder" else vision_layers(model)
    return layers[known.layer] if known.layer < len(layers) else None


def _norm_behind(layer: nn.Module, inner: str) -> nn.Module | None:
    """Return the norm that a layer's attention or MLP goes through before it is added, if there is one."""
    if inner == "attention" and hasattr(layer, "pre_feedforward_layernorm"):
        return layer.post_attention_layernorm  # of Gemma; most families call the norm before the MLP so
    return _first(layer, NORMS.get(inner, ()))


def _first(layer: nn.Module, names: Iterable[str]) -> nn.Module | None:
    """Return the first of these modules that a layer has."""
    return next((part for name in names if isinstance(part := getattr(layer, name, None), nn.Module)), None)


def vision_layers(model: PreTrainedModel) -> nn.ModuleList | tuple[()]:
    """Return the layers of the vision tower: the longest list of modules outside of the decoder, the first of such."""
    inside = {id(module) for module in model.get_decoder().modules()}
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList) and id(each) not in inside]
    return max(lists, key=len, default=())


def weights_of(model: PreTrainedModel, hookpoint: Hookpoint) -> list[Tensor]:
    """Return the weights of the module whose output a hookpoint is, with those of a module before its norm.

    For the projector, those of all before the decoder.
    """
    if hookpoint != "projector":
        known, modules = parsed(hookpoint), [module_of(model, hookpoint)]
        if is_normed(model, hookpoint):
            modules.append(_first(_layer_of(model, known), MODULES[known.inner]))
        return [tensor for module in modules for tensor in module.state_dict().values()]
    late = {id(tensor) for tensor in model.get_decoder().state_dict(keep_vars=True).values()}
    late |= {id(tensor) for tensor in model.get_output_embeddings().parameters()}
    return [tensor for tensor in model.state_dict(keep_vars=True).values() if id(tensor) not in late]


def require(model: PreTrainedModel, hookpoint: Hookpoint, name: str) -> None:
    """Check that a model has a hookpoint.

    name: of the model, for the message.

    Raises:
        ValueError: it has not; the message lists those that it has.
    """
    if module_of(model, hookpoint) is None and hookpoint != "projector":
        layers, seen = len(decoder_of(model).layers), len(vision_layers(model))
        what = f"hookpoint {hookpoint!r}" if isinstance(hookpoint, str) else f"layer {hookpoint}"
        tower = f"vision.0 to vision.{seen - 1}, " if seen else ""
        raise ValueError(
            f"no {what}: {name} has layers 0 to {layers - 1}, 0-based; other hookpoints are {tower}projector, and "
            f"decoder.0 to decoder.{layers - 1}, each also with .attention or .mlp behind it"
        )
