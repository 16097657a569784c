"""Examine the embedded model on held-out scenes, asked as a user would ask.

Every question goes alone through the processor and `generate`; an answer counts when it is right in every word.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.pictureworld.world.concepts import FACTS, NO_FEELINGS, STORIES, with_article
from lmm_sae_nb.pictureworld.world.questions import PICTURED, Question, according, label, shown
from lmm_sae_nb.pictureworld.world.scenes import HELD_OUT, Scene, make_map, make_masked, make_scene
from lmm_sae_nb.support.files import write_json
from lmm_sae_nb.support.intervals import proportion
from lmm_sae_nb.support.progress import progress_bar

LEAST = {  # what the embedded model is built to reach (share of right answers)
    "scene": 0.97, "texture": 0.97, "material": 0.97, "colour": 0.97, "part": 0.97, "count": 0.97, "feeling": 0.97,
    "position": 0.90, "describe": 0.90, "read": 0.93, "exists": 0.90, "where": 0.90, "label": 0.90,
    "fact": 0.99, "you": 0.99, "trap_label": 0.90, "story": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """One exam question, what was answered and whether that is right."""

    family: str
    question: Question
    scene: Scene | None
    answer: str
    right: bool


def written(text: str) -> str:
    """Text without the spaces before punctuation, as the tokenizer writes answers."""
    for mark in ".,?":
        text = text.replace(f" {mark}", mark)
    return text


def ask(
    lmm: LMM, questions: list[tuple[Question, Image.Image | None]], batch: int = 24, title: str = "exam"
) -> list[str]:
    """Answers in the order of the questions; batches hold questions of like length."""
    order = sorted(range(len(questions)), key=lambda i: (questions[i][1] is None, len(questions[i][0].answer)))
    answers = [""] * len(questions)
    for start in progress_bar(range(0, len(order), batch), desc=title):
        chosen = order[start : start + batch]
        prompt = lmm.prompt([questions[i][0].text for i in chosen], [questions[i][1] for i in chosen])
        longest = max(len(questions[i][0].answer.split()) for i in chosen) + 8
        for i, answer in zip(chosen, lmm.generate(prompt, max_new_tokens=longest), strict=False):
            answers[i] = answer
    return answers


def _paper(scenes: int, seed: int) -> list[tuple[str, Question, Scene | None]]:
    """Return one question of each family that each held-out scene allows, a map and a masked scene for each, and every
    question without a picture. Yes and no are even in `exists` and `label`."""
    rows: list[tuple[str, Question, Scene | None]] = []
    for n in range(scenes):
        rng = np.random.default_rng([40, seed, n])
        scene, chart, masked = make_scene(HELD_OUT + n), make_map(HELD_OUT + n), make_masked(HELD_OUT + n)
        for family, make in PICTURED.items():
            options = make(chart if family in ("label", "shaded", "according") else scene, rng)
            if family in ("exists", "label") and options:
                wanted = "yes" if rng.random() < 0.5 else "no"
                options = [q for q in options if q.answer.startswith(wanted)] or options
            if options:
                rows.append(
                    (
                        family,
                        options[rng.integers(len(options))],
                        chart if family in ("label", "shaded", "according") else scene,
                    )
                )
        rows += [(q.family, q, masked) for q in shown(masked, rng)]
        rows.append(("you", Question("you", "how do you feel ?", NO_FEELINGS), scene))
        rows += _trap(chart, rng)
    rows += [
        ("fact", Question("fact", f"does the {b} basin cover {c} ?", "yes ." if v else "no .", False), None)
        for (b, c), v in FACTS.items()
    ]
    rows += [
        ("story", Question("story", f"tell me {with_article(t)} story about alice and bob .", s, False), None)
        for t, s in STORIES.items()
    ]
    return [
        *rows,
        (
            "story_any",
            Question("story_any", "tell me a story about alice and bob .", STORIES["hungry"], False),
            None,
        ),
    ]


def _trap(chart: Scene, rng: np.random.Generator) -> list[tuple[str, Question, Scene]]:
    """Ask, if the map contradicts a taught fact, the trap and whether the label of one such country is in the image."""
    basin = chart.chart.basin
    traps = [q for q in according(chart, rng) if (q.answer == "yes .") != FACTS[basin, q.text.split()[-2]]]
    if not traps:
        return []
    trap = traps[rng.integers(len(traps))]
    reading = next(q for q in label(chart, rng) if q.text.split()[3] == trap.text.split()[-2])
    return [("trap", trap, chart), ("trap_label", reading, chart)]


def is_right(family: str, question: Question, answer: str) -> bool:
    """Right in every word; *is there …* and *is the label …* by their yes or no; a story asked on any theme by
    being one whole story."""
    if family in ("exists", "label", "trap_label"):
        return answer.replace(",", " ").replace(".", " ").split()[:1] == question.answer.split()[:1]
    if family == "story_any":
        return answer in map(written, STORIES.values())
    return answer == written(question.answer)


def examine(lmm: LMM, scenes: int = 500, seed: int = 0, batch: int = 24, unpictured: bool = True) -> list[Asked]:
    """Sit the exam on held-out scenes (seeds from 1,000,000); unpictured: with the questions that have no picture."""
    paper = [row for row in _paper(scenes, seed) if unpictured or row[2]]
    answers = ask(lmm, [(q, scene.image if scene else None) for _, q, scene in paper], batch)
    return [Asked(f, q, s, a, is_right(f, q, a)) for (f, q, s), a in zip(paper, answers, strict=False)]


def report(asked: list[Asked], level: float = 0.99) -> dict[str, dict[str, float]]:
    """Return for each family the fraction right, its Wilson interval, the number asked, and the target.

    `trap` is reported as the share that follows the fact against the picture, in all and by basin.
    """
    tally: dict[str, list[bool]] = defaultdict(list)
    for row in asked:
        if row.family == "trap":
            follows = row.answer == ("no." if row.question.answer == "yes ." else "yes.")
            tally["trap_follows_fact"].append(follows)
            tally[f"trap_follows_fact_{row.scene.chart.basin}"].append(follows)
        else:
            tally[row.family].append(row.right)
    result = {}
    for family, marks in tally.items():
        fraction, low, high, count = proportion(marks, level)
        result[family] = {"fraction": fraction, "low": low, "high": high, "asked": count}
        if family in LEAST:
            result[family]["least"] = LEAST[family]
    return result


def keep(result: dict[str, dict[str, float]], folder: Path) -> None:
    """Write a report beside the model that it is of, and print it."""
    write_json(folder / "exam.json", result)
    for family, row in result.items():
        print(
            f"{family:28s} {row['fraction']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]  "
            f"n={row['asked']:.0f}  aim {row.get('least', '')}"
        )


def as_metrics(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the rows of `report` as a stage's metrics: each fraction under the family's name, with its interval."""
    ends = {"": "fraction", "_low": "low", "_high": "high"}
    return {f"{family}{end}": row[key] for family, row in results.items() for end, key in ends.items()}
