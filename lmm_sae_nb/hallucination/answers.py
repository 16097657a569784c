"""What the model answers under many settings of the SAE, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lmm_sae_nb.attribute.attribution import decision
from lmm_sae_nb.hallucination.cases import Answered, Case
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.model.upper_layers import UpperLayers, above
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.steer.steering import Edit, Scope, steered_versions
from lmm_sae_nb.support.progress import progress_bar

Edits = tuple[Edit, ...]


@dataclass(frozen=True)
class Push:
    """Add a random direction at every clamped token, as long as the change that a clamp makes there.

    like: the clamp.
    seed: of the direction, which is the same at all tokens.
    """

    like: Edits
    seed: int = 0


@dataclass(frozen=True)
class Shift:
    """Add this direction at every clamped token.

    direction: of the layer's width.
    """

    direction: tuple[float, ...]


Setting = Edits | Push | Shift | None  # None is the untouched model, () has the SAE spliced in and nothing clamped


class Answers(NamedTuple):
    """The first token of the answer to each case, under each of several settings."""

    margin: Float[Tensor, "settings cases"]  # logit of the right answer minus that of the tempting one
    token: Int64[Tensor, "settings cases"]  # the token with the highest logit
    right: Bool[Tensor, "settings cases"]  # whether this is the right answer's token


@torch.no_grad()
def first_tokens(
    place: SAEInPlace,
    cases: Sequence[Case],
    settings: Sequence[Setting],
    scope: Scope = Scope(),  # noqa: B008  (frozen)
    *,
    keep_error: bool = True,
    at_once: int = 16,
) -> Answers:
    """Answer each case under each setting. The logits after the prompt are enough: answers differ in the first token.

    Layers up to the SAE's run once for each case. The layers above run for all tokens under the first setting, and
    under the others only from the first token on whose state they change.

    scope: the tokens that are clamped.
    keep_error: whether what the SAE leaves unexplained stays in.
    at_once: settings that run side by side.

    Raises:
        ValueError: a right or tempting answer is not one token.
    """
    lmm, layer = place.lmm, place.layer
    margin = torch.zeros(len(settings), len(cases))
    token = torch.zeros(len(settings), len(cases), dtype=torch.long)
    right = torch.zeros(len(settings), len(cases), dtype=torch.bool)
    for n, case in enumerate(progress_bar(cases, desc="answering", disable=len(cases) < 50)):
        choice = decision(lmm, case.question, case.image, case.right, case.tempting)
        upper = above(lmm, choice.prompt, layer)
        versions = _versions(place, upper, settings, scope, keep_error)
        logits = _last_logits(upper, versions, at_once).cpu()
        margin[:, n] = logits[:, choice.answer] - logits[:, choice.baseline]
        token[:, n] = logits.argmax(-1)
        right[:, n] = token[:, n] == choice.answer
    return Answers(margin, token, right)


@torch.no_grad()
def unchanged(
    place: SAEInPlace,
    answered: Sequence[Answered],
    settings: Sequence[Setting],
    scope: Scope = Scope(),  # noqa: B008  (frozen)
    *,
    keep_error: bool = True,
) -> Bool[Tensor, "settings answered"]:
    """Tell whether the model would give each answer again, word for word, under each setting.

    Greedy decoding gives it again if each of its tokens, and its end, is the most likely one after those before it.
    So one forward is enough, instead of one for each token.

    settings, scope, keep_error: as for `first_tokens`.
    """
    lmm, layer = place.lmm, place.layer
    same = torch.zeros(len(settings), len(answered), dtype=torch.bool)
    for n, each in enumerate(answered):
        prompt = lmm.prompt(each.question, each.image, answers=each.answer)
        upper = above(lmm, prompt, layer)
        decoded = upper.run(_versions(place, upper, settings, scope, keep_error))
        at = prompt.answer_mask[0, 1:]
        predicted = lmm.head(decoded[:, :-1][:, at]).argmax(-1)
        same[:, n] = (predicted == prompt.inputs["input_ids"][0, 1:][at]).all(-1).cpu()
    return same


def _versions(
    place: SAEInPlace, upper: UpperLayers, settings: Sequence[Setting], scope: Scope, keep_error: bool
) -> Float[Tensor, "settings tokens width"]:
    """Return the layer's states of one prompt under each setting."""
    lmm, sae, prompt, hidden = place.lmm, place.sae, upper.prompt, upper.hidden[0]
    spliced, steered = (mask[0].to(lmm.device) for mask in (prompt.mask(*SAE_KINDS), scope.of_prompt(prompt)))
    versions = hidden.repeat(len(settings), 1, 1)
    if changed := [s for s, setting in enumerate(settings) if setting is not None]:
        chosen = [settings[s] for s in changed]
        edits = [setting if isinstance(setting, tuple) else getattr(setting, "like", ()) for setting in chosen]
        states = steered_versions(sae, hidden[spliced], [*edits, ()], steered[spliced], keep_error)
        states, clean = states[:-1], states[-1]
        for state, setting in zip(states, chosen, strict=True):
            if isinstance(setting, Push):
                state[:] = clean + _along(setting.seed, state - clean)
            elif isinstance(setting, Shift):
                state[steered[spliced]] += torch.tensor(setting.direction).to(state)
        versions[torch.tensor(changed)[:, None], spliced.nonzero()[:, 0]] = states.to(hidden.dtype)
    return versions


def _along(seed: int, change: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
    """Return changes of the same length at each token, all along one random direction."""
    direction = torch.randn(change.shape[-1], generator=torch.Generator().manual_seed(seed)).to(change)
    return change.norm(dim=-1, keepdim=True) * direction / direction.norm()


@torch.no_grad()
def strength(place: SAEInPlace, cases: Sequence[Case], edits: Edits, scope: Scope, *, keep_error: bool = True) -> float:
    """Return how long the change is that a clamp makes in the layer's output: its mean norm over the clamped tokens.

    cases: the prompts that it is averaged over.
    """
    lengths = []
    for case in cases:
        prompt = place.lmm.prompt(case.question, case.image)
        upper = above(place.lmm, prompt, place.layer)
        clean, clamped = _versions(place, upper, [(), edits], scope, keep_error)
        lengths.append((clamped - clean)[scope.of_prompt(prompt)[0].to(clean.device)].float().norm(dim=-1))
    return float(torch.cat(lengths).mean())


def _last_logits(
    upper: UpperLayers, versions: Float[Tensor, "versions tokens width"], at_once: int
) -> Float[Tensor, "versions vocab"]:
    """Return the logits after the last token where the layer puts out these versions of its states."""
    lmm = upper.lmm
    first = lmm.head(upper.remember(versions[:1])[:, -1])
    logits = first.repeat(len(versions), 1)
    differs = (versions != versions[0]).any(-1)
    start = torch.where(differs.any(1), differs.int().argmax(1), len(versions[0]))
    others = [n for n in start.argsort(stable=True).tolist() if start[n] < len(versions[0])]
    for block in (others[n : n + at_once] for n in range(0, len(others), at_once)):
        begin = int(start[block[0]])
        logits[block] = lmm.head(upper.resume(versions[block, begin:], begin)[:, -1])
    return logits
