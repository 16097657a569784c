"""The search, against every setting run on every case."""

from dataclasses import replace

import pytest
import torch
from models import noise

from lmm_sae_nb.attribute.attribution import decision
from lmm_sae_nb.hallucination.answers import first_tokens, unchanged
from lmm_sae_nb.hallucination.cases import Case, answer_questions
from lmm_sae_nb.hallucination.search import NOTHING, Limits, Search, Setting, clamp_settings, search
from lmm_sae_nb.pictureworld.world.scenes import VALIDATION, make_scene
from lmm_sae_nb.show import plots
from lmm_sae_nb.steer.steering import Edit, Scope, steered


def setting(latent: int, value: float) -> Setting:
    return Setting((f"word {latent}",), value, (Edit(latent, value),))


def test_words_are_tried_alone_and_together_in_units_of_the_maxima():
    settings = clamp_settings({"a": [4], "b": [2, 3]}, [0, 0, 10.0, 1.0, 5.0], [2.0, 0.5], together=3)
    strong, weak = ((Edit(4, 10.0),), (Edit(2, 20.0), Edit(3, 2.0))), ((Edit(4, 2.5),), (Edit(2, 5.0), Edit(3, 0.5)))
    assert [each.edits for each in settings] == [(), *strong, sum(strong, ()), *weak, sum(weak, ())]
    assert settings[0] == NOTHING and settings[3].words == ("a", "b") and settings[3].dose == 2.0
    three = clamp_settings({"a": [0], "b": [1], "c": [2]}, [1.0] * 3, [1.0], together=2)
    assert ["".join(each.words) for each in three] == ["", "a", "b", "c", "ab", "ac", "bc"]


def one_run_each(place, cases, edits, scope):
    """Return whether each case is answered right, and by what margin, one plain run each."""
    margins, right = [], []
    for case in cases:
        choice = decision(place.lmm, case.question, case.image, case.right, case.tempting)
        with torch.no_grad(), steered(place, choice.prompt, edits, scope, keep_error=True):
            logits = place.lmm.last_logits(choice.prompt)[0]
        margins.append(float(logits[choice.answer] - logits[choice.baseline]))
        right.append(int(logits.argmax()) == choice.answer)
    return torch.tensor(margins), torch.tensor(right)


@pytest.mark.slow
@pytest.mark.parametrize("harmed_at_most", [0.0, 0.5, 1.0])
def test_the_search_takes_what_cures_most_within_the_limits(place, harmed_at_most):
    scope = Scope(("base", "text"))
    settings = [NOTHING, *(setting(n, value) for value in (0.5, 30.0) for n in range(5))]
    questions = "why ?", "how ?", "and how is it so ?", "a b c d e f g h ?"
    right = [Case(noise(40, 40, n), question, "y", "n", False) for n, question in enumerate(questions)]
    tokens = first_tokens(place, right[:1], [each.edits for each in settings], scope).token[:, 0].tolist()
    decoded = map(place.lmm.tokenizer.decode, sorted(set(tokens)))
    words = [word for word in decoded if word.isascii() and word.isalnum()]
    wrong = [Case(noise(40, 40, n), "why ?", word, "y", True) for n, word in enumerate(words * 2) if word != "y"]
    assert len(wrong) > 2
    found = search(place, wrong, right, settings, Limits(harmed_at_most), scope, at_once=2)
    by_hand = {}
    for each in settings:
        margins, cured = one_run_each(place, wrong, each.edits, scope)
        kept = one_run_each(place, right, each.edits, scope)[1]
        by_word = [
            cured[torch.tensor([case.right == word for case in wrong])].float().mean() for word in words if word != "y"
        ]
        by_hand[each] = float(torch.stack(by_word).mean()), float((~kept).float().mean()), float(margins.mean())
    for trial in found.trials:
        cured, harmed, margin = by_hand[trial.setting]
        assert trial.cured == pytest.approx(cured)
        assert trial.shift == pytest.approx(margin - by_hand[NOTHING][2], abs=1e-4)
        assert trial.harmed is None or trial.harmed == pytest.approx(harmed)
    allowed = [each for each in settings if by_hand[each][1] <= harmed_at_most]
    assert by_hand[found.chosen][0] == max(by_hand[each][0] for each in allowed)


@pytest.mark.slow
def test_the_search_leaves_out_what_changes_too_many_other_answers(embedded):
    scenes = [make_scene(VALIDATION + n) for n in range(3)]
    questions = ("what do you see in this image ?", "what is on the left ?", "is there a dog ?")
    rows = [{"image": scene.image, "question": question} for scene, question in zip(scenes, questions, strict=True)]
    others, scope = answer_questions(embedded.lmm, rows), Scope(("base", "tiles"))
    settings = [NOTHING, *(setting(n, value) for n in (1, 2) for value in (10.0, 200.0, 1000.0))]
    kept = unchanged(embedded, others, [each.edits for each in settings], scope)
    changed = dict(zip(settings, (~kept).float().mean(1).tolist(), strict=True))
    cases = [Case(scene.image, "is there a dog ?", word, "dog", True) for scene in scenes for word in ("yes", "no")]
    found = search(embedded, cases, cases, settings, Limits(1.0, 0.4), scope, others=others, at_once=1)
    for trial in found.trials:
        assert trial.changed is None or trial.changed == pytest.approx(changed[trial.setting])
    assert changed[found.chosen] <= 0.4


def test_without_wrong_cases_nothing_is_tried_and_without_right_ones_nothing_limits_the_harm(place):
    right = Case(noise(40, 40), "why ?", "y", "n", True)  # the model answers y
    wrong = replace(right, right="n", tempting="y")
    settings = [NOTHING, setting(1, 1.0), *(setting(n, 200.0) for n in range(8))]
    assert search(place, [], [right], settings, Limits(0.1)) == Search(NOTHING, [])
    found = search(place, [wrong], [], settings, Limits(0.0))
    assert [trial.harmed for trial in found.trials] == [None] * len(settings)
    most = max(trial.cured for trial in found.trials)
    assert next(t.cured for t in found.trials if t.setting == found.chosen) == most


def test_the_first_setting_of_a_search_clamps_nothing(place):
    cases = [Case(noise(40, 40), "why ?", "y", "n", True)] * 2
    with pytest.raises(ValueError, match="the first setting clamps 1 latents"):
        search(place, cases, cases, [setting(1, 1.0)], Limits(0.1))


def test_the_picture_of_a_search_has_a_row_for_each_setting_and_marks_the_chosen_one(place):
    cases = [Case(noise(40, 40, n), "why ?", word, other, True) for n, (word, other) in enumerate(("yn", "ny"))]
    settings = [NOTHING, setting(1, 2.0), setting(2, 30.0)]
    found = search(place, cases, cases, settings, Limits(1.0))
    ax = plots.search_trials(found, Limits(1.0))
    labels = {tick.get_text(): tick.get_fontweight() for tick in ax.get_yticklabels()}
    assert set(labels) == {"word 1, × 2", "word 2, × 30"}
    bold = [label for label, weight in labels.items() if weight == "bold"]
    assert bold == [f"{word}, × {found.chosen.dose:g}" for word in found.chosen.words]
