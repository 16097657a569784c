"""Section 2.2: what excites a latent, shown as masked images, and what a model says that they have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from tqdm.auto import tqdm

from lmm_sae_nb.cache import LatentCache
from lmm_sae_nb.lmm import LMM

REFUSAL = "unable to produce explanations"


@dataclass(frozen=True)
class Exemplar:
    """One of the images that excite a latent most.

    activation: (rows, cols) float32 over the base image's patch grid; visible: (rows, cols) bool, its most
    activated patches; masked: the image with every other patch black.
    """

    image_index: int
    image: Image.Image
    activation: Float[np.ndarray, "rows cols"]
    visible: Bool[np.ndarray, "rows cols"]
    masked: Image.Image


@dataclass(frozen=True)
class Explanation:
    """What the explainer made of a latent: `concept` is None where it was unable to; `answers` is what was said."""

    concept: str | None
    answers: tuple[str, ...]

    @property
    def text(self) -> str:
        return self.concept or REFUSAL


Explainer = Callable[[Sequence[Sequence[Image.Image]]], list[Explanation]]


def most_activated(activation: Float[np.ndarray, "rows cols"], share: float = 0.25) -> Bool[np.ndarray, "rows cols"]:
    """Patches whose activation exceeds `share` of the image's highest; none where nothing is active.

    ValueError unless 0 <= share < 1. The reference code shows every non-zero patch, which is share = 0.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share is {share}; give the part of the highest activation that counts, from 0 to below 1")
    return activation > share * max(float(activation.max()), 0.0)


def upsample(patches: Bool[np.ndarray, "rows cols"], size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """The patch grid as a mask over an image of `size` = (width, height) pixels, by nearest neighbour."""
    mask = Image.fromarray(np.asarray(patches, np.uint8)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(mask).astype(bool)


def masked(image: Image.Image, visible: Bool[np.ndarray, "rows cols"]) -> Image.Image:
    """The image with all but the visible patches black.

    The paper says black; the reference code leaves 12 % of the light with soft borders.
    """
    pixels = np.asarray(image.convert("RGB"))
    return Image.fromarray(pixels * upsample(visible, image.size)[..., None])


def exemplars(
    cache: LatentCache, images: Sequence[Image.Image], latent: int, *, n_top: int = 5, share: float = 0.25
) -> list[Exemplar]:
    """The latent's `n_top` images of highest mean activation (fewer if fewer excite it), highest first.

    ValueError for a latent that the cache does not have.
    """
    chosen = [image for image, _ in cache.top(latent)[:n_top]]
    maps = [np.asarray(cache.patch_map(latent, rank), np.float32) for rank in range(len(chosen))]
    return exemplars_on(images, chosen, maps, share=share)


def exemplars_on(
    images: Sequence[Image.Image], indices: Sequence[int], activations: Sequence[np.ndarray], *, share: float = 0.25
) -> list[Exemplar]:
    """The same for any images: `indices` into `images`, and one activation map (rows, cols) for each."""
    found = []
    for index, activation in zip(indices, activations, strict=True):
        visible, image = most_activated(activation, share), images[index]
        found.append(Exemplar(index, image, activation, visible, masked(image, visible)))
    return found


def shared_answer(answers: Iterable[str], agree: int) -> str | None:
    """The answer that at least `agree` of the exemplars got, the most frequent one; None if there is none."""
    tidy = [answer.strip().rstrip(".").strip().lower() for answer in answers]
    ranked = Counter(answer for answer in tidy if answer).most_common(1)
    return ranked[0][0] if ranked and ranked[0][1] >= agree else None


def ask_each(
    lmm: LMM, questions: Sequence[str], *, agree: int = 4, batch: int = 32, max_new_tokens: int = 12
) -> Explainer:
    """An explainer that asks a model about each masked image alone, and takes what the answers share.

    Each of `questions` is asked of every exemplar; the first whose answers agree in `agree` exemplars gives the
    concept. A departure from the paper, whose larger model sees the five images at once: here the model under
    study names its own latents, one image at a time.
    """

    def explainer(sets: Sequence[Sequence[Image.Image]]) -> list[Explanation]:
        said: list[list[str]] = [[] for _ in sets]
        concepts: list[str | None] = [None] * len(sets)
        for question in questions:
            open_sets = [i for i, concept in enumerate(concepts) if concept is None and sets[i]]
            asked = [(i, image) for i in open_sets for image in sets[i]]
            answers: list[str] = []
            for start in tqdm(range(0, len(asked), batch), desc=question, mininterval=2):
                chosen = [image for _, image in asked[start : start + batch]]
                prompt = lmm.prompt([question] * len(chosen), chosen)
                answers += lmm.generate(prompt, max_new_tokens=max_new_tokens)
            for i in open_sets:
                own = [answer for (owner, _), answer in zip(asked, answers, strict=True) if owner == i]
                said[i] += own
                concepts[i] = shared_answer(own, agree)
        return [Explanation(concept, tuple(own)) for concept, own in zip(concepts, said, strict=True)]

    return explainer
