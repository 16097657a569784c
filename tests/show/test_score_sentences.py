"""What page 04 says of scores: against numbers read by hand, also without a ground truth, a judge or a panel."""

import pytest

from lmm_sae_nb.score.scores import Column
from lmm_sae_nb.score.tables import MeanComparison
from lmm_sae_nb.show.panel import MeasuredPart, Panel, PanelSAE
from lmm_sae_nb.show.score_sentences import modes_sentence, score_findings, score_result, scores_of_others
from lmm_sae_nb.show.seed_study import Measured, SeedStudy
from lmm_sae_nb.support.intervals import Mean

PAPER, STRICT, OTHER = Column("iou", "paper"), Column("iou", "strict"), Column("iou", "strict", "clipseg")


def around(middle, half=0.1):
    return Mean(middle, middle - half, middle + half)


def row(score, area=None, random=None, shuffled=None, half=0.1):
    """Means whose intervals reach as far as `half` to each side."""
    return MeanComparison(
        around(score, half), *(None if each is None else around(each, half) for each in (random, area, shuffled))
    )


TABLES = {
    PAPER: {"scene": row(0.75), "object": row(0.25), "word": row(0.5), "total": row(0.5)},
    STRICT: {
        "scene": row(0.5, 0.375, 0.0, 0.0),  # its interval meets that of the moved activation
        "object": row(0.5, 0.125, 0.0, 0.0),
        "word": row(0.5, 0.125, 0.0, 0.0),  # of too few latents
        "total": row(0.5, 0.25, 0.0, 0.125),
    },
}
METRICS = {"latents_scored": 59, "latents_scene": 20, "latents_object": 20, "latents_word": 19,
           "iou_paper": 0.5, "iou_paper_low": 0.4, "iou_paper_high": 0.6}  # fmt: skip


def test_the_kinds_that_change_most_between_the_modes_are_named():
    assert modes_sentence(TABLES) == (
        "From the paper's mode to the strict one, the mean IoU goes from 0.50 to 0.50. It changes most for the kinds "
        "object (0.25 to 0.50) and scene (0.75 to 0.50)."
    )
    few = {column: {"total": table["total"]} for column, table in TABLES.items()}
    assert modes_sentence(few) == "From the paper's mode to the strict one, the mean IoU goes from 0.50 to 0.50."


def test_without_truth_segmenter_clip_and_judge_only_the_strict_iou_is_told():
    assert score_findings(METRICS, TABLES, reference="clipseg") == [
        "With clipseg as segmenter, the strict IoU of explained latents is 0.500 [0.400, 0.600]. With the activation "
        "moved it is 0.250 [0.150, 0.350], with another name 0.125 [0.025, 0.225], on random images 0.000 [-0.100, "
        "0.100].",
        "The interval of the strict IoU lies above that of the moved activation in 1 of 2 kinds (not scene). Kinds "
        "with fewer than 20 latents are not counted.",
        "We believe that random images are a weak opponent because most latents are silent there. We did not test it.",
    ]


def test_with_few_latents_of_each_kind_none_is_counted():
    few = METRICS | {"latents_scene": 3, "latents_object": 19}
    assert "moved activation in no kind. Kinds with" in score_findings(few, TABLES)[1]


def test_a_second_segmenter_stands_beside_the_first():
    metrics = METRICS | {"iou_strict": 0.5, "iou_strict_clipseg": 0.625, "iou_strict_clipseg_correlation": 0.75}
    (sentence,) = score_findings(metrics, TABLES | {OTHER: TABLES[STRICT]})[3:]
    assert sentence == (
        "By clipseg, the strict IoU is 0.625 against 0.5. The correlation of the two over latents is 0.75."
    )


@pytest.mark.parametrize(
    ("less", "end"), [(0.25, " So it marks things that only look like the concept."), (0.0, "")]
)  # fmt: skip
def test_a_segmenter_that_gives_wrong_names_more_marks_what_only_looks_alike(less, end):
    right, wrong = ({"names": names, "latents": 9, "strict, by clipseg": around(0.5),
                     "paper, clipseg less ground truth": around(0.25), "strict, clipseg less ground truth": around(x)}
                    for names, x in (("right", 0.5), ("wrong", less)))  # fmt: skip
    (sentence,) = score_findings(METRICS, TABLES, [right, wrong])[3:]
    assert sentence == f"For wrong names, clipseg less ground truth (strict IoU): {around(less)}.{end}"
    assert len(score_findings(METRICS, TABLES, [right, {"names": "wrong", "latents": 0}])) == 3
    alone = wrong | {"strict, clipseg less ground truth": 0.25}  # of one latent, without an interval
    assert len(score_findings(METRICS, TABLES, [right, alone])) == 3


def test_clip_scores_are_counted_by_kind_against_two_chances():
    clip = {
        Column("clip", "paper"): {
            "scene": row(30, random=10, shuffled=29.9),
            "object": row(20, random=10, shuffled=5),
            "total": row(25, random=10, shuffled=15),
        },
        Column("clip", "strict"): {
            "scene": row(30, area=31, shuffled=10),
            "object": row(20, area=21, shuffled=10),
            "total": row(25, area=26, shuffled=10),
        },
    }
    whole, strict = score_findings(METRICS, TABLES | clip)[3:]
    assert whole == (
        "The CLIP score of whole images is higher than on random images in 2 of 2 kinds, and higher than with another "
        "name in 1 of 2 kinds (not scene)."
    )
    assert strict == (
        "The strict CLIP score is higher than for the moved region in 0 of 2 kinds (not scene, object), and higher "
        "than with another name in 2 of 2 kinds."
    )


def test_a_judge_is_named_and_the_ground_truth_is_called_no_judge():
    own = {"judged": 0.95, "judged_low": 0.9, "judged_high": 1.0}
    others = {"judged_shuffled": 0.0, "judged_shuffled_low": 0.0, "judged_shuffled_high": 0.0125}
    nobody = " No person and no model has judged here, so Table 2 is not reproduced."

    def told(judged, judge=""):
        return score_findings(METRICS, TABLES, (), judged, judge=judge)[3:]

    accepted = "accepts 95.0% (90.0 to 100.0%) of the names"
    assert told(own) == [f"The judge (ground truth) {accepted}.{nobody}"]
    assert told(own | others, "org/it") == [
        f"The judge (org/it) {accepted}, and 0.0% (0.0 to 1.2%) of other names."
    ]  # fmt: skip
    assert told({}) == told(None) == told({"replies_failed": 3}, "org/it") == []


STUDY = SeedStudy("", "", {}, {}, [0, 1, 2], [], {"score": {"iou_paper": Measured.of([0.25, 0.5, 0.4])}})
PANEL = Panel("", "", {}, {}, [], {
    group: PanelSAE(f"a {group}", group, {"score": MeasuredPart(dict(iou_paper=x, iou_strict=x, clip_paper=y), 1.0)})
    for group, x, y in (("seed", 0.5, 30.0), ("control", 0.25, 31.0))
})  # fmt: skip


def test_other_seeds_come_before_controls_and_clip_has_one_digit():
    seeds, *ious, clip = scores_of_others(STUDY, PANEL, {"iou_paper": "IoU", "iou_strict": "strict"})
    assert seeds == "IoU: median of 3 SAEs: 0.400, lowest 0.250, highest 0.500."
    assert [text.partition(",")[0] for text in ious] == ["IoU in the paper's mode", "Strict IoU"]
    assert all(text.endswith(": 0.50 against 0.25. No control is as high.") for text in ious)
    assert ": 30.0 against 31.0 (all are higher). So a high value does not show" in clip
    assert scores_of_others(None, None, {"iou_paper": "IoU"}) == []


def test_the_result_without_clip_seeds_and_panel_is_the_iou_alone():
    ours, paper, why, controls = score_result(METRICS)
    assert ours == (
        "on images that excite a latent, the IoU with its concept (in the paper's mode) is 0.500 [0.400, 0.600]. In "
        "brackets: 99% intervals; 59 latents."
    )
    assert paper == (
        "an IoU of 0.20 against 0.005 on random images, and a CLIP score of 23.6 against 18.2 (Table 1). It does not "
        "move the activation."
    )
    assert why.endswith("clear borders; we did not test it.") and controls == ""


def test_the_result_has_every_chance_that_was_measured():
    clip = {"clip_paper": 28.0, "clip_paper_low": 26.0, "clip_paper_high": 30.0,
            "clip_paper_random": 10.5, "clip_paper_random_low": 10.0, "clip_paper_random_high": 11.0}  # fmt: skip
    chances = {"iou_paper_shuffled": 0.125, "iou_paper_shuffled_low": 0.1, "iou_paper_shuffled_high": 0.15,
               "iou_paper_area": 0.25, "iou_paper_area_low": 0.2, "iou_paper_area_high": 0.3}  # fmt: skip
    ours, _, why, controls = score_result(METRICS | clip | chances, STUDY, PANEL)
    assert ours == (
        "on images that excite a latent, the IoU with its concept (in the paper's mode) is 0.500 [0.400, 0.600], with "
        "the activation moved 0.250 [0.200, 0.300], with another name 0.125 [0.100, 0.150]. The CLIP score is 28.0 "
        "[26.0, 30.0], on random images 10.5 [10.0, 11.0]. In brackets: 99% intervals; 59 latents. IoU over seeds: "
        "median of 3 SAEs: 0.40, lowest 0.25, highest 0.50."
    )
    assert why.endswith("only with chance: 28.0 - 10.5 here, 23.6 - 18.2 in the paper.")
    assert "strict IoU 0.50 against 0.25; CLIP score 30.00 against 31.00 (all are higher). So high values" in controls
