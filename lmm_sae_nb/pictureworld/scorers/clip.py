"""Teaching image-text similarity: a CLIP, contrasted on whole scenes and on single regions with the rest black.

Each view is drawn to the names of the concepts that it shows and away from all others, each name to the views that
show it and away from the others, and whole scenes to their captions. The vision tower starts as the first layers of
the embedded LMM's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from lmm_sae_nb.pictureworld.llava.train_eye import normalise
from lmm_sae_nb.pictureworld.scorers.clipseg import (
    LEAST,
    NAMES,
    clip_tokenizer,
    lend_tower,
    target,
    text_settings,
    tower_settings,
)
from lmm_sae_nb.pictureworld.training_loop import attend, autocast_if_quicker, optimisers, pupil_weights
from lmm_sae_nb.pictureworld.world.concepts import KINDS
from lmm_sae_nb.pictureworld.world.questions import caption
from lmm_sae_nb.pictureworld.world.scenes import PATCH, SIDE, TRAIN, Scene, make_scene, patch_share

VIEWS = 4  # of a scene: the whole, and regions of it
KEPT = 64  # patches of a view that are looked at in training; visible ones first
LAYERS = 3  # of the LMM's tower
_WEIGHT = {"scene": 2, "object": 5, "part": 3, "material": 2, "texture": 3, "colour": 2, "face": 4, "word": 4}
_STANDS = ("sign", "panel", "block", "blank")  # hidden by what they carry, or nothing to see


def region(scene: Scene, name: str, rng: np.random.Generator) -> np.ndarray:
    """Return (rows, columns) bool: patches that show the concept, as a latent would light them: some missing, some
    beside.
    """
    share = patch_share(target(scene, name))
    lit = (share > rng.uniform(0.1, 0.5) * share.max()) & (rng.random(share.shape) > rng.uniform(0, 0.35))
    lit |= rng.random(share.shape) < rng.choice([0, 0, 0.01, 0.03])
    return lit if (lit & (share > 0)).any() else share == share.max()


def blackened(pixels: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Return the picture with every patch black that is not `visible` (rows, columns)."""
    return pixels * np.kron(visible, np.ones((PATCH, PATCH), bool))[..., None]


def shown_names(scene: Scene, visible: np.ndarray) -> np.ndarray:
    """Return (names,) int8 for the visible patches: 1 shown by at least LEAST pixels, 0 by none, -1 by so few that it
    is not asked.
    """
    keep = np.kron(visible, np.ones((PATCH, PATCH), bool))
    counts = np.zeros(len(NAMES), int)
    for kind, grid in scene.labels.items():
        for number, count in enumerate(np.bincount(grid[keep], minlength=1)[1:]):
            counts[NAMES.index(KINDS[kind][number])] += count
    return np.where(counts >= LEAST, 1, np.where(counts > 0, -1, 0)).astype(np.int8)


def regions(scene: Scene, count: int, rng: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    """Up to `count` different concepts of a scene that could be told from their region alone, with such a region."""
    options, weights = [], []
    for kind, names in scene.concepts().items():
        for name in sorted(names - set(_STANDS)):
            share = patch_share(scene.mask(kind, name))
            if share.max() > 0.25 and name not in options:
                options.append(name)
                weights.append(_WEIGHT[kind])
    if not options:
        return []
    chances = np.array(weights) / sum(weights)
    chosen = rng.choice(options, min(count, len(options)), replace=False, p=chances)
    return [(str(name), region(scene, str(name), rng)) for name in chosen]


class Views(IterableDataset):
    """An endless stream of scenes: (views uint8, the patches looked at, what each shows, number of the name that the
    region is of or -1, the caption's tokens)."""

    def __init__(self, first_seed: int, tokenizer: PreTrainedTokenizerFast):
        self.first_seed, self.tokenizer = first_seed, tokenizer

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        everything = np.ones((SIDE // PATCH, SIDE // PATCH), bool)
        for n in range(self.first_seed, 10**9):
            scene, rng = make_scene(TRAIN + n % 800_000), np.random.default_rng([61, n])
            shown = regions(scene, VIEWS - 1, rng)
            visible = [everything] * (VIEWS - len(shown)) + [lit for _, lit in shown]
            names = [-1] * (VIEWS - len(shown)) + [NAMES.index(name) for name, _ in shown]
            order = np.stack([(~lit).ravel() + rng.random(lit.size) for lit in visible]).argsort(1)
            words = self.tokenizer(caption(scene), padding="max_length", max_length=64, truncation=True)
            yield (
                torch.from_numpy(np.stack([blackened(scene.pixels, lit) for lit in visible])),
                torch.from_numpy(order[:, :KEPT]),
                torch.from_numpy(np.stack([shown_names(scene, lit) for lit in visible])),
                torch.tensor(names),
                torch.tensor(words.input_ids),
            )


# ---- the model ------------------------------------------------------------------------------------------------


def new_processor() -> CLIPProcessor:
    """CLIP's own: the shorter side to SIDE pixels, the middle square of it."""
    eye = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return CLIPProcessor(eye, clip_tokenizer())


def new_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """Return an untrained CLIP of the size that ships."""
    vision, text = tower_settings(LAYERS), text_settings(tokenizer, 96, 2)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


# ---- training -------------------------------------------------------------------------------------------------


def contrast(scores: Tensor, shown: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over the pairs of -log p(pair), where a pair competes with its row's absent ones alone.

    scores: (rows, columns) logits; shown: 1 for a true pair, 0 for a false one, -1 for one that does not count.
    """
    rivals = scores.masked_fill(shown != 0, -torch.inf).logsumexp(1, keepdim=True)
    return (weight * (torch.logaddexp(scores, rivals) - scores)).sum() / weight.sum().clamp_min(1e-6)


class Likener(nn.Module):
    """A CLIP to be trained: `forward` gives the loss and how often the name of a region comes first."""

    def __init__(self, model: CLIPModel, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.model = model
        words = tokenizer(list(NAMES), padding=True, return_tensors="pt")
        self.ids, self.mask, self.pad = words.input_ids, words.attention_mask, tokenizer.pad_token_id

    def look(self, pixels: Tensor, kept: Tensor) -> Tensor:
        """Unit vectors (views, width) of pixels (views, 3, SIDE, SIDE), of which only the patches `kept` are read.

        With every patch kept it is the model's own `get_image_features`, made a unit vector.
        """
        vision = self.model.vision_model
        hidden = vision.embeddings(pixels)
        chosen = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], 1)
        hidden = hidden.gather(1, chosen[..., None].expand(-1, -1, hidden.shape[-1]))
        hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(hidden)).last_hidden_state[:, 0]
        return F.normalize(self.model.visual_projection(vision.post_layernorm(hidden)).float(), dim=-1)

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors (texts, width) of tokens (texts, length)."""
        return F.normalize(self.model.get_text_features(ids, mask).pooler_output.float(), dim=-1)

    def forward(self, pixels: Tensor, kept: Tensor, shown: Tensor, of: Tensor, captions: Tensor) -> dict[str, Tensor]:
        """pixels (scenes, VIEWS, 3, SIDE, SIDE); kept (scenes, VIEWS, KEPT); shown (scenes, VIEWS, names); of (scenes,
        VIEWS); captions (scenes, length)."""
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast_if_quicker()):
            views = self.look(pixels.flatten(0, 1), kept.flatten(0, 1))
            names = self.read(self.ids, self.mask)
            captions = captions[:, : int((captions != self.pad).sum(1).max())]
            whole = self.read(captions, (captions != self.pad).long())
        scale = self.model.logit_scale.exp().clamp(max=100)
        scores, shown, of = scale * views @ names.T, shown.flatten(0, 1), of.flatten()
        weight = (shown == 1).float()
        weight /= weight.sum(1, keepdim=True).clamp_min(1)
        region = of >= 0
        named = F.one_hot(of.clamp_min(0), len(NAMES)) * region[:, None]
        weight = torch.where(region[:, None], 0.3 * weight + 0.7 * named, weight)
        shown = torch.where(named == 1, 1, shown)
        pairs = scale * whole @ views[:: pixels.shape[1]].T
        truth = torch.arange(len(whole))
        by_caption = (F.cross_entropy(pairs, truth) + F.cross_entropy(pairs.T, truth)) / 2
        by_view, by_name = contrast(scores, shown, weight), contrast(scores.T, shown.T, weight.T)
        first = scores.masked_fill((shown != 0) & (named == 0), -torch.inf).argmax(1) == of
        return {
            "loss": by_view + 0.5 * by_name + 0.3 * by_caption,
            "by_view": by_view,
            "by_name": by_name,
            "by_caption": by_caption,
            "named_first": first[region].float().mean(),
        }


def train_similarity(
    folder: Path, lmm: Path, steps: int, batch: int = 10, rate: float = 2e-3, minutes: float = math.inf
) -> bool:
    """Teach CLIP resumably, `batch` scenes a step; a checkpoint in `folder` holds it. `lmm` lends its tower."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    pupil = Likener(new_model(tokenizer), tokenizer)
    lend_tower(pupil.model.vision_model, lmm)
    opts = optimisers([pupil], rate)
    stream = None

    def loss_at(step: int) -> dict[str, Tensor]:
        nonlocal stream
        if stream is None:
            stream = iter(DataLoader(Views(step * batch, tokenizer), batch, num_workers=1, prefetch_factor=6))
        pixels, *rest = next(stream)
        return pupil(normalise(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]), *rest)

    return attend(folder, steps, pupil, opts, loss_at, minutes=minutes, title="similarity")


def finished(folder: Path) -> CLIPModel:
    """Return the model that `train_similarity` left in `folder`; FileNotFoundError if it left none."""
    weights = pupil_weights(folder, "similarity")
    tokenizer = clip_tokenizer()
    pupil = Likener(new_model(tokenizer), tokenizer)
    pupil.load_state_dict(weights)
    return pupil.model.eval()
