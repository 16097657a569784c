"""What page 03 says of names: against numbers read by hand, also without a ground truth, names or a panel."""

from lmm_sae_nb.show.name_sentences import name_findings, name_result, names_of_others
from lmm_sae_nb.show.panel import MeasuredPart, Panel, PanelSAE
from lmm_sae_nb.show.seed_study import Measured, SeedStudy


def fraction(name, middle, half=0.1):
    """A fraction whose interval reaches as far as `half` to each side."""
    return {name: middle, f"{name}_low": middle - half, f"{name}_high": middle + half}


ASKED = {"asked": 1200, "explained": 900, "refused": 300, "explained_fraction": 0.75}
RIGHT = ASKED | {
    "refused_low_confidence": 40, **fraction("concept_accuracy", 0.8), "concept_common": 0.9,
    **fraction("concept_accuracy_guessed", 0.2), **fraction("concept_accuracy_shuffled", 0.0, 0.0),
    "answerable_fraction": 0.7, **fraction("answerable_fraction_random", 0.3),
    "concepts_present": 219, "concepts_detected": 0.5, "concept_recall": 0.4,
    **fraction("concepts_detected_by_chance", 0.0, 0.0), "refusal_precision": 0.6,
}  # fmt: skip
UNSEEN = {
    "asked_unseen": 200, "explained_unseen": 150, **fraction("concept_accuracy_unseen", 0.7),
    **fraction("concept_accuracy_guessed_unseen", 0.1, 0.05),
    **fraction("concept_accuracy_shuffled_unseen", 0.0, 0.0),
}  # fmt: skip


def test_without_a_ground_truth_only_outcomes_are_counted():
    counted = (
        "The explainer names 900 of 1,200 latents (75%). It refuses 300, 0 of these because its confidence is too low."
    )
    assert name_findings(ASKED) == [counted]
    ours, paper, why, controls = name_result(ASKED)
    assert ours == "the explainer names 900 of 1,200 live latents. In brackets: 99% intervals."
    assert paper == (
        "it explains 5,000 latents and does not report how many were refused. People accept 75% of the names, GPT-4o "
        "89% (Table 2)."
    )
    assert "the number to compare. Our explainer was trained" in why and controls == ""


def test_right_names_stand_beside_chance_and_the_limits_of_the_rule():
    outcomes, right, guessed, answerable, found, refusals = name_findings(RIGHT)
    assert outcomes.endswith("It refuses 300, 40 of these because its confidence is too low.")
    assert right == (
        "80.0% (70.0 to 90.0%) of the names are the true concept (in brackets: the 99% interval). 90% are at least "
        "one of the concepts that the images have in common."
    )
    assert guessed == (
        "Guessed names, those of random latents of the same kind, are right in 20.0% (10.0 to 30.0%); another name "
        "is right in 0.0% (0.0 to 0.0%)."
    )
    assert answerable.startswith("70% of the latents have a true concept.")
    assert answerable.endswith("on random images, the rule finds a concept for 30% (20 to 40%).")
    assert found == (
        "Of 219 concepts in the held-out scenes, 50% have a latent that detects them, 40% one that also carries "
        "their name. With the label maps of other scenes, 0% (0 to 0%) have such a latent."
    )
    assert refusals == (
        "60% of the refusals are right: these images have nothing in common, or only a detail."
    )  # fmt: skip


def test_latents_that_were_no_lesson_have_their_own_sentence_and_lead_the_result():
    (unseen,) = (text for text in name_findings(RIGHT | UNSEEN) if text.startswith("Its training"))
    assert unseen == (
        "Its training had masks of 1,000 of the latents. It names 150 of the other 200. 70.0% (60.0 to 80.0%) of "
        "these names are right; of guessed names 10.0% (5.0 to 15.0%)."
    )
    assert name_result(RIGHT | UNSEEN).ours == (
        "the explainer was trained on masks of some of the latents. It names 150 of the other 200; 70% (60 to 80%) "
        "of these names are right. By chance: guessed names of the same kind are right in 10% (5 to 15%), another "
        "latent's name in 0% (0 to 0%). Of all 1,200 live latents it names 900; 80% (70 to 90%) of these names are "
        "right. In brackets: 99% intervals."
    )


def test_with_one_name_alone_there_is_no_other_name_to_compare_with():
    names = ("concept_accuracy_shuffled", "concept_accuracy_guessed", "concept_accuracy_guessed_unseen")
    same = {name: value for name, value in (RIGHT | UNSEEN).items() if not name.startswith(names[0])}
    assert name_findings(same)[2].endswith("are right in 20.0% (10.0 to 30.0%).")
    assert ". By chance: guessed names of the same kind are right in 10% (5 to 15%). Of all" in name_result(same).ours
    one = {name: value for name, value in same.items() if not name.startswith(names)}
    told = name_findings(one)
    assert told[2].endswith("(60.0 to 80.0%) of these names are right.") and len(told) == 6
    assert "names 150 of the other 200. Of all 1,200" in name_result(one).ours


def test_without_names_or_refusals_nothing_is_said_of_them():
    unnamed = {name: value for name, value in RIGHT.items() if not name.startswith(("concept_acc", "concept_common"))}
    assert [text[:12] for text in name_findings(unnamed)] == ["The explaine", "60% of the r"]
    whole = {name: value for name, value in RIGHT.items() if name != "refusal_precision"}
    assert not any("refusals are right" in text for text in name_findings(whole))


STUDY = SeedStudy("", "", {}, {}, [0, 1, 2], [], {"interpret": {"concept_accuracy": Measured.of([0.8, 0.9, 0.85])}})
DETECTORS = (
    "As detectors of a concept, mean F1 on held-out scenes: best latent 0.30 [0.20, 0.40], logistic probe 0.70 [0.60, "
    "0.80]. Better than best latent: logistic probe. The last two need no SAE, but labels to learn from."
)


def panel():
    """A panel of a trained SAE, a control, and two detectors."""
    f1 = {"latent_f1": (0.3, 0.2, 0.4), "probe_f1": (0.7, 0.6, 0.8), "probe_f1_above_latent": (0.4, 0.3, 0.5)}
    saes = {
        group: PanelSAE(f"a {group}", group, {"interpret": MeasuredPart({"concept_accuracy": value}, 1.0)})
        for group, value in {"seed": 0.9, "control": 0.5}.items()
    }
    model = PanelSAE("no SAE", "model", {"direction_detection": MeasuredPart(f1, 1.0)})
    return Panel("", "", {}, {}, [], saes | {"model": model})


def test_other_seeds_come_first_then_controls_then_detectors():
    seeds, controls, detectors = names_of_others(STUDY, panel(), {"concept_accuracy": "right names"})
    assert seeds == "Right names: median of 3 SAEs: 85%, lowest 80%, highest 90%."
    assert controls.startswith("Names right, 1 trained SAEs against 1 controls")
    assert controls.endswith(": 0.90 against 0.50. No control is as high.")
    assert detectors == DETECTORS
    assert names_of_others(None, None, {"concept_accuracy": "right names"}) == []


def test_the_result_has_seeds_the_world_and_controls():
    ours, _, why, controls = name_result(RIGHT, STUDY, panel())
    assert ours == (
        "the explainer names 900 of 1,200 live latents; 80% (70 to 90%) of these names are right. By chance: guessed "
        "names of the same kind are right in 20% (10 to 30%), another latent's name in 0% (0 to 0%). Right names "
        "over seeds: median of 3 SAEs: 85%, lowest 80%, highest 90%. In brackets: 99% intervals."
    )
    assert "The held-out scenes of Picture World show 219 concepts. Our explainer" in why
    assert controls.startswith("1 trained SAEs against 1 control SAEs") and controls.endswith(DETECTORS)
