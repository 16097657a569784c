"""Run the vision tower once for each different crop, and only for crops whose features are read.

LLaVA-NeXT sees an image as a whole and in tiles. An image that fits one tile is therefore seen twice, and a batch of
questions about one image shows it once for each question. Equal crops have equal features, so one of them is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from lmm_sae_nb.model import hooks

WHOLE_IMAGE_FIRST = ("llava_next", "llava_onevision")  # families whose tower gets an image's whole crop, then its tiles

Crops = Float[Tensor, "crops channels height width"]


@contextmanager
def fewer_crops(model: PreTrainedModel, needed: Bool[Tensor, " crops"] | None = None) -> Iterator[None]:
    """Run the vision tower on different crops only, in every forward pass; equal crops get the same features.

    A model without a `vision_tower` runs as it is.

    needed: the crops whose features are read. The others get the features of another crop.
    """
    tower = getattr(getattr(model, "model", None), "vision_tower", None)
    if tower is None:
        yield
        return
    with hooks.fewer_rows(tower, lambda crops: first_equal(crops, needed)):
        yield


def first_equal(crops: Crops, needed: Bool[Tensor, " crops"] | None = None) -> Int64[Tensor, " crops"]:
    """Return for each crop the number of the first crop with the same pixels.

    needed: crops that are compared; for the others, the number of the first needed one.
    """
    some = crops[:, :, :: max(1, crops.shape[2] // 8), :: max(1, crops.shape[3] // 8)].flatten(1).tolist()
    wanted = range(len(crops)) if needed is None else needed.nonzero()[:, 0].tolist()
    first, alike = torch.full((len(crops),), next(iter(wanted), 0)), {}
    for number in wanted:
        candidates = alike.setdefault(tuple(some[number]), [])
        equal = (other for other in candidates if torch.equal(crops[other], crops[number]))
        first[number] = next(equal, number)
        if first[number] == number:
            candidates.append(number)
    return first


def whole_images(model: PreTrainedModel, inputs: BatchFeature) -> Bool[Tensor, " crops"] | None:
    """Mark the crops that show a whole image; None if it is not known where they stand, or there are none.

    inputs: a batch.
    """
    sizes = inputs.get("image_sizes")
    if model.config.model_type not in WHOLE_IMAGE_FIRST or sizes is None or not len(sizes):
        return None
    pinpoints, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
    marks = [torch.arange(image_size_to_num_patches(size, pinpoints, side)) == 0 for size in sizes.tolist()]
    return torch.cat(marks)
