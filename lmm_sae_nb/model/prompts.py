"""Turn images, questions and answers into a batch for the model, with the kind of each token and the answers' tokens.

`PromptMaker` is called through `LMM.prompt` and `LMM.conversations`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from os.path import commonprefix

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin
from transformers.processing_utils import TextKwargs

from lmm_sae_nb.model.found_layouts import WRITTEN
from lmm_sae_nb.model.templates import ChatTemplate, Turns
from lmm_sae_nb.model.token_kinds import Layout, Spans, spans_of
from lmm_sae_nb.support.images import UnfitImage, UnreadableImage, rgb

Picture = Image.Image | Callable[[], Image.Image]  # or a call that opens it
WRITTEN_TOO = f"return_{WRITTEN}"
PORTION = 2**24  # pixels that are held at once: 70 MB
TEXTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # rows that are padded on the left


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
    layout: of the model's image tokens.
    image_size: (width, height) in pixels that every image is resized to first, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        name: str,
        layout: Layout,
        image_size: tuple[int, int] | None = None,
    ):
        self.model, self.processor, self.name, self.image_size = model, processor, name, image_size
        self.layout = layout
        self.tokenizer = processor.tokenizer

    def __call__(self, conversations: Sequence[Turns], images: Sequence[Sequence[Picture]]) -> Prompt:
        """Make a batch; arguments and errors as `LMM.conversations`.

        Large images are processed a few at a time, so that memory does not hold a batch of photographs.
        """
        if hasattr(self.processor, "qformer_tokenizer") and any(images) and not all(images):
            raise ValueError(
                f"sample {[len(each) for each in images].index(0)} has no image beside samples with one; "
                "a Q-Former takes no text without an image, give one to each sample"
            )
        asks = conversations[0][-1]["role"] != "assistant"
        self.template = ChatTemplate(self.model, self.processor, self.name)
        suffixes = None if asks else self._suffixes(conversations)
        if suffixes is None:
            rendered = self.template.write(conversations, ask=asks)
        else:
            rendered = self.template.write([turns[:-1] for turns in conversations], ask=True)
        parts, sizes = [], []
        for portion in self._portions(images):
            start = len(sizes)
            sizes += [[image.size for image in of_sample] for of_sample in portion]
            try:
                now = slice(start, len(sizes))
                parts.append(self._process(rendered[now], portion, suffixes and suffixes[now]))
            except Exception as error:
                self._name_unfit(portion, start, error)
                raise
        inputs = parts[0] if len(parts) == 1 else self._joined(parts)
        if "qformer_input_ids" in inputs:  # a Q-Former must read the first question, not the answer
            questions = [_until_answer(turns) for turns in conversations]
            question_inputs = self.processor.qformer_tokenizer(
                self.template.write(questions, ask=True), padding=True, return_tensors="pt"
            )
            inputs.update({f"qformer_{name}": question_inputs[name] for name in ("input_ids", "attention_mask")})
        spans = spans_of(self.model, self.tokenizer, inputs, sizes, self.layout)
        written, answer_mask = inputs.pop(WRITTEN, None), None
        if suffixes is not None:
            answer_mask = inputs["token_type_ids"] == 1
        elif not asks:
            answer_mask = self._answer_mask(inputs, conversations, rendered, written)
        return Prompt(inputs.to(self.model.device, self.model.dtype), spans, answer_mask)

    def _portions(self, images: Sequence[Sequence[Picture]]) -> Iterator[list[list[Image.Image]]]:
        """Yield the images of each sample, opened and converted, in portions of about PORTION pixels.

        In a portion with images the first sample has one: BatchFeature looks at the first sample alone to see whether
        what the processor wrote can be a tensor.
        """
        portion, pixels = [], 0
        for position, of_sample in enumerate(images):
            opened, more = [], 0
            for image in of_sample:
                try:
                    opened.append(prepared(image() if callable(image) else image, self.image_size))
                except UnreadableImage as fault:
                    fault.position = position
                    raise
                more += opened[-1].width * opened[-1].height
                del image
            if portion and more and (not pixels or pixels + more > PORTION):
                yield portion
                portion, pixels = [], 0
            pixels += more
            portion.append(opened)
            del opened  # the caller works on the portion next; nothing else may hold its images
        yield portion

    def _name_unfit(self, images: list[list[Image.Image]], start: int, error: Exception) -> None:
        """Raise UnfitImage for the first image that the processor refuses alone; nothing if it takes each."""
        for position, of_sample in enumerate(images, start):
            for image in of_sample:
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
                nothing = [[]]  # of a sample without an image
                joined[name] = [each for part in parts for each in part.get(name, nothing * len(part["input_ids"]))]
        return BatchFeature(joined)

    def _adds_special_tokens(self, rendered: list[str]) -> bool:
        """Return whether the tokenizer must add its special tokens: not if the template wrote the first one."""
        first = self.tokenizer.bos_token
        return first is None or not rendered[0].startswith(first)

    def _suffixes(self, conversations: Sequence[Turns]) -> list[str] | None:
        """Return the answers, if the processor wants them apart from the questions, as PaliGemma's does; else None.

        Raises:
            ValueError: such a processor is given more than one answer.
        """
        options = getattr(getattr(self.processor, "valid_processor_kwargs", None), "__annotations__", {})
        of_text = getattr(options.get("text_kwargs"), "__annotations__", {})  # where Transformers 5.20 has it
        if "suffix" not in {*signature(type(self.processor).__call__).parameters, *of_text}:
            return None
        for turns in conversations:
            if any(turn["role"] == "assistant" for turn in turns[:-1]):
                raise ValueError(f"{self.name} takes one question and one answer; give a sample for each answer")
        return [turns[-1]["content"][0]["text"] for turns in conversations]

    def _process(
        self, rendered: list[str], images: list[list[Image.Image]], suffixes: list[str] | None
    ) -> BatchFeature:
        """Tokenize the texts and cut up the images, padded on the left.

        suffixes: the answers, for a processor that wants them apart.
        """
        inputs = self.processor(
            text=rendered,
            images=images if any(images) else None,
            padding=True,
            return_tensors="pt",
            add_special_tokens=self._adds_special_tokens(rendered),
            **({WRITTEN_TOO: True} if self._tells_what_it_writes() else {}),
            **({} if suffixes is None else {"suffix": suffixes}),
        )
        inputs.pop("labels", None)  # PaliGemma's processor makes some
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

    def _answer_mask(
        self, inputs: BatchFeature, conversations: Sequence[Turns], rendered: list[str], written: list | None
    ) -> Bool[Tensor, "batch tokens"]:
        """Mark the tokens of every answer, up to its end token: those that the turns before it do not have.

        written: what the processor wrote for each image, of samples with several.
        """
        special = self._adds_special_tokens(rendered)
        mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for number, (turns, full) in enumerate(zip(conversations, rendered, strict=True)):
            answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
            texts = [text for place in answers for text in self._around(turns, place, full)]
            *ends, whole = self.tokenizer([*texts, full], add_special_tokens=special)["input_ids"]
            places = self._places(inputs, number, whole, written and written[number])
            for answer, place in enumerate(answers):
                before, until = ends[2 * answer : 2 * answer + 2]
                start, stop = len(commonprefix([before, whole])), len(commonprefix([until, whole]))
                while stop > start and self.tokenizer.decode(whole[stop - 1]).isspace():
                    stop -= 1
                if start >= stop:
                    asked = [part["text"] for part in turns[place - 1]["content"] if part["type"] == "text"]
                    raise ValueError(f"the chat template of {self.name} writes no answer after {''.join(asked)!r}")
                mask[number, places[start:stop]] = True
        return mask

    def _around(self, turns: Turns, place: int, full: str) -> tuple[str, str]:
        """Return the text up to an answer, and up to its end.

        Raises:
            ValueError: the template writes an answer in another way once more turns follow.
        """
        (before,) = self.template.write([turns[:place]], ask=True)
        (until,) = [full] if place == len(turns) - 1 else self.template.write([turns[: place + 1]])
        answer = turns[place]["content"][0]["text"].strip()
        if len(turns) > 2 and answer not in full[len(commonprefix([before, full])) : len(commonprefix([until, full]))]:
            raise ValueError(
                f"the chat template of {self.name} writes turn {place} in another way once more turns follow; give a "
                "sample for each answer, or set lmm.processor.chat_template to one that does not"
            )
        return before, until

    def _tells_what_it_writes(self) -> bool:
        """Tell whether the processor can say what it wrote for each image. In Transformers 5.20 this is an option of
        the text, in 5.23 one of the processor."""
        return hasattr(self.processor, WRITTEN_TOO) or WRITTEN_TOO in TextKwargs.__annotations__

    def _places(
        self, inputs: BatchFeature, number: int, whole: list[int], written: list[dict] | None
    ) -> Int64[Tensor, " _"]:
        """Return where the tokens of a text with one token for an image stand in a row, behind the padding."""
        row, pads = inputs["input_ids"][number], int((inputs["attention_mask"][number] == 0).sum())
        steps = torch.ones(len(whole) + 1, dtype=torch.long)
        steps[0] = pads
        mark = self.tokenizer.convert_tokens_to_ids(str(self.processor.image_token))
        images = [place for place, token in enumerate(whole) if token == mark]
        if len(images) > 1:
            texts = [each["replacement"] for each in written or []]
            lengths = [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        else:
            lengths = [len(row) - pads - len(whole) + 1]
        if len(lengths) != max(len(images), 1) or pads + len(whole) + sum(lengths) - len(lengths) != len(row):
            raise ValueError(
                f"the processor of {self.name} writes {len(images)} images of a sample as {lengths} tokens, in "
                f"{len(row) - pads} tokens in all; give samples with one image"
            )
        if images:
            steps[torch.tensor(images) + 1] = torch.tensor(lengths)
        else:
            steps[0] += lengths[0] - 1  # a Q-Former's tokens stand before the text
        return steps.cumsum(0)[:-1]


def _until_answer(turns: Turns) -> list:
    return list(turns[: next((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))])


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
