"""The report on held-out cases: its answers against one run each, its fractions against counts by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import noise
from pydantic import TypeAdapter

from lmm_sae_nb.attribute.attribution import decision
from lmm_sae_nb.hallucination.cases import Case
from lmm_sae_nb.hallucination.report import (
    HeldOut,
    Method,
    OtherAnswers,
    answer_others,
    equal_strength,
    other_metrics,
    try_methods,
)
from lmm_sae_nb.pictureworld.world.scenes import VALIDATION, make_scene
from lmm_sae_nb.steer.steering import Edit, Scope, steered
from lmm_sae_nb.support.intervals import proportion

ANSWERS = HeldOut(
    answer=["no", "no", "yes", "yes", "no", "no"],
    contradicts=[True, True, True, True, False, False],
    group=["b", "b", "a", "a", "c", "c"],
    untouched=[False, True, False, False, True, True],
    methods={
        "push": [[True, True, False, False, True, True]],  # towards no
        "cure": [[True, False, True, False, True, False], [False, True, True, True, True, True]],
    },
)
OTHERS = OtherAnswers(right=[True, True, True, False], right_clamped=[True] + [False] * 3, kept=[True, False] * 2)


def test_fractions_are_counts_of_the_right_cases():
    expected = {
        "hallucinations": 3, "right_answers": 3,
        "hallucinations_right_no": 1, "hallucinations_right_yes": 2,
        "push_balanced_median": 1 / 2, "cure_balanced_median": 5 / 8,
        "push_harmed_median": 0, "push_harmed_lowest": 0, "push_harmed_highest": 0,
        "cure_harmed_median": 1 / 3, "cure_harmed_lowest": 0, "cure_harmed_highest": 2 / 3,
        "push_balanced_lowest": 1 / 2, "push_balanced_highest": 1 / 2, "push_harmed_agreeing": 0,
        "cure_balanced_lowest": 1 / 2, "cure_balanced_highest": 3 / 4, "cure_harmed_agreeing": 1 / 4,
        "push_balanced_cured": 1 / 2, "push_cured_right_no": 1, "push_cured_right_yes": 0, "push_harmed": 0,
        "cure_balanced_cured": (1 / 2 + 3 / 4) / 2, "cure_cured_right_no": 1 / 2, "cure_cured_right_yes": 3 / 4,
        "cure_harmed": 2 / 6,
    }  # fmt: skip
    metrics = ANSWERS.metrics
    assert {name: value for name, value in metrics.items() if not name.endswith(("_low", "_high"))} == expected
    assert all(metrics[f"{name}_low"] <= metrics[name] for name in expected if f"{name}_low" in metrics)
    others = other_metrics(OTHERS, "text_")
    assert others["text_other_questions_right"] == 3 / 4 and others["text_other_questions_right_after"] == 1 / 4
    assert others["text_other_answers_kept"] == 1 / 2


def test_several_draws_have_their_range_and_one_has_its_interval():
    assert ANSWERS.cured_or_range("cure") == (5 / 8, 1 / 2, 3 / 4)
    assert ANSWERS.harmed_or_range("cure") == (1 / 3, 0, 2 / 3)
    assert ANSWERS.cured_or_range("push") == ANSWERS.balanced("push")
    assert ANSWERS.harmed_or_range("push") == ANSWERS.harmed("push")[:3]


def test_a_push_towards_one_answer_has_a_balanced_rate_of_at_most_a_half():
    rng = np.random.default_rng(0)
    answer = rng.choice(["no", "yes"], 200, p=[0.9, 0.1]).tolist()
    pushed = [word == "no" for word in answer]
    held_out = HeldOut(answer, [True] * 200, [""] * 200, [False] * 200, {"push": [pushed]})
    assert held_out.balanced("push").mean == 0.5 and np.mean(pushed) > 0.8


def test_without_hallucinations_nothing_is_said_of_cures():
    answers = HeldOut(["no"], [True], [""], [True], {"push": [[True]]})
    metrics = answers.metrics
    assert metrics["hallucinations"] == metrics["hallucinations_right_no"] == 0 and metrics["push_harmed"] == 0
    assert not any("cured" in name or "balanced" in name for name in metrics)
    assert answers.cured_or_range("push") is None and answers.cured_or_none("push") == {"no": None}
    assert answers.harmed_or_range("push") == (0, *proportion([False])[1:3])


@pytest.mark.parametrize("empty", ["no", "yes"])
def test_a_right_answer_without_hallucinations_counts_0_and_the_rate_is_that_of_the_other(empty):
    other = {"no": "yes", "yes": "no"}[empty]
    right = [True, True, False, False]  # the cases whose right answer is `empty` come first
    answers = HeldOut([empty] * 2 + [other] * 2, [True] * 4, [""] * 4, right, {"push": [[False, True, True, False]]})
    metrics = answers.metrics
    assert metrics[f"hallucinations_right_{empty}"] == 0 and metrics[f"hallucinations_right_{other}"] == 2
    assert metrics["push_balanced_cured"] == metrics[f"push_cured_right_{other}"] == 1 / 2
    assert f"push_cured_right_{empty}" not in metrics and "push_harmed_agreeing" not in metrics
    assert answers.cured_or_none("push")[empty] is None


def test_without_right_answers_and_other_questions_nothing_is_said_of_harm():
    answers = HeldOut(["no"], [True], [""], [False], {"push": [[True]]})
    assert answers.harmed_or_range("push") is None
    assert not any("harmed" in name for name in answers.metrics) and answers.metrics["right_answers"] == 0
    assert other_metrics(OtherAnswers([], [], [])) == {}


def test_groups_count_their_hallucinations_by_the_right_answer():
    rows = ANSWERS.cured_by_group("cure")
    fractions = {group: {name: mean.mean for name, mean in row.items()} for group, row in rows.items()}
    assert fractions == {"a": {"right answer yes": 3 / 4}, "b": {"right answer no": 1 / 2}}


def test_methods_are_compared_on_the_same_cases():
    rng = np.random.default_rng(1)
    one = rng.random(300) < 0.5
    other = one | (rng.random(300) < 0.2)  # cures all that the first one cures, and some more
    words = ["no", "yes"] * 150
    held_out = HeldOut(
        words, [True] * 300, [""] * 300, [False] * 300, {"one": [one.tolist()], "other": [other.tolist()]}
    )
    found = held_out.difference("one", "other")
    assert found.mean == pytest.approx((other.astype(float) - one).mean())
    assert 0 < found.low < found.mean < found.high
    assert held_out.balanced("one").high > held_out.balanced("other").low  # unpaired intervals would say nothing


def test_one_case_of_a_group_leaves_the_difference_of_methods_open():
    cases = (["no", "yes", "yes"], [True] * 3, [""] * 3, [False] * 3)
    found = HeldOut(*cases, {"one": [[False, False, True]], "other": [[True, True, True]]}).difference("one", "other")
    assert found.mean == pytest.approx(0.75) and found.low < 0 < found.high
    alone = HeldOut(["no"], [True], [""], [False], {"one": [[False]], "other": [[True]]}).difference("one", "other")
    assert tuple(alone) == (1.0, -1.0, 1.0)


def test_controls_of_equal_strength_are_drawn_from_the_candidates():
    clamps = equal_strength([1, 3, 5, 7], 2, 10.0, draws=30, seed=1)
    assert len(clamps) == 30 and {edit.latent for clamp in clamps for edit in clamp} == {1, 3, 5, 7}
    assert all(len({edit.latent for edit in clamp}) == 2 for clamp in clamps)
    assert all(sum(edit.value**2 for edit in clamp) == pytest.approx(100) for clamp in clamps)
    assert equal_strength([1], 2, 10.0, draws=1) == ()


def test_cases_are_answered_as_one_run_each(place):
    cases = [Case(noise(40, 40, n), "why ?", *answers, n % 2 == 0, "g") for n, answers in enumerate(("yn", "ny", "yn"))]
    edits, scope = (Edit(3, 30.0),), Scope(("base", "text"))
    methods = {
        "spliced": Method(((),), scope),
        "asked": Method((None,), before="please ."),
        "clamped": Method((edits, ()), scope),
    }
    answers = try_methods(place, cases, methods)
    assert answers.answer == ["y", "n", "y"] and answers.contradicts == [True, False, True]
    assert list(answers.methods) == list(methods)
    assert answers.methods["spliced"] == [answers.untouched]  # the error stays in
    assert answers.methods["clamped"][1] == answers.untouched
    asked = [replace(case, question="please . why ?") for case in cases]
    assert answers.methods["asked"] == [try_methods(place, asked, {}).untouched]
    for case, clamped in zip(cases, answers.methods["clamped"][0], strict=True):
        choice = decision(place.lmm, case.question, case.image, case.right, case.tempting)
        with torch.no_grad(), steered(place, choice.prompt, edits, scope, keep_error=True):
            assert clamped == (int(place.lmm.last_logits(choice.prompt)[0].argmax()) == choice.answer)
    kind = TypeAdapter(HeldOut)
    assert kind.validate_json(kind.dump_json(answers)) == answers


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_other_answers_are_compared_in_full(embedded, batch):
    lmm, scope, edits = embedded.lmm, Scope(("base", "tiles")), (Edit(1, 1000.0),)
    scenes = [make_scene(VALIDATION + n) for n in range(3)]
    rows = [{"image": scene.image, "question": "what do you see in this image ?"} for scene in scenes]
    before = [lmm.generate(lmm.prompt(row["question"], row["image"]))[0] for row in rows]
    after = []
    for row in rows:
        prompt = lmm.prompt(row["question"], row["image"])
        with steered(embedded, prompt, edits, scope, keep_error=True):
            after += lmm.generate(prompt)
    rows = [row | {"answer": answer.upper() + " "} for row, answer in zip(rows, before, strict=True)]
    rows[2]["answer"] = "something else"
    methods = {"clamped": Method((edits,), scope), "untouched": Method((None,))}
    answers = answer_others(embedded, rows, methods, batch=batch)
    assert all(answers["untouched"].kept)
    found = answers["clamped"]
    assert found.right == [True, True, False]
    assert found.kept == [one == other for one, other in zip(before, after, strict=True)]
    assert found.right_clamped == [found.kept[0], found.kept[1], False]
