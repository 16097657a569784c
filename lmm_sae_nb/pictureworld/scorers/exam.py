"""The commands `segmenter` and `similarity`: train, ship and examine the models that score what explanations say.

Exams are on held-out scenes and go through the shipped folder and the package's own calls, as notebooks do.
"""

from __future__ import annotations

import argparse
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from lmm_sae_nb.pictureworld.scorers import clip, clipseg
from lmm_sae_nb.pictureworld.scorers.clip import blackened, regions, shown_names
from lmm_sae_nb.pictureworld.scorers.clipseg import LEAST, NAMES, areas, target
from lmm_sae_nb.pictureworld.world.concepts import KINDS
from lmm_sae_nb.pictureworld.world.questions import caption
from lmm_sae_nb.pictureworld.world.scenes import HELD_OUT, Scene, make_scene
from lmm_sae_nb.score.masks import iou
from lmm_sae_nb.score.segmenters import PromptedSegmenter
from lmm_sae_nb.score.similarity import ImageTextSimilarity, clip_score
from lmm_sae_nb.support.files import write_json
from lmm_sae_nb.support.intervals import bounds, mean_interval, proportion
from lmm_sae_nb.support.progress import progress_bar

LEVEL = 0.99  # of every interval


def learn(asked: argparse.Namespace) -> None:
    """Train; once all steps are done, write the model, its learning curve and its exam to the folder that ships."""
    train = clipseg.train_segmenter if asked.command == "segmenter" else clip.train_similarity
    made = asked.courses / asked.command
    if not train(made, asked.lmm, asked.steps, minutes=asked.minutes):
        return
    if asked.command == "segmenter":
        save(clipseg.finished(made), clipseg.new_processor(), asked.model)
        result = examine_segmenter(PromptedSegmenter.load(asked.model), asked.scenes)
    else:
        save(clip.finished(made), clip.new_processor(), asked.model)
        result = examine_similarity(ImageTextSimilarity.load(asked.model), asked.scenes)
    shutil.copy(made / "log.jsonl", asked.model / f"{asked.command}.jsonl")
    write_json(asked.model / "exam.json", result)


def save(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Weights in bfloat16 and the processor, as `from_pretrained` reads them."""
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


# ---- the segmenter's exam -------------------------------------------------------------------------------------


def examine_segmenter(segment: PromptedSegmenter, scenes: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Return by kind, on held-out scenes: the mean IoU with the true mask of concepts that are there, and how often a
    concept that is not is found all the same (`false_alarm`; `false_area`: mean share of the picture).

    Of each scene at most two concepts of a kind, and one of each kind that is absent. A kind that comes up less than
    twice has no row.
    """
    rng = np.random.default_rng([62, seed])
    there: dict[str, list[float]] = defaultdict(list)
    absent: dict[str, list[float]] = defaultdict(list)
    for n in progress_bar(range(scenes), desc="segmenter's exam"):
        scene = make_scene(HELD_OUT + n)
        asked = _present(scene, rng) + _absent(scene, rng)
        answers = segment([scene.image] * len(asked), [name for _, name in asked])
        for (kind, name), (masks, _) in zip(asked, answers, strict=True):
            found, truth = masks.any(0), target(scene, name)
            (there if truth.any() else absent)[kind].append(iou(found, truth) if truth.any() else found.mean())
    rows = {kind: _mask_row(there[kind], absent[kind]) for kind in KINDS if len(there[kind]) > 1 and absent[kind]}
    return rows | {"total": _mask_row(sum(there.values(), []), sum(absent.values(), []))}


def _present(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    found = areas(scene)
    chosen = []
    for kind, names in scene.concepts().items():
        large = sorted(name for name in names if found[name] >= LEAST)
        chosen += [(kind, str(name)) for name in rng.permutation(large)[:2]]
    return chosen


def _absent(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    found = areas(scene)
    left = {kind: [name for name in names if name not in found] for kind, names in KINDS.items()}
    return [(kind, names[rng.integers(len(names))]) for kind, names in left.items() if names]


def _mask_row(there: list[float], absent: list[float]) -> dict[str, float]:
    row = bounds("iou", mean_interval(there, LEVEL)) | {"asked": len(there)}
    row |= bounds("false_alarm", proportion(np.array(absent) != 0, LEVEL))
    return row | {"false_area": float(np.mean(absent)), "asked_absent": len(absent)}


# ---- the similarity's exam ------------------------------------------------------------------------------------


def examine_similarity(similarity: ImageTextSimilarity, scenes: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """On held-out scenes, by kind: how often a region's name comes first among all names and among those of its kind
    (`named_first`, `first_of_kind`; names of what else the region shows do not compete), and the CLIP score of the
    region and of the whole scene with that name, beside that of a random scene without the concept.

    `caption`: how often each scene's own caption comes first among the captions of all, and the reverse. A kind that
    comes up less than twice has no row.
    """
    rng = np.random.default_rng([63, seed])
    drawn = [make_scene(HELD_OUT + n) for n in range(scenes)]
    wholes = vectors(similarity, images=[scene.image for scene in drawn])
    names, shown = vectors(similarity, texts=NAMES), [set(areas(scene)) for scene in drawn]
    marks: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for n, scene in enumerate(progress_bar(drawn, desc="similarity's exam")):
        lit = regions(scene, 4, rng)
        seen = (
            vectors(similarity, images=[Image.fromarray(blackened(scene.pixels, visible)) for _, visible in lit])
            if lit
            else []
        )
        for (name, visible), view in zip(lit, seen, strict=True):
            number, kind = NAMES.index(name), clipseg.kind_of(scene, name)
            scores = np.where(
                (shown_names(scene, visible) != 0) & (np.arange(len(NAMES)) != number), -np.inf, names @ view
            )
            of_kind = np.isin(NAMES, KINDS[kind])
            other = rng.choice([m for m in range(scenes) if name not in shown[m]])
            whole, random = wholes[[n, other]] @ names[number]
            first = scores.argmax() == number, np.where(of_kind, scores, -np.inf).argmax() == number
            marks[kind].append((*first, *clip_score(np.array([scores[number], whole, random]))))
    rows = {kind: _score_row(marks[kind]) for kind in KINDS if len(marks[kind]) > 1}
    rows["total"] = _score_row(sum(marks.values(), []))
    return rows | {"caption": _caption_row(wholes @ vectors(similarity, texts=[caption(s) for s in drawn]).T)}


@torch.no_grad()
def vectors(similarity: ImageTextSimilarity, images: list | None = None, texts=None, batch: int = 50) -> np.ndarray:
    """Unit vectors (n, width) of pictures or of texts."""
    model, processor, rows = similarity.model, similarity.processor, []
    asked = images if texts is None else list(texts)
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        if texts is None:
            rows.append(model.get_image_features(**processor(images=part, return_tensors="pt")).pooler_output)
        else:
            read = processor(text=part, padding=True, truncation=True, return_tensors="pt")
            rows.append(model.get_text_features(**read).pooler_output)
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1).numpy()


def _score_row(marks: list[tuple[float, ...]]) -> dict[str, float]:
    first, of_kind, *scores = np.array(marks, float).T
    row: dict[str, float] = {"asked": len(marks)}
    for title, values in (("named_first", first), ("first_of_kind", of_kind)):
        row |= bounds(title, proportion(values, LEVEL))
    for title, values in zip(("score_region", "score_whole", "score_random"), scores, strict=True):
        row |= bounds(title, mean_interval(values, LEVEL))
    return row


def _caption_row(cosines: np.ndarray) -> dict[str, float]:
    right = np.arange(len(cosines))
    row: dict[str, float] = {"asked": len(cosines)}
    for title, found in (("caption_of_image", cosines.argmax(1)), ("image_of_caption", cosines.argmax(0))):
        row |= bounds(title, proportion(found == right, LEVEL))
    return row
