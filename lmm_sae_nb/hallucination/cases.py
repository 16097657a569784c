"""Cases: questions on which memory and the image disagree, or agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from PIL import Image

from lmm_sae_nb.model.lmm import LMM


@dataclass(frozen=True)
class Case:
    """A question on an image, the first words of its right answer and of the answer that is tempting."""

    image: Image.Image
    question: str
    right: str
    tempting: str  # what was taught; another answer where the taught one is right
    contradicts: bool  # whether the image contradicts what was taught
    group: str = ""


def cases_of(rows: Iterable[Mapping], part: str) -> list[Case]:
    """The cases of one part of a data set with image, question, answer, taught, group and part.

    Answers are told apart by their first word. Where image and taught answer agree, the tempting answer is the other
    one of yes and no. ValueError for a row without an image, or a part that no row is of.
    """
    cases = []
    for row in rows:
        if row["part"] != part:
            continue
        if row["image"] is None:
            raise ValueError(f"{row['question']!r} has no image, and an image is what is contradicted; leave it out")
        right, taught = (row[name].split()[0] for name in ("answer", "taught"))
        other = {"yes": "no", "no": "yes"}.get(right.lower(), taught)
        other = other.capitalize() if right[0].isupper() else other
        tempting = taught if taught != right else other
        cases.append(Case(row["image"], row["question"], right, tempting, taught != right, row["group"]))
    if not cases:
        raise ValueError(f"no case is of part {part!r}; give one that the data set's column `part` has")
    return cases


class Asked(NamedTuple):
    """A question on an image that has nothing to do with the cases, and the model's own answer."""

    image: Image.Image
    question: str
    answer: str


def own_answers(lmm: LMM, rows: Iterable[Mapping], batch: int = 20) -> list[Asked]:
    """What the untouched model answers to the questions of rows with an image."""
    rows, asked = iter(rows), []
    while some := list(islice(rows, batch)):
        images, questions = ([row[name] for row in some] for name in ("image", "question"))
        asked += map(Asked, images, questions, lmm.generate(lmm.prompt(questions, images)))
    return asked


def told_case(image: str, question: str, answer: str, baseline: str, otherwise: Case) -> Case:
    """A case of one's own: a picture's path, a question, the answer to explain, another one; all "": `otherwise`.

    The answer to explain is the tempting one. ValueError if something is given and something missing.
    """
    given = {"image": image, "question": question, "answer": answer, "baseline": baseline}
    if not any(given.values()):
        return otherwise
    if missing := [name for name, value in given.items() if not value]:
        raise ValueError(f"a case of your own needs {', '.join(given)}; {', '.join(missing)} is missing")
    return Case(Image.open(image).convert("RGB"), question, baseline, answer, True)
