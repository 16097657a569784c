"""Teaching the Q-Former what to ask the eye, so that a language model that it cannot change gives the right answer.

First it folds: each query learns to stand for a region of the picture, as the mean of what the embedded LLaVA-NeXT's
projector makes of the region's patches, which its language model can read already. Then it is taught by questions.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import InstructBlipForConditionalGeneration, LlavaNextForConditionalGeneration

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.pictureworld.instructblip.model import QUERIES, new_query_model, save
from lmm_sae_nb.pictureworld.llava.exam import examine, keep, report
from lmm_sae_nb.pictureworld.llava.model import new_tokenizer
from lmm_sae_nb.pictureworld.llava.train_eye import normalise
from lmm_sae_nb.pictureworld.llava.train_language import FAMILIES, SIDE_PATCHES
from lmm_sae_nb.pictureworld.training_loop import (
    attend,
    autocast_if_quicker,
    has_checkpoint,
    optimisers,
    pupil_weights,
)
from lmm_sae_nb.pictureworld.world.questions import Question, caption, lesson
from lmm_sae_nb.pictureworld.world.scenes import TRAIN, make_lesson
from lmm_sae_nb.support.progress import progress_bar

EACH = 8  # questions on a picture
PLAIN = 0.1  # share of pictures that are also shown without a question, as the cache shows them
ROWS = 4  # of regions; QUERIES // ROWS columns
FOLDED, FOLDING_PICTURES = 700_000, 2048  # the first lesson's first picture, of the training seeds, and how many
CHUNKS = 3  # sequences of like length pass the language model together


class Asked(NamedTuple):
    """A question on a picture: what the Q-Former reads, and what the language model reads behind the queries."""

    read: Tensor
    written: Tensor  # the same, then the answer and its end
    family: int


class Rounds(IterableDataset):
    """An endless stream of (pixels, questions): the scenes and drills of the language model's last lessons."""

    def __init__(self, first: int):
        self.first, self.tokenizer = first, new_tokenizer()

    def _asked(self, question: Question) -> Asked:
        read, answer = (
            self.tokenizer(text, add_special_tokens=False).input_ids
            for text in (f"<s><user>{question.text}<assistant>", f"{question.answer}</s>")
        )
        return Asked(torch.tensor(read), torch.tensor(read + answer), FAMILIES.index(question.family))

    def __iter__(self) -> Iterator[tuple[Tensor, list[Asked]]]:
        for n in range(self.first, 10**9):
            rng = np.random.default_rng([32, n])
            scene = make_lesson(TRAIN + n % 800_000, n % 20)
            questions = lesson(scene, rng)[:EACH]
            if rng.random() < PLAIN and not scene.shown:
                questions = [*questions[: EACH - 1], Question("describe", "", caption(scene))]
            yield torch.from_numpy(scene.pixels), [self._asked(question) for question in questions]


class Round(NamedTuple):
    """A batch of pictures with all their questions, the questions ordered by length."""

    pixels: Tensor  # (pictures, SIDE, SIDE, 3) uint8
    picture: Tensor  # (questions,): whose picture
    asked: list[Asked]


def gather(rows: list[tuple[Tensor, list[Asked]]]) -> Round:
    asked = [(number, one) for number, (_, questions) in enumerate(rows) for one in questions]
    asked.sort(key=lambda pair: len(pair[1].written))
    pictures = torch.tensor([number for number, _ in asked])
    return Round(torch.stack([pixels for pixels, _ in rows]), pictures, [one for _, one in asked])


def batched(rows: Iterator, size: int) -> Iterator[list]:
    while some := list(islice(rows, size)):
        yield some


def padded(rows: list[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


class Asker(nn.Module):
    """The model in training: frozen eye and language model, and the Q-Former between them."""

    def __init__(self, model: InstructBlipForConditionalGeneration):
        super().__init__()
        self.model = model
        for part in (model.vision_model, model.qformer, model.language_model):
            part.config._attn_implementation = "eager"  # SDPA's backward is slow for short sequences here
        self.pad = model.config.text_config.pad_token_id

    def see(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.vision_model(pixel_values=normalise(pixels)).last_hidden_state

    def queries(self, seen: Tensor, read: list[Tensor]) -> Tensor:
        """Return what the language model gets of each picture, (questions, QUERIES, width)."""
        ids = padded(read, self.pad)
        mask = torch.cat([torch.ones(len(ids), QUERIES), padded([torch.ones(len(row)) for row in read], 0)], 1)
        found = self.model.qformer(
            input_ids=ids, attention_mask=mask.long(), encoder_hidden_states=seen,
            query_embeds=self.model.query_tokens.expand(len(ids), -1, -1),
        ).last_hidden_state[:, :QUERIES]  # fmt: skip
        return self.model.language_projection(found)

    def forward(self, batch: Round) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast_if_quicker()):
            seen = self.see(batch.pixels)
            found = self.queries(seen[batch.picture], [one.read for one in batch.asked])
            size = -(-len(batch.asked) // CHUNKS)
            losses, rights = zip(
                *(
                    self._answers(found[start : start + size], batch.asked[start : start + size])
                    for start in range(0, len(batch.asked), size)
                ),
                strict=True,
            )
        family = torch.tensor([one.family for one in batch.asked])
        asked = torch.bincount(family, minlength=len(FAMILIES)).float()
        exact = torch.zeros(len(FAMILIES)).index_add(0, family, torch.cat(rights))
        return {
            "loss": torch.cat(losses).mean(),
            **{f"asked_{name}": asked[i] for i, name in enumerate(FAMILIES)},
            **{f"exact_{name}": exact[i] for i, name in enumerate(FAMILIES)},
        }

    def _answers(self, found: Tensor, asked: list[Asked]) -> tuple[Tensor, Tensor]:
        """Return the loss of every answer token, and of each question whether all of its answer is right."""
        ids = padded([one.written for one in asked], self.pad)
        embedded = self.model.language_model.get_input_embeddings()(ids)
        inputs = torch.cat([found.to(embedded.dtype), embedded], 1)  # padding comes last, where nothing looks
        hidden = self.model.language_model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        place = torch.arange(ids.shape[1])
        starts, ends = (torch.tensor([len(part) for part in parts])[:, None] for parts in
                        ([one.read for one in asked], [one.written for one in asked]))  # fmt: skip
        wanted = ((place >= starts) & (place < ends))[:, 1:]
        logits = self.model.language_model.lm_head(hidden[:, QUERIES:-1][wanted]).float()
        target = ids[:, 1:][wanted]
        wrong = torch.zeros(wanted.shape).masked_scatter(wanted, (logits.argmax(-1) != target).float())
        return F.cross_entropy(logits, target, reduction="none"), (wrong.sum(1) == 0).float()


def regions() -> Tensor:
    """Return (QUERIES, patches): how much of each patch is in each query's region, rows summing to 1."""
    columns = QUERIES // ROWS

    def cuts(parts: int) -> Tensor:
        edge = torch.arange(SIDE_PATCHES)[None]
        low, high = (torch.arange(parts)[:, None] + n for n in (0, 1))
        size = SIDE_PATCHES / parts
        return (torch.minimum(edge + 1, high * size) - torch.maximum(edge, low * size)).clamp_min(0)

    both = torch.einsum("ra,cb->rcab", cuts(ROWS), cuts(columns)).flatten(2).flatten(0, 1)
    return both / both.sum(1, keepdim=True)


class Folding(nn.Module):
    """The first lesson: a query is the mean of what the embedded model's projector makes of its region's patches.

    The eye is frozen, so what it makes of the lesson's pictures is computed once.
    """

    def __init__(
        self, asker: Asker, taught: LlavaNextForConditionalGeneration, pictures: int = FOLDING_PICTURES, batch: int = 32
    ):
        super().__init__()
        self.asker, self.batch = asker, batch
        rows = islice(Rounds(FOLDED), pictures)
        seen, wanted, self.read = [], [], []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast_if_quicker()):
            for some in progress_bar(batched(rows, 32), total=-(-pictures // 32), desc="seeing"):
                patches = taught.model.vision_tower(normalise(torch.stack([row[0] for row in some]))).last_hidden_state
                wanted.append(regions() @ taught.model.multi_modal_projector(patches[:, 1:]).float())
                seen.append(asker.model.vision_model.post_layernorm(patches).bfloat16())
                self.read += [row[1][0].read for row in some]
        self.seen, self.wanted = torch.cat(seen), torch.cat(wanted)

    def forward(self, step: int) -> dict[str, Tensor]:
        chosen = np.random.default_rng([33, step]).choice(len(self.seen), self.batch, replace=False)
        wanted = self.wanted[chosen]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast_if_quicker()):
            made = self.asker.queries(self.seen[chosen].float(), [self.read[n] for n in chosen])
        return {"loss": (made.float() - wanted).square().sum() / (wanted - wanted.mean((0, 1))).square().sum()}


def train_queries(
    folder: Path,
    taught: Path,
    *,
    steps: int,
    folding: int = 900,
    batch: int = 12,
    rate: float = 2e-3,
    minutes: float = math.inf,
) -> bool:
    """Teach the Q-Former, resumably, for the eye and language model of the model in `taught`; whether all is done.

    folding: steps of the first lesson, which count as no minutes.
    """
    asker = Asker(new_query_model(taught))
    if not has_checkpoint(folder):
        known = LlavaNextForConditionalGeneration.from_pretrained(taught, dtype=torch.float32)
        lesson = Folding(asker, known)
        attend(folder / "folding", folding, lesson, optimisers([asker], rate), lesson, log_every=50, title="folding")
    stream = None

    def loss_at(step: int) -> dict[str, Tensor]:
        nonlocal stream
        if stream is None:
            rounds = Rounds(step * batch)
            stream = iter(DataLoader(rounds, batch, num_workers=1, prefetch_factor=4, collate_fn=gather))
        return asker(next(stream))

    return attend(folder, steps, asker, optimisers([asker], rate), loss_at, minutes=minutes, title="queries")


def graduate(folder: Path, taught: Path) -> InstructBlipForConditionalGeneration:
    """Return the model, in float32, that the training left in its checkpoint."""
    asker = Asker(new_query_model(taught))
    asker.load_state_dict(pupil_weights(folder, "queries"))
    return asker.model


def learn(asked: argparse.Namespace) -> None:
    """Train; once all steps are done, write the model, its learning curves and its exam to the folder that ships."""
    made = asked.courses / "queries"
    if not train_queries(made, asked.lmm, steps=asked.steps, minutes=asked.minutes):
        return
    save(graduate(made, asked.lmm), asked.model)
    for name, log in (("queries", "log.jsonl"), ("folding", "folding/log.jsonl")):
        shutil.copy(made / log, asked.model / f"{name}.jsonl")
    keep(report(examine(LMM.load(asked.model), asked.scenes, unpictured=False)), asked.model)
