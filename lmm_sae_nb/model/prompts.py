"""Turn images, questions and answers into a batch for the model, with the kind of each token and the answers' tokens.

`PromptMaker` is called through `LMM.prompt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os.path import commonprefix

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from lmm_sae_nb.model.token_kinds import Spans, spans_of
from lmm_sae_nb.support.images import UnfitImage, UnreadableImage, rgb

Picture = Image.Image | Callable[[], Image.Image]  # or a call that opens it
PORTION = 2**24  # pixels that are held at once: 70 MB
TEXTS = ("input_ids", "attention_mask", "mm_token_type_ids")  # the rows that are padded on the left

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

    The inputs are on the model's device. Everything that marks tokens is on the CPU, from where it can index tensors of
    any device.

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

    def __call__(self, texts: list[str], images: list[Picture | None], answers: list[str] | None = None) -> Prompt:
        """Make a batch; arguments and errors as `LMM.prompt`, but always lists of the same length.

        Large images are processed a few at a time, so that memory does not hold a batch of photographs.
        """
        questions = self._render(texts, images, [None] * len(texts))
        rendered = questions if answers is None else self._render(texts, images, answers)
        parts, sizes = [], []
        for portion in self._portions(images):
            start = len(sizes)
            sizes += [image and image.size for image in portion]
            try:
                parts.append(self._process(rendered[start : len(sizes)], portion))
            except Exception as error:
                self._name_unfit(portion, start, error)
                raise
        inputs = parts[0] if len(parts) == 1 else self._joined(parts)
        if "qformer_input_ids" in inputs:  # a Q-Former must read the question, not the answer
            question_inputs = self.processor.qformer_tokenizer(questions, padding=True, return_tensors="pt")
            inputs.update({f"qformer_{name}": question_inputs[name] for name in ("input_ids", "attention_mask")})
        spans = spans_of(self.model, self.tokenizer, inputs, sizes)
        answer_mask = None if answers is None else self._answer_mask(inputs, questions, rendered)
        return Prompt(inputs.to(self.model.device, self.model.dtype), spans, answer_mask)

    def _portions(self, images: list[Picture | None]) -> Iterator[list[Image.Image | None]]:
        """Yield the images, opened and converted, in portions of about PORTION pixels."""
        portion, pixels = [], 0
        for position, image in enumerate(images):
            if image is not None:
                try:
                    image = prepared(image() if callable(image) else image, self.image_size)
                except UnreadableImage as fault:
                    fault.position = position
                    raise
                more = image.width * image.height
                if pixels and pixels + more > PORTION:
                    yield portion
                    portion, pixels = [], 0
                pixels += more
            portion.append(image)
            del image  # the caller works on the portion next; nothing else may hold its images
        yield portion

    def _name_unfit(self, images: list[Image.Image | None], start: int, error: Exception) -> None:
        """Raise UnfitImage for the first image that the processor refuses alone; nothing if it takes each."""
        for position, image in enumerate(images, start):
            if image is not None:
                try:
                    self.processor.image_processor(images=[image], return_tensors="pt")
                except Exception as reason:
                    name = getattr(image, "filename", "") or f"image {position}"
                    unfit = UnfitImage(f"{name}, {image.width} x {image.height} px,", reason)
                    unfit.position = position
                    raise unfit from error

    def _joined(self, parts: list[BatchFeature]) -> BatchFeature:
        """Join the batches of portions to the one that the processor makes of all: texts are padded on the left, all
        else behind, with zeros."""
        joined = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            rows = [part[name] for part in parts if name in part]
            if isinstance(rows[0], Tensor):
                longest = torch.tensor([row.shape[1:] for row in rows]).amax(0).tolist()
                fill = self.tokenizer.pad_token_id if name == "input_ids" else 0
                rows = [_padded(row, longest, name in TEXTS, fill) for row in rows]
                joined[name] = torch.cat(rows)
            else:
                joined[name] = [each for row in rows for each in row]
        return BatchFeature(joined)

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
        for name in TEXTS:
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
        return mask


def _padded(rows: Tensor, shape: list[int], left: bool, fill: int) -> Tensor:
    """Enlarge all dimensions but the first to `shape`."""
    missing = [whole - now for whole, now in zip(shape, rows.shape[1:], strict=True)]
    ends = [end for gap in reversed(missing) for end in ((gap, 0) if left else (0, gap))]
    return F.pad(rows, ends, value=fill)


def prepared(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """Convert an image to RGB, and resize it if a size (width, height) is given.

    Raises:
        ValueError: not a PIL image, or as `rgb`.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"{type(image).__name__} is not a PIL image; use PIL.Image.open or PIL.Image.fromarray")
    image = rgb(image)
    return image.resize(size, Image.Resampling.BICUBIC) if size else image
