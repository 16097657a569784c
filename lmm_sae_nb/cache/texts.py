"""Find for every latent the texts and the text tokens that excite it most: one exact pass over training samples."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from lmm_sae_nb.cache.encode_images import require_finite_latents
from lmm_sae_nb.cache.top_images import Firings, Ranking
from lmm_sae_nb.model.data_identity import data_fingerprint
from lmm_sae_nb.model.hookpoints import titled
from lmm_sae_nb.model.prompts import Prompt
from lmm_sae_nb.model.sample_checks import check_samples
from lmm_sae_nb.model.samples import prompts
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import Latents
from lmm_sae_nb.support.progress import progress_bar
from lmm_sae_nb.support.stages import code_fingerprints
from lmm_sae_nb.support.tensor_files import hash_of, open_tensors, require_finite, save_tensors, shapes_in

TENSORS = "texts.safetensors"
BITS = 20  # of a token's number in the vocabulary, and of its place in a text


class Word(NamedTuple):
    """A text token that excites a latent."""

    sample: int  # number of the sample
    place: int  # in the sample, padding not counted
    token: int  # number in the vocabulary
    act: float  # the latent's activation


@torch.no_grad()
def cache_texts(
    place: SAEInPlace,
    samples: Sequence[Mapping],
    *,
    n_top: int = 5,
    batch_samples: int = 16,
    folder: str | Path,
) -> TextCache:
    """Find for every latent the `n_top` samples of highest mean activation over their text tokens, and the `n_top`
    text tokens of highest activation; count for every kind of token on how many each latent is active.

    Text is all that the model reads as text: question, answer, and the words of the chat template. The result is
    exact. Of equal ones the lower sample and place come first. A whole result of the same code, model, SAE, samples and
    arguments is not made again; a damaged one is, with a warning. Memory beside the model and a batch's own tensors:
    n_latents * (28 * n_top + 120) bytes.

    samples: rows with image (PIL or None), question, answer.
    n_top: samples and tokens kept for each latent.
    batch_samples: samples that go through the model at once.
    folder: gets texts.safetensors.

    Raises:
        ValueError: no samples, one that is wrong, n_top < 1, or hidden states or activations that are not finite.
        UnreadableImage: a picture cannot be read; `readable` leaves such samples out.
    """
    lmm, sae, layer = place.lmm, place.sae, place.layer
    if not len(samples) or n_top < 1:
        raise ValueError(f"{len(samples)} samples, n_top {n_top}: there is nothing to rank; give at least one of each")
    check_samples(samples, lmm)
    key = _key(place, samples, n_top, batch_samples)
    if (known := _known(Path(folder), key)) is not None:
        return known
    texts, words = (Ranking.empty(sae.n_latents, n_top, 1) for _ in range(2))
    fired, tokens = torch.zeros(len(SAE_KINDS), sae.n_latents, dtype=torch.long), dict.fromkeys(SAE_KINDS, 0)
    batches, total = prompts(lmm, samples, range(len(samples)), batch_samples), -(-len(samples) // batch_samples)
    for batch, prompt in enumerate(progress_bar(batches, desc="reading", total=total)):
        first, hidden = batch * batch_samples, lmm.hidden_states(prompt, layer)
        for row, kind in enumerate(SAE_KINDS):
            mask = place.mask(prompt, [kind])
            require_finite(
                hidden[mask], f"hidden states of {titled(layer)}, samples {first} to {first + len(mask) - 1}"
            )
            latents = Latents(*(part.cpu() for part in sae.encode(hidden[mask])))
            require_finite_latents(latents)
            fired[row] += torch.bincount(latents.indices[latents.acts > 0], minlength=sae.n_latents)
            tokens[kind] += len(latents.acts)
            if kind == "text":
                _rank(texts, words, latents, prompt, mask, first)
    tensors = {"fired": fired}
    for name, ranking in {"texts": texts, "words": words}.items():
        top = ranking.ordered()
        tensors |= {name: torch.from_numpy(top["top_images"]), f"{name}_acts": torch.from_numpy(top["top_means"])}
    described = {"layer": layer, "model": Path(lmm.name).name, "samples": len(samples), "tokens": tokens, "key": key}
    save_tensors(Path(folder) / TENSORS, tensors, {"texts": json.dumps(described)})
    return TextCache.load(folder)


def _key(place: SAEInPlace, samples: Sequence[Mapping], *settings: int) -> str:
    """Return a hash of what a cache of texts is made from."""
    lmm, sae = place.lmm, place.sae
    made = [lmm.fingerprint(place.layer), place.layer, lmm.image_size, hash_of(sae.state_dict().values()), sae.k]
    made += [data_fingerprint(samples), settings, code_fingerprints([sys.modules[__name__]])]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def _known(folder: Path, key: str) -> TextCache | None:
    """Return the cache of texts with this key; None, with a warning, if it is damaged."""
    try:
        cache = TextCache.load(folder)
    except FileNotFoundError:
        return None
    except ValueError as damage:
        warnings.warn(f"the cache of texts is made again: {damage}", stacklevel=3)
        return None
    return cache if cache.key == key else None


def _rank(texts: Ranking, words: Ranking, latents: Latents, prompt: Prompt, mask: Tensor, first: int) -> None:
    """Add a batch's text tokens to both rankings.

    latents: (text tokens, k), of the tokens in `mask`.
    first: number of the batch's first sample.
    """
    samples = first + mask.nonzero()[:, 0].numpy()
    places = ((~prompt.mask("pad")).cumsum(1) - 1)[mask].numpy()
    ids = prompt.inputs["input_ids"][mask].cpu().numpy()
    if len(ids) and max(ids.max(), places.max()) >= 1 << BITS:
        raise ValueError(
            f"token {ids.max()}, place {places.max()}: both have to be below {1 << BITS}; give shorter texts"
        )
    acts, index = latents.acts.float().numpy(), latents.indices.numpy()
    token, slot = np.nonzero(acts > 0)
    order = np.lexsort((token, index[token, slot]))  # tokens are in order of sample and place
    token, latent, act = token[order], index[token, slot][order], acts[token, slot][order]
    length = np.bincount(samples - first)[samples - first]  # number of text tokens in the token's sample
    patch = np.zeros(len(token), np.int64)  # a ranking is of images and patches; here a text or a token has one patch
    texts.update(Firings(latent, samples[token], patch, act / length[token].astype(float)))
    words.update(Firings(latent, ((samples << BITS | places) << BITS | ids)[token], patch, act))


class TextCache:
    """The result of `cache_texts`.

    layer: 0-based.
    samples: how many were read.
    tokens: kind to the number of its tokens.
    key: a hash of what it was made from.
    n_latents, n_top: of the SAE, and samples and tokens kept for each latent.
    fired: on how many tokens of each kind (in the order of `SAE_KINDS`) each latent is active.
    """

    def __init__(self, folder: Path):
        self._file = open_tensors(folder / TENSORS)
        shapes, metadata = shapes_in(self._file), self._file.metadata() or {}
        if not {"fired", "texts", "words"} <= shapes.keys() or "texts" not in metadata:
            raise ValueError(
                f"{folder / TENSORS} is not a cache of texts; make it with notebooks/02_cache_activations.py"
            )
        described = json.loads(metadata["texts"])
        self.layer, self.samples, self.tokens = described["layer"], described["samples"], described["tokens"]
        self.key = described.get("key", "")
        self.n_latents, self.n_top = shapes["texts"]
        self.fired: Int64[np.ndarray, "kinds latents"] = self._file.get_tensor("fired").numpy()

    @classmethod
    def load(cls, folder: str | Path) -> TextCache:
        """Open the folder of a cache of texts.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: it was cut short, or is something else.
        """
        if not (Path(folder) / TENSORS).is_file():
            raise FileNotFoundError(f"{Path(folder) / TENSORS} is missing; run notebooks/02_cache_activations.py first")
        return cls(Path(folder))

    def top_texts(self, latent: int) -> list[tuple[int, float]]:
        """Return the numbers of the samples that excite a latent most, with its mean over their text tokens."""
        return self._top("texts", latent)

    def top_words(self, latent: int) -> list[Word]:
        """Return the text tokens that excite a latent most, the best first."""
        low = (1 << BITS) - 1
        return [Word(n >> 2 * BITS, n >> BITS & low, n & low, act) for n, act in self._top("words", latent)]

    def _top(self, name: str, latent: int) -> list[tuple[int, float]]:
        if not 0 <= latent < self.n_latents:
            raise ValueError(f"no latent {latent}: there are latents 0 to {self.n_latents - 1}")
        numbers, acts = (self._file.get_slice(part)[int(latent)].tolist() for part in (name, f"{name}_acts"))
        return [(number, act) for number, act in zip(numbers, acts, strict=True) if number >= 0]


@torch.no_grad()
def text_activations(place: SAEInPlace, sample: Mapping, latent: int) -> tuple[list[str], list[float]]:
    """Return the text tokens of a sample, as text, and the activation of a latent on each."""
    (prompt,) = prompts(place.lmm, [sample], [0], 1)
    mask = place.mask(prompt, ["text"])
    acts, indices = place.sae.encode(place.lmm.hidden_states(prompt, place.layer)[mask])
    values = torch.where(indices == latent, acts, 0).sum(-1)
    ids = prompt.inputs["input_ids"][mask].tolist()
    return [place.lmm.tokenizer.decode([token]) for token in ids], values.tolist()
