"""What segmenters and similarity answer is what the same transformers classes answer when they are called by hand."""

import math

import grounders
import numpy as np
import pytest
import torch
from models import noise
from PIL import Image
from transformers import (
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    SamModel,
    SamProcessor,
)

from lmm_sae_nb.score.segmenters import BoxSegmenter, PromptedSegmenter
from lmm_sae_nb.score.similarity import ImageTextSimilarity, clip_score

IMAGES = [noise(80, 50, 0), noise(64, 64, 1), noise(40, 90, 2)]
CONCEPTS = ["cat", "a red dog", "dog"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grounders")
    makes = (grounders.clipseg, grounders.clip, grounders.grounding_dino, grounders.owlv2, grounders.sam)
    return {make.__name__: str(grounders.save(make, folder / make.__name__)) for make in makes}


# ---- CLIPSeg --------------------------------------------------------------------------------------------------


@torch.no_grad()
def chances(folder, image, concept):
    """The probability of each pixel by hand, one picture at a time."""
    model = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    processor = CLIPSegProcessor.from_pretrained(folder)
    logits = model(**processor(text=[concept], images=[image], return_tensors="pt")).logits
    logits = logits.reshape(1, 1, grounders.SIDE, grounders.SIDE)
    full = torch.nn.functional.interpolate(logits, image.size[::-1], mode="bilinear", align_corners=False)
    return 1 / (1 + np.exp(-full[0, 0].numpy().astype(float)))


def test_clipseg_masks_are_where_the_concept_is_likelier_than_the_threshold(saved):
    threshold = float(np.median(chances(saved["clipseg"], IMAGES[0], CONCEPTS[0])))
    segment = PromptedSegmenter.load(saved["clipseg"], threshold=threshold, batch=2)
    answers = segment(IMAGES, CONCEPTS)
    kept = []
    for image, concept, (masks, scores) in zip(IMAGES, CONCEPTS, answers, strict=True):
        chance = chances(saved["clipseg"], image, concept)
        sure = np.abs(chance - threshold) > 1e-5
        assert masks.dtype == bool and masks.shape == (len(scores), image.height, image.width) and len(scores) < 2
        assert np.array_equal(masks.any(0)[sure], (chance > threshold)[sure])
        if len(scores):
            assert scores[0] == pytest.approx(chance[masks[0]].mean(), abs=1e-4)
        kept.append(masks.mean())
    assert 0.3 < kept[0] < 0.7


def test_a_concept_that_is_nowhere_likely_has_no_candidate(saved):
    for masks, scores in PromptedSegmenter.load(saved["clipseg"], threshold=1.0)(IMAGES, CONCEPTS):
        assert masks.shape[0] == 0 and scores.shape == (0,)
    assert masks.shape == (0, 90, 40)


def test_the_batch_changes_nothing(saved):
    one = PromptedSegmenter.load(saved["clipseg"], threshold=0.4, batch=1)(IMAGES, CONCEPTS)
    all_at_once = PromptedSegmenter.load(saved["clipseg"], threshold=0.4, batch=8)(IMAGES, CONCEPTS)
    for a, b in zip(one, all_at_once, strict=True):
        assert len(a.scores) == len(b.scores) and np.count_nonzero(a.masks ^ b.masks) <= 2
        assert a.scores == pytest.approx(b.scores, abs=1e-4)


@pytest.mark.parametrize(
    "batch, places, looked",
    [
        (2, 2, [2, 1, 1]),  # the first two; the third, whose coming drops the second; the second again
        (4, 1, [2, 2]),  # a batch of more than is kept; of the first two the second stays
        (2, 0.9, [2, 2, 2, 1]),  # nothing is kept
    ],
)
def test_pictures_that_were_seen_are_not_looked_at_again_and_the_masks_are_those_of_one_who_has_not_seen_them(
    saved, batch, places, looked
):
    config = CLIPSegConfig.from_pretrained(saved["clipseg"])
    tokens = 1 + (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    one = len(config.extract_layers) * tokens * config.vision_config.hidden_size * 4  # bytes of a picture
    segment, eye = PromptedSegmenter.load(saved["clipseg"], threshold=0.4, batch=batch, room=int(places * one)), []
    segment.model.clip.vision_model.register_forward_hook(lambda *call: eye.append(call[2].last_hidden_state.shape[0]))
    rows = [IMAGES[0], IMAGES[1], IMAGES[1], IMAGES[0], IMAGES[2], IMAGES[0], IMAGES[1]]
    asked = [CONCEPTS[n % len(CONCEPTS)] for n in range(len(rows))]
    answers = segment(rows, asked)
    assert eye == looked
    assert sum(states.untyped_storage().nbytes() for states in segment._encoded.values()) <= places * one
    for image, concept, found in zip(rows, asked, answers, strict=True):
        (fresh,) = PromptedSegmenter.load(saved["clipseg"], threshold=0.4)([image], [concept])
        assert len(found.scores) == len(fresh.scores) and np.count_nonzero(found.masks ^ fresh.masks) <= 2
        assert found.scores == pytest.approx(fresh.scores, abs=1e-4)


# ---- a detector and SAM ---------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(detector, sam, image, concept, threshold):
    """The reference code's way, picture by picture: text with a full stop, boxes, three masks a box."""
    model, reader = AutoModelForZeroShotObjectDetection.from_pretrained(detector).eval(), AutoProcessor
    reader = reader.from_pretrained(detector)
    dino = "dino" in model.config.model_type
    inputs = reader(text=[f"{concept}."] if dino else [[concept]], images=[image], return_tensors="pt")
    outputs = model(**inputs)
    scores = outputs.logits.sigmoid().amax(-1)[0]
    x, y, w, h = outputs.pred_boxes[0].unbind(-1)
    across, down = image.size if dino else [max(image.size)] * 2  # OWLv2 pads to a square
    boxes = torch.stack([(x - w / 2) * across, (y - h / 2) * down, (x + w / 2) * across, (y + h / 2) * down], 1)
    keep = scores > threshold
    boxes, scores = boxes[keep], scores[keep]
    boxes[:, 0::2], boxes[:, 1::2] = boxes[:, 0::2].clamp(0, image.width), boxes[:, 1::2].clamp(0, image.height)
    if not len(boxes):
        return boxes, np.zeros((0, *image.size[::-1]), bool), np.zeros(0)
    masker, prompter = SamModel.from_pretrained(sam).eval(), SamProcessor.from_pretrained(sam)
    prompt = prompter(image, input_boxes=[boxes.tolist()], return_tensors="pt")
    drawn = masker(pixel_values=prompt.pixel_values, input_boxes=prompt.input_boxes.float(), multimask_output=True)
    masks = prompter.image_processor.post_process_masks(
        drawn.pred_masks, prompt.original_sizes, prompt.reshaped_input_sizes
    )
    ious = drawn.iou_scores[0].clamp(0, 1)
    return boxes, masks[0].reshape(-1, *image.size[::-1]).numpy(), (ious * scores[:, None]).reshape(-1).numpy()


@pytest.mark.parametrize("detector", ["grounding_dino", "owlv2"])
def test_a_detector_and_sam_draw_three_masks_for_each_box(saved, detector):
    segment = BoxSegmenter.load(saved[detector], saved["sam"], threshold=0.0, batch=2)
    finder, reader = segment.detector, segment.detector_processor
    with torch.no_grad():
        all_scores = finder(**reader(text=[["cat"]], images=[IMAGES[0]], return_tensors="pt")).logits.sigmoid().amax(-1)
    ranked = all_scores.flatten().sort().values
    segment.threshold = float(ranked[len(ranked) // 2 :][:2].mean())  # between two scores
    answers, boxes = segment(IMAGES, CONCEPTS), segment.boxes(IMAGES, CONCEPTS)
    counts = []
    for image, concept, found, (places, _) in zip(IMAGES, CONCEPTS, answers, boxes, strict=True):
        expected, masks, sure = by_hand(saved[detector], saved["sam"], image, concept, segment.threshold)
        assert torch.allclose(places, expected, atol=0.05)
        assert found.masks.shape == (3 * len(expected), image.height, image.width)
        assert np.count_nonzero(found.masks ^ masks) <= 0.01 * masks.size
        assert found.scores == pytest.approx(sure, abs=1e-3)
        counts.append(len(expected))
    assert 0 < counts[0] < all_scores.numel(), "a threshold that keeps some boxes and not all"


@pytest.mark.parametrize("detector", ["grounding_dino", "owlv2"])
def test_a_detector_that_finds_nothing_has_no_candidate(saved, detector):
    answers = BoxSegmenter.load(saved[detector], saved["sam"], threshold=1.0)(IMAGES, CONCEPTS)
    assert [found.masks.shape for found in answers] == [(0, 50, 80), (0, 64, 64), (0, 90, 40)]
    assert [found.scores.shape for found in answers] == [(0,)] * 3


# ---- CLIP -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_similarity_is_the_cosine(saved):
    model, processor = CLIPModel.from_pretrained(saved["clip"]).eval(), CLIPProcessor.from_pretrained(saved["clip"])
    expected = []
    for image, text in zip(IMAGES, CONCEPTS, strict=True):
        output = model(**processor(text=[text], images=[image], return_tensors="pt"))
        expected.append(float(output.logits_per_image / model.logit_scale.exp()))
    cosines = ImageTextSimilarity.load(saved["clip"], batch=2)(IMAGES, CONCEPTS)
    assert cosines == pytest.approx(expected, abs=1e-5) and cosines.shape == (3,)
    assert len({round(float(c), 4) for c in cosines}) == 3


def test_the_clip_score_is_a_hundred_cosines_and_never_negative():
    angles = np.array([0, math.pi / 3, math.pi / 2, math.pi])
    assert clip_score(np.cos(angles)) == pytest.approx([100, 50, 0, 0])


def test_a_text_longer_than_clip_reads_is_cut(saved):
    similarity = ImageTextSimilarity.load(saved["clip"])
    long = " ".join(["cat"] * 40)
    assert similarity(IMAGES[:1], [long]) == pytest.approx(similarity(IMAGES[:1], [" ".join(["cat"] * 6)]), abs=1e-6)


# ---- what is asked --------------------------------------------------------------------------------------------


@pytest.fixture(params=["prompted", "boxes", "similarity"])
def model(request, saved):
    if request.param == "prompted":
        return PromptedSegmenter.load(saved["clipseg"])
    if request.param == "boxes":
        return BoxSegmenter.load(saved["grounding_dino"], saved["sam"])
    return ImageTextSimilarity.load(saved["clip"])


def test_bad_questions_are_refused(model):
    with pytest.raises(ValueError, match="3 images and 1 texts; give a text each"):
        model(IMAGES, ["cat"])
    with pytest.raises(ValueError, match="3 images and 1 texts"):
        model(IMAGES, "cat")
    with pytest.raises(ValueError, match="text 1 is ' '"):
        model(IMAGES[:2], ["cat", " "])
    with pytest.raises(ValueError, match="image 0 is ndarray"):
        model([np.zeros((4, 4, 3))], ["cat"])
    with pytest.raises(ValueError, match="image 0 is 0 x 4 px"):
        model([Image.new("RGB", (0, 4))], ["cat"])
    assert len(model([], [])) == 0


def test_pictures_of_any_mode_are_seen_in_rgb(model):
    grey, colour = IMAGES[0].convert("L"), IMAGES[0].convert("L").convert("RGB")
    one, other = model([grey], ["cat"]), model([colour], ["cat"])
    for a, b in zip(one, other, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a, tuple) else a == b


def test_damaged_weights_are_an_error_not_an_empty_answer(model):
    for part in ("model", "detector"):
        if hasattr(model, part):
            with torch.no_grad():
                for weights in getattr(model, part).parameters():
                    weights.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        model(IMAGES, CONCEPTS)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_thresholds_are_probabilities(saved, threshold):
    with pytest.raises(ValueError, match="give a probability"):
        PromptedSegmenter.load(saved["clipseg"], threshold=threshold)
    with pytest.raises(ValueError, match="give a probability"):
        BoxSegmenter.load(saved["owlv2"], saved["sam"], threshold=threshold)


def test_missing_models_and_empty_batches_are_named(saved, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        PromptedSegmenter.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="batch is 0"):
        ImageTextSimilarity.load(saved["clip"], batch=0)
