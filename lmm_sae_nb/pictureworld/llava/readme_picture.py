"""Draw the README's picture: held-out scenes, a question on each, and the embedded model's answers."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.pictureworld.llava.exam import Asked, examine, written
from lmm_sae_nb.show import plots

FAMILIES = ("describe", "where", "exists", "trap", "colour", "position", "feeling", "label")


def chosen(asked: list[Asked]) -> list[Asked]:
    """Return one question of each family: the first, right or wrong, that is on a full scene or a map not shown yet.

    Of the trap the first wrong answer, for that is what it is about. ValueError if there is none of a family.
    """
    found: list[Asked] = []
    full = [one for one in asked if one.scene.chart or len(one.scene.items) > 2]
    for family in FAMILIES:
        seen = {one.scene.seed for one in found}
        of_family = (one for one in full if one.family == family and one.scene.seed not in seen)
        first = next((one for one in of_family if family != "trap" or not one.right), None)
        if first is None:
            raise ValueError(f"no question of the family {family} is left to show; sit an exam of more scenes")
        found.append(first)
    return found


def draw(lmm: LMM, file: Path, scenes: int = 48) -> None:
    """Sit an exam on so many held-out scenes, and save a picture of some of it."""
    shown = chosen(examine(lmm, scenes, unpictured=False))
    titles = [f"{written(one.question.text)}\n» {one.answer}" for one in shown]
    plots.style()
    axes = plots.images([one.scene.image for one in shown], titles, columns=4)
    axes[0].figure.savefig(file, dpi=100, bbox_inches="tight")
    plt.close()
