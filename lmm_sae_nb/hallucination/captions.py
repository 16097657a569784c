"""CHAIR: how much of what a caption mentions is not in the image (Rohrbach et al., 2018), exactly, from label maps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from lmm_sae_nb.hallucination.answers import under
from lmm_sae_nb.hallucination.presence import visible_things
from lmm_sae_nb.hallucination.report import Method
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.support.intervals import Mean, Proportion, bounds, mean_interval, proportion
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.stages import Metrics
from lmm_sae_nb.truth.label_maps import LabelMaps


def mentioned(caption: str, names: Sequence[str]) -> list[str]:
    """Return the names that a caption mentions, each once; a name counts as whole words, and capitals do not count.

    A name inside a longer one that is mentioned there does not count: a "fire truck" is no "fire".

    names: of one word or several.
    """
    longest = sorted({name.lower() for name in names}, key=lambda name: (-len(name), name))
    pattern = r"(?<![\w-])(?:" + "|".join(map(re.escape, longest)) + r")(?![\w-])"
    return list(dict.fromkeys(re.findall(pattern, caption.lower()))) if longest else []


@dataclass(frozen=True)
class Captions:
    """Captions of the same images by several methods.

    names: of the things that are counted.
    visible: for each image, those that it shows.
    texts: for each method, a caption for each image.
    """

    names: list[str]
    visible: list[list[str]]
    texts: dict[str, list[str]]

    def absent(self, method: str) -> list[list[str]]:
        """Return, for each caption, the things that it mentions and that the image does not show."""
        pairs = zip(self.texts[method], self.visible, strict=True)
        return [[name for name in mentioned(text, self.names) if name not in visible] for text, visible in pairs]

    def scores(self, method: str) -> dict[str, Proportion]:
        """Return CHAIR's measures with 99% intervals; those without a case are left out.

        They are `chair_i`, the fraction of mentioned things that are absent; `chair_s`, the fraction of captions that
        mention an absent thing; and `mentioned`, the fraction of visible things that are mentioned. A thing counts once
        for each caption.
        """
        things = [mentioned(text, self.names) for text in self.texts[method]]
        pairs = list(zip(things, self.visible, strict=True))
        marks = {
            "chair_i": [name not in visible for named, visible in pairs for name in named],
            "chair_s": [any(absent) for absent in self.absent(method)],
            "mentioned": [name in named for named, visible in pairs for name in visible],
        }
        return {name: proportion(hits) for name, hits in marks.items() if len(hits)}

    def change(self, method: str, before: str) -> Mean:
        """Return `chair_s` of a method less that of another, on the same images, with its 99% interval.

        Raises:
            ValueError: there are fewer than two images.
        """
        return mean_interval(np.subtract(*([bool(row) for row in self.absent(m)] for m in (method, before)), dtype=int))

    @property
    def metrics(self) -> Metrics:
        """All scores, named METHOD_MEASURE, and the number of captions; changes are those from the first method."""
        metrics: Metrics = {"captions": len(self.visible)}
        first, *others = self.texts
        for method in others:
            metrics |= bounds(f"{method}_chair_s_change", self.change(method, first))
        for method in self.texts:
            for name, value in self.scores(method).items():
                metrics |= bounds(f"{method}_{name}", value)
        return metrics


@torch.no_grad()
def caption_images(
    place: SAEInPlace,
    images: Sequence[Image.Image],
    visible: Sequence[Sequence[str]],
    names: Sequence[str],
    methods: Mapping[str, Method],
    question: str,
    *,
    keep_error: bool = True,
    batch: int = 20,
    **generation,
) -> Captions:
    """Let the model describe images by each method.

    visible: the things that each image shows.
    names: of all things that are counted.
    methods: each with one setting.
    question: that asks for a description.
    keep_error: whether what the SAE leaves unexplained stays in.
    batch: images at once.
    generation: for `LMM.generate`, such as `max_new_tokens`.

    Raises:
        ValueError: there are no images.
    """
    if not len(images):
        raise ValueError("there are no images to describe; give at least one")
    texts: dict[str, list[str]] = {name: [] for name in methods}
    for start in progress_bar(range(0, len(images), batch), desc="describing", disable=len(images) <= batch):
        block = list(images[start : start + batch])
        for name, method in methods.items():
            asked = f"{method.before} {question}".strip()
            prompt = place.lmm.prompt([asked] * len(block), block)
            (setting,) = method.settings
            with under(place, prompt, setting, method.scope, keep_error=keep_error):
                texts[name] += place.lmm.generate(prompt, **generation)
    return Captions([name.lower() for name in names], [[name.lower() for name in row] for row in visible], texts)


def measure_captions(
    place: SAEInPlace,
    rows: Dataset,
    images: Iterable[int],
    things: Mapping[str, Sequence[str]],
    concepts: Mapping[str, Sequence[str]],
    methods: Mapping[str, Method],
    question: str,
    *,
    keep_error: bool = True,
) -> Captions:
    """Let the model describe some held-out images by each method; things of all kinds are counted.

    rows: with a column `image` and a label map for each kind.
    images: numbers of the rows.
    things: kind to the names that are counted.
    concepts: kind to all names of the label map.
    methods: each with one setting.
    question: that asks for a description.
    keep_error: whether what the SAE leaves unexplained stays in.
    """
    images = sorted(set(images))
    maps = LabelMaps(rows.select_columns(list(things)), {kind: concepts[kind] for kind in things})
    found = {kind: visible_things(maps, images, kind, names) for kind, names in things.items()}
    visible = [
        [name for kind, names in things.items() for name, shows in zip(names, found[kind][n], strict=True) if shows]
        for n in range(len(images))
    ]
    names = [name for group in things.values() for name in group]
    pictures = [rows[image]["image"] for image in images]
    return caption_images(place, pictures, visible, names, methods, question, keep_error=keep_error)
