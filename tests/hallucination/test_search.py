"""Cures: cases from rows, text latents by name and by truth, side-by-side verdicts against one run each, the search."""

import numpy as np
import pytest
import torch
from models import llava_next, noise
from PIL import Image
from torch.testing import assert_close

from lmm_sae_nb.attribute.attribution import clamping, decision
from lmm_sae_nb.hallucination.cases import Case, cases_of, own_answers, told_case
from lmm_sae_nb.hallucination.search import Limits, kept, search, trials, verdicts
from lmm_sae_nb.hallucination.text_latents import of_words, promising, shown_text, text_latents
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.pictureworld.world.scenes import VALIDATION, make_scene
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.steer.steering import Edit, Scope, steered

LAYER = 1


@pytest.fixture(scope="module")
def lmm():
    torch.manual_seed(4)  # it says y
    return LMM(*llava_next())


@pytest.fixture(scope="module")
def sae(lmm):
    sae = TopKSAE(lmm.width, 40, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    sae.b_dec.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return sae


CASES = [
    Case(noise(40, 40, n), question, "y", "n", bool(n)) for n, question in enumerate(("why ?", "and how is it so ?"))
]


@pytest.mark.parametrize("keep_error", [True, False])
def test_side_by_side_verdicts_are_those_of_one_run_each(lmm, sae, keep_error):
    settings = [None, (), (Edit(3, 4.0),), (Edit(5, 2.0), Edit(7, 0.0))]
    scope = Scope(("text",))
    found = verdicts(SAEInPlace(lmm, sae, LAYER), CASES, settings, scope, keep_error=keep_error, at_once=3)
    for n, case in enumerate(CASES):
        choice = decision(lmm, case.question, case.image, case.right, case.tempting)
        for s, edits in enumerate(settings):
            with torch.no_grad():
                if edits is None:
                    logits = lmm.last_logits(choice.prompt)[0]
                else:
                    with steered(SAEInPlace(lmm, sae, LAYER), choice.prompt, edits, scope, keep_error=keep_error):
                        logits = lmm.last_logits(choice.prompt)[0]
            assert_close(found.margin[s, n], logits[choice.answer] - logits[choice.baseline], atol=1e-5, rtol=1e-4)
            assert int(found.answered[s, n]) == int(logits.argmax())
            assert bool(found.right[s, n]) == (int(logits.argmax()) == choice.answer)


def test_settings_that_change_nothing_are_answered_as_the_first(lmm, sae):
    alone = verdicts(SAEInPlace(lmm, sae, LAYER), CASES, [None])
    nothing = verdicts(SAEInPlace(lmm, sae, LAYER), CASES, [None, (), (Edit(3, 0.0, "add"),)], keep_error=True)
    for margin in nothing.margin:
        assert_close(margin, alone.margin[0], atol=1e-5, rtol=1e-4)


def test_promising_is_the_mean_of_clamping_within_scope(lmm, sae):
    values, scope = torch.linspace(0, 3, sae.n_latents), Scope(("text",))
    total = 0
    for case in CASES:
        choice = decision(lmm, case.question, case.image, case.right, case.tempting)
        total = total + clamping(SAEInPlace(lmm, sae, LAYER), choice, values, choice.prompt.mask("text")[0]) / len(
            CASES
        )
    assert_close(promising(SAEInPlace(lmm, sae, LAYER), CASES, values, scope), total)


ROWS = [
    {"image": noise(), "question": "a ?", "answer": "yes .", "taught": "no .", "group": "g", "part": "choose"},
    {"image": noise(), "question": "b ?", "answer": "No", "taught": "No", "group": "g", "part": "choose"},
    {"image": noise(), "question": "c ?", "answer": "left .", "taught": "right .", "group": "h", "part": "report"},
]


def test_cases_tell_right_from_tempting():
    first, second = cases_of(ROWS, "choose")
    assert (first.right, first.tempting, first.contradicts) == ("yes", "no", True)
    assert (second.right, second.tempting, second.contradicts) == ("No", "Yes", False)
    assert cases_of(ROWS, "report")[0].group == "h"
    with pytest.raises(ValueError, match="'other'"):
        cases_of(ROWS, "other")
    with pytest.raises(ValueError, match=r"'b \?' has no image"):
        cases_of([ROWS[1] | {"image": None}], "choose")


def test_a_case_of_ones_own_is_given_whole(tmp_path):
    otherwise = CASES[0]
    assert told_case("", "", "", "", otherwise) is otherwise
    Image.new("L", (5, 4)).save(tmp_path / "it.png")
    case = told_case(str(tmp_path / "it.png"), "is it ?", "yes", "no", otherwise)
    assert (case.image.mode, case.image.size, case.tempting, case.right) == ("RGB", (5, 4), "yes", "no")
    with pytest.raises(ValueError, match="image, baseline is missing"):
        told_case("", "is it ?", "yes", "", otherwise)
    with pytest.raises(FileNotFoundError):
        told_case(str(tmp_path / "none.png"), "is it ?", "yes", "no", otherwise)


def test_an_answer_of_two_tokens_is_refused(lmm, sae):
    with pytest.raises(ValueError, match="not one token"):
        verdicts(SAEInPlace(lmm, sae, LAYER), [Case(noise(), "why ?", "yes", "n", True)], [None])


def test_text_latents_are_those_named_after_text():
    rows = {"3": {"concept": "Exit"}, "5": {"concept": "a red sign"}, "7": {"concept": "dog"}, "9": {"concept": None}}
    assert text_latents(rows, ["exit", "stop"], ["sign"]) == {3: "Exit", 5: "a red sign"}
    assert text_latents(rows, []) == {}


class Cached:
    """Two latents on one image of 4 x 4 patches: one on the word in the top left quarter, one spread evenly."""

    maps = {0: np.kron([[1.0, 0], [0, 0]], np.ones((2, 2))), 1: np.ones((4, 4))}

    def top(self, latent):
        return [(0, 1.0)]

    def patch_map(self, latent, rank):
        return torch.from_numpy(self.maps[latent])


def test_latents_on_written_words_are_found_by_the_label_maps():
    labels = np.zeros((8, 8), np.uint8)
    labels[:4, :4] = 2
    labels[6:, 6:] = 1
    rows = [{"word": Image.fromarray(labels)}]
    assert shown_text(Cached(), rows, "word", ["no", "yes"], [0, 1]) == {0: "yes", 1: "yes"}  # a quarter is enough
    assert shown_text(Cached(), rows, "word", ["no", "yes"], [0, 1], least=0.3) == {0: "yes"}


def test_latents_of_one_word_go_together_the_best_word_first():
    predicted = torch.tensor([0.1, 0.5, 0.2, 0.3, -1.0])
    text = {4: "stop", 0: "exit", 2: "nile", 3: "nile", 1: "exit"}
    assert of_words(text, predicted) == {"exit": [0, 1], "nile": [2, 3], "stop": [4]}


def test_trials_are_alone_and_together_in_units_of_the_maximum():
    found = trials([[4], [2, 3]], [0, 0, 10.0, 1.0, 5.0], [2.0, 0.5], together=3)
    strong, weak = ((Edit(4, 10.0),), (Edit(2, 20.0), Edit(3, 2.0))), ((Edit(4, 2.5),), (Edit(2, 5.0), Edit(3, 0.5)))
    assert found == [(), *strong, sum(strong, ()), *weak, sum(weak, ())]
    three = trials([[0], [1], [2]], [1.0] * 3, [1.0], together=2)
    assert [[edit.latent for edit in edits] for edits in three] == [[], [0], [1], [2], [0, 1], [0, 2], [1, 2]]


def told(lmm, sae, cases, edits, scope):
    """Whether each case is answered right, and by how much, one plain run each."""
    margins, right = [], []
    for case in cases:
        choice = decision(lmm, case.question, case.image, case.right, case.tempting)
        with torch.no_grad(), steered(SAEInPlace(lmm, sae, LAYER), choice.prompt, edits, scope, keep_error=True):
            logits = lmm.last_logits(choice.prompt)[0]
        margins.append(float(logits[choice.answer] - logits[choice.baseline]))
        right.append(int(logits.argmax()) == choice.answer)
    return torch.tensor(margins), torch.tensor(right)


@pytest.mark.parametrize("harmed_at_most", [0.0, 0.5, 1.0])
def test_the_search_takes_what_cures_most_within_the_harm_allowed(lmm, sae, harmed_at_most):
    """Against every setting run on every case, of a model that says y."""
    scope = Scope(("base", "text"))
    settings = [(), *((Edit(n, value),) for value in (0.5, 30.0) for n in range(5))]
    questions = "why ?", "how ?", "and how is it so ?", "a b c d e f g h ?"
    good = [Case(noise(40, 40, n), question, "y", "n", False) for n, question in enumerate(questions)]
    answers = verdicts(SAEInPlace(lmm, sae, LAYER), good[:1], settings, scope).answered[:, 0].tolist()
    words = [word for word in map(lmm.tokenizer.decode, sorted(set(answers))) if word.isascii() and word.isalnum()]
    wrong = [Case(noise(40, 40, n), "why ?", word, "y", True) for n, word in enumerate(words * 2) if word != "y"]
    assert len(wrong) > 2
    best, tried = search(SAEInPlace(lmm, sae, LAYER), wrong, good, settings, Limits(harmed_at_most), scope, at_once=2)
    by_hand = {}
    for edits in settings:
        margins, right = told(lmm, sae, wrong, edits, scope)
        kept = told(lmm, sae, good, edits, scope)[1]
        by_hand[edits] = float(right.float().mean()), float((~kept).float().mean()), float(margins.mean())
    for each in tried:
        cured, harmed, margin = by_hand[each.edits]
        assert each.cured == pytest.approx(cured)
        assert each.shift == pytest.approx(margin - by_hand[()][2], abs=1e-4)
        assert each.harmed is None or each.harmed == pytest.approx(harmed)
    allowed = [edits for edits in settings if by_hand[edits][1] <= harmed_at_most]
    assert by_hand[best][0] == max(by_hand[edits][0] for edits in allowed)


@pytest.fixture(scope="module")
def embedded(root):
    lmm = LMM.load(root / "data/models/tiny-llava-next")
    return lmm, TopKSAE(lmm.width, 64, 8, generator=torch.Generator().manual_seed(3)).requires_grad_(False)


def test_an_answer_is_kept_if_it_would_be_given_again(embedded):
    """Against generating it; and the search leaves out what spoils more than allowed."""
    lmm, sae = embedded
    scenes = [make_scene(VALIDATION + n) for n in range(4)]
    questions = (
        "what do you see in this image ?",
        "what is on the left ?",
        "what is in the top left ?",
        "is there a dog ?",
    )
    rows = [{"image": scene.image, "question": question} for scene, question in zip(scenes, questions, strict=True)]
    asked, scope = own_answers(lmm, rows, batch=3), Scope(("base", "tiles"))
    assert [one.answer for one in asked] == [lmm.generate(lmm.prompt(row["question"], row["image"]))[0] for row in rows]
    settings = [None, (), *((Edit(n, value),) for n in (1, 2) for value in (10.0, 200.0, 1000.0))]
    found = kept(SAEInPlace(lmm, sae, LAYER), asked, settings, scope)
    for edits, row in zip(settings, found.tolist(), strict=True):
        for one, same in zip(asked, row, strict=True):
            prompt = lmm.prompt(one.question, one.image)
            with steered(SAEInPlace(lmm, sae, LAYER), prompt, edits or (), scope, keep_error=True):
                assert (lmm.generate(prompt) == [one.answer]) == same, (edits, one.question)
    assert found[:2].all() and not found[2:].all()
    spoiled = (~found[1:]).float().mean(1).tolist()
    cases = [Case(scene.image, "is there a dog ?", word, "dog", True) for scene in scenes for word in ("yes", "no")]
    best, tried = search(
        SAEInPlace(lmm, sae, LAYER), cases, cases, settings[1:], Limits(1.0, 0.3), scope, others=asked, at_once=1
    )
    assert all(one.spoiled in (None, pytest.approx(share)) for one, share in zip(tried, spoiled, strict=True))
    assert spoiled[[one.edits for one in tried].index(best)] <= 0.3


def test_a_search_needs_something_to_cure_and_something_to_keep(lmm, sae):
    with pytest.raises(ValueError, match="0 wrong answers to cure, 2 right"):
        search(SAEInPlace(lmm, sae, LAYER), [], CASES, [()], Limits(0.1))
    with pytest.raises(ValueError, match="the first setting is"):
        search(SAEInPlace(lmm, sae, LAYER), CASES, CASES, [(Edit(1, 1.0),)], Limits(0.1))
