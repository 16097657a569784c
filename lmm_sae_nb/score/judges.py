"""Judge explanations (Table 2): does a concept fit what a latent's images have in common?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmm_sae_nb.chat.questions import IMAGES, Chat, Question
from lmm_sae_nb.chat.recorded import Recorded, ask, open_chat, reply_counts
from lmm_sae_nb.chat.replies import Reply
from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.interpret.explainers import KINDS, only_option
from lmm_sae_nb.score.latents import sample_by_kind
from lmm_sae_nb.score.ratings import VERDICTS
from lmm_sae_nb.score.scores import Explained, latents_by_kind
from lmm_sae_nb.support.intervals import Proportion, bounds, proportion
from lmm_sae_nb.truth.label_maps import LabelMaps

JUDGE_PROMPT = (
    f"{IMAGES}In each of these images all but some regions are black. Somebody says that what the visible regions "
    'have in common is: "{text}". Is that so? Answer with one word: yes, no or unsure.'
)
FAILED = "failed"  # there was no reply; it is asked for again the next time

# (exemplars of each latent, a concept for each) -> "yes", "no" or "unsure" for each; None: no verdict; or FAILED
Judge = Callable[[Sequence[Sequence[Exemplar]], Sequence[str]], "list[str | None]"]


@dataclass(frozen=True)
class Judgement:
    """What a judge says of a latent: "yes", "no", "unsure", "failed", or None without a verdict.

    concept: the latent's name when it was judged.
    judged: on the latent's name.
    judged_shuffled: on another latent's name.
    """

    concept: str
    judged: str | None = None
    judged_shuffled: str | None = None


COLUMNS = ("judged", "judged_shuffled")  # of `Judgement`


def model_judge(chat: Chat, prompt: str = JUDGE_PROMPT) -> Judge:
    """Return a judge that shows a model the masked images and asks whether the concept is what they have in common.

    prompt: with `{text}` where the concept stands.

    Raises:
        ValueError: when asked with sets and concepts of different number, or with a set without images.
    """

    def judge(sets: Sequence[Sequence[Exemplar]], concepts: Sequence[str]) -> list[str | None]:
        if len(sets) != len(concepts) or not all(map(len, sets)):
            raise ValueError(
                f"{len(sets)} sets of images, {sum(not len(shown) for shown in sets)} of them empty, and "
                f"{len(concepts)} concepts; give each concept its images"
            )
        questions = (
            Question(prompt.replace("{text}", concept), tuple(each.masked for each in shown))
            for shown, concept in zip(sets, concepts, strict=True)
        )
        return [_verdict(reply) for reply in ask(chat, questions)]

    return judge


def _verdict(reply: Reply) -> str | None:
    if reply.text is None and not reply.refused:
        return FAILED
    return only_option(reply, {verdict: verdict for verdict in VERDICTS})


def truth_judge(truth: LabelMaps) -> Judge:
    """Return a judge that knows the ground truth: yes if the exemplars have the concept in common, else no.

    None for a concept that the ground truth does not know.
    """

    def judge(sets: Sequence[Sequence[Exemplar]], concepts: Sequence[str]) -> list[str | None]:
        return [
            ("yes" if concept in truth.in_common(shown) else "no") if truth.kinds_of(concept) else None
            for shown, concept in zip(sets, concepts, strict=True)
        ]

    return judge


class OpenJudge:
    """A judge that a page names. A model is loaded when it is first asked.

    name: a folder of the project, a name on the hub, or name@http://host:port/v1; "" takes the ground truth.
    truth: None if there is none.
    endpoint: `key_variable`, `concurrency`, `timeout` and `extra` of `open_chat`.
    replies: a file of JSON lines that keeps every reply, so that a run that was stopped does not ask again.

    Raises:
        ValueError: neither a model nor a ground truth is given.
    """

    def __init__(self, name: str, truth: LabelMaps | None, endpoint: Mapping[str, object], *, replies: str | Path):
        if not name and truth is None:
            raise ValueError("there is nobody to judge; give `judge`, or `concepts` for a ground truth")
        self._name, self._truth, self._endpoint, self._replies = name, truth, dict(endpoint), replies
        self._chat: Recorded | None = None

    def __call__(self, sets: Sequence[Sequence[Exemplar]], concepts: Sequence[str]) -> list[str | None]:
        """Return the verdict on each concept, as a `Judge` does."""
        if not self._name:
            return truth_judge(self._truth)(sets, concepts)
        if self._chat is None:
            self._chat = Recorded(open_chat(self._name, **self._endpoint), self._replies)
        return model_judge(self._chat)(sets, concepts)

    @property
    def counts(self) -> dict[str, int]:
        """What became of the questions so far, as metrics (`reply_counts`); empty where no model judges."""
        return reply_counts([self._chat] if self._chat else []) if self._name else {}


def judge_latents(
    judge: Judge, exemplars: Mapping[int, Sequence[Exemplar]], explained: Mapping[int, Explained],
    others: Mapping[int, str | None], *, each: int = 100, seed: int = 0,
) -> dict[int, Judgement]:  # fmt: skip
    """Ask the judge about `each` latents of every kind, drawn at random: their own names, then other latents' names.

    others: another latent's concept, as `other_names` gives them; None is not asked about.
    """
    chosen = sample_by_kind(explained, each, seed)

    def verdicts(concepts: Mapping[int, str | None]) -> dict[int, str | None]:
        asked = [latent for latent in chosen if concepts[latent]]
        answers = judge([exemplars[latent] for latent in asked], [concepts[latent] for latent in asked])
        return dict(zip(asked, answers, strict=True))

    own, shuffled = verdicts({latent: explained[latent].concept for latent in chosen}), verdicts(others)
    return {latent: Judgement(explained[latent].concept, own[latent], shuffled.get(latent)) for latent in chosen}


def consistency(verdicts: Mapping[int, str | None], explained: Mapping[int, Explained]) -> dict[str, Proportion]:
    """Return Table 2: for each kind and in total the fraction of verdicts that are yes, with Wilson's 99% interval.

    "unsure" counts as not yes. A latent without a verdict is left out.
    """
    given = {latent: verdict for latent, verdict in verdicts.items() if verdict in VERDICTS}
    groups = latents_by_kind({latent: explained[latent] for latent in given})
    return {kind: proportion([given[n] == "yes" for n in latents]) for kind, latents in groups.items() if latents}


def consistency_by_column(
    judgements: Mapping[int, Judgement], explained: Mapping[int, Explained]
) -> dict[str, dict[str, Proportion]]:
    """Return `consistency` of the judgements on the latents' own names and on other latents' names, by `COLUMNS`."""
    return {
        column: consistency({latent: getattr(row, column) for latent, row in judgements.items()}, explained)
        for column in COLUMNS
    }


def table_2(
    judgements: Mapping[int, Judgement], explained: Mapping[int, Explained], judge: str,
    published: Mapping[str, float],
) -> list[dict[str, str | float | Proportion | None]]:  # fmt: skip
    """Return Table 2 as rows for `plots.table`, one for each kind of concept.

    judgements: of `judge_latents`; empty if nobody judged.
    judge: the name of who judged, the head of a column.
    published: metric to the paper's number, such as "judged_scene" (GPT-4o) and "judged_people_scene".
    """
    columns: dict[str, Mapping] = {}
    if judgements:
        own, shuffled = consistency_by_column(judgements, explained).values()
        columns = {judge: own, f"{judge}, other names": shuffled}
    kinds = dict.fromkeys([*KINDS, *latents_by_kind(explained)])
    for head, name in (("GPT-4o, the paper", "judged"), ("people, the paper", "judged_people")):
        columns[head] = {kind: published.get(f"{name}_{kind}".removesuffix("_total")) for kind in kinds}
    return [{"kind": kind} | {head: column.get(kind) for head, column in columns.items()} for kind in kinds]


def judge_metrics(judgements: Mapping[int, Judgement], explained: Mapping[int, Explained]) -> dict[str, float]:
    """Return Table 2 as metrics: judged, judged_KIND, and the same of judged_shuffled, each with its number asked.

    judged_without_verdict counts the names that got no verdict, replies_failed the questions without a reply.
    """
    metrics: dict[str, float] = {}
    for column, kinds in consistency_by_column(judgements, explained).items():
        for kind, accepted in kinds.items():
            name = column if kind == "total" else f"{column}_{kind}"
            metrics |= bounds(name, accepted) | {f"{name}_asked": accepted.cases}
    replies = [getattr(row, column) for row in judgements.values() for column in COLUMNS]
    without = [row.judged for row in judgements.values()].count(None)
    return metrics | {"judged_without_verdict": without, "replies_failed": replies.count(FAILED)}
