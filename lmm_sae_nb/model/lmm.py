"""A large multimodal model under study: prompts, hidden states, spliced forward passes, answers.

`LMM` wraps any `AutoModelForImageTextToText` whose images become tokens of its decoder's sequence.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
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
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import ModelOutput

from lmm_sae_nb.model import hooks
from lmm_sae_nb.model.crops import fewer_crops, whole_images
from lmm_sae_nb.model.found_layouts import layout_of
from lmm_sae_nb.model.hookpoints import Hookpoint, decoder_of, in_order, module_of, parsed, plain, require, weights_of
from lmm_sae_nb.model.hooks import Hidden
from lmm_sae_nb.model.loading import load_model, naming
from lmm_sae_nb.model.patch_states import at_patches, at_tokens
from lmm_sae_nb.model.processor import load_processor
from lmm_sae_nb.model.prompts import Picture, Prompt, PromptMaker
from lmm_sae_nb.model.templates import Turns, exchange
from lmm_sae_nb.model.token_kinds import LAYOUTS, Grid
from lmm_sae_nb.support.devices import choose_device
from lmm_sae_nb.support.tensor_files import hash_of

DTYPES = ("float32", "bfloat16", "float16", "auto")


class LMM:
    """A multimodal model and its processor, with frozen weights.

    The model is put into eval mode; gradients flow only into what is spliced in. The tokenizer pads on the left,
    with the end token if it has no pad token.

    model: of any family whose images become tokens of its decoder's sequence.
    processor: from the same checkpoint.
    name: for messages; by default the checkpoint's name.
    image_size: (width, height) in pixels that every image is resized to first. Families whose patch grid follows
        the image's size need it, such as Qwen2.5-VL.

    Raises:
        ValueError: the model has no image tokens, their layout cannot be found out, or the processor does not fit it.
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
        self._fingerprints: dict[Hookpoint, str] = {}
        self._widths: dict[Hookpoint, int] = {}
        self._running: Prompt | None = None  # by `run` or `generate`
        self._every_crop = False  # whether the vision tower must see equal crops apart
        self._check_fit()
        self.tokenizer = processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # the attention mask tells the two apart
        self.layout = layout_of(model, processor)
        if image_size is None and getattr(self.layout, "cut", False):
            warnings.warn(
                f"the processor of {self.name} cuts the edges off images that are not square, so maps of them are "
                "shifted; give image_size, such as (336, 336), and whole images are brought to this size",
                stacklevel=2,
            )
        model.eval().requires_grad_(False)
        model.generation_config.pad_token_id = self.tokenizer.pad_token_id

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        device_map: str | dict[str, str] | None = None,
        trust_remote_code: bool = False,
        image_size: Sequence[int] | None = None,
    ) -> LMM:
        """Load a model and its processor.

        name_or_path: a folder (`Path`), or a name on the hub.
        device: by default a GPU if there is one.
        dtype: of the weights and hidden states. "float32" gives the same results on every device; "bfloat16" needs half
            the memory; "auto" is the checkpoint's.
        device_map: "auto" lays the layers of a large model on all GPUs, as accelerate does; `device` is ignored then.
        trust_remote_code: run code that comes with the checkpoint.
        image_size: as for the class; nothing stands for None.

        Raises:
            FileNotFoundError: the folder is missing.
            ValueError: files of the folder are damaged or lack weights, transformers does not know the model as one of
                images and text, the dtype is unknown, the GPUs of a `device_map` are too small for it, or as the class.
        """
        if isinstance(name_or_path, Path) and not name_or_path.is_dir():
            raise FileNotFoundError(f"no model folder {name_or_path}; give another one, or a name on the hub")
        with naming(name_or_path):
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not trust_remote_code:
            raise ValueError(
                f"{name_or_path} ({config.model_type}) takes no images and text, as far as transformers knows; "
                "choose a model whose images become tokens of its decoder's sequence"
            )
        if isinstance(dtype, str) and dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
        where = choose_device(device)
        # onto a GPU the weights go one by one, so that they are never all on the host
        spread = {"device_map": device_map or where} if device_map or where.type == "cuda" else {}
        model = load_model(
            AutoModelForImageTextToText, name_or_path, dtype=dtype, trust_remote_code=trust_remote_code, **spread
        )
        if not device_map:
            model = model.to(where)
        elif any(weights.device.type == "meta" for weights in model.parameters()):
            raise ValueError(
                f"{name_or_path} in {dtype} does not fit into the memory of all GPUs together: a part of it would stay "
                "in the CPU's memory or on the disk; use dtype='bfloat16', or more or larger GPUs"
            )
        with naming(name_or_path):
            processor = load_processor(name_or_path, trust_remote_code=trust_remote_code)
        return cls(model, processor, str(name_or_path), image_size=tuple(image_size) if image_size else None)

    def _check_fit(self) -> None:
        """Raise ValueError if the model is of an unknown kind or the processor is another model's."""
        model, processor = self.model, self.processor
        if reason := why_not(model):
            raise ValueError(f"{self.name} ({model.config.model_type}) {reason}")
        token = getattr(model.config, "image_token_id", None)
        if token is None:
            raise ValueError(
                f"{self.name} ({model.config.model_type}) has no image_token_id in its config; "
                "choose a model whose images become tokens of its decoder's sequence"
            )
        if decoder_of(model) is None:
            raise ValueError(f"{self.name} has no plain stack of layers; choose a decoder-only language model")
        if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_processor")):
            raise ValueError(
                f"{type(processor).__name__} does not process both text and images; load the processor of "
                f"{self.name} with AutoProcessor"
            )
        written = processor.tokenizer.convert_tokens_to_ids(str(processor.image_token))
        if written != token and model.config.model_type in LAYOUTS:  # `layout_of` looks what others write
            raise ValueError(
                f"the processor does not fit {self.name}: it writes images as token {written}, the "
                f"model reads them as token {token}; load both from the same checkpoint"
            )

    def copies(self, count: int) -> list[LMM]:
        """Return this model `count` times, each with another processor: a tokenizer serves one thread at a time."""
        made = [copy.copy(self) for _ in range(count)]
        for each in made:
            each.processor, each.layout = copy.deepcopy((self.processor, self.layout))  # both use the tokenizer
            each.tokenizer = each.processor.tokenizer
        return made

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        return self.model.device

    def device_of(self, layer: Hookpoint) -> torch.device:
        """Return the device of a hookpoint's states; a large model may lie on several devices."""
        if plain(layer) == "projector":
            layer = 0  # the decoder's input
        return next(self.layer(layer).parameters()).device

    def width_at(self, layer: Hookpoint) -> int:
        """Return the width of a hookpoint's states.

        Raises:
            ValueError: it does not exist, or its states belong to no tokens.
        """
        require(self.model, layer, self.name)
        if not str(layer).startswith("vision"):
            return self.width
        if layer not in self._widths:
            prompt = self.prompt("", Image.new("RGB", (256, 256)))
            self._widths[layer] = self.hidden_states(prompt, layer).shape[-1]
        return self._widths[layer]

    @property
    def decoder(self) -> nn.Module:
        """The stack of decoder layers that the tokens of text and images go through."""
        return decoder_of(self.model)

    @property
    def n_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.decoder.layers)

    @property
    def width(self) -> int:
        """The width of a hidden state."""
        return self.model.config.get_text_config().hidden_size

    @cached_property
    def grid(self) -> Grid | None:
        """Rows and columns of an image's base patches; None without patches, or if it depends on the image."""
        shapes = (256, 256), (512, 256)
        grids = {self.prompt("", Image.new("RGB", shape)).spans[0].grid for shape in shapes}
        return grids.pop() if len(grids) == 1 else None

    def layer(self, index: Hookpoint) -> nn.Module:
        """Return a decoder layer, or the module whose output another hookpoint is.

        index: 0-based, the paper's 25th layer is 24; or a name, such as "decoder.24.mlp", as in `hookpoints`.

        Raises:
            ValueError: it does not exist, the message lists the hookpoints; or it is the projector, which is no module.
        """
        require(self.model, index, self.name)
        if (module := module_of(self.model, index)) is None:
            raise ValueError(f"{index} is no module of {self.name}, but what enters its decoder; use hidden_states")
        return module

    def fingerprint(self, layer: Hookpoint) -> str:
        """Return the model's class and a hash of the weights of this layer or other hookpoint, rounded to bfloat16.

        So the model has one fingerprint in float32 and in bfloat16. In float16 it may have another.
        """
        layer = plain(layer)
        if layer not in self._fingerprints:  # the weights are frozen
            require(self.model, layer, self.name)
            weights = hash_of(tensor.bfloat16().float() for tensor in weights_of(self.model, layer))
            self._fingerprints[layer] = f"{type(self.model).__name__} {weights}"
        return self._fingerprints[layer]

    def prompt(
        self,
        texts: str | list[str],
        images: Picture | list[Picture | None] | None = None,
        *,
        answers: str | list[str] | None = None,
    ) -> Prompt:
        """Put each image and text into a user's turn of the chat template, and make a batch.

        texts: "" for an image without text.
        images: one for each text, or a call that opens it; None for a text without an image.
        answers: with them the assistant's turns follow, as in supervised fine-tuning; without them the template's
            generation prompt comes last.

        Raises:
            ValueError: numbers differ, an image is not of PIL or has no pixels, there is no chat template, or the
                processor does not fit the model.
            UnreadableImage: an image cannot be opened, or the processor refuses it; `position` is its place.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        answers = [answers] if isinstance(answers, str) else answers
        if not isinstance(images, list | tuple):
            images = [None] * len(texts) if images is None else [images]
        if not texts or len(images) != len(texts) or len(answers or texts) != len(texts):
            counts = f"{len(texts)} texts, {len(images)} images, {len(answers or [])} answers"
            raise ValueError(f"{counts}: give each text one image or None, and each or none an answer")
        return self.conversations(
            [exchange(*each) for each in zip(texts, images, answers or [None] * len(texts), strict=True)],
            [[] if image is None else [image] for image in images],
        )

    def conversations(self, conversations: Sequence[Turns], images: Sequence[Sequence[Picture]]) -> Prompt:
        """Write whole conversations with the chat template, and make a batch; all answers are marked.

        conversations: turns of `user`, `assistant` and at most one first `system`, as transformers' chat templates
            take them. If the last turn is the user's, the generation prompt comes last.
        images: of each conversation, in the order in which its turns name them, or calls that open them.

        Raises:
            ValueError: numbers differ, the template does not write a whole conversation, or as `prompt`.
            UnreadableImage: as `prompt`.
        """
        for number, (turns, of_sample) in enumerate(zip(conversations, images, strict=True)):
            named = sum(part["type"] == "image" for turn in turns for part in turn["content"])
            if named != len(of_sample):
                raise ValueError(f"conversation {number} names {named} images, {len(of_sample)} are given; give each")
        if len({turns[-1]["role"] == "assistant" for turns in conversations}) != 1:
            raise ValueError("some conversations end with an answer and some with a question; make two batches")
        make = PromptMaker(self.model, self.processor, self.name, self.layout, self.image_size)
        return make(conversations, images)

    @torch.no_grad()
    def hidden_states(
        self, prompt: Prompt, layers: Hookpoint | list[Hookpoint], *, base_only: bool = False
    ) -> Hidden | dict[Hookpoint, Hidden]:
        """Return the output of one layer, 0-based, or of several by number; other hookpoints go by name.

        The forward pass stops after the highest of these layers.

        base_only: compute no more than the base tokens need. The sequence is cut behind the last of them, because
            attention looks back only, and the vision tower does not see tiles if they come behind the base tokens. The
            states of other tokens mean nothing then.

        Raises:
            ValueError: a layer does not exist, or none is given.
        """
        wanted = [layers] if isinstance(layers, Hookpoint) else list(layers)
        if not wanted:
            raise ValueError("no layer was given; give at least one")
        for each in wanted:
            require(self.model, each, self.name)
        *earlier, last = in_order(wanted)
        with ExitStack() as reads:
            if any(parsed(each).part == "vision" for each in wanted):
                reads.enter_context(self.each_crop_alone())
            if base_only and bool((base := prompt.mask("base")).any()):
                reads.enter_context(hooks.truncate(self.decoder, 1 + int(base.any(0).nonzero().max())))
            captured = {index: reads.enter_context(self.reading(index)) for index in earlier}
            with self.reading(last, end=True) as captured[last]:
                self.run(prompt, needed=whole_images(self.model, prompt.inputs) if base_only else None)
        states = {each: self.of_tokens(each, captured[plain(each)].value, prompt) for each in wanted}
        return states[layers] if isinstance(layers, Hookpoint) else states

    def reading(self, layer: Hookpoint, *, end: bool = False) -> AbstractContextManager[hooks.Captured]:
        """Yield a `Captured` that holds what a hookpoint has in the latest forward pass; see `of_tokens`.

        end: end the forward pass there, and with it the body of the `with`.
        """
        if layer == "projector":
            return hooks.read_embeddings(self.decoder, end=end)
        return hooks.stop(self.layer(layer)) if end else hooks.read(self.layer(layer))

    def of_tokens(self, layer: Hookpoint, captured: Tensor | None, prompt: Prompt) -> Hidden:
        """Return what `reading` captured as (batch, tokens, width): the states of patches stand at their tokens.

        captured: None for a prompt without an image, at a layer of the vision tower; its states are zeros.
        """
        if parsed(layer).part != "vision":
            return captured
        if captured is None:
            shape = prompt.inputs["input_ids"].shape
            return torch.zeros(*shape, self.width_at(layer), dtype=self.model.dtype, device=self.device_of(layer))
        return at_tokens(self.model, prompt, captured, layer)

    @contextmanager
    def each_crop_alone(self) -> Iterator[None]:
        """Let the vision tower see equal crops apart, so that its states are those of all crops."""
        before, self._every_crop = self._every_crop, True
        try:
            yield
        finally:
            self._every_crop = before

    @contextmanager
    def _with_crops_of(self, prompt: Prompt, needed: Bool[Tensor, " crops"] | None = None) -> Iterator[None]:
        """Run the vision tower no more than necessary, and know which prompt runs, inside the `with`."""
        before, self._running = self._running, prompt
        try:
            with nullcontext() if self._every_crop else fewer_crops(self.model, needed):
                yield
        finally:
            self._running = before

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in float32 inside the `with`: 16-bit weights are cast, and cast back afterwards without a loss.

        The logits of a 16-bit model are too coarse for the effect of a single latent: those near 20 are multiples of
        0.125 in bfloat16.
        """
        dtype = self.model.dtype
        if dtype == torch.float32:
            yield
            return
        fine = [
            (module, name, tensor)
            for module in self.model.modules()
            for name, tensor in module.named_buffers(recurse=False)
            if tensor.dtype == torch.float32
        ]
        self.model.float()
        try:
            yield
        finally:
            self.model.to(dtype)
            for module, name, tensor in fine:  # a 16-bit model has some float32 buffers, such as frequencies
                setattr(module, name, tensor)

    def run(self, prompt: Prompt, *, needed: Bool[Tensor, " crops"] | None = None, **settings) -> ModelOutput:
        """Return the model's output for a prompt, under what is spliced in; equal crops go through its eye once.

        needed: as for `fewer_crops`.
        settings: for the model's `forward`.
        """
        with self._with_crops_of(prompt, needed):
            inputs = BatchFeature(dict(prompt.inputs)).to(self.model.dtype)
            return self.model(**inputs, use_cache=False, **settings)

    def head(self, decoded: Float[Tensor, "*any width"]) -> Float[Tensor, "*any vocab"]:
        """Return next-token logits, in float32, for outputs of the decoder."""
        return self.model.get_output_embeddings()(decoded).float()

    def spliced(self, layer: Hookpoint, fn: Callable[[Hidden], Hidden]) -> AbstractContextManager[None]:
        """Replace the output of this layer, or other hookpoint, by `fn` of it in every forward pass inside the `with`
        (eq. 6).

        Under `generate`, fn first gets the whole prompt and then one token a step: (batch, 1, width). At a layer of the
        vision tower it gets the prompt only, and what it returns for other tokens than `base` is left out. At the
        projector it gets the embeddings of text, too.
        """
        require(self.model, layer, self.name)
        if layer == "projector":
            return hooks.rewrite_embeddings(self.decoder, fn)
        if parsed(layer).part == "vision":
            return self._spliced_eye(layer, fn)
        return hooks.rewrite(self.layer(layer), fn)

    @contextmanager
    def _spliced_eye(self, layer: str, fn: Callable[[Hidden], Hidden]) -> Iterator[None]:
        def rewrite(patches: Tensor) -> Tensor:
            if self._running is None:
                raise ValueError(f"{layer} is rewritten for a prompt; run the model by run, logits or generate")
            prompt = self._running
            new = fn(at_tokens(self.model, prompt, patches, layer))
            return at_patches(self.model, prompt, patches, new, layer)

        with self.each_crop_alone(), hooks.rewrite(self.layer(layer), rewrite, first=True):
            yield

    def logits(self, prompt: Prompt) -> Float[Tensor, "batch tokens vocab"]:
        """Return next-token logits after each token, in float32; differentiable in what is spliced in."""
        return self.run(prompt).logits.float()

    def last_logits(self, prompt: Prompt) -> Float[Tensor, "batch vocab"]:
        """Return next-token logits after the last token, in float32; differentiable in what is spliced in."""
        accepted = inspect.signature(self.model.forward).parameters
        kept = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        return self.run(prompt, **kept).logits[:, -1].float()

    def cross_entropy(self, prompt: Prompt, decoded: Hidden | None = None) -> Float[Tensor, " batch"]:
        """Return each sample's mean cross-entropy over its answer's tokens, in nats.

        decoded: the decoder's output, if it is known, as `UpperLayers.run` returns it.

        Raises:
            ValueError: the prompt has no answers.
        """
        if prompt.answer_mask is None:
            raise ValueError("this prompt has no answers; make it with prompt(texts, images, answers=...)")
        answers = prompt.answer_mask[:, 1:]  # a token is predicted by the token before it
        if decoded is None:
            logits = self.run(prompt).logits[:, :-1][answers].float()
        else:
            logits = self.head(decoded[:, :-1][answers])
        tokens = prompt.inputs["input_ids"][:, 1:][answers]
        losses = F.cross_entropy(logits, tokens.to(logits.device), reduction="none")
        return torch.stack([sample.mean() for sample in losses.split(answers.sum(1).tolist())])

    def generate(self, prompt: Prompt, max_new_tokens: int = 64, **generation_kwargs) -> list[str]:
        """Return each prompt's answer.

        max_new_tokens: after so many tokens an answer is cut.
        generation_kwargs: for transformers' `generate`; by default greedy, with a key-value cache.
        """
        settings = {"do_sample": False, "num_beams": 1, "use_cache": True} | generation_kwargs
        with self._with_crops_of(prompt):
            tokens = self.model.generate(**prompt.inputs, max_new_tokens=max_new_tokens, **settings)
        new = tokens[:, prompt.inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


def why_not(model: PreTrainedModel) -> str | None:
    """Say why a model's images do not become tokens of a decoder-only language model; None if they may."""
    configs = model.config, model.config.get_text_config(decoder=True)
    if any(getattr(config, "is_encoder_decoder", False) for config in configs):
        return (
            "has an encoder and a decoder: image and question go through the encoder, so the decoder's sequence has no "
            "tokens of them; choose a decoder-only model"
        )
    if any("crossattention" in type(module).__name__.lower() for module in model.get_decoder().modules()):
        return (
            "reads images by cross-attention: they never become tokens of its decoder's sequence, so an SAE there sees "
            "no patches; choose a model whose images become tokens"
        )
    return None
