"""Put the states of a layer of the vision tower into the decoder's layout, and back.

A layer of the tower has a state for each patch of each crop. Where the crop that shows the whole image has one patch
for each `base` token, in the same order, these states are put at the base tokens of a tensor (batch, tokens, width),
with zeros elsewhere. A class token before the patches is left out. Patches of tiles are left out, too: families drop
their padding and shrink them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from lmm_sae_nb.model.crops import whole_images
from lmm_sae_nb.model.found_layouts import mixes
from lmm_sae_nb.model.hooks import Hidden
from lmm_sae_nb.model.prompts import Prompt

REMEDY = "use the hookpoint projector, or a decoder layer"


def at_tokens(model: PreTrainedModel, prompt: Prompt, patches: Tensor, place: str) -> Hidden:
    """Return the states of patches at their base tokens, (batch, tokens, width), with zeros elsewhere.

    patches: output of a layer of the tower for this prompt.
    place: the hookpoint, for the error.

    Raises:
        ValueError: the tower does not have a patch for each base token.
    """
    rows, base = _rows(model, prompt, patches, place), prompt.mask("base").to(patches.device)
    states = patches.new_zeros(*base.shape, patches.shape[-1])
    return states.masked_scatter(base[..., None], patches.flatten(0, -2)[rows])


def at_patches(model: PreTrainedModel, prompt: Prompt, patches: Tensor, states: Hidden, place: str) -> Tensor:
    """Return the patches with the states of base tokens in their places; arguments and errors as `at_tokens`."""
    rows, base = _rows(model, prompt, patches, place), prompt.mask("base").to(patches.device)
    new = patches.flatten(0, -2).index_copy(0, rows, states[base].to(patches.dtype))
    return new.view_as(patches)


def _rows(
    model: PreTrainedModel, prompt: Prompt, patches: Float[Tensor, "*crops patches width"], place: str
) -> Int64[Tensor, " base"]:
    """Return for each base token of the batch, in order, its number among all patches."""
    base, family = int(prompt.mask("base").sum()), model.config.model_type
    if mixes(model):
        raise ValueError(f"{place} has no state for a base token: the tokens of a {family} mix all patches; {REMEDY}")
    if patches.ndim != 3:
        raise ValueError(f"{place} has no state for a base token: a {family} merges several patches to one; {REMEDY}")
    whole = whole_images(model, prompt.inputs)
    if whole is None:  # every crop is an image
        whole = torch.ones(len(patches), dtype=torch.bool)
    crops, (count, length) = whole.nonzero()[:, 0], patches.shape[:2]
    each, rest = divmod(base, len(crops))
    if len(whole) != count or rest or length - each not in (0, 1):
        raise ValueError(
            f"{place} has no state for each base token: {count} crops of {length} patches became {base} base tokens "
            f"of {len(crops)} images in this {family}, which merges patches, or makes several answers at once; {REMEDY}"
        )
    numbers = torch.arange(length - each, length)
    return (crops[:, None] * length + numbers).flatten().to(patches.device)
