"""Ask a model in this process."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
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

from lmm_sae_nb.chat.questions import Question
from lmm_sae_nb.chat.replies import Reply, read_text
from lmm_sae_nb.model.loading import load_model
from lmm_sae_nb.model.processor import load_processor
from lmm_sae_nb.support.devices import choose_device
from lmm_sae_nb.support.files import fingerprint
from lmm_sae_nb.support.images import rgb


def _commit(name: str | Path) -> str:
    """Return the commit of a model of the hub that was just loaded: its files lie in a folder of that name."""
    file = try_to_load_from_cache(str(name), "config.json")
    return Path(file).parent.name if isinstance(file, str) else "unknown"


class LocalChat:
    """A transformers model, of image and text or of text alone, that answers in batches without sampling.

    The chat template of the processor or tokenizer writes the turns. By rounding, the reply to a question can depend on
    the other questions of its batch.

    model: it is put into eval mode, and its parameters are frozen.
    processor: of the model; a tokenizer for a model of text alone.
    name: for people.
    identity: changes with the model's weights.
    batch_size: questions at the same time.
    max_new_tokens: of a reply.

    Raises:
        ValueError: the model has no chat template; or, when it is asked, a model of text alone gets images.
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
    def load(cls, name_or_path: str | Path, *, device: str | torch.device | None = None, **settings: int) -> LocalChat:
        """Load a model from a folder or from the hub.

        device: by default a GPU if there is one.
        settings: batch_size and max_new_tokens.
        """
        device = choose_device(device)
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        model_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        load = load_processor if sees else AutoTokenizer.from_pretrained
        dtype = torch.float32 if device.type == "cpu" else "auto"
        model = load_model(model_class, name_or_path, dtype=dtype, trust_remote_code=False)
        processor = load(name_or_path, trust_remote_code=False)
        folder = Path(name_or_path)
        if folder.is_dir():
            name, identity = folder.name, fingerprint(folder)
        else:
            name, identity = str(name_or_path), f"{name_or_path}@{_commit(name_or_path)}"
        return cls(model.to(device), processor, name, identity, **settings)

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
        generated = self._model.generate(
            **inputs, do_sample=False, max_new_tokens=self.max_new_tokens, pad_token_id=pad, num_beams=1,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        out = generated.sequences[:, inputs["input_ids"].shape[1] :]
        texts = self._tokenizer.batch_decode(out, skip_special_tokens=True)
        ends = self._model.generation_config.eos_token_id
        ended = torch.isin(out, torch.tensor([ends] if isinstance(ends, int) else ends or [], device=out.device))
        complete = ended.any(1).tolist() if ends is not None else [True] * len(texts)
        log_probability = torch.stack(generated.logits, 1).float().log_softmax(-1).gather(2, out[..., None])[..., 0]
        padding = ended.cumsum(1) - ended.int() > 0  # what follows the end
        confidence = log_probability.masked_fill(padding, 0).sum(1).exp().tolist()
        rows = zip(texts, complete, confidence, strict=True)
        return [read_text(text, cut=not end, confidence=p) for text, end, p in rows]

    def _padding(self) -> dict:
        return {"processor_kwargs": {"padding": True}} if self._sees else {"padding": True}

    def _turn(self, question: Question) -> list[dict]:
        if not self._sees:
            if question.images:
                raise ValueError(f"{self.name} reads text alone and cannot take images; ask a multimodal model")
            return [{"role": "user", "content": question.text}]
        parts = [
            {"type": "text", "text": part.replace(self._image_token, " ")}
            if isinstance(part, str)
            else {"type": "image", "image": rgb(part)}
            for part in question.parts()
        ]
        return [{"role": "user", "content": parts}]
