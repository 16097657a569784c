"""Detection scoring: does the name of a latent tell the images that excite it from those that do not?

Source: the detection scorer of automatic interpretability (Paulo et al., arXiv 2410.13928; the code is EleutherAI's
delphi). A judge reads the explanation and says of each example if the latent is active on it. The examples are as often
active as silent, and the active ones come from all quantiles of activation: a name that fits the strongest images alone
gets a low score. So the score also measures what lies below an exemplar.

Departures: examples are whole held-out images, not texts. The judge is no language model. There are two:

- CLIP gives each image its similarity with the name. AUROC needs no limit; for the accuracy the judge calls the more
  similar half active.
- The truth says yes where the image shows the named concept on at least one patch. It errs only where the latent and
  the name differ.

The control gives each latent the name of another latent of the same kind (`truth.accuracy.other_names`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int64
from PIL import Image
from scipy.stats import rankdata

from lmm_sae_nb.measures.image_latents import ImageLatents, images_showing, mean_metrics
from lmm_sae_nb.score.scores import Explained
from lmm_sae_nb.score.similarity import AllPairs
from lmm_sae_nb.support.stages import Metrics
from lmm_sae_nb.truth.accuracy import other_names
from lmm_sae_nb.truth.label_maps import LabelMaps


def name_cosines(
    all_pairs: AllPairs, images: Sequence[Image.Image], names: Sequence[str]
) -> dict[str, Float[np.ndarray, " images"]]:
    """Return for each name its cosine with every image: what the CLIP judge needs, for all SAEs alike."""
    cosines = np.asarray(all_pairs([images[n] for n in range(len(images))], list(names)), np.float32)
    return dict(zip(names, cosines.T, strict=True))


def balanced_choice(
    acts: Float[np.ndarray, " images"], each: int, quantiles: int, rng: np.random.Generator
) -> tuple[Int64[np.ndarray, " each"], Int64[np.ndarray, " each"]] | None:
    """Draw images on which a latent is active, and as many on which it is silent.

    The active images are sorted by activation and cut into equal parts; each part gives the same number.

    acts: of the latent on each image.
    each: images of either sort; fewer if there are fewer, but always a multiple of `quantiles`.
    quantiles: parts of the active images.

    Returns:
        The active images, the strongest part first, and the silent images. None where there are fewer of either than
        quantiles.
    """
    active, silent = np.flatnonzero(acts > 0), np.flatnonzero(acts <= 0)
    of_part = min(each, len(active), len(silent)) // quantiles
    if not of_part:
        return None
    active = active[np.argsort(-acts[active], kind="stable")]
    parts = [rng.choice(part, of_part, replace=False) for part in np.array_split(active, quantiles)]
    return np.concatenate(parts), rng.choice(silent, of_part * quantiles, replace=False)


def auroc(scores: Float[np.ndarray, " n"], active: Bool[np.ndarray, " n"]) -> float:
    """Return the probability that a random active case scores higher than a random silent one; a tie counts half.

    Raises:
        ValueError: all cases are active, or all are silent.
    """
    n_active, n_silent = int(active.sum()), int((~active).sum())
    if not (n_active and n_silent):
        raise ValueError(f"{n_active} cases are active and {n_silent} silent; an AUROC needs both")
    return float((rankdata(scores)[active].sum() - n_active * (n_active + 1) / 2) / (n_active * n_silent))


def accuracy_of_half(scores: Float[np.ndarray, " n"], active: Bool[np.ndarray, " n"]) -> float:
    """Return the fraction judged right if the cases of higher score are called active, as many as there are.

    Of cases with the score at the limit, the judge calls a part active; they count by expectation.
    """
    n_active = int(active.sum())
    limit = np.sort(scores)[::-1][n_active - 1]
    above, tied = scores > limit, scores == limit
    called = above + tied * (n_active - above.sum()) / max(int(tied.sum()), 1)
    return float(np.where(active, called, 1 - called).mean())


def detection_scoring(
    latents: ImageLatents, explained: Mapping[int, Explained], truth: LabelMaps,
    cosines: Mapping[str, Float[np.ndarray, " images"]] | None = None,
    *, each: int = 20, quantiles: int = 5, seed: int = 0,
) -> Metrics:  # fmt: skip
    """Return how well judges tell active from silent images by the names of latents, mean over latents.

    detection_truth: accuracy of the judge who knows which images show the named concept.
    detection_truth_q1 ... : the fraction of the active images that it accepts, by quantile; q1 is the strongest.
    detection_truth_rejects: the fraction of the silent images that it rejects.
    detection_clip: accuracy of CLIP, which calls the more similar half active.
    detection_clip_auroc: AUROC of the similarity.
    *_KIND: the accuracies and the AUROC over the latents whose name has this kind.
    *_shuffled: the same with the name of another latent of the same kind.
    detection_latents: latents that were scored.
    detection_left_out: latents that too few images excite or leave silent.

    latents: on held-out images.
    explained: concept and kind of each latent that has a name.
    truth: label maps of the same images.
    cosines: of `name_cosines`; None leaves CLIP out.
    each: active images of a latent, and silent ones.
    quantiles: parts of the activation from which the active images come.
    seed: of the draws.

    Raises:
        ValueError: no two latents can be scored, or a name has no cosines or is no concept of the label maps.
    """
    shows = images_showing(truth, latents.images, latents.grid)
    showing = {name: shows[:, [n for n, row in enumerate(truth.names) if row[1] == name]].any(1)
               for name in {concept for concept, _ in explained.values()}}  # fmt: skip
    unknown = sorted(
        name for name in showing if not truth.kinds_of(name) or (cosines is not None and name not in cosines)
    )
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: no concept of the label maps, or without cosines; leave such names out"
        )
    ordered = dict(sorted(explained.items(), key=lambda item: (*item[1], item[0])))
    others, rng = other_names(ordered, seed), np.random.default_rng(seed)
    columns: dict[str, list[float]] = {}
    kinds: dict[str, list[str]] = {}
    scored = 0
    for latent, (concept, kind) in ordered.items():
        chosen = balanced_choice(latents.maxima[:, latent], each, quantiles, rng)
        if chosen is None:
            continue
        scored += 1
        active = np.repeat([True, False], [len(part) for part in chosen])
        images = np.concatenate(chosen)
        for end, name in (("", concept), ("_shuffled", others[latent])):
            if name is None:
                continue
            row = _truth_row(showing[name][images], active, quantiles)
            if cosines is not None:
                row["detection_clip"] = accuracy_of_half(cosines[name][images], active)
                row["detection_clip_auroc"] = auroc(cosines[name][images], active)
            for label, value in row.items():
                columns.setdefault(label + end, []).append(value)
                kinds.setdefault(label + end, []).append(kind)
    if scored < 2:
        raise ValueError(
            f"of {len(explained)} latents with a name, {scored} are active on {quantiles} images and silent on as many "
            "again; give more images, or fewer quantiles"
        )
    metrics: Metrics = {"detection_latents": scored, "detection_left_out": len(explained) - scored}
    for label, values in columns.items():
        whole = label.removesuffix("_shuffled") in ("detection_truth", "detection_clip", "detection_clip_auroc")
        metrics |= mean_metrics(label, values, kinds[label] if whole else ())
    return metrics


def _truth_row(
    says_yes: Bool[np.ndarray, " images"], active: Bool[np.ndarray, " images"], quantiles: int
) -> dict[str, float]:
    parts = says_yes[active].reshape(quantiles, -1).mean(1)
    row = {"detection_truth": float((says_yes == active).mean())}
    row |= {f"detection_truth_q{n}": float(part) for n, part in enumerate(parts, 1)}
    return row | {"detection_truth_rejects": float((~says_yes[~active]).mean())}
