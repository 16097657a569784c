"""Check and batch the images and texts that a scoring model reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from lmm_sae_nb.support.images import rgb


def require_pairs(images: Sequence[Image.Image], texts: Sequence[str]) -> None:
    """Check that there is one text for each image.

    images: PIL images with at least one pixel.
    texts: as many as images, none of them blank.

    Raises:
        ValueError: the numbers differ, an image is no image, or a text is no text.
    """
    if isinstance(texts, str) or len(images) != len(texts):
        count = 1 if isinstance(texts, str) else len(texts)
        raise ValueError(f"{len(images)} images and {count} texts; give a text each")
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        if not isinstance(image, Image.Image) or not image.width or not image.height:
            given = f"{image.width} x {image.height} px" if isinstance(image, Image.Image) else type(image).__name__
            raise ValueError(f"image {number} is {given}; give PIL images with pixels")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text {number} is {text!r}; give a concept in words, and leave out latents without one")


def batches(
    images: Sequence[Image.Image], texts: Sequence[str], size: int
) -> Iterator[tuple[list[Image.Image], list[str]]]:
    """Yield the images, in RGB, and their texts, at most `size` at a time; errors as `require_pairs`."""
    require_pairs(images, texts)
    for start in range(0, len(texts), size):
        part = slice(start, start + size)
        yield [rgb(image) for image in images[part]], list(texts[part])


def require_batch_size(size: int) -> int:
    """Return `size`.

    Raises:
        ValueError: it is below 1.
    """
    if size < 1:
        raise ValueError(f"batch is {size}; give the number of images that a model reads at once, at least 1")
    return size


def require_finite_output(values: Tensor, model: str) -> Tensor:
    """Return a model's output in float32.

    model: its name for the error.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    if not torch.isfinite(values).all():
        raise ValueError(f"{model} gave numbers that are not finite; its weights are damaged, so load others")
    return values.float()
