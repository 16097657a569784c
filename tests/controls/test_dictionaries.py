"""Control dictionaries against constructions of their own, and what an untrained model keeps."""

import numpy as np
import pytest
import torch
from models import make
from PIL import Image

from lmm_sae_nb.controls.dictionaries import (
    nmf_dictionary,
    principal_components,
    random_dictionary,
    sample_states,
    tied_sae,
    untrained,
)
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.topk import TopKSAE


@pytest.fixture(scope="module")
def lmm():
    return LMM(*make("picture_world"))


def test_a_random_dictionary_is_unit_gaussian_rows_behind_the_given_bias():
    like = TopKSAE(16, 40, 3)
    like.b_dec.data.copy_(torch.arange(16) / 8)
    found = random_dictionary(like, seed=5)
    rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(5)).numpy()
    rows /= np.sqrt((rows**2).sum(1, keepdims=True))
    x = np.random.default_rng(0).normal(size=(7, 16)).astype(np.float32)
    z = np.maximum((x - like.b_dec.detach().numpy()) @ rows.T, 0)
    z[z < np.sort(z, 1)[:, -3:-2]] = 0
    expected = z @ rows + like.b_dec.detach().numpy()
    np.testing.assert_allclose(found(torch.from_numpy(x)).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert (found.n_latents, found.k) == (40, 3)
    assert not torch.equal(random_dictionary(like, seed=6).W_dec, found.W_dec)


def test_a_row_without_direction_is_refused():
    with pytest.raises(ValueError, match=r"rows \[1\] of the dictionary are zero"):
        tied_sae(torch.tensor([[1.0, 0], [0, 0]]), torch.zeros(2), 1)


# ---- the untrained model --------------------------------------------------------------------------------------------


def differing(one: LMM, other: LMM) -> set[str]:
    """The names of weights that differ."""
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    assert mine.keys() == theirs.keys()
    return {name for name in mine if not torch.equal(mine[name], theirs[name])}


def test_an_untrained_model_shares_the_architecture_and_no_matrix(lmm):
    fresh = untrained(lmm, 1)
    matrices = {name for name, weights in lmm.model.state_dict().items() if weights.ndim > 1}
    assert matrices <= differing(lmm, fresh)
    assert not differing(fresh, untrained(lmm, 1))
    assert differing(fresh, untrained(lmm, 2))
    assert fresh.fingerprint(0) != lmm.fingerprint(0)
    assert (fresh.n_layers, fresh.width, fresh.grid) == (lmm.n_layers, lmm.width, lmm.grid)


def test_behind_the_trained_eye_only_language_layers_are_new(lmm):
    changed = differing(lmm, untrained(lmm, 1, keep_eye=True))
    layers = {f"layers.{n}." for n in range(lmm.n_layers)}
    assert changed
    assert all(
        any(layer in name for layer in layers) or name.endswith("language_model.norm.weight") for name in changed
    )
    assert all(any(layer in name for name in changed) for layer in layers)
    assert not any("vision" in name or "projector" in name or "embed" in name for name in changed)


def test_making_an_untrained_model_changes_neither_the_model_nor_the_random_state(lmm):
    before, state = {name: w.clone() for name, w in lmm.model.state_dict().items()}, torch.get_rng_state()
    untrained(lmm, 1, keep_eye=True)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], w) for name, w in lmm.model.state_dict().items())


# ---- classical dictionaries -----------------------------------------------------------------------------------------


def test_sampled_states_are_states_of_the_samples(lmm):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 192, 192, 3), dtype=np.uint8)
    samples = [{"image": Image.fromarray(p), "question": f"what {n} ?", "answer": "it"} for n, p in enumerate(pixels)]
    drawn = sample_states(lmm, samples, 1, 50, kinds=("base",), seed=3)
    known = []
    for row in samples:
        prompt = lmm.prompt(row["question"], row["image"], answers=[row["answer"]])
        known.append(lmm.hidden_states(prompt, 1)[0][prompt.mask("base")[0]])
    distances = torch.cdist(drawn, torch.cat(known).float()).amin(1)
    assert drawn.shape == (50, lmm.width)
    assert float(distances.max()) < 1e-2 * float(drawn.norm(dim=1).mean())


def test_principal_components_come_with_both_signs_in_order_of_variance():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    states = rng.normal(size=(4000, 6)) * [9, 5, 3, 2, 1, 0.5] @ directions.T + 4
    sae = principal_components(torch.from_numpy(states).float(), 8, 4)
    rows = sae.W_dec.numpy()
    np.testing.assert_array_equal(rows[::2], -rows[1::2])
    np.testing.assert_allclose(np.abs((rows[::2] * directions.T[:4]).sum(1)), 1, atol=1e-2)
    np.testing.assert_allclose(sae.b_dec.numpy(), states.mean(0), rtol=1e-4)
    # both signs of four components, k = 4: each state loses nothing but the last two directions
    x_hat = sae(torch.from_numpy(states).float()).numpy()
    left = (states - states.mean(0)) @ directions[:, 4:]
    np.testing.assert_allclose(((states - x_hat) ** 2).sum(), (left**2).sum(), rtol=2e-2)


def test_there_are_at_most_twice_as_many_component_rows_as_directions():
    states = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    assert principal_components(states, 100, 32).W_dec.shape == (12, 6)
    assert principal_components(states, 100, 32).k == 12
    assert principal_components(states, 5, 1).n_latents == 4
    with pytest.raises(ValueError, match="vary in 2 directions; give from 2 to 4 latents"):
        principal_components(states[:3], 12, 3)


def test_nmf_finds_the_non_negative_parts_that_states_are_made_of():
    rng = np.random.default_rng(0)
    parts = np.zeros((5, 20))
    for n in range(5):  # disjoint, so that the factorisation is unique
        parts[n, 4 * n : 4 * n + 4] = rng.normal(size=4)
    parts /= np.sqrt((parts**2).sum(1, keepdims=True))
    weights = rng.gamma(0.5, size=(3000, 5)) * (rng.random((3000, 5)) < 0.3)
    states = torch.from_numpy(weights @ parts).float()
    sae = nmf_dictionary(states, 5, 5, seed=1, passes=200)
    cosines = sae.W_dec.numpy() @ parts.T
    assert (np.abs(cosines).max(0) > 0.95).all()
    assert (cosines.max(0) > 0.95).all()  # with its sign
    x_hat = sae(states)
    assert float((states - x_hat).square().sum() / (states - states.mean(0)).square().sum()) < 0.1


def test_nmf_has_the_size_that_was_asked_for_also_beyond_the_width():
    states = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    sae = nmf_dictionary(states, 30, 3)
    assert (sae.n_latents, sae.k) == (30, 3)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(30))
    assert torch.equal(sae.W_dec, sae.W_enc)
