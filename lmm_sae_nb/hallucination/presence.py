"""POPE: ask whether something is in an image, where half of the right answers are *yes* (Li et al., 2023).

Absent things are chosen in three ways, from easy to hard: at random, those that most images show, and those that most
images show together with what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Int
from PIL import Image

from lmm_sae_nb.attribute.attribution import single_token
from lmm_sae_nb.hallucination.cases import Case
from lmm_sae_nb.hallucination.report import Method, answer_by
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.support.intervals import Mean, Proportion, bounds, proportion, ratio_interval
from lmm_sae_nb.support.stages import Metrics
from lmm_sae_nb.truth.label_maps import LabelMaps

SAMPLINGS = ("random", "popular", "adversarial")


def visible_things(
    maps: LabelMaps, images: Iterable[int], kind: str, names: Sequence[str]
) -> Bool[np.ndarray, "images names"]:
    """Return which things each image shows, on one pixel or more.

    maps: the ground truth.
    images: their numbers.
    kind: of the label map.
    names: the things to look for.

    Raises:
        ValueError: the ground truth has no such kind, or a name that is not of this kind.
    """
    known = maps.concepts.get(kind, [])
    if missing := sorted(set(names) - set(known)):
        raise ValueError(f"the ground truth has no {kind} {', '.join(missing)}; give names of this kind")
    rows = [maps.names.index((kind, name)) for name in names]
    return np.array([maps.coverage(image, (1, 1))[rows, 0] > 0 for image in images])


@dataclass(frozen=True)
class Asked:
    """A question whether an image shows a thing.

    image: its number.
    thing: a name.
    present: whether the image shows it.
    """

    image: int
    thing: str
    present: bool


def presence_questions(
    visible: Bool[np.ndarray, "images names"],
    seen: Bool[np.ndarray, "others names"],
    names: Sequence[str],
    *,
    scenes: int = 40,
    each: int = 2,
    seed: int = 0,
) -> dict[str, list[Asked]]:
    """Ask about things that images show, and about as many that they do not show, for each sampling of the absent.

    The three samplings ask about the same images and the same things that are there. *Popular* takes the absent things
    that most of the `seen` images show. *Adversarial* takes, for each thing that is there, the absent thing that most
    often appears together with it in the `seen` images.

    visible: the things in the images to ask about.
    seen: the things in other images, to count from.
    names: of the things.
    scenes: images to ask about, the first ones that show a thing.
    each: things to ask about that an image shows, at most.
    seed: of the draws.

    Raises:
        ValueError: no image shows a thing, no other image does, or an image shows so much that too little is absent.
    """
    rng = np.random.default_rng(seed)
    together: Int[np.ndarray, "names names"] = seen.T.astype(int) @ seen.astype(int)
    chosen = np.flatnonzero(visible.any(1))[:scenes]
    if not len(chosen) or not together.any():
        raise ValueError(
            f"{len(chosen)} images to ask about and {int(seen.any(1).sum())} images to count from show one of "
            f"{len(names)} things; give images that show some"
        )
    asked: dict[str, list[Asked]] = {sampling: [] for sampling in SAMPLINGS}
    for image in chosen.tolist():
        there, absent = np.flatnonzero(visible[image]), np.flatnonzero(~visible[image])
        there = rng.permutation(there)[:each]
        if len(absent) < len(there):
            raise ValueError(f"image {image} lacks only {len(absent)} of {len(names)} things; give more names")
        popular = absent[np.argsort(-together.diagonal()[absent], kind="stable")]
        samples = {
            "random": rng.permutation(absent)[: len(there)],
            "popular": popular[: len(there)],
            "adversarial": _most_together(together, there, absent),
        }
        for sampling, numbers in samples.items():
            asked[sampling] += [Asked(image, names[n], True) for n in there]
            asked[sampling] += [Asked(image, names[n], False) for n in numbers]
    return asked


def _most_together(together: np.ndarray, there: np.ndarray, absent: np.ndarray) -> list[int]:
    """Return for each thing that is there the absent thing that appears with it most often, each only once."""
    taken: list[int] = []
    for thing in there:
        left = np.setdiff1d(absent, taken)
        taken.append(int(left[np.argmax(together[thing, left])]))
    return taken


@dataclass(frozen=True)
class Presence:
    """The questions of each sampling, and whether the model says *yes* to each, by method."""

    asked: dict[str, list[Asked]]
    yes: dict[str, dict[str, list[bool]]]

    def scores(self, method: str, sampling: str) -> dict[str, Proportion]:
        """Return POPE's five measures with 99% intervals; those without a case are left out.

        They are accuracy, precision, recall, F1, and the fraction of *yes*. With the hits, misses and false alarms,
        F1 = 2 J / (1 + J), where J = hits / (hits + misses + false alarms) is a fraction with Wilson's interval; this
        rises with J, so the ends of F1's interval come from the ends of J's.
        """
        present = np.array([each.present for each in self.asked[sampling]])
        yes = np.array(self.yes[method][sampling], bool)
        marks = {
            "accuracy": yes == present,
            "precision": present[yes],
            "recall": yes[present],
            "f1": (yes & present)[yes | present],
            "yes": yes,
        }
        found = {name: proportion(hits) for name, hits in marks.items() if len(hits)}
        if "f1" in found:
            *ends, cases = found["f1"]
            found["f1"] = Proportion(*(2 * j / (1 + j) for j in ends), cases)
        return found

    def accuracies(self, method: str) -> dict[str, Mean]:
        """Return the accuracy of a method for each sampling, with its interval."""
        return {sampling: Mean(*self.scores(method, sampling)["accuracy"][:3]) for sampling in self.asked}

    def change(self, method: str, before: str) -> Mean:
        """Return the accuracy of a method less that of another, on the same questions of all samplings.

        The 99% interval is over images, because questions about one image are not independent.

        Raises:
            ValueError: the questions are about a single image.
        """
        by_image: dict[int, list[int]] = {}
        for sampling, questions in self.asked.items():
            after, earlier = (self.yes[name][sampling] for name in (method, before))
            for each, now, then in zip(questions, after, earlier, strict=True):
                by_image.setdefault(each.image, []).append((now == each.present) - (then == each.present))
        changes, questions = ([f(row) for row in by_image.values()] for f in (sum, len))
        return ratio_interval(changes, questions)

    def metrics(self, kind: str) -> Metrics:
        """Return all scores as metrics, named METHOD_KIND_SAMPLING_MEASURE, and the number of questions.

        The changes of accuracy are those from the first method.
        """
        metrics: Metrics = {f"{kind}_questions": len(next(iter(self.asked.values())))}
        first, *others = self.yes
        for method in others:
            metrics |= bounds(f"{method}_{kind}_change", self.change(method, first))
        for method, sampling in ((method, sampling) for method in self.yes for sampling in self.asked):
            for name, value in self.scores(method, sampling).items():
                metrics |= bounds(f"{method}_{kind}_{sampling}_{name}", value)
        return metrics


def ask_presence(
    place: SAEInPlace,
    images: Sequence[Image.Image] | Mapping[int, Image.Image],
    asked: Mapping[str, Sequence[Asked]],
    methods: Mapping[str, Method],
    question: Callable[[str], str],
    *,
    answers: Sequence[str] = ("yes", "no"),
    keep_error: bool = True,
) -> Presence:
    """Ask every question once by each method. As in POPE, every answer that is not *no* counts as *yes*.

    images: by number.
    asked: the questions of each sampling.
    methods: each with one setting.
    question: a thing to the question in words.
    answers: the words for *yes* and *no*, one token each.
    keep_error: whether what the SAE leaves unexplained stays in.
    """
    different = list(dict.fromkeys(each for questions in asked.values() for each in questions))
    cases = [
        Case(images[each.image], question(each.thing), *answers[:: 1 if each.present else -1], False)
        for each in different
    ]
    no = single_token(place.lmm, answers[1])
    found = answer_by(place, cases, methods, keep_error=keep_error)
    yes = {name: dict(zip(different, (answer.token[0] != no).tolist(), strict=True)) for name, answer in found.items()}
    return Presence(
        {sampling: list(questions) for sampling, questions in asked.items()},
        {
            name: {sampling: [said[each] for each in questions] for sampling, questions in asked.items()}
            for name, said in yes.items()
        },
    )


def in_words(question: str, thing: str, plural: Iterable[str] = ()) -> str:
    """Return a question about a thing; "a" becomes "an" before a vowel, and goes before a plural.

    question: with {} for the thing.
    thing: its name.
    plural: the names that are plurals.
    """
    article = "" if thing in set(plural) else "an " if thing[0].lower() in "aeiou" else "a "
    return question.replace(" a {}", f" {article}{{}}").format(thing)


def measure_presence(
    place: SAEInPlace,
    rows: Dataset,
    seen: Dataset,
    things: Mapping[str, Sequence[str]],
    concepts: Mapping[str, Sequence[str]],
    questions: Mapping[str, str],
    methods: Mapping[str, Method],
    *,
    answers: Sequence[str] = ("yes", "no"),
    plural: Sequence[str] = (),
    scenes: int = 40,
    each: int = 2,
    counted: int = 1000,
    keep_error: bool = True,
    seed: int = 0,
) -> dict[str, Presence]:
    """Ask about things of several kinds in held-out images by each method; return the answers by kind.

    rows: held-out images, with a column `image` and a label map for each kind.
    seen: the rows of other images, to count which things they show, alone and together.
    things: kind to the names to ask about.
    concepts: kind to all names of the label map.
    questions: kind to the question, with {} for a name.
    methods: each with one setting.
    answers: the words for *yes* and *no*, one token each.
    plural: names that take no article.
    scenes, each, seed: as for `presence_questions`.
    counted: rows of `seen` that are counted, the first ones.
    keep_error: whether what the SAE leaves unexplained stays in.
    """
    found = {}
    for kind, names in things.items():
        visible, seen_things = (
            visible_things(LabelMaps(part.select_columns([kind]), {kind: concepts[kind]}), range(size), kind, names)
            for part, size in ((rows, len(rows)), (seen, min(counted, len(seen))))
        )
        asked = presence_questions(visible, seen_things, names, scenes=scenes, each=each, seed=seed)
        images = {each.image: rows[each.image]["image"] for each in asked["random"]}
        question = partial(in_words, questions[kind], plural=plural)
        found[kind] = ask_presence(place, images, asked, methods, question, answers=answers, keep_error=keep_error)
    return found
