"""Run only what is above a hookpoint, from states that the caller gives (eq. 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import DynamicCache

from lmm_sae_nb.model import hooks
from lmm_sae_nb.model.decoder_arguments import differing_tokens, looks_back_only, narrowed, unknown
from lmm_sae_nb.model.hookpoints import Hookpoint, in_order, layers_below, parsed, plain
from lmm_sae_nb.model.hooks import Hidden
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.prompts import Prompt

# The decoder's output; a layer of the vision tower has another width.
Decoded = Float[Tensor, "versions tokens decoder_width"]

# Kinds of layers whose past is keys and values of tokens; linear attention sums its past up in one state.
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


class UpperLayers:
    """What a model computes above one hookpoint, for one prompt.

    Make it with `above`. No layer below the hookpoint runs again, whatever the states. For a layer's attention or MLP
    this layer runs again, on the input that it had.

    lmm: the model under study.
    prompt: the prompt that was run up to the hookpoint.
    layer: the hookpoint.
    hidden: its clean output, (batch, tokens, width).
    bare: whether decoder layers return their states as they are, not in a tuple.
    arguments: what the model calls its decoder with for this prompt.
    given: for a layer's attention or MLP, the layer's input; otherwise None.
    """

    def __init__(
        self, lmm: LMM, prompt: Prompt, layer: Hookpoint, hidden: Hidden, *, bare: bool, arguments: dict[str, Any],
        given: Hidden | None = None,
    ):  # fmt: skip
        self.lmm, self.prompt, self.layer, self.hidden = lmm, prompt, layer, hidden
        self._bare, self._arguments, self._given = bare, arguments, given
        self._sees = parsed(layer).part == "vision"  # then everything from there on runs again
        self._cache, self._samples, self._remembered = DynamicCache(), None, None

    def run(self, states: Float[Tensor, "versions tokens width"]) -> Decoded:
        """Return the decoder's output, after its last norm, with these states at the hookpoint.

        states: of the whole batch, or of a single sample in several versions side by side. Gradients flow into them.
        """
        return self._run(states, None)

    def run_alike(self, states: Float[Tensor, "versions tokens width"]) -> Decoded:
        """Do as `run` for states that begin alike; the tokens before the first difference run once. No gradients.

        states: of the whole batch, or of a single sample in several versions side by side.
        """
        differs = (states != states[:1]).any(-1).any(0)
        if (of_masks := differing_tokens(self._arguments.get("attention_mask"))) is not None:
            differs |= of_masks.to(differs.device)
        start = int(differs.int().argmax()) if bool(differs.any()) else len(differs)
        if not start or not self.continues(start):
            return self.run(states)
        like_first = torch.zeros(len(states), dtype=torch.long)
        decoded = self.remember(states[:1], like_first[:1]).repeat(len(states), 1, 1)
        if start < len(differs):
            decoded[1:, start:] = self.resume(states[1:, start:], start, like_first[1:])
        return decoded

    def remember(
        self, states: Float[Tensor, "batch tokens width"], samples: Int64[Tensor, " batch"] | None = None
    ) -> Decoded:
        """Do as `run`, and keep the keys and values of these states for `resume`.

        samples: for each of the states, which sample of a batch it is of; None for the whole batch or a single sample.
        """
        self._cache, self._samples, self._remembered = DynamicCache(), samples, states.detach()
        return self._run(states, self._cache if self.continues() else None, samples)

    def resume(
        self,
        states: Float[Tensor, "versions late width"],
        start: int,
        like: Int64[Tensor, " versions"] | None = None,
    ) -> Decoded:
        """Do as `run` for the tokens from `start` on; the earlier ones are those that `remember` saw.

        Attention is causal, so later tokens cannot change earlier ones. Where the layers cannot continue from a token
        in the middle, they run on all tokens, which takes longer.

        states: one or several versions of the states of the tokens from `start` on.
        start: position of the first of them; at 0 nothing is taken from `remember`.
        like: for each version, which of the remembered states it begins like; None for all in order, or a single one.
        """
        samples = self._samples if like is None else like if self._samples is None else self._samples[like]
        if start and not self.continues(start):
            early = self._remembered if like is None else self._remembered[like]
            whole = torch.cat([early[:, :start].expand(len(states), -1, -1), states.to(early.dtype)], 1)
            return self._run(whole, None, samples)[:, start:]
        return self._run(states, _first_tokens(self._cache, start, len(states), like) if start else None, samples)

    def _run(
        self, states: Hidden, cache: DynamicCache | None, samples: Int64[Tensor, " versions"] | None = None
    ) -> Decoded:
        decoder, called = self.lmm.decoder, self._arguments
        if self._sees or unknown(called):
            return self._run_whole(states, samples)
        start = called["inputs_embeds"].shape[1] - states.shape[1]
        if samples is None and len(states) != len(called["inputs_embeds"]):  # versions of the only sample
            samples = torch.zeros(len(states), dtype=torch.long)
        states = states.to(called["inputs_embeds"])
        given = {} if self._given is None else {"inputs_embeds": self._given}
        inputs = narrowed(called | given, slice(start, None), samples)
        inputs |= {"past_key_values": cache, "use_cache": cache is not None}
        layer = parsed(self.layer).layer
        if self._given is None:
            inputs["inputs_embeds"] = states
            with _skipped(decoder.layers[: layers_below(self.layer)], states, self._bare):
                return decoder(**inputs).last_hidden_state
        with ExitStack() as changes:
            changes.enter_context(_skipped(decoder.layers[:layer], None, self._bare))
            changes.enter_context(hooks.give(decoder.layers[layer], inputs["inputs_embeds"]))
            changes.enter_context(self.lmm.spliced(self.layer, lambda _: states))
            return decoder(**inputs).last_hidden_state

    def continues(self, start: int | None = None) -> bool:
        """Return whether the layers can continue from a token in the middle, with the keys and values of earlier ones.

        start: this token; None for any one.
        """
        called = self._arguments
        kinds = getattr(self.lmm.model.config.get_text_config(), "layer_types", None) or ()
        if self._sees or unknown(called) or any(kind not in ATTENTION for kind in kinds):
            return False
        return start is None or looks_back_only(called.get("attention_mask"), start)

    def _run_whole(self, states: Hidden, samples: Int64[Tensor, " versions"] | None = None) -> Decoded:
        """Run the whole decoder, or the vision tower as well, with the states spliced in, version by version."""

        def run(batch: Hidden) -> Decoded:
            with self.lmm.spliced(self.layer, lambda hidden: batch.to(hidden)):
                if not self._sees:
                    return self.lmm.decoder(**self._arguments | {"use_cache": False}).last_hidden_state
                with hooks.stop(self.lmm.decoder) as decoded:
                    self.lmm.run(self.prompt)
            return decoded.value

        size = len(self.prompt.spans)
        if samples is None and len(states) == size:  # one state for each sample, not versions of one sample
            return run(states)
        decoded = []
        for version, sample in zip(states, [0] * len(states) if samples is None else samples.tolist(), strict=True):
            batch = torch.stack([version if n == sample else self.hidden[n].to(version) for n in range(size)])
            decoded.append(run(batch)[sample])
        return torch.stack(decoded)


@torch.no_grad()
def above(lmm: LMM, prompt: Prompt, layer: Hookpoint) -> UpperLayers:
    """Run a prompt up to a hookpoint; return what is above it.

    lmm: the model under study.
    prompt: one sample or a batch.
    layer: 0-based, or another hookpoint.

    Raises:
        ValueError: the hookpoint does not exist.
    """
    return above_each(lmm, prompt, [layer])[plain(layer)]


@torch.no_grad()
def above_each(lmm: LMM, prompt: Prompt, layers: Sequence[Hookpoint]) -> dict[Hookpoint, UpperLayers]:
    """Run a prompt once, up to the highest of several hookpoints; return what is above each, by its plain form.

    Arguments and errors as `above`.
    """
    *earlier, last = in_order(layers)
    with ExitStack() as reads:
        arguments = reads.enter_context(hooks.record_arguments(lmm.decoder))
        if parsed(earlier[0] if earlier else last).part == "vision":
            reads.enter_context(lmm.each_crop_alone())
        first = reads.enter_context(hooks.read(lmm.layer(0)))
        inputs = {
            layer: reads.enter_context(hooks.read_input(lmm.layer(parsed(layer).layer)))
            for layer in (*earlier, last)
            if parsed(layer).inner
        }
        captured = {layer: reads.enter_context(lmm.reading(layer)) for layer in earlier}
        with lmm.reading(last, end=True) as captured[last]:
            lmm.run(prompt)
    return {
        layer: UpperLayers(
            lmm, prompt, layer, lmm.of_tokens(layer, one.value, prompt), bare=first.bare, arguments=arguments,
            given=inputs[layer].value if layer in inputs else None,
        )
        for layer, one in captured.items()
    }  # fmt: skip


def _first_tokens(
    cache: DynamicCache, start: int, versions: int, like: Int64[Tensor, " versions"] | None
) -> DynamicCache:
    """Return the keys and values of the first `start` tokens, once for each version of the tokens that follow.

    like: as for `UpperLayers.resume`.
    """
    kept = DynamicCache()
    for number, layer in enumerate(cache.layers):
        if layer.is_initialized:
            parts = (part[:, :, :start] for part in (layer.keys, layer.values))
            parts = [part.expand(versions, -1, -1, -1) if like is None else part[like] for part in parts]
        else:  # a layer that was skipped; the decoder asks its first layer how many tokens there were
            parts = (torch.zeros(1, 1, start, 1) for _ in range(2))
        kept.update(*parts, number)
    return kept


@contextmanager
def _skipped(layers: nn.ModuleList, hidden: Hidden | None, bare: bool) -> Iterator[None]:
    """Skip these layers: the last returns `hidden` unless it is None, the others return their input.

    They stay in their places, because a decoder decides by a layer's place whether it attends to a window only.
    """
    forwards = [layer.__dict__.get("forward") for layer in layers]  # accelerate puts its own function there

    def returning(value: Hidden | None) -> Callable:
        def forward(x, *args, **kwargs):
            output = x if value is None else value
            return output if bare else (output,)

        return forward

    try:
        for layer in layers:
            layer.forward = returning(hidden if layer is layers[-1] else None)
        yield
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward
