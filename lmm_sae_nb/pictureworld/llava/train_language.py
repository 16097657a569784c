"""Teaching the language model: many questions on one picture, each blind to the others.

A training sequence holds one picture and all its questions, but attention lets a question see only the picture
and itself, and its positions start where the picture ends. So every question trains exactly as it will be asked,
alone, while the picture's tokens are paid for once. Questions without a picture fill the rest of the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlavaNextForConditionalGeneration, PreTrainedTokenizerFast

from lmm_sae_nb.pictureworld.llava.model import new_model, new_tokenizer, word_vector
from lmm_sae_nb.pictureworld.llava.train_eye import GROUPS, normalise, open_eyes, patch_labels
from lmm_sae_nb.pictureworld.training_loop import (
    attend,
    autocast_if_quicker,
    has_checkpoint,
    optimisers,
    pupil_weights,
)
from lmm_sae_nb.pictureworld.world.questions import PICTURED, UNPICTURED, Question, aside, lesson
from lmm_sae_nb.pictureworld.world.scenes import PATCH, RARE, SIDE, TRAIN, make_lesson

FAMILIES = (*PICTURED, *UNPICTURED, "shown", "shown_colour")
PREFIX = ("<s>", "<user>")
TEXT = 240  # text tokens of a sequence
SIDE_PATCHES = SIDE // PATCH


class Sequence(NamedTuple):
    """One training sequence; every field but the first two is (TEXT,) and describes its text tokens."""

    pixels: Tensor  # (SIDE, SIDE, 3) uint8
    labels: Tensor  # (groups, patches) uint8: what each patch shows
    ids: Tensor  # int64
    question: Tensor  # int64: number of the question the token belongs to, -1 for padding
    sees: Tensor  # bool: the question is about the picture
    offset: Tensor  # int64: place within its question
    answer: Tensor  # bool: to be predicted
    family: Tensor  # int64: index into FAMILIES


def pack(questions: list[Question], tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Lay whole questions one after another until the next does not fit. ValueError for an unknown word."""
    rows: list[tuple[int, int, bool, int, bool, int]] = []
    end = tokenizer.eos_token_id
    for number, asked in enumerate(questions):
        head = tokenizer(f"{asked.text}<assistant>", add_special_tokens=False).input_ids
        tail = [*tokenizer(asked.answer, add_special_tokens=False).input_ids, end]
        if tokenizer.unk_token_id in head + tail:
            raise ValueError(
                f"a word outside the vocabulary: {asked.text!r} {asked.answer!r}; add it to questions.vocabulary()"
            )
        if len(rows) + len(head) + len(tail) > TEXT:
            continue
        family = FAMILIES.index(asked.family)
        for offset, token in enumerate(head + tail):
            rows.append((token, number, asked.pictured, offset, offset >= len(head), family))
    if not rows:
        raise ValueError(f"no question fits into {TEXT} tokens: {questions}")
    rows += [(tokenizer.pad_token_id, -1, False, 0, False, 0)] * (TEXT - len(rows))
    ids, question, sees, offset, answer, family = map(torch.tensor, zip(*rows, strict=False))
    return {
        "ids": ids,
        "question": question,
        "sees": sees,
        "offset": offset,
        "answer": answer,
        "family": family,
    }


class Lessons(IterableDataset):
    """An endless stream of sequences: scenes (one in seven a map), more maps, masked scenes, and drills: at some turns
    in twenty, scenes with an item of certain kinds."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, first_seed: int, drills: Mapping[int, tuple[str, ...]] = RARE
    ):
        self.tokenizer, self.first_seed, self.drills = tokenizer, first_seed, drills

    def __iter__(self) -> Iterator[Sequence]:
        for n in range(self.first_seed, 10**9):
            scene = make_lesson(TRAIN + n % 800_000, n % 20, self.drills)
            rng = np.random.default_rng([30, n])
            questions = lesson(scene, rng)
            # Asides go first in one sequence of three, and fill what is left in the others.
            asides = [aside(rng) for _ in range(8)]
            questions = [*asides[:2], *questions, *asides[2:]] if n % 3 == 0 else [*questions, *asides]
            yield Sequence(
                torch.from_numpy(scene.pixels),
                torch.from_numpy(patch_labels(scene)),
                **pack(questions, self.tokenizer),
            )


def attention(question: Tensor, sees: Tensor, picture: int) -> Tensor:
    """Return (batch, 1, tokens, tokens) bfloat16, 0 where attention may go and -10,000 where not, for prefix +
    `picture` tokens + text.
    """
    batch, text = question.shape
    before = len(PREFIX) + picture
    allowed = torch.zeros(batch, before + text, before + text, dtype=torch.bool)
    allowed[:, :, : len(PREFIX)] = True
    allowed[:, :before, :before] = True
    allowed[:, before:, len(PREFIX) : before] = sees[:, :, None]
    allowed[:, before:, before:] = question[:, :, None] == question[:, None, :]
    allowed &= torch.ones(before + text, before + text, dtype=torch.bool).tril()
    return torch.where(allowed, 0.0, -1e4).to(torch.bfloat16)[:, None]


class Classroom(nn.Module):
    """The model with what training needs around it. `tiles`: show the AnyRes tile besides the base image, as the
    processor does; without it a lesson costs two thirds."""

    def __init__(self, model: LlavaNextForConditionalGeneration, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.model = model
        self.prefix = torch.tensor(tokenizer.convert_tokens_to_ids(list(PREFIX)))
        self.language = model.model.language_model
        width = self.language.config.hidden_size
        tables = [
            torch.stack([torch.zeros(width), *(word_vector(name, width) for name in names)])
            for names in GROUPS.values()
        ]
        self.words = nn.utils.rnn.pad_sequence(tables, batch_first=True)  # (groups, concepts + 1, width)

    def look(self, batch: Sequence, perfect: bool) -> Tensor:
        """Picture tokens (batch, patches, width): through the eye, or as a perfect eye would give them."""
        if perfect:
            clear = sum(self.words[g][batch.labels[:, g].long()] for g in range(len(GROUPS)))
            return clear + 0.5 * torch.randn_like(clear) / clear.shape[-1] ** 0.5
        with torch.no_grad():
            features = self.model.model.vision_tower(normalise(batch.pixels)).last_hidden_state[:, 1:]
        return self.model.model.multi_modal_projector(features)

    def with_tile(self, patches: Tensor) -> Tensor:
        """Base patches, then the one tile of a square picture (the same pixels) with a newline after each row."""
        rows = patches.unflatten(1, (SIDE_PATCHES, SIDE_PATCHES))
        newline = self.model.model.image_newline.to(rows.dtype).expand(*rows.shape[:2], 1, -1)
        return torch.cat([patches, torch.cat([rows, newline], 2).flatten(1, 2)], 1)

    def forward(self, batch: Sequence, perfect: bool = False, tiles: bool = True) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast_if_quicker()):
            picture = self.look(batch, perfect)
            picture = self.with_tile(picture) if tiles else picture
            embed = self.language.embed_tokens
            prefix = embed(self.prefix).expand(len(batch.ids), -1, -1)
            inputs = torch.cat([prefix, picture.to(prefix.dtype), embed(batch.ids)], 1)
            before = inputs.shape[1] - TEXT
            start = torch.where(batch.sees, before, len(PREFIX))
            positions = torch.cat([torch.arange(before).expand(len(batch.ids), -1), start + batch.offset], 1)
            mask = attention(batch.question, batch.sees, before - len(PREFIX))
            hidden = self.language(
                inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
            wanted = batch.answer[:, 1:]
            logits = self.model.lm_head(hidden[:, before:-1][wanted]).float()
        target = batch.ids[:, 1:][wanted]
        return {
            "loss": F.cross_entropy(logits, target),
            **exact_by_family(batch, wanted, logits.argmax(-1) == target),
        }


def exact_by_family(batch: Sequence, wanted: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Counts of questions asked and of answers right in every word, by family, when each word is given the right
    ones before it."""
    sample = torch.arange(len(batch.ids))[:, None].expand_as(wanted)[wanted]
    key = sample * TEXT + batch.question[:, 1:][wanted]
    worst = torch.ones(len(batch.ids) * TEXT).scatter_reduce(0, key, right.float(), "amin")
    asked, first = torch.unique(key, return_inverse=True)
    family = torch.zeros(len(asked), dtype=torch.long).scatter(0, first, batch.family[:, 1:][wanted])
    counts = torch.bincount(family, minlength=len(FAMILIES)).float()
    exact = torch.zeros(len(FAMILIES)).index_add(0, family, worst[asked])
    return {f"asked_{n}": counts[i] for i, n in enumerate(FAMILIES)} | {
        f"exact_{n}": exact[i] for i, n in enumerate(FAMILIES)
    }


def train_language(
    folder: Path,
    *,
    steps: int,
    start: Path | None = None,
    eyes: Path | None = None,
    perfect: bool = False,
    keep_projector: bool = False,
    tiles_from: float = 0.0,
    drills: Mapping[int, tuple[str, ...]] = RARE,
    batch: int = 8,
    rate: float = 2e-3,
    first_seed: int = 0,
    minutes: float = math.inf,
) -> bool:
    """Teach the language model (and, with a real eye, the projector), resumably.

    start: an earlier course, or a saved model, to begin from. eyes: where `train_tower` left its checkpoint, for its
    tower and, unless `keep_projector`, its projector; None to keep those of `start`. perfect: rehearse with perfect
    eyes, before the real ones are ready. tiles_from: the share of the steps after which lessons show the AnyRes tile
    too. drills: see `Lessons`. Returns whether all steps are done.
    """
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    model = graduate(start) if start else new_model(tokenizer)
    room = Classroom(model, tokenizer)
    if eyes:
        open_eyes(model, eyes, projector=not keep_projector)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in name or not perfect and "vision_tower" not in name)
    model.model.language_model.config._attn_implementation = "eager"  # compiled, it is faster here than SDPA's backward
    model.model.language_model.forward = torch.compile(model.model.language_model.forward)
    stream = None

    def loss_at(step: int) -> dict[str, Tensor]:
        nonlocal stream
        if stream is None:
            first = first_seed + step * batch
            stream = iter(DataLoader(Lessons(tokenizer, first, drills), batch, num_workers=1, prefetch_factor=4))
        return room(Sequence(*next(stream)), perfect=perfect, tiles=step >= tiles_from * steps)

    return attend(folder, steps, room, optimisers([model], rate), loss_at, minutes=minutes, title="lessons")


def graduate(course: Path) -> LlavaNextForConditionalGeneration:
    """Return the model, in float32, that a course left in its checkpoint, or that was saved in this folder."""
    if not has_checkpoint(course):
        return LlavaNextForConditionalGeneration.from_pretrained(course, dtype=torch.float32)
    tokenizer = new_tokenizer()
    room = Classroom(new_model(tokenizer), tokenizer)
    room.load_state_dict(pupil_weights(course, course.name))
    return room.model
