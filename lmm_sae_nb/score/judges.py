"""Judges: whether an explanation fits what excites the latent, by a model and by people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from PIL import Image

from lmm_sae_nb.chat.questions import IMAGES, Chat, Question
from lmm_sae_nb.chat.recorded import ask
from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.interpret.explainers import only_option
from lmm_sae_nb.score.tables import _drawn, by_kind
from lmm_sae_nb.support.intervals import Proportion, bounds, proportion
from lmm_sae_nb.truth.label_maps import TrueMasks

VERDICTS = ("yes", "no", "unsure")


JUDGE_PROMPT = (
    f"{IMAGES}In each of these images all but some regions are black. Somebody says that what the visible regions "
    'have in common is: "{text}". Is that so? Answer with one word: yes, no or unsure.'
)


Judge = Callable[[Sequence[Sequence[Image.Image]], Sequence[str]], "list[str | None]"]


def judge(chat: Chat, prompt: str = JUDGE_PROMPT) -> Judge:
    """Table 2: whether a concept is what a set of images has in common: yes, no or unsure; None without a verdict.

    ValueError for sets and concepts of different number, or a set without images.
    """

    def verdicts(sets: Sequence[Sequence[Image.Image]], concepts: Sequence[str]) -> list[str | None]:
        if len(sets) != len(concepts) or not all(map(len, sets)):
            raise ValueError(
                f"{len(sets)} sets of images, {sum(not len(images) for images in sets)} of them empty, and "
                f"{len(concepts)} concepts; give each concept its images"
            )
        questions = (
            Question(prompt.replace("{text}", concept), tuple(images))
            for images, concept in zip(sets, concepts, strict=True)
        )
        return [only_option(reply, {verdict: verdict for verdict in VERDICTS}) for reply in ask(chat, questions)]

    return verdicts


JUDGED = ("judged", "judged_shuffled")  # verdicts on a latent's own name, and on another's


Verdicts = Callable[[Sequence[Sequence[Exemplar]], Sequence[str]], "list[str | None]"]  # yes, no, unsure; None: none


def by_sight(judge: Judge) -> Verdicts:
    """A judge of pictures as one of exemplars: it is shown the masked images."""
    return lambda sets, concepts: judge([[e.masked for e in own] for own in sets], concepts)


def knowing(truth: TrueMasks) -> Verdicts:
    """A judge that knows the ground truth: yes if the exemplars have the concept in common (`shown.common`), or no.

    None for a concept that the ground truth does not know.
    """

    def verdicts(sets: Sequence[Sequence[Exemplar]], concepts: Sequence[str]) -> list[str | None]:
        return [
            ("yes" if concept in truth.common(own) else "no") if truth.kinds_of(concept) else None
            for own, concept in zip(sets, concepts, strict=True)
        ]

    return verdicts


def some_of_each(kinds: Mapping[str, str], each: int, seed: int = 0) -> list[int]:
    """`each` latents of every kind, at random; all of a kind that has no more."""
    groups = {kind: latents for kind, latents in by_kind(kinds).items() if kind != "total"}
    return [int(latent) for latents in groups.values() for latent in _drawn(latents, each, seed)]


def judge_latents(
    verdicts: Verdicts, exemplars: Mapping[int, Sequence[Exemplar]], named: Mapping[int, tuple[str, str]],
    others: Mapping[int, str | None], *, each: int = 100, seed: int = 0,
) -> dict[str, dict[str, str | None]]:  # fmt: skip
    """Verdicts on `each` latents of every kind, at random, by `JUDGED`: on their concepts, and on others'.

    Beside them the concept that was judged, so that a later explanation is not taken for it.
    """
    chosen = some_of_each({str(latent): kind for latent, (_, kind) in named.items()}, each, seed)
    found: dict[str, dict[str, str | None]] = {str(n): {"concept": named[n][0]} for n in chosen}
    for column, names in zip(JUDGED, ({n: named[n][0] for n in chosen}, others), strict=True):
        asked = [n for n in chosen if names[n]]
        for n, verdict in zip(asked, verdicts([exemplars[n] for n in asked], [names[n] for n in asked]), strict=True):
            found[str(n)][column] = verdict
    return found


def consistency(verdicts: Mapping[str, str | None], kinds: Mapping[str, str]) -> dict[str, Proportion]:
    """Table 2: for each kind and in total the share of verdicts that are yes.

    What got no verdict (None) is left out; unsure counts as not yes.
    """
    given = {latent: verdict for latent, verdict in verdicts.items() if verdict is not None}
    groups = by_kind({latent: kinds[latent] for latent in given})
    return {kind: proportion([given[n] == "yes" for n in latents]) for kind, latents in groups.items() if latents}


def agreed(rows: Mapping[str, Mapping[str, str | None]], kinds: Mapping[str, str]) -> dict[str, float]:
    """Table 2 as a stage's metrics, each with its interval: judged, judged_KIND, and the same of judged_shuffled.

    rows: of `judge_latents`.
    """
    told: dict[str, float] = {}
    for name in JUDGED:
        shares = consistency({n: row.get(name) for n, row in rows.items()}, kinds)
        for kind, found in shares.items():
            title = name if kind == "total" else f"{name}_{kind}"
            told |= bounds(title, found) | {f"{title}_asked": found.asked}
    return told
