"""The embedded model and its processor: a LLaVA-NeXT in the true Hugging Face classes, with small numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)  # fmt: skip

from lmm_sae_nb.pictureworld.world.questions import vocabulary
from lmm_sae_nb.pictureworld.world.scenes import PATCH, SIDE

PINPOINTS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]  # AnyRes: square, wide and tall pictures
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>", "<image>")
CHAT = (
    "{{ '<s>' }}{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def word_vector(word: str, width: int) -> Tensor:
    """Return a random vector of about unit length, the same wherever the word is asked for.

    Eye and language model both start from these, so that each learns towards the other before they meet.
    """
    return torch.randn(width, generator=torch.Generator().manual_seed(crc32(word.encode()))) / width**0.5


def new_tokenizer(
    marks: Sequence[str] = (), words: Sequence[str] = (), named: Sequence[str] = ("image", "user", "assistant")
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word: lower-cased, split at spaces and around punctuation.

    marks, words: further special tokens and words of another model, numbered behind the embedded model's. named: those
    special tokens that the tokenizer has as an attribute, `image_token` and so on.
    """
    words = {word: number for number, word in enumerate((*SPECIAL, *vocabulary(), *marks, *words))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+(-\w+)*|[^\w\s]"), "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # words joined by spaces, punctuation closed up
    tokenizer.add_special_tokens([*SPECIAL, *marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        padding_side="left", model_max_length=2048,
        extra_special_tokens={f"{name}_token": f"<{name}>" for name in named},
    )  # fmt: skip


def new_processor() -> LlavaNextProcessor:
    size = {"height": SIDE, "width": SIDE}
    eye = LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=PINPOINTS)
    return LlavaNextProcessor(
        eye, new_tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default", chat_template=CHAT,
        num_additional_image_tokens=1,
    )  # fmt: skip


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlavaNextForConditionalGeneration:
    """Return an untrained model: a CLIP vision tower (192 wide, 6 layers) and a Llama (256 wide, 8 layers)."""
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH, projection_dim=192, hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=576, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1, vision_feature_select_strategy="default",
        tie_word_embeddings=True, image_seq_length=(SIDE // PATCH) ** 2,
    )  # fmt: skip
    model = LlavaNextForConditionalGeneration(config)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        for word, number in tokenizer.get_vocab().items():
            table[number] = word_vector(word, table.shape[1])
    return model


def save(model: LlavaNextForConditionalGeneration, folder: Path) -> None:
    """Weights in bfloat16, processor and generation settings, as `from_pretrained` reads them."""
    model.generation_config.max_new_tokens = 64
    model.to(torch.bfloat16).save_pretrained(folder)
    new_processor().save_pretrained(folder)
