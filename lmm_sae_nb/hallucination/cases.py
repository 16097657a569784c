"""Questions on which the model's memory and the image disagree, or agree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import torch
from datasets import Dataset
from PIL import Image

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.samples import require_choice
from lmm_sae_nb.support.images import UnreadableImage, open_rgb, undecoded

OPPOSITE = {"yes": "no", "no": "yes"}


@dataclass(frozen=True)
class Case:
    """A question about an image, with the first word of its right answer and of a tempting wrong one.

    tempting: the taught answer where the image contradicts it; else the opposite of the right answer.
    contradicts: whether the image contradicts what was taught.
    group: a heading under which cases are counted.
    """

    image: Image.Image
    question: str
    right: str
    tempting: str
    contradicts: bool
    group: str = ""


def read_cases(rows: Dataset, part: str, limit: int | None = None) -> list[Case]:
    """Read the cases of one part of a data set. Answers are compared by their first word.

    rows: with the columns image, question, answer, taught (the answer from memory), group and part.
    part: the value of the column `part`.
    limit: read only the first ones.

    Raises:
        ValueError: no row is of this part, or one has no image.
    """
    numbers = [number for number, name in enumerate(rows["part"]) if name == part][:limit]
    if not numbers:
        raise ValueError(f"no case is of part {part!r}; the data set has {', '.join(sorted(set(rows['part'])))}")
    return [_case(row) for row in rows.select(numbers)]


def _case(row: Mapping) -> Case:
    if row["image"] is None:
        raise ValueError(f"{row['question']!r} has no image that could contradict memory; leave this row out")
    right, taught = (row[name].split()[0] for name in ("answer", "taught"))
    opposite = OPPOSITE.get(right.lower(), taught)
    opposite = opposite.capitalize() if right[0].isupper() else opposite
    contradicts = taught.lower() != right.lower()
    return Case(row["image"], row["question"], right, taught if contradicts else opposite, contradicts, row["group"])


@torch.no_grad()
def as_the_model_writes(lmm: LMM, cases: Sequence[Case], asked: int = 8) -> list[Case]:
    """Return the cases with answers in the letters that the model uses, such as "Yes" for "yes".

    A first token is compared with one token only, so "yes" would count as wrong for a model that says "Yes". Of the
    ways to write a word that are one token, we take the most likely one after the first questions.

    asked: questions that decide.
    """
    ways = {word: _ways(lmm, word) for case in cases for word in (case.right, case.tempting)}
    if all(len(of_word) < 2 for of_word in ways.values()):
        return list(cases)
    likely = sum(lmm.last_logits(lmm.prompt(case.question, case.image))[0].log_softmax(-1) for case in cases[:asked])
    chances = {word: {way: float(likely[token]) for way, token in of_word.items()} for word, of_word in ways.items()}
    written = {word: max(of_word, key=of_word.get, default=word) for word, of_word in chances.items()}
    return [replace(case, right=written[case.right], tempting=written[case.tempting]) for case in cases]


def _ways(lmm: LMM, word: str) -> dict[str, int]:
    """The ways to write a word in small and large letters that are one known token, with this token."""
    found: dict[str, int] = {}
    for way in (word, word.lower(), word.capitalize(), word.upper()):
        ids = lmm.tokenizer(way, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != lmm.tokenizer.unk_token_id and ids[0] not in found.values():
            found[way] = ids[0]
    return found


def pictured_rows(
    rows: Dataset | Sequence[Mapping], unreadable: str = "refuse", skipped: MutableMapping[int, str] | None = None
) -> Iterator[dict]:
    """Yield the rows that have an image, each with its image as RGB; other pictures of a row are not decoded.

    unreadable: "skip" leaves out rows whose image cannot be read; "refuse" stops there.
    skipped: gets the number of each row that is left out, with the name and fault of its image.

    Raises:
        UnreadableImage: an image cannot be read, with "refuse".
    """
    require_choice(unreadable)
    rows = undecoded(rows) if isinstance(rows, Dataset) else rows
    for number in range(len(rows)):
        try:
            row = rows[number]
            if row["image"] is not None:
                yield row | {"image": open_rgb(row["image"], f"row {number}")}
        except UnreadableImage as fault:
            if unreadable == "refuse":
                raise
            if skipped is not None:
                skipped[number] = f"{fault.name}: {fault.reason}"


def contradicting_first(cases: Iterable[Case], contradicting: int, agreeing: int) -> list[Case]:
    """Return the first cases that contradict what was taught, then the first that agree; so many of each, at most."""
    cases = list(cases)
    against, others = ([case for case in cases if case.contradicts == kind] for kind in (True, False))
    return against[:contradicting] + others[:agreeing]


def for_fit_and_search(cases: Sequence, fitted: int, tried: int) -> tuple[Sequence, Sequence]:
    """Return the first cases for a fit, and those after them for a search; the two have no case in common.

    If there are fewer cases than both need, each gets its part of them.

    fitted: most cases of the fit.
    tried: most cases of the search.
    """
    total = fitted + tried
    first = fitted if len(cases) >= total else len(cases) * fitted // total
    return cases[:first], cases[first:][:tried]


def custom_case(image: str, question: str, answer: str, baseline: str, default: Case) -> Case:
    """Return a case from a page's parameters, or `default` if they are all empty.

    image: the path of a picture.
    question: about it.
    answer: the answer to explain, one token; the case's tempting answer.
    baseline: the other answer, one token.

    Raises:
        ValueError: some of the four are given and some are not.
    """
    given = {"image": image, "question": question, "answer": answer, "baseline": baseline}
    if not any(given.values()):
        return default
    if missing := [name for name, value in given.items() if not value]:
        raise ValueError(f"a case of your own needs {', '.join(given)}; {', '.join(missing)} is missing")
    return Case(open_rgb(image, "the case's image"), question, baseline, answer, True)


class Answered(NamedTuple):
    """A question that has nothing to do with the cases, with the untouched model's answer in full."""

    image: Image.Image
    question: str
    answer: str


def answer_questions(lmm: LMM, rows: Iterable[Mapping], batch: int = 20) -> list[Answered]:
    """Let the untouched model answer questions.

    rows: with image and question.
    batch: questions at once.
    """
    rows, answered = iter(rows), []
    while block := list(islice(rows, batch)):
        images, questions = ([row[name] for row in block] for name in ("image", "question"))
        answered += map(Answered, images, questions, lmm.generate(lmm.prompt(questions, images)))
    return answered
