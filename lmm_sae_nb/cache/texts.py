"""The text side of section 2.2: for every latent the texts and the tokens of text that excite it most, and which
kinds of token it serves; one exact pass over samples as in fine-tuning, with or without an image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from scipy.stats import hypergeom
from torch import Tensor

from lmm_sae_nb.cache.top_images import Firings, Ranking
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.prompts import Prompt
from lmm_sae_nb.model.samples import prompts, token_mask
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import Latents
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.tensor_files import open_tensors, require_finite, save_tensors, shapes_in

TENSORS = "texts.safetensors"
IMAGE = ("base", "tiles")  # the kinds of token that show pixels
BITS = 20  # of a token's number in the vocabulary, and of its place in a text


class Word(NamedTuple):
    """A text token that excites a latent: of which sample, at which place (padding not counted), and how much."""

    sample: int
    place: int
    token: int  # its number in the vocabulary
    act: float


# ---- the pass -------------------------------------------------------------------------------------------------


@torch.no_grad()
def cache_texts(
    place: SAEInPlace,
    samples: Sequence[Mapping],
    *,
    n_top: int = 5,
    batch_samples: int = 16,
    folder: str | Path,
) -> TextCache:
    """For every latent, the `n_top` samples of highest mean activation over their text tokens, and the `n_top` text
    tokens of highest activation; for every kind of token, on how many each latent fires. Written to `folder`.

    samples: rows with image (PIL or None), question, answer. Text is all that the model reads as text: question,
    answer, and the chat template's words. Exact, in one pass; of equal ones the lower sample and place are ahead.
    Memory beside the model and a batch's own tensors: n_latents * (28 * n_top + 120) bytes.
    ValueError for no samples, n_top < 1, hidden states that are not finite, or as `SAEInPlace`.
    """
    lmm, sae, layer = place.lmm, place.sae, place.layer
    if not len(samples) or n_top < 1:
        raise ValueError(f"{len(samples)} samples, n_top {n_top}: there is nothing to rank; give at least one of each")
    texts, words = (Ranking.empty(sae.n_latents, n_top, 1) for _ in range(2))
    fired, seen = torch.zeros(len(SAE_KINDS), sae.n_latents, dtype=torch.long), dict.fromkeys(SAE_KINDS, 0)
    asked, total = prompts(lmm, samples, range(len(samples)), batch_samples), -(-len(samples) // batch_samples)
    for batch, prompt in enumerate(progress_bar(asked, desc="reading", total=total)):
        first, hidden = batch * batch_samples, lmm.hidden_states(prompt, layer)
        for row, kind in enumerate(SAE_KINDS):
            mask = token_mask(prompt, [kind])
            require_finite(hidden[mask], f"hidden states of layer {layer}, samples {first} to {first + len(mask) - 1}")
            latents = Latents(*(part.cpu() for part in sae.encode(hidden[mask])))
            fired[row] += torch.bincount(latents.indices[latents.acts > 0], minlength=sae.n_latents)
            seen[kind] += len(latents.acts)
            if kind == "text":
                _rank(texts, words, latents, prompt, mask, first)
    found = {"fired": fired}
    for name, ranking in {"texts": texts, "words": words}.items():
        top = ranking.ordered()
        found |= {name: torch.from_numpy(top["top_images"]), f"{name}_acts": torch.from_numpy(top["top_means"])}
    told = {"layer": layer, "model": Path(lmm.name).name, "samples": len(samples), "tokens": seen}
    save_tensors(Path(folder) / TENSORS, found, {"texts": json.dumps(told)})
    return TextCache.load(folder)


def _rank(texts: Ranking, words: Ranking, latents: Latents, prompt: Prompt, mask: Tensor, first: int) -> None:
    """Let both rankings see a batch's text tokens, those of `mask`; its samples count from `first`."""
    samples = first + mask.nonzero()[:, 0].cpu().numpy()
    places = ((~prompt.mask("pad")).cumsum(1) - 1)[mask].cpu().numpy()
    ids = prompt.inputs["input_ids"][mask].cpu().numpy()
    if len(ids) and max(ids.max(), places.max()) >= 1 << BITS:
        raise ValueError(
            f"token {ids.max()}, place {places.max()}: both have to be below {1 << BITS}; give shorter texts"
        )
    acts, index = latents.acts.float().numpy(), latents.indices.numpy()
    token, slot = np.nonzero(acts > 0)
    order = np.lexsort((token, index[token, slot]))  # tokens are in order of sample and place
    token, latent, act = token[order], index[token, slot][order], acts[token, slot][order]
    length = np.bincount(samples - first)[samples - first]  # how many text tokens the token's sample has
    patch = np.zeros(len(token), np.int64)  # the rankings are of images and patches; a text, or token, has one
    texts.update(Firings(latent, samples[token], patch, act / length[token].astype(float)))
    words.update(Firings(latent, ((samples << BITS | places) << BITS | ids)[token], patch, act))


class TextCache:
    """What `cache_texts` found.

    samples: how many were read. tokens: how many of each kind. fired: on how many of each kind a latent is active.
    """

    def __init__(self, folder: Path):
        self._file = open_tensors(folder / TENSORS)
        shapes, metadata = shapes_in(self._file), self._file.metadata() or {}
        if not {"fired", "texts", "words"} <= shapes.keys() or "texts" not in metadata:
            raise ValueError(f"{folder / TENSORS} tells of no texts; make it with notebooks/02_cache_activations.py")
        told = json.loads(metadata["texts"])
        self.layer, self.samples, self.tokens = told["layer"], told["samples"], told["tokens"]
        self.n_latents, self.n_top = shapes["texts"]
        self.fired: Int64[np.ndarray, "kinds latents"] = self._file.get_tensor("fired").numpy()

    @classmethod
    def load(cls, folder: str | Path) -> TextCache:
        """FileNotFoundError if it is missing, ValueError if it is cut short or foreign."""
        if not (Path(folder) / TENSORS).is_file():
            raise FileNotFoundError(f"{Path(folder) / TENSORS} is missing; run notebooks/02_cache_activations.py first")
        return cls(Path(folder))

    def top_texts(self, latent: int) -> list[tuple[int, float]]:
        """The samples that excite a latent most, with its mean over their text tokens; fewer if fewer do."""
        return self._top("texts", latent)

    def top_words(self, latent: int) -> list[Word]:
        """The text tokens that excite a latent most, the first first; fewer if fewer do."""
        low = (1 << BITS) - 1
        return [Word(n >> 2 * BITS, n >> BITS & low, n & low, act) for n, act in self._top("words", latent)]

    def _top(self, name: str, latent: int) -> list[tuple[int, float]]:
        if not 0 <= latent < self.n_latents:
            raise ValueError(f"no latent {latent}: there are latents 0 to {self.n_latents - 1}")
        found = (self._file.get_slice(part)[int(latent)].tolist() for part in (name, f"{name}_acts"))
        return [(number, act) for number, act in zip(*found, strict=True) if number >= 0]


# ---- which side a latent serves -------------------------------------------------------------------------------


class Serves(NamedTuple):
    """Which latents fire on image tokens (base, tiles) only, on text tokens only, or on both; `untold`: too seldom to
    tell. Those that never fire are in none."""

    image_only: Bool[np.ndarray, " latents"]
    text_only: Bool[np.ndarray, " latents"]
    both: Bool[np.ndarray, " latents"]
    untold: Bool[np.ndarray, " latents"]


def serves(cache: TextCache, least: float = 0.1, by_chance: float = 0.01) -> Serves:
    """A latent serves a side if it fires there at least `least` times as often, a token, as on the other side.

    That it serves one side only must be no accident of there being few tokens on the other: if its firings were dealt
    out at random among all these tokens (hypergeometric), so few on the other side would have a probability below
    `by_chance`; else it is untold. Firings lie in clumps, so that true chance is somewhat higher.
    ValueError unless 0 < least <= 1, or if one of the sides has no token.
    """
    if not 0 < least <= 1:
        raise ValueError(f"least is {least}; give the share of the other side's rate that counts, above 0, at most 1")
    rows = dict(zip(SAE_KINDS, cache.fired, strict=True))
    image, text = sum(rows[kind] for kind in IMAGE), rows["text"]
    of_image, of_text = sum(cache.tokens[kind] for kind in IMAGE), cache.tokens["text"]
    if not (of_image and of_text):
        raise ValueError(f"there are {of_image} image and {of_text} text tokens; read samples that have both")
    fired, tokens = image + text, of_image + of_text
    no_text = text / of_text < least * image / of_image
    no_image = image / of_image < least * text / of_text
    sure_text = hypergeom.cdf(text, tokens, of_text, fired) < by_chance
    sure_image = hypergeom.cdf(image, tokens, of_image, fired) < by_chance
    both = (fired > 0) & ~no_text & ~no_image
    return Serves(no_text & sure_text, no_image & sure_image, both, no_text & ~sure_text | no_image & ~sure_image)


def counted(found: Serves) -> dict[str, float]:
    """How many latents serve which side, as metrics, with their shares of those that can be told."""
    counts = {name: int(latents.sum()) for name, latents in found._asdict().items()}
    told = max(1, sum(counts.values()) - counts["untold"])
    shares = {f"latents_{name}_share": n / told for name, n in counts.items() if name != "untold"}
    return {f"latents_{name}": n for name, n in counts.items()} | shares


def as_rows(lmm: LMM, cache: TextCache) -> dict[str, dict]:
    """Of every latent that fires, which side it serves and its top text tokens, as JSON has them."""
    side = {n: name for name, latents in serves(cache)._asdict().items() for n in np.flatnonzero(latents).tolist()}
    said = {n: [lmm.tokenizer.decode([word.token]) for word in cache.top_words(n)] for n in side}
    return {str(n): {"serves": side[n].replace("_", " "), "text tokens": said[n]} for n in sorted(side)}


# ---- to look at -----------------------------------------------------------------------------------------------


@torch.no_grad()
def read(place: SAEInPlace, sample: Mapping, latent: int) -> tuple[list[str], list[float]]:
    """A sample's text tokens, as text, and a latent's activation on each."""
    lmm, sae, layer = place.lmm, place.sae, place.layer
    (prompt,) = prompts(lmm, [sample], [0], 1)
    mask = token_mask(prompt, ["text"])
    acts, indices = sae.encode(lmm.hidden_states(prompt, layer)[mask])
    values = torch.where(indices == latent, acts, 0).sum(-1)
    return [lmm.tokenizer.decode([token]) for token in prompt.inputs["input_ids"][mask].tolist()], values.tolist()
