"""Find out how a family lays out its image tokens, from what its processor writes for two test pictures.

`token_kinds.LAYOUTS` holds the families whose layout is registered; for any other one `find_layout` is asked. The test
pictures get brighter from the upper left to the lower right. So the crop with the greatest contrast shows the whole
picture, and the others show parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from lmm_sae_nb.model.token_kinds import BASE, LAYOUTS, TILES, Grid, Layout

SHAPES = ((256, 256), (1024, 256))  # widths and heights of the test pictures
WRITTEN = "text_replacement_offsets"  # what recent processors say they wrote for each image
MIXERS = ("qformer", "perceiver", "resampler")  # modules whose outputs have no place in the image


class UnknownLayout(ValueError):
    """Raised if it cannot be found out how image tokens are laid out."""


@dataclass(frozen=True)
class FoundLayout:
    """The layout of a family, called as those in `token_kinds.LAYOUTS`.

    tokenizer: the processor's; it reads what the processor wrote.
    merge: patches of each side that become one token, for families that give the patches of each image
        (`image_grid_thw`); None for others.
    rows: whether a marker ends each row of patches.
    crop: rows and columns of the tokens of one crop; None if the tokens have no place in the image.
    crop_tokens: number of tokens of one crop; 0 with `merge` or `rows`.
    base: which crop shows the whole image: 0 for the first, -1 for the last; None if there never was more than one.
    cut: whether the processor cuts the edges off an image that is not square.
    """

    tokenizer: object
    merge: int | None = None
    rows: bool = False
    crop: Grid | None = None
    crop_tokens: int = 0
    base: int | None = None
    cut: bool = False

    def __call__(
        self, model: PreTrainedModel, inputs: BatchFeature, sample: int, image: int
    ) -> tuple[Int64[Tensor, " slots"], Grid | None]:
        """Return the kinds of an image's tokens in order, and the grid of its base tokens."""
        runs = runs_of(_written(inputs, self.tokenizer, sample, image), model.config.image_token_id)
        total = sum(runs)
        if self.merge is not None:
            grid = _merged_grid(inputs, image, self.merge)
            return torch.full((grid[0] * grid[1],), BASE), grid
        if self.rows:
            _require(len(set(runs)) == 1, f"rows have {sorted(set(runs))} tokens")
            return torch.full((total,), BASE), (len(runs), runs[0])
        crops, rest = divmod(total, self.crop_tokens)
        _require(not rest, f"{total} tokens are no multiple of the {self.crop_tokens} of a crop")
        _require(crops == 1 or self.base is not None, f"an image has {crops} crops; which one is the whole?")
        kinds = torch.full((crops, self.crop_tokens), TILES)
        kinds[self.base or 0] = BASE
        return kinds.flatten(), self.crop


def layout_of(model: PreTrainedModel, processor: ProcessorMixin) -> Layout:
    """Return the layout of a model's family: the registered one, or the one that is found out.

    Raises:
        ValueError: it is neither registered nor found; the message says what to register.
    """
    family = model.config.model_type
    if family in LAYOUTS:
        return LAYOUTS[family]
    try:
        return find_layout(model, processor)
    except UnknownLayout as error:
        raise ValueError(
            f"how a {family} lays out its image tokens is not known; register a function "
            f"(model, inputs, sample, image) -> (kinds, grid) as lmm_sae_nb.model.token_kinds.LAYOUTS[{family!r}] "
            f"(registered: {', '.join(LAYOUTS)}; it could not be found out: {error})"
        ) from error


def find_layout(model: PreTrainedModel, processor: ProcessorMixin) -> FoundLayout:
    """Find out a family's layout by processing two test pictures.

    Raises:
        UnknownLayout: the processor's output leaves it open; the message says what it wrote.
        ValueError: the processor writes no image token of the model.
    """
    token = model.config.image_token_id
    outputs = [_processed(processor, shape) for shape in SHAPES]
    runs = [runs_of(_written(output, processor.tokenizer, 0, 0), token) for output in outputs]
    totals, last = [sum(each) for each in runs], outputs[-1]
    if not all(totals):
        raise ValueError(
            f"the processor does not fit the model: for a test picture it wrote no token {token}, which the model "
            "reads as an image's; load both from the same checkpoint"
        )
    if "image_grid_thw" in last:
        merge = _merge_size(model, processor)
        grids = [_merged_grid(output, 0, merge) for output in outputs]
        _require([rows * cols for rows, cols in grids] == totals, f"it writes {totals} tokens for grids of {grids}")
        return FoundLayout(processor.tokenizer, merge=merge)
    crops = [_crops(output) for output in outputs]
    counts = [len(each) for each in crops]
    if counts == [1, 1] and any(len(each) > 1 for each in runs):
        _require(all(len(set(each)) == 1 for each in runs), f"one crop has runs of {runs[-1]} tokens")
        return FoundLayout(processor.tokenizer, rows=True)
    each = {total / count for total, count in zip(totals, counts, strict=True)}
    _require(
        len(each) == 1 and float(next(iter(each))).is_integer(),
        f"its processor writes {totals} image tokens for pictures of {counts} crops",
    )
    size = int(each.pop())
    contrast = [[float(crop.max() - crop.min()) for crop in picture] for picture in crops]
    whole = contrast[-1].index(max(contrast[-1]))
    _require(whole in (0, counts[-1] - 1), f"of {counts[-1]} crops number {whole} shows the whole image")
    return FoundLayout(
        processor.tokenizer,
        crop=_grid_of(model, size, crops[-1][0]),
        crop_tokens=size,
        base=None if counts[-1] == 1 else 0 if whole == 0 else -1,
        cut=max(contrast[-1]) < 0.9 * max(contrast[0]),
    )


def mixes(model: PreTrainedModel) -> bool:
    """Return whether the tokens of an image have no place in it: each of them mixes all patches."""
    return any(word in type(module).__name__.lower() for module in model.modules() for word in MIXERS)


def runs_of(ids: Int64[Tensor, " tokens"], token: int) -> list[int]:
    """Return the lengths of the runs of one token, in order."""
    edges = torch.nn.functional.pad((ids == token).int(), (1, 1)).diff()
    return ((edges == -1).nonzero() - (edges == 1).nonzero())[:, 0].tolist()


def _processed(processor: ProcessorMixin, shape: tuple[int, int]) -> BatchFeature:
    """Process a picture that gets brighter from the upper left to the lower right."""
    across, down = (np.linspace(0, 127, side) for side in shape)
    grey = (down[:, None] + across[None, :]).round().astype(np.uint8)
    picture = Image.fromarray(np.stack([grey] * 3, -1))
    known = hasattr(processor, "return_text_replacement_offsets")
    return processor(
        text=[str(processor.image_token)],
        images=[[picture]],
        return_tensors="pt",
        **({"return_text_replacement_offsets": True} if known else {}),
    )


def _written(inputs: BatchFeature, tokenizer: object, sample: int, image: int) -> Int64[Tensor, " tokens"]:
    """Return the tokens that the processor wrote for an image, markers included; of the whole sample if it is silent.

    sample: row in the batch.
    image: place among the images of the batch.
    """
    if inputs.get(WRITTEN):
        texts = [each["replacement"] for row in inputs[WRITTEN] for each in row if each["type"] == "image"]
        return torch.tensor(tokenizer(texts[image], add_special_tokens=False)["input_ids"])
    ids = torch.as_tensor(inputs["input_ids"][sample])
    return ids[torch.as_tensor(inputs["attention_mask"][sample]).bool()]


def _merge_size(model: PreTrainedModel, processor: ProcessorMixin) -> int:
    """Return how many patches of each side become one token."""
    vision = model.config.vision_config
    return getattr(vision, "spatial_merge_size", None) or getattr(processor.image_processor, "merge_size", 1)


def _merged_grid(inputs: BatchFeature, image: int, merge: int) -> Grid:
    _, rows, cols = (torch.as_tensor(inputs["image_grid_thw"][image]) // merge).tolist()
    return rows, cols


def _crops(output: BatchFeature) -> list[Tensor]:
    """Return the crops (channels, height, width) of a picture."""
    pixels = output["pixel_values"]
    _require(
        isinstance(pixels, Tensor) and pixels.ndim >= 4,
        f"its processor gives pixels of shape {tuple(getattr(pixels, 'shape', ()))}, which are no crops",
    )
    return list(pixels.flatten(0, -4))


def _grid_of(model: PreTrainedModel, tokens: int, crop: Tensor) -> Grid | None:
    """Return the grid of a crop's tokens, of the crop's proportions; None if each mixes the whole crop.

    Raises:
        UnknownLayout: no grid has so many tokens.
    """
    if mixes(model):
        return None
    height, width = crop.shape[-2:]
    rows = round(math.sqrt(tokens * height / width))
    _require(
        rows > 0 and tokens % rows == 0 and rows * width == tokens // rows * height,
        f"{tokens} tokens make no grid over a crop of {width} x {height} px",
    )
    return rows, tokens // rows


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise UnknownLayout(fault)
