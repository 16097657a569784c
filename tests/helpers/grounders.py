"""Random segmenters and a random CLIP of the true classes, with processors built from nothing; the widths are narrow.

The PIL image processors are named outright: the default ones need torchvision.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2Processor,
    PreTrainedTokenizerFast,
    SamConfig,
    SamModel,
    SamProcessor,
    SwinConfig,
    ViTImageProcessorPil,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "?", "a", "cat", "dog", "red")
SIDE = 64
NARROW = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = NARROW | {"image_size": SIDE, "patch_size": 16}
TEXT = NARROW | {
    "vocab_size": len(WORDS),
    "max_position_embeddings": 8,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
SQUARE = {"height": SIDE, "width": SIDE}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, between [CLS] and [SEP]."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=8, **special)


def clipseg():
    config = CLIPSegConfig(
        text_config=TEXT, vision_config=VISION, projection_dim=8, extract_layers=[0, 1], reduce_dim=8,
        decoder_num_attention_heads=2, decoder_intermediate_size=8,
    )  # fmt: skip
    eye = ViTImageProcessorPil(size=SQUARE)
    return CLIPSegForImageSegmentation(config), CLIPSegProcessor(eye, tokenizer())


def clip():
    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
    eye = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    return CLIPModel(config), CLIPProcessor(eye, tokenizer())


def grounding_dino():
    swin = SwinConfig(
        image_size=SIDE, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    bert = BertConfig(**NARROW, vocab_size=len(WORDS), max_position_embeddings=16, pad_token_id=0)
    config = GroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=32, encoder_layers=1, decoder_layers=2, num_queries=6,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_text_len=16,
    )  # fmt: skip
    eye = GroundingDinoImageProcessorPil(size={"shortest_edge": 2 * SIDE, "longest_edge": 4 * SIDE})
    return GroundingDinoForObjectDetection(config), GroundingDinoProcessor(eye, tokenizer())


def owlv2():
    config = Owlv2Config(text_config=TEXT, vision_config=VISION, projection_dim=16)
    return Owlv2ForObjectDetection(config), Owlv2Processor(Owlv2ImageProcessorPil(size=SQUARE), tokenizer())


def sam():
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8,
        "output_channels": 8, "mlp_dim": 16, "window_size": 4, "global_attn_indexes": [0], "num_pos_feats": 4,
    }  # fmt: skip
    prompts = {"hidden_size": 8, "image_size": SIDE, "patch_size": 8, "mask_input_channels": 4}
    drawing = {
        "hidden_size": 8, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 8,
        "iou_head_depth": 2,
    }  # fmt: skip
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=drawing)
    return SamModel(config), SamProcessor(SamImageProcessorPil(size={"longest_edge": SIDE}, pad_size=SQUARE))


def save(make, folder, seed: int = 0):
    """Write one of the above as `from_pretrained` reads it, with weights wide enough to tell pictures apart."""
    torch.manual_seed(seed)
    model, processor = make()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1 or not weights.any():
                weights.normal_(0, 0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
