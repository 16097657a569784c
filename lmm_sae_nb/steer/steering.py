"""Set latents to chosen values while the model runs (section 2.3, equations 3 to 6)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image
from torch import Tensor

from lmm_sae_nb.model.hookpoints import kinds_at
from lmm_sae_nb.model.prompts import Prompt
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.sae.activation import Activation, Latents
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import SAE
from lmm_sae_nb.support.progress import progress_bar

MODES = ("clamp", "add", "scale")
PHASES = ("prompt", "generated")


@dataclass(frozen=True)
class Edit:
    """Change one latent z_j before TopK, or before the SAE's own activation.

    latent: j.
    value: finite; below 0 only with the mode "add".
    mode: "clamp" sets z_j to `value` (equation 4), "add" adds it, "scale" multiplies by it. A sum below 0 becomes 0, as
        after ReLU.

    Raises:
        ValueError: the value or the mode is not allowed.
    """

    latent: int
    value: float
    mode: str = "clamp"

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"there is no mode {self.mode!r} of steering; choose one of {', '.join(MODES)}")
        if not math.isfinite(self.value):
            raise ValueError(f"latent {self.latent} cannot be steered by {self.value}; give a finite value")
        if self.value < 0 and self.mode != "add":
            raise ValueError(
                f"{self.mode} by {self.value}: activations are never below 0; give 0 to silence latent {self.latent}"
            )

    def apply(self, acts: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
        """Return the latent's new activations."""
        if self.mode == "clamp":
            return torch.full_like(acts, self.value)
        return (acts + self.value).clamp_min(0) if self.mode == "add" else acts * self.value


@dataclass(frozen=True)
class Scope:
    """Choose the tokens that are steered, the set C of equation 4.

    The paper steers all tokens; its code steers only those of the prompt.

    kinds: of tokens; generated tokens are of kind "text".
    phases: "prompt", "generated" or both.
    positions: in the prompt, counted from its first token without the padding; None stands for all.

    Raises:
        ValueError: there is no phase, or an unknown one.
    """

    kinds: tuple[str, ...] = SAE_KINDS
    phases: tuple[str, ...] = PHASES
    positions: tuple[int, ...] | None = None

    def __post_init__(self):
        if not self.phases or set(self.phases) - set(PHASES):
            raise ValueError(f"phases are {self.phases}; choose from {', '.join(PHASES)}, at least one")

    def of_prompt(self, prompt: Prompt) -> Bool[Tensor, "batch tokens"]:
        """Return which tokens of the prompt are steered.

        Raises:
            ValueError: a sample does not have one of the positions.
        """
        mask = prompt.mask(*self.kinds)
        if "prompt" not in self.phases:
            return torch.zeros_like(mask)
        if self.positions is None:
            return mask
        chosen = torch.zeros_like(mask)
        for row, pad in zip(chosen, prompt.mask("pad"), strict=True):
            first, length = int(pad.sum()), len(row) - int(pad.sum())
            if wrong := [p for p in self.positions if not 0 <= p < length]:
                raise ValueError(f"no positions {wrong}: the prompt has tokens 0 to {length - 1}")
            row[first + torch.tensor(self.positions, dtype=torch.long)] = True
        return mask & chosen

    @property
    def of_generated(self) -> bool:
        """Whether generated tokens are steered."""
        return "generated" in self.phases and "text" in self.kinds


Setting = Sequence[Edit]  # all edits of one sample


# ---- equations 3 to 6 ----------------------------------------------------------------------------------------------


def steer_latents(
    sae: SAE, x: Float[Tensor, "tokens width"], edits: Sequence[Edit], highest: Latents | None = None
) -> Latents:
    """Edit latents and apply TopK again (equations 3 to 5), so that an edited latent counts only among the k highest.

    This is exact without the dense z. At most n edited latents are among the k + n highest, so these contain the k
    highest of the others. In an SAE with thresholds, an edited latent counts only above its threshold.

    edits: n of them, of different latents.
    highest: the k + n or more highest latents of each token, if they are known already.

    Raises:
        ValueError: the SAE does not have a latent, or a latent has two edits.
    """
    numbers = [edit.latent for edit in edits]
    if wrong := [n for n in numbers if not 0 <= n < sae.n_latents]:
        raise ValueError(f"no latents {wrong}: the SAE has latents 0 to {sae.n_latents - 1}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"latents {sorted(numbers)} are edited more than once; give one edit for each")
    others = _highest(sae, x, len(edits)) if highest is None else highest
    edited = torch.tensor(numbers, device=x.device)
    rows, bias = sae.W_enc[edited], sae.b_enc[edited]
    before = ((x.to(rows.dtype) - sae.b_dec) @ rows.T + bias).relu()
    new = torch.stack([edit.apply(acts) for edit, acts in zip(edits, before.unbind(-1), strict=True)], -1)
    return set_latents(others, edited, new, sae.activation)


def set_latents(
    highest: Latents, latents: Int64[Tensor, " n"], acts: Float[Tensor, "tokens n"], activation: Activation
) -> Latents:
    """Set n latents to new activations and apply the activation again (equations 4 and 5); differentiable in `acts`.

    highest: the k + n or more highest latents of each token, as they were.
    latents: numbers of the latents to set, each once.
    acts: at least 0.
    activation: of the SAE.
    """
    others = torch.where(torch.isin(highest.indices, latents), -1.0, highest.acts)  # below every activation
    indices = torch.cat([latents.expand(len(acts), -1), highest.indices], -1)
    return activation.choose(Latents(torch.cat([acts, others], -1), indices))


def _highest(sae: SAE, x: Float[Tensor, "tokens width"], edits: int) -> Latents:
    """Return so many latents of each token that k are left without the edited ones."""
    return sae.encode(x, k=min(sae.k + edits, sae.n_latents))


def steered_states(
    sae: SAE,
    x: Float[Tensor, "tokens width"],
    edits: Sequence[Edit],
    steered: Bool[Tensor, " tokens"],
    keep_error: bool,
) -> Float[Tensor, "tokens width"]:
    """Return the states that go into the next layer instead of x: x_hat of equation 6.

    x: output of the SAE's layer.
    steered: tokens that the edits apply to; the others get the plain reconstruction.
    keep_error: return x plus the change that the edits make in x_hat. A token without a change is then exactly x.
    """
    return steered_versions(sae, x, [edits], steered, keep_error)[0]


def steered_versions(
    sae: SAE,
    x: Float[Tensor, "tokens width"],
    settings: Sequence[Setting],
    steered: Bool[Tensor, " tokens"],
    keep_error: bool,
) -> Float[Tensor, "settings tokens width"]:
    """Return `steered_states` under each of several settings; the tokens are encoded once for all of them."""
    highest = _highest(sae, x, max(map(len, settings)))
    base = sae.decode(_in_order(sae.activation.choose(highest)))
    out = (x.to(base.dtype) if keep_error else base).repeat(len(settings), 1, 1)
    known = Latents(*(part[steered] for part in highest))
    for version, edits in zip(out, settings if bool(steered.any()) else (), strict=False):
        if edits:
            new = sae.decode(_in_order(steer_latents(sae, x[steered], edits, known)))
            version[steered] = x[steered] + (new - base[steered]) if keep_error else new
    return out.to(x.dtype)


def _in_order(latents: Latents) -> Latents:
    """Sort latents by index, so that the same latents add up to the same bits."""
    order = latents.indices.argsort(-1)
    return Latents(*(part.gather(-1, order) for part in latents))


# ---- the model, steered ---------------------------------------------------------------------------------------


def _settings(edits: Setting | Sequence[Setting], samples: int) -> list[tuple[Edit, ...]]:
    """Return one setting for each sample.

    edits: one setting for all samples, or one for each.

    Raises:
        ValueError: there are more or fewer settings than samples.
    """
    if all(isinstance(edit, Edit) for edit in edits):
        return [tuple(edits)] * samples
    if len(edits) != samples:
        raise ValueError(f"{len(edits)} settings for {samples} samples; give each sample its edits, or the same to all")
    return [tuple(setting) for setting in edits]


@contextmanager
def steered(
    place: SAEInPlace,
    prompt: Prompt,
    edits: Setting | Sequence[Setting] = (),
    scope: Scope = Scope(),  # noqa: B008  (frozen)
    *,
    keep_error: bool = False,
    spliced: Sequence[str] = SAE_KINDS,
) -> Iterator[None]:
    """Run the model on this prompt, or generate from it, with the SAE in the layer's place and latents edited.

    It works with a KV cache, in batches, greedy or sampled.

    prompt: the one that the model runs on inside the `with`.
    edits: one list for all samples of the batch, or a list for each. Without edits the SAE is only spliced in, which is
        the control.
    scope: the tokens that the edits apply to.
    keep_error: keep the part of the hidden states that the SAE leaves unexplained; the paper drops it.
    spliced: kinds of tokens that the SAE replaces, of those that have a state at the hookpoint.

    Raises:
        ValueError: there are more or fewer lists than samples, or the model runs on another batch inside the `with`.
    """
    lmm, sae, layer = place.lmm, place.sae, place.layer
    in_prompt, in_scope = place.mask(prompt, spliced), scope.of_prompt(prompt)
    has_text = "text" in spliced and "text" in kinds_at(layer)
    batch, length = in_prompt.shape
    settings = _settings(edits, batch)

    def rewrite(hidden: Float[Tensor, "batch tokens width"]) -> Tensor:
        if len(hidden) % batch or hidden.shape[1] not in (1, length):
            raise ValueError(
                f"steering was set up for {batch} x {length} tokens, the model runs on {tuple(hidden.shape[:2])}; "
                "use one `steered` for each prompt"
            )
        copies = len(hidden) // batch  # several answers of each prompt
        if hidden.shape[1] == length:
            mask, chosen = (part.to(hidden.device).repeat_interleave(copies, 0) for part in (in_prompt, in_scope))
        else:
            mask = torch.full(hidden.shape[:2], has_text, device=hidden.device)
            chosen = torch.full_like(mask, scope.of_generated)
        out = hidden.clone()
        for setting in dict.fromkeys(settings):
            rows = torch.tensor([s == setting for s in settings], device=mask.device).repeat_interleave(copies)
            tokens = mask & rows[:, None]
            out[tokens] = steered_states(sae, hidden[tokens], setting, chosen[tokens], keep_error).to(hidden.dtype)
        return out

    with lmm.spliced(layer, rewrite):
        yield


@torch.no_grad()
def answers(
    place: SAEInPlace,
    text: str,
    image: Image.Image | None,
    settings: Sequence[Setting],
    scope: Scope = Scope(),  # noqa: B008
    *,
    keep_error: bool = False,
    batch: int = 16,
    **generation,
) -> list[str]:
    """Return the answers to one question about one image, one for each setting.

    settings: each is a list of edits.
    batch: settings that run side by side.
    generation: for `LMM.generate`, such as `max_new_tokens`.
    """
    lmm, results = place.lmm, []
    for start in progress_bar(range(0, len(settings), batch), desc="steering", disable=len(settings) <= batch):
        together = settings[start : start + batch]
        prompt = lmm.prompt([text] * len(together), [image] * len(together))
        with steered(place, prompt, together, scope, keep_error=keep_error):
            results += lmm.generate(prompt, **generation)
    return results


class Comparison(NamedTuple):
    """The answers to the same prompts of the untouched model, with the SAE spliced in, and with latents edited."""

    untouched: list[str]
    spliced: list[str]
    steered: list[str]


@torch.no_grad()
def compare(
    place: SAEInPlace,
    texts: str | list[str],
    images: Image.Image | list[Image.Image | None] | None,
    edits: Sequence[Edit],
    scope: Scope = Scope(),  # noqa: B008
    *,
    keep_error: bool = False,
    seed: int | None = None,
    **generation,
) -> Comparison:
    """Answer the same prompts untouched, with the SAE spliced in, and with latents edited.

    seed: with it, sampling starts each time from the same random state.
    """
    lmm = place.lmm
    prompt = lmm.prompt(texts, images)
    answers = []
    for setting in (None, (), edits):
        run = nullcontext() if setting is None else steered(place, prompt, setting, scope, keep_error=keep_error)
        with run, torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            answers.append(lmm.generate(prompt, **generation))
    return Comparison(*answers)
