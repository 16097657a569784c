"""Randomly initialised models of further families: true classes, true processors, small geometry, offline.

`models.py` has the families at the geometry of their published checkpoints; here a picture is a few patches, so that
training, caching, steering and attribution of one family take less than two seconds. FAMILIES has both.
"""

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import models
import numpy as np
import torch
import transformers
from models import WIDTH, chat_template, crop
from transformers import BatchFeature
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lmm_sae_nb.model.processor import NoVideo

SIDE = 56  # pixels of a crop


def words_of(*tokens: str, **names: str):
    """A tokenizer with these special tokens; `names` can be read as its attributes, as processors do."""
    made = models.tokenizer()
    made.add_tokens([*tokens, *names.values()], special_tokens=True)
    for name, token in names.items():
        setattr(made, name, token)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
    return made


def text(words, **more) -> dict:
    return models.text(words) | {"head_dim": 8} | more


def llava():
    """LLaVA-1.5: the patches of one crop."""
    words = words_of()
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**models.vision(SIDE, 14)),
        text_config=transformers.LlamaConfig(**text(words)),
        image_token_id=words.convert_tokens_to_ids(models.IMAGE),
    )
    processor = transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=crop(SIDE)),
        tokenizer=words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(),
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def _qwen(kind: str, processor: type, image_processor, text_settings: dict, vision: dict, **tokens: str):
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"} | tokens
    words = words_of(*names.values())
    config_class = getattr(transformers, f"{kind}Config")
    config = config_class(
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2} | vision,
        text_config=text(words) | text_settings,
        **{f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    made = processor(
        image_processor=image_processor,
        tokenizer=words,
        video_processor=NoVideo(),
        chat_template=chat_template(models.VISION_START + names["image"] + models.VISION_END),
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config), made


MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def qwen2_vl():
    """Qwen2-VL: any number of 14 px patches, merged two by two."""
    vision = {"embed_dim": 16, "hidden_size": WIDTH, "mlp_ratio": 2}
    rope = {"rope_parameters": MROPE}
    return _qwen("Qwen2VL", transformers.Qwen2VLProcessor, Qwen2VLImageProcessorPil(), rope, vision)


def qwen3_vl():
    """Qwen3-VL: features of vision layers are added to the first decoder layers (deepstack)."""
    vision = {"out_hidden_size": WIDTH, "patch_size": 14, "deepstack_visual_indexes": [0, 1],
              "num_position_embeddings": 64}  # fmt: skip
    rope = {"rope_parameters": MROPE | {"mrope_interleaved": True}}
    images = Qwen2VLImageProcessorPil(patch_size=14)
    return _qwen("Qwen3VL", transformers.Qwen3VLProcessor, images, rope, vision)


def qwen3_5():
    """Qwen3.5: three of four decoder layers have linear attention."""
    vision = {"out_hidden_size": WIDTH, "patch_size": 14, "num_position_embeddings": 64}
    rope = {"rope_parameters": MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0},
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"]}  # fmt: skip
    images = Qwen2VLImageProcessorPil(patch_size=14)
    return _qwen("Qwen3_5", transformers.Qwen3VLProcessor, images, rope, vision)


def glm4v():
    """GLM-4V: like Qwen2-VL, with other tokens around the image."""
    rope = {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}, "pad_token_id": 0}
    vision = {"out_hidden_size": WIDTH, "image_size": SIDE}
    tokens = {"image": "<|image|>", "video": "<|video|>", "image_start": models.VISION_START,
              "image_end": models.VISION_END, "video_start": "<|begin_of_video|>",
              "video_end": "<|end_of_video|>"}  # fmt: skip
    return _qwen("Glm4v", transformers.Glm4vProcessor, Glm4vImageProcessorPil(), rope, vision, **tokens)


def gemma3():
    """Gemma 3: soft tokens that are pooled patches and see each other in both directions; sliding windows."""
    words = words_of(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**models.vision(SIDE, 7), vision_use_head=False),
        text_config=text(
            words,
            sliding_window=64,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            query_pre_attn_scalar=8,
        ),
        mm_tokens_per_image=16,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id,
    )
    processor = transformers.Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size=crop(SIDE)),
        tokenizer=words,
        image_seq_length=16,
        chat_template=chat_template(words.boi_token),
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def internvl():
    """InternVL: tiles, then the whole image, all in one run of tokens."""
    words = words_of(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    config = transformers.InternVLConfig(
        vision_config=models.vision(SIDE, 7) | {"image_size": [SIDE, SIDE], "patch_size": [7, 7]},
        text_config=transformers.Qwen2Config(**text(words)),
        image_token_id=words.context_image_token_id,
        image_seq_length=16,
    )
    processor = transformers.InternVLProcessor(
        image_processor=GotOcr2ImageProcessorPil(size=crop(SIDE), crop_to_patches=True, max_patches=4),
        tokenizer=words,
        video_processor=NoVideo(),
        image_seq_length=16,
        chat_template=chat_template(words.context_image_token),
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def paligemma():
    """PaliGemma: the image and the question see each other in both directions; it always needs an image."""
    words = words_of(bos_token="<bos>", image_token="<image>")
    images = SiglipImageProcessorPil(size=crop(SIDE))
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(image_processor=images, tokenizer=words)
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**models.vision(SIDE, 14), vision_use_head=False).to_dict(),
        text_config=transformers.GemmaConfig(**text(words)).to_dict(),
        image_token_index=words.image_token_id,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def pixtral_processor() -> type:
    """Pixtral's processor asks for torchvision, from which it needs one function that the image part for PIL has."""
    from transformers.models.pixtral import image_processing_pil_pixtral as pil

    name = "transformers.models.pixtral.processing_pixtral_without_torchvision"
    file = Path(pil.__file__).with_name("processing_pixtral.py")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    there = {"transformers.models.pixtral.image_processing_pixtral": pil, name: module}
    with mock.patch.dict(sys.modules, there):
        spec.loader.exec_module(module)
    return module.PixtralProcessor


def mistral3():
    """Mistral 3 with Pixtral's processor: a token ends each row of patches."""
    words = words_of("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14,
            image_size=8 * 14,
        ),
        text_config=transformers.MistralConfig(**text(words)),
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
    )  # fmt: skip
    images = PixtralImageProcessorPil(size={"longest_edge": 8 * 14}, patch_size=28)
    processor = pixtral_processor()(
        image_processor=images,
        tokenizer=words,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=chat_template("[IMG]"),
    )
    return transformers.Mistral3ForConditionalGeneration(config), processor


class Tiles(SiglipImageProcessorPil):
    """Llama 4's image processor exists for torchvision only; this cuts pictures into the same crops."""

    max_patches = 4

    def __call__(self, images, **settings):
        crops, ratios = [], []
        for image in images:
            rows, cols = (
                (1, 2) if image.width > 1.5 * image.height else (2, 1) if image.height > 1.5 * image.width else (1, 1)
            )
            large = image.resize((cols * SIDE, rows * SIDE))
            parts = [
                large.crop((col * SIDE, row * SIDE, (col + 1) * SIDE, (row + 1) * SIDE))
                for row in range(rows)
                for col in range(cols)
            ]
            parts += [image.resize((SIDE, SIDE))] if rows * cols > 1 else []
            crops += [torch.tensor(np.array(part)).permute(2, 0, 1) / 127.5 - 1 for part in parts]
            ratios.append((rows, cols))
        return BatchFeature({"pixel_values": torch.stack(crops), "aspect_ratios": torch.tensor(ratios)})


def llama4():
    """Llama 4: tiles with separators, then the whole image; a mixture of experts, chunked attention."""
    names = ("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>",
             "<|tile_y_separator|>")  # fmt: skip
    words = words_of(*names)
    config = transformers.Llama4Config(
        vision_config=models.vision(SIDE, 7)
        | {"intermediate_size": 32, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
        text_config=text(words, intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=64),
        image_token_index=words.convert_tokens_to_ids("<|patch|>"),
        boi_token_index=words.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=words.convert_tokens_to_ids("<|image_end|>"),
    )
    processor = transformers.Llama4Processor(
        image_processor=Tiles(), tokenizer=words, patch_size=7, chat_template=chat_template("<|image|>")
    )
    return transformers.Llama4ForConditionalGeneration(config), processor


def aya_vision():
    """Aya Vision: tiles with their names between, then the whole image."""
    names = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL")
    words = words_of(*names, *(f"TILE_{number}" for number in range(1, 13)))
    config = transformers.AyaVisionConfig(
        vision_config=transformers.SiglipVisionConfig(**models.vision(SIDE, 7), vision_use_head=False).to_dict(),
        text_config=transformers.Cohere2Config(**text(words)).to_dict(),
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    processor = transformers.AyaVisionProcessor(
        image_processor=GotOcr2ImageProcessorPil(size=crop(SIDE), crop_to_patches=True, max_patches=4),
        tokenizer=words,
        patch_size=7,
        img_size=SIDE,
        downsample_factor=2,
        chat_template=chat_template(),
    )
    return transformers.AyaVisionForConditionalGeneration(config), processor


def idefics2():
    """Idefics2: a perceiver resamples the patches of any image to a few tokens without a place."""
    words = words_of()
    config = transformers.Idefics2Config(
        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": SIDE, "patch_size": 14},
        perceiver_config={"hidden_size": WIDTH, "resampler_n_latents": 8, "resampler_depth": 1, "resampler_n_heads": 2,
                          "resampler_head_dim": 8, "num_key_value_heads": 1},
        text_config=transformers.MistralConfig(**text(words)).to_dict(),
        image_token_id=words.convert_tokens_to_ids(models.IMAGE),
    )  # fmt: skip
    images = Idefics2ImageProcessorPil(size={"longest_edge": SIDE, "shortest_edge": 28}, do_image_splitting=False)
    processor = transformers.Idefics2Processor(
        image_processor=images, tokenizer=words, image_seq_len=8, chat_template=chat_template()
    )
    return transformers.Idefics2ForConditionalGeneration(config), processor


def mllama():
    """Llama 3.2 Vision: some of its decoder's layers look at the image by cross-attention."""
    words = words_of()
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_global_layers": 1,
              "attention_heads": 1, "vision_output_dim": 16, "image_size": SIDE, "intermediate_layers_indices": [1],
              "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1}  # fmt: skip
    written = models.text(words) | {"cross_attention_layers": [1], "bos_token_id": 0}
    return transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(
            vision_config=vision, text_config=written, image_token_index=words.convert_tokens_to_ids(models.IMAGE)
        )
    )


def florence2():
    """Florence-2: an encoder reads the image and the task, a decoder writes the answer."""
    vision = {"depths": [1, 1, 1, 1], "embed_dim": [8, 8, 8, 8], "num_heads": [1, 1, 1, 1],
              "num_groups": [1, 1, 1, 1], "projection_dim": WIDTH}  # fmt: skip
    written = transformers.BartConfig(
        vocab_size=400, d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.Florence2ForConditionalGeneration(
        transformers.Florence2Config(vision_config=vision, text_config=written.to_dict(), image_token_id=300)
    )


def blip2_t5():
    """BLIP-2 with a T5: the query tokens of the image go through T5's encoder."""
    written = transformers.T5Config(vocab_size=400, d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    mixer = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
             "encoder_hidden_size": 8}  # fmt: skip
    return transformers.Blip2ForConditionalGeneration(
        transformers.Blip2Config(
            vision_config=models.vision(SIDE, 14), qformer_config=mixer, text_config=written.to_dict(),
            image_token_index=300,
        )
    )  # fmt: skip


REFUSED = {make.__name__: make for make in (mllama, florence2, blip2_t5)}  # models alone: no processor would fit

FAMILIES = {name: make for name, make in models.FAMILIES.items() if name != "llava_next"} | {
    make.__name__: make
    for make in (
        llava, qwen2_vl, qwen3_vl, qwen3_5, glm4v, gemma3, internvl, paligemma, mistral3, llama4, aya_vision, idefics2,
    )
}  # fmt: skip


def make(family: str, seed: int = 0):
    """`(model, processor)` of one of FAMILIES, with this seed's weights, wide enough to tell tokens apart."""
    with mock.patch.dict(models.FAMILIES, FAMILIES):
        return models.make(family, seed)
