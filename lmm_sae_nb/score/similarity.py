"""Compare images with texts (CLIP)."""

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

from lmm_sae_nb.model.loading import load_model
from lmm_sae_nb.score.batches import batches, require_batch_size, require_finite_output
from lmm_sae_nb.support.devices import choose_device
from lmm_sae_nb.support.images import rgb

_DOT = Image.new("RGB", (1, 1))

# cosines of every image with every text, as `ImageTextSimilarity.all_pairs` gives them
AllPairs = Callable[[Sequence[Image.Image], Sequence[str]], Float[np.ndarray, "images texts"]]


def clip_score(cosines: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return the paper's CLIP score: 100 times the cosine, and 0 where that is negative (torchmetrics' CLIPScore)."""
    return 100 * np.maximum(cosines, 0)


class ImageTextSimilarity:
    """Cosines of images and texts, by a CLIP model.

    Texts go in without a prompt around them, as in the reference code. A text longer than CLIP can read is cut.

    model: is put into eval mode, without gradients.
    processor: the model's own.
    batch: images that the model reads at once.
    """

    def __init__(self, model: CLIPModel, processor: CLIPProcessor, *, batch: int = 32):
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.batch = require_batch_size(batch)
        self._encoded: tuple[tuple[str, ...] | None, Tensor | None] = (None, None)

    @classmethod
    def load(cls, name: str | Path, *, device: str | torch.device | None = None, **options) -> ImageTextSimilarity:
        """Load a model from a folder or the hub; the reference code's is `openai/clip-vit-base-patch32`.

        device: by default a GPU if there is one.
        options: as for the class.

        Raises:
            OSError: there is no such model.
        """
        model = load_model(CLIPModel, name, dtype=torch.float32).to(choose_device(device))
        return cls(model, CLIPProcessor.from_pretrained(name), **options)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Float[np.ndarray, " n"]:
        """Return the cosine of each image with its text, float32 in [-1, 1]; errors as `require_pairs`."""
        cosines = [np.zeros(0, np.float32)]
        longest = self.model.config.text_config.max_position_embeddings
        for pictures, words in batches(images, texts, self.batch):
            inputs = self.processor(
                text=words, images=pictures, padding=True, truncation=True, max_length=longest, return_tensors="pt"
            )
            outputs = self.model(**inputs.to(self.model.device))
            pairs = F.cosine_similarity(outputs.image_embeds, outputs.text_embeds)
            cosines.append(require_finite_output(pairs, "CLIP").cpu().numpy())
        return np.concatenate(cosines)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "images width"]:
        """Return each image as a vector of length 1, float32; the images may be opened one by one."""
        vectors = [np.zeros((0, self.model.config.projection_dim), np.float32)]
        for start in range(0, len(images), self.batch):
            pictures = [rgb(images[n]) for n in range(start, min(start + self.batch, len(images)))]
            vectors.append(self._embedded(pictures).cpu().numpy())
        return np.concatenate(vectors)

    @torch.no_grad()
    def all_pairs(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Float[np.ndarray, "images texts"]:
        """Return the cosine of every image with every text, float32 in [-1, 1].

        Each image and each text goes through the model once. The last texts are remembered, so that images can come
        in parts. Errors as `require_pairs`.
        """
        if self._encoded[0] != (wanted := tuple(texts)):
            self._encoded = wanted, self._encode(wanted)
        cosines = [np.zeros((0, len(texts)), np.float32)]
        for pictures, _ in batches(images, ["a"] * len(images), self.batch):
            cosines.append((self._embedded(pictures) @ self._encoded[1].T).cpu().numpy())
        return np.concatenate(cosines)

    def _embedded(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "images width"]:
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.model.device)
        pooled = self.model.vision_model(inputs["pixel_values"]).pooler_output
        return require_finite_output(F.normalize(self.model.visual_projection(pooled), dim=-1), "CLIP")

    def _encode(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        """Return each text as a vector of length 1."""
        vectors = [torch.zeros(0, self.model.config.projection_dim, device=self.model.device)]
        longest = self.model.config.text_config.max_position_embeddings
        for _, words in batches([_DOT] * len(texts), list(texts), self.batch):
            inputs = self.processor(text=words, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            pooled = self.model.text_model(**inputs.to(self.model.device)).pooler_output
            vectors.append(F.normalize(self.model.text_projection(pooled), dim=-1))
        return torch.cat(vectors)


def open_similarity(name: str | Path, device: str | torch.device | None = None) -> AllPairs | None:
    """Return the cosines of images and texts by the CLIP that a page names; None if it names none.

    name: a folder or a name on the hub; "" if there is none.
    device: by default a GPU if there is one.
    """
    if not name:
        return None
    return ImageTextSimilarity.load(name, device=device).all_pairs
