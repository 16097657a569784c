"""Feature absorption on latents that are planted to absorb, or not to."""

import numpy as np
import patchwork
import pytest
import torch
from labelled import GRID

from lmm_sae_nb.measures.absorption import (
    NestedPair,
    absorption,
    absorption_cases,
    main_latents,
    parent_direction,
    patches_of,
)
from lmm_sae_nb.pictureworld.world.concepts import NESTED
from lmm_sae_nb.pictureworld.world.scenes import make_scene
from lmm_sae_nb.sae.topk import TopKSAE

SEA, SKY = (
    NestedPair("cat", (("object", "cat"),), ("scene", "sea")),
    NestedPair("cat", (("object", "cat"),), ("scene", "sky")),
)
WIDTH = 4


def scene(rng: np.random.Generator, child: int) -> dict[str, np.ndarray]:
    """A cat of four patches, on two of which the child (1: sea, 2: sky, 0: none) is as well."""
    top, left = rng.integers(0, 5, 2)
    cat, ground = np.zeros(GRID, int), np.zeros(GRID, int)
    cat[top : top + 2, left : left + 2] = 1
    ground[top, left : left + 2] = child
    return {"object": cat, "scene": ground}


def made(rng: np.random.Generator, images: int, absorbs: bool):
    """Latent 0 is the cat's: with `absorbs` it is silent on patches with sea. Latent 1 is the sea's, 2 the sky's."""
    grids = [scene(rng, n % 3) for n in range(images)]
    dense = patchwork.random_acts(rng, images, 6, 0.02) * 0.1
    for n, grid in enumerate(grids):
        cat, ground = grid["object"].ravel() == 1, grid["scene"].ravel()
        dense[n, :, :3] = 0
        dense[n, :, 0] = cat & ~((ground == 1) & absorbs)
        dense[n, :, 1], dense[n, :, 2] = cat & (ground == 1), cat & (ground == 2)
    return patchwork.latents(dense), patchwork.maps(grids)


def sae(sea_points_to_cat: bool = True) -> TopKSAE:
    """Latent 0's direction is the first axis; the sea's latent has a part of it, or its opposite."""
    result = TopKSAE(WIDTH, 6, 2, generator=torch.Generator().manual_seed(0))
    rows = torch.zeros(6, WIDTH)
    rows[0, 0], rows[2, 2], rows[3:, 3] = 1, 1, 1
    rows[1] = torch.tensor([0.6 if sea_points_to_cat else -0.6, 0.8, 0, 0])
    result.W_dec.data = rows
    return result


@pytest.mark.parametrize("absorbs", [True, False])
def test_a_parent_that_is_silent_on_its_child_is_absorbed(absorbs):
    rng = np.random.default_rng(0)
    sets = (*made(rng, 60, absorbs), *made(rng, 30, absorbs))
    cases, main = absorption_cases(sae(), *sets, [SEA, SKY])
    assert main[SEA.parents].latents == [0]
    assert len(cases) == 20  # ten of thirty images have the sea, ten the sky
    rows, there = sae().W_dec.detach().numpy(), patches_of([SEA], sets[1], 60, GRID)[0][SEA.parents]
    made_of = sets[0].acts.toarray() @ rows
    direction = made_of[there].mean(0) - made_of[~there].mean(0)
    for case in cases:
        sea = case.pair == SEA
        assert (case.missed, case.absorbed) == (absorbs and sea, absorbs and sea)
        child, parent = rows[1 if sea else 2] @ direction, rows[0] @ direction  # all activations are 1
        held = child / (child + parent * (not absorbs or not sea))
        assert case.fraction == pytest.approx(held, abs=1e-5)
    found = absorption(sae(), *sets, [SEA, SKY])
    assert found["absorption"] == found["absorption_cat"] == 0.5 * absorbs
    assert found["absorption_random"] <= 0.5 * absorbs
    assert found["absorption_parent_f1"] if len(main) > 1 else "absorption_parent_f1" not in found


def test_a_latent_that_points_away_from_the_parent_absorbs_nothing():
    rng = np.random.default_rng(0)
    sets = (*made(rng, 60, True), *made(rng, 30, True))
    found = absorption(sae(sea_points_to_cat=False), *sets, [SEA])
    assert (found["absorption"], found["absorption_missed"], found["absorption_fraction"]) == (0, 1, 0)


def test_a_latent_is_one_more_main_latent_if_it_raises_the_joint_f1():
    """Ten patches: latent 0 fires on six of them, latent 1 on the other four, latent 2 on five of the six."""
    dense = np.zeros((1, 36, 3))
    dense[0, :6, 0], dense[0, 6:10, 1], dense[0, :5, 2] = 1, 1, 1
    shows = np.arange(36) < 10
    f1 = np.array([2 * 6 / 16, 2 * 4 / 14, 2 * 5 / 15])
    found = main_latents(patchwork.latents(dense), shows, f1, np.full(3, 0.5))
    assert (found.latents, found.thresholds, found.f1) == ([0, 1], [0.5, 0.5], 1.0)


def test_the_parents_direction_is_the_difference_of_mean_reconstructions():
    rng = np.random.default_rng(0)
    latents, truth = made(rng, 6, True)
    shows = patches_of([SEA], truth, 6, GRID)[0][SEA.parents]
    made_of = latents.acts.toarray() @ sae().W_dec.detach().numpy()
    expected = made_of[shows].mean(0) - made_of[~shows].mean(0)
    found = parent_direction(sae(), latents, shows)
    assert found == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)


def test_pairs_that_cannot_be_measured_are_refused():
    rng = np.random.default_rng(0)
    sets = (*made(rng, 60, True), *made(rng, 30, True))
    with pytest.raises(ValueError, match="no 'bus' among 'object'"):
        absorption(sae(), *sets, [NestedPair("cat", (("object", "bus"),), ("scene", "sea"))])
    with pytest.raises(ValueError, match="no pair is on 50 of 60 cached images"):
        absorption(sae(), *sets, [SEA], least_cached=50)
    without = patchwork.maps([{} for _ in range(30)])
    with pytest.raises(ValueError, match="no pair is on any of 30 held-out images"):
        absorption(sae(), *sets[:3], without, [SEA])


def test_what_picture_world_nests_lies_inside_its_parent():
    """Words, textures and parts of a scene lie on one of their parents; a material may also lie on the ground."""
    met = set()
    for seed in range(900_000, 900_040):
        scene = make_scene(seed)
        for child in () if scene.chart else {child for group, _, child in NESTED if group != "block"}:
            there = scene.mask(*child)
            parents = [name for _, names, other in NESTED if other == child for name in names]
            if there.any():
                assert (there <= np.logical_or.reduce([scene.mask(*name) for name in parents])).all(), (seed, child)
                met.add(child[0])
    assert met == {"word", "texture", "part", "face"}
