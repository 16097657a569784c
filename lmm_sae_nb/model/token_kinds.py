"""Find out what each token of a prompt is: a patch of the base image or of a tile, newline, text, special or pad.

Every token has exactly one kind. Model families lay out an image's patches differently in the decoder's sequence.
LAYOUTS holds a small function for some families; `found_layouts` finds out the layout of the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

KINDS = ("base", "tiles", "newline", "text", "special", "pad")
BASE, TILES, NEWLINE, TEXT, SPECIAL, PAD = range(len(KINDS))
# The kinds that an SAE learns from and is spliced in at. Special tokens are few, alike, and of outlying norm.
SAE_KINDS = ("base", "tiles", "newline", "text")

Grid = tuple[int, int]


class NoPatchGrid(ValueError):
    """Raised by code that needs the base image's patch grid, for a sample that has none."""


@dataclass(frozen=True)
class Spans:
    """The kind of each token of one sample's sequence, as the decoder sees it (image tokens expanded).

    The kinds:

    - `base`: patches of the whole image, row by row; for a Q-Former its query tokens;
    - `tiles`: patches of the image's enlarged parts;
    - `newline`: the end of a row of tiles;
    - `text`: words, also those of the chat template;
    - `special`: control tokens around turns and images;
    - `pad`: padding, on the left.

    kinds: for each token an index into KINDS.
    grid: rows and columns of the base patches; None for a Q-Former, without an image, and for several images.
    """

    kinds: Int64[Tensor, " tokens"]
    grid: Grid | None

    def mask(self, *kinds: str) -> Bool[Tensor, " tokens"]:
        """Mark the tokens of any of these kinds.

        Raises:
            ValueError: a kind is not in KINDS.
        """
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(f"no such kind of token: {sorted(unknown)}; the kinds are {', '.join(KINDS)}")
        return torch.isin(self.kinds, self.kinds.new_tensor([KINDS.index(kind) for kind in kinds]))

    def where(self, kind: str) -> Int64[Tensor, " n"]:
        """Return the positions of the tokens of this kind, in order."""
        return self.mask(kind).nonzero()[:, 0]

    def as_grid(self, values: Shaped[Tensor, "*any base"]) -> Shaped[Tensor, "*any rows cols"]:
        """Fold values of the base tokens into the patch grid.

        Raises:
            NoPatchGrid: there is no grid.
        """
        if self.grid is None:
            raise NoPatchGrid(
                "this sample has no patch grid: its image became query tokens (a Q-Former's, as InstructBLIP "
                "has) or it has no image; score whole images here, for maps and IoU use a model with patches"
            )
        return values.unflatten(-1, self.grid)


# A layout is called as (model, inputs, sample, image): the sample's row in the batch, and its image's place among
# the batch's images. It returns the kinds of the sample's image tokens in order, and the grid of the base tokens.
Layout = Callable[[PreTrainedModel, BatchFeature, int, int], tuple[Int64[Tensor, " slots"], Grid | None]]


def _anyres(model, inputs, sample, image, *, settings: tuple[str, ...]):
    """Lay out base, then tiles without padding, row by row, each row with a newline, by the model's packing method."""
    vision, size = model.config.vision_config, inputs["image_sizes"][image].tolist()
    side = vision.image_size // vision.patch_size
    crops = image_size_to_num_patches(size, model.config.image_grid_pinpoints, vision.image_size)
    if "batch_num_images" in inputs:  # of the samples that have images
        together = inputs["batch_num_images"].repeat_interleave(inputs["batch_num_images"])
        crops = 1 if together[image] > 1 else crops  # LLaVA-OneVision shows several images without tiles
    kinds = torch.full((crops, side * side, 1), float(TILES))
    kinds[0] = BASE
    packed, _ = model.model.pack_image_features(
        image_features=[kinds],
        image_sizes=[size],
        image_newline=torch.tensor([float(NEWLINE)]),
        **{setting: getattr(model.config, setting) for setting in settings},
    )
    return packed[0].flatten().round().long(), (side, side)


def _qwen2_5_vl(model, inputs, sample, image):
    """Lay out the image at its original size without tiles; two by two patches are one token."""
    merge = model.config.vision_config.spatial_merge_size
    _, rows, cols = (inputs["image_grid_thw"][image] // merge).tolist()
    return torch.full((rows * cols,), BASE), (rows, cols)


def _idefics3(model, inputs, sample, image):
    """Lay out the tiles one after the other, then the base image; an image that fits one crop has no tiles."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size // model.config.scale_factor
    crops = int(inputs["pixel_attention_mask"][sample].flatten(1).any(1).sum())
    kinds = torch.full((crops, side * side), TILES)
    kinds[-1] = BASE
    return kinds.flatten(), (side, side)


def _instructblip(model, inputs, sample, image):
    """Lay out the Q-Former's query tokens, which mix all patches and so have no grid."""
    return torch.full((model.config.num_query_tokens,), BASE), None


LAYOUTS: dict[str, Layout] = {  # by the config's model_type
    "llava_next": partial(_anyres, settings=("vision_feature_select_strategy",)),
    "llava_onevision": partial(_anyres, settings=("vision_aspect_ratio",)),
    "qwen2_5_vl": _qwen2_5_vl,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "instructblip": _instructblip,
}


def spans_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: BatchFeature,
    sizes: list[list[tuple[int, int]]],
    layout: Layout,
) -> list[Spans]:
    """Return the kind of each token of a batch, sample by sample.

    model, tokenizer: that made the batch.
    inputs: the batch.
    sizes: width and height of each sample's images, in order.
    layout: of the model's family.

    Raises:
        ValueError: the processor wrote another number of image tokens than the model expects.
    """
    special = _special_ids(tokenizer)
    spans, number = [], 0
    for sample, of_sample in enumerate(sizes):
        ids, attended = inputs["input_ids"][sample], inputs["attention_mask"][sample].bool()
        slots = ((ids == model.config.image_token_id) & attended).nonzero()[:, 0]
        laid = [layout(model, inputs, sample, number + place) for place in range(len(of_sample))]
        number += len(laid)
        laid_out = torch.cat([torch.empty(0, dtype=torch.long), *(kinds for kinds, _ in laid)])
        if len(laid_out) != len(slots):
            pictures = [f"an image of {width} x {height} px" for width, height in of_sample]
            raise ValueError(
                f"the processor does not fit the model: for {' and '.join(pictures) or 'no image'} (sample {sample}) "
                f"it wrote {len(slots)} image tokens, the model expects {len(laid_out)}; "
                "load both from one checkpoint, or "
                "compare the processor's patch_size, sizes, pinpoints, vision_feature_select_strategy and "
                "num_additional_image_tokens with the model's config"
            )
        kinds = torch.where(torch.isin(ids, special), SPECIAL, TEXT)
        for own in slots.split([len(kinds) for kinds, _ in laid]):
            # between an image's tokens stand white space, which ends rows, and markers
            inside = slice(own[0], own[-1] + 1)
            blank = [token for token in ids[inside].unique().tolist() if tokenizer.decode(token).isspace()]
            kinds[inside] = torch.where(torch.isin(ids[inside], torch.tensor(blank)), NEWLINE, SPECIAL)
        grid = laid[0][1] if len(laid) == 1 else None  # of several images, no one grid is the sample's
        kinds[slots] = laid_out
        kinds[~attended] = PAD
        spans.append(Spans(kinds, grid))
    return spans


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> Int64[Tensor, " n"]:
    """Return the ids of control tokens; the token for unknown words is text, unless it also is a control token."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown = {tokenizer.unk_token_id}
    unknown -= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return torch.tensor(sorted((added | set(tokenizer.all_special_ids)) - unknown))
