"""Worked examples and the gallery, against the masks that the scores themselves use."""

import numpy as np
import pytest
from scored import corner, exemplar, scores_of

from lmm_sae_nb.score.examples import median_overlaps, overlaps
from lmm_sae_nb.score.masks import PAPER, STRICT, exemplar_maps, ious
from lmm_sae_nb.score.scores import Column, Comparison
from lmm_sae_nb.show import plots

LEFT = np.zeros((1, 8, 8), bool)
LEFT[..., :4] = True
SEGMENTERS = {
    "truth": lambda indices, concept: [LEFT] * len(indices),
    "other": lambda indices, concept: [~LEFT] * len(indices),
}


def test_a_worked_example_has_the_masks_of_every_mode_and_segmenter():
    one = exemplar(0, corner(4, 3))
    found = overlaps(one, "cat", SEGMENTERS, [PAPER, STRICT])
    assert [each.title.split(":")[0] for each in found] == [
        "mode paper, truth",
        "mode strict, truth",
        "mode paper, other",
        "mode strict, other",
    ]
    assert found[1].iou == pytest.approx(32 / 48)
    for each, (find, mode) in zip(found, [(f, m) for f in SEGMENTERS.values() for m in (PAPER, STRICT)], strict=True):
        assert each.iou == ious(exemplar_maps([one]), "cat", find, mode)[0]
        assert each.iou == (each.active & each.concept).sum() / (each.active | each.concept).sum()
    assert len(plots.overlaps(found, exemplar=one)) == 5


def test_the_gallery_shows_the_median_latent_of_each_kind_with_its_mean():
    scores = scores_of(
        ["object", "object", "object", "colour"],
        {Column("iou", "strict"): [Comparison(0.9), Comparison(0.1), Comparison(0.25), Comparison(0.75)]},
    )
    shown = {n: [exemplar(n, corner(4, 2))] for n in scores.explained}
    found = median_overlaps(scores, shown, SEGMENTERS["truth"], STRICT)
    assert [each.title for each in found] == ["object, concept 2: IoU\xa00.25", "colour, concept 3: IoU\xa00.75"]
    assert [each.iou for each in found] == [1, 1]
