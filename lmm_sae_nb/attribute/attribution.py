"""Section 2.4: the influence of each latent at each token on a decision: exact, linear, by integrated gradients.

Everything here is computed in float32: in 16 bits the effects of single latents are lost in rounding.

The sign is decided here and nowhere else. The paper's influence is I = d(without) - d(with). The attribution is -I, so
that a positive one supports the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
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


def in_float32(attribute: Callable) -> Callable:
    """Let a function of a place, and of whatever else, compute in float32, in whatever dtype the model was loaded."""

    @wraps(attribute)
    def exactly(place: SAEInPlace, *args, **settings):
        with place.lmm.in_float32():
            return attribute(place, *args, **settings)

    return exactly


@dataclass(frozen=True)
class Decision:
    """A choice between two tokens after one prompt.

    prompt: one sample.
    answer: token id, v_c.
    baseline: token id, v_b.
    """

    prompt: Prompt
    answer: int
    baseline: int


class Attribution(NamedTuple):
    """The attribution -I of every active latent at every token of one prompt, in logits, and of what is no latent.

    What latents, error and bias sum to depends on the method: see `linear` and `integrated`.
    """

    latents: Latents  # (tokens, k) of the clean run; activations are 0 at tokens where the SAE is not spliced in
    values: Float[Tensor, "tokens k"]
    error: Float[Tensor, " tokens"]  # attribution of what the SAE leaves unexplained
    bias: Float[Tensor, " tokens"]  # attribution of b_dec
    clean: float  # d of the clean run

    def of_tokens(self) -> Float[Tensor, " tokens"]:
        """Return the sum over the latents of each token."""
        return self.values.sum(-1)

    def of_latents(self, tokens: Bool[Tensor, " tokens"] | None = None) -> tuple[Int64[Tensor, " n"], Tensor]:
        """Return the active latents and the sum of each over tokens, the highest sum first.

        tokens: mask of the tokens to sum over; all by default.
        """
        active = self.latents.acts > 0
        active = active if tokens is None else active & tokens[:, None]
        latents, position = self.latents.indices[active].unique(return_inverse=True)
        totals = torch.zeros(len(latents)).index_add(0, position, self.values[active])
        order = totals.argsort(descending=True, stable=True)
        return latents[order], totals[order]

    def of_kinds(self, prompt: Prompt, kinds: Sequence[str] = SAE_KINDS) -> list[dict[str, str | float]]:
        """Return, for each kind of token, the sums over its latents, over their error and over their bias.

        prompt: that was attributed.
        kinds: of tokens, a row each.
        """
        rows = []
        for kind in kinds:
            tokens = prompt.mask(kind)[0]
            parts = {"latents": self.of_tokens(), "error": self.error, "bias": self.bias}
            rows.append({"tokens": kind} | {name: float(part[tokens].sum()) for name, part in parts.items()})
        return rows

    def map_of(self, latent: int) -> Float[Tensor, " tokens"]:
        """Return the attribution of one latent at every token."""
        return torch.where(self.latents.indices == latent, self.values, 0.0).sum(-1)


# ---- the decision ---------------------------------------------------------------------------------------------


def decision(lmm: LMM, text: str, image: Image.Image | None, answer: str, baseline: str) -> Decision:
    """Return the choice between two answers as the first token after the prompt.

    text: the question.
    image: that it is about, or None.
    answer, baseline: words of one token each.

    Raises:
        ValueError: an answer is not one token of the model (the message shows its pieces), or the two are the same.
    """
    return Decision(lmm.prompt(text, image), *two_tokens(lmm, answer, baseline))


def two_tokens(lmm: LMM, answer: str, baseline: str) -> tuple[int, int]:
    """Return the tokens of two answers of one token each; errors as `decision`."""
    ids = single_token(lmm, answer), single_token(lmm, baseline)
    if ids[0] == ids[1]:
        raise ValueError(f"{answer!r} and {baseline!r} are the same token; give two different answers")
    return ids


@torch.no_grad()
def greedy_decision(lmm: LMM, text: str, image: Image.Image | None) -> Decision:
    """Return the model's own choice: the first token of its answer against the runner-up.

    text: the question.
    image: that it is about, or None.
    """
    prompt = lmm.prompt(text, image)
    answer, baseline = lmm.last_logits(prompt)[0].topk(2).indices.tolist()
    return Decision(prompt, answer, baseline)


def single_token(lmm: LMM, word: str) -> int:
    ids = lmm.tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == lmm.tokenizer.unk_token_id:
        pieces = lmm.tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(f"{word!r} is not one token of {lmm.name}, but {pieces}; give a word that is (mind its case)")
    return ids[0]


def difference(lmm: LMM, choice: Decision) -> Float[Tensor, " batch"]:
    """Return d = u[v_c] - u[v_b] after the prompt, in logits, under what is spliced into the model."""
    logits = lmm.last_logits(choice.prompt)
    return logits[:, choice.answer] - logits[:, choice.baseline]


# ---- the run with the SAE in ----------------------------------------------------------------------------------


class _Spliced(NamedTuple):
    """The layer's output taken apart at the tokens where the SAE is spliced in: x = W_dec^T z + b_dec + error."""

    upper: UpperLayers  # runs the layers above on given states
    # on the CPU: the tokens where the SAE is spliced in; the fields below have a row for each
    mask: Bool[Tensor, " tokens"]
    latents: Latents
    error: Float[Tensor, "spliced width"]  # 0 if it is dropped
    states: Float[Tensor, "spliced width"]  # goes into the next layer


@torch.no_grad()
def _splice(place: SAEInPlace, choice: Decision, kinds: Sequence[str], keep_error: bool) -> _Spliced:
    """Run the prompt up to the layer and take its output apart at the tokens of these kinds."""
    mask = place.mask(choice.prompt, kinds)
    if len(mask) != 1:
        raise ValueError(f"a decision is about one prompt, not {len(mask)}; make one Decision for each")
    mask = mask[0]
    upper = above(place.lmm, choice.prompt, place.layer)
    x = upper.hidden[0, mask].float()
    latents = place.sae.encode(x)
    x_hat = place.sae.decode(latents)
    error = x - x_hat if keep_error else torch.zeros_like(x)
    return _Spliced(upper, mask, latents, error, x_hat + error)


def _whole_states(
    parts: _Spliced, states: Float[Tensor, "*versions spliced width"], start: int = 0
) -> Float[Tensor, "versions tokens width"]:
    """Return the layer's output from token `start` on, with these states at the spliced tokens."""
    hidden = parts.upper.hidden[:, start:]
    mask = parts.mask[start:].to(hidden.device)
    versions = states.reshape(-1, *states.shape[-2:]).to(hidden.dtype)
    return hidden.expand(len(versions), -1, -1).masked_scatter(mask[None, :, None], versions)


def _d(choice: Decision, parts: _Spliced, decoded: Float[Tensor, "versions tokens width"]) -> Tensor:
    """Return d after the last token, (versions,), from the decoder's output."""
    logits = parts.upper.lmm.head(decoded[:, -1])
    return logits[:, choice.answer] - logits[:, choice.baseline]


def _slope(
    choice: Decision, parts: _Spliced, states: Float[Tensor, "*versions spliced width"]
) -> tuple[Tensor, Float[Tensor, " versions"]]:
    """Return the gradient of d in several versions of the spliced states, and d of each version."""
    states = states.detach().requires_grad_()
    with torch.enable_grad():
        d = _d(choice, parts, parts.upper.run(_whole_states(parts, states)))
        return torch.autograd.grad(d.sum(), states)[0], d.detach()


class _Clean:
    """The clean run, which later runs continue from the token where they differ.

    Attention looks back only, so nothing before that token changes; its keys and values are kept.
    """

    def __init__(self, place: SAEInPlace, choice: Decision, kinds: Sequence[str], keep_error: bool):
        self._choice = choice
        self.parts = parts = _splice(place, choice, kinds, keep_error)
        self.d = float(_d(choice, parts, parts.upper.remember(_whole_states(parts, parts.states)))[0])

    def active(self, pairs: Bool[Tensor, "tokens k"] | None) -> Bool[Tensor, "spliced k"]:
        """Return which latents of the spliced tokens are active, and among `pairs`."""
        active = self.parts.latents.acts > 0
        return active if pairs is None else active & pairs[self.parts.mask].to(active.device)

    def versions(self, sae: TopKSAE, rows: Int64[Tensor, "pairs 2"]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return a copy of the states for each pair, the pair's part z W_dec[j], and the place of this part.

        The copies begin at the token of the first pair.

        rows: (spliced token, slot), in the order of the tokens.
        """
        token, slot = rows.unbind(1)
        latents = self.parts.latents
        states = self.parts.states[token[0] :].repeat(len(rows), 1, 1)
        directions = latents.acts[token, slot, None] * sae.W_dec[latents.indices[token, slot]]
        return states, directions.detach(), (torch.arange(len(rows), device=token.device), token - token[0])

    def run_from(self, first: int, versions: Float[Tensor, "versions late width"]) -> Float[Tensor, " versions"]:
        """Return d with these states at the spliced tokens from number `first` on."""
        start = int(self.parts.mask.nonzero()[first])
        states = _whole_states(self.parts, versions, start)
        return _d(self._choice, self.parts, self.parts.upper.resume(states, start))

    def spread(self, values: Float[Tensor, "spliced k"]) -> Float[Tensor, "tokens k"]:
        """Return values of the spliced tokens for the whole sequence, NaN elsewhere."""
        out = torch.full((len(self.parts.mask), values.shape[1]), float("nan"))
        out[self.parts.mask] = values.cpu()
        return out


def _latent_slopes(gradient: Float[Tensor, "tokens width"], sae: TopKSAE, indices: Int64[Tensor, "tokens k"]) -> Tensor:
    """Return dd/dz_ij = <dd/dx_i, W_dec[j]> of each active latent, (tokens, k), a block of tokens at a time."""
    block = max(1, 2**24 // (indices.shape[1] * sae.width))
    blocks = zip(gradient.split(block), indices.split(block), strict=True)
    return torch.cat([torch.einsum("tw,tkw->tk", slope, sae.W_dec[latents]) for slope, latents in blocks])


def _attribution(parts: _Spliced, values: Tensor, error: Tensor, bias: Tensor, clean: float) -> Attribution:
    """Spread the numbers of the spliced tokens over the whole sequence, 0 elsewhere."""

    def spread(part: Tensor) -> Tensor:
        out = torch.zeros(len(parts.mask), *part.shape[1:], dtype=part.dtype)
        out[parts.mask] = part.cpu()
        return out

    return Attribution(Latents(*map(spread, parts.latents)), spread(values), spread(error), spread(bias), clean)


# ---- the methods ----------------------------------------------------------------------------------------------


@in_float32
def linear(
    place: SAEInPlace,
    choice: Decision,
    *,
    keep_error: bool = True,
    spliced: Sequence[str] = SAE_KINDS,
) -> Attribution:
    """Attribute by the paper's linear approximation, I = (dd/dz) (0 - z): one forward and one backward for all pairs.

    At each token, latents, error and bias sum to <dd/dx, x>. Departure A6: a silenced latent leaves its place empty;
    under eq. 5 the next one would take it, which is not an effect of this latent.

    keep_error: leave in what the SAE does not explain, as a term of its own; the paper drops it.
    spliced: kinds of token where the SAE is spliced in, of those that have a state at the hookpoint.

    Raises:
        ValueError: the decision has more than one prompt.
    """
    parts = _splice(place, choice, spliced, keep_error)
    slope, d = _slope(choice, parts, parts.states)
    with torch.no_grad():
        values = parts.latents.acts * _latent_slopes(slope, place.sae, parts.latents.indices)
        return _attribution(parts, values, (slope * parts.error).sum(-1), slope @ place.sae.b_dec, float(d[0]))


@in_float32
def clamping(
    place: SAEInPlace,
    choice: Decision,
    values: Float[Tensor, " n_latents"],
    tokens: Bool[Tensor, " tokens"] | None = None,
    *,
    keep_error: bool = True,
    spliced: Sequence[str] = SAE_KINDS,
) -> Float[Tensor, " n_latents"]:
    """Predict linearly, for each latent, by how much clamping it alone (eq. 4) would raise d.

    It is sum_i (value_j - z_ij) dd/dz_ij for all latents at once, silent ones too: one forward and one backward. The
    latents that TopK drops for the clamped one are not considered.

    values: the clamp of each latent.
    tokens: mask of the tokens that are clamped; all by default.
    keep_error, spliced: as for `linear`.

    Raises:
        ValueError: there is not one finite value for each latent.
    """
    sae = place.sae
    if values.shape != (sae.n_latents,) or not bool(values.isfinite().all()):
        raise ValueError(
            f"values of shape {tuple(values.shape)}; give a finite one for each of {sae.n_latents} latents"
        )
    parts = _splice(place, choice, spliced, keep_error)
    slope, _ = _slope(choice, parts, parts.states)
    with torch.no_grad():
        chosen = torch.ones_like(parts.mask) if tokens is None else tokens.cpu()
        slope = slope * chosen[parts.mask, None].to(slope.device)
        present = parts.latents.acts * _latent_slopes(slope, sae, parts.latents.indices)
        total = values.to(slope) * (sae.W_dec @ slope.sum(0))
        return total.index_add(0, parts.latents.indices.flatten(), -present.flatten()).cpu()


@in_float32
def integrated(
    place: SAEInPlace,
    choice: Decision,
    *,
    steps: int = 10,
    keep_error: bool = True,
    spliced: Sequence[str] = SAE_KINDS,
    batch: int = 5,
) -> Attribution:
    """Attribute by integrated gradients on the common path, where all latents and the error grow together from 0.

    The path goes from x_hat = b_dec to the clean run; the integral is taken by the midpoint rule. In the limit of many
    steps, latents and error sum to d(clean) - d(b_dec alone). The bias is 0, as b_dec does not change.

    steps: of the integral.
    keep_error, spliced: as for `linear`.
    batch: steps that run side by side.

    Raises:
        ValueError: less than one step or one at a time, or more than one prompt.
    """
    if min(steps, batch) < 1:
        raise ValueError(f"{steps} steps of integration, {batch} at a time; give at least 1 of each")
    parts = _splice(place, choice, spliced, keep_error)
    path = parts.states - place.sae.b_dec.detach()
    slope = torch.zeros_like(path)
    for positions in ((torch.arange(steps, device=path.device) + 0.5) / steps).split(batch):
        slope += _slope(choice, parts, place.sae.b_dec + path * positions[:, None, None])[0].sum(0) / steps
    with torch.no_grad():
        clean = float(_d(choice, parts, parts.upper.run(_whole_states(parts, parts.states)))[0])
        values = parts.latents.acts * _latent_slopes(slope, place.sae, parts.latents.indices)
        return _attribution(parts, values, (slope * parts.error).sum(-1), torch.zeros_like(slope[:, 0]), clean)


@in_float32
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
    """Attribute by definition: silence one latent at one token, run the model again, compare. NaN for other pairs.

    Tokens before the silenced one are not run again, nor are the layers up to this one.

    pairs: mask over the clean run's latents, laid out as `Attribution.latents`; by default all active ones.
    keep_error, spliced: as for `linear`.
    batch: pairs that run side by side, from the token of the first one on.
    store: a file that keeps what is done, so that a run that was stopped goes on.

    Raises:
        ValueError: more than one prompt, or the file holds ablations of another decision, model or SAE.
    """
    clean = _Clean(place, choice, spliced, keep_error)
    active = clean.active(pairs)
    values = _stored(store, clean.parts)
    missing = (active & values.isnan()).nonzero()
    for rows in progress_bar(_batches(missing, batch), desc="ablating", disable=len(missing) <= 8 * batch):
        states, directions, at = clean.versions(place.sae, rows)
        states[at] -= directions
        values[tuple(rows.T)] = clean.d - clean.run_from(int(rows[0, 0]), states)
        if store is not None:
            latents = clean.parts.latents
            save_tensors(store, {"values": values, "indices": latents.indices, "acts": latents.acts})
    return clean.spread(torch.where(active, values, float("nan")))


@in_float32
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
    """Attribute by integrated gradients on a separate path for each pair. NaN for other pairs.

    On its path one latent at one token grows from 0 to z, and all else stays as it is. In the limit of many steps this
    is `exact`; with the midpoint rule one step is already right to the second order in z. It costs `steps` forwards and
    backwards for each pair, so it explains what `linear` misses and does not replace it.

    pairs: mask, as for `exact`.
    steps: of the integral.
    keep_error, spliced: as for `linear`.
    batch: pairs that run side by side.

    Raises:
        ValueError: less than one step, or more than one prompt.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps of integration; give at least 1")
    with torch.no_grad():
        clean = _Clean(place, choice, spliced, keep_error)
        values = torch.full_like(clean.parts.latents.acts, float("nan"))
    for rows in _batches(clean.active(pairs).nonzero(), batch):
        states, directions, at = clean.versions(place.sae, rows)
        total = torch.zeros(len(rows), device=states.device)
        for step in range(steps):
            on_path = states.clone()
            on_path[at] -= directions * (1 - (step + 0.5) / steps)
            with torch.enable_grad():
                d = clean.run_from(int(rows[0, 0]), on_path.requires_grad_()).sum()
                (slope,) = torch.autograd.grad(d, on_path)
            total += (slope[at] * directions).sum(-1) / steps
        values[tuple(rows.T)] = total
    return clean.spread(values)


def _batches(rows: Int64[Tensor, "n 2"], size: int) -> Sequence[Tensor]:
    """Split rows into batches; no rows make no batch, where `split` gives an empty one."""
    return rows.split(size) if len(rows) else ()


def _stored(store: str | Path | None, parts: _Spliced) -> Float[Tensor, "spliced k"]:
    """Return the ablations that an earlier run left in the file, NaN where there is none."""
    nothing = torch.full_like(parts.latents.acts, float("nan"))
    if store is None or not Path(store).is_file():
        return nothing
    file = open_tensors(store)
    same = all(torch.equal(file.get_tensor(name), getattr(parts.latents, name).cpu()) for name in ("indices", "acts"))
    if not same:
        raise ValueError(f"{store} holds the ablations of another decision, model or SAE; give another file")
    return file.get_tensor("values").to(nothing)
