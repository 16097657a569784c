"""The report on held-out cases: its answers against one run each, its fractions against counts by hand."""

import pytest
import torch
from models import noise
from pydantic import TypeAdapter

from lmm_sae_nb.attribute.attribution import decision
from lmm_sae_nb.hallucination.cases import Case
from lmm_sae_nb.hallucination.report import (
    CaseAnswers,
    OtherAnswers,
    answer_cases,
    answer_controls,
    answer_others,
    control_metrics,
    random_clamps,
    report_metrics,
    right_by_group,
)
from lmm_sae_nb.pictureworld.world.scenes import VALIDATION, make_scene
from lmm_sae_nb.steer.steering import Edit, Scope, steered

ANSWERS = CaseAnswers(
    answer=["no", "no", "yes", "yes", "no", "no"],
    contradicts=[True, True, True, True, False, False],
    group=["b", "b", "a", "a", "c", "c"],
    untouched=[False, True, False, False, True, True],
    spliced=[False, True, True, False, True, True],
    clamped=[True, False, True, False, True, False],
)
OTHERS = OtherAnswers(right=[True, True, True, False], right_clamped=[True] + [False] * 3, kept=[True, False] * 2)


def test_fractions_are_counts_of_the_right_cases():
    metrics = report_metrics(ANSWERS, OTHERS)
    expected = {
        "maps": 4, "hallucinations": 3, "hallucination_rate": 3 / 4, "hallucination_rate_spliced": 2 / 4,
        "hallucination_rate_after": 2 / 4, "cured_fraction": 2 / 3, "cured_fraction_right_no": 1,
        "cured_fraction_right_yes": 1 / 2, "harmed_fraction": 2 / 3, "harmed_fraction_contradicting": 1,
        "harmed_fraction_agreeing": 1 / 2, "other_questions_right": 3 / 4, "other_questions_right_after": 1 / 4,
        "other_answers_kept": 1 / 2, "cured": 2, "right_answers": 3, "harmed": 2, "hallucinations_right_no": 1,
        "cured_right_no": 1, "hallucinations_right_yes": 2, "cured_right_yes": 1, "harmed_fraction_right_no": 2 / 3,
    }  # fmt: skip
    assert {name: value for name, value in metrics.items() if not name.endswith(("_low", "_high"))} == expected
    assert all(metrics[f"{name}_low"] <= metrics[name] for name in expected if f"{name}_low" in metrics)


def test_a_fraction_of_no_cases_is_left_out():
    right = CaseAnswers(["no"], [True], [""], [True], [True], [True])
    metrics = report_metrics(right, OTHERS)
    assert metrics["hallucination_rate"] == 0 and metrics["harmed_fraction"] == 0
    assert "cured_fraction" not in metrics and "harmed_fraction_agreeing" not in metrics


def test_a_control_clamps_as_many_other_live_latents_at_the_same_dose():
    maxima = [0.0, 2.0, 3.0, 0.0, 5.0, 6.0, 7.0]
    chosen = (Edit(4, 10.0), Edit(5, 12.0))
    clamps = random_clamps(maxima, chosen, 2.0, draws=20, without=[6], seed=1)
    assert len(clamps) == 20
    for clamp in clamps:
        assert sorted((edit.latent, edit.value) for edit in clamp) == [(1, 4.0), (2, 6.0)]
    assert len({clamp[0].latent for clamp in clamps}) == 2
    assert clamps == random_clamps(maxima, chosen, 2.0, draws=20, without=[6], seed=1)
    with pytest.raises(ValueError, match="1 live latents to draw 2 from"):
        random_clamps(maxima, chosen, 2.0, draws=1, without=[1, 6])


def test_controls_are_counted_over_all_draws():
    controls = [[True, True, False, False, True, True], [False] * 6]
    metrics = control_metrics(ANSWERS, controls)
    expected = {
        "control_draws": 2, "control_cured_fraction": 1 / 6, "control_cured_lowest": 0,
        "control_cured_highest": 1 / 3, "control_harmed_fraction": 3 / 6,
    }  # fmt: skip
    assert {name: value for name, value in metrics.items() if not name.endswith(("_low", "_high"))} == expected
    assert control_metrics(ANSWERS, []) == {"control_draws": 0}


def test_groups_are_of_contradicting_cases_alone():
    rows = right_by_group(ANSWERS)
    assert {group: (row["untouched"].mean, row["clamped"].mean) for group, row in rows.items()} == {
        "a": (0, 0.5),
        "b": (0.5, 0.5),
    }


def test_cases_are_answered_as_one_run_each(place):
    cases = [Case(noise(40, 40, n), "why ?", *answers, n % 2 == 0, "g") for n, answers in enumerate(("yn", "ny", "yn"))]
    edits, scope = (Edit(3, 30.0),), Scope(("base", "text"))
    answers = answer_cases(place, cases, edits, scope)
    assert answers.answer == ["y", "n", "y"] and answers.contradicts == [True, False, True]
    assert answers.untouched == answers.spliced  # the error stays in
    assert answer_controls(place, cases, [(), edits], scope) == [answers.spliced, answers.clamped]
    assert answer_controls(place, cases, [], scope) == []
    for case, clamped in zip(cases, answers.clamped, strict=True):
        choice = decision(place.lmm, case.question, case.image, case.right, case.tempting)
        with torch.no_grad(), steered(place, choice.prompt, edits, scope, keep_error=True):
            assert clamped == (int(place.lmm.last_logits(choice.prompt)[0].argmax()) == choice.answer)
    kind = TypeAdapter(CaseAnswers)
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
    found = answer_others(embedded, rows, edits, scope, batch=batch)
    assert found.right == [True, True, False]
    assert found.kept == [one == other for one, other in zip(before, after, strict=True)]
    assert found.right_clamped == [found.kept[0], found.kept[1], False]
