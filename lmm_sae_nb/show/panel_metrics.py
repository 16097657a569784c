"""The metrics of a panel that page A4 shows, in groups; each has the words of its column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class PanelMetric(NamedTuple):
    """A metric of the panel: the part that measured it, and its name."""

    part: str
    metric: str


def _of(part: str, titles: Mapping[str, str]) -> dict[str, PanelMetric]:
    """Return the metrics of one part, title to metric."""
    return {title: PanelMetric(part, metric) for title, metric in titles.items()}


DETECTION = _of(
    "detect",
    {
        "concepts detected": "concepts_detected",
        "with maps of other scenes": "concepts_detected_by_chance",
        "concepts named": "concept_recall",
    },
)
NAMING = _of(
    "interpret",
    {"explained": "explained_fraction", "names right": "concept_accuracy", "guessed names": "concept_accuracy_guessed"},
) | _of("score", {"strict IoU": "iou_strict", "moved": "iou_strict_area"})
STEERING = _of(
    "steer",
    {
        "objects named, of 100": "named_of_100",
        "by random latents": "control_named_of_100",
        "fluency": "fluency",
        "of unsteered answers": "unsteered_fluency",
        "dose": "dose",
    },
) | _of("steer_highest", {"named at the highest dose": "named_of_100", "answers it changes": "changed_of_100"})
OBJECT_LATENTS = _of("steer", {"object latents": "object_latents", "clamped": "objects_steered"})
MODEL = _of("fidelity", {"FVU": "fvu", "loss recovered": "loss_recovered"}) | _of(
    "attribute", {"linear attribution": "spearman_linear"}
)
OF_LATENTS = (
    _of("monosemanticity", {"monosemanticity, CLIP": "monosemanticity_clip"})
    | _of("monosemanticity", {"monosemanticity, truth": "monosemanticity_true"})
    | _of("absorption", {"absorption": "absorption"})
    | _of("consistency", {"consistency": "consistency_matched"})
    | _of("modality", {"modality": "modality"})
)
OF_NAMES = (
    _of("detection_scoring", {"detection scoring, CLIP": "detection_clip_auroc"})
    | _of("detection_scoring", {"detection scoring, truth": "detection_truth"})
    | _of("detection_scoring", {"truth, other name": "detection_truth_shuffled"})
    | _of("probing", {"1-sparse probing": "probe_1_f1", "5-sparse probing": "probe_5_f1"})
)
SELECTIVITY = _of(
    "selectivity",
    {
        "selectivity": "selectivity",
        "with another name": "selectivity_other_name",
        "change inside the item": "selectivity_on_patches",
        "if spread evenly": "selectivity_even",
    },
)
BY_EXEMPLARS = _of(
    "steering_names",
    {
        "exemplars: named": "exemplars_explained",
        "exemplars: right": "exemplars_accuracy",
        "both: right": "agreed_accuracy",
    },
)
BY_STEERING = _of(
    "steering_names",
    {
        "steering: named": "steering_explained",
        "steering: right": "steering_accuracy",
        "steering: guessed": "steering_guessed",
    },
)
CHANCES = (
    "with maps of other scenes", "guessed names", "moved", "by random latents", "of unsteered answers",
    "dose", "named at the highest dose", "answers it changes", "truth, other name", "with another name",
    "if spread evenly",
)  # fmt: skip
# those that the exam examines: all of the groups but what chance gives, and but explaining by steering
EXAMINED = {
    title: at
    for title, at in (DETECTION | NAMING | STEERING | MODEL | OF_LATENTS | OF_NAMES | SELECTIVITY).items()
    if title not in CHANCES
}
ONE_TABLE = {
    title: EXAMINED[title]
    for title in ("concepts detected", "names right", "strict IoU", "objects named, of 100", "fluency")
}
DRAWN = {
    title: EXAMINED[title]
    for title in (
        "concepts detected", "concepts named", "explained", "names right", "strict IoU", "objects named, of 100",
        "1-sparse probing", "monosemanticity, CLIP",
    )
}  # fmt: skip
KINDS = ("scene", "object", "part", "material", "texture", "colour", "face", "word")
BY_KIND = {
    "concepts detected": PanelMetric("detect", "concepts_detected"),
    "concepts detected and named": PanelMetric("detect", "concept_recall"),
    "names right": PanelMetric("interpret", "concept_accuracy"),
    "strict IoU": PanelMetric("score", "iou_strict"),
}


def of_kinds(at: PanelMetric, kinds: Sequence[str] = KINDS) -> dict[str, PanelMetric]:
    """Return a metric of each kind of concept, by kind."""
    return {kind: PanelMetric(at.part, f"{at.metric}_{kind}") for kind in kinds}


STEERED_KINDS = ("object", *(kind for kind in KINDS if kind not in ("object", "part")))  # "part" has no question
STEERED_BY_KIND = PanelMetric("steer_kinds", "named_of_100")
# ways that need no named latent, as `direction_kinds` measures them
WAYS_BY_KIND = {
    "latent": "one latent for each concept", "detector": "the latent that detects it best",
    "decoder": "adding the latent's direction", "difference": "no SAE: difference of means",
    "probe": "no SAE: logistic probe", "prompt": "no SAE: prompt",
}  # fmt: skip
