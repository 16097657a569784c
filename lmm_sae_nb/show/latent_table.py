"""A table of latents with everything that is known of them, to search, sort and look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from PIL import Image

from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.cache.top_images import Firings
from lmm_sae_nb.interpret.explain import ExplanationRows
from lmm_sae_nb.show.markup import escaped
from lmm_sae_nb.show.thumbnails import heated, sheet, webp
from lmm_sae_nb.support.files import project_root
from lmm_sae_nb.support.images import open_images, rgb
from lmm_sae_nb.support.stages import Stage, read_manifest, read_typed, require

CACHE_COLUMNS = ("frequency", "mean", "max")  # of every latent
BLOCK = 64  # latents that are read from the store at once, because one latent costs a pass over all images


class Histogram(NamedTuple):
    """How often a latent is active with which strength; `label` says what was counted."""

    counts: Integer[np.ndarray, " bins"]
    edges: Float[np.ndarray, " ends"]
    label: str


class LatentTable:
    """Explained latents in rows, with the columns of all tables about them and of the cache.

    cache: gives the activations.
    pictures: the cached images.
    tables: latent (a number or its text) to row, as in explanations.json and scores.json. Where two tables have the
        same column, the later one counts. A nested row becomes columns `outer.inner`, a list becomes a text.

    `rows` maps a latent to its row; `columns` names the columns with a number in some row.

    Raises:
        ValueError: a table has a latent that the cache does not have.
    """

    def __init__(self, cache: LatentCache, pictures: Sequence[Image.Image], *tables: Mapping[str | int, Mapping]):
        self.cache, self.pictures, self.rows = cache, pictures, {}
        from_cache = {name: np.asarray(getattr(cache, name)) for name in CACHE_COLUMNS}
        for latent in sorted({int(latent) for table in tables for latent in table}):
            if not 0 <= latent < cache.n_latents:
                raise ValueError(
                    f"a table has latent {latent}, but the cache has only {cache.n_latents} latents; "
                    "run the notebooks that make the cache and the table again"
                )
            parts = [table.get(str(latent), table.get(latent, {})) for table in tables]
            row = dict(pair for part in parts for pair in _flat(part))
            self.rows[latent] = row | {name: float(values[latent]) for name, values in from_cache.items()}
        names = dict.fromkeys(name for row in self.rows.values() for name in row)
        self.columns = [name for name in names if self._has_numbers(name)]
        self._words = {latent: _searchable(row) for latent, row in self.rows.items()}
        self.strip = lru_cache(maxsize=1024)(self._strip)
        self._small = lru_cache(maxsize=4096)(self._thumbnail)  # several latents have the same top images
        self._block = lru_cache(maxsize=1)(self._read)

    @classmethod
    def load(cls, run: str) -> LatentTable:
        """Open the explained latents of a run, with what the stages cache, score and judge say about them.

        The last two may be missing. A score or verdict on an earlier explanation is left out.

        Raises:
            FileNotFoundError: nothing was explained or cached; the message names the notebook to run.
            ValueError: the pictures have changed since they were cached.
        """
        explanations = read_typed(require(run, "interpret", "explanations.json"), ExplanationRows)
        manifest = read_manifest(require(run, "cache", "manifest.json"))
        tables = [explanations]
        for stage, file in {"cache": "words.json", "score": "scores.json", "judge": "verdicts.json"}.items():
            path = Stage(run, stage).path(file)
            rows = read_typed(path, dict[int, dict[str, Any]]) if path.is_file() else {}
            tables.append({n: row for n, row in rows.items() if n in explanations and _is_of(row, explanations[n])})
        pictures = open_images(project_root() / manifest["params"]["images"])
        cache = LatentCache.load(Stage(run, "cache").folder)
        cache.require_pictures(pictures)
        return cls(cache, pictures, *tables)

    def _has_numbers(self, column: str) -> bool:
        return any(isinstance(row.get(column), (int, float)) for row in self.rows.values())

    def name(self, latent: int) -> str:
        """Return the latent's concept, or else the outcome of asking for one, or else "not explained"."""
        row = self.rows.get(latent, {})
        return row.get("concept") or row.get("outcome") or "not explained"

    def details(self, latent: int) -> str:
        """Return the latent's row as an HTML table, with numbers to four digits and every text escaped."""
        body = "".join(
            f"<tr><th>{escaped(name.replace('_', ' '))}</th><td>{escaped(_text(value))}</td></tr>"
            for name, value in self.rows[latent].items()
        )
        return f"<table>{body}</table>"

    def kinds(self) -> list[str]:
        """Return the kinds of concept in the table, sorted."""
        return sorted({row["kind"] for row in self.rows.values() if row.get("kind")})

    def find(self, text: str = "", *, sort: str | None = None, descending: bool = True, kind: str = "") -> list[int]:
        """Return the latents that fit a search, sorted by a column.

        Latents without a value in the column come last; latents with equal values are sorted by number.

        text: a number finds the latent of that number. Words must all occur in the texts of a row, in any case.
        sort: one of `columns`; without it the order is by number.
        kind: only latents whose concept is of this kind.

        Raises:
            ValueError: no row has a number in that column.
        """
        if sort is not None and sort not in self.columns:
            raise ValueError(f"there is no column {sort!r} to sort by; choose one of {', '.join(self.columns)}")
        if text.strip().isdigit():
            return [latent for latent in self.rows if latent == int(text)]
        words = text.casefold().split()
        latents = [n for n in self.rows if all(word in self._words[n] for word in words)]
        latents = [n for n in latents if not kind or self.rows[n].get("kind") == kind]
        if sort is None:
            return latents
        known = [n for n in latents if isinstance(self.rows[n].get(sort), (int, float))]
        unknown = [n for n in latents if n not in set(known)]
        return sorted(known, key=lambda n: self.rows[n][sort] * (-1 if descending else 1)) + unknown

    def views(self, latent: int, side: int) -> list[list[Image.Image]]:
        """Return the latent's top images and, if the model has a patch grid, a second row with its activation on them.

        side: pixels; each picture fits into a square of this side.
        """
        images = [self._small(image, side).copy() for image, _ in self.cache.top(latent)]
        if self.cache.grid is None:
            return [images]
        maps = [np.asarray(self.cache.patch_map(latent, rank)) for rank in range(len(images))]
        return [images, [heated(image, activation) for image, activation in zip(images, maps, strict=True)]]

    def _thumbnail(self, number: int, side: int) -> Image.Image:
        image = rgb(self.pictures[number]).copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        return image

    def _strip(self, latent: int, side: int = 56, quality: int = 60) -> bytes:
        """Return `views` as one WebP image; empty for a latent that is never active."""
        views = self.views(latent, side)
        return webp(sheet(views, side), quality) if views[0] else b""

    def histogram(self, latent: int, bins: int = 24) -> Histogram:
        """Count the latent's activations above 0 by strength.

        They are those on all images, if the cache has a store, or else those on its top images.
        """
        acts, place = self._activations(latent)
        acts = acts[acts > 0]
        counts, edges = np.histogram(acts, bins=bins, range=(0, float(acts.max(initial=0)) or 1.0))
        return Histogram(counts, edges, f"{len(acts):,} activations {place}")

    def _activations(self, latent: int) -> tuple[Float[np.ndarray, " entries"], str]:
        """Return the activations that the cache has of a latent, and on which images they were measured."""
        try:
            block = self._block(latent - latent % BLOCK)
        except FileNotFoundError:  # the cache was made without a store
            ranks = range(len(self.cache.top(latent))) if self.cache.grid else ()
            maps = [np.asarray(self.cache.patch_map(latent, rank)).ravel() for rank in ranks]
            return np.concatenate([np.empty(0, np.float32), *maps]), f"on its {len(ranks)} top images"
        first, end = np.searchsorted(block.latents, (latent, latent + 1))
        return block.acts[first:end], f"on {self.cache.images:,} images"

    def _read(self, first: int) -> Firings:
        """Read from the store latent `first` and those after it."""
        return self.cache.store.latents(first, min(first + BLOCK, self.cache.n_latents))


def _is_of(row: Mapping, explanation: Mapping) -> bool:
    """Whether a row belongs to this explanation and not to an earlier one."""
    return "concept" not in row or row["concept"] == explanation["concept"]


def _searchable(row: Mapping) -> str:
    return " ".join(value for value in row.values() if isinstance(value, str)).casefold()


def _text(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def _flat(row: Mapping, prefix: str = "") -> Iterator[tuple[str, float | str]]:
    """Give the plain values of a row by column; None is left out, true and false become words."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            yield prefix + name, "yes" if value else "no"
        elif isinstance(value, (list, tuple)):
            yield prefix + name, ", ".join(map(str, value))
        elif value is not None:
            yield prefix + name, value
