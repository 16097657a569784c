"""Segmenters that find a concept by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

from lmm_sae_nb.support.images import pixel_hash


class Candidates(NamedTuple):
    """What a segmenter found in one picture: masks (n, height, width), scores (n,) float32 in [0, 1]; n may be 0."""

    masks: Bool[np.ndarray, "n height width"]
    scores: Float[np.ndarray, " n"]

    @classmethod
    def none(cls, image: Image.Image) -> Candidates:
        """No candidate, for a picture of this size."""
        return cls(np.zeros((0, image.height, image.width), bool), np.zeros(0, np.float32))


Segmenter = Callable[[Sequence[Image.Image], Sequence[str]], list[Candidates]]


class PromptedSegmenter:
    """One mask for each picture and concept from a CLIPSeg: where the concept is likelier than `threshold`.

    The logits are brought to the picture's size by bilinear interpolation. The score is the mean probability under
    the mask; a picture in which no pixel passes the threshold has no candidate. What the eye makes of the last pictures
    is remembered, up to `room` bytes: many are looked for in the same ones, and it does not depend on the concept. The
    model given is put into eval mode, its parameters without gradients.
    """

    def __init__(
        self,
        model: CLIPSegForImageSegmentation,
        processor: CLIPSegProcessor,
        *,
        threshold: float = 0.5,
        batch: int = 16,
        room: int = 2**29,
    ):
        self.threshold, self.batch = _share(threshold, "threshold"), _positive(batch)
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self._seen: LRUCache[str, Tensor] = LRUCache(room, _bytes_of)

    @classmethod
    def load(cls, name: str | Path, *, device: str = "cpu", **options) -> PromptedSegmenter:
        """From a folder or a name on the hub. OSError if there is no such model."""
        model = CLIPSegForImageSegmentation.from_pretrained(name, dtype=torch.float32).to(device)
        return cls(model, CLIPSegProcessor.from_pretrained(name), **options)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], concepts: Sequence[str]) -> list[Candidates]:
        found = []
        for pictures, texts in _batches(images, concepts, self.batch):
            read = self.processor(text=texts, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
            wanted = self.model.get_conditional_embeddings(len(texts), **read)
            logits = _finite(self.model.decoder(list(self._see(pictures)), wanted).logits, "CLIPSeg")
            for picture, one in zip(pictures, logits, strict=True):
                chance = F.interpolate(one[None, None], (picture.height, picture.width), mode="bilinear")[0].sigmoid()
                mask = chance > self.threshold
                found.append(
                    Candidates(mask.cpu().numpy(), chance[mask].mean()[None].cpu().numpy())
                    if mask.any()
                    else Candidates.none(picture)
                )
        return found

    def _see(self, pictures: list[Image.Image]) -> Float[Tensor, "layers pictures tokens width"]:
        """What the decoder reads of each picture: the eye's states behind the layers that it extracts."""
        keys = list(map(pixel_hash, pictures))
        found = {key: self._seen[key] for key in keys if key in self._seen}
        new = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in found}
        if new:
            pixels = self.processor(images=list(new.values()), return_tensors="pt")["pixel_values"]
            states = self.model.clip.vision_model(
                pixels.to(self.model.device), output_hidden_states=True, interpolate_pos_encoding=True
            ).hidden_states
            layers = torch.stack([states[layer + 1] for layer in self.model.extract_layers], 1)
            found.update(zip(new, layers, strict=True))
        for key in new:
            if _bytes_of(found[key]) <= self._seen.maxsize:
                self._seen[key] = found[key].clone()  # not a view, which would hold all that were seen with it
        return torch.stack([found[key] for key in keys], 1)


def _bytes_of(states: Tensor) -> int:
    return states.numel() * states.element_size()


class BoxSegmenter:
    """The paper's GroundingDINO and SAM, or another zero-shot detector and SAM: three masks for each box found.

    The detector is asked for the concept alone and its boxes above `threshold` (the reference code: 0.3) are SAM's
    prompts. A mask's score is the box's times SAM's own estimate of the mask's IoU. No box, no candidate. The reference
    code resizes pictures to 336 x 336 pixels first and unites all masks; both are the caller's choice here. The
    models given are put into eval mode, their parameters without gradients.
    """

    def __init__(
        self, detector, reader, sam: SamModel, prompter: SamProcessor, *, threshold: float = 0.3, batch: int = 8
    ):
        self.threshold, self.batch = _share(threshold, "threshold"), _positive(batch)
        self.detector, self.reader, self.sam, self.prompter = (
            detector.eval().requires_grad_(False),
            reader,
            sam.eval().requires_grad_(False),
            prompter,
        )

    @classmethod
    def load(cls, detector: str | Path, sam: str | Path, *, device: str = "cpu", **options) -> BoxSegmenter:
        """From folders or names on the hub: `IDEA-Research/grounding-dino-base` (or `google/owlv2-base-patch16`) and
        `facebook/sam-vit-huge`. OSError if there is no such model, ValueError for a detector that reads no text."""
        finder = AutoModelForZeroShotObjectDetection.from_pretrained(detector, dtype=torch.float32).to(device)
        masker = SamModel.from_pretrained(sam, dtype=torch.float32).to(device)
        return cls(
            finder, AutoProcessor.from_pretrained(detector), masker, SamProcessor.from_pretrained(sam), **options
        )

    @torch.no_grad()
    def boxes(self, images: Sequence[Image.Image], concepts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """For each picture the boxes (n, 4) in its pixels as left, top, right, bottom, cut at its edges, and their
        scores (n,)."""
        _check(images, concepts)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        of_size: dict[tuple[int, int], list[int]] = {}  # GroundingDINO sees what pads smaller pictures beside larger
        for number, image in enumerate(images):
            of_size.setdefault(image.size, []).append(number)
        for (width, height), numbers in of_size.items():
            edges = torch.tensor([width, height, width, height], device=self.detector.device)
            for start in range(0, len(numbers), self.batch):
                chosen = numbers[start : start + self.batch]
                rows = self._detect([images[n].convert("RGB") for n in chosen], [concepts[n] for n in chosen])
                for number, row in zip(chosen, rows, strict=True):
                    found[number] = row["boxes"].clamp(min=0).minimum(edges), row["scores"]
        return [found[number] for number in range(len(images))]

    def _detect(self, pictures: list[Image.Image], texts: list[str]) -> list[dict[str, Tensor]]:
        longest = max(map(len, self.reader.tokenizer([f"{text}." for text in texts]).input_ids))
        asked = self.reader(
            text=[[text] for text in texts],
            images=pictures,
            padding="max_length",  # to the longest here: OWLv2's processor pads each text alone
            max_length=longest,
            return_tensors="pt",
        )
        outputs = self.detector(**asked.to(self.detector.device))
        _finite(outputs.pred_boxes, "the detector")  # the logits of padded words are -inf by right
        sizes = [(picture.height, picture.width) for picture in pictures]
        return self.reader.post_process_grounded_object_detection(outputs, threshold=self.threshold, target_sizes=sizes)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], concepts: Sequence[str]) -> list[Candidates]:
        answers = []
        for image, (boxes, scores) in zip(images, self.boxes(images, concepts), strict=True):
            masks, sure = [], []
            for part, weight in zip(boxes.split(self.batch), scores.split(self.batch), strict=True):
                if not len(part):
                    continue
                prompt = self.prompter(image.convert("RGB"), input_boxes=[part.tolist()], return_tensors="pt")
                prompt = prompt.to(self.sam.device, torch.float32)
                sizes = prompt.pop("original_sizes").tolist(), prompt.pop("reshaped_input_sizes").tolist()
                outputs = self.sam(**prompt, multimask_output=True)
                (drawn,) = self.prompter.post_process_masks(_finite(outputs.pred_masks, "SAM"), *sizes)
                masks.append(drawn.flatten(0, 1).cpu())
                sure.append((outputs.iou_scores[0].clamp(0, 1) * weight[:, None]).flatten().cpu())
            answers.append(
                Candidates(torch.cat(masks).numpy(), torch.cat(sure).numpy()) if masks else Candidates.none(image)
            )
        return answers


def _check(images: Sequence[Image.Image], texts: Sequence[str]) -> None:
    """ValueError for what no model should be asked."""
    if isinstance(texts, str) or len(images) != len(texts):
        raise ValueError(
            f"{len(images)} images and {1 if isinstance(texts, str) else len(texts)} texts; give a text each"
        )
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        if not isinstance(image, Image.Image) or not image.width or not image.height:
            what = f"{image.width} x {image.height} px" if isinstance(image, Image.Image) else type(image).__name__
            raise ValueError(f"image {number} is {what}; give PIL images with pixels")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text {number} is {text!r}; give a concept in words, and leave out latents without one")


def _batches(
    images: Sequence[Image.Image], texts: Sequence[str], batch: int
) -> Iterator[tuple[list[Image.Image], list[str]]]:
    """Pictures in RGB and their texts, so many at a time."""
    _check(images, texts)
    for start in range(0, len(texts), batch):
        chosen = slice(start, start + batch)
        yield [image.convert("RGB") for image in images[chosen]], list(texts[chosen])


def _finite(values: Tensor, who: str) -> Tensor:
    if not torch.isfinite(values).all():
        raise ValueError(f"{who} answered with numbers that are not finite; its weights are damaged: load others")
    return values.float()


def _share(value: float, name: str) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; give a probability from 0 to 1")
    return value


def _positive(batch: int) -> int:
    if batch < 1:
        raise ValueError(f"batch is {batch}; give how many pictures a model sees at once, at least 1")
    return batch
