"""How an SAE of another kind than TopK chooses its latents, in dense form; and what steering makes of it."""

import pytest
import torch
from torch.testing import assert_close

from lmm_sae_nb.sae.activation import Latents
from lmm_sae_nb.sae.folding import SAEWeights, gated
from lmm_sae_nb.sae.topk import SAE
from lmm_sae_nb.steer.steering import Edit, steer_latents, steered_states

WIDTH, N = 6, 20


def rng(seed):
    return torch.Generator().manual_seed(seed)


def jumping(places=N, seed=0, dtype=torch.float64) -> SAE:
    threshold = torch.rand(N, generator=rng(seed + 2), dtype=dtype)
    sae = SAE(WIDTH, N, places, threshold=threshold, dtype=dtype, generator=rng(seed))
    with torch.no_grad():
        for weights in sae.parameters():
            weights.add_(torch.randn(weights.shape, generator=rng(seed + 1), dtype=dtype), alpha=0.3)
    return sae


def dense(latents: Latents) -> torch.Tensor:
    shape = (*latents.acts.shape[:-1], N)
    return torch.zeros(shape, dtype=latents.acts.dtype).scatter_add(-1, latents.indices, latents.acts)


def pre(sae, x):
    return (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc


def expected(sae, x):
    acts = pre(sae, x)
    return torch.where(acts > sae.threshold, acts, 0.0).relu()


def states(*shape):
    return torch.randn(*shape, WIDTH, generator=rng(9), dtype=torch.float64)


def test_a_latent_is_active_above_its_own_threshold():
    sae, x = jumping(), states(3, 5)
    latents = sae.encode(x)
    assert latents.acts.shape == (3, 5, N) and sae.activation.name == "jumprelu"
    assert_close(dense(latents), expected(sae, x))
    assert_close(sae(x), expected(sae, x) @ sae.W_dec + sae.b_dec)
    counts = (dense(latents) > 0).sum(-1)
    assert counts.min() > 0 and counts.min() < counts.max() < N  # the number differs from token to token


def test_gradients_are_those_of_the_dense_formula():
    sae, x = jumping(), states(7).requires_grad_()
    asked = [x, *sae.parameters()]
    sparse = torch.autograd.grad(sae(x).square().sum(), asked)
    x_hat = expected(sae, x) @ sae.W_dec + sae.b_dec
    for ours, theirs in zip(sparse, torch.autograd.grad(x_hat.square().sum(), asked), strict=True):
        assert_close(ours, theirs)


def test_nothing_is_cut_off_in_silence():
    sae, x = jumping(), states(40)
    most = int((expected(sae, x) > 0).sum(-1).max())
    sae.k = most
    assert_close(dense(sae.encode(x)), expected(sae, x))
    sae.k = most - 1
    with pytest.raises(ValueError, match=f"has {most} active latents, and k_max is {most - 1}: .* k_max={most} or"):
        sae.encode(x)


def test_weights_that_are_nan_are_not_taken_for_silence():
    sae = jumping()
    with torch.no_grad():
        sae.W_enc[3] = torch.nan
    assert sae.encode(states(4)).acts.isnan().any()


def test_no_tokens_give_empty_results():
    assert jumping()(torch.zeros(0, WIDTH)).shape == (0, WIDTH)


def test_the_threshold_moves_and_is_saved_with_the_sae():
    sae = jumping()
    assert set(sae.state_dict()) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
    assert sae.to(torch.float32).activation.threshold.dtype == torch.float32
    assert set(SAE(WIDTH, N, 4).state_dict()) == {"W_enc", "b_enc", "W_dec", "b_dec"}


def test_a_clamp_competes_with_the_latent_s_own_threshold_and_with_no_other_latent():
    """Equations 3 to 5 with the SAE's own activation in the place of TopK."""
    sae, x = jumping(places=15).requires_grad_(False), states(6)
    edits = [Edit(2, 5.0), Edit(7, 0.0), Edit(11, float(sae.threshold[11]) / 2), Edit(4, 1.5, "scale")]
    z = pre(sae, x).relu()
    z[:, 2], z[:, 7], z[:, 11], z[:, 4] = 5.0, 0.0, float(sae.threshold[11]) / 2, 1.5 * z[:, 4]
    z = torch.where(z > sae.threshold, z, 0.0)
    assert (z[:, 11] == 0).all() and (z[:, 2] == 5).all()
    assert_close(dense(steer_latents(sae, x, edits)), z)
    everywhere = torch.ones(6, dtype=torch.bool)
    assert_close(steered_states(sae, x, edits, everywhere, keep_error=False), z @ sae.W_dec + sae.b_dec)
    kept = x + (z - expected(sae, x)) @ sae.W_dec
    assert_close(steered_states(sae, x, edits, everywhere, keep_error=True), kept)
    assert torch.equal(steered_states(sae, x, [], everywhere, keep_error=True), x)


def test_a_gated_sae_is_one_with_thresholds():
    draw = rng(3)
    W, D, b_gate, b_mag, r_mag = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((N, WIDTH), (N, WIDTH), (N,), (N,), (N,))
    )
    b_dec, x = torch.randn(WIDTH, generator=draw, dtype=torch.float64), states(50)
    u = (x - b_dec) @ W.T
    z = (u + b_gate > 0) * (u * r_mag.exp() + b_mag).relu()
    weights = gated(SAEWeights(W, b_mag, D, b_dec, N), r_mag, b_gate)
    sae = SAE(WIDTH, N, N, threshold=weights.threshold, dtype=torch.float64)
    sae.load_state_dict({name: value for name, value in weights._asdict().items() if name not in ("k", "hook")})
    assert_close(dense(sae.encode(x)), z)
