"""Randomly initialised models of the true classes, with processors built from nothing, offline.

The geometry (image and patch sizes, tiles, merging) is that of the published checkpoints; the widths and
depths are not, so that a forward takes milliseconds. Each function makes a new `(model, processor)`.
"""

from collections.abc import Iterable

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
    processing_utils,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.video_processing_utils import VideoProcessorMixin

from lmm_sae_nb.model.processor import NoVideo

LAYERS, WIDTH = 3, 16
LLAVA_NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_PINPOINTS = [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)]
PICTURE_WORLD_PINPOINTS = [[192, 192], [192, 384], [384, 192]]

IMAGE, VIDEO, IM_START, IM_END, PAD = "<image>", "<video>", "<|im_start|>", "<|im_end|>", "<|pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
MARKERS = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", VISION_START, VISION_END]
ROWS_COLS = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]


def chat_template(image: str = IMAGE) -> str:
    """ChatML, the image where the conversation has it."""
    return (
        "{% for message in messages %}" + IM_START + "{{ message.role }}\n"
        "{% for part in message.content %}"
        "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}" + IM_END + "\n{% endfor %}"
        "{% if add_generation_prompt %}" + IM_START + "assistant\n{% endif %}"
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens of all the families."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=IM_END, pad_token=PAD)
    made.add_tokens([IM_START, IMAGE, VIDEO, *MARKERS, *ROWS_COLS], special_tokens=True)
    return made


def text(made: PreTrainedTokenizerFast) -> dict:
    """A narrow language model for this vocabulary."""
    return {
        "vocab_size": len(made),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": made.eos_token_id,
        "pad_token_id": made.pad_token_id,
    }


def vision(image_size: int, patch_size: int) -> dict:
    """A narrow vision tower of this geometry."""
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
    }


def crop(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


# processors look for this class here, and without torchvision it is not there
processing_utils.transformers_module.VideoProcessorMixin = VideoProcessorMixin


def llava_next(
    image_size: int = 336, patch_size: int = 14, pinpoints: list = LLAVA_NEXT_PINPOINTS, text_config=LlamaConfig, **more
):
    """llava-hf/llama3-llava-next-8b-hf's geometry: 24 x 24 base patches and five tile shapes; any language model."""
    words = tokenizer()
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision(image_size, patch_size)),
        text_config=text_config(**text(words), **more),
        image_grid_pinpoints=pinpoints,
        image_token_id=words.convert_tokens_to_ids(IMAGE),
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size=crop(image_size), image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(),
    )
    return LlavaNextForConditionalGeneration(config), processor


def picture_world():
    """The embedded model's geometry: a 192 px crop in 16 px patches, 12 x 12 of them."""
    return llava_next(192, 16, PICTURE_WORLD_PINPOINTS)


def llava_onevision():
    """llava-hf/llava-onevision-qwen2-0.5b-ov-hf's geometry: 27 x 27 base patches, tiles pooled past nine."""
    words = tokenizer()
    images = LlavaOnevisionImageProcessorPil(size=crop(384), image_grid_pinpoints=ONEVISION_PINPOINTS)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision(384, 14), vision_use_head=False),
        text_config=Qwen2Config(**text(words)),
        image_grid_pinpoints=ONEVISION_PINPOINTS,
        image_token_id=words.convert_tokens_to_ids(IMAGE),
        video_token_id=words.convert_tokens_to_ids(VIDEO),
        vision_feature_select_strategy="full",
    )
    processor = LlavaOnevisionProcessor(
        image_processor=images,
        tokenizer=words,
        video_processor=NoVideo(),
        num_image_tokens=729,
        vision_feature_select_strategy="full",
        chat_template=chat_template(),
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def qwen2_5_vl():
    """Qwen/Qwen2.5-VL's geometry: any number of 14 px patches, merged two by two, attention in windows."""
    words = tokenizer()
    image, video = "<|image_pad|>", "<|video_pad|>"
    words.add_tokens([image, video], special_tokens=True)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 1,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
        },
        text_config=text(words) | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        image_token_id=words.convert_tokens_to_ids(image),
        video_token_id=words.convert_tokens_to_ids(video),
        vision_start_token_id=words.convert_tokens_to_ids(VISION_START),
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(),
        tokenizer=words,
        video_processor=NoVideo(),
        chat_template=chat_template(VISION_START + image + VISION_END),
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _idefics(config_class, model_class, processor_class, image_class, longest_edge: int, **video):
    words = tokenizer()
    config = config_class(
        vision_config=vision(512, 16),
        text_config=LlamaConfig(**text(words)).to_dict(),
        scale_factor=4,
        image_token_id=words.convert_tokens_to_ids(IMAGE),
        pad_token_id=words.pad_token_id,
    )
    images = image_class(size={"longest_edge": longest_edge}, max_image_size={"longest_edge": 512})
    processor = processor_class(
        image_processor=images, tokenizer=words, image_seq_len=64, chat_template=chat_template(), **video
    )
    return model_class(config), processor


def idefics3(longest_edge: int = 2048):
    """HuggingFaceTB/SmolVLM-256M-Instruct's geometry (its class is Idefics3): 512 px tiles, 8 x 8 tokens."""
    return _idefics(
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3Processor,
        Idefics3ImageProcessorPil,
        longest_edge,
    )


def smolvlm(longest_edge: int = 2048):
    """HuggingFaceTB/SmolVLM2-256M-Video-Instruct's geometry, as Idefics3's."""
    processing_smolvlm.num2words = processing_smolvlm.num2words or str  # asked for, though for videos only
    return _idefics(
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMProcessor,
        SmolVLMImageProcessorPil,
        longest_edge,
        video_processor=NoVideo(),
    )


def instructblip():
    """Salesforce/instructblip-vicuna-7b's geometry: 16 x 16 patches behind 32 query tokens, no template."""
    words = tokenizer()
    config = InstructBlipConfig(
        vision_config=vision(224, 14),
        qformer_config={
            "vocab_size": len(words),
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "encoder_hidden_size": 8,
            "pad_token_id": words.pad_token_id,
        },
        text_config=LlamaConfig(**text(words)).to_dict(),
        num_query_tokens=32,
        image_token_index=words.convert_tokens_to_ids(IMAGE),
    )
    processor = InstructBlipProcessor(
        image_processor=BlipImageProcessorPil(size=crop(224)),
        tokenizer=words,
        qformer_tokenizer=tokenizer(),
        num_query_tokens=32,
    )
    return InstructBlipForConditionalGeneration(config), processor


def dense(sae, x: torch.Tensor) -> torch.Tensor:
    """An SAE's latents z (..., n_latents) by eq. 1, zeros and all."""
    z = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    kept = z.topk(sae.k, -1)
    return torch.zeros_like(z).scatter(-1, kept.indices, kept.values).detach()


def noise(width: int = 100, height: int = 60, seed: int = 0) -> Image.Image:
    """A picture of random pixels, the same for the same seed."""
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


FAMILIES = {
    make.__name__: make
    for make in (llava_next, picture_world, llava_onevision, qwen2_5_vl, idefics3, smolvlm, instructblip)
}
LARGE = ("idefics3", "smolvlm")  # a picture has seventeen crops of 512 px


def params(families: Iterable[str] = FAMILIES) -> list:
    """Families as parameters of a test; those with large pictures are slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in families]


def make(family: str, seed: int = 0):
    """`(model, processor)` of one of FAMILIES, with this seed's weights, wide enough to tell tokens apart."""
    torch.manual_seed(seed)
    model, processor = FAMILIES[family]()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1 or not weights.any():
                weights.normal_(0, 0.3)
    return model.eval(), processor
