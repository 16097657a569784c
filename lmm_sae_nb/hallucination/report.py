"""Measure a chosen clamp on cases that took no part in the choice: what it cures, what it harms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import ArrayLike

from lmm_sae_nb.hallucination.answers import Edits, first_tokens
from lmm_sae_nb.hallucination.cases import Case
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.steer.steering import Edit, Scope, steered
from lmm_sae_nb.support.intervals import Mean, bounds, proportion


@dataclass(frozen=True)
class CaseAnswers:
    """Whether each case is answered right: by the untouched model, with the SAE spliced in, and with the clamp.

    answer: the right answer.
    contradicts: whether the image contradicts what was taught.
    group: the heading of the case.
    """

    answer: list[str]
    contradicts: list[bool]
    group: list[str]
    untouched: list[bool]
    spliced: list[bool]
    clamped: list[bool]


def answer_cases(
    place: SAEInPlace, cases: Sequence[Case], edits: Edits, scope: Scope, *, keep_error: bool = True
) -> CaseAnswers:
    """Answer cases untouched, with the SAE spliced in, and with these latents clamped.

    edits: the clamp of each latent.
    scope: the tokens that are clamped.
    keep_error: whether what the SAE leaves unexplained stays in; then the spliced model equals the untouched one.
    """
    right = first_tokens(place, cases, [None, (), edits], scope, keep_error=keep_error).right
    return CaseAnswers(
        [case.right for case in cases],
        [case.contradicts for case in cases],
        [case.group for case in cases],
        *right.tolist(),
    )


def random_clamps(
    maxima: ArrayLike, like: Edits, dose: float, draws: int, without: Iterable[int] = (), seed: int = 0
) -> list[Edits]:
    """Draw the control of a clamp: each time as many random live latents, at the same dose.

    maxima: of every latent; a live one has a positive maximum.
    like: the clamp; its latents are not drawn.
    dose: in units of each latent's maximum.
    draws: number of controls.
    without: further latents that are not drawn.

    Raises:
        ValueError: there are fewer latents to draw from than the clamp has.
    """
    maxima = torch.as_tensor(np.asarray(maxima, float))
    live = maxima > 0
    live[[*without, *(edit.latent for edit in like)]] = False
    live = live.nonzero()[:, 0]
    if len(live) < len(like):
        raise ValueError(f"{len(live)} live latents to draw {len(like)} from; exclude fewer")
    generator, clamps = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        drawn = live[torch.randperm(len(live), generator=generator)[: len(like)]].tolist()
        clamps.append(tuple(Edit(latent, dose * float(maxima[latent])) for latent in drawn))
    return clamps


def answer_controls(
    place: SAEInPlace, cases: Sequence[Case], clamps: Sequence[Edits], scope: Scope, *, keep_error: bool = True
) -> list[list[bool]]:
    """Return for each of several clamps whether each case is answered right under it.

    scope, keep_error: as for `answer_cases`.
    """
    return first_tokens(place, cases, clamps, scope, keep_error=keep_error).right.tolist() if clamps else []


def control_metrics(cases: CaseAnswers, controls: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Return what random clamps cure and harm, with 99 % intervals over the cases of all draws together.

    `control_cured_lowest` and `control_cured_highest` are the fractions cured of the weakest and strongest draw.

    controls: as `answer_controls` returns them.
    """
    before, contradicts = np.array(cases.untouched), np.array(cases.contradicts)
    wrong, after = contradicts & ~before, np.array(controls, bool).reshape(len(controls), len(before))
    metrics: dict[str, float] = {"control_draws": len(controls)}
    if after[:, wrong].size:
        each = after[:, wrong].mean(1)
        metrics |= bounds("control_cured_fraction", proportion(after[:, wrong].ravel()))
        metrics |= {"control_cured_lowest": float(each.min()), "control_cured_highest": float(each.max())}
    if after[:, before].size:
        metrics |= bounds("control_harmed_fraction", proportion(~after[:, before].ravel()))
    return metrics


@dataclass(frozen=True)
class OtherAnswers:
    """What a clamp does to questions that have nothing to do with the cases.

    right: whether the untouched model's answer is right.
    right_clamped: whether the answer under the clamp is right.
    kept: whether the two are the same, word for word.
    """

    right: list[bool]
    right_clamped: list[bool]
    kept: list[bool]


def answer_others(
    place: SAEInPlace,
    rows: Iterable[Mapping],
    edits: Edits,
    scope: Scope,
    *,
    keep_error: bool = True,
    batch: int = 24,
) -> OtherAnswers:
    """Answer other questions in full, untouched and clamped.

    rows: with image, question and the right answer; capitals and spaces do not count.
    edits, scope, keep_error: as for `answer_cases`.
    batch: questions at once.
    """
    lmm, rows = place.lmm, iter(rows)
    expected, before, after = [], [], []
    while block := list(islice(rows, batch)):
        prompt = lmm.prompt([row["question"] for row in block], [row["image"] for row in block])
        before += lmm.generate(prompt)
        with steered(place, prompt, edits, scope, keep_error=keep_error):
            after += lmm.generate(prompt)
        expected += [_bare(row["answer"]) for row in block]
    return OtherAnswers(
        [_bare(answer) == right for answer, right in zip(before, expected, strict=True)],
        [_bare(answer) == right for answer, right in zip(after, expected, strict=True)],
        [one == other for one, other in zip(before, after, strict=True)],
    )


def _bare(answer: str) -> str:
    """Return an answer without capitals and spaces."""
    return "".join(answer.lower().split())


def report_metrics(cases: CaseAnswers, others: OtherAnswers) -> dict[str, float]:
    """Return the fractions that notebook 08 reports, with 99 % intervals; a fraction of no cases is left out.

    `hallucination_rate` is the fraction of contradicting cases that are answered wrong; `_spliced` and `_after` are
    the same with the SAE and with the clamp. `cured_fraction` is the fraction of these wrong answers that the clamp
    turns right, `cured_fraction_right_<answer>` that of the ones with this right answer: a mere push towards one
    answer cures only one kind. `harmed_fraction` is the fraction of right answers that the clamp turns wrong.
    `cured` and `harmed` are the counts behind the fractions, `right_answers` those that could be harmed.
    """
    contradicts, before, spliced, after = map(
        np.array, (cases.contradicts, cases.untouched, cases.spliced, cases.clamped)
    )
    wrong = contradicts & ~before
    hits = {
        "hallucination_rate": ~before[contradicts],
        "hallucination_rate_spliced": ~spliced[contradicts],
        "hallucination_rate_after": ~after[contradicts],
        "cured_fraction": after[wrong],
        "harmed_fraction": ~after[before],
        "harmed_fraction_contradicting": ~after[contradicts & before],
        "harmed_fraction_agreeing": ~after[~contradicts & before],
        "other_questions_right": others.right,
        "other_questions_right_after": others.right_clamped,
        "other_answers_kept": others.kept,
    }
    for answer in sorted(set(cases.answer)):
        hits[f"cured_fraction_right_{answer}"] = after[wrong & (np.array(cases.answer) == answer)]
    for answer in sorted(set(cases.answer)):
        hits[f"harmed_fraction_right_{answer}"] = ~after[before & (np.array(cases.answer) == answer)]
    metrics: dict[str, float] = {"maps": int(contradicts.sum()), "hallucinations": int(wrong.sum())}
    metrics |= {
        "cured": int(after[wrong].sum()),
        "right_answers": int(before.sum()),
        "harmed": int((before & ~after).sum()),
    }
    for answer in sorted(set(cases.answer)):
        of_answer = wrong & (np.array(cases.answer) == answer)
        metrics[f"hallucinations_right_{answer}"] = int(of_answer.sum())
        metrics[f"cured_right_{answer}"] = int(after[of_answer].sum())
    for name, marks in hits.items():
        metrics |= bounds(name, proportion(marks)) if len(marks) else {}
    return metrics


def right_by_group(cases: CaseAnswers) -> dict[str, dict[str, Mean]]:
    """Return, for each group, the fraction of contradicting cases answered right, untouched and clamped."""
    contradicts, groups = np.array(cases.contradicts), np.array(cases.group)
    rows = {}
    for group in sorted(set(groups[contradicts].tolist())):
        chosen = contradicts & (groups == group)
        answers = {"untouched": cases.untouched, "clamped": cases.clamped}
        rows[group] = {name: Mean(*proportion(np.array(right)[chosen])[:3]) for name, right in answers.items()}
    return rows
