"""The embedded InstructBLIP: the eye and the language model are the LLaVA-NeXT's, the lessons ask as users do."""

from itertools import islice

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, LlavaNextForConditionalGeneration

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.token_kinds import NoPatchGrid
from lmm_sae_nb.pictureworld.__main__ import INSTRUCTBLIP, MODEL, QUERIES_STEPS
from lmm_sae_nb.pictureworld.instructblip import train
from lmm_sae_nb.pictureworld.instructblip.model import QUERIES, new_query_model, new_query_processor
from lmm_sae_nb.pictureworld.instructblip.train import ROWS, Asker, Folding, Rounds, gather, regions
from lmm_sae_nb.pictureworld.llava.exam import ask, is_right
from lmm_sae_nb.pictureworld.llava.train_eye import normalise
from lmm_sae_nb.pictureworld.llava.train_language import FAMILIES
from lmm_sae_nb.pictureworld.training_loop import read_log
from lmm_sae_nb.pictureworld.world.questions import lesson
from lmm_sae_nb.pictureworld.world.scenes import PATCH, SIDE, VALIDATION, make_scene


@pytest.fixture(scope="module")
def known(root):
    return LlavaNextForConditionalGeneration.from_pretrained(root / MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def untaught(root):
    return new_query_model(root / MODEL).eval()


@pytest.fixture(scope="module")
def pictures():
    return [make_scene(VALIDATION + n) for n in range(3)]


@pytest.fixture
def exact(monkeypatch):
    """Float32 all through, so that two ways of computing agree to rounding."""
    monkeypatch.setattr(train, "autocast_if_quicker", lambda: False)


@torch.no_grad()
def test_its_eye_is_the_embedded_models_eye(untaught, known, pictures):
    pixels = normalise(torch.from_numpy(np.stack([scene.pixels for scene in pictures])))
    theirs = known.model.vision_tower(pixels).last_hidden_state
    mine = untaught.vision_model(pixel_values=pixels).last_hidden_state
    wanted = torch.nn.functional.layer_norm(theirs, theirs.shape[-1:], eps=1e-12)
    torch.testing.assert_close(mine, wanted, atol=5e-3, rtol=0)
    assert wanted.std() > 0.9


@torch.no_grad()
def test_its_language_model_is_the_embedded_models(untaught, known):
    ids = torch.arange(2, 60)[None]
    mine, theirs = untaught.language_model(input_ids=ids).logits, known.lm_head(known.model.language_model(ids)[0])
    torch.testing.assert_close(mine, theirs)


def test_its_processor_sees_what_the_eye_learned_from_and_asks_in_the_same_words(untaught, pictures):
    lmm = LMM(untaught, new_query_processor(), "untaught")
    prompt = lmm.prompt(["what is shown ?", ""], [pictures[0].image, pictures[1].image])
    pixels = normalise(torch.from_numpy(np.stack([scene.pixels for scene in pictures[:2]])))
    torch.testing.assert_close(prompt.inputs["pixel_values"], pixels, atol=1e-6, rtol=0)
    texts = lmm.tokenizer.batch_decode(prompt.inputs["input_ids"])
    assert texts[0].replace(" ", "") == "<image>" * QUERIES + "<s><user>whatisshown?<assistant>"
    read = lmm.processor.qformer_tokenizer.batch_decode(prompt.inputs["qformer_input_ids"])
    assert [text.replace(" ", "") for text in read] == [
        "<s><user>whatisshown?<assistant>", "<s><user><assistant>" + "<pad>" * 4
    ]  # fmt: skip
    assert [int(spans.mask("base").sum()) for spans in prompt.spans] == [QUERIES, QUERIES]
    with pytest.raises(NoPatchGrid, match="query tokens"):
        prompt.spans[0].as_grid(torch.zeros(QUERIES))


def test_rounds_are_the_same_from_wherever_they_start():
    late, early = next(iter(Rounds(5))), next(islice(Rounds(0), 5, 6))
    assert torch.equal(late[0], early[0])
    assert all(
        torch.equal(a.written, b.written) and torch.equal(a.read, b.read)
        for a, b in zip(late[1], early[1], strict=True)
    )


def test_a_lesson_is_what_the_model_itself_finds_for_each_question_alone(untaught, exact):
    """All questions of a batch, padded and in chunks, against the class's own forward for one question at a time."""
    rows = list(islice(Rounds(3), 3))
    found = Asker(untaught)(gather(rows))
    losses, right = [], torch.zeros(len(FAMILIES))
    for pixels, questions in rows:
        for one in questions:
            ids = torch.cat([torch.full((QUERIES,), untaught.config.image_token_id), one.written])[None]
            with torch.no_grad():
                logits = untaught(
                    pixel_values=normalise(pixels[None]), input_ids=ids, attention_mask=torch.ones_like(ids),
                    qformer_input_ids=one.read[None], qformer_attention_mask=torch.ones_like(one.read)[None],
                ).logits[0]  # fmt: skip
            answer = one.written[len(one.read) :]
            logits = logits[-len(answer) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, answer, reduction="none"))
            right[one.family] += bool((logits.argmax(-1) == answer).all())
    torch.testing.assert_close(found["loss"], torch.cat(losses).mean(), atol=1e-4, rtol=1e-4)
    assert [float(found[f"exact_{name}"]) for name in FAMILIES] == right.tolist()
    assert sum(float(found[f"asked_{name}"]) for name in FAMILIES) == sum(len(questions) for _, questions in rows)


def test_only_what_lies_between_eye_and_language_model_learns(root, exact):
    model = new_query_model(root / MODEL)
    Asker(model)(gather(list(islice(Rounds(0), 2))))["loss"].backward()
    learns = {name for name, part in model.named_parameters() if part.grad is not None and part.grad.any()}
    assert learns
    assert all(name.startswith(("query_tokens", "qformer.", "language_projection.")) for name in learns)


def test_regions_tile_the_picture():
    """Against pixels: the share of a region's pixels that lie in each patch."""
    columns, fine = QUERIES // ROWS, 24  # pixels of a patch that divide evenly among regions
    side = SIDE // PATCH * fine
    row, column = np.mgrid[:side, :side]
    region = row * ROWS // side * columns + column * columns // side
    patch = row // fine * (SIDE // PATCH) + column // fine
    counts = np.zeros((QUERIES, (SIDE // PATCH) ** 2))
    np.add.at(counts, (region.ravel(), patch.ravel()), 1)
    np.testing.assert_allclose(regions().numpy(), counts / counts.sum(1, keepdims=True), atol=1e-6)


def test_folding_is_about_the_mean_of_a_regions_patches(untaught, known, exact):
    folding = Folding(Asker(untaught), known, pictures=5, batch=2)
    with torch.no_grad():
        loss = float(folding(0)["loss"])
        rows = list(islice(Rounds(train.FOLDED), 5))
        chosen = [rows[n] for n in np.random.default_rng([33, 0]).choice(5, 2, replace=False)]
        pixels = normalise(torch.stack([row[0] for row in chosen]))
        patches = known.model.multi_modal_projector(known.model.vision_tower(pixels).last_hidden_state[:, 1:])
        wanted = torch.einsum("qp,npw->nqw", regions(), patches)
        made = []
        for n, (_, questions) in enumerate(chosen):
            found = untaught.qformer(
                input_ids=questions[0].read[None], query_embeds=untaught.query_tokens,
                encoder_hidden_states=untaught.vision_model(pixel_values=pixels[n : n + 1]).last_hidden_state,
            )  # fmt: skip
            made.append(untaught.language_projection(found.last_hidden_state[0, :QUERIES]))
        error = (torch.stack(made) - wanted).square().sum() / (wanted - wanted.mean((0, 1))).square().sum()
    assert loss == pytest.approx(float(error), rel=0.02)  # kept in bfloat16


# What ships.


def test_what_ships_is_small_and_has_the_embedded_models_eye_and_language_model(root, untaught):
    folder = root / INSTRUCTBLIP
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 20_100_000
    assert (folder / "model.safetensors").stat().st_size <= 20_000_000
    shipped = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    frozen = ("vision_model.", "language_model.")
    its = dict(shipped.named_parameters())
    assert all(torch.equal(part, its[name]) for name, part in untaught.named_parameters() if name.startswith(frozen))


def test_what_ships_answers_about_pictures(root):
    """On scenes that were used for nothing else; the whole exam is in exam.json."""
    lmm = LMM.load(root / INSTRUCTBLIP)
    paper = [
        (scene, question)
        for scene in map(make_scene, range(VALIDATION + 50_000, VALIDATION + 50_012))
        for question in lesson(scene, np.random.default_rng(scene.seed))
        if question.family in ("scene", "count", "feeling", "colour")
    ]
    answers = ask(lmm, [(question, scene.image) for scene, question in paper])
    right = [is_right(q.family, q, answer) for (_, q), answer in zip(paper, answers, strict=True)]
    assert np.mean(right) > 0.5
    assert read_log(root / INSTRUCTBLIP / "queries.jsonl")[-1]["step"] == QUERIES_STEPS
