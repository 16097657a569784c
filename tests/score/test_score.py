"""Scores against counting by hand, and against other libraries."""

import json
import math

import grounders
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from models import make, noise
from PIL import Image

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.interpret.exemplars import Exemplar, exemplars, most_activated, upsample
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.score import clip, judges, tables
from lmm_sae_nb.score import iou as score_iou
from lmm_sae_nb.score import ratings as score_ratings
from lmm_sae_nb.score.clip import latents_clip
from lmm_sae_nb.score.iou import Compared, latent_iou
from lmm_sae_nb.score.masks import (
    PAPER,
    STRICT,
    Numbered,
    Spot,
    activation_mask,
    concept_mask,
    iou,
    ious,
    moved,
    spots,
)
from lmm_sae_nb.score.ratings import kappa
from lmm_sae_nb.score.segmenters import BoxSegmenter, Candidates, PromptedSegmenter
from lmm_sae_nb.score.similarity import ImageTextSimilarity
from lmm_sae_nb.score.tables import explained
from lmm_sae_nb.support.intervals import mean_interval
from lmm_sae_nb.truth.label_maps import TrueMasks

CONCEPTS = {"object": ["cat", "dog"], "face": ["happy"], "word": ["happy"]}
GRIDS = arrays(np.float32, (4, 4), elements=st.sampled_from([0.0, 0.1, 0.2, 0.26, 0.5, 1.0]))
MODES = pytest.mark.parametrize("mode", [PAPER, STRICT], ids=lambda mode: mode.name)


def exemplar(index: int, visible: np.ndarray, size: int = 8, colour=(9, 9, 9)) -> Exemplar:
    image = Image.new("RGB", (size, size), colour)
    return Exemplar(index, image, visible.astype(np.float32), visible)


def row(**grids: np.ndarray) -> dict:
    empty = np.zeros((8, 8), np.uint8)
    return {kind: Image.fromarray(grids.get(kind, empty)) for kind in CONCEPTS}


def corner(rows: int, columns: int) -> np.ndarray:
    found = np.zeros((4, 4), bool)
    found[:rows, :columns] = True
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Segmenters and a CLIP of the true classes, with random weights, on disk."""
    folder = tmp_path_factory.mktemp("models")
    makes = (grounders.clipseg, grounders.clip, grounders.grounding_dino, grounders.sam)
    return {make.__name__: str(grounders.save(make, folder / make.__name__)) for make in makes}


# Masks.


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1))
def test_iou_counts_pixels(a, b):
    """Against Python's own sets."""
    one, two = ({i for i in range(16) if bits >> i & 1} for bits in (a, b))
    masks = [np.isin(np.arange(16), list(which)).reshape(4, 4) for which in (one, two)]
    assert iou(*masks) == pytest.approx(len(one & two) / len(one | two) if one | two else 0.0)
    assert iou(masks[1], masks[0]) == iou(*masks)


def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(3, 3\)"):
        iou(np.ones((2, 2), bool), np.ones((3, 3), bool))
    for wrong in (np.ones((1, 8, 6), bool), np.ones((6, 8), bool), np.ones((1, 6, 8), np.uint8)):
        with pytest.raises(ValueError, match=r"image of 8 x 6 pixels; it has to give bool of shape \(candidates, 6, 8"):
            concept_mask(wrong, (8, 6), STRICT)


def test_a_lone_patch_of_the_reference_code_becomes_780_pixels():
    """As measured on the reference code: 24 x 24 patches of 14 pixels."""
    lone = np.zeros((24, 24), np.float32)
    lone[11, 7] = 3.0
    assert activation_mask(Spot(0, (336, 336), lone), PAPER).sum() == 780
    assert activation_mask(Spot(0, (336, 336), lone), STRICT).sum() == 14 * 14


@given(GRIDS, st.sampled_from([(32, 32), (56, 40), (20, 36)]))
def test_activation_masks_are_those_that_torch_interpolates(activation, size):
    """Bilinear: torch's weights of what is inactive, of which the 8-bit picture cannot tell the last 1/448."""
    spot, grid = Spot(0, size, activation), torch.from_numpy(activation)[None, None]
    active = torch.nn.functional.interpolate((grid > 0).float(), size[::-1], mode="bilinear")[0, 0].numpy()
    found = activation_mask(spot, PAPER)
    assert found[active > 1.5 / 224].all()
    assert not found[active < 0.4 / 224].any()
    near = torch.nn.functional.interpolate((grid > 0.25 * grid.max()).float(), size[::-1], mode="nearest-exact")
    assert (activation_mask(spot, STRICT) == near[0, 0].bool().numpy()).all()


@given(arrays(bool, (5, 7)), st.integers(0, 2**32 - 1))
def test_a_mask_that_is_moved_keeps_its_area_and_its_shape(mask, seed):
    found = moved(mask, np.random.default_rng(seed))
    assert found.sum() == mask.sum()
    turned = [np.roll(mask, (down, right), (0, 1)) for down in range(5) for right in range(7)]
    assert any((found == one).all() for one in turned)


def test_a_mask_is_moved_anywhere():
    rng, lone = np.random.default_rng(0), np.eye(1, 12, dtype=bool).reshape(3, 4)
    assert {int(moved(lone, rng).argmax()) for _ in range(300)} == set(range(12))


def test_all_candidates_together_or_the_likeliest():
    first, second = np.zeros((2, 3), bool), np.zeros((2, 3), bool)
    first[0, 0] = second[1, 2] = True
    both = np.stack([first, second])
    assert (concept_mask(both, (3, 2), PAPER) == (first | second)).all()
    assert (concept_mask(both, (3, 2), STRICT) == first).all()
    for mode in (PAPER, STRICT):
        assert not concept_mask(both[:0], (3, 2), mode).any()


def brute_iou(activation: np.ndarray, candidates: np.ndarray, mode) -> float:
    """Pixel by pixel, with torch's interpolation (in eighths, which 8 bits tell apart)."""
    grid = torch.from_numpy(activation)[None, None]
    if mode is PAPER:
        active = torch.nn.functional.interpolate((grid > 0).double(), (8, 8), mode="bilinear")[0, 0] > 0
        wanted = {(y, x) for one in candidates for y in range(8) for x in range(8) if one[y, x]}
    else:
        active = torch.nn.functional.interpolate((grid > 0.25 * grid.max()).double(), (8, 8), mode="nearest")[0, 0] > 0
        wanted = {(y, x) for y in range(8) for x in range(8) if len(candidates) and candidates[0, y, x]}
    seen = {(y, x) for y in range(8) for x in range(8) if active[y, x]}
    return len(seen & wanted) / len(seen | wanted) if seen | wanted else 0.0


@MODES
@settings(max_examples=60)
@given(activation=GRIDS, candidates=st.integers(0, 3).flatmap(lambda n: arrays(bool, (n, 8, 8))))
def test_an_images_iou_is_that_of_brute_force(mode, activation, candidates):
    found = ious([Spot(0, (8, 8), activation)], "cat", lambda numbers, concept: [candidates], mode)
    assert found == pytest.approx([brute_iou(activation, candidates, mode)] if activation.any() else [0.0])


@MODES
def test_a_segmenter_is_not_asked_where_the_latent_is_silent_and_once_for_each_concept(mode):
    asked = []

    def segmenter(images, concepts):
        asked.append([(image.getpixel((0, 0))[0], concept) for image, concept in zip(images, concepts, strict=True)])
        return [Candidates(np.ones((1, 8, 8), bool), np.ones(1, np.float32)) for _ in images]

    images = [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(3)]
    where = Numbered(segmenter, images, room=3 * 64)
    places = [Spot(n, (8, 8), np.full((4, 4), float(n != 1), np.float32)) for n in (0, 1, 2, 0)]
    assert ious(places, "cat", where, mode).tolist() == [1, 0, 1, 1]
    ious(places[::-1], "cat", where, mode)
    assert asked == [[(0, "cat"), (2, "cat")]]
    ious(places, "dog", where, mode)
    ious(places[1:], "cat", where, mode)  # of four answers the one unused longest is no longer kept
    assert asked[1:] == [[(0, "dog"), (2, "dog")], [(2, "cat")]]
    assert ious(places[1:2], "bee", where, mode) == [0]
    assert len(asked) == 3


def test_what_is_larger_than_the_room_is_asked_again_and_nothing_found_is_kept():
    asked = []

    def segmenter(images, concepts):
        asked.append(concepts[0])
        masks = np.ones((int(concepts[0] == "cat"), 8, 8), bool)
        return [Candidates(masks, np.ones(len(masks), np.float32)) for _ in images]

    where = Numbered(segmenter, [Image.new("RGB", (8, 8))], room=63)
    for concept in ("cat", "cat", "dog", "dog"):
        assert len(where([0], concept)[0]) == (concept == "cat")
    assert asked == ["cat", "cat", "dog"]


def test_candidates_come_likeliest_first():
    masks = np.eye(3, dtype=bool)[:, None]
    found = Candidates(masks, np.array([0.2, 0.9, 0.2], np.float32))
    [ordered] = Numbered(lambda images, concepts: [found], [Image.new("RGB", (3, 1))])([0], "cat")
    assert (ordered == masks[[1, 0, 2]]).all()


# Ground truth.


def test_truth_finds_a_concept_in_every_kind_that_has_its_name():
    face, word = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    face[:2], word[6:] = 1, 1
    truth = TrueMasks([row(face=face, word=word)], CONCEPTS)
    assert truth.kinds_of("happy") == ["face", "word"]
    [found] = truth([0], "happy")
    assert found.shape == (1, 8, 8)
    assert found.sum() == 32
    with pytest.raises(ValueError, match="no ground truth for 'unicorn'"):
        truth([0], "unicorn")


def test_what_covers_a_patch_is_counted_in_pixels():
    """Brute force over every pixel, also where patches differ in size."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (8, 8)).astype(np.uint8)
    truth = TrueMasks([row(object=labels)], CONCEPTS)
    for grid in ((4, 4), (3, 5)):
        found = truth.covered(0, grid)
        assert found.shape == (4, grid[0] * grid[1])
        owner = {(y, x): (y * grid[0] // 8, x * grid[1] // 8) for y in range(8) for x in range(8)}
        for number, concept in ((1, 0), (2, 1)):
            for patch in range(grid[0] * grid[1]):
                inside = [at for at, of in owner.items() if of == divmod(patch, grid[1])]
                share = np.mean([labels[at] == number for at in inside])
                assert found[concept, patch] == pytest.approx(share)
        assert not found[2:].any()


def test_the_concepts_that_exemplars_share():
    cat, dog = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    cat[:4, :4], dog[:4, :4] = 1, 2
    truth = TrueMasks([row(object=cat), row(object=dog), row()], CONCEPTS)
    here = corner(2, 2)
    assert truth.common([exemplar(0, here)] * 4 + [exemplar(1, here)]) == {"cat"}
    assert truth.common([exemplar(0, here), exemplar(1, here)]) == set()
    assert truth.common([exemplar(1, here)]) == {"dog"}
    judge = judges.knowing(truth)
    assert judge([[exemplar(0, here)]] * 3, ["cat", "dog", "unicorn"]) == ["yes", "no", None]
    with pytest.raises(ValueError, match="no exemplars"):
        truth.common([])


def test_a_data_set_without_label_maps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="face.*or no `concepts`"):
        TrueMasks([{"object": None}], CONCEPTS)
    with pytest.raises(FileNotFoundError, match="make world"):
        TrueMasks([], tmp_path / "concepts.json")


# Which latents.


def test_only_what_is_explained_is_scored():
    truth = TrueMasks([row()], CONCEPTS)
    old = {"3": {"concept": "dog"}, "1": {"concept": "cat"}, "2": {"concept": None}, "4": {"concept": "unicorn"}}
    assert explained(old, truth) == {1: ("cat", "object"), 3: ("dog", "object")}
    assert list(explained(old)) == [1, 3, 4]
    new = {
        "5": {"outcome": "explained", "concept": "happy", "kind": "word"},
        "6": {"outcome": "failed", "concept": "cat", "kind": "object"},
        "7": {"outcome": "explained", "concept": "a red door", "kind": "part"},
        "8": {"outcome": "refused", "concept": None, "kind": None},
        "9": {"outcome": "explained", "concept": "cat", "kind": "object"},
    }
    assert explained(new, truth) == {5: ("happy", "word"), 9: ("cat", "object")}
    assert explained(new)[7] == ("a red door", "part")
    for few in ({}, {"1": {"concept": None}}, {"1": {"concept": "cat"}, "2": {"concept": "unicorn"}}):
        with pytest.raises(ValueError, match="03_interpret_features"):
            explained(few, truth)


def test_another_concept_is_never_ones_own_and_of_the_same_kind_where_there_is_one():
    rows = [("cat", "object"), ("dog", "object"), ("dog", "object"), ("bee", "object"), ("red", "colour")]
    named = {n: rows[n % 5] for n in range(250)}
    others = tables.shuffled(named, seed=1)
    for own in ("cat", "dog", "bee", "red"):
        found = {others[n] for n, (concept, _) in named.items() if concept == own}
        assert found == {"cat", "dog", "bee"} - {own}
    assert tables.shuffled({1: ("cat", "object"), 2: ("cat", "object")}) == {1: None, 2: None}


# IoU of latents.


@MODES
def test_a_latents_scores_by_hand(mode):
    everywhere, nowhere = np.ones((4, 4), np.float32), np.zeros((4, 4), np.float32)
    left = np.zeros((1, 8, 8), bool)
    left[..., :4] = True
    where = {"cat": left, "dog": ~left[:, :, :], "nothing": left[:0]}
    own = [Spot(0, (8, 8), everywhere)] * 2
    drawn = [Spot(1, (8, 8), part) for part in (everywhere, nowhere, nowhere, nowhere)]
    found = latent_iou(own, drawn, "cat", "nothing", lambda n, c: [where[c]] * len(n), mode, runs=2)
    assert found == Compared(0.5, (0.25, 0.0), 0.5, 0.0)
    assert found.columns("iou") == {"iou": 0.5, "iou_area": 0.5, "iou_shuffled": 0.0, "iou_random": 0.125}
    assert latent_iou(own[:1], drawn, "cat", None, lambda n, c: [where[c]] * len(n), mode, runs=4)[::3] == (0.5, None)
    with pytest.raises(ValueError, match="no exemplars"):
        latent_iou([], drawn, "cat", None, lambda n, c: [where[c]] * len(n), mode, runs=2)
    with pytest.raises(ValueError, match="4 random images cannot be shared by 3 runs"):
        latent_iou(own, drawn, "cat", None, lambda n, c: [where[c]] * len(n), mode, runs=3)


def test_chance_is_near_the_area_where_a_moved_mask_meets_the_concept():
    """Half of the image is the concept, an eighth is active: IoU is 1/16 to 9/16, so that the mean is known."""
    half = np.zeros((1, 8, 8), bool)
    half[0, :4] = True
    active = np.zeros((4, 4), np.float32)
    active[1, :] = 1  # 16 pixels in two lines: rows overlap 0, 8 or 16 pixels
    rows = [len({(down + k) % 8 for k in (2, 3)} & set(range(4))) for down in range(8)]
    expected = np.mean([8 * n / (32 + 16 - 8 * n) for n in rows])
    rng = np.random.default_rng(0)
    found = ious([Spot(0, (8, 8), active)] * 800, "cat", lambda n, c: [half] * len(n), STRICT, elsewhere=rng)
    assert found.mean() == pytest.approx(expected, abs=0.02)


def test_the_world_and_the_scores_agree_on_real_label_maps():
    """The strict score of ground truth is the IoU of the visible patches, straight from the definition."""
    rng = np.random.default_rng(2)
    truth = TrueMasks([row(object=rng.integers(0, 3, (8, 8)).astype(np.uint8)) for _ in range(3)], CONCEPTS)
    found = [exemplar(n, rng.random((4, 4)) < 0.4) for n in range(3)]
    by_hand = [iou(upsample(e.visible, (8, 8)), truth([e.image_index], "dog")[0][0]) for e in found]
    assert ious(spots(found), "dog", truth, STRICT).tolist() == by_hand


def test_drawn_spots_are_each_latent_s_activations_on_the_images_of_these_numbers():
    """By eq. 1, an image at a time."""
    lmm = LMM(*make("picture_world"))
    sae, pictures = TopKSAE(lmm.width, 24, 3), [noise(192, 192, seed) for seed in range(3)]
    found = score_iou.drawn_spots(SAEInPlace(lmm, sae, 1), pictures, [5, 11], [2, 0, 2])
    for latent, places in found.items():
        assert [spot.number for spot in places] == [2, 0, 2]
        for spot in places:
            prompt = lmm.prompt("", pictures[spot.number])
            x = lmm.hidden_states(prompt, 1)[0, prompt.spans[0].where("base")]
            z = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
            kept = torch.where(z >= z.topk(3).values[:, -1:], z, 0)[:, latent].reshape(lmm.grid).detach()
            np.testing.assert_allclose(spot.activation, kept, atol=1e-4)
            assert spot.size == (192, 192)


def test_an_image_set_of_one_is_its_own_chance(tmp_path):
    """Cached and scored: every random image is the latent's own, so chance is the score and the ratio is 1."""
    lmm = LMM(*make("picture_world"))
    sae, pictures = TopKSAE(lmm.width, 24, 3).requires_grad_(False), [noise(192, 192)]
    cache = cache_activations(SAEInPlace(lmm, sae, 1), pictures, n_top=5, folder=tmp_path)
    named = {int(n): (("cat", "dog")[i], "object") for i, n in enumerate(cache.live.nonzero()[:2, 0])}
    own = {n: exemplars(cache, pictures, n) for n in named}
    assert [len(found) for found in own.values()] == [1, 1]
    drawn = score_iou.drawn_spots(SAEInPlace(lmm, sae, 1), pictures, list(named), [0] * 6)
    everywhere = {"truth": lambda n, c: [np.ones((1, 192, 192), bool)] * len(n)}
    concepts = {n: concept for n, (concept, _) in named.items()}
    found = score_iou.all_ious(
        lambda n: (spots(own[n]), drawn[n]), concepts, tables.shuffled(named), everywhere, runs=3
    )
    for n in named:
        assert found["iou_strict"][n].score == own[n][0].visible.mean()
        assert found["iou_strict"][n].random == (own[n][0].visible.mean(),) * 3
    told = tables.summary(*tables.records(named, found))
    assert [told["iou_strict_ratio"], told["iou_paper_ratio"]] == pytest.approx([1, 1])


def test_every_latent_in_every_mode_by_every_segmenter():
    full, half = np.ones((1, 8, 8), bool), np.ones((1, 8, 8), bool)
    half[..., 4:] = False
    own, silent = Spot(0, (8, 8), np.ones((4, 4), np.float32)), Spot(1, (8, 8), np.zeros((4, 4), np.float32))
    segmenters = {"truth": lambda n, c: [full] * len(n), "other": lambda n, c: [half] * len(n)}
    concepts = {7: "cat", 3: "dog"}
    found = score_iou.all_ious(lambda n: ([own], [own, silent]), concepts, {7: "dog", 3: None}, segmenters, runs=2)
    assert list(found) == ["iou_paper", "iou_paper_other", "iou_strict", "iou_strict_other"]
    assert found["iou_strict"][7] == Compared(1, (1, 0), 1, 1)
    assert found["iou_paper_other"][3] == Compared(0.5, (0.5, 0), 0.5, None)
    rows, runs = tables.records({7: ("cat", "object"), 3: ("dog", "object")}, found)
    assert rows["3"] == {
        "concept": "dog", "kind": "object",
        "iou_paper": 1, "iou_paper_area": 1, "iou_paper_random": 0.5,
        "iou_paper_other": 0.5, "iou_paper_other_area": 0.5, "iou_paper_other_random": 0.25,
        "iou_strict": 1, "iou_strict_area": 1, "iou_strict_random": 0.5,
        "iou_strict_other": 0.5, "iou_strict_other_area": 0.5, "iou_strict_other_random": 0.25,
    }  # fmt: skip
    assert rows["7"]["iou_strict_shuffled"] == 1
    assert runs["iou_strict_other"] == {"7": [0.5, 0], "3": [0.5, 0]}
    assert tables.columns_of(rows) == list(found)


def test_photographs_without_ground_truth_are_scored_by_real_segmenters(models):
    """By hand from the segmenters' own answers: the union, or the mask of the highest score."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 56, 3)).astype(np.uint8)) for _ in range(3)]
    rows = {"1": {"outcome": "explained", "concept": "a cat", "kind": "object"},
            "2": {"outcome": "explained", "concept": "red", "kind": None}}  # fmt: skip
    named = explained(rows)
    concepts = {n: concept for n, (concept, _) in named.items()}
    real = {
        "sam": BoxSegmenter.load(models["grounding_dino"], models["sam"], threshold=0.0),
        "clipseg": PromptedSegmenter.load(models["clipseg"], threshold=0.4),
    }
    places = {n: [Spot(i, (56, 40), rng.random((4, 5)).astype(np.float32)) for i in range(3)] for n in concepts}
    where = {name: Numbered(segmenter, images) for name, segmenter in real.items()}
    found = score_iou.all_ious(lambda n: (places[n], places[n][::-1]), concepts, tables.shuffled(named), where, runs=3)
    for column, suffix in (("sam", ""), ("clipseg", "_clipseg")):
        for n, concept in concepts.items():
            answers = real[column](images, [concept] * 3)
            for mode in (PAPER, STRICT):
                masks = [
                    one.masks.any(0) if mode is PAPER or not len(one.masks) else one.masks[one.scores.argmax()]
                    for one in answers
                ]
                by_hand = [iou(activation_mask(at, mode), mask) for at, mask in zip(places[n], masks, strict=True)]
                assert found[f"iou_{mode.name}{suffix}"][n].score == pytest.approx(np.mean(by_hand), abs=1e-6)
                assert found[f"iou_{mode.name}{suffix}"][n].random == pytest.approx(by_hand[::-1], abs=1e-6)
    records, runs = tables.records(named, found)
    assert list(tables.table(records, runs, "iou_strict")) == ["total"]
    assert tables.summary(records, runs)["latents_other"] == 1


# CLIP scores.


def brightness(images, texts):
    """A similarity one can work out: the mean brightness of an image, plus a tenth for the word dog, less for bee."""
    shift = {"dog": 0.1, "bee": -0.9}
    return np.array([[np.asarray(image).mean() / 255 + shift.get(text, 0) for text in texts] for image in images])


def test_clip_scores_are_not_below_zero_and_streams_are_cut_into_batches():
    greys = [Image.new("RGB", (4, 4), (n, n, n)) for n in (0, 51, 255)]
    sizes = []

    def similar(images, texts):
        sizes.append(len(images))
        return brightness(images, texts)

    found = clip.clip_scores(similar, iter(greys), ["cat", "bee"], batch=2)
    assert sizes == [2, 1]
    assert found == pytest.approx(np.array([[0, 0], [20, 0], [100, 10]]), abs=1e-4)
    again = clip.clip_scores(similar, [greys[n].copy() for n in (1, 0, 1, 1, 2, 0)], ["cat", "bee"], batch=2)
    assert sizes[2:] == [2, 1]  # of pictures with the same pixels one is looked at
    assert again == pytest.approx(found[[1, 0, 1, 1, 2, 0]])
    with pytest.raises(ValueError, match="no pictures"):
        clip.clip_scores(similar, [], ["cat"])
    with pytest.raises(ValueError, match=r"shape \(2,\) for 2 images and 1 texts"):
        clip.clip_scores(lambda images, texts: np.zeros(len(images)), greys[:2], ["cat"])


def test_clip_scores_of_latents_by_hand():
    whole, grey = np.ones((4, 4), bool), (51, 51, 51)
    sets = [[exemplar(0, corner(4, 2), colour=grey)], [exemplar(0, whole, colour=grey)] * 2]
    drawn = [Image.new("RGB", (8, 8), (n, n, n)) for n in (0, 102, 204, 204)]
    paper = latents_clip(brightness, lambda: iter(sets), ["cat", "dog"], ["dog", None], PAPER, drawn, runs=2)
    assert paper[0].score == pytest.approx(20)
    assert paper[0].random == pytest.approx((20, 80))
    assert paper[0].shuffled == pytest.approx(30)
    assert paper[1].score == pytest.approx(30)
    assert paper[1].shuffled is None
    assert paper[0].area is None
    strict = latents_clip(brightness, lambda: iter(sets), ["cat", "dog"], ["dog", None], STRICT, [])
    assert [one.score for one in strict] == pytest.approx([10, 30])  # half of the picture is black
    assert [one.area for one in strict] == pytest.approx([10, 30])  # wherever the half lies
    assert strict[0].random is None
    with pytest.raises(ValueError, match="at least one image"):
        latents_clip(brightness, lambda: iter([[], sets[0]]), ["cat", "dog"], [None, None], STRICT, [])


def test_clip_columns_of_both_modes():
    shown = {4: [exemplar(0, corner(4, 2), colour=(51, 51, 51))], 2: [exemplar(0, corner(4, 4), colour=(51, 51, 51))]}
    drawn = [Image.new("RGB", (8, 8), (n, n, n)) for n in (0, 102)]
    found = clip.all_clips(brightness, shown, {4: "cat", 2: "dog"}, {2: "cat", 4: "dog"}, drawn, runs=2)
    assert list(found) == ["clip_paper", "clip_strict"]
    assert found["clip_paper"][4].score == pytest.approx(20)
    assert found["clip_paper"][2].random == pytest.approx((10, 50))
    assert found["clip_strict"][4].score == pytest.approx(10)
    rows, runs = tables.records({4: ("cat", "object"), 2: ("dog", "object")}, found)
    assert list(runs) == ["clip_paper"]
    assert "clip_strict_random" not in rows["4"]


def test_what_clip_sees_in_strict_mode_is_what_the_explainer_saw():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(1, 255, (8, 8, 3)).astype(np.uint8))
    activation = rng.random((4, 4)).astype(np.float32)
    visible = most_activated(activation, STRICT.threshold)
    one = Exemplar(0, image, activation, visible)
    assert (np.asarray(clip.region(one, STRICT)) == np.asarray(one.masked)).all()
    assert clip.region(one, PAPER) is image
    away = np.asarray(clip.region(one, STRICT, rng)).any(-1)
    assert away.sum() == upsample(visible, (8, 8)).sum()


def test_a_grid_of_similarities_is_the_pairwise_one_whatever_the_parts(models):
    """Against the model's own forward over every pair, by the callable that takes pairs."""
    similar = ImageTextSimilarity.load(models["clip"], batch=2)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 56, 3)).astype(np.uint8)) for _ in range(3)]
    texts = ["cat", "a red door", "red", "a", "dog"]
    pairs = similar([image for image in images for _ in texts], texts * 3).reshape(3, 5)
    found = similar.grid(images, texts)
    assert found.shape == (3, 5)
    assert found == pytest.approx(pairs, abs=1e-5)
    assert similar.grid(images[:1], texts[:2]) == pytest.approx(pairs[:1, :2], abs=1e-5)
    assert similar.grid(images[1:], texts[:2]) == pytest.approx(pairs[1:, :2], abs=1e-5)
    assert similar.grid([], texts).shape == (0, 5)
    with pytest.raises(ValueError, match="give a concept in words"):
        similar.grid(images, ["cat", " "])


# Tables.


def scored() -> tuple[dict, dict]:
    kinds = ["object", "object", "colour", "face", "colour", "scene"]
    rows = {
        str(n): {"kind": kind, "iou": 0.1 * n, "iou_random": 0.01 * n, "iou_shuffled": 0.0}
        for n, kind in enumerate(kinds)
    }
    return rows, {"iou": {str(n): [0.01 * n - 0.01, 0.01 * n + 0.01] for n in range(6)}}


def test_table_1_has_the_kinds_in_order_and_the_total():
    rows, runs = scored()
    found = tables.table(rows, runs, "iou")
    assert list(found) == ["object", "colour", "total"]  # one scene and one face have no interval
    assert found["colour"]["top"].mean == pytest.approx(0.3)
    assert found["total"]["gain"].mean == pytest.approx(0.225)
    assert found["object"]["random"].mean == pytest.approx(0.005)
    assert list(found["total"]) == ["top", "shuffled", "gain", "random"]
    assert list(tables.by_kind({n: row["kind"] for n, row in rows.items()})) == [
        "scene", "object", "colour", "face", "total",
    ]  # fmt: skip
    told = tables.flat({"iou": found, "clip_paper": found})
    assert next(iter(told)) == "iou"
    assert told["iou"] == pytest.approx(0.25)
    assert {"iou_low", "iou_high", "iou_random_high", "iou_shuffled", "iou_gain", "iou_colour_low"} <= told.keys()
    assert "clip_paper_colour_gain_low" in told
    assert not {"iou_colour_random", "iou_colour_gain"} & told.keys()


def test_a_table_stands_beside_the_published_one():
    rows, runs = scored()
    doubled = {n: row | {"iou": 2 * row["iou"]} for n, row in rows.items() if row["kind"] != "colour"}
    both = {"paper": tables.table(rows, runs, "iou"), "strict": tables.table(doubled, {}, "iou")}
    told = tables.beside(both, {"colour": (0.005, 0.1)})
    assert [(row["kind"], row["mode"]) for row in told] == [
        ("object", "paper"), ("object", "strict"), ("colour", "paper"), ("total", "paper"), ("total", "strict"),
    ]  # fmt: skip
    assert (told[2]["at random"], told[2]["published"]) == (0.005, 0.1)
    assert told[1]["published"] is told[3]["published"] is None
    assert told[3]["top"] == mean_interval([0.1 * n for n in range(6)])
    assert told[1]["top"] == mean_interval([row["iou"] for row in doubled.values() if row["kind"] == "object"])
    assert told[1]["random"] is None and told[0]["random"].mean == pytest.approx(0.005)
    assert "published" not in tables.beside(both)[0]


def test_columns_of_one_quantity_come_together_by_mode():
    columns = ("iou_paper", "iou_paper_a_sam", "iou_strict", "iou_strict_a_sam", "clip_paper")
    assert tables.by_quantity({name: {"total": name} for name in columns}) == {
        "iou": {"paper": {"total": "iou_paper"}, "strict": {"total": "iou_strict"}},
        "iou_a_sam": {"paper": {"total": "iou_paper_a_sam"}, "strict": {"total": "iou_strict_a_sam"}},
        "clip": {"paper": {"total": "clip_paper"}},
    }


def test_the_metrics_of_a_stage():
    rows = {
        str(n): {"kind": ("object", "colour")[n % 2], "iou_strict": n / 10, "iou_strict_seg": 1 - n / 10,
                 "iou_strict_random": 0.05, "clip_paper": 20.0 + n, "clip_paper_random": 20.0 + 2 * (n % 2)}
        for n in range(8)
    }  # fmt: skip
    runs = {
        "iou_strict": {n: [0.04, 0.06] for n in rows},
        "clip_paper": {n: [row["clip_paper_random"]] * 2 for n, row in rows.items()},
    }
    found = tables.summary(rows, runs)
    assert (found["latents_scored"], found["latents_object"]) == (8, 4)
    assert found["iou_strict_ratio"] == pytest.approx(0.35 / 0.05)
    assert found["iou_random"] == pytest.approx(0.05)
    assert found["iou_random_low"] < 0.05 < found["iou_random_high"]
    assert found["iou_strict_seg_correlation"] == pytest.approx(-1)
    # objects gain 0, 2, 4 and 6: a resample has the mean 0 in 1 of 256, less than 0.5 %; colours gain -1, 1, 3 and 5
    assert (found["clip_paper_kinds"], found["clip_paper_kinds_above_random"]) == (2, 1)
    json.dumps(found, allow_nan=False)
    for row in rows.values():
        row["clip_paper"] += 10
    assert tables.summary(rows, runs)["clip_paper_kinds_above_random"] == 2
    bare = {n: {"kind": "other", "clip_strict": 20.0} for n in "ab"}
    assert set(tables.summary(bare, {})) == {"latents_scored", "latents_other"} | {
        f"clip_strict{kind}{end}" for kind in ("", "_other") for end in ("", "_low", "_high")
    }


def test_the_median_of_each_kind():
    rows, _ = scored()
    assert tables.middling(rows, "iou") == {"scene": 5, "object": 1, "colour": 4, "face": 3}
    assert tables.middling(rows, "iou_other") == {}


def test_few_of_many_latents_are_drawn_at_random_and_stay_in_order():
    rows = {str(n): {"concept": f"c{n}", "kind": "object"} for n in range(50)}
    found = list(explained(rows, most=10, seed=3))
    assert len(set(found)) == 10
    assert found != list(explained(rows, most=10, seed=4))
    assert explained(rows, most=50) == explained(rows)


# Table 2.


def test_kappa_of_a_hand_worked_case():
    """50 items: both yes 20, both no 15, 5 and 10 differ. p = .70, c = .5 * .6 + .5 * .4 = .50, kappa .40."""
    one = ["yes"] * 25 + ["no"] * 25
    two = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert kappa(one, two) == pytest.approx(0.4)
    assert kappa(two, one) == pytest.approx(0.4)
    assert kappa(["yes", "no", "unsure"], ["yes", "no", "unsure"]) == 1
    assert kappa(["yes", "no"], ["no", "yes"]) == -1
    assert kappa(["yes", "yes"], ["yes", "yes"]) is None
    for one, two in (([], []), (["yes"], [])):
        with pytest.raises(ValueError, match="at least one"):
            kappa(one, two)


def test_agreement_is_counted_on_what_both_have_rated():
    ratings = {"b": {"1": "yes", "2": "no", "9": "no"}, "a": {"1": "yes", "2": "yes"}, "c": {"7": "no"}}
    (found,) = score_ratings.agreements(ratings)
    assert found == (("a", "b"), 2, 0.5, 0.0)


def test_only_answers_on_todays_explanations_stand():
    answers = [
        {"rater": "a", "latent": 1, "concept": "cat", "verdict": "yes"},
        {"rater": "a", "latent": 2, "concept": "dog", "verdict": "no"},  # it is called otherwise now
        {"rater": "b", "latent": 1, "concept": "cat", "verdict": "unsure"},
        {"rater": "b", "latent": 9, "concept": "cat", "verdict": "no"},
    ]
    assert score_ratings.standing(answers, {1: "cat", 2: "bee"}) == {"a": {"1": "yes"}, "b": {"1": "unsure"}}


def test_some_of_each_kind_are_judged_beside_others_names():
    named = {n: ("cat" if n % 2 else "dog", "object" if n < 8 else "colour") for n in range(10)}
    others = {n: None if n == 9 else "bee" for n in named}
    sets = {n: [exemplar(n, corner(1, 1))] for n in named}

    def verdicts(asked, concepts):
        return ["yes" if concept != "bee" else None for concept, _ in zip(concepts, asked, strict=True)]

    found = judges.judge_latents(verdicts, sets, named, others, each=3)
    assert list(map(int, found)) == judges.some_of_each({str(n): kind for n, (_, kind) in named.items()}, 3)
    assert sum(named[int(n)][1] == "object" for n in found) == 3
    assert {"8", "9"} <= found.keys()
    assert found["8"] == {"concept": "dog", "judged": "yes", "judged_shuffled": None}
    assert found["9"] == {"concept": "cat", "judged": "yes"}


def test_consistency_is_the_share_of_yes_by_kind():
    kinds = {"1": "object", "2": "object", "3": "colour", "4": "word"}
    found = judges.consistency({"1": "yes", "2": "unsure", "3": "yes", "4": None}, kinds)
    assert {kind: (its.fraction, its.asked) for kind, its in found.items()} == {
        "object": (0.5, 2), "colour": (1.0, 1), "total": (pytest.approx(2 / 3), 3),
    }  # fmt: skip
    assert (found["object"].low, found["object"].high) == pytest.approx(wilson(1, 2), abs=1e-9)
    assert judges.consistency({"4": None}, kinds) == {}


def wilson(hits: int, asked: int, z: float = 2.5758293035489004) -> tuple[float, float]:
    """Its formula, at 99 %."""
    p, n = hits / asked, asked
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def test_table_2_s_metrics_have_their_intervals_and_how_many():
    kinds = {str(n): ("object", "colour")[n % 2] for n in range(8)}
    rows = {n: {"judged": ("yes", "no", "unsure")[int(n) % 3], "judged_shuffled": "no"} for n in kinds}
    del rows["7"]["judged_shuffled"]
    found = judges.agreed(rows, kinds)
    assert found["judged"] == pytest.approx(3 / 8)
    assert (found["judged_low"], found["judged_high"]) == pytest.approx(wilson(3, 8), abs=1e-9)
    assert (found["judged_object"], found["judged_object_asked"]) == (2 / 4, 4)
    assert (found["judged_shuffled"], found["judged_shuffled_asked"], found["judged_shuffled_low"]) == (0, 7, 0)


def test_a_judge_of_pictures_is_shown_what_the_explainer_was():
    one = exemplar(0, corner(1, 2))
    judge = judges.by_sight(lambda sets, concepts: ["yes" if sets[0][0] is one.masked else "no"])
    assert judge([[one]], ["cat"]) == ["yes"]
