"""The segmenter and the similarity: what they are taught is true, training goes on where it was, what ships works."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPModel, CLIPSegForImageSegmentation

from lmm_sae_nb.pictureworld.llava.train_eye import normalise
from lmm_sae_nb.pictureworld.scorers import clip, clipseg
from lmm_sae_nb.pictureworld.scorers import exam as scorers_exam
from lmm_sae_nb.pictureworld.scorers.clip import (
    Likener,
    Views,
    blackened,
    contrast,
    regions,
    shown_names,
    train_similarity,
)
from lmm_sae_nb.pictureworld.scorers.clipseg import LEAST, NAMES, Pointer, Prompts, train_segmenter
from lmm_sae_nb.pictureworld.training_loop import read_log
from lmm_sae_nb.pictureworld.world.concepts import KINDS
from lmm_sae_nb.pictureworld.world.scenes import HELD_OUT, PATCH, SIDE, VALIDATION, make_scene, make_signs
from lmm_sae_nb.score.segmenters import PromptedSegmenter
from lmm_sae_nb.score.similarity import ImageTextSimilarity, clip_score
from lmm_sae_nb.support.files import read_json
from lmm_sae_nb.train import checkpoint

seeds = st.integers(0, VALIDATION - 1)


def pixels_of(scene, name):
    """Every pixel that shows the name, found one kind and one label at a time."""
    shown = np.zeros((SIDE, SIDE), bool)
    for kind, names in KINDS.items():
        for number, other in enumerate(names, start=1):
            if other == name:
                for row, column in np.argwhere(scene.labels[kind] == number):
                    shown[row, column] = True
    return shown


# ---- what is taught -------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_targets_are_the_label_maps(seed):
    scene = make_scene(seed)
    every = {name: pixels_of(scene, name) for name in NAMES}
    assert clipseg.areas(scene) == {
        name: sum(int((scene.labels[k] == 1 + names.index(name)).sum()) for k, names in KINDS.items() if name in names)
        for name, shown in every.items()
        if shown.any()
    }
    for name in clipseg.ask_about(scene, np.random.default_rng(seed)):
        assert np.array_equal(clipseg.target(scene, name), every[name])


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_concepts_are_asked_about_that_are_large_enough_or_absent(seed):
    scene = make_signs(seed)
    asked = clipseg.ask_about(scene, np.random.default_rng(seed))
    sizes = [np.count_nonzero(pixels_of(scene, name)) for name in asked]
    assert len(set(asked)) == clipseg.ASKED
    assert all(size == 0 or size >= LEAST for size in sizes)
    assert 0 < np.count_nonzero(sizes) <= clipseg.PRESENT


def test_the_streams_are_functions_of_their_first_seed_and_never_held_out():
    one, two = iter(Prompts(0)), iter(Prompts(2))
    next(one), next(one)
    assert all(torch.equal(a, b) for a, b in zip(next(one), next(two), strict=True))
    pixels, numbers, masks = next(iter(Prompts(800_000 + 3)))  # the seeds begin again, and stay below validation
    scene = clipseg._TURNS[3 % len(clipseg._TURNS)](3)
    assert np.array_equal(pixels, scene.pixels)
    for number, mask in zip(numbers, masks, strict=True):
        assert np.array_equal(mask, pixels_of(scene, NAMES[number]))


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_views_show_what_they_are_said_to_show(seed):
    scene, rng = make_scene(seed), np.random.default_rng(seed)
    for name, lit in regions(scene, 3, rng):
        picture = blackened(scene.pixels, lit)
        for row, column in np.ndindex(lit.shape):
            window = np.s_[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            assert np.array_equal(picture[window], scene.pixels[window] * lit[row, column])
        visible = lit.repeat(PATCH, 0).repeat(PATCH, 1)
        assert (pixels_of(scene, name) & visible).any()
        shown = shown_names(scene, lit)
        for other in rng.permutation(NAMES)[:20]:
            kinds = [k for k, names in KINDS.items() if other in names]
            count = sum(int((visible & scene.mask(kind, other)).sum()) for kind in kinds)
            assert shown[NAMES.index(other)] == (1 if count >= LEAST else -1 if count else 0)


def test_a_view_is_read_through_its_visible_patches_first():
    tokenizer = clipseg.clip_tokenizer()
    pixels, kept, *_ = next(iter(Views(1, tokenizer)))
    for view, patches in zip(pixels[1:], kept[1:], strict=True):
        grid = view.reshape(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH, 3).permute(0, 2, 1, 3, 4).flatten(0, 1)
        lit = grid.flatten(1).any(1).nonzero().flatten().tolist()
        assert set(lit[: clip.KEPT]) <= set(patches.tolist()) or len(lit) > clip.KEPT
    assert all(len(set(patches.tolist())) == clip.KEPT for patches in kept)


def test_contrast_by_hand():
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.5, 0.0, -1.0]])
    shown = torch.tensor([[1, 0, 0], [1, 1, 0]])
    weight = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]])
    e = np.exp
    expected = -(
        np.log(e(2) / (e(2) + e(1) + 1)) + 0.5 * np.log(e(0.5) / (e(0.5) + e(-1))) + 0.5 * np.log(1 / (1 + e(-1)))
    )
    assert contrast(scores, shown, weight).item() == pytest.approx(expected / 2, abs=1e-6)
    shown[0, 2] = -1  # does not count
    expected += np.log(e(2) / (e(2) + e(1) + 1)) - np.log(e(2) / (e(2) + e(1)))
    assert contrast(scores, shown, weight).item() == pytest.approx(expected / 2, abs=1e-6)


# ---- training -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_training_sees_what_the_models_own_forward_sees(root):
    torch.manual_seed(0)
    tokenizer = clipseg.clip_tokenizer()
    scenes = [make_scene(seed) for seed in (1, 2)]
    pixels = normalise(torch.stack([torch.from_numpy(scene.pixels) for scene in scenes]))
    pointer = Pointer(clipseg.new_model(tokenizer), tokenizer).eval()
    numbers = torch.tensor([[3, 100], [7, 200]])
    logits = pointer.logits(pixels, numbers)
    for row, column in np.ndindex(2, 2):
        words = tokenizer(NAMES[numbers[row, column]], return_tensors="pt")
        alone = pointer.model(pixel_values=pixels[[row]], **words).logits
        assert torch.allclose(logits[row, column], alone.reshape(SIDE, SIDE), atol=1e-4)
    likener = Likener(clip.new_model(tokenizer), tokenizer).eval()
    everything = torch.arange((SIDE // PATCH) ** 2).expand(2, -1)
    views, words = likener.look(pixels, everything), likener.read(likener.ids, likener.mask)
    output = likener.model(input_ids=likener.ids, attention_mask=likener.mask, pixel_values=pixels)
    assert torch.allclose(views @ words.T * likener.model.logit_scale.exp(), output.logits_per_image, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("train", [train_segmenter, train_similarity])
def test_a_stopped_and_resumed_training_is_bit_for_bit_the_uninterrupted_one(train, root, tmp_path, monkeypatch):
    monkeypatch.setattr(clipseg, "ASKED", 3)
    monkeypatch.setattr(clipseg, "PRESENT", 2)
    course = {"lmm": root / "data/models/tiny-llava-next", "steps": 3, "batch": 2}
    assert train(tmp_path / "whole", **course)
    stops = 0
    while not train(tmp_path / "parted", **course, minutes=0):
        stops += 1
    assert stops == 2
    whole, parted = (checkpoint.load(tmp_path / name / "checkpoint") for name in ("whole", "parted"))
    assert whole.state["step"] == parted.state["step"] == 3
    assert all(torch.equal(whole.tensors[name], weight) for name, weight in parted.tensors.items())
    moved = [name for name, weight in finished_like(train).items() if not torch.equal(weight, whole.tensors[name])]
    assert moved, "training changed nothing"


def finished_like(train):
    """The weights that a course of this kind starts from, but for the tower and the whitening."""
    torch.manual_seed(0)
    tokenizer = clipseg.clip_tokenizer()
    if train is train_segmenter:
        pupil = Pointer(clipseg.new_model(tokenizer), tokenizer)
        return {n: w for n, w in pupil.state_dict().items() if "vision_model" not in n and "reduces" not in n}
    pupil = Likener(clip.new_model(tokenizer), tokenizer)
    return {n: w for n, w in pupil.state_dict().items() if "vision_model" not in n}


def test_the_segmenters_tower_is_the_lmms_and_stays_so(root):
    shipped = CLIPSegForImageSegmentation.from_pretrained(root / "data/models/tiny-clipseg", dtype=torch.float32)
    lent = clipseg.new_model(clipseg.clip_tokenizer()).clip.vision_model
    clipseg.lend_tower(lent, root / "data/models/tiny-llava-next")
    for name, weight in lent.state_dict().items():
        assert torch.equal(shipped.clip.vision_model.state_dict()[name], weight), name


def test_what_is_missing_is_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="start from its vision tower"):
        clipseg.lend_tower(torch.nn.Linear(1, 1), tmp_path)
    with pytest.raises(FileNotFoundError, match="pictureworld segmenter"):
        clipseg.finished(tmp_path)
    with pytest.raises(FileNotFoundError, match="pictureworld similarity"):
        clip.finished(tmp_path)


def test_whitened_reductions_are_uncorrelated_and_of_unit_spread(root):
    torch.manual_seed(0)
    model = clipseg.new_model(clipseg.clip_tokenizer())
    clipseg.lend_tower(model.clip.vision_model, root / "data/models/tiny-llava-next")
    pixels = normalise(torch.stack([torch.from_numpy(make_scene(seed).pixels) for seed in range(6)]))
    clipseg.whiten(model, pixels)
    with torch.no_grad():
        hidden = model.clip.vision_model(pixels, output_hidden_states=True).hidden_states
        deepest = model.decoder.reduces[0](hidden[max(clipseg.READ) + 1][:, 1:].flatten(0, 1))
    assert torch.allclose(torch.cov(deepest.T), torch.eye(deepest.shape[1]), atol=0.02)
    assert torch.allclose(deepest.mean(0), torch.zeros(deepest.shape[1]), atol=0.01)


# ---- the command and what ships -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("command", ["segmenter", "similarity"])
def test_the_command_trains_ships_and_examines(command, root, tmp_path, monkeypatch):
    asked = SimpleNamespace(
        command=command, courses=tmp_path, lmm=root / "data/models/tiny-llava-next", steps=20, minutes=0.0,
        model=tmp_path / "shipped", scenes=25,
    )  # fmt: skip
    quick = {"segmenter": (clipseg, "train_segmenter"), "similarity": (clip, "train_similarity")}
    module, name = quick[command]
    train = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given, **options: train(*given, batch=1, **options))
    scorers_exam.learn(asked)
    assert not asked.model.exists(), "nothing ships before the last step"
    asked.minutes = np.inf
    if command == "segmenter":  # its exam is long, and is tested on the model that ships
        monkeypatch.setattr(scorers_exam, "examine_segmenter", lambda segment, scenes: {"scenes": scenes})
    scorers_exam.learn(asked)
    loaded = {"segmenter": PromptedSegmenter, "similarity": ImageTextSimilarity}[command].load(asked.model)
    assert loaded.model.dtype == torch.float32
    assert read_json(asked.model / "exam.json")
    assert [row["step"] for row in read_log(asked.model / f"{command}.jsonl")] == [20]


def test_the_exam_marks_masks_as_they_are():
    """A segmenter that knows the truth, and one that always answers with the whole picture."""

    def oracle(images, concepts):
        scene = next(s for s in drawn if np.array_equal(s.pixels, np.asarray(images[0])))
        masks = [clipseg.target(scene, name)[None] for name in concepts]
        return [(mask[mask.any((1, 2))], None) for mask in masks]

    def everything(images, concepts):
        return [(np.ones((1, SIDE, SIDE), bool), None) for _ in concepts]

    drawn = [make_scene(HELD_OUT + n) for n in range(60)]
    perfect = scorers_exam.examine_segmenter(oracle, len(drawn))
    assert all(row["iou"] == 1 and row["false_alarm"] == 0 == row["false_area"] for row in perfect.values())
    assert perfect["total"]["asked"] == sum(row["asked"] for kind, row in perfect.items() if kind != "total")
    blind = scorers_exam.examine_segmenter(everything, len(drawn))
    assert all(row["false_alarm"] == 1 == row["false_area"] and row["iou"] < 1 for row in blind.values())
    assert blind["scene"]["iou"] > blind["part"]["iou"]


def test_captions_are_matched_by_hand():
    row = scorers_exam._caption_row(np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1], [0.1, 0.7, 0.8]]))
    assert (row["caption_of_image"], row["image_of_caption"]) == (2 / 3, 2 / 3) and row["asked"] == 3


def test_the_shipped_segmenter_finds_what_is_there(root):
    folder = root / "data/models/tiny-clipseg"
    assert (folder / "model.safetensors").stat().st_size <= 6_000_000
    segment = PromptedSegmenter.load(folder)
    overlaps, alarms = [], 0
    for seed in range(HELD_OUT, HELD_OUT + 8):
        scene, rng = make_scene(seed), np.random.default_rng(seed)
        there = [name for _, name in scorers_exam._present(scene, rng)]
        asked = there + [name for _, name in scorers_exam._absent(scene, rng)]
        found = [masks.any(0) for masks, _ in segment([scene.image] * len(asked), asked)]
        for name, mask in zip(asked, found, strict=True):
            truth = pixels_of(scene, name)
            overlaps += [(mask & truth).sum() / (mask | truth).sum()] if name in there else []
            alarms += name not in there and mask.mean() > 0.05
    exam = read_json(folder / "exam.json")
    assert exam.keys() == {*KINDS, "total"} and all(row["asked"] >= 15 for row in exam.values())
    assert np.mean(overlaps) == pytest.approx(exam["total"]["iou"], abs=0.15)
    assert alarms <= 8 * 8 / 2


def test_the_shipped_similarity_tells_what_is_there(root):
    folder = root / "data/models/tiny-clip"
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000
    assert CLIPModel.from_pretrained(folder).dtype == torch.bfloat16
    similarity = ImageTextSimilarity.load(folder)
    drawn = [make_scene(HELD_OUT + n) for n in range(12)]
    backgrounds = sorted({scene.background for scene in drawn} - {"blank"})
    scores = np.array([clip_score(similarity([s.image] * len(backgrounds), backgrounds)) for s in drawn])
    for scene, row in zip(drawn, scores, strict=True):
        if scene.background in backgrounds:
            own = row[backgrounds.index(scene.background)]
            assert own > np.median(row)
    exam = read_json(folder / "exam.json")
    assert exam.keys() == {*KINDS, "total", "caption"}
    assert exam["total"]["score_whole_low"] > exam["total"]["score_random_high"]


@pytest.mark.parametrize("folder, log", [("tiny-clipseg", "segmenter"), ("tiny-clip", "similarity")])
def test_shipped_logs_reach_the_end_of_their_courses(root, folder, log):
    from lmm_sae_nb.pictureworld.__main__ import SIGHT

    rows = read_log(root / "data/models" / folder / f"{log}.jsonl")
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and SIGHT[log][0] - steps[-1] < 20
