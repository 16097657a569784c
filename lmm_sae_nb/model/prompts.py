"""Prompts: a batch with its tokens' kinds and its answers."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import BatchFeature

from lmm_sae_nb.model.token_kinds import Spans

# For families that were trained without a chat template.
TEMPLATES = {
    "instructblip": "{% for message in messages %}"
    "{% for part in message.content %}{% if part.type == 'text' %}"
    "{{ ' ' if message.role == 'assistant' }}{{ part.text }}"
    "{% endif %}{% endfor %}"
    "{{ eos_token if message.role == 'assistant' }}"
    "{% endfor %}"
}


@dataclass
class Prompt:
    """A batch ready for the model: its inputs, what each token is, and which tokens answer."""

    inputs: BatchFeature
    spans: list[Spans]
    answer_mask: Bool[Tensor, "batch tokens"] | None = None  # an answer and its end token; None: no answers
    entry: dict[str, Any] | None = None  # what the decoder is called with, once `LMM.entered` has found out

    def mask(self, *kinds: str) -> Bool[Tensor, "batch tokens"]:
        """Mark the tokens of any of these kinds, in every sample."""
        return torch.stack([spans.mask(*kinds) for spans in self.spans])
