"""The command `explainer`, and its exam: sets of masked exemplars from held-out scenes, each asked as a user would ask.

Every set goes through the processor and `generate`; the answer counts when it is the concept that the rule
(`lmm_sae_nb.truth.common_concept`) finds in the label maps, or the refusal where it finds none.
"""

from __future__ import annotations

import argparse
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmm_sae_nb.interpret.explain import TRAINED_ON, latents_in_training
from lmm_sae_nb.interpret.explainers import REFUSAL
from lmm_sae_nb.pictureworld.explainer.masked_sets import Source, Strips, drawn, masked_images, of_latents
from lmm_sae_nb.pictureworld.explainer.model import QUESTION, SET, save
from lmm_sae_nb.pictureworld.explainer.train import graduate, lessons_of, study_explainer
from lmm_sae_nb.pictureworld.world.rendered import Gallery, gallery
from lmm_sae_nb.pictureworld.world.scenes import HELD_OUT
from lmm_sae_nb.support.files import write_json
from lmm_sae_nb.support.intervals import proportion
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.truth.common_concept import CommonConcept

FIRST_SEED, SCENES = HELD_OUT + 2000, 1200
CACHED_SCENES, CACHED_SETS, DRAWN_SETS = 800, 500, 2400
STRANGERS = 0.25  # share of drawn sets of which one image is of something else
NAMED, REFUSED = "answerable", "unanswerable"  # of which a share must not, or must, be refused
LEAST = {"all": 0.90, NAMED: 0.90, REFUSED: 0.90, "word": 0.60}  # what the explainer is built to reach
LEAST_KIND = 0.80  # the same, for every other kind of concept


@dataclass(frozen=True)
class Answered:
    """One set of the exam: what it shows (None: nothing in common) and what was answered."""

    shown: CommonConcept | None
    answer: str

    @property
    def right(self) -> bool:
        return self.answer == (self.shown.concept if self.shown else REFUSAL)


def learn(asked: argparse.Namespace) -> None:
    """Train; once all steps are done, write the model, its learning curves and its exam to the folder that ships."""
    made, saes = asked.courses / "explainer", [Source(Path(folder), int(layer)) for folder, layer in asked.sae]
    if not study_explainer(made, asked.lmm, saes, asked.steps, asked.minutes):
        return
    save(graduate(made, asked.lmm), asked.model)
    for name, log in (("eye", "eye/log.jsonl"), ("folding", "folding/log.jsonl"), ("explainer", "log.jsonl")):
        shutil.copy(made / log, asked.model / f"{name}.jsonl")
    write_json(asked.model / TRAINED_ON, lessons_of(made, len(saes)))
    result = sit(asked.model, asked.courses / "explainer-exam", asked.lmm, saes[0])
    write_json(asked.model / "exam.json", result)
    for origin, rows in result.items():
        for name, row in rows.items():
            print(f"{origin} {name:14s} {row['fraction']:.3f} [{row['low']:.3f}, {row['high']:.3f}] n={row['asked']}")


def load(folder: Path):
    """Return the explainer of a folder, in float32, and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return model, AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def explain_sets(model, processor, sets: Sequence[Sequence[Image.Image]], batch: int = 16) -> list[str]:
    """Return what the explainer says of each set of images, in order."""
    said = []
    for start in progress_bar(range(0, len(sets), batch), desc="explaining"):
        chats = [
            [{"role": "user", "content": [*({"type": "image", "image": image} for image in images),
                                          {"type": "text", "text": QUESTION}]}]
            for images in sets[start : start + batch]
        ]  # fmt: skip
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        answers = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        said += processor.batch_decode(answers, skip_special_tokens=True)
    return said


def exam_sets(strips: Strips, strangers: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (sets, images) twice: of which strip each image of a set is, and which of it. Each strip gives one set,
    of its first images, of which in a share of the sets one comes from another strip.
    """
    rng = np.random.default_rng([62, seed])
    count = len(strips.scenes)
    strip = np.repeat(np.arange(count)[:, None], SET, 1)
    for row in np.flatnonzero(rng.random(count) < strangers):
        strip[row, rng.integers(SET)] = rng.integers(count)
    return strip, np.tile(np.arange(SET), (count, 1))


def examine(model, processor, gallery: Gallery, strips: Strips, strangers: float, seed: int = 0) -> list[Answered]:
    """Sit the exam on held-out strips."""
    rows = list(zip(*exam_sets(strips, strangers, seed), strict=True))
    sets = [masked_images(gallery, strips.scenes[row], strips.visible[row]) for row in rows]
    answers = explain_sets(model, processor, sets)
    return [Answered(strips.label(gallery, *row), answer) for row, answer in zip(rows, answers, strict=True)]


def sit(folder: Path, kept: Path, taught: Path, source: Source) -> dict[str, dict[str, dict[str, float]]]:
    """Return the whole exam of the explainer in `folder`, by origin of the masks: drawn from the truth, or of real
    latents.

    kept: where held-out scenes and the latents' cache are kept; taught: the embedded model; source: the SAE whose
    latents are asked about, but for those whose masks, on other scenes, were lessons.
    """
    model, processor = load(folder)
    pictures = gallery(kept / "scenes.safetensors", FIRST_SEED, SCENES)
    known = latents_in_training(folder, source.folder)
    real = of_latents(source, kept / "latents", taught, pictures.first(CACHED_SCENES), SET, CACHED_SETS, without=known)
    papers = {"drawn": (drawn(pictures, DRAWN_SETS, SET, 1), STRANGERS), "cached": (real, 0.0)}
    return {origin: report(examine(model, processor, pictures, *paper)) for origin, paper in papers.items()}


def report(answered: Sequence[Answered], level: float = 0.99) -> dict[str, dict[str, float]]:
    """Return the fractions right over all and by kind of concept, rightly refused, and rightly not refused.

    Each has its Wilson interval, how many were asked, and the target."""
    marks: dict[str, list[bool]] = defaultdict(list)
    for row in answered:
        marks["all"].append(row.right)
        marks[row.shown.kind if row.shown else REFUSED].append(row.right)
        if row.shown:
            marks[NAMED].append(row.answer != REFUSAL)
    result = {}
    for name, row in marks.items():
        fraction, low, high, count = proportion(row, level)
        least = LEAST.get(name, LEAST_KIND)
        result[name] = {"fraction": fraction, "low": low, "high": high, "asked": count, "least": least}
    return result
