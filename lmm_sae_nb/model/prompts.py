"""Turn images, questions and answers into a batch for the model, with the kind of each token and the answers' tokens.

`PromptMaker` is called through `LMM.prompt`.
"""

from __future__ import annotations

from dataclasses import dataclass
from os.path import commonprefix

import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from lmm_sae_nb.model.token_kinds import Spans, spans_of
from lmm_sae_nb.support.images import rgb

# For families that were trained without a chat template.
TEMPLATES = {
    "instructblip": "{% for message in messages %}"
    "{% for part in message.content %}{% if part.type == 'text' %}"
    "{{ ' ' if message.role == 'assistant' }}{{ part.text }}"
    "{% endif %}{% endfor %}"
    "{{ eos_token if message.role == 'assistant' }}"
    "{% endfor %}"
}


@dataclass
class Prompt:
    """A batch that is ready for the model.

    inputs: what the model is called with.
    spans: the kind of each token, for each sample.
    answer_mask: marks the answers' tokens and their end tokens; None if the prompt has no answers.
    """

    inputs: BatchFeature
    spans: list[Spans]
    answer_mask: Bool[Tensor, "batch tokens"] | None = None

    def mask(self, *kinds: str) -> Bool[Tensor, "batch tokens"]:
        """Mark the tokens of any of these kinds, in every sample."""
        return torch.stack([spans.mask(*kinds) for spans in self.spans])


class PromptMaker:
    """Format samples with a model's chat template and process them.

    model: the model that reads the prompts.
    processor: the model's processor.
    name: of the model, for errors.
    image_size: (width, height) in pixels that every image is resized to first, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        name: str,
        image_size: tuple[int, int] | None = None,
    ):
        self.model, self.processor, self.name, self.image_size = model, processor, name, image_size
        self.tokenizer = processor.tokenizer

    def __call__(self, texts: list[str], images: list[Image.Image | None], answers: list[str] | None = None) -> Prompt:
        """Make a batch; arguments and errors as `LMM.prompt`, but always lists of the same length."""
        images = [image if image is None else prepared(image, self.image_size) for image in images]
        questions = self._render(texts, images, [None] * len(texts))
        rendered = questions if answers is None else self._render(texts, images, answers)
        inputs = self._process(rendered, images)
        if "qformer_input_ids" in inputs:  # a Q-Former must read the question, not the answer
            question_inputs = self.processor.qformer_tokenizer(questions, padding=True, return_tensors="pt")
            inputs.update({f"qformer_{name}": question_inputs[name] for name in ("input_ids", "attention_mask")})
        spans = spans_of(self.model, self.tokenizer, inputs, images)
        answer_mask = None if answers is None else self._answer_mask(inputs, questions, rendered)
        return Prompt(inputs.to(self.model.device, self.model.dtype), spans, answer_mask)

    def _render(self, texts: list[str], images: list, answers: list[str | None]) -> list[str]:
        """Write each sample as text for the model, with one image token for an image."""
        template = self.processor.chat_template or self.tokenizer.chat_template
        template = template or TEMPLATES.get(self.model.config.model_type)
        if template is None:
            raise ValueError(
                f"{self.name} has no chat template; set lmm.processor.chat_template to that of its training"
            )
        for text in texts:
            if str(self.processor.image_token) in text:
                raise ValueError(f"{text!r} holds the image token, which the chat template writes; leave it out")
        conversations = []
        for text, image, answer in zip(texts, images, answers, strict=True):
            parts = [{"type": "image"}] if image is not None else []
            parts += [{"type": "text", "text": text}] if text or not parts else []
            turns = [{"role": "user", "content": parts}]
            if answer is not None:
                turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            conversations.append(turns)
        return self.processor.apply_chat_template(
            conversations, chat_template=template, add_generation_prompt=answers[0] is None
        )

    def _adds_special_tokens(self, rendered: list[str]) -> bool:
        """Return whether the tokenizer must add its special tokens: not if the template wrote the first one."""
        first = self.tokenizer.bos_token
        return first is None or not rendered[0].startswith(first)

    def _process(self, rendered: list[str], images: list[Image.Image | None]) -> BatchFeature:
        """Tokenize the texts and cut up the images, padded on the left."""
        nested = [[] if image is None else [image] for image in images]
        inputs = self.processor(
            text=rendered,
            images=nested if any(nested) else None,
            padding=True,
            return_tensors="pt",
            add_special_tokens=self._adds_special_tokens(rendered),
        )
        highest, rows = int(inputs["input_ids"].max()), self.model.get_input_embeddings().num_embeddings
        if highest >= rows:
            raise ValueError(
                f"the processor does not fit {self.name}: it writes token {highest}, the model knows "
                f"tokens 0 to {rows - 1}; load both from the same checkpoint"
            )
        # InstructBLIP's processor pads between the image and the text
        pads_first = inputs["attention_mask"].argsort(dim=1, stable=True)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in inputs:
                inputs[name] = inputs[name].gather(1, pads_first)
        return inputs

    def _answer_mask(self, inputs, questions: list[str], rendered: list[str]) -> Bool[Tensor, "batch tokens"]:
        """Mark the tokens that the question alone does not have, up to the end token."""
        special = self._adds_special_tokens(rendered)
        mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for row, question, full in zip(mask, questions, rendered, strict=True):
            before, whole = self.tokenizer([question, full], add_special_tokens=special)["input_ids"]
            start, stop = len(commonprefix([before, whole])), len(whole)
            while stop > start and self.tokenizer.decode(whole[stop - 1]).isspace():
                stop -= 1
            if start >= stop:
                raise ValueError(f"the chat template of {self.name} writes no answer after {question!r}")
            shift = len(row) - len(whole)  # padding, and the further tokens of an image
            row[shift + start : shift + stop] = True
        return mask.to(self.model.device)


def prepared(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """Convert an image to RGB, and resize it if a size (width, height) is given.

    Raises:
        ValueError: not a PIL image, or as `rgb`.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"{type(image).__name__} is not a PIL image; use PIL.Image.open or PIL.Image.fromarray")
    image = rgb(image)
    return image.resize(size, Image.Resampling.BICUBIC) if size else image
