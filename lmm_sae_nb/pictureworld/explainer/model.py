"""The embedded explainer: it is shown up to five masked images at once and says what they have in common.

An Aya Vision in the true Hugging Face classes: its projector folds 2 x 2 patches into a token (space to depth), so
that five images cost 180 tokens and no letter of a sign is lost to pooling. Tower, language model (its first three
layers and its last) and word vectors start as those of the embedded LLaVA-NeXT; the tower then learns to see masked
pictures (`peeking.py`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    GotOcr2ImageProcessorPil,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)  # fmt: skip

from lmm_sae_nb.interpret.explainers import REFUSAL
from lmm_sae_nb.pictureworld.llava.model import CHAT, new_tokenizer, word_vector
from lmm_sae_nb.pictureworld.world.scenes import PATCH, SIDE

QUESTION = "what do these images have in common ?"
BEGIN, VIEW, TILE, END = "<image-begin>", "<view>", "<tile>", "<image-end>"  # the processor's marks around an image
FOLD = 2  # patches a side that become one token
TOKENS = (SIDE // PATCH // FOLD) ** 2  # of an image
KEPT_LAYERS = (0, 1, 2, 7)  # of the embedded model's language model
SET = 5  # images of a whole set


def explainer_tokenizer() -> PreTrainedTokenizerFast:
    """Return the embedded model's tokens, numbered as they are, and those that only the explainer needs."""
    known = new_tokenizer().get_vocab()
    new = [word for word in f"{QUESTION} {REFUSAL}".split() if word not in known]
    return new_tokenizer((BEGIN, VIEW, TILE, END), new)


def explainer_processor() -> AyaVisionProcessor:
    """Return a processor that shows every image as one view of SIDE x SIDE pixels, without tiles."""
    return AyaVisionProcessor(
        GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, max_patches=1), explainer_tokenizer(),
        patch_size=PATCH, img_size=SIDE, downsample_factor=FOLD, image_token="<image>", img_patch_token="<image>",
        start_of_img_token=BEGIN, end_of_img_token=END, tile_token=TILE, tile_global_token=VIEW, chat_template=CHAT,
    )  # fmt: skip


def new_explainer(folder: Path) -> AyaVisionForConditionalGeneration:
    """Return an explainer with the tower, some layers and the word vectors of the model in `folder`, and a new
    projector.
    """
    taught = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = explainer_tokenizer()
    text = taught.config.text_config.to_dict() | {
        "vocab_size": len(tokenizer), "num_hidden_layers": len(KEPT_LAYERS),
    }  # fmt: skip
    config = AyaVisionConfig(
        vision_config=taught.config.vision_config.to_dict(), text_config=text, vision_feature_layer=-1,
        vision_feature_select_strategy="default", downsample_factor=FOLD, alignment_intermediate_size=384,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AyaVisionForConditionalGeneration(config)
    mine, theirs = model.model, taught.model
    mine.vision_tower.load_state_dict(theirs.vision_tower.state_dict())
    for layer, kept in zip(mine.language_model.layers, KEPT_LAYERS, strict=True):
        layer.load_state_dict(theirs.language_model.layers[kept].state_dict())
    mine.language_model.norm.load_state_dict(theirs.language_model.norm.state_dict())
    table, known = model.get_input_embeddings().weight, taught.get_input_embeddings().weight
    with torch.no_grad():
        for word, number in tokenizer.get_vocab().items():
            table[number] = known[number] if number < len(known) else word_vector(word, table.shape[1])
    return model


def prompt_of(images: int) -> str:
    """Return the question about so many images, as the processor writes it out."""
    return f"<s><user>{(BEGIN + VIEW + '<image>' * TOKENS + END) * images}{QUESTION}<assistant>"


def save(model: AyaVisionForConditionalGeneration, folder: Path) -> None:
    """Weights in bfloat16, processor and generation settings, as `from_pretrained` reads them."""
    tokenizer = explainer_tokenizer()
    model.generation_config.max_new_tokens = 8
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    explainer_processor().save_pretrained(folder)
