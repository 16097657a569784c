"""Show what an IoU compares, on single images: the active pixels, the concept's pixels, and where they meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.score.masks import FindConcept, Mode, activation_mask, concept_mask, exemplar_maps, iou
from lmm_sae_nb.score.scores import Column, Scores
from lmm_sae_nb.score.tables import median_latents
from lmm_sae_nb.truth.label_maps import Mask


@dataclass(frozen=True)
class Overlap:
    """Two masks over one image, for `plots.overlaps`.

    title: what stands above the image.
    active: the pixels in which the latent counts as active.
    concept: the pixels in which the concept counts as present.
    iou: of the two.
    """

    title: str
    image: Image.Image
    active: Mask
    concept: Mask
    iou: float


def overlap(
    exemplar: Exemplar, concept: str, find: FindConcept, mode: Mode, title: str, score: float | None = None
) -> Overlap:
    """Compare where a latent is active on one image with where the concept is.

    find: says where the concept is.
    title: a number is added to it.
    score: that number; the IoU on this image unless given.
    """
    seen = exemplar_maps([exemplar])[0]
    active = activation_mask(seen, mode)
    wanted = concept_mask(find([seen.image_index], concept)[0], seen.size, mode)
    fit = iou(active, wanted)
    number = f"IoU\N{NO-BREAK SPACE}{fit if score is None else score:.2f}"  # one word, where the title is wrapped
    return Overlap(f"{title}: {number}", exemplar.image, active, wanted, fit)


def overlaps(
    exemplar: Exemplar, concept: str, segmenters: Mapping[str, FindConcept], modes: Sequence[Mode]
) -> list[Overlap]:
    """Compare one image in every mode, by every segmenter: a worked example, as in Figure 3."""
    return [
        overlap(exemplar, concept, find, mode, f"mode {mode.name}, {name}")
        for name, find in segmenters.items()
        for mode in modes
    ]


def median_overlaps(
    scores: Scores, exemplars: Mapping[int, Sequence[Exemplar]], find: FindConcept, mode: Mode
) -> list[Overlap]:
    """Show of each kind the latent of median IoU on its first image: a gallery, as in Figure 4.

    The number in a title is the latent's mean IoU over its images.

    exemplars: by latent.
    find: the first of the segmenters that made the scores.
    """
    column, gallery = Column("iou", mode.name), []
    for kind, latent in median_latents(scores, column).items():
        concept, score = scores.explained[latent].concept, scores[column][latent].score
        gallery.append(overlap(exemplars[latent][0], concept, find, mode, f"{kind}, {concept}", score))
    return gallery
