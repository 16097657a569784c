"""Selectivity: counted by hand on made-up activations, and activations against the dense equations."""

import numpy as np
import pytest
import torch
from models import dense, noise
from PIL import Image

from lmm_sae_nb.cache.encode_images import base_states
from lmm_sae_nb.measures.selectivity import (
    Changes,
    Pair,
    change_map,
    images_of,
    measure_changes,
    measure_selectivity,
    named_latents,
    selectivity,
    selectivity_metrics,
)
from lmm_sae_nb.sae.in_place import SAEInPlace

BLANK = Image.new("RGB", (48, 48))


def dotted(x: int, y: int, width: int = 1) -> Image.Image:
    image = BLANK.copy()
    image.paste((9, 9, 9), (x, y, x + width, y + width))
    return image


def pair(out=(), into=(), touched=(), after=None) -> Pair:
    return Pair(BLANK, after or dotted(0, 0), "object", tuple(out), tuple(into), frozenset(touched))


PAIRS = [pair(["cat"], ["dog"]), pair(["dog"], ["cat"]), pair(["red"], ["blue"], ["cat"]), pair(["bee"])]


def changes(net, total=None, on_patches=None) -> Changes:
    net = np.array(net, float)
    total = np.abs(net) if total is None else np.array(total, float)
    on_patches = total / 2 if on_patches is None else np.array(on_patches, float)
    return Changes(list(range(net.shape[1])), net, total, on_patches, np.array([0.1, 0.3, 0.5, 0.7])[: len(net)])


def test_a_score_is_the_own_change_against_the_change_on_pairs_that_do_not_concern_the_concept():
    found = changes([[-6], [2], [100], [-1]], on_patches=[[3], [1], [0], [0]])
    (row,) = selectivity(found, PAIRS, {0: ("cat", "object")})
    assert (row.own_pairs, row.own, row.other) == (2, 4, 1)  # 6 taken out, 2 put in; the third pair touches cats
    assert row.score == 0.8
    assert row.on_patches == pytest.approx(4 / 8) and row.patches == pytest.approx(0.2)


def test_a_latent_that_goes_against_its_concept_scores_zero_and_a_silent_one_has_no_score():
    rows = selectivity(changes([[5, 0], [-5, 0], [0, 0], [0, 0]]), PAIRS, {0: ("cat", None), 1: ("cat", None)})
    assert [row.score for row in rows] == [0, None]
    assert [row.on_patches for row in rows] == [0.5, None]


def test_a_latent_without_pairs_of_its_concept_is_left_out():
    found = changes(np.ones((4, 3)))
    names = {0: ("owl", "object"), 1: ("bee", "object"), 2: ("dog", "object")}
    assert [row.latent for row in selectivity(found, PAIRS, names)] == [1, 2]
    both = [pair(["cat"], ["dog"], after=dotted(0, 0)), pair(["dog"], ["cat"])]
    assert selectivity(changes(np.ones((2, 1))), both, {0: ("cat", None)}) == []  # every pair concerns cats


def test_metrics_are_means_over_latents_for_all_and_by_kind():
    names = {0: ("cat", "object"), 1: ("dog", "object"), 2: ("red", "colour"), 3: ("blue", "colour")}
    found = changes([[-1, 1, 0, 0], [1, -1, 0, 0], [0, 0, -3, 3], [1, 0, 3, 1]])
    metrics = selectivity_metrics(selectivity(found, PAIRS, names), selectivity(found, PAIRS, names)[:2])
    scores = [1 / (1 + 1), 1 / (1 + 0), 3 / (3 + 1), 3 / (3 + 1 / 3)]
    assert metrics["selectivity_latents"] == 4 and metrics["selectivity_silent"] == 0
    assert metrics["selectivity"] == pytest.approx(np.mean(scores))
    assert metrics["selectivity_low"] < metrics["selectivity"] < metrics["selectivity_high"]
    assert metrics["selectivity_object"] == pytest.approx(np.mean(scores[:2]))
    assert metrics["selectivity_colour"] == pytest.approx(np.mean(scores[2:]))
    assert metrics["selectivity_other_name"] == pytest.approx(np.mean(scores[:2]))
    assert metrics["selectivity_on_patches"] == 0.5
    assert metrics["selectivity_even"] == pytest.approx(np.mean([0.2, 0.2, 0.5, 0.5]))
    assert "selectivity_other_name_colour" not in metrics
    with pytest.raises(ValueError, match="fewer than two change"):
        selectivity_metrics(selectivity(found, PAIRS, {0: ("cat", None)}), [])


def test_pairs_that_change_nothing_or_no_concept_are_refused():
    with pytest.raises(ValueError, match=r"\['cat'\].*changes no pixel"):
        pair(["cat"], ["dog"], after=BLANK)
    with pytest.raises(ValueError, match="changes no concept"):
        pair(["cat"], ["cat"])
    with pytest.raises(ValueError, match=r"\(48, 48\) and \(9, 9\)"):
        pair(["cat"], ["dog"], after=BLANK.resize((9, 9)))


def test_the_patches_of_a_pair_are_those_with_a_pixel_that_differs():
    hit = pair(["cat"], after=dotted(15, 31, 2)).patches((3, 3))
    assert np.flatnonzero(hit).tolist() == [3, 4, 6, 7]  # rows 31 and 32, columns 15 and 16
    assert pair(["cat"], after=dotted(47, 47)).patches((12, 12)).nonzero()[0].tolist() == [143]


@pytest.fixture(scope="module")
def place(lmm, sae):
    return SAEInPlace(lmm, sae.requires_grad_(False), 1)


@pytest.fixture(scope="module")
def noisy():
    """Pairs of random pictures that differ in a corner."""
    result = []
    for seed in range(5):
        before = noise(192, 192, seed)
        after = before.copy()
        after.paste(noise(64, 64, seed + 50), (0, 0))
        result.append(Pair(before, after, "object", ("cat",), ("dog",) if seed % 2 else ()))
    result.append(Pair(noise(192, 192, 9), noise(192, 192, 10), "scene", ("sea",), ("sky",)))
    return result


def encoded(place, image) -> torch.Tensor:
    """The dense latents of an image's base patches."""
    prompt = place.lmm.prompt("", image)
    states = place.lmm.hidden_states(prompt, place.layer)[prompt.mask("base")]
    return dense(place.sae, states.float())


def test_changes_are_those_of_the_dense_equations(place, noisy):
    latents = [2, 3, 5, 7, 11, 23]
    found = measure_changes(place, noisy, latents, pairs_at_once=4)
    assert found.latents == latents
    inside = torch.zeros(12, 12, dtype=torch.bool)
    inside[:4, :4] = True
    for n, each in enumerate(noisy):
        change = (encoded(place, each.after) - encoded(place, each.before))[:, latents]
        mask = inside.flatten() if each.kind == "object" else torch.ones(144, dtype=torch.bool)
        for ours, expected in (
            (found.net[n], change.sum(0)), (found.total[n], change.abs().sum(0)),
            (found.on_patches[n], change[mask].abs().sum(0)), (found.patches[n], mask.float().mean()),
        ):  # fmt: skip
            assert ours == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-3)
        drawn = change_map(place, each, 5)
        assert drawn.ravel() == pytest.approx(change[:, 2].numpy(), rel=1e-3, abs=1e-3)
    assert (found.total > 0).any()
    states = base_states(place.lmm, place.layer, images_of(noisy))
    again = measure_changes(place, noisy, latents, states, pairs_at_once=2)
    assert again.net == pytest.approx(found.net, rel=1e-3, abs=1e-3)
    with pytest.raises(ValueError, match="states of 12 images for 5 pairs"):
        measure_changes(place, noisy[:5], latents, states)


def test_the_panel_measures_names_against_names_of_the_same_kind(place, noisy):
    def row(concept, outcome="explained"):
        return {"outcome": outcome, "concept": concept, "kind": "object"}

    rows = {n: row("cat" if n % 2 else "dog") for n in range(20)} | {20: row("owl"), 21: row(None, "refused")}
    assert 21 not in named_latents(rows) and named_latents(rows)[20] == ("owl", "object")
    metrics = measure_selectivity(place, noisy, rows)
    assert metrics["selectivity_without_pairs"] == 1
    scored = metrics["selectivity_latents"] + metrics["selectivity_silent"]
    assert scored == 20 and metrics["selectivity_object"] == metrics["selectivity"]
    assert {"selectivity_other_name", "selectivity_on_patches", "selectivity_even"} <= metrics.keys()
    with pytest.raises(ValueError, match="none is explained"):
        measure_selectivity(place, noisy, {1: row(None, "refused")})
    with pytest.raises(ValueError, match="0 pairs"):
        measure_selectivity(place, [], rows)
