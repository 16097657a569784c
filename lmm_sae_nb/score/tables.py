"""Summarise the scores of latents: means by kind of concept (Table 1), and the metrics of the stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import pearsonr

from lmm_sae_nb.score.scores import Column, Comparison, Explained, Scores, latents_by_kind
from lmm_sae_nb.support.intervals import Mean, bounds, mean_interval, run_interval
from lmm_sae_nb.truth.label_maps import LabelMaps

SERIES = ("own images", "moved", "other name", "random images")  # a score, and three kinds of chance
NAMED, TRULY = "named as this kind (scored)", "truly of this kind (asked)"


@dataclass(frozen=True)
class MeanComparison:
    """The mean score of several latents, and what chance gives; None where a chance has no meaning.

    Intervals are 99% bootstraps over latents; `random`'s is over its runs, as in the paper.

    score: on the latents' own images.
    random, area, shuffled: the means of `Comparison`'s.
    gain: score less random, latent by latent.
    """

    score: Mean
    random: Mean | None = None
    area: Mean | None = None
    shuffled: Mean | None = None
    gain: Mean | None = None

    def series(self) -> dict[str, Mean]:
        """Return the score and what chance gives by the names that tables and figures use, without what is None."""
        means = dict(zip(SERIES, (self.score, self.area, self.shuffled, self.random), strict=True))
        return {name: mean for name, mean in means.items() if mean}

    def metrics(self, name: str) -> dict[str, float]:
        """Return the means and their ends as metrics: `name`, `name_low`, `name_high`, `name_random`, …"""
        parts = {"": self.score, "_area": self.area, "_shuffled": self.shuffled}
        parts |= {"_gain": self.gain, "_random": self.random}
        return {key: x for end, mean in parts.items() if mean for key, x in bounds(name + end, mean).items()}


KindTable = dict[str, MeanComparison]  # by kind of concept, and "total"


def kind_table(scores: Scores, column: Column, seed: int = 0) -> KindTable:
    """Return Table 1 for one column: the means of each kind, and of all latents under "total".

    A kind with fewer than two latents has no interval and is left out.

    seed: of the bootstrap.
    """
    by_latent, result = scores[column], {}
    for kind, latents in latents_by_kind(scores.explained).items():
        if len(latents) > 1:
            result[kind] = _compare([by_latent[latent] for latent in latents], seed)
    return result


def _compare(rows: list[Comparison], seed: int) -> MeanComparison:
    def mean(values: list[float | None]) -> Mean | None:
        known = [value for value in values if value is not None]
        return mean_interval(known, seed=seed) if len(known) > 1 else None

    runs = None if any(row.random is None for row in rows) else np.array([row.random for row in rows])
    gains = [] if runs is None else [row.score - float(np.mean(row.random)) for row in rows]
    return MeanComparison(
        score=mean([row.score for row in rows]),
        random=None if runs is None else run_interval(runs),
        area=mean([row.area for row in rows]),
        shuffled=mean([row.shuffled for row in rows]),
        gain=mean(gains),
    )


def series_by_kind(table: KindTable) -> dict[str, dict[str, Mean]]:
    """Return a table as kind to the means of `MeanComparison.series`, for `plots.mean_panels`."""
    return {kind: means.series() for kind, means in table.items()}


def kind_tables(scores: Scores, seed: int = 0) -> dict[Column, KindTable]:
    """Return `kind_table` of every column."""
    return {column: kind_table(scores, column, seed) for column in scores.columns}


def score_metrics(scores: Scores, tables: Mapping[Column, KindTable]) -> dict[str, float]:
    """Return the metrics of the scores, by name; COLUMN is `str(column)`.

    - latents_scored, latents_KIND: how many latents were scored.
    - COLUMN, COLUMN_area, COLUMN_shuffled, COLUMN_gain, COLUMN_random: means over all latents.
    - COLUMN_KIND, COLUMN_KIND_random: the means of one kind; of a CLIP score also COLUMN_KIND_gain.
    - iou_…_ratio: score by random baseline. iou_random: iou_strict_random by its short name.
    - clip_…_kinds_above_random, clip_…_kinds: kinds whose gain is certainly above 0, of the kinds that have a gain.
    - iou_…_SEGMENTER_correlation: with the IoU by the first segmenter, over latents.

    tables: of `kind_tables`.
    """
    groups = latents_by_kind(scores.explained)
    metrics: dict[str, float] = {"latents_scored": len(groups.pop("total"))}
    metrics |= {f"latents_{kind}": len(latents) for kind, latents in groups.items()}
    for column, table in tables.items():
        metrics |= _column_metrics(column, table)
        first = Column(column.quantity, column.mode)
        if first != column and (value := correlation(scores, first, column)) is not None:
            metrics |= bounds(f"{column}_correlation", value)
    return metrics


def _column_metrics(column: Column, table: KindTable) -> dict[str, float]:
    total = table["total"]
    kinds = {kind: row for kind, row in table.items() if kind != "total"}
    metrics = total.metrics(str(column))
    for kind, row in kinds.items():
        metrics |= bounds(f"{column}_{kind}", row.score)
        if row.random:
            metrics |= bounds(f"{column}_{kind}_random", row.random)
        if column.quantity == "clip" and row.gain:
            metrics |= bounds(f"{column}_{kind}_gain", row.gain)
    if column.quantity == "iou" and total.random and total.random.mean > 0:
        metrics[f"{column}_ratio"] = total.score.mean / total.random.mean
    if column == Column("iou", "strict") and total.random:
        metrics |= bounds("iou_random", total.random)
    gains = [row.gain for row in kinds.values() if row.gain]
    if column.quantity == "clip" and gains:
        metrics[f"{column}_kinds_above_random"] = sum(gain.low > 0 for gain in gains)
        metrics[f"{column}_kinds"] = len(gains)
    return metrics


def correlation(scores: Scores, one: Column, other: Column, level: float = 0.99) -> Mean | None:
    """Return Pearson's correlation of two columns over latents, with Fisher's interval.

    None if either column does not vary, or if there are fewer than four latents.
    """
    pairs = np.array([[scores[column][latent].score for latent in scores.explained] for column in (one, other)])
    if pairs.shape[1] < 4 or not np.ptp(pairs, axis=1).all():
        return None
    found = pearsonr(*pairs)
    low, high = found.confidence_interval(level)
    return Mean(float(found.statistic), float(low), float(high))


def table_1(
    tables: Mapping[Column, KindTable], published: Mapping[str, float] | None = None
) -> dict[str, list[dict[str, str | float | Mean | None]]]:
    """Return Table 1 for `plots.table`: caption to rows, of each kind one row in each mode.

    published: metric to the paper's number, such as "iou_paper_scene" and "iou_paper_scene_random"; they stand
        beside the mode `paper`.
    """
    result = {}
    for quantity, segmenter in dict.fromkeys(column[::2] for column in tables):
        caption = {"iou": "IoU", "clip": "CLIP score"}[quantity] + (f" by {segmenter}" if segmenter else "")
        chosen = {column: table for column, table in tables.items() if column[::2] == (quantity, segmenter)}
        kinds = dict.fromkeys(kind for table in chosen.values() for kind in table)
        result[caption] = [
            _row(column, kind, table[kind], published)
            for kind in kinds
            for column, table in chosen.items()
            if kind in table
        ]
    return result


def _row(
    column: Column, kind: str, means: MeanComparison, published: Mapping[str, float] | None
) -> dict[str, str | float | Mean | None]:
    row = {"kind": kind, "mode": column.mode} | dict.fromkeys(SERIES) | means.series()
    if not published:
        return row
    name = f"{Column(column.quantity, column.mode)}_{kind}".removesuffix("_total")
    return row | {"the paper": published.get(name), "the paper, random": published.get(f"{name}_random")}


def median_latents(scores: Scores, column: Column) -> dict[str, int]:
    """Return for each kind the latent of median score; of two the upper one."""
    by_latent = scores[column]
    groups = {kind: latents for kind, latents in latents_by_kind(scores.explained).items() if kind != "total"}
    ranked = {kind: sorted(latents, key=lambda latent: by_latent[latent].score) for kind, latents in groups.items()}
    return {kind: latents[len(latents) // 2] for kind, latents in ranked.items()}


def means_by_truth(
    scores: Scores, explanations: Mapping[int, Mapping], first: str = "ground truth"
) -> list[dict[str, str | int | float | Mean]]:
    """Return the mean IoU of right names and of wrong names as rows for `plots.table`.

    A name is right if it is the very concept that the latent's images show. Where another segmenter than the first has
    scored, a row also has by how much its IoU is higher, latent by latent. Intervals are 99% bootstraps over latents.

    explanations: latent to its row with `concept` and `true_concept`.
    first: the name of the first segmenter, which its columns do not have.
    """
    columns, rows = [column for column in scores.columns if column.quantity == "iou"], []
    for names, right in (("right", True), ("wrong", False)):
        latents = [
            latent
            for latent in scores.explained
            if (explanations[latent]["concept"] == explanations[latent]["true_concept"]) is right
        ]
        means: dict[str, float | Mean] = {}
        for column in columns if latents else ():
            values = np.array([scores[column][latent].score for latent in latents])
            means[f"{column.mode}, by {column.segmenter or first}"] = _mean(values)
            if column.segmenter and column._replace(segmenter="") in columns:
                known = [scores[column._replace(segmenter="")][latent].score for latent in latents]
                means[f"{column.mode}, {column.segmenter} less {first}"] = _mean(values - known)
        rows.append({"names": names, "latents": len(latents)} | means)
    return rows


def _mean(values: np.ndarray) -> float | Mean:
    return mean_interval(values) if len(values) > 1 else float(values.mean())


def values_by_kind(scores: Scores, column: Column) -> dict[str, list[float]]:
    """Return each latent's score in one column, by kind of concept, for `plots.calibration`."""
    groups = latents_by_kind(scores.explained)
    return {kind: [scores[column][n].score for n in latents] for kind, latents in groups.items() if kind != "total"}


def kind_counts(explained: Mapping[int, Explained], explanations: Mapping[int, Mapping]) -> list[dict[str, str | int]]:
    """Return how many latents of each kind are scored, as rows for `plots.table`.

    With ground truth a row also has the number of latents that were asked about and really show this kind.

    explanations: latent to its row in explanations.json.
    """
    present = Counter(row["true_kind"] for row in explanations.values() if row.get("true_kind"))
    rows = []
    for kind, latents in latents_by_kind(explained).items():
        asked = {TRULY: present.total() if kind == "total" else present[kind]}
        rows.append({"kind": kind, NAMED: len(latents)} | (asked if present else {}))
    return rows


def explanation_metrics(explanations: Mapping[int, Mapping], truth: LabelMaps | None) -> dict[str, int]:
    """Return as metrics what the explained latents are drawn from; nothing without ground truth.

    - names_unknown: names that the ground truth does not know, which cannot be scored.
    - latents_showing_KIND: latents that were asked about and show a concept of this kind.
    """
    if truth is None:
        return {}
    names = [row["concept"] for row in explanations.values() if row["concept"]]
    present = Counter(row["true_kind"] for row in explanations.values() if row.get("true_kind"))
    unknown = {"names_unknown": sum(not truth.kinds_of(name) for name in names)}
    return unknown | {f"latents_showing_{kind}": count for kind, count in sorted(present.items())}
