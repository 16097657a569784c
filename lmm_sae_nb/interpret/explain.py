"""Section 2.2: what excites a latent, shown as masked images, and what a model says that they have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.interpret.explainers import Answer, Labeller, Outcome, Refiner
from lmm_sae_nb.support.files import read_json

TAUGHT = "taught.json"  # in an explainer's folder: {"lessons": [{"trained": `training_of` an SAE, "latents": [...]}]}


@dataclass(frozen=True)
class Explanation:
    """What became of a latent: `concept` and its `kind` only if it is explained; `answer` is what was said.

    sureness: the probability that the explainer gave its answer, if it tells.
    """

    outcome: Outcome
    concept: str | None
    kind: str | None
    answer: str
    sureness: float | None = None


Explainer = Callable[[Iterable[Sequence[Image.Image]]], list[Answer]]


def explain_latents(
    shown: Mapping[int, Sequence[Exemplar]], explain: Explainer, refine: Refiner, label: Labeller
) -> dict[int, Explanation]:
    """Ask for each latent what its exemplars have in common, shorten the answer to a concept, and give its kind.

    A latent without exemplars is refused. What the refiner makes of an explanation decides its outcome: a text that
    it cannot use is unparseable. kind: None where the labeller gives none.
    """
    answers = explain([exemplar.masked for exemplar in found] for found in shown.values())
    told = [n for n, answer in enumerate(answers) if answer.outcome is Outcome.EXPLAINED]
    short = dict(zip(told, refine([answers[n].text for n in told]), strict=True))
    named = [n for n in told if short[n].outcome is Outcome.EXPLAINED]
    kinds = dict(zip(named, label([short[n].text for n in named]), strict=True))
    return {
        latent: Explanation(*short.get(n, answer)[:2], kinds.get(n), answer.raw, answer.sureness)
        for n, (latent, answer) in enumerate(zip(shown, answers, strict=True))
    }


def explain_enough(
    latents: Sequence[int],
    shown: Callable[[int], Sequence[Exemplar]],
    ask: Callable[[Mapping[int, Sequence[Exemplar]]], dict[int, Explanation]],
    enough: int,
    at_once: int = 32,
) -> dict[int, Explanation]:
    """Ask about the latents in their order, `at_once` at a time, until `enough` are explained or none is left.

    shown: a latent's exemplars; ask: `explain_latents` with its models. All who were asked come back: their order is to
    be random, so that they are a sample of it.
    """
    found: dict[int, Explanation] = {}
    for start in range(0, len(latents), at_once):
        found |= ask({latent: shown(latent) for latent in latents[start : start + at_once]})
        if sum(its.outcome is Outcome.EXPLAINED for its in found.values()) >= enough:
            break
    return found


def training_of(folder: Path) -> dict | None:
    """With which parameters, from which inputs, notebook 01 trained the SAE of a folder; None if that does not say."""
    manifest = folder / "manifest.json"
    told = read_json(manifest) if manifest.is_file() else None
    return told and {"params": told["params"], "inputs": sorted(told["inputs"])}


def taught_latents(explainer: Path, trained: Path) -> frozenset[int]:
    """The latents of an SAE whose masks, on other images, an explainer was trained on; none if nothing is known of any.

    explainer: its folder, in which `TAUGHT` says so; trained: the SAE's folder. An SAE is known by `training_of`, its
    weights are not compared: other processors round differently.
    """
    if not (explainer / TAUGHT).is_file() or (training := training_of(trained)) is None:
        return frozenset()
    lessons = read_json(explainer / TAUGHT)["lessons"]
    return frozenset(n for lesson in lessons if lesson["trained"] == training for n in lesson["latents"])


def as_rows(explanations: Mapping[int, Explanation], longest: int = 2000) -> dict[str, dict]:
    """Explanations by latent as JSON has them; an answer is kept up to `longest` characters."""
    return {
        str(latent): {
            "outcome": its.outcome.value, "concept": its.concept, "kind": its.kind, "answer": its.answer[:longest],
            "sureness": its.sureness,
        }
        for latent, its in explanations.items()
    }  # fmt: skip
