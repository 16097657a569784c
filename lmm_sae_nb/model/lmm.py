"""A large multimodal model under study: prompts with token spans, hidden states, spliced forwards, answers.

`LMM` wraps any `AutoModelForImageTextToText` whose images become tokens of its decoder's sequence.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from os.path import commonprefix
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    BatchFeature,
    Cache,
    PreTrainedModel,
    ProcessorMixin,
)

from lmm_sae_nb.model import hooks, upper_layers
from lmm_sae_nb.model.hooks import Hidden
from lmm_sae_nb.model.processor import load_processor
from lmm_sae_nb.model.prompts import TEMPLATES, Prompt
from lmm_sae_nb.model.token_kinds import Grid, layout_of, spans_of
from lmm_sae_nb.support.tensor_files import hash_of

# What decoders are called with for all of their layers alike.
ANY_LAYER = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position",
    "output_attentions", "output_hidden_states", "return_dict", "is_causal", "logits_to_keep",
}  # fmt: skip


class LMM:
    """A frozen multimodal model with its processor.

    `LMM(model, processor)` puts the model into eval mode, its parameters without gradients (gradients of what is
    spliced in still flow); and the tokenizer pad on the left, with the end token if it has no pad token.
    image_size: (width, height) in pixels that every image is brought to first, for families whose patch grid follows
    the image's size, as Qwen2.5-VL's does.
    ValueError if the model has no image tokens or an unknown family, or the processor does not fit it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        name: str | None = None,
        *,
        image_size: tuple[int, int] | None = None,
    ):
        self.name = name or model.config.name_or_path or type(model).__name__
        self.model, self.processor, self.image_size = model, processor, image_size
        self._fingerprints: dict[int, str] = {}
        self._bare: dict[int, bool] = {}  # what is known of each layer's output (`hooks.Captured.bare`)
        self._check_fit()
        self.tokenizer = processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # the attention mask tells the two apart
        model.eval().requires_grad_(False)
        model.generation_config.pad_token_id = self.tokenizer.pad_token_id

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        image_size: tuple[int, int] | None = None,
    ) -> "LMM":
        """Load a model and its processor from the hub or a folder.

        By default onto a GPU if there is one, in the checkpoint's own dtype, or else in float32. Code that
        comes with a checkpoint runs only with `trust_remote_code`. FileNotFoundError for a missing `Path`, ValueError
        for a model that transformers does not know to take images and text, or as the class.
        """
        if isinstance(name_or_path, Path) and not name_or_path.is_dir():
            raise FileNotFoundError(f"no model folder {name_or_path}; give another one, or a name on the hub")
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not trust_remote_code:
            raise ValueError(
                f"{name_or_path} ({config.model_type}) takes no images and text, as far as transformers knows; "
                "choose a model whose images become tokens of its decoder's sequence"
            )
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = AutoModelForImageTextToText.from_pretrained(
            name_or_path,
            dtype=dtype or (torch.float32 if device.type == "cpu" else "auto"),
            trust_remote_code=trust_remote_code,
        )
        processor = load_processor(name_or_path, trust_remote_code=trust_remote_code)
        return cls(model.to(device), processor, str(name_or_path), image_size=image_size)

    def _check_fit(self) -> None:
        model, processor = self.model, self.processor
        token = getattr(model.config, "image_token_id", None)
        if token is None:
            raise ValueError(
                f"{self.name} ({model.config.model_type}) has no image_token_id in its config; "
                "choose a model whose images become tokens of its decoder's sequence"
            )
        layout_of(model)
        if not hasattr(model.get_decoder(), "layers"):
            raise ValueError(f"{self.name} has no plain stack of layers; choose a decoder-only language model")
        if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
            raise ValueError(
                f"{type(processor).__name__} does not process both text and images; load the processor of "
                f"{self.name} with AutoProcessor"
            )
        written = processor.tokenizer.convert_tokens_to_ids(str(processor.image_token))
        if written != token:
            raise ValueError(
                f"the processor does not fit {self.name}: it writes images as token {written}, the "
                f"model reads them as token {token}; load both from the same checkpoint"
            )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def n_layers(self) -> int:
        return len(self.model.get_decoder().layers)

    @property
    def width(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @cached_property
    def grid(self) -> Grid | None:
        """Rows and columns of the base patches of every image; None if there are none, or images differ."""
        shapes = (256, 256), (512, 256)
        grids = {self.prompt("", Image.new("RGB", shape)).spans[0].grid for shape in shapes}
        return grids.pop() if len(grids) == 1 else None

    def layer(self, index: int) -> nn.Module:
        """Give a decoder layer, 0-based (the paper's 25th is 24); ValueError if it does not exist."""
        if not 0 <= index < self.n_layers:
            raise ValueError(f"no layer {index}: {self.name} has layers 0 to {self.n_layers - 1}, 0-based")
        return self.model.get_decoder().layers[index]

    def fingerprint(self, layer: int) -> str:
        """The model's class and a hash of this layer's weights, as float32 in which bfloat16 and float16 are exact.

        Computed once for each layer: the weights are frozen.
        """
        if layer not in self._fingerprints:
            weights = hash_of(tensor.float() for tensor in self.layer(layer).state_dict().values())
            self._fingerprints[layer] = f"{type(self.model).__name__} {weights}"
        return self._fingerprints[layer]

    def prompt(
        self,
        texts: str | list[str],
        images: Image.Image | list[Image.Image | None] | None = None,
        *,
        answers: str | list[str] | None = None,
    ) -> Prompt:
        """Put each text, its image before it, into a user's turn of the chat template, and make a batch.

        A text may be "" (image only), an image None (text only). The template's generation prompt comes last;
        with `answers` the assistant's turn, as in supervised fine-tuning, and `answer_mask` marks its tokens.
        ValueError for numbers that differ, an image without pixels or not of PIL, no chat template, or a
        processor that does not fit the model.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        answers = [answers] if isinstance(answers, str) else answers
        if not isinstance(images, list | tuple):
            images = [None] * len(texts) if images is None else [images]
        if not texts or len(images) != len(texts) or len(answers or texts) != len(texts):
            counts = f"{len(texts)} texts, {len(images)} images, {len(answers or [])} answers"
            raise ValueError(f"{counts}: give each text one image or None, and each or none an answer")
        images = [image if image is None else _rgb(image, self.image_size) for image in images]
        questions = self._render(texts, images, [None] * len(texts))
        rendered = questions if answers is None else self._render(texts, images, answers)
        inputs = self._process(rendered, images)
        if "qformer_input_ids" in inputs:  # a Q-Former is to read the question, not the answer
            asked = self.processor.qformer_tokenizer(questions, padding=True, return_tensors="pt")
            inputs.update({f"qformer_{name}": asked[name] for name in ("input_ids", "attention_mask")})
        spans = spans_of(self.model, self.tokenizer, inputs, images)
        answer_mask = None if answers is None else self._answer_mask(inputs, questions, rendered)
        return Prompt(inputs.to(self.device, self.model.dtype), spans, answer_mask)

    def _render(self, texts: list[str], images: list, answers: list[str | None]) -> list[str]:
        """Write each sample as the model is to read it, an image as one image token."""
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
        """Whether the tokenizer is to add its own special tokens: not if the template wrote the first."""
        bos = self.tokenizer.bos_token
        return bos is None or not rendered[0].startswith(bos)

    def _process(self, rendered: list[str], images: list[Image.Image | None]) -> BatchFeature:
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
        """Mark what the question's own tokens do not hold, but for white space after the end token."""
        special = self._adds_special_tokens(rendered)
        mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for row, question, full in zip(mask, questions, rendered, strict=True):
            asked, full = self.tokenizer([question, full], add_special_tokens=special)["input_ids"]
            start, stop = len(commonprefix([asked, full])), len(full)
            while stop > start and self.tokenizer.decode(full[stop - 1]).isspace():
                stop -= 1
            if start >= stop:
                raise ValueError(f"the chat template of {self.name} writes no answer after {question!r}")
            shift = len(row) - len(full)  # padding, and image tokens beyond the one that is written
            row[shift + start : shift + stop] = True
        return mask.to(self.device)

    @torch.no_grad()
    def hidden_states(
        self, prompt: Prompt, layers: int | list[int], *, tokens: int | None = None
    ) -> Hidden | dict[int, Hidden]:
        """Give the outputs of one layer, or of several by layer; the forward stops after the last of them.

        With `tokens` only the first so many tokens of each sequence pass the decoder and come back.
        """
        wanted = [layers] if isinstance(layers, int) else list(layers)
        if not wanted:
            raise ValueError("no layer was asked for; give at least one")
        *earlier, last = sorted(set(wanted))
        with ExitStack() as reads:
            if tokens is not None:
                reads.enter_context(hooks.truncate(self.model.get_decoder(), tokens))
            captured = {index: reads.enter_context(hooks.read(self.layer(index))) for index in earlier}
            with hooks.stop(self.layer(last)) as captured[last]:
                self._forward(prompt)
        self._bare |= {index: one.bare for index, one in captured.items()}
        return captured[layers].value if isinstance(layers, int) else {i: captured[i].value for i in wanted}

    def _forward(self, prompt: Prompt):
        """Run the model, or the decoder alone where it is known what that is called with."""
        if prompt.entry is None:
            return self._whole(prompt)
        return self.model.get_decoder()(**prompt.entry | {"use_cache": False})

    def _whole(self, prompt: Prompt, **settings):
        """Run the whole model; equal pictures pass the vision tower once, where it takes pictures alone."""
        return self.model(**prompt.inputs, use_cache=False, **settings)

    @torch.no_grad()
    def entered(self, prompt: Prompt) -> Prompt:
        """The same prompt, which remembers from now on what the decoder is called with.

        `hidden_states`, `last_logits` and `above` then leave out the vision tower and all else that is below the
        decoder, which nothing that is spliced into its layers changes. It costs a copy of the embeddings.
        """
        if prompt.entry is None:
            decoder = self.model.get_decoder()
            prompt.entry = upper_layers.entry(decoder, lambda: self._whole(prompt))
        return prompt

    def above(
        self, prompt: Prompt, layer: int, states: Float[Tensor, "versions tokens width"], cache: Cache | None = None
    ) -> Float[Tensor, "versions tokens width"]:
        """What the decoder puts out, behind its last norm, where this layer puts out these states (eq. 6).

        Nothing up to the layer is run. states: of the whole batch, or of one sample in several versions side by side.
        With fewer tokens than the prompt has they are its last ones, and `cache` knows those before them (`before`); an
        empty cache is filled. Differentiable in the states. A decoder that is called with something for single layers
        (Qwen3-VL's) runs whole, one version after the other; NotImplementedError for its last tokens alone.
        """
        self.layer(layer)
        entry = self.entered(prompt).entry
        start = entry["inputs_embeds"].shape[1] - states.shape[1]
        inputs = entry | {"inputs_embeds": states.to(entry["inputs_embeds"].dtype)}
        inputs |= {"past_key_values": cache, "use_cache": cache is not None}
        if (mask := entry.get("attention_mask")) is not None:
            inputs["attention_mask"] = mask.expand(len(states), -1)
        if entry.get("position_ids") is not None:  # the last axis: mrope has three positions a token
            inputs["position_ids"] = entry["position_ids"][..., start:]
        if own := sorted(name for name, value in entry.items() if value is not None and name not in ANY_LAYER):
            return self._above_whole(prompt, layer, states, own, start)
        below = [self.layer(number) for number in range(layer + 1)]
        with upper_layers.given(below, inputs["inputs_embeds"], self._is_bare(layer, prompt)):
            return self.model.get_decoder()(**inputs).last_hidden_state

    def _is_bare(self, layer: int, prompt: Prompt) -> bool:
        """Whether this layer puts out its states as they are, not in a tuple; it has to have run once to tell."""
        if layer not in self._bare:
            self.hidden_states(prompt, layer)
        return self._bare[layer]

    def _above_whole(self, prompt: Prompt, layer: int, states: Hidden, own: list[str], start: int) -> Hidden:
        if start:
            raise NotImplementedError(
                f"this decoder is called with {', '.join(own)}, which are for single layers of the whole sequence: it "
                "cannot go on from a token in its middle; ablate single latents (`exact`) in another family"
            )
        together = len(states) == len(prompt.spans)  # one state for each sample, not versions of one

        def run(own: Hidden) -> Hidden:
            with self.spliced(layer, lambda hidden: own.to(hidden.dtype)):
                return self._forward(prompt).last_hidden_state

        return run(states) if together else torch.cat([run(version[None]) for version in states])

    def head(self, decoded: Float[Tensor, "*any width"]) -> Float[Tensor, "*any vocab"]:
        """Next-token logits, in float32, of what the decoder puts out."""
        return self.model.get_output_embeddings()(decoded).float()

    def spliced(self, layer: int, fn: Callable[[Hidden], Hidden]) -> AbstractContextManager[None]:
        """Run every forward in the `with` with `fn` of this layer's output in its place (eq. 6).

        Under `generate`, fn sees the whole prompt first and then one token a step: (batch, 1, width).
        """
        return hooks.rewrite(self.layer(layer), fn)

    def logits(self, prompt: Prompt) -> Float[Tensor, "batch tokens vocab"]:
        """Give every token's next-token logits, in float32; differentiable in what is spliced in."""
        return self._whole(prompt).logits.float()

    def last_logits(self, prompt: Prompt) -> Float[Tensor, "batch vocab"]:
        """Give the next-token logits after the last token alone, in float32; differentiable likewise."""
        if prompt.entry:
            return self.head(self._forward(prompt).last_hidden_state[:, -1])
        accepted = inspect.signature(self.model.forward).parameters
        kept = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        return self._whole(prompt, **kept).logits[:, -1].float()

    def cross_entropy(self, prompt: Prompt, decoded: Hidden | None = None) -> Float[Tensor, " batch"]:
        """Give each sample's mean cross-entropy over its answer's tokens, in nats; decoded: as `above` gives it."""
        if prompt.answer_mask is None:
            raise ValueError("this prompt has no answers; make it with prompt(texts, images, answers=...)")
        answers = prompt.answer_mask[:, 1:]  # the token before it predicts a token
        if decoded is None:
            logits = self._whole(prompt).logits[:, :-1][answers].float()
        else:
            logits = self.head(decoded[:, :-1][answers])
        losses = F.cross_entropy(logits, prompt.inputs["input_ids"][:, 1:][answers], reduction="none")
        return torch.stack([sample.mean() for sample in losses.split(answers.sum(1).tolist())])

    def generate(self, prompt: Prompt, max_new_tokens: int = 64, **generation_kwargs) -> list[str]:
        """Give each prompt's answer, greedy and with a KV cache unless told otherwise."""
        settings = {"do_sample": False, "num_beams": 1, "use_cache": True} | generation_kwargs
        tokens = self.model.generate(**prompt.inputs, max_new_tokens=max_new_tokens, **settings)
        new = tokens[:, prompt.inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _rgb(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise ValueError(f"{type(image).__name__} is not a PIL image; use PIL.Image.open or PIL.Image.fromarray")
    if not image.width or not image.height:
        raise ValueError(f"an image of {image.width} x {image.height} px has nothing to see; leave it out")
    image = image.convert("RGB")
    return image.resize(size, Image.Resampling.BICUBIC) if size else image
