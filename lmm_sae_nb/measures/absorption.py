"""Feature absorption: does a latent for a general concept fall silent where one for a special case is active?

Source: Chanin et al., *A is for Absorption* (arXiv 2409.14507), in the form of SAEBench (arXiv 2503.09532). There the
general concept (parent) is the first letter of a word, and the special case (child) is the word. Picture World nests
concepts too: a sign and its word, a panel and its texture, a block and its material, a face and its feeling, a thing
and its parts. An SAE is sparser if the latent of the word also says "sign" and the latent of the sign stays silent.

The main latents M of a parent are the best latent (F1 over patches), and each further one that raises the F1 of "any of
them fires" by more than 0.03, as SAEBench adds latents. A latent that detects a child better than the parent is not
among them: a parent has few children here, so each of their latents would raise that F1. The child's latent c is the
one of highest F1 on the patches that show child and parent. A case is an image that shows both; T are the patches that
do. With activations a, decoder rows d and the parent's direction p:

    missed   =  no latent of M fires on a patch of T
    absorbed =  missed, and c fires on a patch of T, and d_c . p > 0
    rate     =  absorbed cases / cases
    fraction =  S(c) / (S(c) + S(M)),   S(latents) = sum over T and latents of max(0, a d . p)

`fraction` counts partial absorption as well. A latent fires above its detector's threshold. All is chosen on cached
images, and the cases are held-out images.

Departures: the truth says where the parent is, not a probe. Direction p is the difference of the means, of patches with
the parent and of all others, of what the SAE reconstructs. SAEBench takes a logistic probe of the model's states.
SAEBench's absorber may be any latent whose projection is large enough. Here it is the child's latent, because we know
the child. The control puts every other live latent in its place, with the same threshold relative to its maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import sparse

from lmm_sae_nb.measures.image_latents import ImageLatents, mean_metrics
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.intervals import bounds, proportion
from lmm_sae_nb.support.stages import Metrics
from lmm_sae_nb.truth.detectors import best_thresholds
from lmm_sae_nb.truth.label_maps import LabelMaps

Concept = tuple[str, str]  # kind and name
LEAST_GAIN = 0.03  # of F1, for which SAEBench takes one more main latent
MOST_MAIN = 10  # main latents of a parent at most


class NestedPair(NamedTuple):
    """A concept and a special case of it.

    group: the name under which such pairs are counted.
    parents: any of these concepts is the parent; several if it has no name of its own.
    child: shown inside the parent.
    """

    group: str
    parents: tuple[Concept, ...]
    child: Concept


@dataclass(frozen=True)
class Firing:
    """Latents that say that a concept is there.

    latents: their numbers.
    thresholds: activation above which each fires.
    relative: the same as fractions of each latent's maximum.
    f1: of "any of them fires" over the cached patches.
    """

    latents: list[int]
    thresholds: list[float]
    relative: list[float]
    f1: float


@dataclass(frozen=True)
class AbsorptionCase:
    """A held-out image that shows a parent and its child.

    pair: which parent and child.
    image: its number.
    missed: no main latent of the parent fires on the child's patches.
    absorbed: missed, and the child's latent fires there and points to the parent.
    fraction: the part of the projection on the parent's direction that the child's latent holds, in [0, 1].
    by_chance: which fraction of all other live latents would count as absorbing.
    """

    pair: NestedPair
    image: int
    missed: bool
    absorbed: bool
    fraction: float
    by_chance: float


def patches_of(
    pairs: Sequence[NestedPair], truth: LabelMaps, images: int, grid: tuple[int, int]
) -> tuple[dict[tuple[Concept, ...], Bool[np.ndarray, " patches"]], list[Bool[np.ndarray, " patches"]]]:
    """Return the patches that show each parent, and for each pair those that show child and parent.

    Raises:
        ValueError: the label maps do not have a concept of a pair.
    """
    row_of = {name: row for row, name in enumerate(truth.names)}
    wanted = {concept for pair in pairs for concept in (*pair.parents, pair.child)}
    if unknown := sorted(wanted - row_of.keys()):
        raise ValueError(f"the label maps have no {unknown[0][1]!r} among {unknown[0][0]!r}; give pairs of this world")
    shows = truth.patches_showing(range(images), grid)
    dense = {name: shows[[row_of[name]]].toarray()[0] > 0 for name in wanted}
    parents = {pair.parents: np.logical_or.reduce([dense[name] for name in pair.parents]) for pair in pairs}
    return parents, [parents[pair.parents] & dense[pair.child] for pair in pairs]


def detect(
    latents: ImageLatents, columns: Sequence[Bool[np.ndarray, " patches"]], block: int = 256
) -> tuple[Float[np.ndarray, "latents columns"], Float[np.ndarray, "latents columns"]]:
    """Return the best F1 of each latent for each set of patches, and the threshold as a fraction of its maximum."""
    shows = sparse.csc_array(np.array(columns).T, dtype=np.float32)
    showing, highest = shows.sum(0), np.maximum(latents.maxima.max(0), 1e-12)
    parts = [
        best_thresholds(latents.firings(start, stop), start, highest[start:stop], shows, showing, latents.patches)
        for start in range(0, latents.n_latents, block)
        for stop in [min(start + block, latents.n_latents)]
    ]
    f1, relative = (np.concatenate(each) for each in zip(*parts, strict=True))
    return f1, relative


def main_latents(
    latents: ImageLatents, shows: Bool[np.ndarray, " patches"], f1: Float[np.ndarray, " latents"],
    relative: Float[np.ndarray, " latents"], candidates: int = 30,
) -> Firing:  # fmt: skip
    """Choose the main latents of a parent: the best, then each that raises the joint F1 most, by `LEAST_GAIN` or more.

    shows: the patches that show the parent.
    f1, relative: of each latent, as `detect` returns them; a latent with a negative F1 takes no part.
    candidates: how many latents of highest F1 are tried.

    Raises:
        ValueError: no latent takes part.
    """
    tried = [n for n in np.argsort(-f1, kind="stable")[:candidates] if f1[n] >= 0]
    if not tried:
        raise ValueError("each latent detects a child better than the parent; give pairs with fewer children")
    tried = np.array(tried)
    highest = latents.maxima.max(0)
    fires = latents.columns(tried) > relative[tried] * highest[tried]
    chosen, union, best = [0], fires[:, 0], _f1(fires[:, 0], shows)
    while len(chosen) < MOST_MAIN:
        joint = [_f1(union | fires[:, n], shows) for n in range(len(tried))]
        n = int(np.argmax(joint))
        if joint[n] - best <= LEAST_GAIN:
            break
        chosen, union, best = [*chosen, n], union | fires[:, n], joint[n]
    return _firing(tried[chosen], relative, highest, best)


def _firing(numbers: np.ndarray, relative: np.ndarray, highest: np.ndarray, f1: float) -> Firing:
    parts = relative[numbers]
    return Firing(numbers.tolist(), (parts * highest[numbers]).tolist(), parts.tolist(), float(f1))


def _f1(fires: Bool[np.ndarray, " patches"], shows: Bool[np.ndarray, " patches"]) -> float:
    return 2 * float((fires & shows).sum()) / max(float(fires.sum() + shows.sum()), 1.0)


def parent_direction(
    sae: TopKSAE, latents: ImageLatents, shows: Bool[np.ndarray, " patches"]
) -> Float[np.ndarray, " width"]:
    """Return the difference of the mean reconstructions of patches with and without the parent, of length 1."""
    n_showing = shows.sum()
    with_it = shows.astype(np.float32) @ latents.acts
    without = latents.acts.sum(0) - with_it
    difference = with_it / n_showing - without / max(len(shows) - n_showing, 1)
    direction = difference @ sae.W_dec.detach().float().cpu().numpy()
    return direction / max(float(np.linalg.norm(direction)), 1e-12)


def absorption_cases(
    sae: TopKSAE, cached: ImageLatents, truth: LabelMaps, heldout: ImageLatents, unseen: LabelMaps,
    pairs: Sequence[NestedPair], *, least_cached: int = 10,
) -> tuple[list[AbsorptionCase], dict[tuple[Concept, ...], Firing]]:  # fmt: skip
    """Return every held-out case, and the main latents of each parent.

    Arguments and errors as `absorption`.
    """
    parents, children = patches_of(pairs, truth, cached.images, cached.grid)
    frequent = [rows.reshape(cached.images, -1).any(1).sum() >= least_cached for rows in children]
    pairs_kept = [pair for pair, enough in zip(pairs, frequent, strict=True) if enough]
    if not pairs_kept:
        raise ValueError(f"no pair is on {least_cached} of {cached.images} cached images; give more, or a lower limit")
    kept = [rows for rows, enough in zip(children, frequent, strict=True) if enough]
    parents = {pair.parents: parents[pair.parents] for pair in pairs_kept}
    f1, relative = detect(cached, [*parents.values(), *kept])
    highest, rows_dec = cached.maxima.max(0), sae.W_dec.detach().float().cpu().numpy()
    main, projection = {}, {}
    for column, (name, shows) in enumerate(parents.items()):
        children_of = [n for n, pair in enumerate(pairs_kept, len(parents)) if pair.parents == name]
        general = f1[:, column] >= f1[:, children_of].max(1)
        main[name] = main_latents(cached, shows, np.where(general, f1[:, column], -1.0), relative[:, column])
        projection[name] = rows_dec @ parent_direction(sae, cached, shows)
    _, unseen_children = patches_of(pairs_kept, unseen, heldout.images, heldout.grid)
    cases = []
    for column, (pair, there) in enumerate(zip(pairs_kept, unseen_children, strict=True), len(parents)):
        others = f1[:, column].copy()
        others[main[pair.parents].latents] = -1.0
        child = _firing(np.array([others.argmax()]), relative[:, column], highest, others.max())
        by_image = there.reshape(heldout.images, -1)
        for image in np.flatnonzero(by_image.any(1)):
            acts = heldout.acts[image * heldout.patches + np.flatnonzero(by_image[image])].toarray()
            verdict = _judge(acts, main[pair.parents], child, projection[pair.parents], highest, cached.live)
            cases.append(AbsorptionCase(pair, int(image), *verdict))
    if not cases:
        raise ValueError(f"no pair is on any of {heldout.images} held-out images; give more images")
    return cases, main


def _judge(
    acts: Float[np.ndarray, "patches latents"], main: Firing, child: Firing, projection: Float[np.ndarray, " latents"],
    highest: Float[np.ndarray, " latents"], live: Bool[np.ndarray, " latents"],
) -> tuple[bool, bool, float, float]:  # fmt: skip
    """Return missed, absorbed, fraction and by_chance of an `AbsorptionCase`.

    acts: on the patches that show child and parent.
    projection: of each decoder row on the parent's direction.
    highest: maximum of each latent on the cached images.
    live: which latents are active there.
    """
    missed = not (acts[:, main.latents] > main.thresholds).any()
    (latent,) = child.latents
    fires = acts.max(0) > child.relative[0] * highest
    absorbs = fires & (projection > 0)
    held = np.maximum(acts * projection, 0).sum(0)
    of_child, of_main = float(held[latent]), float(held[main.latents].sum())
    others = live.copy()
    others[[latent, *main.latents]] = False
    by_chance = float(absorbs[others].mean()) if others.any() else 0.0
    fraction = of_child / (of_child + of_main) if of_child > 0 else 0.0
    return missed, bool(missed and absorbs[latent]), fraction, by_chance if missed else 0.0


def absorption(
    sae: TopKSAE, cached: ImageLatents, truth: LabelMaps, heldout: ImageLatents, unseen: LabelMaps,
    pairs: Sequence[NestedPair], *, least_cached: int = 10,
) -> Metrics:  # fmt: skip
    """Return how often the latent of a child absorbs its parent, in all and for each group of pairs.

    absorption: rate of the cases that are absorbed, with Wilson's 99% interval.
    absorption_missed: rate of the cases in which no main latent of the parent fires.
    absorption_fraction: mean over cases of the part that the child's latent holds.
    absorption_random: mean over cases of the rate with another live latent in place of the child's.
    *_GROUP: the same over the pairs of a group.
    absorption_main_latents: mean over parents of the number of main latents.
    absorption_parent_f1: mean over parents of their joint F1 on held-out patches; without a detector one is missed.
    absorption_cases: how many there are.

    sae: whose decoder rows are projected.
    cached: activations on the cached images; latents are chosen on these.
    truth: label maps of the cached images.
    heldout: activations on held-out images, which are the cases.
    unseen: label maps of the held-out images.
    pairs: such as `pictureworld.world.concepts.NESTED`, each row as a `NestedPair`.
    least_cached: cached images that must show a pair.

    Raises:
        ValueError: a pair has a concept that the label maps do not have, or no pair is on enough images.
    """
    cases, main = absorption_cases(sae, cached, truth, heldout, unseen, pairs, least_cached=least_cached)
    parents, _ = patches_of(pairs, unseen, heldout.images, heldout.grid)
    joint = [
        _f1((heldout.columns(each.latents) > each.thresholds).any(1), parents[name]) for name, each in main.items()
    ]
    metrics: Metrics = {"absorption_cases": len(cases)}
    groups = {"": cases}
    for case in cases:
        groups.setdefault(f"_{case.pair.group}", []).append(case)
    for end, group in groups.items():
        metrics |= bounds(f"absorption{end}", proportion([case.absorbed for case in group]))
        metrics |= bounds(f"absorption_missed{end}", proportion([case.missed for case in group]))
        metrics |= mean_metrics(f"absorption_fraction{end}", [case.fraction for case in group])
        metrics |= mean_metrics(f"absorption_random{end}", [case.by_chance for case in group])
    metrics |= mean_metrics("absorption_main_latents", [len(each.latents) for each in main.values()])
    return metrics | mean_metrics("absorption_parent_f1", joint)
