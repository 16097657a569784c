"""Say in words what the comparison found. Numbers and verbs come from what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lmm_sae_nb.compare.depth import SteeredLatent
from lmm_sae_nb.compare.report import KIND_TITLES, TITLES, direction
from lmm_sae_nb.compare.scored import ScoredSAE
from lmm_sae_nb.model.hookpoints import Hookpoint
from lmm_sae_nb.score.scores import Column, Scores, latents_by_kind
from lmm_sae_nb.support.intervals import Mean, Proportion, difference_interval, proportion, read_mean
from lmm_sae_nb.support.stages import Metrics

DIFFERS = {"rises": "is higher", "falls": "is lower"}  # a difference that is no change over depth


def fraction_difference(one: Proportion, other: Proportion) -> Mean:
    """Return `other` minus `one` with Newcombe's interval, which has a width even where a fraction is 0 or 1.

    one, other: fractions of separate cases, with intervals of one level.
    """
    difference = other.fraction - one.fraction
    below = np.hypot(other.fraction - other.low, one.high - one.fraction)
    above = np.hypot(other.high - other.fraction, one.fraction - one.low)
    return Mean(difference, difference - float(below), difference + float(above))


def above_chance(metrics: Metrics, scored: Mapping[str, ScoredSAE], chance: str) -> str:
    """Return in how many comparisons a score is above chance, and of which scores these comparisons are.

    metrics: with those of `report.score_metrics`.
    scored: by the SAE's name.
    chance: "random" (random images) or "moved" (the activation moved within the same image).
    """
    flags: dict[Column, list[float]] = {}
    for name, each in scored.items():
        for column in each.scores.columns:
            if (metric := f"{column}_{name}_above_{chance}") in metrics:
                flags.setdefault(column, []).append(metrics[metric])
    parts = [
        f"{TITLES.get(column, str(column).replace('_', ' '))}: {sum(row)} of {len(row)} SAEs"
        for column, row in flags.items()
    ]
    every = [flag for row in flags.values() for flag in row]
    return f"{sum(every)} of {len(every)} comparisons" + (f" ({'; '.join(parts)})" if parts else "")


def steering_sentences(steered: Mapping[Hookpoint, Sequence[SteeredLatent]]) -> list[str]:
    """Return how many clamped latents steer at each layer, and whether the last layer differs from the others.

    steered: layer to its clamped latents, in order of depth; a layer without any is left out.
    """
    tried = {n: proportion([each.named for each in latents]) for n, latents in steered.items() if latents}
    if not tried:
        return []
    counts = [
        f"{_hits(each)} of {each.cases} at layer {n} ({each.fraction:.0%} [{each.low:.0%}, {each.high:.0%}])"
        for n, each in tried.items()
    ]
    sentences = [f"Clamped latents that make the model name their object: {', '.join(counts)}."]
    *others, last = tried
    if not others:
        return sentences
    changes = {n: direction(fraction_difference(tried[n], tried[last])) for n in others}
    lower, higher = ([n for n, word in changes.items() if word == verb] for verb in ("falls", "rises"))
    same = [n for n in others if n not in lower + higher]
    hits, end = _hits(tried[last]), tried[last]
    text = f"At layer {last}, {hits or 'none'} of {end.cases} {'steers' if hits < 2 else 'steer'}"
    text += f". The interval reaches up to {end.high:.0%}." if not hits else "."
    text += f" This is less than at {_layers(lower, 'and')}." if lower else ""
    text += f" This is more than at {_layers(higher, 'and')}." if higher else ""
    text += f" With so few latents, we cannot say that this differs from {_layers(same, 'or')}." if same else ""
    return [*sentences, text]


def _hits(each: Proportion) -> int:
    return round(each.fraction * each.cases)


def _layers(layers: Iterable[Hookpoint], word: str) -> str:
    return _listed([f"layer {n}" for n in layers], word)


def _listed(words: Sequence[str], word: str = "and") -> str:
    """Return "a, b and c"."""
    *most, last = words
    return f"{', '.join(most)} {word} {last}" if most else last


def kind_shift_sentences(low: Scores, high: Scores, layers: Sequence[Hookpoint]) -> list[str]:
    """Return which kinds of names appear and vanish from one layer to another, and which change measurably.

    low, high: the scores of the first and of the last layer.
    layers: in order of depth.
    """
    groups = [latents_by_kind(scores.explained) for scores in (low, high)]
    one, other = ({kind: len(latents) for kind, latents in group.items()} for group in groups)
    totals = (one.pop("total"), other.pop("total"))
    kinds = list(dict.fromkeys([*one, *other]))
    gone, new = ([kind for kind in kinds if kind not in counts] for counts in (other, one))

    def some(kinds: Sequence[str], word: str, counts: Mapping[str, int], total: int, layer: Hookpoint) -> str:
        which = f"the kinds {_listed(kinds)} are {word}" if len(kinds) > 1 else f"the kind {kinds[0]} is {word}"
        return f"{which} ({sum(counts[kind] for kind in kinds)} of {total} names at layer {layer})"

    parts = [some(gone, "gone", one, totals[0], layers[0])] if gone else []
    parts += [some(new, "new", other, totals[1], layers[-1])] if new else []
    pairs = {
        kind: [
            proportion(np.arange(total) < counts.get(kind, 0))
            for counts, total in zip((one, other), totals, strict=True)
        ]
        for kind in kinds
    }
    changes = {kind: fraction_difference(*pair) for kind, pair in pairs.items()}
    measured = {kind: word for kind, each in changes.items() if (word := direction(each)) in DIFFERS}

    def change(kind: str) -> str:
        before, after = pairs[kind]
        return f"{kind}, from {before.fraction:.0%} to {after.fraction:.0%} of the names"

    if measured:
        text = "; ".join(f"{word} measurably: {change(kind)}" for kind, word in measured.items())
        text = text[0].upper() + text[1:]
    else:
        most = max(changes, key=lambda kind: abs(changes[kind].mean))
        text = f"No kind changes measurably; the largest change is that of {change(most)}"
    span = f"From layer {layers[0]} to layer {layers[-1]}"
    return [
        f"{span}: {'; '.join(parts) or 'no kind of names appears or vanishes'}.",
        f"{text}. There are {totals[0]} and {totals[1]} names, from one seed, and no control.",
    ]


def within_kinds_sentences(
    one: Scores, other: Scores, titles: tuple[str, str], column: Column, seed: int = 0
) -> list[str]:
    """Return whether one model leads within kinds of names, and whether a lead over all comes from the kinds.

    one, other: scores of two models.
    titles: of the two models.
    column: which score.
    seed: of the bootstraps.
    """
    groups = [latents_by_kind(scores.explained) for scores in (one, other)]
    everything = [group.pop("total") for group in groups]
    common = [kind for kind in groups[0] if min(len(group.get(kind, ())) for group in groups) > 1]
    if not common:
        return ["The two models have no kind of names in common with two latents each."]

    def values(scores: Scores, latents: Iterable[int]) -> list[float]:
        return [scores[column][latent].score for latent in latents]

    def difference(latents: Sequence[Iterable[int]]) -> Mean:
        return difference_interval(values(one, latents[0]), values(other, latents[1]), seed=seed)

    within = {kind: difference([group[kind] for group in groups]) for kind in common}
    words = [f"{kind} {_differs(each)} ({_short(each)})" for kind, each in within.items()]
    leads = {direction(each) for each in within.values()}
    leader = {("rises",): titles[1], ("falls",): titles[0]}.get(tuple(leads))
    verdict = f"{leader} leads within each of these kinds" if leader else "No model clearly leads within all of them"
    whole, shared = difference(everything), difference([sum((g[k] for k in common), []) for g in groups])
    sentences = [
        f"{titles[1]} against {titles[0]}, within kinds: {', '.join(words)}. {verdict}.",
        f"Over all kinds, the score of {titles[1]} {_differs(whole)} ({_short(whole)}).",
    ]
    rest = [sum((group[kind] for kind in group if kind not in common), []) for group in groups]
    if direction(whole) in DIFFERS and direction(whole) != direction(shared) and any(rest):
        outside = [
            f"{len(latents)} of {len(group)} names of {title} (mean score {np.mean(values(scores, latents)):.1f})"
            for scores, latents, group, title in zip((one, other), rest, everything, titles, strict=True)
            if latents
        ]
        sentences.append(
            f"This comes from the kinds of names: {_listed(outside)} are of kinds without a row. Without them, the "
            f"score of {titles[1]} {_differs(shared)} ({_short(shared)})."
        )
    return sentences


def _differs(difference: Mean) -> str:
    return DIFFERS.get(direction(difference), "does not differ measurably")


def _short(value: Mean) -> str:
    return f"{value.mean:.1f} [{value.low:.1f}, {value.high:.1f}]"


def name_counts_sentences(
    metrics: Metrics, rows: Mapping[str, Mapping[int, Mapping]], names: Iterable[str], middle: str
) -> list[str]:
    """Return on how many names the fraction of right names rests, for SAEs of several sizes; nothing without a truth.

    metrics: with those of `report.quality_metrics`.
    rows: explanations, by the SAE's name.
    names: of the SAEs.
    middle: the SAE that the others are compared with.
    """
    known = [name for name in dict.fromkeys(names) if f"concept_accuracy_{name}" in metrics]
    counts = {name: sum(row["outcome"] == "explained" for row in rows[name].values()) for name in known}
    others = [count for name, count in counts.items() if name != middle]
    if middle not in counts or not others:
        return []
    few, many = min(others), max(others)
    ends = (metrics[f"concept_accuracy_{name}_high"] - metrics[f"concept_accuracy_{name}_low"] for name in known)
    return [
        f"*Names right* rests on {counts[middle]} names of the middle layer's SAE, and on "
        f"{few if few == many else f'{few} to {many}'} names of each other SAE in the figure. The intervals are up to "
        f"{max(ends):.2f} wide."
    ]


def training_kind_sentences(metrics: Metrics, names: Mapping[str, str]) -> list[str]:
    """Return in words how each further kind of training differs from the first; nothing without an interval.

    names: kind to the SAE's name; the first is what the others are compared with.
    """
    first, *others = names
    sentences = []
    for kind in others:
        parts = []
        for quantity, words in (("fvu", "the FVU"), ("concept_accuracy", "the fraction of right names")):
            if f"{quantity}_difference_{names[kind]}_low" in metrics:
                difference = read_mean(metrics, f"{quantity}_difference_{names[kind]}")
                parts.append(f"{words} {_differs(difference)} ({difference})")
        if parts:
            silent = (f"{metrics[f'dead_fraction_{names[each]}']:.1%}" for each in (kind, first))
            active = (f"{metrics[f'l0_{names[each]}']:.1f}" for each in (kind, first))
            sentences.append(
                f"{KIND_TITLES[kind]} against {KIND_TITLES[first]}: {'; '.join(parts)}. It has "
                f"{' active latents per held-out token, against '.join(active)}. Of its latents, "
                f"{' are silent there, against '.join(silent)}."
            )
    return sentences
