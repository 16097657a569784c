"""The vision tower runs no more than needed, and the model's answers stay the same."""

from contextlib import contextmanager

import pytest
import torch
from models import FAMILIES, make, noise
from PIL import Image
from torch.testing import assert_close

from lmm_sae_nb.model.crops import first_equal, whole_images
from lmm_sae_nb.model.lmm import LMM


@contextmanager
def tower_calls(lmm: LMM):
    """The number of crops in each call of the vision tower."""
    calls = []
    handle = lmm.model.model.vision_tower.embeddings.register_forward_hook(lambda m, a, out: calls.append(len(out)))
    yield calls
    handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_crops_give_the_same_states_as_the_whole_model(family):
    lmm = LMM(*make(family))
    if family in ("idefics3", "smolvlm"):
        lmm.processor.image_processor.size = {"longest_edge": 512}
    pictures = [noise(), noise(seed=1), noise(), Image.new("RGB", (90, 70))]
    prompt = lmm.prompt(["Hm", "Hm?", "And?", "So"], pictures)
    with torch.no_grad():
        expected = lmm.model(**prompt.inputs, use_cache=False).logits
        assert_close(lmm.logits(prompt), expected, atol=1e-4, rtol=1e-4)


def test_an_image_that_fits_one_crop_is_seen_once_whatever_the_questions():
    lmm = LMM(*make("picture_world"))
    square, other = noise(192, 192), noise(192, 192, seed=1)
    prompt = lmm.prompt(["Hm", "Hm?", "So"], [square, other, square])
    with tower_calls(lmm) as calls:
        lmm.hidden_states(prompt, 0)
        lmm.generate(prompt, max_new_tokens=2)
        lmm.hidden_states(lmm.prompt("Hm", noise(192, 384)), 0)
        lmm.hidden_states(lmm.prompt("Hm"), 0)
    assert calls == [2, 2, 3]
    assert not lmm.model.model.vision_tower._forward_hooks and not lmm.model.model.vision_tower._forward_pre_hooks


@pytest.mark.parametrize("family", ["llava_next", "picture_world", "llava_onevision"])
def test_tiles_are_not_seen_if_only_the_whole_image_is_read(family):
    lmm = LMM(*make(family))
    prompt = lmm.prompt(["Hm", "Hm?"], [noise(100, 300), noise(400, 300, seed=1)])
    base = prompt.mask("base")
    last = int(base.any(0).nonzero().max()) + 1
    whole = whole_images(lmm.model, prompt.inputs)
    assert int(whole.sum()) == 2 < len(whole)
    with tower_calls(lmm) as calls:
        cut, uncut = lmm.hidden_states(prompt, 1, base_only=True), lmm.hidden_states(prompt, 1)
    assert calls == [2, len(whole)] and cut.shape[1] == last
    assert_close(cut[base[:, :last]], uncut[base], atol=1e-4, rtol=1e-4)


def test_the_first_equal_crop_is_that_of_a_comparison_of_all_pixels():
    kinds = torch.randn(3, 3, 30, 20, generator=torch.Generator().manual_seed(0))
    kinds[2] = kinds[0]
    kinds[2, 0, 1, 1] += 1  # a pixel between those that are looked at first
    numbers = torch.tensor([0, 1, 0, 2, 2, 1, 0])
    assert first_equal(kinds[numbers]).tolist() == [0, 1, 0, 3, 3, 1, 0]
    needed = torch.tensor([False, True, True, False, True, False, True])
    assert first_equal(kinds[numbers], needed).tolist() == [1, 1, 2, 1, 4, 1, 2]
