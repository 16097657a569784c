"""Large images are processed a few at a time, to the very batch that all of them at once give; misfits are named."""

import tracemalloc

import numpy as np
import pytest
import torch
from models import FAMILIES, make, noise, params
from PIL import Image

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.model import prompts, samples
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.images import UnfitImage, open_images

SIZES = [(100, 60), None, (60, 100), (301, 40)]
SMALL = {"idefics3": {"longest_edge": 728}, "smolvlm": {"longest_edge": 1024}}  # fewer tiles are quicker


@pytest.mark.parametrize("family", params())
def test_a_batch_in_portions_is_the_batch_of_all_at_once(family, monkeypatch):
    lmm = LMM(*FAMILIES[family](**SMALL.get(family, {})))
    sizes = [size for size in SIZES if size or family != "instructblip"]  # its Q-Former takes no text alone
    images = [size and noise(*size, seed=n) for n, size in enumerate(sizes)]
    texts = [f"{n} {'long ' * n}?" for n in range(len(images))]
    answers = ["yes", "no or so", "yes", "no"][: len(images)]
    whole = lmm.prompt(texts, images, answers=answers)
    for portion in (1, 12_100):
        monkeypatch.setattr(prompts, "PORTION", portion)
        parts = lmm.prompt(texts, [image and image.copy for image in images], answers=answers)  # opened by a call
        assert parts.inputs.keys() == whole.inputs.keys()
        for name, expected in whole.inputs.items():
            if isinstance(expected, torch.Tensor):
                assert torch.equal(parts.inputs[name], expected), name
            else:
                assert parts.inputs[name] == expected, name
        assert torch.equal(parts.answer_mask, whole.answer_mask)
        for mine, theirs in zip(parts.spans, whole.spans, strict=True):
            assert torch.equal(mine.kinds, theirs.kinds) and mine.grid == theirs.grid


def test_memory_holds_one_photograph_not_a_batch_of_them(lmm, monkeypatch):
    """Eight of 1.4 million pixels: their arrays, of 4 MB each, are made one after the other."""

    def photograph() -> Image.Image:
        return Image.fromarray(np.zeros((1200, 1200, 3), np.uint8))

    def most_at_once() -> int:
        tracemalloc.start()
        try:
            lmm.prompt([""] * 8, [photograph] * 8)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    together = most_at_once()
    monkeypatch.setattr(prompts, "PORTION", 1)
    assert most_at_once() < together / 3


def test_large_images_of_samples_are_not_kept_and_the_prompt_is_the_same(lmm, monkeypatch):
    rows = [{"image": noise(60 + n, 40, seed=n), "question": f"{n} ?", "answer": "yes"} for n in range(2)]
    (whole,) = samples.prompts(lmm, rows, [0, 1], 2)
    monkeypatch.setattr(samples, "LARGE", 0)
    monkeypatch.setattr(prompts, "PORTION", 1)
    assert callable(samples.light(lambda: rows[0])["image"])
    (parts,) = samples.prompts(lmm, rows, [0, 1], 2)
    assert torch.equal(parts.inputs["pixel_values"], whole.inputs["pixel_values"])
    assert torch.equal(parts.inputs["input_ids"], whole.inputs["input_ids"])


def test_an_image_that_the_processor_refuses_is_named_with_the_remedy(tmp_path):
    """Qwen2.5-VL takes no image of 400 x 1 px."""
    lmm = LMM(*make("qwen2_5_vl"))
    sae = TopKSAE(lmm.width, 24, 3, generator=torch.Generator().manual_seed(1))
    for n, size in enumerate([(56, 56), (400, 1), (56, 56)]):
        noise(*size, seed=n).save(tmp_path / f"{n}.png")
    place = SAEInPlace(lmm, sae, 0)
    pictures = open_images(tmp_path)
    with pytest.raises(UnfitImage, match=r"1\.png, 400 x 1 px, does not fit .*aspect ratio.*image_size=\(448, 448\)"):
        cache_activations(place, pictures, folder=tmp_path / "c")
    cache = cache_activations(place, pictures, unreadable="skip", folder=tmp_path / "c")
    assert cache.images == 2 and "1.png, 400 x 1 px" in cache.skipped[1]
    with pytest.raises(UnfitImage, match="image 1, 400 x 1 px"):
        lmm.prompt(["", ""], [noise(56, 56), noise(400, 1)])
    sized = LMM(lmm.model, lmm.processor, "sized", image_size=(56, 56))
    assert cache_activations(SAEInPlace(sized, place.sae, 0), pictures, folder=tmp_path / "d").images == 3
