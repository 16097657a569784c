"""What page 06 says of clamped latents: against numbers read by hand, also where too few latents have a name."""

import pytest
from panels import panel_of, sae

from lmm_sae_nb.show.panel import MeasuredPart, Panel, PanelSAE
from lmm_sae_nb.show.seed_study import Measured, SeedStudy
from lmm_sae_nb.show.steering_sentences import steering_findings, steering_of_others, steering_result


def ends(name, mean, low, high):
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


RANKS = {
    **ends("top_ranks_low_level", 0.2, 0.1, 0.3), "all_latents_low_level": 0.25,
    "top_ranks_scene": 0.5, "all_latents_scene": 0.15, "panel_slider_seconds": 0.125,
}  # fmt: skip
NOTHING = RANKS | {"objects_steered": 0, "feelings_steered": 0, "stories_steered": 0, "word_latents": 0}
OBJECTS = {
    "objects_steered": 50, "dose": 16.0, **ends("named_of_100", 34.0, 23.0, 47.0),
    "control_named_of_100": 2.0, "control_named_of_100_high": 8.0,
    **ends("fluency", 0.9, 0.8, 1.0), **ends("named_fluency", 0.7, 0.6, 0.8),
    **ends("unsteered_fluency", 0.75, 0.5, 1.0), "fluent_named_of_100": 30.0,
    "naming_dose": 32.0, "naming_dose_named_of_100": 40.0,
    "changed_of_100": 67.0, "control_changed_of_100": 31.0, "clamp_value": 1349.6, "control_clamp_value": 810.2,
    "control_value_changed_of_100": 57.0, **ends("control_value_named_of_100", 1.0, 0.1, 9.0),
}  # fmt: skip
CASES = {
    "feelings_steered": 8, "feelings_named": 7, "feelings_control_named": 0, "feelings_named_any_dose": 8,
    **ends("feelings_fluency", 0.9, 0.7, 1.0), **ends("feelings_unsteered_fluency", 0.95, 0.85, 1.0),
    "stories_steered": 6, "stories_named": 4, "stories_control_named": 1, "stories_named_any_dose": 5,
    **ends("stories_fluency", 0.6, 0.2, 0.9), **ends("stories_unsteered_fluency", 1.0, 0.9, 1.0),
    "stories_fluency_ratio": 0.6,
}  # fmt: skip
WORDS = {
    "word_latents": 198, "word_on_name": 0.05, "word_on_others": 0.03, **ends("word_difference", 0.02, -0.01, 0.06),
    "word_silent": 123, "word_more_on_name": 18, "word_more_on_others": 57,
}  # fmt: skip
STUDY = SeedStudy("", "", {}, {}, [0, 1, 2], [], {"steer": {
    "feelings_named": Measured.of([6, 7, 8]), "named_of_100": Measured.of([30.0, 40.0, 35.0]),
    "fluency_ratio": Measured.of([1.2, None, 1.4]),
}})  # fmt: skip


def among(found, start):
    (sentence,) = (text for text in found if text.startswith(start))
    return sentence


def test_with_few_names_only_the_ranks_have_numbers():
    found = steering_findings(NOTHING, 16)
    assert len(found) == 6
    assert found[:3] == [
        "Fewer than three latents have a name, so none is clamped on a white image.",
        "Fewer than two latents are named for a feeling, so there is no case study.",
        "Fewer than two different names are of objects or faces, so no name is read.",
    ]
    ours, paper, why, controls = steering_result(NOTHING)
    assert ours == "fewer than three latents have a name, so none is clamped on a white image."
    assert paper.startswith("11 of 100 object latents change the answer.")
    assert why == "there are too few named latents." and controls == ""


def test_objects_stand_beside_random_latents_and_unsteered_answers():
    named, fluency, dose, changed, values, *_ = steering_findings(NOTHING | OBJECTS, 32)
    assert named == (
        "At dose 16, 34 of 100 object latents make the model name their object on a white image. Random latents: 2 of "
        "100. The intervals do not overlap."
    )
    assert fluency == (
        "The fluency of all answers is 0.900 [0.800, 1.000], that of the answers that name the object 0.700 [0.600, "
        "0.800]. Unsteered answers have 0.750 [0.500, 1.000]. 30 of 100 latents give an answer that names the object "
        "and has at least 0.8 of the unsteered fluency."
    )
    assert "would take dose 32: 40 of 100 reported" in dose
    assert changed.startswith("67 of 100 object latents change the answer, but so do 31 of 100 random latents.")
    assert "clamped to 1350 on average, random latents to 810. " in values
    assert "57 of 100 random latents change the answer. 1 of 100 of these answers name the object." in values


def test_the_highest_dose_is_called_the_end_of_the_range():
    at_end, below = (steering_findings(NOTHING | OBJECTS, highest)[0] for highest in (16, 32))
    assert at_end == f"{below} 16 is the end of our range of doses; more was not tried on this page."


def test_random_latents_that_reach_as_high_overlap():
    assert "The intervals overlap." in steering_findings(NOTHING | OBJECTS | {"control_named_of_100_high": 23.0}, 32)[0]


def test_the_fluency_of_answers_that_name_the_object_is_unknown_if_none_does():
    without = {name: value for name, value in OBJECTS.items() if not name.startswith("named_fluency")}
    assert "that name the object unknown. Unsteered" in steering_findings(NOTHING | without, 32)[1]


def test_feelings_and_stories_have_their_control_and_other_seeds():
    found = steering_findings(NOTHING | CASES, 32, STUDY)
    assert among(found, "7 of 8 latents") == (
        "7 of 8 latents named for a feeling make the model report it (median of 3 SAEs: 7, lowest 6, highest 8), at "
        "the dose that the other latents choose. With the next feeling's latent, it reports the first feeling for "
        "none. The fluency is 0.900 [0.700, 1.000], that of unsteered answers 0.950 [0.850, 1.000]."
    )
    assert among(found, "4 of 6 latents") == (
        "4 of 6 latents bring their feeling into a story (control: 1). The fluency is 0.600 [0.200, 0.900], that of "
        "unsteered stories 1.000 [0.900, 1.000]. So many steered stories are broken at the chosen dose."
    )
    assert among(found, "At any dose").endswith("8 of 8 latents bring the feeling into an answer, and 5 into a story.")


def test_without_other_seeds_feelings_have_no_brackets_and_whole_stories_are_called_whole():
    found = steering_findings(NOTHING | CASES | {"feelings_control_named": 2, "stories_fluency_ratio": 0.8}, 32)
    assert "make the model report it, at the dose" in among(found, "7 of 8 latents")
    assert "the first feeling for 2. " in among(found, "7 of 8 latents")
    assert among(found, "4 of 6 latents").endswith("So steered stories stay about as whole as others.")


@pytest.mark.parametrize(
    ("low", "high", "effect"),
    [
        (-0.01, 0.06, "the interval contains 0, so we see no effect of the word"),
        (0.01, 0.06, "on average, a latent is more active on its name"),
        (-0.06, -0.01, "on average, a latent is less active on its name"),
    ],
)
def test_a_word_has_an_effect_if_the_interval_leaves_out_zero(low, high, effect):
    found = steering_findings(NOTHING | WORDS | {"word_difference_low": low, "word_difference_high": high}, 32)
    read = among(found, "When the model reads")
    assert "on average 5.0% of its maximum on patches; with other names 3.0%." in read
    assert read.endswith(f"is 2.0 points (99% interval {100 * low:.1f} to {100 * high:.1f}): {effect}.")
    assert among(found, "123 of 198").endswith("a response to one of the many other names is enough.")
    assert "18 are more active on their name than on the mean of the others, 57 less." in among(found, "123 of 198")


@pytest.mark.parametrize(
    ("usual", "often"),
    [(0.05, "more"), (0.35, "less"), (0.25, "neither more nor less"), (0.1, "neither more nor less")],
)
def test_low_level_kinds_are_more_or_less_frequent_if_the_interval_leaves_out_the_usual(usual, often):
    *_, kinds, scenes, panel = steering_findings(NOTHING | {"all_latents_low_level": usual}, 32)
    assert f"name 20% (99% interval over images 10% to 30%) of the latents in ranks 1 to 10, and {usual:.0%}" in kinds
    assert f"they are {often} frequent in the first ranks." in kinds
    assert scenes.startswith("Scenes name 50% of the latents in ranks 1 to 10, and 15% of all")
    assert panel == "The panel answers a moved slider in 0.12 s."


def steered_panel():
    """A panel of a trained SAE, a control, and two ways to steer."""
    ways = {"steer_latent_named_of_100": (40, 30, 50), "steer_probe_named_of_100": (90, 80, 95),
            "steer_probe_named_above_latent": (50, 40, 60)}  # fmt: skip
    named = {"seed": 36.0, "control": 2.0}
    saes = {
        group: PanelSAE(f"a {group}", group, {"steer": MeasuredPart({"named_of_100": value}, 1.0)})
        for group, value in named.items()
    }
    model = PanelSAE("no SAE", "model", {"direction_steering": MeasuredPart(ways, 1.0)})
    return Panel("", "", {}, {}, [], saes | {"model": model})


OTHER_WAYS = (
    "Four ways to steer towards the same objects, each with the dose that suits it; objects named, of 100: clamped "
    "latents 40 [30, 50], logistic probes 90 [80, 95]. Better than clamped latents: logistic probes. Differences and "
    "probes are no latents: they are directions that learned from labels ([A4](A4_controls_and_metrics))."
)


def test_other_ways_come_first_then_other_seeds_then_controls():
    ways, named, feelings, fluency, controls = steering_of_others(STUDY, steered_panel(), {"named_of_100": "objects"})
    assert ways == OTHER_WAYS
    assert named == "Objects: median of 3 SAEs: 35, lowest 30, highest 40."
    assert feelings == "Latents that make the model report their feeling: median of 3 SAEs: 7, lowest 6, highest 8."
    assert fluency == "Fluency, relative to unsteered answers: median of 2 SAEs: 1.30, lowest 1.20, highest 1.40."
    assert controls.startswith("Objects named, of 100 (at most 30 latents), 1 trained SAEs against 1 controls")
    assert controls.endswith(": 36 against 2. No control is as high.")


def test_without_a_study_and_a_panel_nothing_is_said_of_other_saes():
    assert steering_of_others(None, None, {"named_of_100": "objects"}) == []
    other = Panel("", "", {}, {}, [], {"seed": sae("seed", "", good=0.5), **panel_of([0.5], {"rows": 0.1}).saes})
    assert steering_of_others(None, other, {}) == [] and steering_result(NOTHING, None, other).controls == ""


def test_the_result_has_objects_random_latents_seeds_and_controls():
    ours, _, why, controls = steering_result(NOTHING | OBJECTS, STUDY, steered_panel())
    assert ours == (
        "34 of 100 object latents (99% interval 23 to 47) make the model name their object, 30 of them in a fluent "
        "answer. Random latents at the same values: 1 of 100 (0 to 9). A clamp changes the answer for 67 of 100 object "
        "latents, and for 57 of 100 random latents at the same values. Named over seeds: median of 3 SAEs: 35, lowest "
        "30, highest 40."
    )
    assert why == ("probably because we clamp an early layer, at 16 times what any image causes. We did not test this.")
    assert controls.startswith("1 trained SAEs against 1 control SAEs") and controls.endswith(OTHER_WAYS)
    alone = steering_result(NOTHING | OBJECTS).ours
    assert alone == ours.removesuffix(" Named over seeds: median of 3 SAEs: 35, lowest 30, highest 40.")
