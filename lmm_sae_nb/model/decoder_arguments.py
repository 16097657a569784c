"""Give a decoder only some samples or some tokens: cut what it is called with.

A decoder gets a row or column for each token in several arguments. Masks may be two-dimensional (which tokens are
padding), four-dimensional (which token sees which), or one of these for each kind of layer, as in Gemma 3. Qwen3-VL
also passes features of its vision tower that the first layers add at the image's tokens (deepstack).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

VISUAL = ("visual_pos_masks", "deepstack_visual_embeds")
# Arguments that `narrowed` cuts, or that hold for all samples and tokens.
KNOWN = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position",
    "output_attentions", "output_hidden_states", "return_dict", "is_causal", "logits_to_keep", *VISUAL,
}  # fmt: skip

Mask = Tensor | dict[str, Any] | None


def narrowed(arguments: dict[str, Any], tokens: slice, samples: Int64[Tensor, " n"] | None = None) -> dict[str, Any]:
    """Return the arguments of a decoder for some tokens of some samples.

    arguments: of KNOWN names.
    tokens: without a step. Tokens before its start are taken to be in a cache of keys and values: masks keep them.
    samples: numbers of the samples, each as often as it is wanted; None for all.
    """
    cut = dict(arguments)
    cut["inputs_embeds"] = _rows(arguments["inputs_embeds"], samples)[:, tokens]
    cut["attention_mask"] = _narrowed_mask(arguments.get("attention_mask"), tokens, samples)
    positions = arguments.get("position_ids")
    if positions is not None:  # the last axis: mrope has three positions a token
        if samples is not None and positions.shape[-2] > 1:
            positions = positions[..., samples.to(positions.device), :]
        cut["position_ids"] = positions[..., tokens]
    marks, features = (arguments.get(name) for name in VISUAL)
    if marks is not None and features is not None:
        number = marks.flatten().cumsum(0).view_as(marks) - 1  # of each visual token's row in the features
        number = _rows(number.masked_fill(~marks, -1), samples)[:, tokens]
        cut[VISUAL[0]] = number >= 0
        cut[VISUAL[1]] = [layer[number[number >= 0].to(layer.device)] for layer in features]
    return cut


def unknown(arguments: dict[str, Any]) -> list[str]:
    """Name the arguments that cannot be cut, because it is not known what they hold for each token."""
    return sorted(name for name, value in arguments.items() if value is not None and name not in KNOWN)


def looks_back_only(mask: Mask, at: int) -> bool:
    """Return whether no token before `at` sees one from `at` on.

    mask: a decoder's; False for a kind of mask that is not a tensor.
    """
    if isinstance(mask, dict):
        return all(looks_back_only(each, at) for each in mask.values())
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):  # the decoder makes a causal mask itself
        return True
    return isinstance(mask, Tensor) and not bool(_allowed(mask[..., :at, at:]).any())


def differing_tokens(mask: Mask) -> Bool[Tensor, " tokens"] | None:
    """Mark the tokens at which the samples' masks differ from the first one's; None for no mask."""
    if isinstance(mask, dict):
        parts = [part for each in mask.values() if (part := differing_tokens(each)) is not None]
        return torch.stack(parts).any(0) if parts else None
    if not isinstance(mask, Tensor):
        return None
    return (mask != mask[:1]).any(0) if mask.ndim == 2 else (mask != mask[:1]).any(-1).flatten(0, 1).any(0)


def _rows(value: Tensor, samples: Tensor | None) -> Tensor:
    return value if samples is None else value[samples.to(value.device)]


def _narrowed_mask(mask: Mask, tokens: slice, samples: Tensor | None) -> Mask:
    if isinstance(mask, dict):
        return {kind: _narrowed_mask(each, tokens, samples) for kind, each in mask.items()}
    if mask is None:
        return None
    if samples is not None:  # a mask may be the same for all samples
        mask = mask.expand(len(samples), *mask.shape[1:]) if len(mask) == 1 else _rows(mask, samples)
    return mask[:, : tokens.stop] if mask.ndim == 2 else mask[..., tokens, : tokens.stop]


def _allowed(mask: Tensor) -> Tensor:
    """Mark who sees whom; masks of numbers are added to scores and are hugely negative where nothing is seen."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
