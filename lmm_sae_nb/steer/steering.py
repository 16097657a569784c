"""Section 2.3: set latents to chosen values while the model runs (eq. 3-6), with an explicit scope."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from lmm_sae_nb.model.prompts import Prompt
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import Latents, TopKSAE
from lmm_sae_nb.support.progress import progress_bar

MODES = ("clamp", "add", "scale")
PHASES = ("prompt", "generated")


@dataclass(frozen=True)
class Edit:
    """What happens to one latent z_j before TopK: clamp z_j = value (eq. 4), add z_j + value, scale z_j * value.

    Sums below 0 become 0, as ReLU would make them. ValueError for a value that is not finite, an unknown mode, or a
    clamp or factor below 0, which TopK after ReLU cannot tell from 0.
    """

    latent: int
    value: float
    mode: str = "clamp"

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"no way of steering is called {self.mode!r}; choose one of {', '.join(MODES)}")
        if not math.isfinite(self.value):
            raise ValueError(f"latent {self.latent} cannot be steered by {self.value}; give a finite value")
        if self.value < 0 and self.mode != "add":
            raise ValueError(
                f"{self.mode} by {self.value}: activations are never below 0; give 0 to silence latent {self.latent}"
            )

    def apply(self, acts: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
        """The latent's new activations."""
        if self.mode == "clamp":
            return torch.full_like(acts, self.value)
        return (acts + self.value).clamp_min(0) if self.mode == "add" else acts * self.value


@dataclass(frozen=True)
class Scope:
    """The tokens C of eq. 4 that are steered: of these kinds, in these phases, and of the prompt these positions.

    The paper steers all tokens; the reference code only the prompt's. Positions count from the prompt's first token
    (padding not counted); None is all of them. Generated tokens are of kind text.
    """

    kinds: tuple[str, ...] = SAE_KINDS
    phases: tuple[str, ...] = PHASES
    positions: tuple[int, ...] | None = None

    def __post_init__(self):
        if not self.phases or set(self.phases) - set(PHASES):
            raise ValueError(f"phases are {self.phases}; choose from {', '.join(PHASES)}, at least one")

    def of_prompt(self, prompt: Prompt) -> Bool[Tensor, "batch tokens"]:
        """The prompt's tokens in scope; ValueError for a position that a sample does not have."""
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
        return "generated" in self.phases and "text" in self.kinds


Setting = Sequence[Edit]  # what is done at once to one sample


# ---- eq. 3-6 --------------------------------------------------------------------------------------------------


def steer_latents(
    sae: TopKSAE, x: Float[Tensor, "tokens width"], edits: Sequence[Edit], highest: Latents | None = None
) -> Latents:
    """z_hat = TopK(z with the edits), eq. 3-5: k latents a token, of which an edited one must earn its place.

    Exact without the dense z: at most n edited latents leave the k + n highest, so the k highest of the others are
    among these. A token whose k-th latent is higher than the clamp keeps its latents. highest: the highest latents of
    each token, at least so many, where they are known. ValueError for a latent that the SAE does not have, or two edits
    of one latent.
    """
    numbers = [edit.latent for edit in edits]
    if wrong := [n for n in numbers if not 0 <= n < sae.n_latents]:
        raise ValueError(f"no latents {wrong}: the SAE has latents 0 to {sae.n_latents - 1}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"latents {sorted(numbers)} are edited more than once; give one edit for each")
    others = _highest(sae, x, len(edits)) if highest is None else highest
    edited = torch.tensor(numbers, device=x.device)
    rows, bias = sae.W_enc[edited], sae.b_enc[edited]
    own = ((x.to(rows.dtype) - sae.b_dec) @ rows.T + bias).relu()
    new = torch.stack([edit.apply(acts) for edit, acts in zip(edits, own.unbind(-1), strict=True)], -1)
    kept = torch.where(torch.isin(others.indices, edited), -1.0, others.acts)  # below every activation
    acts, indices = torch.cat([new, kept], -1), torch.cat([edited.expand(len(x), -1), others.indices], -1)
    return _top(Latents(acts, indices), sae.k)


def _highest(sae: TopKSAE, x: Float[Tensor, "tokens width"], edits: int) -> Latents:
    """So many latents of each token that k are left when `edits` of them are not to count."""
    return sae.encode(x, k=min(sae.k + edits, sae.n_latents))


def _top(latents: Latents, k: int) -> Latents:
    top = latents.acts.topk(k, dim=-1)
    return Latents(top.values, latents.indices.gather(-1, top.indices))


def steered_states(
    sae: TopKSAE,
    x: Float[Tensor, "tokens width"],
    edits: Sequence[Edit],
    steered: Bool[Tensor, " tokens"],
    keep_error: bool,
) -> Float[Tensor, "tokens width"]:
    """What goes into the next layer: x_hat of eq. 6; with `keep_error`, x and what the edits change in x_hat.

    Tokens that are not steered get the plain reconstruction, or with `keep_error` stay as they are. A token whose
    latents the edits do not change is, with `keep_error`, exactly x.
    """
    return steered_versions(sae, x, [edits], steered, keep_error)[0]


def steered_versions(
    sae: TopKSAE,
    x: Float[Tensor, "tokens width"],
    settings: Sequence[Setting],
    steered: Bool[Tensor, " tokens"],
    keep_error: bool,
) -> Float[Tensor, "settings tokens width"]:
    """`steered_states` under each of several settings; the tokens are encoded once for all."""
    highest = _highest(sae, x, max(map(len, settings)))
    base = sae.decode(_in_order(_top(highest, sae.k)))
    out = (x.to(base.dtype) if keep_error else base).repeat(len(settings), 1, 1)
    own = Latents(*(part[steered] for part in highest))
    for version, edits in zip(out, settings if bool(steered.any()) else (), strict=False):
        if edits:
            new = sae.decode(_in_order(steer_latents(sae, x[steered], edits, own)))
            version[steered] = x[steered] + (new - base[steered]) if keep_error else new
    return out.to(x.dtype)


def _in_order(latents: Latents) -> Latents:
    """Sorted by index, so that the same latents add up to the same bits."""
    order = latents.indices.argsort(-1)
    return Latents(*(part.gather(-1, order) for part in latents))


# ---- the model, steered ---------------------------------------------------------------------------------------


def _settings(edits: Setting | Sequence[Setting], samples: int) -> list[tuple[Edit, ...]]:
    """One setting for each sample: the same for all, or as many as there are. ValueError for another number."""
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

    edits: the same for every sample of the batch, or a list of edits for each. Without edits it is the control: the
    SAE spliced in and nothing else. `spliced`: the kinds of tokens that the SAE replaces at all, by default those it
    was trained on. keep_error: leave in what the SAE does not explain (the paper drops it). Works with a KV cache, in
    batches, greedy or sampled. ValueError as `SAEInPlace`, for another number of settings than samples, and inside
    the `with` for a batch that is not this prompt's.
    """
    lmm, sae, layer = place.lmm, place.sae, place.layer
    in_prompt, in_scope = prompt.mask(*spliced), scope.of_prompt(prompt)
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
            mask = torch.full(hidden.shape[:2], "text" in spliced, device=hidden.device)
            chosen = torch.full_like(mask, scope.of_generated)
        out = hidden.clone()
        for setting in dict.fromkeys(settings):
            own = torch.tensor([s == setting for s in settings], device=mask.device).repeat_interleave(copies)
            own = mask & own[:, None]
            out[own] = steered_states(sae, hidden[own], setting, chosen[own], keep_error).to(hidden.dtype)
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
    """The answer to one question about one image under each of many settings, `batch` of them side by side."""
    lmm = place.lmm
    said = []
    for start in progress_bar(range(0, len(settings), batch), desc="steering", disable=len(settings) <= batch):
        some = settings[start : start + batch]
        prompt = lmm.prompt([text] * len(some), [image] * len(some))
        with steered(place, prompt, some, scope, keep_error=keep_error):
            said += lmm.generate(prompt, **generation)
    return said


class Comparison(NamedTuple):
    """Answers to the same prompts: by the untouched model, with the SAE spliced in, and with latents edited too."""

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
    """Generate three times from the same prompts; with `seed`, each time from the same random state."""
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
