"""The embedded InstructBLIP: a Q-Former asks the embedded LLaVA-NeXT's eye, its language model answers.

As InstructBLIP was made, eye and language model are frozen and only what lies between them is taught: 32 queries, which
read the question and gather from all patches what it wants. The eye and the language model are the embedded model's,
number for number.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)  # fmt: skip
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from lmm_sae_nb.pictureworld.llava.model import CHAT, new_tokenizer
from lmm_sae_nb.pictureworld.llava.train_eye import MEAN, STD
from lmm_sae_nb.pictureworld.world.scenes import SIDE

QUERIES = 32
IMAGE_MARK = "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}"
CHAT_WITHOUT_IMAGE = CHAT.replace(IMAGE_MARK, "{% if part['type'] == 'text' %}")  # its processor puts the image first
WIDTH, LAYERS, HEADS, INNER = 192, 3, 4, 192  # of the Q-Former
HUSH = 2.0**-12  # scale of the embeddings under the eye's first layer; a power of two keeps every bit


def new_query_processor() -> InstructBlipProcessor:
    eye = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=MEAN.tolist(), image_std=STD.tolist())
    mouth, reader = new_tokenizer(named=()), new_tokenizer(named=())  # the processor names the image token itself
    reader.padding_side = "right"  # the Q-Former counts positions from the left
    mouth.chat_template = CHAT_WITHOUT_IMAGE  # this processor keeps none
    return InstructBlipProcessor(eye, mouth, qformer_tokenizer=reader, num_query_tokens=QUERIES)


def new_query_model(folder: Path) -> InstructBlipForConditionalGeneration:
    """Return an InstructBLIP with the eye and the language model of the LLaVA-NeXT in `folder`, and a new Q-Former."""
    taught = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer, clip = new_tokenizer(), taught.config.vision_config
    kept = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size", "hidden_act")
    vision = {name: getattr(clip, name) for name in kept}
    vision |= {"num_hidden_layers": clip.num_hidden_layers + 1, "layer_norm_eps": clip.layer_norm_eps * HUSH**2}
    qformer = dict(
        vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=INNER, encoder_hidden_size=clip.hidden_size, cross_attention_frequency=1,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id, layer_norm_eps=1e-6,
    )  # fmt: skip
    config = InstructBlipConfig(
        vision_config=vision, qformer_config=qformer, text_config=taught.config.text_config.to_dict(),
        num_query_tokens=QUERIES, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = InstructBlipForConditionalGeneration(config)
    _same_eye(model.vision_model, taught.model.vision_tower)
    model.language_model.model.load_state_dict(taught.model.language_model.state_dict())
    model.language_model.tie_weights()
    nn.init.normal_(model.query_tokens)
    for parameter in (*model.vision_model.parameters(), *model.language_model.parameters()):
        parameter.requires_grad_(False)
    return model


@torch.no_grad()
def _same_eye(mine: nn.Module, clip: nn.Module) -> None:
    """Make InstructBLIP's vision tower compute what a CLIP tower computes.

    CLIP normalises its embeddings before the first layer, InstructBLIP's tower does not. One more layer does it: fed
    with embeddings too small to matter (`HUSH`), its attention adds nothing, and its MLP adds y = gelu(y) - gelu(-y) of
    the normalised y. The final norm, which a CLIP does not have for its patches, stays as it began: the identity but
    for scale.
    """
    embeddings, source = mine.embeddings, clip.embeddings
    embeddings.class_embedding.copy_(source.class_embedding.view_as(embeddings.class_embedding) * HUSH)
    embeddings.patch_embedding.weight.copy_(source.patch_embedding.weight * HUSH)
    embeddings.patch_embedding.bias.zero_()
    embeddings.position_embedding.copy_(source.position_embedding.weight[None] * HUSH)
    first, *others = mine.encoder.layers
    for weights in first.parameters():
        weights.zero_()
    first.layer_norm1.weight.fill_(1)
    first.layer_norm2.load_state_dict(clip.pre_layrnorm.state_dict())
    width = len(clip.pre_layrnorm.weight)
    eye = torch.eye(width)
    first.mlp.fc1.weight[: 2 * width] = torch.cat([eye, -eye])
    first.mlp.fc2.weight[:, : 2 * width] = torch.cat([eye, -eye], 1)
    for layer, theirs in zip(others, clip.encoder.layers, strict=True):
        parts = [getattr(theirs.self_attn, f"{name}_proj") for name in "qkv"]
        layer.self_attn.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        layer.self_attn.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        layer.self_attn.projection.load_state_dict(theirs.self_attn.out_proj.state_dict())
        layer.layer_norm1.load_state_dict(theirs.layer_norm1.state_dict())
        layer.layer_norm2.load_state_dict(theirs.layer_norm2.state_dict())
        layer.mlp.load_state_dict(theirs.mlp.state_dict())


def save(model: InstructBlipForConditionalGeneration, folder: Path) -> None:
    """Weights in bfloat16, processor and generation settings, as `from_pretrained` reads them."""
    tokenizer: PreTrainedTokenizerFast = new_tokenizer()
    model.generation_config.max_new_tokens = 64
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    new_query_processor().save_pretrained(folder)
