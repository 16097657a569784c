"""Draw Picture World and how its models learned: label maps, learning curves, exams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from lmm_sae_nb.pictureworld.training_loop import read_log, smooth
from lmm_sae_nb.pictureworld.world.concepts import COLOURS
from lmm_sae_nb.pictureworld.world.scenes import Scene
from lmm_sae_nb.show import plots
from lmm_sae_nb.support.files import read_json


class Learning(NamedTuple):
    """The log of one or more courses, one after the other: smoothed rows, and the steps at which courses begin."""

    rows: list[dict[str, float]]
    begins: list[int]


def learning(folder: str | Path, *courses: str) -> Learning:
    """Read the logs of courses (`<course>.jsonl`) and count their steps through.

    folder: of a shipped model. A course that the folder does not have is left out.
    """
    rows, begins = [], []
    for file in (Path(folder) / f"{course}.jsonl" for course in courses):
        if file.is_file():
            begins.append(rows[-1]["step"] if rows else 0)
            rows += [{**row, "step": row["step"] + begins[-1]} for row in read_log(file)]
    return Learning(smooth(rows), begins)


def learning_curves(panels: Mapping[str, tuple[Learning, str, Sequence[str]]]) -> list[Axes]:
    """Draw what a model has right while it learns, a panel for each course; a grey line marks where one begins.

    panels: label of the axis to (log, prefix of the logged names, names without it).
    """
    axes = plots.panels(len(panels), inches=3.9)
    for ax, (label, (log, prefix, names)) in zip(axes, panels.items(), strict=True):
        for step in log.begins[1:]:
            ax.axvline(step, color=plots.CHANCE, lw=1)
        for name in names:
            plots.curve(log.rows, f"{prefix}{name}", label=name, ax=ax)
        ax.set_ylabel(label)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return axes


def label_maps(scene: Scene) -> dict[str, Image.Image]:
    """Return a scene's label maps as pictures, by a title: the kind, and the concepts that it has here.

    A colour stands for a concept, and black for none. The map of colours has the colours themselves, and no list.
    """
    palette = np.random.default_rng(3).integers(60, 256, (256, 3), dtype=np.uint8)
    palette[0] = 0
    true_colours = np.array([(0, 0, 0), *COLOURS.values()], np.uint8)
    present, maps = scene.concepts(), {}
    for kind, labels in scene.labels.items():
        if kind == "colour":
            maps[kind] = Image.fromarray(true_colours[labels])
        else:
            maps[f"{kind}: {', '.join(sorted(present[kind])) or 'none'}"] = Image.fromarray(palette[labels])
    return maps


def read_exam(folder: str | Path) -> dict[str, dict]:
    """Read the exam that ships with a model: a row for each family of questions, or for each kind of concept."""
    return read_json(Path(folder) / "exam.json")


def by_kind(exam: Mapping[str, Mapping[str, float]], name: str, count: str) -> dict[str, dict[str, float]]:
    """Return one quantity of an exam as rows for `plots.proportions`: kind of concept, with how many were asked.

    name: the quantity; its ends are name_low and name_high.
    count: the key with the number of cases.
    """
    return {
        f"{kind} (n={row[count]})": {"fraction": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]}
        for kind, row in exam.items()
        if name in row
    }
