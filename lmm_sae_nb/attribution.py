"""Section 2.4: what each latent at each token contributes to a decision: exactly, linearly, by integrated gradients.

The sign lives here and nowhere else: influence I = d(without) - d(with), the paper's; attribution = -I, so that what is
positive supports the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from lmm_sae_nb.artifacts import open_tensors, save_tensors
from lmm_sae_nb.lmm import LMM, Prompt
from lmm_sae_nb.sae import Latents, TopKSAE
from lmm_sae_nb.train import KINDS


@dataclass(frozen=True)
class Decision:
    """One prompt, and the two next tokens between which the model decides: v_c, and the baseline v_b."""

    prompt: Prompt
    answer: int  # token id
    baseline: int


class Attribution(NamedTuple):
    """-I of every active latent at every token of one prompt, in logits, with the parts that are no latent.

    `parts_sum` is what the attributions, `error` and `bias` of a method add up to: see `linear` and `integrated`.
    """

    latents: Latents  # (tokens, k) of the clean run; activations 0 at tokens where the SAE is not spliced in
    values: Float[Tensor, "tokens k"]
    error: Float[Tensor, " tokens"]  # of what the SAE leaves unexplained
    bias: Float[Tensor, " tokens"]  # of b_dec
    clean: float  # d of the clean run

    def of_tokens(self) -> Float[Tensor, " tokens"]:
        """The sum over each token's latents."""
        return self.values.sum(-1)

    def of_latents(self, tokens: Bool[Tensor, " tokens"] | None = None) -> tuple[Int64[Tensor, " n"], Tensor]:
        """The latents that are active at these tokens (default: all) and the sum of each over them, highest first."""
        active = self.latents.acts > 0
        active = active if tokens is None else active & tokens[:, None]
        latents, place = self.latents.indices[active].unique(return_inverse=True)
        totals = torch.zeros(len(latents)).index_add(0, place, self.values[active])
        order = totals.argsort(descending=True, stable=True)
        return latents[order], totals[order]

    def map_of(self, latent: int) -> Float[Tensor, " tokens"]:
        """One latent's attribution at every token."""
        return torch.where(self.latents.indices == latent, self.values, 0.0).sum(-1)


# ---- the decision ---------------------------------------------------------------------------------------------


def decision(lmm: LMM, text: str, image: Image.Image | None, answer: str, baseline: str) -> Decision:
    """The choice between two answers' tokens as the first token after the prompt.

    ValueError, showing the pieces, for an answer that is not one token of the model's, or two that are the same.
    """
    ids = [_single_token(lmm, word) for word in (answer, baseline)]
    if ids[0] == ids[1]:
        raise ValueError(f"{answer!r} and {baseline!r} are the same token; give two different answers")
    return Decision(lmm.prompt(text, image), *ids)


def _single_token(lmm: LMM, word: str) -> int:
    ids = lmm.tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == lmm.tokenizer.unk_token_id:
        pieces = lmm.tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(f"{word!r} is not one token of {lmm.name}, but {pieces}; give a word that is (mind its case)")
    return ids[0]


def difference(lmm: LMM, choice: Decision) -> Float[Tensor, " batch"]:
    """d = u[v_c] - u[v_b] after the prompt, under whatever is spliced in."""
    logits = lmm.last_logits(choice.prompt)
    return logits[:, choice.answer] - logits[:, choice.baseline]


# ---- the run with the SAE in ----------------------------------------------------------------------------------


class _Parts(NamedTuple):
    """The layer's output taken apart: x = W_dec^T z + b_dec + error at the tokens where the SAE is spliced in."""

    mask: Bool[Tensor, " tokens"]
    x: Float[Tensor, "tokens width"]  # of the masked tokens
    latents: Latents
    error: Float[Tensor, "tokens width"]  # 0 where it is dropped


@torch.no_grad()
def _taken_apart(lmm: LMM, sae: TopKSAE, layer: int, choice: Decision, spliced: Sequence[str], keep_error: bool):
    sae.require_width(lmm.width)
    mask = choice.prompt.mask(*spliced)[0].to(lmm.device)
    x = lmm.hidden_states(choice.prompt, layer)[0, mask].float()
    latents = sae.encode(x)
    error = x - sae.decode(latents)
    return _Parts(mask, x, latents, error if keep_error else torch.zeros_like(error))


def _replaced(lmm: LMM, layer: int, mask: Tensor, states: Float[Tensor, "*versions tokens width"]):
    """Run with these states at the masked tokens; several versions of them run side by side."""

    def put(hidden: Tensor) -> Tensor:
        versions = states.reshape(-1, *states.shape[-2:]).to(hidden.dtype)
        return hidden.expand(len(versions), -1, -1).masked_scatter(mask[None, :, None], versions)

    return lmm.spliced(layer, put)


def _slope(lmm: LMM, layer: int, choice: Decision, mask: Tensor, states: Tensor) -> tuple[Tensor, float]:
    """The gradient of d in the layer's spliced states, and d: one forward, one backward."""
    states = states.detach().requires_grad_()
    with torch.enable_grad(), _replaced(lmm, layer, mask, states):
        d = difference(lmm, choice)[0]
        (gradient,) = torch.autograd.grad(d, states)
    return gradient, float(d.detach())


def _rows_dot(gradient: Float[Tensor, "tokens width"], sae: TopKSAE, indices: Int64[Tensor, "tokens k"]) -> Tensor:
    """(tokens, k): the gradient in each active latent, dd/dz_ij = <dd/dx_i, W_dec[j]>, a block of tokens at a time."""
    block = max(1, 2**24 // (indices.shape[1] * sae.width))
    pairs = zip(gradient.split(block), indices.split(block), strict=True)
    return torch.cat([torch.einsum("tw,tkw->tk", slope, sae.W_dec[own]) for slope, own in pairs])


def _whole(parts: _Parts, sae: TopKSAE, values: Tensor, error: Tensor, bias: Tensor, clean: float) -> Attribution:
    """Spread the masked tokens' numbers over the whole sequence."""
    tokens = len(parts.mask)

    def spread(part: Tensor) -> Tensor:
        out = part.new_zeros(tokens, *part.shape[1:])
        out[parts.mask] = part
        return out.cpu()

    latents = Latents(*map(spread, parts.latents))
    return Attribution(latents, spread(values), spread(error), spread(bias), clean)


# ---- the methods ----------------------------------------------------------------------------------------------


def linear(
    lmm: LMM,
    sae: TopKSAE,
    layer: int,
    choice: Decision,
    *,
    keep_error: bool = True,
    spliced: Sequence[str] = KINDS,
) -> Attribution:
    """The paper's linear approximation for all pairs at once: one forward, one backward, I = (dd/dz) (0 - z).

    The clean run has the SAE spliced in; keep_error leaves in what the SAE does not explain, as a term of its own
    (the paper drops it). At each token latents, error and bias sum to <dd/dx, x>. Departure: a silenced latent leaves
    its place empty; under eq. 5 the next one would take it, which is no doing of this latent.
    """
    with torch.no_grad():
        parts = _taken_apart(lmm, sae, layer, choice, spliced, keep_error)
        states = sae.decode(parts.latents) + parts.error
    slope, clean = _slope(lmm, layer, choice, parts.mask, states)
    with torch.no_grad():
        values = parts.latents.acts * _rows_dot(slope, sae, parts.latents.indices)
        return _whole(parts, sae, values, (slope * parts.error).sum(-1), slope @ sae.b_dec, clean)


def integrated(
    lmm: LMM,
    sae: TopKSAE,
    layer: int,
    choice: Decision,
    *,
    steps: int = 10,
    keep_error: bool = True,
    spliced: Sequence[str] = KINDS,
) -> Attribution:
    """Integrated gradients from no latents and no error (x_hat = b_dec) to the clean run, by the midpoint rule.

    In the limit of many steps latents and error sum to d(clean) - d(b_dec alone); bias is 0, as it does not change.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps of integration; give at least 1")
    with torch.no_grad():
        parts = _taken_apart(lmm, sae, layer, choice, spliced, keep_error)
        way = sae.decode(parts.latents) - sae.b_dec + parts.error
    slope = torch.zeros_like(way)
    for step in range(steps):
        slope += _slope(lmm, layer, choice, parts.mask, sae.b_dec + way * (step + 0.5) / steps)[0] / steps
    with torch.no_grad(), _replaced(lmm, layer, parts.mask, sae.b_dec + way):
        clean = float(difference(lmm, choice)[0])
        values = parts.latents.acts * _rows_dot(slope, sae, parts.latents.indices)
        return _whole(parts, sae, values, (slope * parts.error).sum(-1), torch.zeros_like(slope[:, 0]), clean)


@torch.no_grad()
def exact(
    lmm: LMM,
    sae: TopKSAE,
    layer: int,
    choice: Decision,
    pairs: Bool[Tensor, "tokens k"] | None = None,
    *,
    keep_error: bool = True,
    spliced: Sequence[str] = KINDS,
    batch: int = 64,
    store: str | Path | None = None,
) -> Float[Tensor, "tokens k"]:
    """-I by definition: silence one latent at one token, run, compare; NaN where it was not asked for.

    pairs: which of the clean run's latents, laid out as in `Attribution.latents`; by default all that are active.
    Layers up to `layer` run once for each batch of versions. store: a file that keeps what is done, so that a run cut
    short goes on; ValueError if it is of another decision, model or SAE.
    """
    parts = _taken_apart(lmm, sae, layer, choice, spliced, keep_error)
    states = sae.decode(parts.latents) + parts.error
    with _replaced(lmm, layer, parts.mask, states):
        clean = float(difference(lmm, choice)[0])
    wanted = parts.latents.acts > 0
    if pairs is not None:
        wanted &= pairs.to(wanted.device)[parts.mask]
    values = _known(store, parts)
    todo = (wanted & values.isnan()).nonzero()
    for rows in tqdm(todo.split(batch), desc="ablating", mininterval=2, disable=len(todo) <= batch):
        token, slot = rows.unbind(1)
        versions = states.repeat(len(rows), 1, 1)
        gone = parts.latents.acts[token, slot, None] * sae.W_dec[parts.latents.indices[token, slot]]
        versions[torch.arange(len(rows), device=gone.device), token] -= gone
        with _replaced(lmm, layer, parts.mask, versions):
            values[token, slot] = clean - difference(lmm, choice)
        if store is not None:
            save_tensors(store, {"values": values, "indices": parts.latents.indices, "acts": parts.latents.acts})
    out = torch.full((len(parts.mask), values.shape[1]), float("nan"))
    out[parts.mask.cpu()] = torch.where(wanted, values, float("nan")).cpu()
    return out


def _known(store: str | Path | None, parts: _Parts) -> Float[Tensor, "tokens k"]:
    """What an earlier run left in the file, or nothing yet."""
    nothing = torch.full_like(parts.latents.acts, float("nan"))
    if store is None or not Path(store).is_file():
        return nothing
    file = open_tensors(store)
    same = all(torch.equal(file.get_tensor(name), getattr(parts.latents, name).cpu()) for name in ("indices", "acts"))
    if not same:
        raise ValueError(f"{store} holds the ablations of another decision, model or SAE; give another file")
    return file.get_tensor("values").to(nothing)
