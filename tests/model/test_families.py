"""Families of models: all that the pages do works with random models of the true classes, as the book's table says."""

import re

import capabilities
import families
import family_table
import models
import pytest
import torch
from models import noise
from packaging.version import Version
from PIL import Image

from book import pages
from lmm_sae_nb.model.lmm import LMM

QUICK = ("gemma3", "qwen3_vl", "llama4")
ROWS = {row["family"]: row for row in family_table.committed()["families"]}
every_family = pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in families.FAMILIES]
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # PaliGemma's processor
    pytest.mark.filterwarnings("ignore:the processor of Llava:UserWarning"),
]


@every_family
def test_a_family_does_what_the_table_of_the_book_says(family, tmp_path):
    assert family_table.row_of(family, tmp_path) == ROWS[family_table.NAMES[family]]


def test_fifteen_families_do_all():
    assert sum(all(row[call] == "works" for call in family_table.CALLS) for row in ROWS.values()) >= 15


def test_the_table_is_of_the_newest_version_of_transformers_that_we_install_and_stands_in_the_book():
    constraints = (pages.ROOT / "constraints.txt").read_text(encoding="utf-8")
    newest = max(re.findall(r"^transformers==([\d.]+)", constraints, re.MULTILINE), key=Version)
    assert family_table.committed()["transformers"] == newest
    assert family_table.markdown(list(ROWS.values()), newest) in family_table.PAGE.read_text()
    assert list(ROWS) == [family_table.NAMES[name] for name in [*families.FAMILIES, *families.REFUSED]]


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mllama", r"\(mllama\) reads images by cross-attention: they never become tokens .* choose a model whose"),
        ("florence2", r"\(florence2\) has an encoder and a decoder: .* choose a decoder-only model"),
        ("blip2_t5", r"\(blip-2\) has an encoder and a decoder: .* choose a decoder-only model"),
    ],
)
def test_a_family_whose_images_become_no_tokens_is_refused_with_the_reason(family, reason):
    _, processor = models.make("picture_world")
    with pytest.raises(ValueError, match=reason):
        LMM(families.REFUSED[family](), processor)
    assert family_table.refused_row(family) == ROWS[family_table.NAMES[family]]


def without_attention_in_the_eye(lmm: LMM) -> LMM:
    """A patch then changes its own token only."""
    in_decoder = {id(module) for module in lmm.decoder.modules()}
    for name, module in lmm.model.named_modules():
        outward = re.search(r"(out_proj|attn\.proj|projection_layer|attention\.o_proj|self_attn\.o_proj)$", name)
        if outward and id(module) not in in_decoder:
            module.weight.data.zero_()
    return lmm


@torch.no_grad()
def embedded(lmm: LMM, prompt) -> torch.Tensor:
    """What the first decoder layer is given."""
    seen = []
    handle = lmm.layer(0).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    lmm.model(**prompt.inputs, use_cache=False)
    handle.remove()
    return seen[0][0]


FOUND = [name for name in families.FAMILIES if name not in models.FAMILIES and name != "idefics2"]


@pytest.mark.parametrize("family", FOUND)
def test_painting_one_cell_of_the_picture_moves_its_base_token_most(family):
    """The layout that was found out is the true one: base tokens lie row by row over the whole picture."""
    lmm = without_attention_in_the_eye(family_table.studied(family))
    plain = Image.new("RGB", (112, 84) if lmm.image_size else (224, 112), (90, 120, 150))
    if family == "llava":
        plain = plain.resize((112, 112))  # its processor cuts off what is not square
    before = lmm.prompt("", plain)
    rows, cols = before.spans[0].grid
    places, start = before.spans[0].where("base"), embedded(lmm, before)
    for row, col in [(0, cols - 1), (rows - 1, 1)]:
        box = (
            round(plain.width * col / cols), round(plain.height * row / rows),
            round(plain.width * (col + 1) / cols), round(plain.height * (row + 1) / rows),
        )  # fmt: skip
        painted = plain.copy()
        painted.paste(noise(box[2] - box[0], box[3] - box[1]), box)
        change = (embedded(lmm, lmm.prompt("", painted)) - start).norm(dim=-1)
        assert divmod(int(change[places].argmax()), cols) == (row, col)


def test_a_processor_that_cuts_edges_off_is_named():
    with pytest.warns(UserWarning, match="cuts the edges off images that are not square.*give image_size"):
        lmm = LMM(*families.make("llava"))
    assert lmm.layout.cut and not family_table.studied("internvl").layout.cut
    assert LMM(lmm.model, lmm.processor, image_size=(64, 64)).grid == (4, 4)


def test_a_processor_that_writes_no_image_token_of_the_model():
    model, processor = families.make("llava")
    model.config.image_token_index = 5
    with pytest.raises(ValueError, match="does not fit the model: for a test picture it wrote no token 5"):
        LMM(model, processor)


def test_an_answer_of_paligemma_is_what_its_processor_calls_the_suffix():
    lmm = family_table.studied("paligemma")
    prompt = lmm.prompt(["what ?", "and what is this ?"], [noise(), noise()], answers=["yes", "no, not at all"])
    for ids, mask, answer in zip(
        prompt.inputs["input_ids"], prompt.answer_mask, ["yes", "no, not at all"], strict=True
    ):
        assert lmm.tokenizer.decode(ids[mask]) == answer + lmm.tokenizer.eos_token
    changed = prompt.inputs["input_ids"].clone()
    changed[0, -2] += 1  # the answer cannot change what stands before it: it is read from left to right
    with torch.no_grad():
        first = capabilities.states(lmm, prompt)
        prompt.inputs["input_ids"] = changed
        second = capabilities.states(lmm, prompt)
    assert torch.equal(first[0, :-2], second[0, :-2]) and not torch.equal(first[0, -2:], second[0, -2:])
    with pytest.raises(ValueError, match="takes one question and one answer; give a sample for each answer"):
        turn = [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]  # fmt: skip
        lmm.conversations([turn * 2], [[]])
