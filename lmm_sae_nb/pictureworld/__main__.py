"""Commands: `render` the data sets; `tower`, `rehearse`, `lessons`, `ship` make the embedded model; `exam` measures it.

The shipped model was made by `tower` and `rehearse` side by side, then `lessons`, then `ship`. Each can be stopped at any
time and goes on from its last checkpoint when it is started again.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from ..artifacts import project_root, write_json

COURSES = Path("data/artifacts/training")
MODEL = Path("data/models/tiny-llava-next")


def main() -> None:
    root = project_root()
    parser = argparse.ArgumentParser(prog="python -m lmm_sae_nb.pictureworld", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    render = commands.add_parser("render", help="write the data sets that the notebooks read")
    render.add_argument("--out", type=Path, default=root / "data/artifacts/tiny/world")
    render.add_argument("--train", type=int, default=3600, help="samples that the SAE is trained on")
    render.add_argument("--cache", type=int, default=2400, help="scenes whose activations are cached")
    render.add_argument("--heldout", type=int, default=400, help="scenes that numbers are reported on")
    for name, steps in {"tower": 2200, "rehearse": 800, "lessons": 3000}.items():
        course = commands.add_parser(name)
        course.add_argument("--steps", type=int, default=steps)
        course.add_argument(
            "--minutes", type=float, default=float("inf"), help="stop after so long; start again to go on"
        )
        course.add_argument("--threads", type=int, default=2)
        course.add_argument("--courses", type=Path, default=root / COURSES)
    ship = commands.add_parser(
        "ship", help="write the trained model as the one that ships, with its learning curves"
    )
    ship.add_argument("--courses", type=Path, default=root / COURSES)
    exam = commands.add_parser("exam", help="answer held-out questions and write exam.json beside the model")
    exam.add_argument("--scenes", type=int, default=500)
    exam.add_argument("--model", type=Path, default=root / MODEL)
    exam.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(getattr(asked, "threads", 2))

    if asked.command == "render":
        from .shelf import render as render_to

        render_to(asked.out, {"train": asked.train, "cache": asked.cache, "heldout": asked.heldout})
    elif asked.command == "tower":
        from .tower import train_tower

        train_tower(asked.courses / "tower", asked.steps, minutes=asked.minutes)
    elif asked.command in ("rehearse", "lessons"):
        from .lessons import train_language

        folders = asked.courses / "tower", asked.courses / "rehearse"
        tower, start = folders if asked.command == "lessons" else (None, None)
        share = 0.6 if asked.command == "lessons" else 2
        train_language(asked.courses / asked.command, tower, start, asked.steps, share, minutes=asked.minutes)
    elif asked.command == "ship":
        from .lessons import graduate
        from .minds import save

        save(graduate(asked.courses / "lessons"), root / MODEL)
        for course in ("tower", "rehearse", "lessons"):
            shutil.copy(asked.courses / course / "log.jsonl", root / MODEL / f"{course}.jsonl")
    else:
        from ..lmm import LMM
        from .exam import examine, report

        result = report(examine(LMM.load(asked.model), asked.scenes))
        write_json(asked.model / "exam.json", result)
        for family, row in result.items():
            print(
                f"{family:28s} {row['share']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]  n={row['asked']:.0f}  aim {row.get('least', '')}"
            )


if __name__ == "__main__":
    main()
