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

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.prompts import Prompt
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.model.upper_layers import UpperLayers, above
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import Latents, TopKSAE
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.tensor_files import open_tensors, save_tensors


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

    def of_kinds(self, prompt: Prompt, kinds: Sequence[str] = SAE_KINDS) -> list[dict[str, str | float]]:
        """Return, for each kind of token, the sums over its latents, over their error and over their bias.

        prompt: that was attributed.
        kinds: of tokens, a row each.
        """
        rows = []
        for kind in kinds:
            tokens = prompt.mask(kind)[0].cpu()
            parts = {"latents": self.of_tokens(), "error": self.error, "bias": self.bias}
            rows.append({"tokens": kind} | {name: float(part[tokens].sum()) for name, part in parts.items()})
        return rows

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


@torch.no_grad()
def greedy_decision(lmm: LMM, text: str, image: Image.Image | None) -> Decision:
    """Return the model's own choice: the first token of its answer against the runner-up.

    text: the question.
    image: that it is about, or None.
    """
    prompt = lmm.prompt(text, image)
    answer, baseline = lmm.last_logits(prompt)[0].topk(2).indices.tolist()
    return Decision(prompt, answer, baseline)


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

    upper: UpperLayers  # what runs on the states
    hidden: Float[Tensor, "1 tokens width"]  # the layer's output as it is
    mask: Bool[Tensor, " tokens"]
    latents: Latents
    error: Float[Tensor, "tokens width"]  # 0 where it is dropped
    states: Float[Tensor, "tokens width"]  # what goes into the next layer


@torch.no_grad()
def _clean_parts(place: SAEInPlace, choice: Decision, mask: Tensor, keep_error: bool) -> _Parts:
    lmm, sae, layer = place.lmm, place.sae, place.layer
    upper = above(lmm, choice.prompt, layer)
    x = upper.hidden[0, mask].float()
    latents = sae.encode(x)
    x_hat = sae.decode(latents)
    error = x - x_hat if keep_error else torch.zeros_like(x)
    return _Parts(upper, upper.hidden, mask, latents, error, x_hat + error)


def _put(mask: Tensor, states: Float[Tensor, "*versions tokens width"], hidden: Tensor) -> Tensor:
    """The hidden states with these at the masked tokens; several versions of them run side by side."""
    versions = states.reshape(-1, *states.shape[-2:]).to(hidden.dtype)
    return hidden.expand(len(versions), -1, -1).masked_scatter(mask[None, :, None], versions)


def _require_ready(place: SAEInPlace, choice: Decision, spliced: Sequence[str]) -> Tensor:
    """The mask of the tokens where the SAE is spliced in; ValueError for an SAE of another layer or model."""
    lmm = place.lmm
    mask = choice.prompt.mask(*spliced)
    if len(mask) != 1:
        raise ValueError(f"a decision is about one prompt, not {len(mask)}; make one Decision for each")
    return mask[0].to(lmm.device)


def _d(lmm: LMM, choice: Decision, decoded: Float[Tensor, "versions tokens width"]) -> Float[Tensor, " versions"]:
    """d after the last token, from what the decoder puts out."""
    logits = lmm.head(decoded[:, -1])
    return logits[:, choice.answer] - logits[:, choice.baseline]


def _slope(
    lmm: LMM, choice: Decision, parts: _Parts, states: Float[Tensor, "*versions tokens width"]
) -> tuple[Tensor, Float[Tensor, " versions"]]:
    """The gradients of d in versions of the layer's spliced states, side by side, and each version's d."""
    states = states.detach().requires_grad_()
    with torch.enable_grad():
        d = _d(lmm, choice, parts.upper.run(_put(parts.mask, states, parts.hidden)))
        return torch.autograd.grad(d.sum(), states)[0], d.detach()


class _Clean:
    """The clean run, kept so that what follows a token can be run again in many versions: attention looks back only,
    so that nothing before the token changes. Keys and values of the layers above `layer` are those of the spliced run.
    """

    def __init__(self, place: SAEInPlace, choice: Decision, mask: Tensor, keep_error: bool):
        self._lmm, self._choice = place.lmm, choice
        self.parts = parts = _clean_parts(place, choice, mask, keep_error)
        states = _put(mask, parts.states, parts.hidden)
        self.d = float(_d(place.lmm, choice, parts.upper.remember(states))[0])

    def wanted(self, pairs: Bool[Tensor, "tokens k"] | None) -> Bool[Tensor, "spliced k"]:
        """Which of the spliced tokens' latents are active and asked for."""
        active = self.parts.latents.acts > 0
        return active if pairs is None else active & pairs.to(active.device)[self.parts.mask]

    def versions(self, sae: TopKSAE, rows: Int64[Tensor, "pairs 2"]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """For (spliced token, slot) pairs in order: as many copies of the states from the first pair's token on, each
        pair's part z W_dec[j] of its token's state, and where in the copies that state is."""
        token, slot = rows.unbind(1)
        latents = self.parts.latents
        states = self.parts.states[token[0] :].repeat(len(rows), 1, 1)
        directions = latents.acts[token, slot, None] * sae.W_dec[latents.indices[token, slot]]
        return states, directions.detach(), (torch.arange(len(rows), device=token.device), token - token[0])

    def spread(self, values: Float[Tensor, "spliced k"]) -> Float[Tensor, "tokens k"]:
        """The spliced tokens' values over the whole sequence, NaN elsewhere."""
        out = torch.full((len(self.parts.mask), values.shape[1]), float("nan"))
        out[self.parts.mask.cpu()] = values.cpu()
        return out

    def again(self, first: int, versions: Float[Tensor, "versions tokens width"]) -> Float[Tensor, " versions"]:
        """d with these states at the spliced tokens from the `first` of them on."""
        start = int(self.parts.mask.nonzero()[first])
        states = _put(self.parts.mask[start:], versions, self.parts.hidden[:, start:])
        return _d(self._lmm, self._choice, self.parts.upper.resume(states, start))


def _rows_dot(gradient: Float[Tensor, "tokens width"], sae: TopKSAE, indices: Int64[Tensor, "tokens k"]) -> Tensor:
    """(tokens, k): the gradient in each active latent, dd/dz_ij = <dd/dx_i, W_dec[j]>, a block of tokens at a time."""
    block = max(1, 2**24 // (indices.shape[1] * sae.width))
    pairs = zip(gradient.split(block), indices.split(block), strict=True)
    return torch.cat([torch.einsum("tw,tkw->tk", slope, sae.W_dec[own]) for slope, own in pairs])


def _whole(parts: _Parts, values: Tensor, error: Tensor, bias: Tensor, clean: float) -> Attribution:
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
    place: SAEInPlace,
    choice: Decision,
    *,
    keep_error: bool = True,
    spliced: Sequence[str] = SAE_KINDS,
) -> Attribution:
    """The paper's linear approximation for all pairs at once: one forward, one backward, I = (dd/dz) (0 - z).

    The clean run has the SAE spliced in; keep_error leaves in what the SAE does not explain, as a term of its own
    (the paper drops it). At each token latents, error and bias sum to <dd/dx, x>. Departure: a silenced latent leaves
    its place empty; under eq. 5 the next one would take it, which is no doing of this latent.
    """
    sae = place.sae
    parts, slope, d = _gradient(place, choice, keep_error, spliced)
    with torch.no_grad():
        values = parts.latents.acts * _rows_dot(slope, sae, parts.latents.indices)
        return _whole(parts, values, (slope * parts.error).sum(-1), slope @ sae.b_dec, d)


def clamping(
    place: SAEInPlace,
    choice: Decision,
    values: Float[Tensor, " n_latents"],
    tokens: Bool[Tensor, " tokens"] | None = None,
    *,
    keep_error: bool = True,
    spliced: Sequence[str] = SAE_KINDS,
) -> Float[Tensor, " n_latents"]:
    """What clamping each latent to its value (eq. 4) at these tokens (default: all) would add to d, linearly.

    sum_i (value_j - z_ij) dd/dz_ij for all latents at once, silent ones too: one forward and one backward. It takes no
    account of the latents that TopK drops for the clamped one. ValueError for values that are not finite, or not one
    for each latent.
    """
    sae = place.sae
    if values.shape != (sae.n_latents,) or not bool(values.isfinite().all()):
        raise ValueError(
            f"values of shape {tuple(values.shape)}; give a finite one for each of {sae.n_latents} latents"
        )
    parts, slope, _ = _gradient(place, choice, keep_error, spliced)
    with torch.no_grad():
        chosen = torch.ones_like(parts.mask) if tokens is None else tokens.to(parts.mask.device)
        slope = slope * chosen[parts.mask, None]
        own = parts.latents.acts * _rows_dot(slope, sae, parts.latents.indices)
        total = values.to(slope) * (sae.W_dec @ slope.sum(0))
        return total.index_add(0, parts.latents.indices.flatten(), -own.flatten()).cpu()


def _gradient(
    place: SAEInPlace, choice: Decision, keep_error: bool, spliced: Sequence[str]
) -> tuple[_Parts, Float[Tensor, "tokens width"], float]:
    """The clean run, with the gradient of d in what it spliced in, and d: one forward and one backward."""
    mask = _require_ready(place, choice, spliced)
    parts = _clean_parts(place, choice, mask, keep_error)
    slope, d = _slope(place.lmm, choice, parts, parts.states)
    return parts, slope, float(d[0])


def integrated(
    place: SAEInPlace,
    choice: Decision,
    *,
    steps: int = 10,
    keep_error: bool = True,
    spliced: Sequence[str] = SAE_KINDS,
    batch: int = 5,
) -> Attribution:
    """Integrated gradients from no latents and no error (x_hat = b_dec) to the clean run, by the midpoint rule.

    In the limit of many steps latents and error sum to d(clean) - d(b_dec alone); bias is 0, as it does not change.
    batch: steps that run side by side.
    """
    lmm, sae = place.lmm, place.sae
    if min(steps, batch) < 1:
        raise ValueError(f"{steps} steps of integration, {batch} at a time; give at least 1 of each")
    mask = _require_ready(place, choice, spliced)
    parts = _clean_parts(place, choice, mask, keep_error)
    way = parts.states - sae.b_dec.detach()
    slope = torch.zeros_like(way)
    for some in ((torch.arange(steps, device=way.device) + 0.5) / steps).split(batch):
        slope += _slope(lmm, choice, parts, sae.b_dec + way * some[:, None, None])[0].sum(0) / steps
    with torch.no_grad():
        clean = float(_d(lmm, choice, parts.upper.run(_put(mask, parts.states, parts.hidden)))[0])
        values = parts.latents.acts * _rows_dot(slope, sae, parts.latents.indices)
        return _whole(parts, values, (slope * parts.error).sum(-1), torch.zeros_like(slope[:, 0]), clean)


@torch.no_grad()
def exact(
    place: SAEInPlace,
    choice: Decision,
    pairs: Bool[Tensor, "tokens k"] | None = None,
    *,
    keep_error: bool = True,
    spliced: Sequence[str] = SAE_KINDS,
    batch: int = 4,
    store: str | Path | None = None,
) -> Float[Tensor, "tokens k"]:
    """-I by definition: silence one latent at one token, run, compare; NaN where it was not asked for.

    pairs: which of the clean run's latents, laid out as in `Attribution.latents`; by default all that are active.
    Tokens before a version's are not run again, nor the layers up to this one; `batch` versions run side by side, from
    the first one's token on. store: a file that keeps what is done, so that a run cut short goes on; ValueError if it
    is of another decision, model or SAE.
    """
    sae = place.sae
    clean = _Clean(place, choice, _require_ready(place, choice, spliced), keep_error)
    wanted = clean.wanted(pairs)
    values = _known(store, clean.parts)
    todo = (wanted & values.isnan()).nonzero()
    for rows in progress_bar(_batches(todo, batch), desc="ablating", disable=len(todo) <= 8 * batch):
        states, directions, place = clean.versions(sae, rows)
        states[place] -= directions
        values[tuple(rows.T)] = clean.d - clean.again(int(rows[0, 0]), states)
        if store is not None:
            latents = clean.parts.latents
            save_tensors(store, {"values": values, "indices": latents.indices, "acts": latents.acts})
    return clean.spread(torch.where(wanted, values, float("nan")))


def separate_paths(
    place: SAEInPlace,
    choice: Decision,
    pairs: Bool[Tensor, "tokens k"],
    *,
    steps: int = 2,
    keep_error: bool = True,
    spliced: Sequence[str] = SAE_KINDS,
    batch: int = 32,
) -> Float[Tensor, "tokens k"]:
    """Integrated gradients of each of these pairs along its own path: it alone goes from 0 to z, all else stays clean.

    In the limit of many steps it is `exact`; with the midpoint rule one step is right to the second order in z. It
    costs `steps` forwards and backwards a pair: it explains what `linear` misses and replaces nothing. NaN elsewhere.
    """
    sae = place.sae
    if steps < 1:
        raise ValueError(f"{steps} steps of integration; give at least 1")
    with torch.no_grad():
        clean = _Clean(place, choice, _require_ready(place, choice, spliced), keep_error)
        wanted = clean.wanted(pairs)
        values = torch.full_like(clean.parts.latents.acts, float("nan"))
    for rows in _batches(wanted.nonzero(), batch):
        states, directions, place = clean.versions(sae, rows)
        total = torch.zeros(len(rows), device=states.device)
        for step in range(steps):
            here = states.clone()
            here[place] -= directions * (1 - (step + 0.5) / steps)
            with torch.enable_grad():
                d = clean.again(int(rows[0, 0]), here.requires_grad_()).sum()
                (slope,) = torch.autograd.grad(d, here)
            total += (slope[place] * directions).sum(-1) / steps
        values[tuple(rows.T)] = total
    return clean.spread(values)


def _batches(rows: Int64[Tensor, "n 2"], size: int) -> Sequence[Tensor]:
    """Rows in batches; none of no rows, where `split` gives an empty one."""
    return rows.split(size) if len(rows) else ()


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
