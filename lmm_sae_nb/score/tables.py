"""Tables of scores: rows by latent, means by kind, metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from lmm_sae_nb.interpret.explainers import KINDS
from lmm_sae_nb.score.iou import Compared
from lmm_sae_nb.score.masks import PAPER
from lmm_sae_nb.support.intervals import Mean, bounds, mean_interval, run_interval
from lmm_sae_nb.truth.label_maps import TrueMasks

BASELINES = ("_random", "_area", "_shuffled")


def explained(
    rows: Mapping[str, Mapping], truth: TrueMasks | None = None, *, most: int | None = None, seed: int = 0
) -> dict[int, tuple[str, str]]:
    """Concept and kind of every latent that was explained, from the rows of explanations.json; at random, if `most`.

    With ground truth, what names no concept of the data set is left out. A kind that the explanation does not tell is
    the ground truth's, or "other". ValueError if fewer than two are left.
    """
    found = {}
    for latent, row in rows.items():
        concept = row["concept"] if row.get("outcome", "explained") == "explained" else None
        known = truth.kinds_of(concept) if truth and concept else []
        if concept and (known or not truth):
            found[int(latent)] = (concept, row.get("kind") or (known or ["other"])[0])
    if len(found) < 2:
        raise ValueError(
            f"{len(found)} of {len(rows)} latents have an explanation that can be scored, scores need two; "
            "run notebooks/03_interpret_features.py with more latents"
        )
    kept = _drawn(sorted(found), most, seed)
    return dict(sorted(((n, found[n]) for n in kept), key=lambda item: (item[1], item[0])))  # a concept's side by side


def _drawn(latents: Sequence, most: int | None, seed: int) -> list:
    """All of them, or `most` at random, in their order."""
    if most is None or len(latents) <= most:
        return list(latents)
    return [latents[n] for n in np.sort(np.random.default_rng(seed).choice(len(latents), most, replace=False))]


def shuffled(named: Mapping[int, tuple[str, str]], seed: int = 0) -> dict[int, str | None]:
    """For each latent the concept of another one, at random, that is not its own; None if all have the same.

    named: concept and kind of each. It is of the same kind where that has another concept: some kinds score higher.
    """
    rng, result = np.random.default_rng(seed), {}
    for latent, (concept, kind) in named.items():
        others = [row for row in named.values() if row[0] != concept]
        pool = [row for row in others if row[1] == kind] or others
        result[latent] = pool[rng.integers(len(pool))][0] if pool else None
    return result


def records(
    named: Mapping[int, tuple[str, str]], found: Mapping[str, Mapping[int, Compared]]
) -> tuple[dict[str, dict], dict[str, dict[str, list[float]]]]:
    """Scores as they are kept: latent to concept, kind and columns; and column to latent to the random runs."""
    rows = {
        str(latent): {"concept": concept, "kind": kind}
        | {key: value for column, scores in found.items() for key, value in scores[latent].columns(column).items()}
        for latent, (concept, kind) in named.items()
    }
    runs = {
        column: {str(latent): list(score.random) for latent, score in scores.items()}
        for column, scores in found.items()
        if all(score.random is not None for score in scores.values())
    }
    return rows, runs


def by_kind(kinds: Mapping[str, str]) -> dict[str, list[str]]:
    """The latents of each kind, Table 1's kinds first, and of all of them under "total"."""
    found = defaultdict(list)
    for latent, kind in kinds.items():
        found[kind].append(latent)
    order = [*KINDS, *sorted(found.keys() - set(KINDS))]
    return {kind: found[kind] for kind in order if kind in found} | {"total": list(kinds)}


def table(
    rows: Mapping[str, Mapping], runs: Mapping[str, Mapping[str, Sequence[float]]], column: str, seed: int = 0
) -> dict[str, dict[str, Mean]]:
    """Table 1 for one column: for each kind and in total the mean score, and the mean of each baseline that there is.

    rows: latent to its columns and `kind`; runs: column to latent to the random baseline's runs. Intervals (99 %) are
    bootstraps over latents, `random`'s over its runs, as the paper's; `gain` is score less random, over latents. Kinds
    with fewer than two latents are left out.
    """
    result = {}
    for kind, latents in by_kind({latent: row["kind"] for latent, row in rows.items() if column in row}).items():
        if len(latents) < 2:
            continue
        series = {"top": [rows[n][column] for n in latents]}
        for name in ("area", "shuffled"):
            series[name] = [value for n in latents if (value := rows[n].get(f"{column}_{name}")) is not None]
        if column in runs:
            series["gain"] = [rows[n][column] - rows[n][f"{column}_random"] for n in latents]
        result[kind] = {name: mean_interval(values, seed=seed) for name, values in series.items() if len(values) > 1}
        if column in runs:
            result[kind]["random"] = run_interval(np.array([runs[column][n] for n in latents]))
    return result


def by_quantity(tables: Mapping[str, Mapping]) -> dict[str, dict[str, Mapping]]:
    """Tables by column (`table`) as tables by what is measured and by mode: "iou_paper_sam" is iou_sam's, of paper."""
    found: dict[str, dict[str, Mapping]] = {}
    for column, rows in tables.items():
        quantity, mode, *segmenter = column.split("_", 2)
        found.setdefault("_".join([quantity, *segmenter]), {})[mode] = rows
    return found


def beside(
    found: Mapping[str, Mapping[str, Mapping[str, Mean]]], published: Mapping[str, tuple[float, float]] | None = None
) -> list[dict[str, str | float | Mean | None]]:
    """One quantity's tables as rows of `plots.table`, the modes of a kind one below the other, with what chance gives.

    found: mode to table; published: by kind, the random baseline and the score, in the mode `paper`.
    """
    told = []
    for kind in dict.fromkeys(kind for rows in found.values() for kind in rows):
        for mode, rows in ((mode, rows) for mode, rows in found.items() if kind in rows):
            cells = {name: rows[kind].get(name) for name in ("top", "random", "area", "shuffled")}
            if published:
                random, score = published.get(kind, (None, None)) if mode == PAPER.name else (None, None)
                cells |= {"published": score, "at random": random}
            told.append({"kind": kind, "mode": mode} | cells)
    return told


def middling(rows: Mapping[str, Mapping], column: str) -> dict[str, int]:
    """For each kind the latent whose score is the median (the upper one of two)."""
    ranked = sorted((n for n in rows if column in rows[n]), key=lambda n: rows[n][column])
    groups = by_kind({n: rows[n]["kind"] for n in ranked})
    return {kind: int(latents[len(latents) // 2]) for kind, latents in groups.items() if kind != "total"}


def columns_of(rows: Mapping[str, Mapping]) -> list[str]:
    """The scores among the columns of `rows`, without their baselines."""
    names = dict.fromkeys(name for row in rows.values() for name in row)
    scores = [name for name in names if name.startswith(("iou_", "clip_"))]
    return [name for name in scores if not name.endswith(BASELINES)]


def summary(
    rows: Mapping[str, Mapping], runs: Mapping[str, Mapping[str, Sequence[float]]], seed: int = 0
) -> dict[str, float]:
    """Every table as a stage's metrics, with how many latents each kind has and what the tables come to.

    COLUMN_ratio: score by random baseline, of IoU; iou_random: iou_strict's baseline by its short name.
    clip_..._kinds_above_random: kinds whose gain has its interval above 0, of the kinds that have one.
    iou_MODE_SEGMENTER_correlation: Pearson's, with the first segmenter's IoU.
    """
    tables = {column: table(rows, runs, column, seed) for column in columns_of(rows)}
    groups = by_kind({latent: row["kind"] for latent, row in rows.items()})
    told: dict[str, float] = {"latents_scored": len(rows)}
    told |= {f"latents_{kind}": len(latents) for kind, latents in groups.items() if kind != "total"}
    told |= flat(tables)
    for column, found in tables.items():
        kinds = {kind: row for kind, row in found.items() if kind != "total" and "gain" in row}
        random = found["total"].get("random") if column.startswith("iou_") else None
        if random and column == "iou_strict":
            told |= bounds("iou_random", random)
        if random and random.mean > 0:
            told[f"{column}_ratio"] = found["total"]["top"].mean / random.mean
        if column.startswith("clip_") and kinds:
            told[f"{column}_kinds_above_random"] = sum(row["gain"].low > 0 for row in kinds.values())
            told[f"{column}_kinds"] = len(kinds)
        first = "_".join(column.split("_")[:2])
        if first != column and (pair := correlation(rows, first, column)) is not None:
            told[f"{column}_correlation"] = pair
    return told


def correlation(rows: Mapping[str, Mapping], one: str, two: str) -> float | None:
    """Pearson's over latents; None if either does not vary."""
    pairs = np.array([[row[one], row[two]] for row in rows.values()])
    return float(np.corrcoef(pairs.T)[0, 1]) if np.ptp(pairs, axis=0).all() else None


def flat(tables: Mapping[str, Mapping[str, Mapping[str, Mean]]]) -> dict[str, float]:
    """Tables by column as a stage's metrics: `column`, `column_random`, `column_kind`, each with _low and _high.

    Baselines are told in total only; gains in total, and for every kind of a CLIP score.
    """
    told = {}
    for column, kinds in tables.items():
        for kind in ("total", *(kind for kind in kinds if kind != "total")):
            for name, found in kinds.get(kind, {}).items():
                if kind == "total" or name == "top" or (name == "gain" and column.startswith("clip_")):
                    words = [column, kind if kind != "total" else "", name if name != "top" else ""]
                    told |= bounds("_".join(filter(None, words)), found)
    return told
