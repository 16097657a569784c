"""Latents with all that is known of them, to be searched, sorted and looked at: what the feature browsers show."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from PIL import Image

from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.cache.top_images import Firings
from lmm_sae_nb.show.thumbnails import encoded, heated, sheet
from lmm_sae_nb.support.files import project_root, read_json
from lmm_sae_nb.support.images import open_images
from lmm_sae_nb.support.stages import Stage, require

FIRING = ("frequency", "mean", "max")  # columns that the cache gives, for every latent
TOGETHER = 64  # latents that are read from the store at once: all images are gone through, for one as for many


class Histogram(NamedTuple):
    """How often a latent fires how strongly; `of` says what was counted."""

    counts: Integer[np.ndarray, " bins"]
    edges: Float[np.ndarray, " ends"]
    of: str


def _fits(row: Mapping, explanation: Mapping) -> bool:
    """Whether what a row tells is of this explanation, and not of an earlier one."""
    return "concept" not in row or row["concept"] == explanation["concept"]


class LatentTable:
    """Explained latents, each with whatever columns the tables about it have, and how it fires.

    cache, pictures: its activations, and the images that it is of. tables: each latent (as number or text) to its
    row, such as explanations.json and scores.json; of a column that two have, the later holds. Nested rows become
    columns `outer.inner`, lists text. columns: those with a number in some row. ValueError for a latent that the
    cache does not have.
    """

    def __init__(self, cache: LatentCache, pictures: Sequence[Image.Image], *tables: Mapping[str | int, Mapping]):
        self.cache, self.pictures, self.rows = cache, pictures, {}
        firing = {name: np.asarray(getattr(cache, name)) for name in FIRING}
        for latent in sorted({int(latent) for table in tables for latent in table}):
            if not 0 <= latent < cache.n_latents:
                raise ValueError(f"the tables tell of latent {latent}, the cache has {cache.n_latents}; make both anew")
            parts = [table.get(str(latent), table.get(latent, {})) for table in tables]
            row = dict(pair for part in parts for pair in _flat(part))
            self.rows[latent] = row | {name: float(values[latent]) for name, values in firing.items()}
        self.columns = [
            name for name in dict.fromkeys(n for row in self.rows.values() for n in row) if self._counts(name)
        ]
        self._words = {latent: self._searchable(latent) for latent in self.rows}
        self.strip = lru_cache(maxsize=1024)(self._strip)
        self._small = lru_cache(maxsize=4096)(self._thumbnail)  # latents have top images in common
        self._stored = lru_cache(maxsize=1)(self._read)

    @classmethod
    def load(cls, run: str) -> LatentTable:
        """A run's explained latents out of `interpret/`, and what `cache/` and, if there, `score/` and `judge/` tell.

        FileNotFoundError, naming the notebook to run, if one of the others is missing.
        """
        explanations = read_json(require(run, "interpret", "explanations.json"))
        manifest = read_json(require(run, "cache", "manifest.json"))
        files = {"cache": "words.json", "score": "scores.json", "judge": "verdicts.json"}
        others = (Stage(run, stage).path(file) for stage, file in files.items())
        pictures = open_images(project_root() / manifest["params"]["images"])
        tables = [explanations]
        for path in filter(Path.is_file, others):
            rows = read_json(path).items()
            tables.append({n: row for n, row in rows if n in explanations and _fits(row, explanations[n])})
        return cls(LatentCache.load(Stage(run, "cache").folder), pictures, *tables)

    def _counts(self, name: str) -> bool:
        return any(isinstance(row.get(name), (int, float)) for row in self.rows.values())

    def _searchable(self, latent: int) -> str:
        return " ".join(value for value in self.rows[latent].values() if isinstance(value, str)).casefold()

    def name(self, latent: int) -> str:
        """Its concept, else what became of asking for one (`outcome`), else that there is none."""
        row = self.rows.get(latent, {})
        return row.get("concept") or row.get("outcome") or "not explained"

    def table(self, latent: int) -> str:
        """All that is known of a latent as an HTML table, numbers to four digits; everything is escaped."""
        cells = [(n, f"{v:.4g}" if isinstance(v, (int, float)) else str(v)) for n, v in self.rows[latent].items()]
        body = "".join(
            f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{html.escape(value)}</td></tr>"
            for name, value in cells
        )
        return f"<table>{body}</table>"

    def kinds(self) -> list[str]:
        """The kinds of concept that some latent has."""
        return sorted({row["kind"] for row in self.rows.values() if row.get("kind")})

    def find(self, text: str = "", *, sort: str | None = None, descending: bool = True, kind: str = "") -> list[int]:
        """The latents that a text finds, sorted by a column, those without a value last, equals by number.

        A number finds that latent alone; words must all occur in the row's texts (concept, kind, answers ...), in any
        case. ValueError for a column that no row has a number in.
        """
        if sort is not None and sort not in self.columns:
            raise ValueError(f"there is no column {sort!r} to sort by; choose one of {', '.join(self.columns)}")
        if text.strip().isdigit():
            return [latent for latent in self.rows if latent == int(text)]
        words = text.casefold().split()
        found = [n for n in self.rows if all(word in self._words[n] for word in words)]
        found = [n for n in found if not kind or self.rows[n].get("kind") == kind]
        if sort is None:
            return found
        known = [n for n in found if isinstance(self.rows[n].get(sort), (int, float))]
        known.sort(key=lambda n: self.rows[n][sort] * (-1 if descending else 1))  # stable: equals stay by number
        return known + [n for n in found if n not in set(known)]

    def views(self, latent: int, side: int) -> list[list[Image.Image]]:
        """The latent's top images, as they are and, for a model with a patch grid, with its activation over them.

        Each fits into a square of `side` pixels.
        """
        images = [self._small(image, side).copy() for image, _ in self.cache.top(latent)]
        if self.cache.grid is None:
            return [images]
        maps = [np.asarray(self.cache.patch_map(latent, rank)) for rank in range(len(images))]
        return [images, [heated(image, activation) for image, activation in zip(images, maps, strict=True)]]

    def _thumbnail(self, number: int, side: int) -> Image.Image:
        image = self.pictures[number].convert("RGB")
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        return image

    def _strip(self, latent: int, side: int = 56, quality: int = 60) -> bytes:
        """`views` as one WebP, kept for the next time; nothing for a latent that never fired."""
        views = self.views(latent, side)
        return encoded(sheet(views, side), quality) if views[0] else b""

    def histogram(self, latent: int, bins: int = 24) -> Histogram:
        """How strongly it fires where it does: over all images if the cache kept a store, else over its top images."""
        acts, of = self._activations(latent)
        acts = acts[acts > 0]
        counts, edges = np.histogram(acts, bins=bins, range=(0, float(acts.max(initial=0)) or 1.0))
        return Histogram(counts, edges, f"{len(acts):,} activations {of}")

    def _activations(self, latent: int) -> tuple[Float[np.ndarray, " entries"], str]:
        """What the cache has of a latent's activations, and where they were found."""
        try:
            stored = self._stored(latent - latent % TOGETHER)
            first, last = np.searchsorted(stored.latents, (latent, latent + 1))
            return stored.acts[first:last], f"in {self.cache.images:,} images"
        except FileNotFoundError:  # the cache was made without a store
            top = range(len(self.cache.top(latent))) if self.cache.grid else ()
            maps = [np.asarray(self.cache.patch_map(latent, rank)).ravel() for rank in top]
            return np.concatenate([np.empty(0, np.float32), *maps]), f"in its {len(top)} top images"

    def _read(self, first: int) -> Firings:
        """What the store has of latent `first` and those after it."""
        return self.cache.store.latents(first, min(first + TOGETHER, self.cache.n_latents))


def _flat(row: Mapping, above: str = "") -> Iterator[tuple[str, float | str]]:
    """A row's plain values; what is not known (None) is left out, true and false are words."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        elif isinstance(value, bool):
            yield above + name, "yes" if value else "no"
        elif isinstance(value, (list, tuple)):
            yield above + name, ", ".join(map(str, value))
        elif value is not None:
            yield above + name, value
