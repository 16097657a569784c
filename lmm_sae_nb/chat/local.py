"""Ask a model in this process."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from lmm_sae_nb.chat.questions import Question, Reply
from lmm_sae_nb.model.processor import load_processor
from lmm_sae_nb.support.files import fingerprint


class LocalChat:
    """A transformers model, of image and text or of text alone, asked in batches, greedily.

    The processor's (or tokenizer's) chat template writes the turns. ValueError for images to a model of text alone,
    or a model without a chat template. A reply of a batch can differ from that of another batch by rounding. The model
    given is put into eval mode, its parameters without gradients.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin | PreTrainedTokenizerBase, name: str, identity: str,
        *, batch_size: int = 4, max_new_tokens: int = 64,
    ):  # fmt: skip
        self.name, self.batch_size, self.max_new_tokens = name, batch_size, max_new_tokens
        self.identity = json.dumps(["local", identity, max_new_tokens])
        self._model, self._processor = model.eval().requires_grad_(False), processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._sees = self._tokenizer is not processor
        self._image_token = str(getattr(processor, "image_token", None) or "<image>")  # which the template writes
        self._template = getattr(processor, "chat_template", None) or self._tokenizer.chat_template
        if self._template is None:
            raise ValueError(f"{name} has no chat template; ask a model that was trained to be asked")
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    @classmethod
    def load(cls, name_or_path: str | Path, *, device: str | None = None, **settings: int) -> LocalChat:
        """A folder, or a name on the hub, onto a GPU if there is one; settings: batch_size, max_new_tokens."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        model_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        reads = load_processor if sees else AutoTokenizer.from_pretrained
        dtype = torch.float32 if device == "cpu" else "auto"
        model = model_class.from_pretrained(name_or_path, dtype=dtype, trust_remote_code=False)
        processor = reads(name_or_path, trust_remote_code=False)
        folder = Path(name_or_path)
        which = fingerprint(folder) if folder.is_dir() else f"{name_or_path}@{config._commit_hash}"
        return cls(
            model.to(device), processor, folder.name if folder.is_dir() else str(name_or_path), which, **settings
        )

    def __call__(self, questions: Iterable[Question]) -> Iterator[tuple[int, Reply]]:
        numbered = enumerate(questions)
        while batch := list(islice(numbered, self.batch_size)):
            replies = self._batch([question for _, question in batch])
            yield from zip((number for number, _ in batch), replies, strict=True)

    @torch.no_grad()
    def _batch(self, questions: list[Question]) -> list[Reply]:
        inputs = self._processor.apply_chat_template(
            [self._turn(question) for question in questions], chat_template=self._template, tokenize=True,
            add_generation_prompt=True, return_dict=True, return_tensors="pt", **self._padding(),
        )  # fmt: skip
        inputs = inputs.to(self._model.device)
        for name, value in inputs.items():
            if value.is_floating_point():
                inputs[name] = value.to(self._model.dtype)
        pad = self._tokenizer.pad_token_id
        made = self._model.generate(
            **inputs, do_sample=False, max_new_tokens=self.max_new_tokens, pad_token_id=pad, num_beams=1,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        out = made.sequences[:, inputs["input_ids"].shape[1] :]
        texts = self._tokenizer.batch_decode(out, skip_special_tokens=True)
        ends = self._model.generation_config.eos_token_id
        ended = torch.isin(out, torch.tensor([ends] if isinstance(ends, int) else ends or [], device=out.device))
        whole = ended.any(1).tolist() if ends is not None else [True] * len(texts)
        log_chance = torch.stack(made.logits, 1).float().log_softmax(-1).gather(2, out[..., None])[..., 0]
        behind = ended.cumsum(1) - ended.int() > 0  # what follows the end is padding
        sure = log_chance.masked_fill(behind, 0).sum(1).exp().tolist()
        return [Reply(text.strip(), "", not end, p) for text, end, p in zip(texts, whole, sure, strict=True)]

    def _padding(self) -> dict:
        return {"processor_kwargs": {"padding": True}} if self._sees else {"padding": True}

    def _turn(self, question: Question) -> list[dict]:
        if not self._sees:
            if question.images:
                raise ValueError(f"{self.name} reads text alone and cannot be shown images; ask a multimodal model")
            return [{"role": "user", "content": question.text}]
        parts = [
            {"type": "text", "text": part.replace(self._image_token, " ")}
            if isinstance(part, str)
            else {"type": "image", "image": part.convert("RGB")}
            for part in question.parts()
        ]
        return [{"role": "user", "content": parts}]
