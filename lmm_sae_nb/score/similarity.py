"""Similarity of images and texts (CLIP)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from lmm_sae_nb.score.segmenters import _batches, _finite, _positive

_DOT = Image.new("RGB", (1, 1))


Similarity = Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray]


def clip_score(similarity: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The paper's CLIP score: 100 times the cosine, and 0 where that is negative (torchmetrics' CLIPScore)."""
    return 100 * np.maximum(similarity, 0)


class ImageTextSimilarity:
    """Cosines (n,) float32 in [-1, 1] of n pictures and n texts, by a CLIP. Texts go in as they are, without a prompt
    around them, as in the reference code; longer ones than CLIP can read are cut. The model given is put
    into eval mode, its parameters without gradients."""

    def __init__(self, model: CLIPModel, processor: CLIPProcessor, *, batch: int = 32):
        self.model, self.processor, self.batch = model.eval().requires_grad_(False), processor, _positive(batch)
        self._read: tuple[tuple[str, ...] | None, Tensor | None] = (None, None)

    @classmethod
    def load(cls, name: str | Path, *, device: str = "cpu", **options) -> ImageTextSimilarity:
        """From a folder or a name on the hub (the reference code's is `openai/clip-vit-base-patch32`). OSError if there
        is no such model."""
        model = CLIPModel.from_pretrained(name, dtype=torch.float32).to(device)
        return cls(model, CLIPProcessor.from_pretrained(name), **options)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Float[np.ndarray, " n"]:
        cosines = [np.zeros(0, np.float32)]
        longest = self.model.config.text_config.max_position_embeddings
        for pictures, words in _batches(images, texts, self.batch):
            inputs = self.processor(
                text=words, images=pictures, padding=True, truncation=True, max_length=longest, return_tensors="pt"
            )
            outputs = self.model(**inputs.to(self.model.device))
            pairs = F.cosine_similarity(outputs.image_embeds, outputs.text_embeds)
            cosines.append(_finite(pairs, "CLIP").cpu().numpy())
        return np.concatenate(cosines)

    @torch.no_grad()
    def grid(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Float[np.ndarray, "images texts"]:
        """Cosines of every picture with every text, float32; each picture and each text goes through the model once.

        The last texts are remembered, so that pictures can come in parts. Both have to be as in a call.
        """
        if self._read[0] != (wanted := tuple(texts)):
            self._read = wanted, self._words(wanted)
        cosines = [np.zeros((0, len(texts)), np.float32)]
        for pictures, _ in _batches(images, ["a"] * len(images), self.batch):
            inputs = self.processor(images=pictures, return_tensors="pt").to(self.model.device)
            seen = self.model.visual_projection(self.model.vision_model(inputs["pixel_values"]).pooler_output)
            cosines.append(_finite(F.normalize(seen, dim=-1) @ self._read[1].T, "CLIP").cpu().numpy())
        return np.concatenate(cosines)

    def _words(self, texts: Sequence[str]) -> Tensor:
        """(texts, width): every text as a vector of length 1."""
        found = [torch.zeros(0, self.model.config.projection_dim, device=self.model.device)]
        longest = self.model.config.text_config.max_position_embeddings
        for _, words in _batches([_DOT] * len(texts), list(texts), self.batch):
            inputs = self.processor(text=words, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            read = self.model.text_model(**inputs.to(self.model.device)).pooler_output
            found.append(F.normalize(self.model.text_projection(read), dim=-1))
        return torch.cat(found)
