"""Rank images for every latent, exactly, whatever the order in which they come; count how often it is active."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float16, Float32, Int64

from lmm_sae_nb.sae.topk import Latents

ENTRIES = 2**21  # of one update; each needs about 150 bytes while it lasts
FRACTION = 2.0**40  # a sum is kept as whole numbers and as counts of 2^-40, so that no order of adding matters
LAST = np.iinfo(np.int64).max


class Firings(NamedTuple):
    """One entry for each (latent, image, patch) where the latent is active, sorted in that order."""

    latents: Int64[np.ndarray, " entries"]
    images: Int64[np.ndarray, " entries"]
    patches: Int64[np.ndarray, " entries"]
    acts: Float32[np.ndarray, " entries"]  # > 0


def firings(latents: Latents, images: Sequence[int]) -> Iterator[tuple[Sequence[int], Firings]]:
    """Yield the entries above 0 of a batch, with the numbers of their images.

    At most ENTRIES at a time, or those of one image.

    latents: (images, patches, k).
    images: their numbers, ascending.
    """
    numbers, (_, patches, k) = np.asarray(images, np.int64), latents.acts.shape
    step = max(1, ENTRIES // (patches * k))
    for start in range(0, len(numbers), step):
        acts = latents.acts[start : start + step].float().cpu().numpy().ravel()
        index = latents.indices[start : start + step].cpu().numpy().ravel()
        bits = int(acts.size).bit_length()
        places = np.flatnonzero(acts > 0)
        packed = np.sort(index[places].astype(np.int64) << bits | places)  # the place breaks ties, and is carried along
        places = packed & (1 << bits) - 1
        image, token = np.divmod(places, patches * k)
        yield images[start : start + step], Firings(packed >> bits, numbers[start + image], token // k, acts[places])


@dataclass
class Ranking:
    """The running top n images of each latent, and the sums that its statistics need.

    The n places of a latent are in no order; `ordered` sorts them. Means are compared in float32; of equal means the
    lower image number comes first, whichever image was seen first.
    Memory: n_latents * n_top * (2 * patches + 12) bytes, and about 150 bytes for each entry of an update.
    """

    means: Float32[np.ndarray, "latents n_top"]
    images: Int64[np.ndarray, "latents n_top"]  # -1 where a place is free, its mean 0
    patches: Float16[np.ndarray, "latents n_top patches"]
    fired: Int64[np.ndarray, " latents"]  # number of tokens on which it is active
    whole: Int64[np.ndarray, " latents"]  # the sum of its activations is whole + fraction / FRACTION
    fraction: Int64[np.ndarray, " latents"]
    highest: Float32[np.ndarray, " latents"]

    @classmethod
    def empty(cls, n_latents: int, n_top: int, patches: int) -> Ranking:
        """Return a ranking that has seen no image."""
        means, numbers = np.zeros((n_latents, n_top), np.float32), np.full((n_latents, n_top), -1)
        counts = (np.zeros(n_latents, np.int64) for _ in range(3))
        rows = np.zeros((n_latents, n_top, patches), np.float16)
        return cls(means, numbers, rows, *counts, np.zeros(n_latents, np.float32))

    def update(self, new: Firings) -> None:
        """Add entries; all entries of an image for a latent must come together, and only once.

        Raises:
            ValueError: an activation is too large for float16.
        """
        if not len(new.acts):
            return
        if new.acts.max() > np.finfo(np.float16).max:
            raise ValueError(f"an activation of {new.acts.max():.3g} exceeds float16's range; scale the SAE's input")
        starts = _starts(new.latents, new.images)
        sums = np.add.reduceat(new.acts.astype(np.float64), starts)
        self._count(new, starts, sums)
        latents, images = new.latents[starts], new.images[starts]
        means = (sums / self.patches.shape[2]).astype(np.float32)
        worst_mean, worst_image = (worst[latents] for worst in self._worst())
        enters = (means > worst_mean) | ((means == worst_mean) & (images < worst_image))
        if enters.any():
            stops = np.append(starts[1:], len(new.acts))
            chosen = np.flatnonzero(enters)
            places, taken = self._admit(latents[chosen], images[chosen], means[chosen])
            self._write(new, places, starts[chosen[taken]], stops[chosen[taken]])

    def _count(self, new: Firings, starts: np.ndarray, sums: np.ndarray) -> None:
        first = _starts(new.latents)
        latents = new.latents[first]
        self.fired[latents] += np.diff(first, append=len(new.acts))
        self.highest[latents] = np.maximum(self.highest[latents], np.maximum.reduceat(new.acts, first))
        groups = np.searchsorted(starts, first)
        whole = np.floor(sums)
        self.whole[latents] += np.add.reduceat(whole.astype(np.int64), groups)
        self.fraction[latents] += np.add.reduceat(np.rint((sums - whole) * FRACTION).astype(np.int64), groups)

    def _worst(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and the image of each latent's last place."""
        mean = self.means.min(1)
        number = np.where(self.images < 0, LAST, self.images)
        return mean, np.where(self.means == mean[:, None], number, -1).max(1)

    def _admit(self, latents: np.ndarray, images: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give places to the candidates (sorted by latent) that belong to the top n.

        Returns:
            The places, and the candidates that got them.
        """
        n_top, first = self.means.shape[1], _starts(latents)
        ids, counts = latents[first], np.diff(first, append=len(latents))
        row = np.repeat(np.arange(len(ids)), counts)
        column = n_top + np.arange(len(latents)) - np.repeat(first, counts)
        all_means = np.zeros((len(ids), n_top + counts.max()), np.float32)
        all_images, number = np.full(all_means.shape, -1), np.full(all_means.shape, -1)
        all_means[:, :n_top], all_images[:, :n_top] = self.means[ids], self.images[ids]
        all_means[row, column], all_images[row, column] = means, images
        number[row, column] = np.arange(len(latents))
        best = _order(all_means, all_images)[:, :n_top]
        stays = np.zeros(all_means.shape, bool)
        np.put_along_axis(stays, best, True, 1)
        taken = number[:, n_top:][stays[:, n_top:]]
        free_row, free_place = np.nonzero(~stays[:, :n_top])  # as many as are taken, in the same order of latents
        self.means[ids[free_row], free_place] = means[taken]
        self.images[ids[free_row], free_place] = images[taken]
        return ids[free_row] * n_top + free_place, taken

    def _write(self, new: Firings, places: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> None:
        """Write entries starts to stops into the patch rows of `places`."""
        rows, lengths = self.patches.reshape(-1, self.patches.shape[2]), stops - starts
        rows[places] = 0
        entries = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        rows[np.repeat(places, lengths), new.patches[entries]] = new.acts[entries]

    def ordered(self) -> dict[str, np.ndarray]:
        """Return top_images, top_means and patches, the best first; and fired, mean (where active) and max."""
        order = _order(self.means, self.images)
        total = self.whole + self.fraction / FRACTION
        return {
            "top_images": np.take_along_axis(self.images, order, 1),
            "top_means": np.take_along_axis(self.means, order, 1),
            "patches": np.take_along_axis(self.patches, order[..., None], 1),
            "fired": self.fired,
            "mean": (total / np.maximum(self.fired, 1)).astype(np.float32),
            "max": self.highest,
        }


def merged(parts: Sequence[Ranking]) -> Ranking:
    """Return the ranking of the images of all parts together; no image may be in two parts."""
    if len(parts) == 1:
        return parts[0]
    means, images, patches = (
        np.concatenate([getattr(part, name) for part in parts], 1) for name in ("means", "images", "patches")
    )
    best = _order(means, images)[:, : parts[0].means.shape[1]]
    return Ranking(
        np.take_along_axis(means, best, 1),
        np.take_along_axis(images, best, 1),
        np.take_along_axis(patches, best[..., None], 1),
        *(sum(getattr(part, name) for part in parts) for name in ("fired", "whole", "fraction")),
        np.max([part.highest for part in parts], 0),
    )


def _starts(*keys: np.ndarray) -> np.ndarray:
    """Return where a new group of equal keys begins, in sorted keys."""
    differs = np.zeros(max(len(keys[0]) - 1, 0), bool)
    for key in keys:
        differs |= key[1:] != key[:-1]
    return np.flatnonzero(np.append(len(keys[0]) > 0, differs))


def _order(means: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return the order of each row: the higher mean first, then the lower number, then free places."""
    return np.lexsort((np.where(images < 0, LAST, images), -means), axis=-1)
