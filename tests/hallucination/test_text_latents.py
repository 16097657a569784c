"""Text latents by name and by label map; the predicted gain against clamping one case at a time."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import noise
from PIL import Image
from torch.testing import assert_close

from lmm_sae_nb.attribute.attribution import clamping, decision
from lmm_sae_nb.hallucination.cases import Case
from lmm_sae_nb.hallucination.text_latents import (
    find_candidates,
    latents_by_word,
    named_after_text,
    on_written_words,
    predicted_gain,
)
from lmm_sae_nb.steer.steering import Scope

CASES = [Case(noise(40, 40, n), "why ?", "y", "n", True) for n in range(2)]
EXPLAINED = {3: {"concept": "Exit"}, 5: {"concept": "a red sign"}, 7: {"concept": "dog"}, 9: {"concept": None}}


class Cached:
    """Latent 0 is active on the top left quarter of one image of 4 x 4 patches, every other one evenly."""

    max = np.linspace(1, 2, 40, dtype=np.float32)

    def top(self, latent):
        return [(0, 1.0)]

    def patch_map(self, latent, rank):
        corner = np.kron([[1.0, 0], [0, 0]], np.ones((2, 2)))
        return torch.from_numpy(np.ones((4, 4)) if latent else corner)


def label_maps() -> Dataset:
    """The second word fills the top left quarter, the first one a sixteenth at the bottom right."""
    labels = np.zeros((8, 8), np.uint8)
    labels[:4, :4] = 2
    labels[6:, 6:] = 1
    return Dataset.from_list([{"word": Image.fromarray(labels)}])


def test_text_latents_are_those_named_after_text():
    assert named_after_text(EXPLAINED, ["exit", "stop"], ["sign"]) == {3: "Exit", 5: "a red sign"}
    assert named_after_text(EXPLAINED, []) == {}


@pytest.mark.usefixtures("unchecked")
def test_latents_on_written_words_are_found_by_the_label_maps():
    words = ["no", "yes"]
    assert on_written_words(Cached(), label_maps(), "word", words, [0, 1]) == {0: "yes", 1: "yes"}  # 0.25 is enough
    assert on_written_words(Cached(), label_maps(), "word", words, [0, 1], at_least=0.3) == {0: "yes"}


def test_latents_of_one_word_go_together_the_best_word_first():
    gain = torch.tensor([0.1, 0.5, 0.2, 0.3, -1.0])
    text = {4: "stop", 0: "exit", 2: "nile", 3: "nile", 1: "exit"}
    words = latents_by_word(text, gain)
    assert list(words.items()) == [("exit", [0, 1]), ("nile", [2, 3]), ("stop", [4])]


def test_the_predicted_gain_is_the_mean_of_clamping_within_scope(place):
    values, scope = torch.linspace(0, 3, place.sae.n_latents), Scope(("text",))
    total = torch.zeros(place.sae.n_latents)
    for case in CASES:
        choice = decision(place.lmm, case.question, case.image, case.right, case.tempting)
        total += clamping(place, choice, values, choice.prompt.mask("text")[0]) / len(CASES)
    assert_close(predicted_gain(place, CASES, values, scope), total)


@pytest.mark.usefixtures("unchecked")
def test_candidates_come_from_names_and_from_label_maps(place):
    settings = dict(text_kinds=["word"], text_words=["sign"], dose=2.0, highest=40, scope=Scope(("text",)))
    concepts = {"word": ["dog", "yes"], "object": ["dog"]}  # a dog is an object, so its name is not text
    found = find_candidates(place, CASES, Cached(), EXPLAINED, label_maps(), concepts=concepts, **settings)
    assert found.named == 1 and found.words["a red sign"] == [5]
    assert set(found.gain) == set(range(40)) and found.words["yes"] == [n for n in range(40) if n != 5]
    by_hand = predicted_gain(place, CASES, 2.0 * torch.from_numpy(Cached.max), Scope(("text",)))
    assert_close(torch.tensor([found.gain[n] for n in range(40)]), by_hand)
    assert list(found.best(1)) == [max(found.words, key=lambda word: sum(found.gain[n] for n in found.words[word]))]

    without = find_candidates(place, CASES, Cached(), EXPLAINED, None, concepts={}, **settings)
    assert without.words == {"a red sign": [5]}
