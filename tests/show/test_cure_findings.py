"""What page 08 says of its cures: against numbers read by hand, also where something was not measured.

With z = 2.576, Wilson's 99% interval of none of ten is 0 to z^2 / (10 + z^2) = 0.399, and that of all ten 0.601 to 1.
So a balanced rate of 10 and 0 of ten is 0.5 [0.301, 0.699], and one of all is 1 [1 - 0.399 / sqrt 2 = 0.718, 1].
"""

from dataclasses import replace

import pytest

from lmm_sae_nb.hallucination.report import HeldOut, OtherAnswers
from lmm_sae_nb.hallucination.search import NOTHING, Search, Setting, Trial
from lmm_sae_nb.show.cure_findings import MeasuredCures, cure_controls, cure_findings, cure_in_short
from lmm_sae_nb.show.cure_sentences import UNKNOWN
from lmm_sae_nb.show.seed_study import Measured, SeedStudy
from lmm_sae_nb.steer.steering import Edit

TITLES = {"text": "text latents", "fitted": "fitted latents", "text_random": "random patches", "random": "random words",
          "unrelated": "unrelated", "push": "pushed", "direction": "direction", "prompt": "prompt"}  # fmt: skip
# for each draw, how many of ten hallucinations are cured whose right answer is no, and of ten others
CURED = {"text": [(10, 0)], "fitted": [(10, 10)], "text_random": [(0, 0), (2, 4), (1, 1)],
         "random": [(1, 1), (2, 2), (3, 5)], "unrelated": [(0, 0), (0, 1)], "push": [(10, 0)] * 2,
         "direction": [(10, 10)], "prompt": [(0, 0)]}  # fmt: skip
DRAWN = ("text_random", "random", "unrelated", "push")
OTHER = {"other_questions_right": 0.95, "other_questions_right_after": 0.9, "text_other_answers_kept": 0.93,
         "other_answers_kept": 0.8, "other_answers_kept_low": 0.6, "other_answers_kept_high": 0.9}  # fmt: skip
OF_NEW = {"latents_clamped": 24, "questions_fitted_on": 16} | {
    f"{part}_questions_{method}_balanced_cured{end}": value
    for part, method, values in (("seen", "fitted", (0.48, 0.34, 0.63)), ("new", "fitted", (0.59, 0.46, 0.71)),
                                 ("new", "direction", (0.54, 0.41, 0.66)))
    for end, value in zip(("", "_low", "_high"), values, strict=True)
} | {"new_questions_random_balanced_lowest": 0.03, "new_questions_random_balanced_highest": 0.17}  # fmt: skip


def held_out(cured, wrong=(10, 10), agreeing=10):
    """Ten cases with each right answer, the first ones answered wrong, and right answers that agree with memory."""
    parts = {"no": wrong[0], "yes": wrong[1]}

    def draw(counts):
        marks = [n < count or n >= bad for bad, count in zip(wrong, counts, strict=True) for n in range(10)]
        return marks + [True] * agreeing

    return HeldOut(
        [word for word in parts for _ in range(10)] + ["no"] * agreeing, [True] * 20 + [False] * agreeing,
        [""] * (20 + agreeing), draw((0, 0)), {name: list(map(draw, draws)) for name, draws in cured.items()},
    )  # fmt: skip


def measured(left_out=(), wrong=(10, 10), agreeing=10, **cured):
    answers = held_out({n: x for n, x in (CURED | cured).items() if n not in left_out}, wrong, agreeing)
    chosen = Setting(("28 latents",), 0, (Edit(3, 1.0),))
    counts = {"maps": 20, "latents_clamped": 28, "text_latents_clamped": 2, "hallucination_rate": sum(wrong) / 20}
    return MeasuredCures(
        answers, {n: TITLES[n] for n in TITLES if n not in left_out}, answers.metrics | counts | OTHER, OF_NEW, {}, [],
        Search(chosen, [Trial(NOTHING, 0.0, 0.0), Trial(chosen, 0.9, 0.57)]),
        OtherAnswers([True] * 20, [True] * 20, [True] * 20), {"a", "b", "c"}, {"b", "c", "d"},
    )  # fmt: skip


def told(found, head):
    (one,) = (text for text in cure_findings(found) if text.startswith(head))
    return one


def test_findings_have_the_numbers_of_the_held_out_cases():
    untouched, *_ = texts = cure_findings(measured())
    assert untouched == "The untouched model answers 100% of the contradicting cases wrongly."
    of_text = (
        "2 text latents at the patches cure 100% [60%, 100%] of the 10 hallucinations whose right answer is *no* and "
        "0% [0%, 40%] of the 10 hallucinations whose right answer is *yes*: a balanced rate of 0.50 [0.30, 0.70]. "
        "Controls: random patches 0.00 to 0.30 in 3 draws."
    )
    assert told(measured(), "2 text latents").startswith(of_text)
    assert (
        "The text latents harm 0.00 [0.00, 0.40] of the right answers, and keep 93% of the answers to other questions."
    ) in texts
    assert told(measured(), "28 fitted latents").endswith(
        "a balanced rate of 1.00 [0.72, 1.00]. On the cases of the search they raise the right answer's margin by 0.57 "
        "logits on average."
    )
    assert told(measured(), "A push away").endswith("Of 10 such answers the fitted clamp harms 0% [0%, 40%].")
    assert told(measured(), "The cost of the fitted clamp") == (
        "The cost of the fitted clamp: it harms 0.00 [0.00, 0.40] of the right answers. Of 20 other questions the "
        "model answers 95% right, and 90% with the clamp; it keeps 0.80 [0.60, 0.90] of the answers."
    )


def test_topics_come_in_the_order_of_the_page():
    heads = ["The untouched", "2 text", "The text", "28 fitted", "Controls", "The direction", "A push", "The cost"]
    texts = cure_findings(measured())
    assert [text.startswith(head) for text, head in zip(texts, [*heads, "Held-out"], strict=True)] == [True] * 9


@pytest.mark.parametrize(
    ("draws", "verdict"),
    [
        ([(0, 0), (2, 4)], "No random draw reaches the interval of the text latents."),  # 0.30 is below 0.3006
        ([(0, 0), (3, 4), (4, 4)], "In 2 of these draws they cure about as much or more, so nothing shows"),
    ],
)
def test_random_latents_that_cure_as_much_as_text_latents_are_counted(draws, verdict):
    assert verdict in told(measured(text_random=draws), "2 text latents")


def test_a_clamp_that_beats_every_draw_of_its_controls_and_one_that_does_not():
    beats = told(measured(), "Controls")
    assert beats == (
        "Controls: random words 0.10 to 0.40 in 3 draws; unrelated 0.00 to 0.05 in 2 draws; pushed 0.50 to 0.50 in 2 "
        "draws; prompt 0.00 [0.00, 0.28]. The fitted latents beat every draw of all of them."
    )
    reached = told(measured(random=[(0, 0), (7, 8)], prompt=[(10, 10)]), "Controls")  # 0.75 and 1 reach 0.72
    assert reached.endswith("They do not clearly beat: random words, prompt.")


def test_without_draws_of_controls_none_is_named():
    found = measured(left_out=DRAWN)
    assert "Controls" not in told(found, "2 text latents")
    assert told(found, "2 text latents").endswith("a balanced rate of 0.50 [0.30, 0.70].")
    assert told(found, "Controls: prompt 0.00 [0.00, 0.28]. The fitted latents beat")
    assert cure_controls(found).startswith(
        "balanced cured rates to compare with. For the fitted latents: prompt 0.00 [0.00, 0.28]. Without an SAE"
    )


@pytest.mark.parametrize(
    ("fitted", "direction", "gap", "verdict", "short"),
    [
        ((0, 0), (10, 10), "+1.00", "more than the latents: the simple", "The simple method is clearly better."),
        ((10, 10), (10, 10), "+0.00", "beside the latents: no clear difference", "There is no clear difference."),
        ((10, 10), (0, 0), "-1.00", "beside the latents: the latents are better", "The latents are clearly better."),
    ],
)  # fmt: skip
def test_the_direction_without_an_sae_is_compared_on_the_same_cases(fitted, direction, gap, verdict, short):
    found = measured(fitted=[fitted], direction=[direction])
    assert f"On the same cases this is {gap} [{gap}, {gap}] {verdict}" in told(found, "The direction that was fitted")
    assert cure_controls(found).endswith(f": {gap} [{gap}, {gap}] against the fitted latents. {short}")


def test_where_nothing_was_fitted_no_direction_is_compared():
    found = measured(left_out=["direction"], fitted=[(0, 0)])
    assert not any("direction" in text for text in cure_findings(found)[:-1])  # the last is on new questions
    assert cure_controls(found).endswith("For the text latents: random patches 0.00 to 0.30 in 3 draws.")


def test_without_a_hallucination_with_one_of_the_answers_the_rate_is_that_of_the_other():
    found = measured(wrong=(0, 10), text=[(0, 10)], fitted=[(0, 10)])
    assert cure_findings(found)[1].startswith("All hallucinations have the right answer *yes*, none has *no*.")
    assert "cure 100% [60%, 100%] of the 10 hallucinations whose right answer is *yes* (there are none" in told(
        found, "28 fitted latents"
    )
    assert "a balanced cured rate, of each kind that there is, of 1.00 [0.60, 1.00]." in cure_in_short(found, None)


def test_without_any_hallucination_there_is_nothing_to_cure():
    found = measured(wrong=(0, 0))
    texts = cure_findings(found)
    assert texts[0].startswith("The untouched model answers 0% of")
    assert texts[1].startswith("No held-out case is a hallucination")
    assert [text.split()[0] for text in texts[2:]] == ["A", "The", "Held-out"]  # a push, the cost, new questions
    assert cure_in_short(found, study()) == (
        "the model answers none of 20 held-out questions from memory, where the image contradicts it. So there is "
        "nothing to cure."
    )
    assert cure_controls(found) == ""


def test_without_right_answers_no_harm_is_known():
    found = measured(agreeing=0)
    assert "No held-out case is answered right, so we do not know what a method harms." in cure_findings(found)
    assert f"The text latents harm {UNKNOWN} of the right answers" in told(found, "The text latents")
    assert f"it harms {UNKNOWN} of the right answers" in told(found, "The cost")
    assert not any(text.startswith("A push away") for text in cure_findings(found))
    assert f"It harms {UNKNOWN} of the right answers" in cure_in_short(found, None)


def test_without_contradicting_cases_or_other_questions_their_fractions_are_unknown():
    found = measured(wrong=(0, 0))
    found = replace(found, metrics={"maps": 0}, others=OtherAnswers([], [], []))
    assert cure_findings(found)[0] == f"The untouched model answers {UNKNOWN} of the contradicting cases wrongly."
    assert f"Of 0 other questions the model answers {UNKNOWN} right" in told(found, "The cost")


NEW_QUESTIONS = (
    "Held-out maps are asked 3 questions; 2 of these also occur in the choice. Fitted on 16 questions, a clamp of 24 "
    "latents has a balanced cured rate of 0.48 [0.34, 0.63] on held-out maps with these questions."
)


@pytest.mark.parametrize(
    ("highest", "verdict"),
    [
        (0.17, "So it also helps with new questions about the same basins."),
        (0.46, "So we cannot say that it helps with new questions."),  # as high as the interval's lower end
    ],
)
def test_help_with_new_questions_is_claimed_only_above_every_random_draw(highest, verdict):
    found = replace(measured(), of_new=OF_NEW | {"new_questions_random_balanced_highest": highest})
    assert cure_findings(found)[-1] == (
        f"{NEW_QUESTIONS} With the other questions, which this fit never saw, it has 0.59 [0.46, 0.71]; random latents "
        f"have 0.03 to {highest}, and the fitted direction 0.54 [0.41, 0.66]. {verdict}"
    )


@pytest.mark.parametrize("absent", ["fitted_balanced_cured_low", "random_balanced_highest"])
def test_without_a_case_or_a_control_nothing_is_said_of_new_questions(absent):
    found = replace(measured(), of_new={n: x for n, x in OF_NEW.items() if n != f"new_questions_{absent}"})
    assert cure_findings(found)[-1] == (
        f"{NEW_QUESTIONS} We cannot say whether it helps with other questions: there is no case, or no control."
    )


def bounds(name, *ends):
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


POPE = {
    **bounds("untouched_object_random_accuracy", 1, 0.85, 1),
    **bounds("untouched_object_popular_accuracy", 0.9, 0.7, 0.97),
    **bounds("untouched_object_adversarial_accuracy", 0.8, 0.6, 0.9),
    **bounds("text_object_change", 0, 0, 0),
    **bounds("fitted_object_change", -0.12, -0.22, -0.04),
    **bounds("direction_object_change", -0.02, -0.07, 0),
    **bounds("prompt_object_change", 0.06, 0.02, 0.1),
    **bounds("untouched_object_adversarial_yes", 0.55, 0.35, 0.74),
    **bounds("fitted_object_adversarial_yes", 0.68, 0.48, 0.84),
}
CHAIR = {"captions": 20, **bounds("untouched_chair_i", 0.03, 0.01, 0.13), **bounds("text_chair_i", 0.14, 0.07, 0.28),
         **bounds("text_chair_s_change", 0.25, 0.04, 0.5), **bounds("prompt_chair_s_change", 0, -0.1, 0.1),
         **bounds("fitted_chair_s_change", 0, 0, 0), **bounds("direction_chair_s_change", -0.1, -0.3, 0)}  # fmt: skip


def test_pope_names_cures_that_are_clearly_better_and_worse():
    assert cure_findings(replace(measured(), field=POPE, kinds=["object"]))[-1] == (
        "POPE, objects: the untouched model is right in 1.00 [0.85, 1.00] of the random, 0.90 [0.70, 0.97] of the "
        "popular and 0.80 [0.60, 0.90] of the adversarial questions. Accuracy on all of them changes by 0 (no change) "
        "(text latents); -0.12 [-0.22, -0.04] (fitted latents); -0.02 [-0.07, +0.00] (direction); +0.06 [+0.02, +0.10] "
        "(prompt). Clearly better: prompt. Clearly worse: fitted latents. Of the adversarial questions it answers "
        "0.55 [0.35, 0.74] with *yes*, and with the fitted latents 0.68 [0.48, 0.84]; 0.50 would be right."
    )
    same = {name: 0 if "_change" in name else value for name, value in POPE.items()}
    of_same = cure_findings(replace(measured(), field=same, kinds=["object"]))[-1]
    assert "Clearly better: no method. Clearly worse: no method." in of_same


def test_chair_names_cures_after_which_more_captions_mention_absent_things():
    """Captions of the other methods mention nothing, so no fraction of it is known."""
    assert cure_findings(replace(measured(), field=CHAIR))[-1] == (
        "CHAIR: of the things that captions mention, these fractions are absent: 0.03 [0.01, 0.13] (untouched); "
        f"0.14 [0.07, 0.28] (text latents); {UNKNOWN} (fitted latents); {UNKNOWN} (direction); {UNKNOWN} (prompt). "
        "The fraction of captions that mention an absent thing changes by +0.25 [+0.04, +0.50] (text latents); "
        "0 (no change) (fitted latents); -0.10 [-0.30, +0.00] (direction); +0.00 [-0.10, +0.10] (prompt). Clearly "
        "worse: text latents."
    )
    none = CHAIR | bounds("text_chair_s_change", 0.25, -0.04, 0.5)
    assert cure_findings(replace(measured(), field=none))[-1].endswith("Clearly worse: no method.")


def study():
    rates = {"fitted_balanced_cured": Measured.of([0.5, 0.6, 0.9])}
    return SeedStudy("", "", {}, {}, [0, 1, 2], [], {"hallucination": rates})


def test_the_result_has_cures_costs_pope_and_other_saes():
    of_both = (
        "clamping 28 fitted latents at the words of the question cures 100% [60%, 100%] of the 10 hallucinations whose "
        "right answer is *no* and 100% [60%, 100%] of the 10 hallucinations whose right answer is *yes*, on 20 new "
        "maps that contradict memory: a balanced cured rate, the mean of both, of 1.00 [0.72, 1.00]. It harms 0.00 "
        "[0.00, 0.40] of the right answers and keeps 0.80 [0.60, 0.90] of the answers to other questions.{} Text "
        "latents at the patches, our version of the paper's way, have a balanced rate of 0.50 [0.30, 0.70]."
    )
    assert cure_in_short(measured(), None) == of_both.format("")
    assert cure_in_short(measured(), study()) == of_both.format(
        " Balanced over seeds: median of 3 SAEs: 60%, lowest 50%, highest 90%."
    )
    words = {name.replace("object", "word"): 0 if "_change" in name else value for name, value in POPE.items()}
    asked = replace(measured(), field=POPE | words, kinds=["object", "word"])
    assert cure_in_short(asked, None) == of_both.format(
        " The accuracy in POPE, questions whether something is in an image, changes by -0.12 [-0.22, -0.04] (objects) "
        "and 0 (no change) (words)."
    )


def test_controls_of_the_result_are_those_of_both_clamps():
    assert cure_controls(measured()) == (
        "balanced cured rates to compare with. For the fitted latents: random words 0.10 to 0.40 in 3 draws; prompt "
        "0.00 [0.00, 0.28]. For the text latents: random patches 0.00 to 0.30 in 3 draws. Without an SAE, a direction "
        "that was fitted to the same cases has 1.00 [0.72, 1.00]: +0.00 [+0.00, +0.00] against the fitted latents. "
        "There is no clear difference."
    )
