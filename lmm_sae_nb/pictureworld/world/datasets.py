"""Write Picture World to disk as Hugging Face data sets, which the notebooks read."""

from __future__ import annotations

import io
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread

import numpy as np
from datasets import Dataset, Features, Image, Value, disable_progress_bars, enable_progress_bars
from PIL import Image as PILImage

from lmm_sae_nb.pictureworld.world.concepts import FACTS, KINDS
from lmm_sae_nb.pictureworld.world.questions import according, aside, lesson
from lmm_sae_nb.pictureworld.world.scenes import (
    HELD_OUT,
    TRAIN,
    VALIDATION,
    Scene,
    make_drilled,
    make_map,
    make_scene,
)
from lmm_sae_nb.support.files import replace_folder, write_json
from lmm_sae_nb.support.progress import progress_bar

SPLITS = {"train": TRAIN, "cache": VALIDATION, "heldout": HELD_OUT}
ROOM = {  # seeds of each
    "train": VALIDATION - TRAIN,
    "cache": HELD_OUT - VALIDATION,
    "heldout": 2**31 - HELD_OUT,
    "traps": HELD_OUT - VALIDATION,
}
TEXT_ONLY = 8  # in the training split, every so-manieth sample has no picture
_COLUMNS = {"seed": Value("int64"), "question": Value("string"), "answer": Value("string"), "family": Value("string")}
LABELLED = ("cache", "heldout")  # splits with label maps; nobody may learn from those of the training split
TRAPS = "traps"  # maps for the knowledge trap, as many of validation seeds as of held-out ones
UNSEEN = HELD_OUT + 500_000  # the first maps of the held-out split were looked at before the cure's limit was set
PARTS = {"choose": VALIDATION, "report": UNSEEN}
YES_FIRST = 0.75  # how often a contradicting question is one whose right answer is yes, if the map has one
_TRAP_FEATURES = Features(
    {"image": Image(), **_COLUMNS, "taught": Value("string"), "group": Value("string"), "part": Value("string")}
)


def _features(split: str) -> Features:
    if split == TRAPS:
        return _TRAP_FEATURES
    return Features({"image": Image(), **_COLUMNS, **{kind: Image() for kind in KINDS if split in LABELLED}})


def _png(pixels: np.ndarray) -> dict[str, object]:
    held = io.BytesIO()
    PILImage.fromarray(pixels).save(held, "PNG", compress_level=1)
    return {"bytes": held.getvalue(), "path": None}


def scene_of(split: str, number: int) -> Scene:
    """Return the scene of a split's sample.

    Training samples are drawn as the model's own lessons were, with drills: an SAE is trained on the data of the
    model's fine-tuning (section 3.1).
    """
    seed = SPLITS[split] + number
    return make_drilled(seed, number % 20) if split == "train" else make_scene(seed)


def _row(split: str, number: int) -> dict[str, object]:
    seed = SPLITS[split] + number
    rng = np.random.default_rng([50, seed])
    if split == "train" and number % TEXT_ONLY == TEXT_ONLY - 1:
        asked, pictures = aside(rng), {"image": None}
    else:
        scene = scene_of(split, number)
        options = lesson(scene, rng)
        asked = options[rng.integers(len(options))]
        labels = scene.labels if split in LABELLED else {}
        pictures = {"image": _png(scene.pixels), **{kind: _png(labels[kind]) for kind in labels}}
    return {"seed": seed, "question": asked.text, "answer": asked.answer, "family": asked.family, **pictures}


def _traps(number: int) -> list[dict[str, object]]:
    """Return a map of each part, with a question on which it contradicts the taught fact and one on which it agrees.

    Among the contradicting questions, those whose right answer is *yes* are fewer and are preferred, so that there are
    enough cases of both answers.
    """
    rows = []
    for part, first in PARTS.items():
        scene, rng = make_map(first + number), np.random.default_rng([51, first + number])
        asked = according(scene, rng)
        facts = ["yes ." if FACTS[scene.chart.basin, q.text.split()[-2]] else "no ." for q in asked]
        for contradicts in (True, False):
            options = [i for i, q in enumerate(asked) if (q.answer != facts[i]) == contradicts]
            if contradicts and rng.random() < YES_FIRST:
                options = [i for i in options if asked[i].answer == "yes ."] or options
            if options:
                chosen = options[rng.integers(len(options))]
                q, about = asked[chosen], {"seed": scene.seed, "part": part, "group": scene.chart.basin}
                rows.append(
                    {"image": _png(scene.pixels), "question": q.text, "answer": q.answer, "family": q.family}
                    | {"taught": facts[chosen], **about}
                )
    return rows


def _end_with_parent() -> None:
    """End this worker when its parent is killed; it would wait for work for ever."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def render(folder: Path, sizes: dict[str, int]) -> None:
    """Write the splits (name to number of scenes) and `concepts.json` under `folder`, whole or not at all.

    Columns: image (None for questions without a picture), seed, question, answer, family. `cache` and `heldout` also
    have a label map for each kind of concept (mode L; 0 none, i the i-th name of that kind in concepts.json). `traps`
    has `taught` (what the taught fact answers), `group` (the basin) and `part`: choose (maps of validation seeds) or
    report (held-out maps, so many of each); two questions a map, where the map contradicts the fact and where it
    agrees. Uses every core. ValueError for an unknown split or more scenes than it has seeds for.
    """
    unknown = sizes.keys() - ROOM.keys()
    if unknown:
        raise ValueError(f"no split {', '.join(sorted(unknown))}; Picture World has {', '.join(ROOM)}")
    for split, size in sizes.items():
        if not 0 < size <= ROOM[split]:
            raise ValueError(f"{split} has seeds for 1 to {ROOM[split]:,} scenes, not {size}; ask for as many")
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    disable_progress_bars()
    try:
        with ProcessPoolExecutor(os.cpu_count(), initializer=_end_with_parent) as pool:
            for split, size in sizes.items():
                made = pool.map(_traps if split == TRAPS else partial(_row, split), range(size), chunksize=50)
                rows = list(progress_bar(made, total=size, desc=f"rendering {split}"))
                if split == TRAPS:
                    rows = [row for pair in rows for row in pair]
                Dataset.from_list(rows, features=_features(split)).save_to_disk(building / split)
    finally:
        enable_progress_bars()
    write_json(building / "concepts.json", {kind: list(names) for kind, names in KINDS.items()})
    replace_folder(building, folder)
