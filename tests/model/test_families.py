"""Families of models that are known and not known: what the pages do works with random models of the true classes."""

import capabilities
import families
import models
import pytest

from lmm_sae_nb.model.lmm import LMM

SIZES = {"qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_5", "glm4v", "mistral3"}  # their grid follows the image


def studied(family: str) -> LMM:
    model, processor = families.make(family)
    if family in ("idefics3", "smolvlm"):
        processor.image_processor.size = {"longest_edge": 512}
    return LMM(model, processor, image_size=(112, 84) if family in SIZES else None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_goes_all_the_way(family, tmp_path):
    lmm = studied(family)
    place = capabilities.train(lmm, tmp_path)
    capabilities.cache(place, tmp_path)
    capabilities.steer(place)
    capabilities.attribute(place)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mllama", r"\(mllama\) reads images by cross-attention: they never become tokens .* choose a model whose"),
        ("florence2", r"\(florence2\) has an encoder and a decoder: .* choose a decoder-only model"),
        ("blip2_t5", r"\(blip-2\) has an encoder and a decoder: .* choose a decoder-only model"),
    ],
)
def test_a_family_whose_images_become_no_tokens_is_refused_with_the_reason(family, reason):
    _, processor = models.make("picture_world")
    with pytest.raises(ValueError, match=reason):
        LMM(families.REFUSED[family](), processor)
