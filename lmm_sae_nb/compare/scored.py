"""Explain latents of an SAE, and score their explanations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from lmm_sae_nb.compare.saes import CachedSAE, awake
from lmm_sae_nb.interpret.explain import as_rows
from lmm_sae_nb.interpret.open import Interpreter
from lmm_sae_nb.score.latents import explained_latents, score_latents
from lmm_sae_nb.score.masks import FindConcept
from lmm_sae_nb.score.scores import Scores
from lmm_sae_nb.score.similarity import AllPairs
from lmm_sae_nb.truth.accuracy import add_truth
from lmm_sae_nb.truth.label_maps import LabelMaps


@dataclass(frozen=True)
class ScoredSAE:
    """What became of the latents of one SAE.

    explanations: latent to its row, as in explanations.json, for every latent that was asked about.
    scores: of the explained latents.
    """

    explanations: dict[int, dict]
    scores: Scores


def explain_some(
    study: CachedSAE, images: Sequence[Image.Image], interpreter: Interpreter, truth: LabelMaps | None = None, *,
    enough: int, n_top: int = 5, threshold: float = 0.25, seed: int = 0,
) -> dict[int, dict]:  # fmt: skip
    """Explain live latents in random order until enough are explained.

    images: that were cached.
    truth: if given, and the model has a patch grid, each row also says what its exemplars really show.
    enough: how many explained latents are enough.
    n_top, threshold: of the exemplars.
    seed: of the order.

    Returns: a row for each latent that was asked about, as in explanations.json.
    """
    exemplars = study.exemplars(images, n_top=n_top, threshold=threshold)
    rows = as_rows(interpreter.explain_enough(exemplars, study.live_latents(seed), enough))
    return add_truth(rows, exemplars, truth) if study.place.lmm.grid else rows


def explain_and_score(
    study: CachedSAE, images: Sequence[Image.Image], interpreter: Interpreter, truth: LabelMaps | None,
    segmenters: Mapping[str, FindConcept], all_pairs: AllPairs, *, n_explained: int, n_top: int = 5,
    threshold: float = 0.25, random_runs: int = 10, clip_runs: int = 30, seed: int = 0,
) -> ScoredSAE:  # fmt: skip
    """Explain latents of one SAE, as notebook 03 does, and score them, as notebook 04 does.

    A model without a patch grid has only a CLIP score, on whole images.

    images: that were cached.
    truth: None if the images have no label maps.
    segmenters, all_pairs, random_runs, clip_runs: as in `score_latents`.
    n_explained: latents to explain; `explain_some` asks about as many as this takes.
    n_top, threshold: of the exemplars.
    seed: of everything random.

    Raises:
        ValueError: fewer than two latents can be scored.
    """
    exemplars = {"n_top": n_top, "threshold": threshold}
    rows = explain_some(study, images, interpreter, truth, enough=n_explained, seed=seed, **exemplars)
    with awake(study.place):
        scores = score_latents(
            study.place, images, study.exemplars(images, **exemplars), explained_latents(rows, truth), segmenters,
            all_pairs, random_runs=random_runs, clip_runs=clip_runs, skipped=study.cache.skipped, seed=seed,
            **exemplars,
        )  # fmt: skip
    return ScoredSAE(rows, scores)
