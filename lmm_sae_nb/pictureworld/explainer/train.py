"""Teaching the explainer: sets of masked images, and what the rule says that they have in common.

Its lessons come from strips (`strips.py`) of several origins. The tower is taught before (`peeking.py`) and stays as it
is, so that what it makes of each masked image is computed once and kept; a set is put together anew at every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AyaVisionForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)  # fmt: skip

from lmm_sae_nb.interpret.explainers import REFUSAL
from lmm_sae_nb.pictureworld.explainer.masked_sets import CHOSEN, Source, Strips, drawn, of_latents
from lmm_sae_nb.pictureworld.explainer.model import FOLD, SET, explainer_tokenizer, new_explainer, prompt_of
from lmm_sae_nb.pictureworld.explainer.train_eye import open_eye, tower_features, train_eye
from lmm_sae_nb.pictureworld.training_loop import (
    attend,
    autocast_if_quicker,
    has_checkpoint,
    optimisers,
    pupil_weights,
)
from lmm_sae_nb.pictureworld.world.rendered import CONCEPTS, Gallery, gallery
from lmm_sae_nb.pictureworld.world.scenes import TRAIN
from lmm_sae_nb.support.files import read_json, write_json
from lmm_sae_nb.support.tensor_files import hash_of

ASKED = (2, 3, 4, SET)  # after how many images a lesson asks
FIRST_SEED, SCENES = TRAIN + 300_000, 24_000  # the scenes that lessons are drawn from
CACHED_SCENES = 1600  # the first of them, among which real latents find their images
STRIP, DRAWN_STRIPS, CACHED_STRIPS = 8, 16_384, 800  # images of a strip, strips of each origin
EYE_STRIPS = 14_000  # drawn ones that the eye learns from, which are others
OFTEN = {"colour": 2.5, "part": 2.5, "word": 1.3}  # how much more often the hardest kinds are drawn
IGNORED = -100  # no target: what pads a short answer


class Lot(NamedTuple):
    """Strips of one origin, what the tower makes of them, and how often each is drawn."""

    strips: Strips
    features: Tensor
    chances: np.ndarray  # (strips,), summing to 1


def lot(gallery: Gallery, strips: Strips, features: Tensor) -> Lot:
    """Strips with their features and chances; the hardest kinds are drawn more often."""
    return Lot(strips, features, strips.chances(gallery, OFTEN))


class Sets(NamedTuple):
    """A batch of whole sets, with what their first images have in common, for every number in `ASKED`."""

    features: Tensor  # (sets, SET, patches, width) bfloat16
    answers: list[list[str]]  # (sets, len(ASKED))


def draw_sets(gallery: Gallery, lots: Sequence[Lot], size: int, rng: np.random.Generator) -> Sets:
    """Sets of a batch: images of a strip, in one of four with one image, at times with all, from other strips.

    What they have in common is asked of the rule (`lmm_sae_nb.truth.common_concept`), whatever strip was meant.
    """
    features, answers = [], []
    for _ in range(size):
        source = lots[rng.integers(len(lots))]
        strip = np.full(SET, rng.choice(len(source.chances), p=source.chances))
        image = rng.permutation(source.strips.scenes.shape[1])[:SET]
        dice = rng.random()
        if dice < 0.25:  # one stranger
            strip[rng.integers(SET)] = rng.integers(len(source.chances))
        elif dice < 0.31:  # strangers all
            strip = rng.integers(len(source.chances), size=SET)
        shown = [source.strips.label(gallery, strip[:count], image[:count]) for count in ASKED]
        features.append(source.features[strip, image])
        answers.append([some.concept if some else REFUSAL for some in shown])
    return Sets(torch.stack(features), answers)


class Explainee(nn.Module):
    """What of the explainer is trained: all but its tower.

    A set is asked about once after each number of images in `ASKED`: its tokens are paid for once, and a question sees
    the images before it and itself, at the positions that it would have alone.
    """

    def __init__(self, model: AyaVisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.projector, self.language = model.model.multi_modal_projector, model.model.language_model
        self.head = model.lm_head
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        self.answer = {
            answer: torch.tensor(tokenizer(f"{answer}</s>", add_special_tokens=False).input_ids)
            for answer in (*(name for _, name in CONCEPTS), REFUSAL)
        }
        self.longest = max(map(len, self.answer.values()))
        whole = [tokenizer(prompt_of(count), add_special_tokens=False).input_ids for count in (SET, SET - 1)]
        block = len(whole[0]) - len(whole[1])  # tokens of an image
        head = next(n for n, pair in enumerate(zip(*whole, strict=False)) if pair[0] != pair[1]) - (SET - 1) * block
        asked = torch.tensor(whole[0][head + SET * block :])
        self.pictures = torch.tensor(whole[0][: head + SET * block])
        self.asked, self.before = asked, [head + count * block for count in ASKED]

    def layout(self) -> tuple[Tensor, Tensor]:
        """Position of every token, and what attention may see of what: (1, 1, tokens, tokens), 0 or -10,000."""
        first, branch = len(self.pictures), len(self.asked) + self.longest
        size = first + branch * len(self.before)
        positions, allowed = torch.arange(size), torch.ones(size, size, dtype=torch.bool).tril()
        for number, before in enumerate(self.before):
            here = slice(first + number * branch, first + (number + 1) * branch)
            positions[here] = before + torch.arange(branch)
            allowed[here, before : here.start] = False
        return positions[None], torch.where(allowed, 0.0, -1e4)[None, None]

    def forward(self, sets: Sets) -> dict[str, Tensor]:
        flat = [self.answer[answer] for row in sets.answers for answer in row]
        target = nn.utils.rnn.pad_sequence([*flat, torch.zeros(self.longest)], True, IGNORED)[:-1].long()
        target = target.unflatten(0, (len(sets.answers), -1))  # (sets, questions, longest)
        asked = self.asked.expand(*target.shape[:2], -1)
        branches = torch.cat([asked, target.clamp_min(0)], 2).flatten(1)
        ids = torch.cat([self.pictures.expand(len(target), -1), branches], 1)
        positions, mask = self.layout()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast_if_quicker()):
            seen = self.projector(sets.features.flatten(0, 1).float())
            embedded = self.language.embed_tokens(ids)
            embedded = embedded.masked_scatter(
                (ids == self.image)[..., None], seen.reshape(-1, embedded.shape[-1]).to(embedded.dtype)
            )
            hidden = self.language(
                inputs_embeds=embedded, position_ids=positions, attention_mask=mask, use_cache=False
            ).last_hidden_state
            hidden = hidden[:, len(self.pictures) :].unflatten(1, (len(self.before), -1))
            logits = self.head(hidden[:, :, len(self.asked) - 1 : -1]).float()
        return {"loss": F.cross_entropy(logits.flatten(0, 2), target.flatten()), **self._marks(sets, logits, target)}

    def _marks(self, sets: Sets, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Whole sets asked about and answers right in every word, for those to be named and those to be refused."""
        right = ((logits.argmax(-1) == target) | (target == IGNORED)).all(2)[:, -1]
        refuse = torch.tensor([row[-1] == REFUSAL for row in sets.answers])
        return {
            f"{count}_{name}": chosen.sum().float()
            for name, which in (("named", ~refuse), ("refused", refuse))
            for count, chosen in (("asked", which), ("exact", which & right))
        }


class Folding(nn.Module):
    """The new projector's first lesson: a token is the mean of what the embedded model's projector makes of those of
    its four patches that are not black (of all four where all are)."""

    def __init__(self, projector: nn.Module, known: nn.Module):
        super().__init__()
        self.projector, self.known = projector, known.requires_grad_(False)

    def forward(self, features: Tensor, visible: Tensor) -> dict[str, Tensor]:
        """features: (images, patches, width); visible: (images, patches) bool."""
        fold = self.projector.pixel_shuffle
        shown = fold(visible[..., None].float())  # (images, rows, columns, 4)
        shown = shown + (shown.sum(-1, keepdim=True) == 0)
        wanted = fold(self.known(features)).unflatten(-1, (FOLD**2, -1))
        wanted = (wanted * shown[..., None]).sum(-2) / shown.sum(-1, keepdim=True)
        made = self.projector(features)
        return {"loss": (made - wanted).square().sum() / (wanted - wanted.mean((0, 1, 2))).square().sum()}


def train_explainer(
    folder: Path,
    taught: Path,
    gallery: Gallery,
    strips: dict[str, Strips],
    *,
    steps: int,
    folding: int = 400,
    batch: int = 16,
    rate: float = 2e-3,
    minutes: float = math.inf,
) -> bool:
    """Teach the explainer on sets from strips of several origins (by name), resumably; whether all steps are done.

    The eye must have been taught (`train_eye`) in `folder/eye`. folding: steps of the projector's first lesson
    (`Folding`); it and the tower's work count as no minutes.
    """
    model = new_explainer(taught)
    tower = open_eye(model.model.vision_tower, folder / "eye").eval()
    _require_same_eye(folder, tower)
    lots = [
        lot(gallery, some, tower_features(tower, gallery, some, folder / f"features-{name}"))
        for name, some in strips.items()
    ]
    pupil = Explainee(model, explainer_tokenizer())
    known = LlavaNextForConditionalGeneration.from_pretrained(taught, dtype=torch.float32).model.multi_modal_projector
    projector = Folding(pupil.projector, known)

    def fold_at(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([63, step])
        source = lots[rng.integers(len(lots))]
        some = np.unravel_index(rng.integers(source.strips.scenes.size, size=64), source.strips.scenes.shape)
        return projector(source.features[some].float(), torch.from_numpy(source.strips.visible[some]))

    def loss_at(step: int) -> dict[str, Tensor]:
        return pupil(draw_sets(gallery, lots, batch, np.random.default_rng([61, step])))

    attend(folder / "folding", folding, projector, optimisers([projector], rate), fold_at, title="folding")
    projector.load_state_dict(pupil_weights(folder / "folding", "explainer"))
    model.model.language_model.config._attn_implementation = "eager"  # quicker here than SDPA's backward
    return attend(folder, steps, pupil, optimisers([pupil], rate), loss_at, minutes=minutes, title="explainer")


def _require_same_eye(folder: Path, tower: nn.Module) -> None:
    """Raise ValueError if the lessons in the folder were begun with another eye."""
    path, eye = folder / "eye.json", hash_of(tower.state_dict().values())
    if has_checkpoint(folder) and (not path.is_file() or read_json(path)["eye"] != eye):
        raise ValueError(
            f"the lessons in {folder} were begun with another eye; delete its checkpoint/, folding/ and features-*/"
        )
    write_json(path, {"eye": eye})


def study_explainer(folder: Path, taught: Path, saes: Sequence[Source], steps: int, minutes: float = math.inf) -> bool:
    """Return the recipe of the shipped explainer, in one piece (book/departures.md tells in which pieces it was
    made); returns whether all its steps are done.

    taught: the embedded model. saes: those whose latents make lessons, beside what is drawn from the label maps.
    minutes: for the eye and for the rest, each. Scenes and what the tower makes of them: 14 GB of memory and of disk.
    """
    pictures = gallery(folder / "scenes.safetensors", FIRST_SEED, SCENES)
    seen, cached = pictures.first(CACHED_SCENES), {}
    for number, source in enumerate(saes):
        kept = folder / f"latents-{number}"
        cached[f"cached-{number}"] = of_latents(source, kept, taught, seen, STRIP, CACHED_STRIPS)
    masks = [drawn(pictures, EYE_STRIPS, STRIP, 5), *cached.values()]
    if not train_eye(folder / "eye", taught, pictures, masks, minutes=minutes):
        return False
    strips = {"drawn": drawn(pictures, DRAWN_STRIPS, STRIP, 0)} | cached
    return train_explainer(folder, taught, pictures, strips, steps=steps, minutes=minutes)


def lessons_of(folder: Path, saes: int) -> dict[str, list]:
    """Return what `latents_in_training` reads: the latents of each SAE whose masks were lessons, noted in `folder`."""
    return {"lessons": [read_json(folder / f"latents-{number}" / CHOSEN) for number in range(saes)]}


def graduate(folder: Path, taught: Path) -> AyaVisionForConditionalGeneration:
    """Return the explainer, in float32, that the course left in its checkpoint."""
    weights = pupil_weights(folder, "explainer")
    model = new_explainer(taught)
    open_eye(model.model.vision_tower, folder / "eye")
    Explainee(model, explainer_tokenizer()).load_state_dict(weights)
    return model
