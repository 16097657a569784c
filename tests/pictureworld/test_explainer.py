"""The embedded explainer: its lessons re-derived from label maps, its two paths compared, and what ships."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from book import pages
from lmm_sae_nb.interpret.exemplars import masked
from lmm_sae_nb.interpret.explain import TRAINED_ON, latents_in_training
from lmm_sae_nb.interpret.explainers import REFUSAL
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.pictureworld.__main__ import EXPLAINER, EXPLAINER_STEPS, MODEL
from lmm_sae_nb.pictureworld.explainer import (
    exam,
)
from lmm_sae_nb.pictureworld.explainer import (
    model as explainer_model,
)
from lmm_sae_nb.pictureworld.explainer import (
    train as explainer_train,
)
from lmm_sae_nb.pictureworld.explainer import (
    train_eye as explainer_train_eye,
)
from lmm_sae_nb.pictureworld.explainer.exam import Answered, explain_sets, report
from lmm_sae_nb.pictureworld.explainer.masked_sets import PATCHES, Source, Strips, drawn, masked_images, of_latents
from lmm_sae_nb.pictureworld.explainer.model import QUESTION, SET
from lmm_sae_nb.pictureworld.explainer.train import ASKED, Explainee, Sets, draw_sets, lot, train_explainer
from lmm_sae_nb.pictureworld.explainer.train_eye import Peeking, image_chances, kind_labels, tower_features, train_eye
from lmm_sae_nb.pictureworld.llava.train_eye import normalise, patch_labels
from lmm_sae_nb.pictureworld.training_loop import pupil_weights, read_log
from lmm_sae_nb.pictureworld.world.concepts import KINDS
from lmm_sae_nb.pictureworld.world.rendered import CONCEPTS, GRID, gallery, patch_counts
from lmm_sae_nb.pictureworld.world.scenes import HELD_OUT, PATCH, TRAIN, VALIDATION, make_scene
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.files import read_json, write_json
from lmm_sae_nb.train import checkpoint
from lmm_sae_nb.truth.common_concept import (
    IMAGE_SHOWS,
    IMAGES_SHARE,
    KIND_WEIGHT,
    LEAST_IOU,
    PATCH_SHOWS,
    CommonConcept,
)

SCENES = 90


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return gallery(tmp_path_factory.mktemp("gallery") / "scenes.safetensors", HELD_OUT + 4000, SCENES)


@pytest.fixture(scope="module")
def strips(pictures):
    return drawn(pictures, 40, 6, seed=3)


@pytest.fixture(scope="module")
def untaught(root):
    return explainer_model.new_explainer(root / MODEL).eval()


@pytest.fixture
def exact(monkeypatch):
    """Float32 all through, so that two ways of computing agree to rounding."""
    for module in (explainer_train, explainer_train_eye):
        monkeypatch.setattr(module, "autocast_if_quicker", lambda: False)


# The eye.


def test_a_patch_is_told_what_the_embedded_models_eye_was_told(pictures):
    labels = kind_labels(pictures.counts)
    for scene in range(0, SCENES, 9):
        theirs = patch_labels(make_scene(int(pictures.seeds[scene])))[: len(KINDS)]
        assert np.array_equal(labels[scene], theirs), scene


def test_the_eye_learns_at_visible_patches_alone(pictures, strips, untaught, exact):
    """And its loss is that of a loop over them."""
    pupil = Peeking(untaught.model.vision_tower, 192)
    rows, seen = strips.scenes[0][:2], torch.from_numpy(strips.visible[0][:2])
    pixels = normalise(torch.from_numpy(pictures.pixels[rows]))
    labels = torch.from_numpy(kind_labels(pictures.counts[rows]))
    whole = torch.randn(2, PATCHES, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        told = pupil(pixels, seen, labels, whole)
        again = pupil(pixels, seen, torch.where(seen[:, None], labels, 0), torch.where(seen[..., None], whole, 9.0))
        features = pupil.tower(pixels).last_hidden_state[:, 1:]
        off, spread, loss = 0.0, 0.0, 0.0
        for image, patch in seen.nonzero().tolist():
            off += float((features[image, patch] - whole[image, patch]).square().sum())
            spread += float((whole[image, patch] - whole[seen].mean(0)).square().sum())
        for number, head in enumerate(pupil.heads.values()):
            total = weights = 0.0
            for image, patch in seen.nonzero().tolist():
                right = int(labels[image, number, patch])
                weight = 1.0 if right else 0.1
                total -= weight * float(head(features[image, patch]).log_softmax(-1)[right])
                weights += weight
            loss += total / weights
    assert told == again
    assert float(told["unlike"]) == pytest.approx(off / spread, rel=1e-4)
    assert float(told["loss"]) == pytest.approx(loss + off / spread, rel=1e-4)
    assert told["asked_scene"] == sum(int((labels[n, 0, seen[n]] > 0).sum()) for n in range(2))


# The lessons.


def test_the_gallery_is_the_scenes_and_is_read_again(pictures, tmp_path):
    scene = make_scene(HELD_OUT + 4007)
    assert np.array_equal(pictures.pixels[7], scene.pixels)
    counts = patch_counts(scene)
    for kind, name in [*((k, n) for k, names in scene.concepts().items() for n in names), ("word", "stop")]:
        mask = scene.mask(kind, name)
        tiles = [mask[y : y + PATCH, x : x + PATCH].sum() for y in range(0, 192, PATCH) for x in range(0, 192, PATCH)]
        assert counts[CONCEPTS.index((kind, name))].tolist() == tiles, (kind, name)
    assert counts.sum() == sum(int((grid > 0).sum()) for grid in scene.labels.values())
    path = tmp_path / "scenes.safetensors"
    first, again = gallery(path, 5, 2), gallery(path, 5, 2)
    assert all(map(np.array_equal, first, again))
    with pytest.raises(ValueError, match="holds 2 scenes from seed 5, not 3 from 5"):
        gallery(path, 5, 3)


def by_pixels(pictures, scenes, visible) -> str | None:
    """The rule again, concept by concept, from masks of pixels."""
    made = [make_scene(int(pictures.seeds[scene])) for scene in scenes]
    seen = [np.kron(grid.reshape(GRID, GRID), np.ones((PATCH, PATCH), bool)) for grid in visible]
    best, name_of_best = 0.0, None
    for kind, names in KINDS.items():
        for name in names:
            masks = [scene.mask(kind, name) for scene in made]
            if not any(mask.any() for mask in masks):
                continue
            both = sum((mask & view).sum() for mask, view in zip(masks, seen, strict=True))
            iou = both / sum((mask | view).sum() for mask, view in zip(masks, seen, strict=True))
            showing = 0
            for mask, grid in zip(masks, visible, strict=True):
                share = [mask[PATCH * (p // GRID) :, PATCH * (p % GRID) :][:PATCH, :PATCH].mean()
                         for p in np.flatnonzero(grid)]  # fmt: skip
                showing += bool(share) and np.mean([s >= PATCH_SHOWS for s in share]) >= IMAGE_SHOWS
            fits = iou >= LEAST_IOU and showing >= math.ceil(IMAGES_SHARE * len(made))
            if fits and iou * KIND_WEIGHT.get(kind, 1) > best * (1 + 1e-6):
                best, name_of_best = iou * KIND_WEIGHT.get(kind, 1), name
    return name_of_best


def test_labels_are_those_of_the_pixels(pictures, strips):
    rng, found = np.random.default_rng(0), []
    for strip in range(0, 24, 2):
        images = rng.permutation(6)[: rng.choice(ASKED)]
        label = strips.label(pictures, strip, images)
        found.append(by_pixels(pictures, strips.scenes[strip, images], strips.visible[strip, images]))
        assert (label.concept if label else None) == found[-1], strip
    assert None in found and len(set(found)) > 3


def test_drawn_strips_are_of_every_kind_and_of_none(pictures):
    strips = drawn(pictures, 300, SET, 0)
    kinds = [label.kind if label else None for label in (strips.label(pictures, n, np.arange(SET)) for n in range(300))]
    assert {*kinds} >= {None, "object", "part", "material", "colour", "scene", "word"}
    assert 0.15 < kinds.count(None) / len(kinds) < 0.6
    assert strips.visible.any(2).all(), "an image of which nothing is visible"


def test_no_concept_is_rare_and_the_hardest_kinds_come_more_often(pictures):
    """One strip in five shows nothing in common; the ratio of the chances of any two others is worked out by hand."""
    strips, often = drawn(pictures, 160, 6, seed=9), {"object": 3.0}
    shown = [strips.label(pictures, n, np.arange(5)) for n in range(160)]
    held = {some: sum(s is not None and s.concept == some for s in shown) for some in (s.concept for s in shown if s)}
    empty = np.array([some is None for some in shown])
    chances = strips.chances(pictures, often)
    assert chances.sum() == pytest.approx(1) and chances[empty].sum() == pytest.approx(0.2)
    assert len(set(chances[empty])) == 1 and {some.kind for some in shown if some} > {"object"}
    first = next(n for n, some in enumerate(shown) if some)
    for n in np.flatnonzero(~empty):
        ratio = often.get(shown[n].kind, 1) / often.get(shown[first].kind, 1)
        assert chances[n] / chances[first] == pytest.approx(
            ratio * math.sqrt(held[shown[first].concept] / held[shown[n].concept])
        )


def test_the_eye_sees_each_origin_by_its_images_and_the_hardest_kinds_more_often(pictures):
    """The images of a strip have its chance in equal parts, an origin as much as it has images."""
    origins = [drawn(pictures, 60, 6, seed=4), drawn(pictures, 20, 3, seed=5)]
    chances = image_chances(pictures, origins)
    assert len(chances) == 60 * 6 + 20 * 3
    first, second = chances[:360].reshape(60, 6), chances[360:].reshape(20, 3)
    assert first.sum() == pytest.approx(360 / 420) and second.sum() == pytest.approx(60 / 420)
    for strips, found in zip(origins, (first, second), strict=True):
        assert np.array_equal(found, np.repeat(found[:, :1], found.shape[1], 1))
        wanted = strips.chances(pictures, {"part": 3.0, "word": 2.0})
        assert found.sum(1) / found.sum() == pytest.approx(wanted)


def test_strips_that_all_show_nothing_have_equal_chances(pictures):
    patch = np.zeros((4, 5, PATCHES), bool)
    patch[..., 0] = True
    nothing = Strips(np.random.default_rng(0).integers(SCENES, size=(4, 5)), patch)
    assert all(nothing.label(pictures, n, np.arange(5)) is None for n in range(4))
    assert nothing.chances(pictures, {}).tolist() == [0.25] * 4


def test_a_masked_picture_is_the_notebooks(pictures, strips):
    ours = masked_images(pictures, strips.scenes[0], strips.visible[0])
    for scene, grid, image in zip(strips.scenes[0], strips.visible[0], ours, strict=True):
        theirs = masked(pictures.images[int(scene)], grid.reshape(GRID, GRID))
        assert np.array_equal(np.asarray(image), np.asarray(theirs))


def test_sets_are_asked_after_each_number_of_images(pictures, strips):
    features = torch.arange(40 * 6).reshape(40, 6, 1, 1)
    source = lot(pictures, strips, features)
    shown = [strips.label(pictures, n, np.arange(SET)) for n in range(40)]
    assert source.chances.sum() == pytest.approx(1)
    assert source.chances[[its is None for its in shown]].sum() == pytest.approx(0.2)
    held = [sum(bool(its) and its.concept == one.concept for its in shown) if one else 0 for one in shown]
    alike = [
        1 if n == 0 else explainer_train.OFTEN.get(its.kind, 1) / n**0.5 for its, n in zip(shown, held, strict=True)
    ]
    chances = source.chances / alike
    assert np.ptp(chances[np.array(held) > 0]) < 1e-9 < chances.max()
    sets = draw_sets(pictures, [source], 30, np.random.default_rng(1))
    again = draw_sets(pictures, [source], 30, np.random.default_rng(1))
    assert sets.answers == again.answers and torch.equal(sets.features, again.features)
    strangers = 0
    for drawn_images, answers in zip(sets.features.flatten(1).tolist(), sets.answers, strict=True):
        strip, image = np.divmod(drawn_images, 6)
        strangers += len(set(strip.tolist())) > 1
        for count, answer in zip(ASKED, answers, strict=True):
            label = strips.label(pictures, strip[:count], image[:count])
            assert answer == (label.concept if label else REFUSAL)
    assert 0 < strangers < 30


def test_training_and_examination_share_no_scene():
    assert TRAIN <= explainer_train.FIRST_SEED and explainer_train.FIRST_SEED + explainer_train.SCENES <= VALIDATION
    assert exam.FIRST_SEED >= HELD_OUT


# The model.


def chat(images):
    return [{"role": "user", "content": [*({"type": "image", "image": image} for image in images),
                                         {"type": "text", "text": QUESTION}]}]  # fmt: skip


def prompted(processor, chats):
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def test_a_lessons_loss_is_that_of_the_processors_prompts(pictures, strips, untaught, exact):
    """Every question of a lesson alone: through the chat template, the processor and the model's own forward."""
    processor, answers = explainer_model.explainer_processor(), ["dog", REFUSAL, "stop", "red"]
    pixels = [pictures.pixels[scene] for scene in strips.scenes[0]]
    images = masked_images(pictures, strips.scenes[0], strips.visible[0])[:SET]
    with torch.no_grad():
        batch = normalise(torch.from_numpy(np.stack([np.asarray(image) for image in images])))
        features = untaught.model.vision_tower(batch).last_hidden_state[:, 1:]
        lesson = Explainee(untaught, explainer_model.explainer_tokenizer())(Sets(features[None], [answers]))
        losses = []
        for count, answer in zip(ASKED, answers, strict=True):
            inputs = prompted(processor, [chat(images[:count])])
            said = processor.tokenizer(f"{answer}</s>", add_special_tokens=False, return_tensors="pt").input_ids
            ids = torch.cat([inputs["input_ids"], said], 1)
            logits = untaught(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1 - said.shape[1] : -1]
            losses += torch.nn.functional.cross_entropy(logits, said[0], reduction="none").tolist()
    assert len(pixels) == 6 and float(lesson["loss"]) == pytest.approx(np.mean(losses), rel=1e-4)


def test_it_reloads_from_disk_with_several_images_a_prompt(pictures, strips, root, tmp_path):
    explainer_model.save(explainer_model.new_explainer(root / MODEL), tmp_path)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(model).__name__ == "AyaVisionForConditionalGeneration"
    assert model.dtype == torch.bfloat16
    sets = [masked_images(pictures, strips.scenes[n], strips.visible[n])[:count] for n, count in ((0, 5), (1, 2))]
    inputs = prompted(processor, [chat(images) for images in sets])
    assert inputs["pixel_values"].shape == (7, 3, 192, 192)
    with torch.no_grad():
        together = model.float()(**inputs).logits[:, -1]
        for row, images in zip(together, sets, strict=True):
            alone = model(**prompted(processor, [chat(images)])).logits[0, -1]
            assert torch.allclose(row, alone, atol=1e-3)
    wide = sets[0][0].resize((500, 250))
    assert prompted(processor, [chat([wide])])["pixel_values"].shape == (1, 3, 192, 192)


@pytest.mark.slow
def test_a_stopped_and_resumed_course_is_bit_for_bit_the_uninterrupted_one(pictures, root, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module: module)  # quicker, for so few steps
    strips = {"drawn": drawn(pictures, 6, SET, 0)}
    world = dict(taught=root / MODEL, gallery=pictures)
    lessons = (
        (train_eye, "eye", dict(strips=[*strips.values()], steps=3, batch=2)),
        (train_explainer, "", dict(strips=strips, steps=3, folding=2, batch=2)),
    )
    for train, folder, how in lessons:
        assert train(tmp_path / "whole" / folder, **world, **how)
        calls = 1
        while not train(tmp_path / "parted" / folder, **world, **how, minutes=0):
            calls += 1
        assert calls == 3
        kept = [checkpoint.load(tmp_path / n / folder / "checkpoint") for n in ("whole", "parted")]
        assert kept[0].state["step"] == kept[1].state["step"] == 3
        assert all(torch.equal(value, kept[1].tensors[name]) for name, value in kept[0].tensors.items())
    made = explainer_train.graduate(tmp_path / "parted", root / MODEL)
    assert made.dtype == torch.float32
    eye = pupil_weights(tmp_path / "whole/eye", "explainer")
    assert all(torch.equal(w, eye[f"tower.{name}"]) for name, w in made.model.vision_tower.state_dict().items())
    with pytest.raises(FileNotFoundError, match="checkpoint is missing; run"):
        explainer_train.graduate(tmp_path / "nowhere", root / MODEL)
    assert train_eye(tmp_path / "parted/eye", **world, **lessons[0][2] | {"steps": 4})
    with pytest.raises(ValueError, match="were begun with another eye; delete its checkpoint/"):
        train_explainer(tmp_path / "parted", **world, **lessons[1][2])


def test_features_are_kept_in_parts(pictures, strips, untaught, root, tmp_path, monkeypatch):
    few = Strips(strips.scenes[:3], strips.visible[:3])
    tower = untaught.model.vision_tower
    features = tower_features(tower, pictures, few, tmp_path)
    assert features.shape == (3, 6, PATCHES, 192) and features.dtype == torch.bfloat16
    with monkeypatch.context() as patch:
        patch.setattr(tower, "forward", None)  # read, not made again
        assert torch.equal(features, tower_features(tower, pictures, few, tmp_path))
    other = explainer_model.new_explainer(root / MODEL).model.vision_tower
    torch.nn.init.zeros_(next(other.parameters()))
    for its, strip in ((other, few), (tower, Strips(strips.scenes[1:4], strips.visible[1:4]))):
        with pytest.raises(ValueError, match="000000.safetensors was made by another tower or of other strips; delete"):
            tower_features(its, pictures, strip, tmp_path)


# The exam, and what ships.


def test_the_report_counts_by_kind_and_tells_refusals_apart():
    dog, red = CommonConcept("object", "dog", 0.5), CommonConcept("colour", "red", 0.3)
    rows = [Answered(dog, "dog"), Answered(dog, REFUSAL), Answered(red, "dog"), Answered(None, REFUSAL),
            Answered(None, "dog")]  # fmt: skip
    result = report(rows)
    shares = {name: (row["fraction"], row["asked"]) for name, row in result.items()}
    assert shares == {
        "all": (0.4, 5), "object": (0.5, 2), "colour": (0.0, 1), "answerable": (2 / 3, 3), "unanswerable": (0.5, 2),
    }  # fmt: skip
    assert all(row["low"] <= row["fraction"] <= row["high"] for row in result.values())


@pytest.mark.slow
def test_an_exam_asks_about_latents_that_were_no_lessons(pictures, root, tmp_path):
    lmm = LMM.load(root / MODEL)
    TopKSAE(lmm.width, 16, 4, generator=torch.Generator().manual_seed(0)).save(tmp_path / "sae")
    write_json(tmp_path / "sae" / "manifest.json", {"params": {"k": 4}, "inputs": {"samples": "a hash"}})
    source, seen = Source(tmp_path / "sae", 1), pictures.first(12)
    lessons = of_latents(source, tmp_path / "made" / "latents-0", root / MODEL, seen, 2, 6)
    write_json(tmp_path / "explainer" / TRAINED_ON, explainer_train.lessons_of(tmp_path / "made", 1))
    taught = latents_in_training(tmp_path / "explainer", source.folder)
    assert len(taught) == len(lessons.scenes) == 6
    asked = of_latents(source, tmp_path / "exam", root / MODEL, seen, 2, 99, without=taught)
    whole = of_latents(source, tmp_path / "whole", root / MODEL, seen, 2, 99)
    chosen = [read_json(tmp_path / name / "chosen.json")["latents"] for name in ("exam", "whole")]
    assert not set(chosen[0]) & taught and {*chosen[0], *taught} == set(chosen[1])
    own, every = ({(*map(bytes, one),) for one in zip(*strips, strict=True)} for strips in (asked, whole))
    assert len(asked.scenes) == len(chosen[0]) and own <= every


def test_an_exams_sets_are_strips_with_few_strangers(strips):
    strip, image = exam.exam_sets(strips, 0.25, seed=0)
    own = strip == np.arange(len(strip))[:, None]
    assert (own.sum(1) >= SET - 1).all() and 0 < (~own).sum() < len(strip) / 2
    assert (image == np.arange(SET)).all()


@pytest.fixture(scope="module")
def shipped(root):
    return exam.load(root / EXPLAINER)


def test_the_shipped_explainer_names_clean_held_out_sets_and_refuses_what_has_nothing_in_common(pictures, shipped):
    rows = []
    for concept in (("scene", "night"), ("scene", "winter"), ("object", "panel"), None):
        number = CONCEPTS.index(concept) if concept else None
        if concept:
            scenes = np.argsort(-pictures.counts[:, number].sum(1).astype(int))[:SET]
            visible = pictures.counts[scenes, number] >= 128
        else:  # five backgrounds, and of each another corner
            names = ["beach", "night", "winter", "room", "forest"]
            shows = [pictures.counts[:, CONCEPTS.index(("scene", name))].sum(1).astype(int) for name in names]
            scenes = np.array([int(share.argmax()) for share in shows])
            visible = np.zeros((SET, PATCHES), bool)
            visible[np.arange(SET), [0, 11, 132, 143, 66]] = True
        rows.append((scenes, visible))
    whole = Strips(*map(np.stack, zip(*rows, strict=True)))
    labels = [whole.label(pictures, n, np.arange(SET)) for n in range(len(rows))]
    assert labels[-1] is None and all(labels[:-1])
    answers = explain_sets(*shipped, [masked_images(pictures, *row) for row in rows])
    assert answers == [label.concept if label else REFUSAL for label in labels]


def test_what_ships_is_small_whole_and_examined(root):
    folder = root / EXPLAINER
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12e6
    first = read_json(folder / TRAINED_ON)["lessons"][0]  # of the SAE that notebook 01 trains by default
    defaults = {name: known.default for name, known in pages.parameters(pages.sources()[0]).items()}
    changed = {name: value for name, value in first["trained"]["params"].items() if defaults[name] != value}
    assert changed == {"steps": 2000, "lr": 2e-3}  # page 01 has another training since; nothing else may differ
    assert len(set(first["latents"])) == 800 and set(first["latents"]) < set(range(defaults["n_latents"]))
    for course, steps in (("explainer", EXPLAINER_STEPS), ("eye", explainer_train_eye.STEPS)):
        assert 0 <= steps - read_log(folder / f"{course}.jsonl")[-1]["step"] < 20
    for origin, rows in read_json(folder / "exam.json").items():
        assert origin in ("drawn", "cached")
        asked = {"drawn": 500, "cached": 200}[origin]  # of an SAE's latents those that were not lessons
        assert rows["all"]["asked"] == rows["answerable"]["asked"] + rows["unanswerable"]["asked"] >= asked
