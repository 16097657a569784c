"""Open explainer, refiner and labeller: the models that give a latent its concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from lmm_sae_nb.chat.recorded import Recorded, open_chat, reply_counts
from lmm_sae_nb.interpret import explainers
from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.interpret.explain import Explainer, Explanation, explain_enough, explain_latents
from lmm_sae_nb.interpret.explainers import Labeller, Refiner, Vocabulary
from lmm_sae_nb.support.files import project_root

DEFAULTS = {"tag": "", "batch_size": 4, "max_new_tokens": 64, "least_confidence": 0.0}


def open_interpreter(
    explainer: Mapping[str, object], refiner: str, labeller: str, endpoint: Mapping[str, object],
    *, concepts: str, replies: str | Path,
) -> Interpreter:  # fmt: skip
    """Prepare the explainer, the refiner and the labeller of a page. Each model is loaded when it is first asked.

    explainer: `model` (a folder of the project, a name on the hub, or name@http://host:port/v1) and `prompt`; if they
        differ from `DEFAULTS`, `tag` and `least_confidence` of `explainers.explainer`, `batch_size` and
        `max_new_tokens` of `open_chat`.
    refiner: a model that shortens explanations. "" takes the vocabulary of `concepts`, or without it no refiner.
    labeller: a model that gives concepts their kind. "" takes the vocabulary of `concepts`, or without it no labeller.
    endpoint: `key_variable`, `concurrency`, `timeout` and `extra` of `open_chat`.
    concepts: the JSON file of a world's concepts by kind; "" if there is no ground truth.
    replies: a file of JSON lines that keeps every reply, so that a run that was stopped does not ask again.

    Raises:
        ValueError: `explainer` has no model or no prompt, or has an entry that nobody reads.
    """
    entries = {"model", "prompt", *DEFAULTS}
    if not {"model", "prompt"} <= set(explainer) <= entries:
        raise ValueError(
            f"the explainer's settings are {', '.join(explainer)}; give model and prompt, and of the others only "
            f"{', '.join(DEFAULTS)}"
        )
    return Interpreter(DEFAULTS | dict(explainer), refiner, labeller, dict(endpoint), concepts, Path(replies))


class Interpreter:
    """Explainer, refiner and labeller, as `open_interpreter` prepares them."""

    def __init__(
        self, explainer: dict, refiner: str, labeller: str, endpoint: dict, concepts: str, replies: Path
    ):  # fmt: skip
        self._explainer, self._refiner, self._labeller = explainer, refiner, labeller
        self._endpoint, self._replies = endpoint, replies
        self._vocabulary = Vocabulary(project_root() / concepts) if concepts else None
        self._chats: dict[str, Recorded] = {}

    @property
    def models(self) -> dict[str, str]:
        """The name of who explains, refines and labels; "nobody" where nobody does."""
        instead = self._vocabulary.name if self._vocabulary else "nobody"
        return {
            "explainer": self._explainer["model"],
            "refiner": self._refiner or instead,
            "labeller": self._labeller or instead,
        }

    @property
    def failed(self) -> int:
        """How many questions got no reply so far. As `replies_failed` among a stage's metrics it makes the next run
        ask them again."""
        return sum(chat.failed for chat in self._chats.values())

    @property
    def counts(self) -> dict[str, int]:
        """What became of the questions so far, as metrics (`reply_counts`)."""
        return reply_counts(self._chats.values())

    @cached_property
    def refine(self) -> Refiner:
        """Explanations to concepts."""
        if self._refiner:
            return explainers.refiner(self._chat(self._refiner))
        return self._vocabulary.refine if self._vocabulary else explainers.no_refiner

    @cached_property
    def label(self) -> Labeller:
        """Concepts to their kinds."""
        if self._labeller:
            return explainers.labeller(self._chat(self._labeller))
        return self._vocabulary.label if self._vocabulary else explainers.no_labeller

    @cached_property
    def _explain(self) -> Explainer:
        settings = {name: self._explainer[name] for name in ("prompt", "tag", "least_confidence")}
        return explainers.explainer(self._chat(self._explainer["model"]), **settings)

    def explain(self, exemplars: Mapping[int, Sequence[Exemplar]]) -> dict[int, Explanation]:
        """Explain latents by their exemplars, as `explain_latents` does."""
        return explain_latents(exemplars, self._explain, self.refine, self.label)

    def explain_enough(
        self, exemplars: Mapping[int, Sequence[Exemplar]], latents: Sequence[int], enough: int, at_once: int = 16
    ) -> dict[int, Explanation]:
        """Explain latents in their order until `enough` are explained, as the function of the same name does."""
        return explain_enough(latents, exemplars, self.explain, enough, at_once)

    def _chat(self, model: str) -> Recorded:
        """The chat with a model, opened once."""
        if model not in self._chats:
            is_explainer = model == self._explainer["model"]
            chat = open_chat(
                model, batch_size=self._explainer["batch_size"], max_new_tokens=self._explainer["max_new_tokens"],
                confidence=is_explainer and self._explainer["least_confidence"] > 0, **self._endpoint,
            )  # fmt: skip
            self._chats[model] = Recorded(chat, self._replies)
        return self._chats[model]
