"""Commands: `render` writes the data sets; `exam` measures the embedded model, and `cover` draws the README's picture
of it; the others made it, in this order.

`tower` and `rehearse` can run side by side; then `lessons`, `reading`, `finish`, `polish`, `parts`, `ship`. Each course
can be stopped at any time and goes on from its last checkpoint when it is started again. `segmenter` and `similarity`
then make, ship and examine the models that notebook 04 scores with; they start from the shipped model's eye.
`explainer` does the same for the model that names latents, which learns from those of notebook 01's SAE too, and
`queries` for the InstructBLIP that notebook 05 compares with: its eye and language model are the shipped model's.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from lmm_sae_nb.support.files import project_root

COURSES = {  # name: optimiser steps, what it teaches
    "tower": (1750, "the eye, and the projector: every patch is told what it shows"),
    "rehearse": (340, "the language model, with perfect eyes"),
    "lessons": (2000, "language model and projector, with the real eye, on the base image"),
    "reading": (900, "the eye again, on signs above all"),
    "finish": (620, "language model and projector with the better eye, and with AnyRes tiles"),
    "polish": (1750, "the same, longer, with more signs, drawn things and panels"),
    "parts": (260, "the same, more slowly, drawn things above all"),
}
SIGHT = {  # name: optimiser steps, scenes of the exam, what is made, the folder of data/models that it ships to
    "segmenter": (486, 100, "a CLIPSeg, which finds a concept by its name: train, ship and examine", "tiny-clipseg"),
    "similarity": (620, 150, "a CLIP, which says how well a text fits a picture: train, ship and examine", "tiny-clip"),
}
EXPLAINER_STEPS = 10_400
QUERIES_STEPS = 620
FOLDER = Path("data/artifacts/training")
MODEL = Path("data/models/tiny-llava-next")
EXPLAINER = Path("data/models/tiny-explainer")
INSTRUCTBLIP = Path("data/models/tiny-instructblip")


def _course(commands, name: str, what: str, steps: int, borrows: str = "", ships_to: Path | None = None, threads=2):
    """Add a command that trains."""
    course = commands.add_parser(name, help=what)
    course.add_argument("--steps", type=int, default=steps)
    course.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; start again to go on")
    course.add_argument("--threads", type=int, default=threads)
    course.add_argument("--courses", type=Path, default=project_root() / FOLDER)
    if ships_to:
        course.add_argument("--lmm", type=Path, default=project_root() / MODEL, help=borrows)
        course.add_argument("--model", type=Path, default=ships_to, help="where it ships to")
    return course


def main() -> None:
    root = project_root()
    parser = argparse.ArgumentParser(prog="python -m lmm_sae_nb.pictureworld", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    render = commands.add_parser("render", help="write the data sets that the notebooks read")
    render.add_argument("--out", type=Path, default=root / "data/artifacts/tiny/world")
    render.add_argument("--train", type=int, default=3600, help="samples that the SAE is trained on")
    render.add_argument("--cache", type=int, default=2400, help="scenes whose activations are cached")
    render.add_argument("--heldout", type=int, default=240, help="scenes that numbers are reported on")
    render.add_argument("--traps", type=int, default=320, help="maps for choosing a cure, and as many to report on")
    for name, (steps, what) in COURSES.items():
        _course(commands, name, what, steps)
    ship = commands.add_parser("ship", help="write the trained model as the one that ships, with its learning curves")
    ship.add_argument("--courses", type=Path, default=root / FOLDER)
    exam = commands.add_parser("exam", help="answer held-out questions and write exam.json beside the model")
    exam.add_argument("--scenes", type=int, default=500)
    exam.add_argument("--model", type=Path, default=root / MODEL)
    exam.add_argument("--threads", type=int, default=2)
    cover = commands.add_parser("cover", help="draw the README's picture: questions, and what the model answers")
    cover.add_argument("--model", type=Path, default=root / MODEL)
    cover.add_argument("--out", type=Path, default=root / "book/_static/readme.png")
    for name, (steps, scenes, what, folder) in SIGHT.items():
        course = _course(commands, name, what, steps, "whose eye it starts from", root / "data/models" / folder)
        course.add_argument("--scenes", type=int, default=scenes, help="held-out scenes of its exam")
    what = "an Aya Vision, which names latents: train (its eye, then --steps, --minutes for each), ship and examine"
    borrows = "whose eye and words it starts from"
    explainer = _course(commands, "explainer", what, EXPLAINER_STEPS, borrows, root / EXPLAINER, threads=1)
    explainer.add_argument(
        "--sae", nargs=2, action="append", metavar=("FOLDER", "LAYER"),
        default=[[root / "data/artifacts/tiny/train", 1]],
        help="another SAE, and its layer, whose latents it learns from besides those of notebook 01",
    )  # fmt: skip
    what, borrows = "an InstructBLIP's Q-Former: train, ship and examine", "whose eye and language model it has"
    queries = _course(commands, "queries", what, QUERIES_STEPS, borrows, root / INSTRUCTBLIP, threads=1)
    queries.add_argument("--scenes", type=int, default=500, help="held-out scenes of its exam")
    asked = parser.parse_args()
    torch.set_num_threads(getattr(asked, "threads", 2))

    if asked.command == "explainer":
        from lmm_sae_nb.pictureworld.explainer.exam import learn

        learn(asked)
    elif asked.command == "queries":
        from lmm_sae_nb.pictureworld.instructblip.train import learn

        learn(asked)
    elif asked.command in SIGHT:
        from lmm_sae_nb.pictureworld.scorers.exam import learn

        learn(asked)
    elif asked.command == "cover":
        from lmm_sae_nb.model.lmm import LMM
        from lmm_sae_nb.pictureworld.llava.readme_picture import draw

        draw(LMM.load(asked.model), asked.out)
    elif asked.command == "render":
        from lmm_sae_nb.pictureworld.world.datasets import render as render_to

        render_to(asked.out, {split: getattr(asked, split) for split in ("train", "cache", "heldout", "traps")})
    elif asked.command in COURSES:
        study(asked.command, asked.courses, asked.steps, asked.minutes)
    elif asked.command == "ship":
        from lmm_sae_nb.pictureworld.llava.model import save
        from lmm_sae_nb.pictureworld.llava.train_language import graduate

        save(graduate(asked.courses / list(COURSES)[-1]), root / MODEL)
        for log in (asked.courses / course / "log.jsonl" for course in COURSES):
            if log.is_file():
                shutil.copy(log, root / MODEL / f"{log.parent.name}.jsonl")
    else:
        from lmm_sae_nb.model.lmm import LMM
        from lmm_sae_nb.pictureworld.llava.exam import examine, keep, report

        keep(report(examine(LMM.load(asked.model), asked.scenes)), asked.model)


def study(course: str, courses: Path, steps: int, minutes: float) -> bool:
    """Train one course of the recipe of the shipped model; return whether all its steps are done."""
    from lmm_sae_nb.pictureworld.llava.train_eye import train_tower
    from lmm_sae_nb.pictureworld.llava.train_language import train_language
    from lmm_sae_nb.pictureworld.world.scenes import MORE, PARTS

    folder, common = courses / course, {"steps": steps, "minutes": minutes}
    if course == "tower":
        return train_tower(folder, **common)
    if course == "reading":
        return train_tower(folder, courses / "tower", rate=1e-3, **common)
    if course == "rehearse":
        return train_language(folder, perfect=True, tiles_from=2, **common)
    if course == "lessons":
        before, eyes = courses / "rehearse", courses / "tower"
        return train_language(folder, start=before, eyes=eyes, tiles_from=2, first_seed=400_000, **common)
    if course == "finish":
        before, eyes = courses / "lessons", courses / "reading"
        return train_language(
            folder, start=before, eyes=eyes, keep_projector=True, rate=1.2e-3, first_seed=200_000, **common
        )
    if course == "polish":
        before = courses / "finish"
        before = before if before.is_dir() else project_root() / MODEL  # without checkpoints: on from what ships
        return train_language(
            folder, start=before, tiles_from=0.68, drills=MORE, rate=1.2e-3, first_seed=600_000, **common
        )
    before = courses / "polish"
    return train_language(folder, start=before, drills=PARTS, rate=6e-4, first_seed=700_000, **common)


if __name__ == "__main__":
    main()
