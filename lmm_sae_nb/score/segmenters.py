"""Find a concept in images by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from cachetools import LRUCache
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    SamModel,
    SamProcessor,
)

from lmm_sae_nb.model.loading import load_model
from lmm_sae_nb.score.batches import batches, require_batch_size, require_finite_output, require_pairs
from lmm_sae_nb.score.masks import FindConcept
from lmm_sae_nb.support.devices import choose_device
from lmm_sae_nb.support.images import pixel_hash, rgb
from lmm_sae_nb.truth.label_maps import Candidates, LabelMaps


class Segmentation(NamedTuple):
    """What a segmenter found in one image; there may be no mask.

    masks: in pixels of the image.
    scores: of each mask, float32 in [0, 1].
    """

    masks: Bool[np.ndarray, "n height width"]
    scores: Float[np.ndarray, " n"]

    @classmethod
    def none(cls, image: Image.Image) -> Segmentation:
        """Return no mask, for an image of this size."""
        return cls(np.zeros((0, image.height, image.width), bool), np.zeros(0, np.float32))


Segmenter = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[Segmentation]]  # images, and a concept for each


class PromptedSegmenter:
    """One mask for each image and concept from a CLIPSeg: the pixels where the concept is likelier than `threshold`.

    The logits are brought to the image's size by bilinear interpolation. The score is the mean probability under the
    mask. An image in which no pixel passes the threshold has no mask. The encoded images are remembered, because
    many concepts are looked for in the same image.

    model: is put into eval mode, without gradients.
    processor: the model's own.
    threshold: a probability.
    batch: images that the model reads at once.
    room: bytes of encoded images that are remembered.
    """

    def __init__(
        self, model: CLIPSegForImageSegmentation, processor: CLIPSegProcessor, *, threshold: float = 0.5,
        batch: int = 16, room: int = 2**29,
    ):  # fmt: skip
        self.threshold, self.batch = _require_probability(threshold), require_batch_size(batch)
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self._encoded: LRUCache[str, Tensor] = LRUCache(room, _bytes_of)

    @classmethod
    def load(cls, name: str | Path, *, device: str | torch.device | None = None, **options) -> PromptedSegmenter:
        """Load a model from a folder or the hub.

        device: by default a GPU if there is one.
        options: as for the class.

        Raises:
            OSError: there is no such model.
        """
        model = load_model(CLIPSegForImageSegmentation, name, dtype=torch.float32).to(choose_device(device))
        return cls(model, CLIPSegProcessor.from_pretrained(name), **options)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], concepts: Sequence[str]) -> list[Segmentation]:
        """Return what is found in each image of its concept; errors as `require_pairs`."""
        answers = []
        for pictures, texts in batches(images, concepts, self.batch):
            words = self.processor(text=texts, padding=True, truncation=True, return_tensors="pt")
            wanted = self.model.get_conditional_embeddings(len(texts), **words.to(self.model.device))
            logits = self.model.decoder(list(self._encode(pictures)), wanted).logits
            for picture, one in zip(pictures, require_finite_output(logits, "CLIPSeg"), strict=True):
                answers.append(self._segmentation(picture, one))
        return answers

    def _segmentation(self, image: Image.Image, logits: Float[Tensor, "rows cols"]) -> Segmentation:
        size = (image.height, image.width)
        probability = F.interpolate(logits[None, None], size, mode="bilinear")[0].sigmoid()
        mask = probability > self.threshold
        if not mask.any():
            return Segmentation.none(image)
        return Segmentation(mask.cpu().numpy(), probability[mask].mean()[None].cpu().numpy())

    def _encode(self, pictures: list[Image.Image]) -> Float[Tensor, "layers pictures tokens width"]:
        """Return what the decoder reads of each image: the vision model's states behind the layers it extracts."""
        keys = list(map(pixel_hash, pictures))
        encoded = {key: self._encoded[key] for key in keys if key in self._encoded}
        new = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in encoded}
        if new:
            pixels = self.processor(images=list(new.values()), return_tensors="pt")["pixel_values"]
            states = self.model.clip.vision_model(
                pixels.to(self.model.device), output_hidden_states=True, interpolate_pos_encoding=True
            ).hidden_states
            layers = torch.stack([states[layer + 1] for layer in self.model.extract_layers], 1)
            encoded.update(zip(new, layers, strict=True))
        for key in new:
            if _bytes_of(encoded[key]) <= self._encoded.maxsize:
                self._encoded[key] = encoded[key].clone()  # a view would keep its whole batch alive
        return torch.stack([encoded[key] for key in keys], 1)


def _bytes_of(states: Tensor) -> int:
    return states.numel() * states.element_size()


class BoxSegmenter:
    """A zero-shot detector and SAM, such as the paper's Grounding DINO and SAM: three masks for each box.

    The detector looks for the concept, and its boxes are SAM's prompts. A mask's score is the score of its box times
    SAM's estimate of the mask's IoU. No box, no mask. The reference code first resizes images to 336 x 336 pixels and
    unites all masks; here the caller chooses.

    detector, sam: are put into eval mode, without gradients.
    detector_processor, sam_processor: the models' own.
    threshold: a box needs a higher score; the reference code's is 0.3.
    batch: images, or boxes, that a model reads at once.
    """

    def __init__(
        self, detector, detector_processor, sam: SamModel, sam_processor: SamProcessor, *, threshold: float = 0.3,
        batch: int = 8,
    ):  # fmt: skip
        self.threshold, self.batch = _require_probability(threshold), require_batch_size(batch)
        self.detector, self.detector_processor = detector.eval().requires_grad_(False), detector_processor
        self.sam, self.sam_processor = sam.eval().requires_grad_(False), sam_processor

    @classmethod
    def load(
        cls, detector: str | Path, sam: str | Path, *, device: str | torch.device | None = None, **options
    ) -> BoxSegmenter:
        """Load the models from folders or the hub.

        detector: such as `IDEA-Research/grounding-dino-base` or `google/owlv2-base-patch16`.
        sam: such as `facebook/sam-vit-huge`.
        device: by default a GPU if there is one.
        options: as for the class.

        Raises:
            OSError: there is no such model.
            ValueError: the detector reads no text.
        """
        detector_model = load_model(AutoModelForZeroShotObjectDetection, detector, dtype=torch.float32)
        sam_model = load_model(SamModel, sam, dtype=torch.float32)
        processors = AutoProcessor.from_pretrained(detector), SamProcessor.from_pretrained(sam)
        device = choose_device(device)
        return cls(detector_model.to(device), processors[0], sam_model.to(device), processors[1], **options)

    @torch.no_grad()
    def boxes(self, images: Sequence[Image.Image], concepts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """Return for each image the boxes and their scores; errors as `require_pairs`.

        A box is left, top, right, bottom in pixels, cut at the image's edges.
        """
        require_pairs(images, concepts)
        boxes: dict[int, tuple[Tensor, Tensor]] = {}
        of_size: dict[tuple[int, int], list[int]] = {}  # one size at a time: Grounding DINO would see the padding
        for number, image in enumerate(images):
            of_size.setdefault(image.size, []).append(number)
        for (width, height), numbers in of_size.items():
            edges = torch.tensor([width, height, width, height], device=self.detector.device)
            for start in range(0, len(numbers), self.batch):
                part = numbers[start : start + self.batch]
                rows = self._detect([rgb(images[n]) for n in part], [concepts[n] for n in part])
                for number, row in zip(part, rows, strict=True):
                    boxes[number] = row["boxes"].clamp(min=0).minimum(edges), row["scores"]
        return [boxes[number] for number in range(len(images))]

    def _detect(self, pictures: list[Image.Image], texts: list[str]) -> list[dict[str, Tensor]]:
        longest = max(map(len, self.detector_processor.tokenizer([f"{text}." for text in texts]).input_ids))
        inputs = self.detector_processor(
            text=[[text] for text in texts],
            images=pictures,
            padding="max_length",  # to the longest here: OWLv2's processor pads each text alone
            max_length=longest,
            return_tensors="pt",
        )
        outputs = self.detector(**inputs.to(self.detector.device))
        require_finite_output(outputs.pred_boxes, "the detector")  # logits of padded words are -inf on purpose
        sizes = [(picture.height, picture.width) for picture in pictures]
        return self.detector_processor.post_process_grounded_object_detection(
            outputs, threshold=self.threshold, target_sizes=sizes
        )

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], concepts: Sequence[str]) -> list[Segmentation]:
        """Return what is found in each image of its concept; errors as `require_pairs`."""
        return [
            self._segmentation(image, boxes, scores)
            for image, (boxes, scores) in zip(images, self.boxes(images, concepts), strict=True)
        ]

    def _segmentation(self, image: Image.Image, boxes: Tensor, scores: Tensor) -> Segmentation:
        masks, mask_scores = [], []
        for part, weights in zip(boxes.split(self.batch), scores.split(self.batch), strict=True):
            if not len(part):
                continue
            prompt = self.sam_processor(rgb(image), input_boxes=[part.tolist()], return_tensors="pt")
            prompt = prompt.to(self.sam.device, torch.float32)
            sizes = prompt.pop("original_sizes").tolist(), prompt.pop("reshaped_input_sizes").tolist()
            outputs = self.sam(**prompt, multimask_output=True)
            predicted = require_finite_output(outputs.pred_masks, "SAM")
            (drawn,) = self.sam_processor.post_process_masks(predicted, *sizes)
            masks.append(drawn.flatten(0, 1).cpu())
            mask_scores.append((outputs.iou_scores[0].clamp(0, 1) * weights[:, None]).flatten().cpu())
        if not masks:
            return Segmentation.none(image)
        return Segmentation(torch.cat(masks).numpy(), torch.cat(mask_scores).numpy())


class SegmentedImages:
    """A segmenter that finds concepts in the images of a data set by their indices, as `LabelMaps` does.

    segmenter: takes images and a concept for each.
    images: of the data set.
    room: bytes of the last answers that are remembered.
    """

    def __init__(self, segmenter: Segmenter, images: Sequence[Image.Image], room: int = 256 * 2**20):
        self._segmenter, self._images = segmenter, images
        self._answers: LRUCache[tuple[int, str], Candidates] = LRUCache(room, getsizeof=lambda masks: masks.nbytes)

    def __call__(self, indices: Sequence[int], concept: str) -> list[Candidates]:
        """Return for each image the candidate masks of the concept, the likeliest first."""
        masks = {n: self._answers[n, concept] for n in indices if (n, concept) in self._answers}
        new = [index for index in dict.fromkeys(indices) if index not in masks]
        answers = self._segmenter([self._images[index] for index in new], [concept] * len(new)) if new else []
        for index, answer in zip(new, answers, strict=True):
            masks[index] = answer.masks[np.argsort(-answer.scores, kind="stable")]
            if masks[index].nbytes <= self._answers.maxsize:
                self._answers[index, concept] = masks[index]
        return [masks[index] for index in indices]


def open_segmenters(
    truth: LabelMaps | None, segmenter: str | Path, detector: str | Path, images: Sequence[Image.Image],
    device: str | torch.device | None = None,
) -> dict[str, FindConcept]:  # fmt: skip
    """Return those who say where a concept is, by name: the ground truth first, if there is one, then the segmenter.

    truth: None if the images have no label maps.
    segmenter: a CLIPSeg, or with a detector a SAM: a folder or a name on the hub; "" if there is none.
    detector: finds boxes for the SAM; "" if the segmenter reads names itself.
    images: of the data set.
    device: of the models; by default a GPU if there is one.

    Raises:
        ValueError: there is neither.
    """
    segmenters: dict[str, FindConcept] = {"ground truth": truth} if truth else {}
    if segmenter:
        name = Path(segmenter).name.removeprefix("tiny-")
        segmenters[name] = SegmentedImages(
            BoxSegmenter.load(detector, segmenter, device=device)
            if detector
            else PromptedSegmenter.load(segmenter, device=device),
            images,
        )
    if not segmenters:
        raise ValueError("there is neither a ground truth nor a segmenter; give `concepts` or `segmenter`")
    return segmenters


def _require_probability(threshold: float) -> float:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; give a probability from 0 to 1")
    return threshold
