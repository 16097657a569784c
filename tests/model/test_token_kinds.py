"""Token spans, proven by what the model does with its pixels, on the true classes at their true geometry.

What lies where in the sequence is measured, not recomputed: pixels of the base crop, of the tiles or of one
patch are changed, and the positions whose merged input embedding changes are compared with the spans. Vision
attention is switched off for this (its output projections are zero): a patch changes its own token only.
"""

from functools import cache

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import noise
from PIL import Image

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.prompts import Prompt
from lmm_sae_nb.model.token_kinds import KINDS, LAYOUTS, NoPatchGrid

GRIDS = {
    "llava_next": (24, 24),
    "picture_world": (12, 12),
    "llava_onevision": (27, 27),
    "idefics3": (8, 8),
    "smolvlm": (8, 8),
}
NEWLINES = ("llava_next", "llava_onevision")  # have a learned newline embedding
SEEN = {"llava_onevision": 378 / 384}  # share of width and height in whole patches (14 px); the rest is not seen
CONTROL = {
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    *models.MARKERS,
    *models.ROWS_COLS,
}


@cache
def studied(family: str) -> LMM:
    """An LMM of this family whose vision tower treats each patch by itself."""
    model, processor = models.make(family)
    in_decoder = {id(module) for module in model.get_decoder().modules()}
    for name, module in model.named_modules():
        if name.endswith((".out_proj", "attn.proj")) and id(module) not in in_decoder:
            module.weight.data.zero_()
    if family in ("idefics3", "smolvlm"):  # half the published resolution: four tiles at most, not sixteen
        processor.image_processor.size = {"longest_edge": 1024}
    return LMM(model, processor)


@torch.no_grad()
def merged(lmm: LMM, inputs) -> torch.Tensor:
    """What the decoder's first layer is given: embeddings of words, the image's features in their places."""
    seen = []

    def keep(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise InterruptedError

    handle = lmm.model.get_decoder().layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    with pytest.raises(InterruptedError):
        lmm.model(**inputs)
    handle.remove()
    return seen[0]


def moved(lmm: LMM, prompt: Prompt, *where) -> list[int]:
    """The positions (of the first sample) that change when these pixels do; exactly, nothing else may."""
    pixels = prompt.inputs["pixel_values"].clone()
    pixels[where] += torch.rand(pixels[where].shape, generator=torch.Generator().manual_seed(1)) + 0.5
    before, after = merged(lmm, prompt.inputs), merged(lmm, {**prompt.inputs, "pixel_values": pixels})
    return (before != after).any(-1)[0].nonzero()[:, 0].tolist()


def check_words(lmm: LMM, prompt: Prompt) -> None:
    """Every token has one kind; text, special and pad are embedded as words, newlines as the model's own."""
    embedded = merged(lmm, prompt.inputs)
    for sample, spans in enumerate(prompt.spans):
        ids = prompt.inputs["input_ids"][sample]
        assert spans.kinds.shape == ids.shape
        assert sum(spans.mask(kind).long() for kind in KINDS).eq(1).all()
        assert torch.equal(spans.mask("pad"), prompt.inputs["attention_mask"][sample] == 0)
        words = spans.mask("text", "special", "pad")
        assert torch.equal(embedded[sample][words], lmm.model.get_input_embeddings()(ids[words]))
        names = lmm.tokenizer.convert_ids_to_tokens(ids)
        assert {names[i] for i in spans.where("special")} <= CONTROL
        assert not {names[i] for i in spans.where("text")} & (CONTROL | {str(lmm.processor.image_token), models.PAD})
        written = torch.tensor([name == str(lmm.processor.image_token) for name in names])
        if lmm.model.config.model_type in NEWLINES:
            newline = (embedded[sample] == lmm.model.model.image_newline).all(-1)
            assert torch.equal(spans.mask("newline"), newline)
            assert torch.equal(spans.mask("base", "tiles", "newline"), written)
        else:
            assert {names[i] for i in spans.where("newline")} <= {"Ċ"}  # a byte-level "\n"
            assert torch.equal(spans.mask("base", "tiles"), written)


def check_crops(lmm: LMM, prompt: Prompt, grid: tuple[int, int], patch: tuple[int, int]) -> None:
    """Base tokens see the base crop, row by row, and tile tokens the others."""
    (spans,), crops = prompt.spans, prompt.inputs["pixel_values"].shape[1]
    base = crops - 1 if "pixel_attention_mask" in prompt.inputs else 0
    others = [crop for crop in range(crops) if crop != base]
    assert spans.grid == grid
    assert moved(lmm, prompt, 0, base) == spans.where("base").tolist()
    assert len(spans.where("base")) == grid[0] * grid[1]
    assert moved(lmm, prompt, 0, torch.tensor(others, dtype=torch.long)) == spans.where("tiles").tolist()
    pitch = prompt.inputs["pixel_values"].shape[-1] // grid[0]
    row, col = patch[0] % grid[0], patch[1] % grid[1]
    rows, cols = slice(row * pitch, (row + 1) * pitch), slice(col * pitch, (col + 1) * pitch)
    assert moved(lmm, prompt, 0, base, slice(None), rows, cols) == [spans.where("base")[row * grid[1] + col]]


SIZES = [(336, 336), (640, 480), (300, 900), (97, 41), (1300, 200)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", GRIDS)
def test_spans_are_where_the_pixels_go(family, size):
    lmm = studied(family)
    prompt = lmm.prompt("What is it?", noise(*size))
    check_words(lmm, prompt)
    check_crops(lmm, prompt, GRIDS[family], patch=(5, 11))


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    width=st.integers(2, 800),
    height=st.integers(2, 800),
    row=st.integers(0, 26),
    col=st.integers(0, 26),
    data=st.data(),
)
def test_spans_are_where_the_pixels_go_for_any_size(width, height, row, col, data):
    for family in ("llava_next", "picture_world", "llava_onevision", "idefics3"):
        lmm = studied(family)
        prompt = lmm.prompt(data.draw(st.text(st.characters(codec="utf-8"), max_size=9)), noise(width, height))
        check_words(lmm, prompt)
        check_crops(lmm, prompt, GRIDS[family], (row, col))


def test_onevision_pools_tiles_past_nine():
    lmm = studied("llava_onevision")
    prompt = lmm.prompt("", noise(1536, 1152))  # 4 x 3 tiles of 27 x 27, more than 9 tiles' worth
    check_words(lmm, prompt)
    check_crops(lmm, prompt, (27, 27), patch=(3, 4))
    (spans,) = prompt.spans
    assert len(spans.where("newline")) == 70  # 81 rows / sqrt(12 / 9), rounded down
    assert len(spans.where("tiles")) == 70 * 93  # 108 columns, as well


def test_idefics_at_full_resolution():
    model, processor = models.make("idefics3")
    lmm = LMM(model, processor)
    (spans,) = lmm.prompt("", noise(640, 480)).spans
    assert len(spans.where("tiles")) == 4 * 3 * 64  # 2048 x 1536 px in 512 px tiles
    assert len(spans.where("newline")) == 4  # three ends of rows, and the line before the base image
    assert spans.where("base").tolist() == list(range(spans.where("base")[0], spans.where("base")[0] + 64))
    assert spans.where("base")[0] > spans.where("tiles")[-1]


def test_idefics_without_splitting_is_base_only():
    model, processor = models.make("idefics3")
    processor.image_processor.do_image_splitting = False
    lmm = LMM(model, processor)
    prompt = lmm.prompt("", noise(640, 480))
    assert len(prompt.spans[0].where("tiles")) == 0
    check_words(lmm, prompt)


@pytest.mark.parametrize("family", ["llava_next", "picture_world", "llava_onevision"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_layouts_have_as_many_tokens_as_the_processor_writes(family, width, height):
    lmm = studied(family)
    crop = lmm.model.config.vision_config.image_size
    kinds, grid = LAYOUTS[lmm.model.config.model_type](
        lmm.model, {"image_sizes": torch.tensor([[height, width]])}, 0, 0
    )
    written = lmm.processor._get_number_of_features(height, width, crop, crop)
    assert len(kinds) == written - (lmm.processor.vision_feature_select_strategy == "default")
    n_base = grid[0] * grid[1]
    assert (kinds[:n_base] == KINDS.index("base")).all()
    rows = int((kinds == KINDS.index("newline")).sum())  # none of an image that is all length
    row = kinds[n_base:].unflatten(0, (rows, -1)) if rows else kinds.new_empty(0, 1)
    assert (row[:, -1] == KINDS.index("newline")).all()  # equal rows, each ended by its newline
    assert (row[:, :-1] == KINDS.index("tiles")).all()
    assert len(kinds) == n_base + row.numel()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(rows=st.integers(2, 12), cols=st.integers(2, 12), row=st.integers(0, 11), col=st.integers(0, 11))
def test_qwen_has_the_merged_grid_as_base(rows, cols, row, col):
    lmm, row, col = studied("qwen2_5_vl"), row % rows, col % cols
    picture = noise(28 * cols, 28 * rows)  # needs no resizing: a merged patch is 28 px
    prompt = lmm.prompt("Hm", picture)
    check_words(lmm, prompt)
    (spans,) = prompt.spans
    assert spans.grid == (rows, cols)
    assert len(spans.where("tiles")) == 0
    assert moved(lmm, prompt, slice(None)) == spans.where("base").tolist()
    picture.paste((255, 0, 0), (28 * col, 28 * row, 28 * (col + 1), 28 * (row + 1)))
    before, after = merged(lmm, prompt.inputs), merged(lmm, lmm.prompt("Hm", picture).inputs)
    changed = (before != after).any(-1)[0].nonzero()[:, 0].tolist()
    assert changed == [spans.where("base")[row * cols + col]]


@pytest.mark.parametrize("size", [(448, 448), (1000, 400), (300, 900)], ids=str)
@pytest.mark.parametrize("family", [*GRIDS, "qwen2_5_vl"])
def test_painting_one_cell_of_the_picture_moves_its_base_token_most(family, size):
    lmm, plain = studied(family), Image.new("RGB", size, (90, 120, 150))
    before = lmm.prompt("", plain)
    (spans,) = before.spans
    rows, cols = spans.grid
    for row, col in [(0, 0), (rows // 2, 1), (1, cols - 1), (rows - 1, cols // 3)]:
        seen = [side * SEEN.get(family, 1) for side in size]
        cell = noise(*size).crop(box := _cell(seen, spans.grid, row, col))
        painted = plain.copy()
        painted.paste(cell, box)
        change = (merged(lmm, lmm.prompt("", painted).inputs) - merged(lmm, before.inputs))[0].norm(dim=-1)
        base = spans.as_grid(change[spans.where("base")])
        assert divmod(int(base.argmax()), cols) == (row, col)


def _cell(size, grid, row, col) -> tuple[int, int, int, int]:
    (width, height), (rows, cols) = size, grid
    left, top, right, bottom = col / cols, row / rows, (col + 1) / cols, (row + 1) / rows
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


def test_a_q_former_has_query_tokens_and_says_that_it_has_no_grid():
    lmm = studied("instructblip")
    prompt = lmm.prompt("What is it?", noise(300, 200))
    (spans,) = prompt.spans
    assert spans.where("base").tolist() == list(range(32)) == moved(lmm, prompt, 0)
    assert spans.grid is None and lmm.grid is None
    with pytest.raises(NoPatchGrid, match="query tokens.*use a model with patches"):
        spans.as_grid(torch.zeros(32))


@pytest.mark.parametrize("family", [*GRIDS, "qwen2_5_vl", "instructblip"])
def test_a_batch_pads_on_the_left_and_changes_no_span(family):
    lmm = studied(family)
    samples = [
        ("Short?", noise(200, 150)),
        ("A longer question, of more tokens?", noise(150, 500)),
        ("", noise(64, 64)),
    ]
    if family != "instructblip":  # it cannot do without an image
        samples.append(("No image here.", None))
    batch = lmm.prompt(*map(list, zip(*samples, strict=True)))
    check_words(lmm, batch)
    for (text, image), spans, ids in zip(samples, batch.spans, batch.inputs["input_ids"], strict=True):
        alone = lmm.prompt(text, image)
        pads = len(ids) - alone.inputs["input_ids"].shape[1]
        assert spans.where("pad").tolist() == list(range(pads))
        assert torch.equal(spans.kinds[pads:], alone.spans[0].kinds)
        assert spans.grid == alone.spans[0].grid
        assert torch.equal(ids[pads:], alone.inputs["input_ids"][0])
    assert torch.equal(batch.mask("base", "text")[1], batch.spans[1].mask("base", "text"))


def test_a_map_folds_row_by_row():
    (spans,) = studied("qwen2_5_vl").prompt("", noise(28 * 3, 28 * 2)).spans
    values = torch.arange(12).view(2, 6)
    assert spans.as_grid(values).tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]


def test_the_grid_of_a_model_is_that_of_all_its_images():
    assert studied("llava_next").grid == (24, 24)
    assert studied("smolvlm").grid == (8, 8)
    assert studied("qwen2_5_vl").grid is None  # it depends on the image


def test_an_unknown_kind_is_refused():
    (spans,) = studied("picture_world").prompt("Hello").spans
    assert spans.grid is None
    with pytest.raises(ValueError, match="no such kind of token: \\['image'\\]; the kinds are base, tiles"):
        spans.mask("base", "image")


def test_an_unknown_word_is_text_unless_its_token_is_a_control_token():
    lmm = studied("picture_world")
    lmm.tokenizer.unk_token = "x"
    (spans,) = lmm.prompt("axa").spans
    assert len(spans.where("text")) == len("user\naxa\nassistant\n")
    lmm.tokenizer.unk_token = models.IM_END
    (spans,) = lmm.prompt("axa").spans
    lmm.tokenizer.unk_token = None
    assert len(spans.where("special")) == 3
