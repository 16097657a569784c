"""Narrow random models of the true classes, under the names that `small` and `paper` give them, as the hub has them.

Depth, patches, tiles and special tokens are those of the published models; width and vocabulary are not. The explainer
and the two models of text know one answer each, by their weights: every token is followed by one other token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import grounders
import models
import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

NAME = "a happy, sad or hungry object"  # page 06 looks for names with these feelings, and for objects
EXPLANATION = f"[EXPLANATION]: {NAME}"
WIDE = 512  # more than there are tokens
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def publish_small(hub: Path) -> None:
    """Write all models of the preset `small`."""
    save(hub, "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", *deep("llava_onevision", 24))
    save(hub, "HuggingFaceTB/SmolVLM-256M-Instruct", *deep("idefics3", 30))
    save(hub, "Qwen/Qwen2.5-VL-3B-Instruct", *explainer(EXPLANATION))
    save(hub, "Qwen/Qwen2.5-1.5B-Instruct", *text_model(NAME))
    for name, make in {
        "IDEA-Research/grounding-dino-tiny": grounders.grounding_dino, "facebook/sam-vit-base": grounders.sam,
        "openai/clip-vit-base-patch32": grounders.clip,
    }.items():  # fmt: skip
        grounders.save(make, hub / "models" / name)


def publish_paper(hub: Path) -> None:
    """Write all models of the preset `paper`, but those that it asks through endpoints."""
    save(hub, "llava-hf/llama3-llava-next-8b-hf", *deep("llava_next", 32))
    save(hub, "Salesforce/instructblip-vicuna-7b", *deep("instructblip", 32))
    for name, make in {
        "IDEA-Research/grounding-dino-base": grounders.grounding_dino, "facebook/sam-vit-huge": grounders.sam,
        "openai/clip-vit-base-patch32": grounders.clip,
    }.items():  # fmt: skip
        grounders.save(make, hub / "models" / name)


def save(hub: Path, name: str, model, processor) -> None:
    folder = hub / "models" / name
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@contextmanager
def changed(**names) -> Iterator[None]:
    """Replace names of the module `models`, from which the families are made."""
    before = {name: getattr(models, name) for name in names}
    vars(models).update(names)
    try:
        yield
    finally:
        vars(models).update(before)


def tokenizer(*more: str) -> PreTrainedTokenizerBase:
    words = models.tokenizer()
    words.add_tokens(["Yes", "No", *more])  # one token each, as in the published vocabularies
    return words


def deep(family: str, layers: int):
    """A model of a family with as many layers as the published one."""
    words = tokenizer()
    with changed(LAYERS=layers, tokenizer=lambda: words):
        model, processor = models.make(family)
    with torch.no_grad():
        for weights in model.get_decoder().layers.parameters():
            weights.mul_(0.3)  # else so many layers drown the image
        answers = words.convert_tokens_to_ids(["Yes", "No"])
        model.get_output_embeddings().weight[answers] *= 20  # one of these two is most likely
    return model, processor


def explainer(reply: str):
    """A Qwen2.5-VL that always gives this reply."""
    words, text = tokenizer(reply), models.text
    heads = {"num_attention_heads": WIDE // 8}  # as wide as in `models`, so that the positions fit
    with changed(WIDTH=WIDE, tokenizer=lambda: words, text=lambda made: text(made) | heads):
        model, processor = models.make("qwen2_5_vl")
    return follow(model, words, {"\n": reply, reply: words.eos_token}), processor


def text_model(reply: str):
    """A Qwen2 that always gives this reply."""
    words = tokenizer(reply)
    words.chat_template = CHAT
    model = Qwen2ForCausalLM(Qwen2Config(**models.text(words) | {"hidden_size": WIDE}))
    return follow(model, words, {"\n": reply, reply: words.eos_token}), words


@torch.no_grad()
def follow(model, words: PreTrainedTokenizerBase, next_of: Mapping[str, str]):
    """Let each token be followed by another: its embedding passes all layers, and points at what follows."""
    decoder = model.get_decoder()
    for layer in decoder.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    decoder.norm.weight.fill_(1)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    table.zero_().fill_diagonal_(1)
    head.zero_()
    for text, following in next_of.items():
        (one,), (other,) = (words(each, add_special_tokens=False)["input_ids"] for each in (text, following))
        head[other, one] = 1
    return model.eval()
