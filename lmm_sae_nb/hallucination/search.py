"""Sections 4.3, 4.4: wrong answers turned right by clamping latents that stand for text, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations, product
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from lmm_sae_nb.attribute.attribution import decision
from lmm_sae_nb.hallucination.cases import Asked, Case
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.prompts import Prompt
from lmm_sae_nb.model.samples import KINDS
from lmm_sae_nb.model.upper_layers import before
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.steer.steering import Edit, Scope, steered_versions

Edits = tuple[Edit, ...]


def trials(
    groups: Sequence[Sequence[int]], maxima: Sequence[float], values: Sequence[float], together: int
) -> list[Edits]:
    """What to try: nothing; each of these groups of latents, and up to `together` of them at once, at each multiple of
    every latent's own maximum."""
    found: dict[Edits, None] = {(): None}
    sets = [chain(*some) for many in range(1, together + 1) for some in combinations(groups, many)]
    for value, latents in product(values, map(dict.fromkeys, sets)):
        found[tuple(Edit(n, value * float(maxima[n])) for n in latents)] = None
    return list(found)


class Verdicts(NamedTuple):
    """What was answered under each of several settings."""

    margin: Float[Tensor, "settings cases"]  # logit of the right answer less that of the tempting one
    answered: Int64[Tensor, "settings cases"]  # the token of the highest logit
    right: Bool[Tensor, "settings cases"]


@torch.no_grad()
def verdicts(
    place: SAEInPlace,
    cases: Sequence[Case],
    settings: Sequence[Edits | None],
    scope: Scope = Scope(),  # noqa: B008
    *,
    keep_error: bool = True,
    at_once: int = 16,
) -> Verdicts:
    """The first token of each case's answer under each setting: None is the untouched model, () the SAE spliced in.

    One forward's last logits tell it, for the answers differ in their first token. Layers up to `layer` run once, and
    what is above them once for the first setting; of the others, `at_once` of them side by side, only what follows the
    first token whose state they change: a clamp at the words of a question costs these words. ValueError for answers
    that are not one token each.
    """
    lmm, layer = place.lmm, place.layer
    margin, answered = (torch.zeros(len(settings), len(cases)) for _ in range(2))
    right = torch.zeros(len(settings), len(cases), dtype=torch.bool)
    for n, case in enumerate(tqdm(cases, desc="answering", mininterval=2, disable=len(cases) < 50)):
        choice = decision(lmm, case.question, case.image, case.right, case.tempting)
        versions = _versions(place, choice.prompt, settings, scope, keep_error)
        logits = _last_logits(lmm, choice.prompt, layer, versions, at_once).cpu()
        margin[:, n] = logits[:, choice.answer] - logits[:, choice.baseline]
        answered[:, n] = logits.argmax(-1).float()
        right[:, n] = logits.argmax(-1) == choice.answer
    return Verdicts(margin, answered.long(), right)


@torch.no_grad()
def kept(
    place: SAEInPlace,
    asked: Sequence[Asked],
    settings: Sequence[Edits | None],
    scope: Scope = Scope(),  # noqa: B008
    *,
    keep_error: bool = True,
) -> Bool[Tensor, "settings asked"]:
    """Whether each answer would be given again, in full, under each setting: every token of it, and its end, is the
    most likely one after those before it, as in greedy decoding. One forward instead of one for each token."""
    lmm, layer = place.lmm, place.layer
    same = torch.zeros(len(settings), len(asked), dtype=torch.bool)
    for n, one in enumerate(asked):
        prompt = lmm.prompt(one.question, one.image, answers=one.answer)
        decoded = lmm.above(prompt, layer, _versions(place, prompt, settings, scope, keep_error))
        told = prompt.answer_mask[0, 1:]
        said = lmm.head(decoded[:, :-1][:, told]).argmax(-1)
        same[:, n] = (said == prompt.inputs["input_ids"][0, 1:][told]).all(-1).cpu()
    return same


def _versions(
    place: SAEInPlace, prompt: Prompt, settings: Sequence[Edits | None], scope: Scope, keep_error: bool
) -> Float[Tensor, "settings tokens width"]:
    """The layer's states of one prompt under each setting."""
    lmm, sae, layer = place.lmm, place.sae, place.layer
    hidden = lmm.hidden_states(lmm.entered(prompt), layer)[0]
    spliced, steered = (mask[0].to(lmm.device) for mask in (prompt.mask(*KINDS), scope.of_prompt(prompt)))
    versions = hidden.repeat(len(settings), 1, 1)
    if changed := [s for s, edits in enumerate(settings) if edits is not None]:
        edits = [settings[s] for s in changed]
        own = steered_versions(sae, hidden[spliced], edits, steered[spliced], keep_error).to(hidden.dtype)
        versions[torch.tensor(changed)[:, None], spliced.nonzero()[:, 0]] = own
    return versions


def _last_logits(
    lmm: LMM, prompt: Prompt, layer: int, versions: Float[Tensor, "versions tokens width"], at_once: int
) -> Float[Tensor, "versions vocab"]:
    """The logits after the last token where the layer puts out these versions of its states."""
    cache = DynamicCache()
    first = lmm.head(lmm.above(prompt, layer, versions[:1], cache)[:, -1])
    logits = first.repeat(len(versions), 1)
    differs = (versions != versions[0]).any(-1)
    start = torch.where(differs.any(1), differs.int().argmax(1), len(versions[0]))
    others = [n for n in start.argsort(stable=True).tolist() if start[n] < len(versions[0])]
    for some in (others[n : n + at_once] for n in range(0, len(others), at_once)):
        begin = int(start[some[0]])
        kept = before(cache, begin, len(some)) if begin else None
        logits[some] = lmm.head(lmm.above(prompt, layer, versions[some, begin:], kept)[:, -1])
    return logits


class Tried(NamedTuple):
    """What a setting did to the cases that it was tried on; harmed and spoiled are None where that was not asked."""

    edits: Edits
    cured: float  # share of the wrong answers
    shift: float  # mean change of their margin, in logits
    harmed: float | None  # share of the right answers
    spoiled: float | None  # share of the answers to other questions


class Limits(NamedTuple):
    """What a cure may cost at most: shares of the right answers, and of the answers to other questions."""

    harmed: float
    spoiled: float = 1.0


def search(
    place: SAEInPlace,
    wrong: Sequence[Case],
    good: Sequence[Case],
    settings: Sequence[Edits],
    limits: Limits,
    scope: Scope = Scope(),  # noqa: B008
    *,
    others: Sequence[Asked] = (),
    keep_error: bool = True,
    at_once: int = 4,
) -> tuple[Edits, list[Tried]]:
    """The setting that turns most wrong answers right of those within the limits on right ones that it turns wrong and
    on answers to other questions that it changes.

    All are tried on the wrong cases; on the others, `at_once` of them in order of what they cured, only until one is
    within the limits, for those behind it cure less. Among equals the one with the fewest latents is ahead, then the
    one with the largest shift. (), which does nothing, is settings[0] and is chosen if no other will do; wrong and
    right are the answers under it. ValueError for no wrong or no right answer, or another first setting.
    """
    if not len(wrong) or not len(good) or settings[0] != ():
        raise ValueError(
            f"{len(wrong)} wrong answers to cure, {len(good)} right ones to keep, the first setting is {settings[0]}; "
            "give some of both, and () first"
        )
    found = verdicts(place, wrong, settings, scope, keep_error=keep_error)
    fooled = ~found.right[0]
    cured = (fooled & found.right).sum(1) / max(1, int(fooled.sum()))
    shift = (found.margin - found.margin[0]).mean(1)
    order = sorted(range(len(settings)), key=lambda n: (-float(cured[n]), len(settings[n]), -float(shift[n])))
    order = order[: order.index(0)]  # what is behind () cures nothing
    harmed, spoiled, best = {0: 0.0}, {0: 0.0}, 0
    while order and not best:
        some, order = order[:at_once], order[at_once:]
        under = [(), *(settings[n] for n in some)]
        harmed |= zip(some, _lost(verdicts(place, good, under, scope, keep_error=keep_error).right), strict=True)
        fine = [n for n in some if harmed[n] <= limits.harmed]
        under = [(), *(settings[n] for n in fine)]
        spoiled |= zip(
            fine, _lost(kept(place, others if fine else (), under, scope, keep_error=keep_error)), strict=True
        )
        best = next((n for n in fine if spoiled[n] <= limits.spoiled), 0)
    told = [
        Tried(edits, float(cured[n]), float(shift[n]), harmed.get(n), spoiled.get(n) if len(others) else None)
        for n, edits in enumerate(settings)
    ]
    return settings[best], told


def _lost(right: Bool[Tensor, "settings cases"]) -> list[float]:
    """The share of what is right under the first setting that is not under each of the others."""
    lost = (right[0] & ~right[1:]).sum(1)
    return [n / max(1, int(right[0].sum())) for n in lost.tolist()]  # in float32, 4 of 40 would be more than 0.1
