"""CHAIR: mentions and fractions against counts by hand, captions against one run each."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import noise
from PIL import Image

from lmm_sae_nb.hallucination.answers import Shift, under
from lmm_sae_nb.hallucination.captions import Captions, caption_images, measure_captions, mentioned
from lmm_sae_nb.hallucination.report import Method
from lmm_sae_nb.steer.steering import Edit, Scope, steered

NAMES = ["dog", "fire truck", "fire", "Cat"]


def test_a_name_is_mentioned_as_whole_words_and_once():
    text = "A dog, a hotdog and a CAT; the dog by a fire truck."
    assert mentioned(text, NAMES) == ["dog", "cat", "fire truck"]
    assert mentioned("a fire and a fire truck", NAMES) == ["fire", "fire truck"]
    assert mentioned("a dog-house", NAMES) == [] and mentioned("a dog", []) == []


def test_chair_is_counted_over_mentions_and_over_captions():
    captions = Captions(
        ["dog", "cat", "fire"],
        [["dog"], ["cat", "fire"], []],
        {"m": ["a dog and a cat .", "a cat", "nothing ."], "silent": ["", "", ""]},
    )
    assert captions.absent("m") == [["cat"], [], []]
    scores = {name: score.fraction for name, score in captions.scores("m").items()}
    assert scores == {"chair_i": 1 / 3, "chair_s": 1 / 3, "mentioned": 2 / 3}
    assert captions.scores("m")["mentioned"].cases == 3
    change = captions.change("silent", "m")
    assert change.mean == pytest.approx(-1 / 3) and change.low <= change.mean <= change.high <= 0
    metrics = captions.metrics
    assert metrics["silent_chair_s_change"] == change.mean and "m_chair_s_change" not in metrics
    assert metrics["captions"] == 3 and metrics["m_chair_i_low"] < 1 / 3 < metrics["m_chair_i_high"]
    assert metrics["silent_chair_s"] == 0 and metrics["silent_mentioned"] == 0 and "silent_chair_i" not in metrics


def test_captions_in_batches_are_those_of_one_run_each(place):
    images = [noise(40, 40, n) for n in range(3)]
    scope, edits = Scope(("text",), ("prompt",)), (Edit(3, 30.0),)
    methods = {
        "untouched": Method((None,)),
        "clamp": Method((edits,), scope),
        "asked": Method((None,), before="please ."),
    }
    found = caption_images(place, images, [[]] * 3, ["a"], methods, "what ?", batch=2, max_new_tokens=5)
    for name, text in (("untouched", "what ?"), ("clamp", "what ?"), ("asked", "please . what ?")):
        for image, caption in zip(images, found.texts[name], strict=True):
            prompt = place.lmm.prompt(text, image)
            with steered(place, prompt, edits if name == "clamp" else (), scope, keep_error=True):
                assert place.lmm.generate(prompt, max_new_tokens=5) == [caption]
    with pytest.raises(ValueError, match="no images to describe"):
        caption_images(place, [], [], ["a"], methods, "what ?")


@pytest.mark.parametrize("keep_error", [True, False])
@torch.no_grad()
def test_a_shift_adds_its_direction_at_the_tokens_of_its_scope(place, keep_error):
    prompt = place.lmm.prompt(["why ?", "and how is it so ?"], [noise(40, 40, n) for n in range(2)])
    scope, direction = Scope(("text",), ("prompt",)), torch.linspace(-1, 1, place.lmm.width)
    with steered(place, prompt, (), scope, keep_error=keep_error):
        clean = place.lmm.hidden_states(prompt, place.layer)
    with under(place, prompt, Shift(tuple(direction.tolist())), scope, keep_error=keep_error):
        shifted = place.lmm.hidden_states(prompt, place.layer)
    torch.testing.assert_close(shifted - clean, scope.of_prompt(prompt)[..., None] * direction, atol=1e-5, rtol=1e-4)


def test_what_captions_may_mention_comes_from_the_label_maps_of_every_kind(place):
    rows = []
    for n, (thing, word) in enumerate([(1, 2), (2, 0), (0, 1)]):
        grids = {kind: np.zeros((4, 4), np.uint8) for kind in ("object", "word")}
        grids["object"][0, 0], grids["word"][3, 3] = thing, word
        rows.append({"image": noise(40, 40, n)} | {kind: Image.fromarray(grid) for kind, grid in grids.items()})
    concepts = {"object": ["cat", "owl"], "word": ["go", "stop", "wait"]}
    things = {"object": ["owl", "cat"], "word": ["stop", "go"]}
    methods = {"untouched": Method((None,))}
    found = measure_captions(place, Dataset.from_list(rows), [2, 0, 0], things, concepts, methods, "what ?")
    assert found.names == ["owl", "cat", "stop", "go"] and found.visible == [["cat", "stop"], ["go"]]
    assert len(found.texts["untouched"]) == 2
