"""From the exemplars of latents to explanations: ask, shorten to a concept, give it a kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import AfterValidator, NonNegativeInt

from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.interpret.explainers import Answer, Labeller, Outcome, Refiner
from lmm_sae_nb.support.stages import read_manifest, read_typed

TRAINED_ON = "taught.json"  # in an explainer's folder: `Lessons`


@dataclass(frozen=True)
class Training:
    """What an SAE was trained with: parameters, and the names of the inputs, sorted."""

    params: dict
    inputs: list[str]


@dataclass(frozen=True)
class Lesson:
    """Latents of one SAE whose masks an explainer was trained on.

    trained: the SAE's training; None for an SAE that no page makes.
    """

    trained: Training | None
    latents: list[NonNegativeInt]


@dataclass(frozen=True)
class Lessons:
    """What an explainer was trained on."""

    lessons: list[Lesson]


def _is_explanation(row: dict) -> dict:
    """Refuse a row of explanations.json without outcome or concept, or where a text is something else."""
    for name in ("outcome", "concept", "kind", "answer"):
        value = row.get(name)
        if name not in row or not (isinstance(value, str) or (value is None and name in ("concept", "kind"))):
            raise ValueError(f"{name} is {value!r}, not a text")
    return row


# explanations.json: latent to row, as `as_rows` makes them; pages add further entries to a row
ExplanationRows = dict[int, Annotated[dict[str, Any], AfterValidator(_is_explanation)]]


@dataclass(frozen=True)
class Explanation:
    """What became of a latent.

    outcome: explained, refused, unparseable or failed.
    concept: a short name; None unless the latent is explained.
    kind: the kind of the concept; None unless the labeller gives one.
    answer: the explainer's reply as it came, or why there is none.
    confidence: the probability, in [0, 1], that the explainer gave its reply; None if it does not report one.
    """

    outcome: Outcome
    concept: str | None
    kind: str | None
    answer: str
    confidence: float | None = None


Explainer = Callable[[Iterable[Sequence[Image.Image]]], list[Answer]]


def explain_latents(
    exemplars: Mapping[int, Sequence[Exemplar]], explain: Explainer, refine: Refiner, label: Labeller
) -> dict[int, Explanation]:
    """Ask for each latent what its exemplars have in common, shorten the answer to a concept, and give it a kind.

    A latent without exemplars is refused. An explanation that the refiner cannot use is unparseable.

    exemplars: by latent; they may be made when looked up, as `ExemplarsByLatent` does.
    explain: sets of images to answers.
    refine: texts to short concepts.
    label: concepts to kinds.
    """
    answers = explain([exemplar.masked for exemplar in rows] for rows in exemplars.values())
    explained = [n for n, answer in enumerate(answers) if answer.outcome is Outcome.EXPLAINED]
    concepts = dict(zip(explained, refine([answers[n].text for n in explained]), strict=True))
    usable = [n for n in explained if concepts[n].outcome is Outcome.EXPLAINED]
    kinds = dict(zip(usable, label([concepts[n].text for n in usable]), strict=True))
    result = {}
    for n, (latent, answer) in enumerate(zip(exemplars, answers, strict=True)):
        last = concepts.get(n, answer)
        result[latent] = Explanation(last.outcome, last.text, kinds.get(n), answer.raw, answer.confidence)
    return result


def explain_enough(
    latents: Sequence[int],
    exemplars: Mapping[int, Sequence[Exemplar]],
    explain: Callable[[Mapping[int, Sequence[Exemplar]]], dict[int, Explanation]],
    enough: int,
    at_once: int = 32,
) -> dict[int, Explanation]:
    """Ask about latents in their order until `enough` are explained or none is left; return all that were asked about.

    latents: in random order, so that those asked about are a random sample.
    exemplars: by latent.
    explain: `explain_latents` with its models, or `Interpreter.explain`.
    enough: how many explained latents are wanted.
    at_once: how many latents are asked about before the explained ones are counted.
    """
    explanations: dict[int, Explanation] = {}
    for start in range(0, len(latents), at_once):
        explanations |= explain({latent: exemplars[latent] for latent in latents[start : start + at_once]})
        if sum(row.outcome is Outcome.EXPLAINED for row in explanations.values()) >= enough:
            break
    return explanations


def training_of(folder: Path) -> dict | None:
    """Return the parameters and the names of the inputs of the training of an SAE; None if its folder has no manifest.

    folder: the stage that notebook 01 wrote.
    """
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return None
    record = read_manifest(manifest)
    return {"params": record["params"], "inputs": sorted(record["inputs"])}


def latents_in_training(explainer: Path, trained: Path) -> frozenset[int]:
    """Return the latents of an SAE whose masks, on other images, an explainer was trained on.

    An SAE is recognised by its training (`training_of`): every parameter that the explainer's file names, and the names
    of the inputs. Its weights are not compared, because other processors round differently.

    explainer: its folder, with the file `TRAINED_ON` if there are such latents.
    trained: the SAE's folder.
    """
    if not (explainer / TRAINED_ON).is_file() or (training := training_of(trained)) is None:
        return frozenset()
    return frozenset(
        latent
        for lesson in read_typed(explainer / TRAINED_ON, Lessons).lessons
        if (known := lesson.trained)
        and known.inputs == training["inputs"]
        and known.params.items() <= training["params"].items()
        for latent in lesson.latents
    )


def as_rows(explanations: Mapping[int, Explanation], longest: int = 2000) -> dict[int, dict]:
    """Return explanations by latent as plain values, as explanations.json keeps them.

    longest: characters of an answer that are kept.
    """
    return {
        latent: {
            "outcome": row.outcome.value, "concept": row.concept, "kind": row.kind, "answer": row.answer[:longest],
            "confidence": row.confidence,
        }
        for latent, row in explanations.items()
    }  # fmt: skip
