"""Cures: cases from rows, text latents by name and by truth, side-by-side verdicts against one run each, the choice."""

import numpy as np
import pytest
import torch
from models import llava_next, noise
from PIL import Image
from torch.testing import assert_close

from lmm_sae_nb.attribution import clamping, decision
from lmm_sae_nb.cure import (
    Case,
    Verdicts,
    cases_of,
    choose,
    promising,
    share,
    shown_text,
    text_latents,
    told_case,
    trials,
    verdicts,
)
from lmm_sae_nb.lmm import LMM
from lmm_sae_nb.sae import TopKSAE
from lmm_sae_nb.steering import Edit, Scope, steered

LAYER = 1


@pytest.fixture(scope="module")
def lmm():
    torch.manual_seed(0)
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
    found = verdicts(lmm, sae, LAYER, CASES, settings, scope, keep_error=keep_error, at_once=3)
    for n, case in enumerate(CASES):
        choice = decision(lmm, case.question, case.image, case.right, case.tempting)
        for s, edits in enumerate(settings):
            with torch.no_grad():
                if edits is None:
                    logits = lmm.last_logits(choice.prompt)[0]
                else:
                    with steered(lmm, sae, LAYER, choice.prompt, edits, scope, keep_error=keep_error):
                        logits = lmm.last_logits(choice.prompt)[0]
            assert_close(found.margin[s, n], logits[choice.answer] - logits[choice.baseline], atol=1e-5, rtol=1e-4)
            assert int(found.answered[s, n]) == int(logits.argmax())
            assert bool(found.right[s, n]) == (int(logits.argmax()) == choice.answer)


def test_settings_that_change_nothing_are_answered_as_the_first(lmm, sae):
    alone = verdicts(lmm, sae, LAYER, CASES, [None])
    nothing = verdicts(lmm, sae, LAYER, CASES, [None, (), (Edit(3, 0.0, "add"),)], keep_error=True)
    for margin in nothing.margin:
        assert_close(margin, alone.margin[0], atol=1e-5, rtol=1e-4)


def test_promising_is_the_mean_of_clamping_within_scope(lmm, sae):
    values, scope = torch.linspace(0, 3, sae.n_latents), Scope(("text",))
    total = 0
    for case in CASES:
        choice = decision(lmm, case.question, case.image, case.right, case.tempting)
        total = total + clamping(lmm, sae, LAYER, choice, values, choice.prompt.mask("text")[0]) / len(CASES)
    assert_close(promising(lmm, sae, LAYER, CASES, values, scope), total)


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
        verdicts(lmm, sae, LAYER, [Case(noise(), "why ?", "yes", "n", True)], [None])


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


def test_trials_are_alone_and_together_in_units_of_the_maximum():
    found = trials([4, 2], [0, 0, 10.0, 0, 5.0], [2.0], together=3)
    assert found == [(), (Edit(4, 10.0),), (Edit(2, 20.0),), (Edit(4, 5.0), Edit(2, 10.0))]


def verdict(right) -> Verdicts:
    right = torch.tensor(right, dtype=torch.bool)
    return Verdicts(torch.zeros(right.shape), torch.zeros(right.shape, dtype=torch.long), right)


def test_the_cure_with_most_cured_within_the_harm_allowed_is_chosen():
    settings = [(), (Edit(1, 1.0),), (Edit(2, 1.0),), (Edit(1, 1.0), Edit(2, 1.0))]
    found = verdict([[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1], [1, 0, 1, 1]])
    assert choose(found, settings, harmed_at_most=0.4) == 2  # the first harms half, the last needs two latents
    assert choose(found, settings, harmed_at_most=0.5) == 1
    assert choose(verdict([[0, 1], [1, 0], [1, 0], [1, 0]]), settings, 0.0) == 0  # nothing harmless cures
    with pytest.raises(ValueError, match="0 wrong answers"):
        choose(verdict([[1, 1]]), [()], 0.1)


def test_share_is_wilsons():
    found = share(torch.tensor([True] * 8 + [False] * 2))
    z, n, p = 2.5758293, 10, 0.8
    centre, half = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n),
    )
    assert found[:3] == pytest.approx((p, centre - half, centre + half), abs=1e-6)
    with pytest.raises(ValueError, match="no cases"):
        share(torch.tensor([], dtype=torch.bool))
