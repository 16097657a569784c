"""What excites a latent, as the explainer is shown it: strips of masked images, drawn from the truth or real.

A strip holds the images of one latent and what is visible of each. From real latents it is read from their cache; a
drawn one imitates them: a concept half covered, bleeding over its border, with patches missing and others astray; or,
to be refused, a place, an edge, a detail, two concepts or many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.interpret.exemplars import most_activated
from lmm_sae_nb.interpret.explain import training_of
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.pictureworld.explainer.model import SET
from lmm_sae_nb.pictureworld.world.rendered import CONCEPTS, GRID, Gallery
from lmm_sae_nb.pictureworld.world.scenes import PATCH, SIDE
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.files import write_json
from lmm_sae_nb.truth.common_concept import PATCH_SHOWS, CommonConcept, best_common_concept

PATCHES = GRID**2
# How often a drawn strip is of each kind of concept, and how often of none.
ODDS = {
    "object": 0.25, "word": 0.16, "part": 0.12, "texture": 0.07, "material": 0.09, "colour": 0.09, "scene": 0.08,
    "face": 0.05,
}  # fmt: skip
NOTHING = ("place", "mixed", "pair", "edge", "detail")
NOTHING_ODDS = 0.2
CHOSEN = "chosen.json"  # which latents the strips beside it are of, and of which SAE


class Source(NamedTuple):
    """An SAE whose latents make strips, and the layer of the embedded model that it was trained on."""

    folder: Path
    layer: int


class Strips(NamedTuple):
    """Masked images of latents, the most exciting first."""

    scenes: np.ndarray  # (strips, images) int64: row of the gallery
    visible: np.ndarray  # (strips, images, patches) bool

    def label(self, gallery: Gallery, strip: int | np.ndarray, images: np.ndarray) -> CommonConcept | None:
        """Return the right explanation of some images of a strip (or of one image of each of several strips)."""
        return best_common_concept(self.visible[strip, images], gallery.covered(self.scenes[strip, images]), CONCEPTS)

    def chances(self, gallery: Gallery, often: Mapping[str, float]) -> np.ndarray:
        """Return (strips,) float64, summing to 1: how often to draw each so that no concept is rare, by one over the
        root of how many strips show the same, some kinds more often (`often`), and one in five of no concept.
        """
        first = np.arange(min(SET, self.scenes.shape[1]))
        labels = [self.label(gallery, n, first) for n in range(len(self.scenes))]
        held = Counter(label.concept if label else None for label in labels)
        weight = np.array([(often.get(x.kind, 1.0) if x else 1.0) / held[x and x.concept] ** 0.5 for x in labels])
        empty = np.array([label is None for label in labels])
        if empty.any() and not empty.all():
            weight[empty] *= 0.25 * weight[~empty].sum() / weight[empty].sum()
        return weight / weight.sum()


def masked_pixels(gallery: Gallery, scenes: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Return (images, SIDE, SIDE, 3) uint8: scenes, black but for the visible patches (images, patches)."""
    keep = visible.reshape(-1, GRID, 1, GRID, 1, 1)
    return (gallery.pixels[scenes].reshape(-1, GRID, PATCH, GRID, PATCH, 3) * keep).reshape(-1, SIDE, SIDE, 3)


def masked_images(gallery: Gallery, scenes: np.ndarray, visible: np.ndarray) -> list[Image.Image]:
    """Return the same as PIL images."""
    return [Image.fromarray(pixels) for pixels in masked_pixels(gallery, scenes, visible)]


def cached(cache: LatentCache, latents: Sequence[int], images: int, threshold: float = 0.25) -> Strips:
    """Return the strips of real latents; ValueError for one with fewer than `images` images."""
    if missing := [latent for latent in latents if len(cache.top(latent)) < images]:
        raise ValueError(f"fewer than {images} images excite latents {missing[:5]}; leave them out")
    scenes = [[image for image, _ in cache.top(latent)[:images]] for latent in latents]
    visible = [
        [most_activated(cache.patch_map(latent, rank).numpy(), threshold).ravel() for rank in range(images)]
        for latent in latents
    ]
    return Strips(np.array(scenes), np.array(visible))


def of_latents(
    source: Source, kept: Path, model: Path, gallery: Gallery, images: int, strips: int, without: Collection[int] = ()
) -> Strips:
    """Return the strips of latents of an SAE, at random among those that enough of the scenes excite, but for
    `without`; their cache stays in `kept`, and which they are in its `chosen.json`.
    """
    sae = TopKSAE.load(source.folder)
    cache = cache_activations(SAEInPlace(LMM.load(model), sae, source.layer), gallery.images, n_top=images, folder=kept)
    live = np.setdiff1d(np.flatnonzero((cache.top_images >= 0).all(1).numpy()), list(without))
    chosen = np.random.default_rng(64).permutation(live)[:strips].tolist()
    write_json(kept / CHOSEN, {"trained": training_of(source.folder), "latents": sorted(chosen)})
    return cached(cache, chosen, images)


def drawn(gallery: Gallery, strips: int, images: int, seed: int) -> Strips:
    """Strips that imitate latents, drawn from the scenes' label maps."""
    showing = _showing(gallery)
    rows = [_strip(gallery, showing, images, np.random.default_rng([60, seed, n])) for n in range(strips)]
    scenes, visible = zip(*rows, strict=True)
    return Strips(np.array(scenes), np.array(visible))


def _showing(gallery: Gallery) -> list[np.ndarray]:
    """Return for each concept the scenes of which a patch or more shows it."""
    shows = np.stack([(counts >= PATCH_SHOWS * 256).sum(1) for counts in gallery.counts])  # (scenes, concepts)
    return [np.flatnonzero(column) for column in shows.T]


def _strip(gallery: Gallery, showing: list[np.ndarray], images: int, rng: np.random.Generator):
    if rng.random() < NOTHING_ODDS:
        return _nothing(gallery, showing, images, rng)
    return _of_concept(gallery, showing, _pick(showing, images, rng), images, rng)


def _pick(showing: list[np.ndarray], images: int, rng: np.random.Generator, kinds: Sequence[str] = tuple(ODDS)) -> int:
    """Return a concept that enough scenes show."""
    chances = np.array([ODDS[kind] for kind in kinds])
    while True:
        kind = kinds[rng.choice(len(kinds), p=chances / chances.sum())]
        options = [n for n, (k, _) in enumerate(CONCEPTS) if k == kind and len(showing[n]) >= images]
        if options:
            return options[rng.integers(len(options))]


def _of_concept(gallery: Gallery, showing: list[np.ndarray], concept: int, images: int, rng: np.random.Generator):
    """Return one concept, masked in one way: how much of it, how far over its border, how many patches astray."""
    scenes = rng.choice(showing[concept], images, replace=False)
    partial, least = rng.random() < 0.35, rng.uniform(0.1, 0.6)
    keep, bleed = 1 - rng.choice([0, 0.1, 0.25]), rng.choice([0, 0.1, 0.3])
    stray = rng.choice([0, 0, 0.01, 0.03])
    visible = []
    for scene in scenes:
        share = gallery.counts[scene, concept] / 256
        seen = share >= min(least, share.max())
        if partial:
            seen = _blob(seen, rng.uniform(0.25, 0.9), rng)
        seen = seen & (rng.random(PATCHES) < keep) | (_border(seen) & (rng.random(PATCHES) < bleed))
        seen |= rng.random(PATCHES) < stray
        visible.append(seen if seen.any() else share == share.max())
    return scenes, np.array(visible)


def _nothing(gallery: Gallery, showing: list[np.ndarray], images: int, rng: np.random.Generator):
    """Return a strip that should be refused; whether it must is the rule's to say, as for every other."""
    what = NOTHING[rng.integers(len(NOTHING))]
    if what in ("place", "edge"):
        scenes = rng.choice(len(gallery.pixels), images, replace=False)
        if what == "place":
            top, left = rng.integers(0, GRID - 1, 2)
            here = np.zeros((GRID, GRID), bool)
            here[top : top + rng.integers(1, 4), left : left + rng.integers(1, 4)] = True
            return scenes, np.array([here.ravel() & (rng.random(PATCHES) < 0.9) | _one(here.ravel(), rng)
                                     for _ in scenes])  # fmt: skip
        return scenes, np.array([_edge(gallery, scene, rng) for scene in scenes])
    if what == "detail":
        concept = _pick(showing, images, rng, ("scene", "material", "colour", "object"))
        scenes = rng.choice(showing[concept], images, replace=False)
        return scenes, np.array([_one(gallery.counts[scene, concept] >= 128, rng) for scene in scenes])
    concepts = [_pick(showing, images, rng) for _ in range(2 if what == "pair" else images)]
    parts = [_of_concept(gallery, showing, concepts[n % len(concepts)], 1, rng) for n in range(images)]
    return np.concatenate([scenes for scenes, _ in parts]), np.concatenate([visible for _, visible in parts])


def _one(seen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return one of the patches alone; any patch if there is none."""
    chosen = np.zeros(PATCHES, bool)
    chosen[rng.choice(np.flatnonzero(seen) if seen.any() else PATCHES)] = True
    return chosen


def _blob(seen: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Return the patches nearest to one of them, about this share of all."""
    at = np.flatnonzero(seen)
    centre = rng.choice(at)
    distance = np.hypot(at // GRID - centre // GRID, at % GRID - centre % GRID) + rng.uniform(0, 0.5, len(at))
    chosen = np.zeros(PATCHES, bool)
    chosen[at[np.argsort(distance)[: max(1, round(share * len(at)))]]] = True
    return chosen


def _border(seen: np.ndarray) -> np.ndarray:
    """Return the patches beside those that are seen."""
    grid = np.pad(seen.reshape(GRID, GRID), 1)
    beside = grid[:-2, 1:-1] | grid[2:, 1:-1] | grid[1:-1, :-2] | grid[1:-1, 2:]
    return (beside & ~grid[1:-1, 1:-1]).ravel()


def _edge(gallery: Gallery, scene: int, rng: np.random.Generator) -> np.ndarray:
    """Return a few patches along the outline of something that lies in the scene, or a patch anywhere."""
    objects = [n for n, (kind, _) in enumerate(CONCEPTS) if kind in ("object", "face")]
    line = _border((gallery.counts[scene, objects] >= 64).any(0))
    return line & (rng.random(PATCHES) < 0.25) | _one(line, rng)
