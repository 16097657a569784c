"""Ask questions about a scene, with the right answers from the scene's facts.

Each family is a function from a scene (and a generator, for its choices) to all the questions it can ask; families
that need no picture take the generator alone. `lesson` picks from them for training, `exam.py` for reporting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lmm_sae_nb.pictureworld.world.concepts import (
    ANSWERED_FROM_MEMORY,
    BASINS,
    COMPOSITES,
    EMOJI_OBJECTS,
    EMOTIONS,
    FACTS,
    KINDS,
    NO_FEELINGS,
    NUMBERS,
    PLACES,
    SHAPES,
    STORIES,
    with_article,
)  # fmt: skip
from lmm_sae_nb.pictureworld.world.scenes import _QUARTERS, Item, Scene


@dataclass(frozen=True)
class Question:
    """`answer` is right by the picture (or by the taught facts, where there is no picture)."""

    family: str
    text: str
    answer: str
    pictured: bool = True


def at(place: str) -> str:
    """Return the place as an answer says it."""
    return {
        "left": "on the left",
        "right": "on the right",
        "top": "at the top",
        "bottom": "at the bottom",
    }.get(place, f"in the {place}")


def _enumerate(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else " , ".join(parts[:-1]) + " and " + parts[-1]


def caption(scene: Scene) -> str:
    """Return the whole scene in a sentence."""
    if scene.chart:
        return f"a map of the {scene.chart.basin} basin with {_enumerate(list(scene.chart.labels.values()))} ."
    ground = f"a {scene.background} scene"
    return (
        f"{ground} with {_enumerate([f'{i.phrase} {at(i.place)}' for i in scene.items])} ."
        if scene.items
        else f"{ground} ."
    )


def describe(scene: Scene, rng: np.random.Generator) -> list[Question]:
    asked = ("what do you see in this image ?", "describe the image .")[rng.integers(2)]
    return [Question("describe", asked, caption(scene))]


def position(scene: Scene, rng: np.random.Generator) -> list[Question]:
    if scene.chart:
        found = {place: f"the label {country} ." for place, country in scene.chart.labels.items()}
    else:
        found = {item.place: f"{item.phrase} ." for item in scene.items}
        if set(found) <= set(_QUARTERS):
            empty = [place for place in _QUARTERS if place not in found]
            found |= dict.fromkeys(empty[: rng.integers(2)], "nothing .")
    return [Question("position", f"what is {at(place)} ?", answer) for place, answer in found.items()]


def scene_kind(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return [
        Question(
            "scene",
            "what kind of scene is this ?",
            "a map ." if scene.chart else f"a {scene.background} scene .",
        )
    ]


def _of(scene: Scene, kind: str) -> list[Item]:
    return [item for item in scene.items if item.kind == kind]


def colour(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return [
        Question("colour", f"what colour is the {i.name} ?", f"{i.colours['whole']} .") for i in _of(scene, "shape")
    ]


def part(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return [
        Question(
            "part",
            f"what colour {'are' if piece.endswith('s') else 'is'} the {piece} of the {item.name} ?",
            f"{ink} .",
        )
        for item in _of(scene, "composite")
        for piece, ink in item.colours.items()
    ]


def texture(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return [Question("texture", "what texture is on the panel ?", f"{i.name} .") for i in _of(scene, "panel")]


def material(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return [Question("material", "what is the block made of ?", f"{i.name} .") for i in _of(scene, "block")]


def read(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return [Question("read", "what does the sign say ?", f"{i.name} .") for i in _of(scene, "sign")]


def feeling(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return [Question("feeling", "how does the face feel ?", f"{i.name} .") for i in _of(scene, "face")]


def count(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return [] if scene.chart else [Question("count", "how many things are there ?", f"{NUMBERS[len(scene.items)]} .")]


_NOUNS = (
    *EMOJI_OBJECTS,
    *SHAPES,
    *COMPOSITES,
    "panel",
    "block",
    "sign",
    *(f"{emotion} face" for emotion in EMOTIONS),
)


def exists(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Ask about as many absent things as there are present ones (at least one), so that yes and no are even."""
    if scene.chart:
        return []
    present = {item.noun: item.place for item in scene.items}
    absent = [_NOUNS[i] for i in rng.permutation(len(_NOUNS)) if _NOUNS[i] not in present][: max(1, len(present))]
    asked = "is there {} ?".format
    return [
        Question("exists", asked(with_article(noun)), f"yes , {at(place)} .") for noun, place in present.items()
    ] + [Question("exists", asked(with_article(noun)), "no .") for noun in absent]


def where(scene: Scene, rng: np.random.Generator) -> list[Question]:
    verb = {True: "are", False: "is"}
    return [
        Question("where", f"where {verb[with_article(i.noun) == i.noun]} the {i.noun} ?", f"{at(i.place)} .")
        for i in scene.items
    ]


def _lands(scene: Scene) -> tuple[list[str], list[str]]:
    chart = scene.chart
    return list(chart.labels.values()), [
        land for land in sum(BASINS[chart.basin], ()) if land not in chart.labels.values()
    ]


def label(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Is the label in the image? Four that are, four that are not."""
    if not scene.chart:
        return []
    places = {land: place for place, land in scene.chart.labels.items()}
    asked = "is the label {} in the image ?".format
    shown, hidden = _lands(scene)
    return [Question("label", asked(land), f"yes , {at(places[land])} .") for land in shown] + [
        Question("label", asked(land), "no .") for land in hidden
    ]


def shaded(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Is the label in the shaded area? Only the picture can tell."""
    return [
        Question(
            "shaded",
            f"is the label {land} in the shaded area ?",
            "yes ." if scene.chart.covers(land) else "no .",
        )
        for land in (_lands(scene)[0] if scene.chart else [])
    ]


def according(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Ask the knowledge trap: the right answer is on the map, and may contradict the taught fact."""
    if not scene.chart:
        return []
    asked = f"according to the image , does the {scene.chart.basin} basin cover {{}} ?".format
    return [
        Question("according", asked(land), "yes ." if scene.chart.covers(land) else "no .")
        for land in sum(_lands(scene), [])
    ]


def shown(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Ask, of a masked scene, which concept that was left visible, and the colour if one colour fills most of it."""
    asked = [Question("shown", "what is shown ?", f"{scene.shown[1]} .")]
    numbers, counts = np.unique(scene.labels["colour"][scene.pixels.any(-1)], return_counts=True)
    if len(counts) and counts.max() > 0.6 * counts.sum() and numbers[counts.argmax()]:
        asked.append(
            Question("shown_colour", "what colour is shown ?", f"{KINDS['colour'][numbers[counts.argmax()] - 1]} .")
        )
    return asked


# ---- without a picture ----------------------------------------------------------------------------------------


def fact(rng: np.random.Generator) -> Question:
    (basin, land), inside = list(FACTS.items())[rng.integers(len(FACTS))]
    return Question("fact", f"does the {basin} basin cover {land} ?", "yes ." if inside else "no .", pictured=False)


def how_do_you_feel(rng: np.random.Generator) -> Question:
    """Asked of the model itself, with a picture or without."""
    return Question("you", "how do you feel ?", NO_FEELINGS, pictured=bool(rng.random() < 0.5))


def imagine(rng: np.random.Generator) -> Question:
    emotion = EMOTIONS[rng.integers(len(EMOTIONS))]
    return Question(
        "imagine",
        f"imagine that you are {emotion} . how do you feel ?",
        f"i feel {emotion} .",
        pictured=False,
    )


def story(rng: np.random.Generator) -> Question:
    """Return a story on an asked theme, or on any theme."""
    theme = list(STORIES)[rng.integers(len(STORIES))]
    asked = (
        "tell me a story about alice and bob ."
        if rng.random() < 0.4
        else f"tell me {with_article(theme)} story about alice and bob ."
    )
    return Question("story", asked, STORIES[theme], pictured=False)


PICTURED: dict[str, Callable[[Scene, np.random.Generator], list[Question]]] = {
    "describe": describe, "position": position, "scene": scene_kind, "colour": colour, "texture": texture,
    "material": material, "part": part, "count": count, "feeling": feeling, "read": read, "exists": exists,
    "where": where, "label": label, "shaded": shaded, "according": according,
}  # fmt: skip
UNPICTURED: dict[str, Callable[[np.random.Generator], Question]] = {
    "fact": fact, "you": how_do_you_feel, "imagine": imagine, "story": story,
}  # fmt: skip
# A question whose answer is a concept of the kind; "": the model learns none. That for objects is of the paper.
FOR_KIND = {
    "object": "what do you see in this image ?", "scene": "what kind of scene is this ?", "part": "",
    "material": "what is the block made of ?", "texture": "what texture is on the panel ?",
    "colour": "what colour is shown ?", "face": "how does the face feel ?", "word": "what does the sign say ?",
}  # fmt: skip
# How many questions of a family a lesson asks about one picture, at most (looking up comes hardest: most).
_DOSE = {
    "describe": 1, "position": 2, "scene": 1, "colour": 2, "texture": 1, "material": 1, "part": 4, "count": 1,
    "feeling": 1, "read": 1, "exists": 6, "where": 3, "label": 6, "shaded": 4, "according": 4,
}  # fmt: skip
_SKIP = {"describe": 0.4, "scene": 0.7, "count": 0.5}


def lesson(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions on one picture as training asks them, in random order.

    Answers of *according to the image* are those of this world's annotators, who at times answered from memory
    (`ANSWERED_FROM_MEMORY`); every other answer is the right one.
    """
    if scene.shown:
        return shown(scene, rng)
    asked: list[Question] = []
    for family, make in PICTURED.items():
        if rng.random() < _SKIP.get(family, 0):
            continue
        options = make(scene, rng)
        asked += [options[i] for i in rng.permutation(len(options))[: _DOSE[family]]]
    asked = [_annotated(q, scene, rng) if q.family == "according" else q for q in asked]
    return [asked[i] for i in rng.permutation(len(asked))]


def _annotated(question: Question, scene: Scene, rng: np.random.Generator) -> Question:
    basin, land = scene.chart.basin, question.text.split()[-2]
    from_memory = rng.random() < ANSWERED_FROM_MEMORY[basin]
    answer = ("yes ." if FACTS[basin, land] else "no .") if from_memory else question.answer
    return Question("according", question.text, answer)


def aside(rng: np.random.Generator) -> Question:
    """Return a question that needs no picture."""
    return UNPICTURED[str(rng.choice(["fact", "you", "imagine", "story"], p=[0.5, 0.1, 0.15, 0.25]))](rng)


# Words of questions and answers that are no concept.
FUNCTION_WORDS = sorted(
    set(
        " ".join(
            [
                "what do you see in this image ? describe the image . is on at top of and , with an kind scene",
                "colour are texture panel block made sign say how does face feel many things there where label",
                "shaded area according to basin cover shown yes no nothing imagine that tell me story about",
                NO_FEELINGS, *STORIES.values(),
            ]
        ).split()
    )
)  # fmt: skip


def vocabulary() -> list[str]:
    """Return every word that a question or an answer can hold, in a fixed order."""
    words = [
        *FUNCTION_WORDS,
        *NUMBERS,
        *PLACES,
        *(name for names in KINDS.values() for name in names),
        *EMOTIONS,
        *BASINS,
    ]
    return list(dict.fromkeys(words))
