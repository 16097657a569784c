"""Selectivity: does a latent change with its own concept, and with nothing else?

Measured on pairs of images that differ in one thing. All other pixels are equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from lmm_sae_nb.cache.encode_images import activation_maps, base_states
from lmm_sae_nb.interpret.explainers import Outcome
from lmm_sae_nb.model.token_kinds import NoPatchGrid
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.support.images import rgb
from lmm_sae_nb.support.intervals import bounds, mean_interval
from lmm_sae_nb.support.stages import Metrics
from lmm_sae_nb.truth.accuracy import other_names

Grid = tuple[int, int]
States = Float[Tensor, "images patches width"]


@dataclass(frozen=True)
class Pair:
    """Two images of one scene that differ in one thing.

    kind: the kind of the thing, such as "colour".
    taken_out: the concepts that only `before` shows at this place.
    put_in: the concepts that only `after` shows at this place.
    touched: other concepts that cover more or fewer pixels in `after`, such as the colours of a thing that is put in.

    Raises:
        ValueError: the images are equal or have different sizes, or no concept is taken out or put in.
    """

    before: Image.Image
    after: Image.Image
    kind: str
    taken_out: tuple[str, ...]
    put_in: tuple[str, ...]
    touched: frozenset[str] = frozenset()

    def __post_init__(self):
        named = f"the pair that takes out {list(self.taken_out)} and puts in {list(self.put_in)} ({self.kind})"
        if self.before.size != self.after.size:
            raise ValueError(f"{named} has images of {self.before.size} and {self.after.size}; give them one size")
        if not self.changed.any():
            raise ValueError(f"{named} changes no pixel; give two images that differ, or leave the pair out")
        if set(self.taken_out) == set(self.put_in):
            raise ValueError(f"{named} changes no concept; name the concept that only one of the images shows")

    @cached_property
    def changed(self) -> Bool[np.ndarray, "height width"]:
        """The pixels that differ."""
        before, after = (np.asarray(rgb(image)) for image in (self.before, self.after))
        return (before != after).any(-1)

    def patches(self, grid: Grid) -> Bool[np.ndarray, " patches"]:
        """Return the patches with a pixel that differs; all other patches of the two images are equal.

        grid: rows and columns of patches.
        """
        y, x = np.nonzero(self.changed)
        height, width = self.changed.shape
        hit = np.zeros(grid, bool)
        hit[y * grid[0] // height, x * grid[1] // width] = True
        return hit.ravel()

    def direction(self, concept: str) -> int:
        """Return 1 if the concept is put in, -1 if it is taken out, and 0 if neither or both."""
        return (concept in self.put_in) - (concept in self.taken_out)

    def concerns(self, concept: str) -> bool:
        """Return whether the pair changes where the concept is."""
        return concept in self.taken_out or concept in self.put_in or concept in self.touched


@dataclass(frozen=True)
class Changes:
    """How latents change from the first to the second image of each pair.

    latents: the columns of the other fields.
    net: (pairs, latents): sum over patches of the activation after minus the activation before.
    total: (pairs, latents): sum over patches of the absolute difference.
    on_patches: (pairs, latents): the part of `total` on the patches with changed pixels.
    patches: (pairs,): the fraction of the patches with changed pixels.
    """

    latents: list[int]
    net: Float[np.ndarray, "pairs latents"]
    total: Float[np.ndarray, "pairs latents"]
    on_patches: Float[np.ndarray, "pairs latents"]
    patches: Float[np.ndarray, " pairs"]


def images_of(pairs: Sequence[Pair]) -> list[Image.Image]:
    """Return the images of pairs in the order that `measure_changes` wants: before, after, before, after."""
    return [image for pair in pairs for image in (pair.before, pair.after)]


@torch.no_grad()
def measure_changes(
    place: SAEInPlace, pairs: Sequence[Pair], latents: Iterable[int], states: States | None = None, *,
    pairs_at_once: int = 8,
) -> Changes:  # fmt: skip
    """Encode the base patches of both images of each pair, and return how the latents change.

    states: `base_states` of `images_of(pairs)`, if they are known, as for several SAEs of one layer.
    pairs_at_once: pairs whose latents are in memory at the same time.

    Raises:
        NoPatchGrid: the model has no grid of patches.
        ValueError: there are no pairs or no latents, or the states are of other images.
    """
    latents, lmm = sorted(latents), place.lmm
    if lmm.grid is None:
        raise NoPatchGrid(f"{lmm.name} has no patch grid, so no change has a place; choose a model with patches")
    if not pairs or not latents:
        raise ValueError(f"{len(pairs)} pairs and {len(latents)} latents; give at least one of each")
    if states is None:
        states = base_states(lmm, place.layer, images_of(pairs))
    if len(states) != 2 * len(pairs):
        raise ValueError(f"states of {len(states)} images for {len(pairs)} pairs; give those of images_of(pairs)")
    column = torch.full((place.sae.n_latents,), len(latents))  # the last column takes all other latents
    column[torch.tensor(latents)] = torch.arange(len(latents))
    masks = np.array([pair.patches(lmm.grid) for pair in pairs])
    parts = []
    for start in range(0, len(pairs), pairs_at_once):
        acts, indices = place.sae.encode(states[2 * start : 2 * (start + pairs_at_once)].to(place.device))
        dense = torch.zeros(*acts.shape[:2], len(latents) + 1)
        dense = dense.scatter_(2, column[indices.cpu()], acts.float().cpu())[..., :-1].numpy()
        change = dense[1::2] - dense[0::2]  # (pairs, patches, latents)
        size = np.abs(change)
        on_patches = size * masks[start : start + pairs_at_once, :, None]
        parts.append((change.sum(1), size.sum(1), on_patches.sum(1)))
    net, total, on_patches = (np.concatenate(part).astype(float) for part in zip(*parts, strict=True))
    return Changes(latents, net, total, on_patches, masks.mean(1))


@dataclass(frozen=True)
class Selective:
    """How selective one latent is for one concept.

    own_pairs: how many pairs put the concept in or take it out.
    own: mean change on these pairs, counted as positive where it goes with the concept.
    other: mean absolute change on the pairs that do not concern the concept.
    on_patches: fraction of the change on own pairs that is on patches with changed pixels; None without a change.
    patches: mean fraction of such patches in own pairs: what an even change would give.
    """

    latent: int
    concept: str
    kind: str | None
    own_pairs: int
    own: float
    other: float
    on_patches: float | None
    patches: float

    @property
    def score(self) -> float | None:
        """max(0, own) / (max(0, own) + other), in [0, 1]; None if the latent changes on no pair.

        1: it changes with its concept alone. 0.5: other changes move it as much. 0: its concept does not move it.
        """
        if self.on_patches is None and self.other == 0:
            return None
        return self.own / (self.own + self.other) if self.own > 0 else 0.0


def selectivity(
    changes: Changes, pairs: Sequence[Pair], names: Mapping[int, tuple[str, str | None]]
) -> list[Selective]:
    r"""Return the selectivity of each latent for a concept.

    With the activation of an image $a(x) = \sum_p z_p(x)$ (a sum over base patches), the change of pair $i$ is
    $c_i = a(\text{after}_i) - a(\text{before}_i)$. Own pairs put the concept in ($s_i = 1$) or take it out
    ($s_i = -1$). Then $o$ is the mean of $s_i c_i$ over own pairs, $r$ the mean of $|c_i|$ over the pairs that do not
    concern the concept, and the score is $S = \max(0, o) / (\max(0, o) + r)$.

    A latent is left out if no pair puts its concept in or takes it out, or if every pair concerns it.

    changes: of `measure_changes`, on these pairs.
    names: latent to concept and its kind.
    """
    column, result = {latent: n for n, latent in enumerate(changes.latents)}, []
    signs: dict[str, np.ndarray] = {}
    apart: dict[str, np.ndarray] = {}
    for latent, (concept, kind) in names.items():
        if concept not in signs:
            signs[concept] = np.array([pair.direction(concept) for pair in pairs])
            apart[concept] = np.array([not pair.concerns(concept) for pair in pairs])
        sign, others, n = signs[concept], apart[concept], column[latent]
        own = sign != 0
        if not own.any() or not others.any():
            continue
        total = changes.total[own, n].sum()
        result.append(
            Selective(
                latent, concept, kind, int(own.sum()), float((sign * changes.net[:, n])[own].mean()),
                float(np.abs(changes.net[others, n]).mean()),
                float(changes.on_patches[own, n].sum() / total) if total else None, float(changes.patches[own].mean()),
            )
        )  # fmt: skip
    return result


def selectivity_metrics(scores: Sequence[Selective], control: Sequence[Selective], seed: int = 0) -> Metrics:
    """Return mean scores with intervals over latents, for all kinds together and, as `<name>_<kind>`, by kind.

    selectivity: mean score.
    selectivity_other_name: mean score for the names of other latents.
    selectivity_on_patches: mean fraction of the change that is on patches with changed pixels.
    selectivity_even: mean fraction of such patches.
    selectivity_latents: latents with a score.
    selectivity_silent: latents with own pairs that change on no pair; they have no score.

    scores: of `selectivity`.
    control: the same with other names.
    seed: of the intervals.

    Raises:
        ValueError: fewer than two latents have a score.
    """
    if sum(row.score is not None for row in scores) < 2:
        raise ValueError(
            f"of {len(scores)} named latents with pairs, fewer than two change; give more latents, or pairs that put "
            "in or take out the concepts that they are named for"
        )
    metrics: Metrics = {
        "selectivity_latents": sum(row.score is not None for row in scores),
        "selectivity_silent": sum(row.score is None for row in scores),
    }
    for kind in (None, *sorted({row.kind for row in scores if row.kind})):
        of_kind, others = ([row for row in rows if kind in (None, row.kind)] for rows in (scores, control))
        values = {
            "selectivity": [row.score for row in of_kind],
            "selectivity_other_name": [row.score for row in others],
            "selectivity_on_patches": [row.on_patches for row in of_kind],
            "selectivity_even": [row.patches for row in of_kind if row.on_patches is not None],
        }
        for name, found in values.items():
            known = [value for value in found if value is not None]
            if len(known) > 1:
                metrics |= bounds(f"{name}_{kind}" if kind else name, mean_interval(known, seed=seed))
    return metrics


def named_latents(explanations: Mapping[int, Mapping]) -> dict[int, tuple[str, str | None]]:
    """Return concept and kind of the explained latents.

    explanations: rows of explanations.json.
    """
    return {
        latent: (row["concept"], row["kind"])
        for latent, row in explanations.items()
        if row["outcome"] == Outcome.EXPLAINED.value
    }


def measure_selectivity(
    place: SAEInPlace, pairs: Sequence[Pair], explanations: Mapping[int, Mapping], *, states: States | None = None,
    seed: int = 0,
) -> Metrics:  # fmt: skip
    """Measure how selective the named latents of an SAE are for their names, and for the names of other latents.

    pairs: images that differ in one thing, of scenes that had no part in naming.
    explanations: rows of explanations.json, by latent.
    states: as for `measure_changes`.
    seed: of the other names and of the intervals.

    Raises:
        ValueError: no latent is named, or as `measure_changes` and `selectivity_metrics`.
    """
    names = named_latents(explanations)
    if not names:
        raise ValueError(f"of {len(explanations)} latents none is explained; explain latents first, or ask more")
    changes = measure_changes(place, pairs, names, states)
    others = {n: (other, names[n][1]) for n, other in other_names(names, seed).items() if other is not None}
    scores, control = selectivity(changes, pairs, names), selectivity(changes, pairs, others)
    without = len(names) - len(scores)
    return selectivity_metrics(scores, control, seed) | {"selectivity_without_pairs": without}


def change_map(place: SAEInPlace, pair: Pair, latent: int) -> Float[np.ndarray, "rows cols"]:
    """Return where a latent's activation changes: after minus before, on the base patches."""
    before, after = activation_maps(place, [pair.before, pair.after], [latent])[:, 0]
    return after - before
