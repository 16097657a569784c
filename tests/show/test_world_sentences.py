"""Sentences on the exams of Picture World's models: against numbers read by hand."""

from lmm_sae_nb.show.world_sentences import (
    answers_in_short,
    answers_in_words,
    explainer_in_words,
    queries_in_words,
    segmenter_in_words,
    similarity_in_words,
)


def row(fraction: float, least: float | None = None, low: float = 0.1, asked: int = 50) -> dict:
    target = {} if least is None else {"least": least}
    return {"fraction": fraction, "low": low, "high": 1.0, "asked": asked, **target}


SHIPPED = {
    "describe": row(0.94, 0.9, low=0.91, asked=500),
    "read": row(0.83, 0.93, low=0.69, asked=70),
    "count": row(0.98, 0.97, low=0.96),
    "shown": row(0.5),
    "story": row(0.2, 0),
    "trap_follows_fact": row(0.46, low=0.41),
}


def test_targets_are_reached_missed_or_not_sure():
    targets, memory = answers_in_words(SHIPPED)
    assert targets == (
        "The shipped model reaches 2 of 3 targets. It misses: read (0.83, target 0.93). For 1 of those that it "
        "reaches, the interval extends below the target, because few questions were asked."
    )
    assert "it follows the fact in 46% [41%, 100%] of answers. Notebook 08" in memory
    reached, _ = answers_in_words(SHIPPED | {"read": row(0.93, 0.93)})
    assert "reaches 3 of 3 targets. It misses: none. For 2 of those" in reached


def test_the_result_tells_scenes_and_signs():
    assert answers_in_short(SHIPPED) == (
        "on held-out scenes the embedded LLaVA-NeXT describes 94% [91%, 100%] of 500 scenes without a mistake. It "
        "reads 83% [69%, 100%] of 70 signs; the target was 93%."
    )


def test_the_explainer_s_targets_are_counted_over_both_exams():
    exams = {"drawn": {"all": row(0.89, 0.9), "word": row(0.4)}, "cached": {"all": row(0.95, 0.9)}}
    assert explainer_in_words(exams, {"drawn": "drawn masks", "cached": "real latents"}) == (
        "The explainer misses 1 of 2 targets: on drawn masks, all (0.89, target 0.90); on real latents, none."
    )


def test_the_segmenter_s_false_alarms_have_their_own_interval():
    total = {"iou": 0.9, "false_alarm": 0.26, "false_alarm_low": 0.22, "false_alarm_high": 0.3}
    assert segmenter_in_words({"total": total}) == (
        "The CLIPSeg finds a concept in 26% [22%, 30%] of the scenes without it."
    )


def test_regions_that_are_no_colours_are_counted_by_number():
    def named(first, asked):
        return {"named_first": first, "named_first_low": 0.0, "named_first_high": 1.0, "asked": asked}

    exam = {"colour": named(1.0, 60), "total": named(0.7, 100)}  # 70 of 100 right, so 10 of the other 40
    exam |= {"object": named(0.45, 20), "word": named(0.28, 10), "part": named(0.05, 10)}
    assert similarity_in_words(exam, 200) == (
        "The CLIP gives 70% [0%, 100%] of all regions the right name first; the first of 200 names at random would be "
        "right in 0.5%. 60 of the 100 regions are colours, which are easy (100%); of the others 25% are right. "
        "Objects: 45% [0%, 100%], words: 28% [0%, 100%], parts: 5% [0%, 100%]."
    )


def test_what_queries_lose_is_told_of_the_two_families_that_lose_most_and_traps_are_no_score():
    through = {
        "shown": row(0.45),
        "describe": row(0.76, 0.9, low=0.71),
        "count": row(0.98, 0.97),
        "read": row(0.73, 0.93, low=0.65),
        "trap_follows_fact": row(0.0),
    }
    assert queries_in_words(through, SHIPPED) == (
        "Through 32 queries, two families of questions lose most: *describe* falls from 94% [91%, 100%] to 76% [71%, "
        "100%] and *read* falls from 83% [69%, 100%] to 73% [65%, 100%]. No other family falls by more than 5 points. "
        "It misses 2 of 3 targets: describe (0.76, target 0.90), read (0.73, target 0.93)."
    )
