"""Section 4.4: choose the clamp that corrects most wrong answers within limits on what it may harm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from lmm_sae_nb.hallucination.answers import Edits, first_tokens, unchanged
from lmm_sae_nb.hallucination.cases import Answered, Case
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.steer.steering import Edit, Scope


@dataclass(frozen=True)
class Setting:
    """A clamp to try: all latents of one or several words at once.

    words: that the latents stand for.
    dose: the clamp in units of each latent's maximum over the cached images.
    edits: a clamp for each latent.
    """

    words: tuple[str, ...] = ()
    dose: float = 0.0
    edits: tuple[Edit, ...] = ()


NOTHING = Setting()  # the SAE is spliced in, and nothing is clamped


def clamp_settings(
    words: Mapping[str, Sequence[int]], maxima: Sequence[float], doses: Sequence[float], together: int
) -> list[Setting]:
    """List what to try: nothing, then each word alone and up to `together` words at once, at each dose.

    words: word to its latents, which are always clamped together.
    maxima: the maximum of every latent, by its number.
    doses: clamp values in units of the maxima.
    """
    settings: dict[Edits, Setting] = {(): NOTHING}
    groups = [group for count in range(1, together + 1) for group in combinations(words, count)]
    for dose, group in product(doses, groups):
        latents = dict.fromkeys(latent for word in group for latent in words[word])
        edits = tuple(Edit(latent, dose * float(maxima[latent])) for latent in latents)
        settings.setdefault(edits, Setting(group, dose, edits))
    return list(settings.values())


@dataclass(frozen=True)
class Trial:
    """What a setting did to the cases that it was tried on, all as fractions from 0 to 1 except `shift`.

    cured: of the wrong answers, turned right; the mean over the right answers, so that *no* and *yes* count the same.
        If all wrong cases have one right answer, it is the fraction of these.
    shift: mean rise of their margin, in logits.
    harmed: of the right answers, turned wrong; None if it was not tried on them, or there are none.
    changed: of the answers to other questions, changed by a word or more; None if it was not tried on them.
    """

    setting: Setting
    cured: float
    shift: float
    harmed: float | None = None
    changed: float | None = None


@dataclass(frozen=True)
class Search:
    """The chosen setting, and every trial in the order of the settings; without wrong cases there are no trials."""

    chosen: Setting
    trials: list[Trial]


class Limits(NamedTuple):
    """The highest fractions that a cure may cost: of right answers harmed, of other answers changed."""

    harmed: float
    changed: float = 1.0


def search(
    place: SAEInPlace,
    wrong: Sequence[Case],
    right: Sequence[Case],
    settings: Sequence[Setting],
    limits: Limits,
    scope: Scope = Scope(),  # noqa: B008  (frozen)
    *,
    others: Sequence[Answered] = (),
    keep_error: bool = True,
    at_once: int = 4,
) -> Search:
    """Choose the setting with the highest balanced cured rate that stays within `limits`.

    All settings are tried on the wrong cases. The best of them, `at_once` at a time, are then tried on the right
    cases and on other questions, until one is within the limits; those behind it cure less. Among settings that cure
    equally many, the one with the fewest latents is tried first, then the one with the largest shift. `NOTHING` is
    chosen if no other setting will do, and without wrong cases.

    wrong: cases that are answered wrong with nothing clamped.
    right: cases that are answered right with nothing clamped; without one, nothing limits the harm.
    settings: what to try; `NOTHING` comes first.
    scope: the tokens that are clamped.
    others: questions that have nothing to do with the cases.
    keep_error: whether what the SAE leaves unexplained stays in.

    Raises:
        ValueError: the first setting clamps something.
    """
    if settings[0].edits:
        raise ValueError(f"the first setting clamps {len(settings[0].edits)} latents; give NOTHING first")
    if not wrong:
        return Search(NOTHING, [])
    how = dict(scope=scope, keep_error=keep_error)
    answers = first_tokens(place, wrong, [setting.edits for setting in settings], **how)
    fooled = ~answers.right[0]
    kinds = [torch.tensor([case.right == word for case in wrong]) & fooled for word in {case.right for case in wrong}]
    rates = [answers.right[:, kind].float().mean(1) for kind in kinds if bool(kind.any())]
    cured = torch.stack(rates).mean(0).tolist() if rates else [0.0] * len(settings)
    shift = (answers.margin - answers.margin[0]).mean(1).tolist()
    order = sorted(range(len(settings)), key=lambda n: (-cured[n], len(settings[n].edits), -shift[n]))
    order = order[: order.index(0)]  # what is behind NOTHING cures nothing
    harmed, changed, best = {0: 0.0}, {0: 0.0}, 0
    while order and not best:
        block, order = order[:at_once], order[at_once:]
        tried = [(), *(settings[n].edits for n in block)]
        harmed |= zip(block, _lost(first_tokens(place, right, tried, **how).right), strict=True)
        fine = [n for n in block if harmed[n] <= limits.harmed]
        tried = [(), *(settings[n].edits for n in fine)]
        changed |= zip(fine, _lost(unchanged(place, others if fine else (), tried, **how)), strict=True)
        best = next((n for n in fine if changed[n] <= limits.changed), 0)
    trials = [
        Trial(setting, cured[n], shift[n], harmed.get(n) if right else None, changed.get(n) if others else None)
        for n, setting in enumerate(settings)
    ]
    return Search(settings[best], trials)


def _lost(right: Bool[Tensor, "settings cases"]) -> list[float]:
    """Return the fraction of what is right under the first setting that is wrong under each of the others."""
    lost = (right[0] & ~right[1:]).sum(1)
    return [n / max(1, int(right[0].sum())) for n in lost.tolist()]  # in float32, 4 of 40 would be more than 0.1
