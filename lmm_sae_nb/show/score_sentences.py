"""Say in sentences how well explanations score, beside chance (notebook 04)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmm_sae_nb.score.scores import Column
from lmm_sae_nb.show.panel_metrics import PanelMetric
from lmm_sae_nb.show.panel_sentences import against_controls, controls_in_short
from lmm_sae_nb.show.report import PageResult, across_saes, over_saes, percent, published_numbers
from lmm_sae_nb.support.intervals import Mean, read_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lmm_sae_nb.score.tables import KindTable
    from lmm_sae_nb.show.panel import Panel
    from lmm_sae_nb.show.seed_study import SeedStudy
    from lmm_sae_nb.support.stages import Metrics

STAGE = "score"
FEW = 20  # latents; a kind with fewer is not counted
PAPER, STRICT = Column("iou", "paper"), Column("iou", "strict")
IOU = {"IoU in the paper's mode": PanelMetric("score", "iou_paper"), "strict IoU": PanelMetric("score", "iou_strict")}
CLIP = {"CLIP score": PanelMetric("score", "clip_paper")}
CHANCES = {"area": "with the activation moved", "random": "on random images", "shuffled": "with another name"}
NO_KIND = "in no kind"


def modes_sentence(tables: Mapping[Column, KindTable]) -> str:
    """Return how the mean IoU changes from the paper's mode to the strict one, and for which kinds it does most.

    tables: of `kind_tables`, both modes among them.
    """
    paper, strict = tables[PAPER], tables[STRICT]
    changes = {kind: (row.score.mean, strict[kind].score.mean) for kind, row in paper.items() if kind in strict}
    before, after = changes.pop("total")
    text = f"From the paper's mode to the strict one, the mean IoU goes from {before:.2f} to {after:.2f}."
    if not changes:
        return text
    gaps = {kind: high - low for kind, (low, high) in changes.items()}
    most, least = (
        f"{kind} ({changes[kind][0]:.2f} to {changes[kind][1]:.2f})"
        for kind in (max(gaps, key=gaps.get), min(gaps, key=gaps.get))
    )
    return f"{text} It changes most for the kinds {most} and {least}."


def score_findings(
    metrics: Metrics,
    tables: Mapping[Column, KindTable],
    by_truth: Sequence[Mapping[str, object]] = (),
    judged: Mapping[str, float] | None = None,
    *,
    reference: str = "ground truth",
    judge: str = "",
) -> list[str]:
    """Return how explanations score beside chance, how far a segmenter can be trusted, and what a judge accepts.

    metrics: of the stage `score`.
    tables: of `kind_tables`.
    by_truth: rows of `means_by_truth`; empty without a ground truth.
    judged: metrics of the stage `judge`; None or empty if nobody judged.
    reference: name of the first segmenter.
    judge: name of the model that judged; "" for the ground truth.
    """
    counted = _kinds_above_chance(metrics, tables)
    return [
        *_strict_iou(tables, counted, reference),
        *_by_other_segmenters(metrics, tables),
        *_wrong_names(by_truth),
        *_clip_scores(counted),
        *_accepted(judged or {}, judge),
    ]


def scores_of_others(study: SeedStudy | None, panel: Panel | None, scores: Mapping[str, str]) -> list[str]:
    """Return what SAEs of other seeds and control SAEs reach.

    study, panel: None if there is none; then nothing is said of its SAEs.
    scores: metric to its words, of those that the study has.
    """
    return [
        *across_saes(study, STAGE, scores, "{:.3f}".format),
        *against_controls(panel, IOU),
        *against_controls(panel, CLIP, "{:.1f}"),
    ]


def score_result(metrics: Metrics, study: SeedStudy | None = None, panel: Panel | None = None) -> PageResult:
    """Return the scores beside chance, beside the paper's.

    metrics: of the stage `score`; without a CLIP score nothing is said of it.
    study, panel: of other seeds, and of control SAEs; None if there is none.
    """
    paper = published_numbers(STAGE)
    clip, seeds = _beside_chance(metrics, "clip_paper", 1), over_saes(study, STAGE, "iou_paper", "{:.2f}".format)
    return PageResult(
        "on images that excite a latent, the IoU with its concept (in the paper's mode) is "
        f"{_beside_chance(metrics, 'iou_paper', 3)}.{f' The CLIP score is {clip}.' if clip else ''} In brackets: 99% "
        f"intervals; {metrics['latents_scored']} latents.{f' IoU over seeds: {seeds}.' if seeds else ''}",
        f"an IoU of {paper['iou_paper']:.2f} against {paper['iou_paper_random']:.3f} on random images, and a CLIP "
        f"score of {paper['clip_paper']:.1f} against {paper['clip_paper_random']:.1f} (Table 1). It does not move the "
        "activation.",
        "we believe that drawings are easier, because their concepts have clear borders; we did not test it."
        f"{_clip_scale(metrics, paper)}",
        controls_in_short(panel, IOU | CLIP),
    )


# ---- IoU ------------------------------------------------------------------------------------------------------------


def _kinds_above_chance(metrics: Metrics, tables: Mapping[Column, KindTable]) -> dict[str, str]:
    """Return in how many kinds a score's interval lies above that of a chance, and not in which, by metric."""
    counted = {}
    for column, table in tables.items():
        for chance in CHANCES:
            pairs = {
                kind: (row.score, against)
                for kind, row in table.items()
                if metrics.get(f"latents_{kind}", 0) >= FEW and (against := getattr(row, chance))
            }
            others = [kind for kind, (score, against) in pairs.items() if score.low <= against.high]
            but = f" (not {', '.join(others)})" if others else ""
            if pairs:
                counted[f"{column}_{chance}"] = f"in {len(pairs) - len(others)} of {len(pairs)} kinds{but}"
    return counted


def _strict_iou(tables: Mapping[Column, KindTable], counted: Mapping[str, str], reference: str) -> list[str]:
    total = tables[STRICT]["total"]
    return [
        f"With {reference} as segmenter, the strict IoU of explained latents is {total.score}. With the activation "
        f"moved it is {total.area}, with another name {total.shuffled}, on random images {total.random}.",
        "The interval of the strict IoU lies above that of the moved activation "
        f"{counted.get('iou_strict_area', NO_KIND)}. Kinds with fewer than {FEW} latents are not counted.",
        "We believe that random images are a weak opponent because most latents are silent there. We did not test it.",
    ]


def _by_other_segmenters(metrics: Metrics, tables: Mapping[Column, KindTable]) -> list[str]:
    return [
        f"By {column.segmenter}, the strict IoU is {read_mean(metrics, str(column))} against "
        f"{read_mean(metrics, 'iou_strict')}. The correlation of the two over latents is "
        f"{read_mean(metrics, f'{column}_correlation')}."
        for column in tables
        if f"{column}_correlation" in metrics and column.mode == "strict"
    ]


def _wrong_names(by_truth: Sequence[Mapping[str, object]]) -> list[str]:
    wrong = next((row for row in by_truth if row["names"] == "wrong"), {})
    return [
        f"For wrong names, {words.split(', ')[1]} (strict IoU): {value}."
        + (" So it marks things that only look like the concept." if value.low > 0 else "")
        for words, value in wrong.items()
        if words.startswith("strict") and " less " in words and isinstance(value, Mean)
    ]


# ---- CLIP and judges ------------------------------------------------------------------------------------------------


def _clip_scores(counted: Mapping[str, str]) -> list[str]:
    sentences = []
    for mode, chance, words in (
        ("paper", "random", "The CLIP score of whole images is higher than on random images"),
        ("strict", "area", "The strict CLIP score is higher than for the moved region"),
    ):
        if (found := counted.get(f"clip_{mode}_{chance}")) is not None:
            other = counted.get(f"clip_{mode}_shuffled", NO_KIND)
            sentences.append(f"{words} {found}, and higher than with another name {other}.")
    return sentences


def _accepted(judged: Mapping[str, float], judge: str) -> list[str]:
    if "judged" not in judged:
        return []
    text = f"The judge ({judge or 'ground truth'}) accepts {percent(read_mean(judged, 'judged'), 1)} of the names"
    if "judged_shuffled" in judged:
        text += f", and {percent(read_mean(judged, 'judged_shuffled'), 1)} of other names"
    return [f"{text}.{'' if judge else ' No person and no model has judged here, so Table 2 is not reproduced.'}"]


def _beside_chance(metrics: Metrics, name: str, digits: int) -> str:
    """Return a score and what chance gives, each with its interval; empty if it was not measured."""
    parts = {"": "", **{f"_{chance}": f"{words} " for chance, words in CHANCES.items()}}
    known = {words: read_mean(metrics, name + end) for end, words in parts.items() if name + end in metrics}
    shown = {words: [f"{number:.{digits}f}" for number in mean] for words, mean in known.items()}
    return ", ".join(f"{words}{mean} [{low}, {high}]" for words, (mean, low, high) in shown.items())


def _clip_scale(metrics: Metrics, paper: Mapping[str, float]) -> str:
    if "clip_paper_random" not in metrics:
        return ""
    ours, theirs = (f"{of['clip_paper']:.1f} - {of['clip_paper_random']:.1f}" for of in (metrics, paper))
    return (
        " Our small CLIP has another scale than ViT-B/32, so compare its scores only with chance: "
        f"{ours} here, {theirs} in the paper."
    )
