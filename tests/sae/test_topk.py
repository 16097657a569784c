"""The SAE against eq. 1 and 2 in dense form, gradients against autograd, losses by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch.testing import assert_close

from lmm_sae_nb.sae import kernels, topk
from lmm_sae_nb.sae.losses import auxk_loss, fvu, geometric_median
from lmm_sae_nb.sae.topk import Latents, TopKSAE, decode_sparse, encode_topk
from lmm_sae_nb.support.tensor_files import require_finite


def rng(seed):
    return torch.Generator().manual_seed(seed)


def random_sae(seed=0, width=6, n_latents=20, k=4, dtype=torch.float64):
    """An SAE in the middle of training: encoder, decoder and biases all different."""
    made = TopKSAE(width, n_latents, k, dtype=dtype, generator=rng(seed))
    with torch.no_grad():
        for weights in made.parameters():
            weights.add_(torch.randn(weights.shape, generator=rng(seed + 1), dtype=dtype), alpha=0.3)
    return made


def dense_encode(sae, x, k):
    """Eq. 1 with a dense z."""
    z = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    top = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter(-1, top.indices, top.values)


def dense(latents, n_latents):
    shape = (*latents.acts.shape[:-1], n_latents)
    return torch.zeros(shape, dtype=latents.acts.dtype).scatter_add(-1, latents.indices, latents.acts)


shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)


@settings(deadline=None)
@given(shapes, st.integers(1, 9), st.integers(1, 12), st.data())
def test_encode_and_decode_are_eq_1_and_2(shape, width, n_latents, data):
    k = data.draw(st.integers(1, n_latents))
    sae = random_sae(data.draw(st.integers(0, 9)), width, n_latents, k)
    x = torch.randn(*shape, width, generator=rng(0), dtype=torch.float64)
    latents = sae.encode(x)
    z = dense_encode(sae, x, k)
    assert latents.acts.shape == latents.indices.shape == (*shape, k)
    assert (latents.acts >= 0).all()
    assert_close(dense(latents, n_latents), z)
    assert_close(sae.decode(latents), z @ sae.W_dec + sae.b_dec)
    assert_close(sae(x), z @ sae.W_dec + sae.b_dec)


def test_blocks_of_tokens_change_nothing(monkeypatch):
    sae, x = random_sae(), torch.randn(11, 6, dtype=torch.float64, generator=rng(3))
    whole = dense(sae.encode(x), sae.n_latents)
    for block in (1, sae.n_latents * 3):
        monkeypatch.setattr(kernels, "BLOCK", block)
        assert_close(dense(sae.encode(x), sae.n_latents), whole)


def test_no_tokens_give_empty_results():
    sae = random_sae()
    assert sae(torch.zeros(0, 6)).shape == (0, 6)


def test_gradients_are_those_of_the_dense_formula():
    sae, x = random_sae(), torch.randn(7, 6, dtype=torch.float64, generator=rng(5), requires_grad=True)
    target = torch.randn(7, 6, dtype=torch.float64, generator=rng(6))
    asked = [x, *sae.parameters()]
    sparse = torch.autograd.grad((sae(x) - target).square().sum(), asked)
    x_hat = dense_encode(sae, x, sae.k) @ sae.W_dec + sae.b_dec
    for ours, theirs in zip(sparse, torch.autograd.grad((x_hat - target).square().sum(), asked), strict=True):
        assert_close(ours, theirs)


def test_gradients_are_those_of_finite_differences():
    sae, x = random_sae(k=2), torch.randn(3, 6, dtype=torch.float64, generator=rng(5), requires_grad=True)
    encode = lambda *inputs: encode_topk(*inputs, 2).acts  # noqa: E731
    assert torch.autograd.gradcheck(encode, (x, sae.W_enc, sae.b_enc, sae.b_dec))
    acts, indices = (part.detach() for part in sae.encode(x))
    decode = lambda acts, W_dec: decode_sparse(Latents(acts, indices), W_dec)  # noqa: E731
    assert torch.autograd.gradcheck(decode, (acts.requires_grad_(), sae.W_dec))


def test_a_latent_that_relu_closed_gets_no_gradient():
    sae = random_sae(k=20)
    with torch.no_grad():
        sae.b_enc[3] = -1e3
    sae(torch.randn(5, 6, dtype=torch.float64, generator=rng(1))).sum().backward()
    assert not sae.W_enc.grad[3].any() and not sae.b_enc.grad[3] and not sae.W_dec.grad[3].any()
    assert sae.W_enc.grad.any()


def test_reconstruction_keeps_the_dtype_of_the_hidden_states():
    sae = random_sae(dtype=torch.float32)
    x = torch.randn(5, 6, generator=rng(1)).bfloat16()
    assert sae.encode(x).acts.dtype == torch.float32
    assert sae(x).dtype == torch.bfloat16
    assert_close(sae(x), sae(x.float()).bfloat16())


def test_start():
    sae = TopKSAE(6, 20, 4, generator=rng(0))
    assert_close(sae.W_dec.norm(dim=1), torch.ones(20))
    assert torch.equal(sae.W_enc, sae.W_dec) and sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert not sae.b_enc.any() and not sae.b_dec.any()
    assert torch.equal(sae.W_dec, TopKSAE(6, 20, 4, generator=rng(0)).W_dec)
    assert (sae.width, sae.n_latents, sae.k, TopKSAE(2, 300).k) == (6, 20, 4, 256)


@pytest.mark.parametrize("k", [0, 21])
def test_k_is_at_most_the_number_of_latents(k):
    with pytest.raises(ValueError, match=f"k is {k}, with 20 latents"):
        TopKSAE(6, 20, k)


def test_another_width_is_refused_with_both_widths_and_the_remedy():
    with pytest.raises(ValueError, match=r"width 6, .* width 5; .*01_train_sae"):
        random_sae().encode(torch.zeros(2, 5))


def test_rows_are_brought_to_length_one_and_gradients_across_them():
    sae = random_sae()
    sae.normalise_rows()
    assert_close(sae.W_dec.norm(dim=1), torch.ones(20, dtype=torch.float64))
    sae.W_dec.grad = torch.randn(20, 6, dtype=torch.float64, generator=rng(9))
    before = sae.W_dec.grad.clone()
    sae.drop_parallel_gradient()
    assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(20, dtype=torch.float64))
    removed = before - sae.W_dec.grad  # along the rows, and nothing else
    assert_close(removed, (removed * sae.W_dec).sum(1, keepdim=True) * sae.W_dec)


def test_fvu_by_hand():
    x = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    assert fvu(x, x) == 0
    assert fvu(x, torch.tensor([[2.0, 0.0], [2.0, 0.0]])) == 1  # the mean explains nothing
    assert fvu(x, torch.tensor([[0.0, 0.0], [3.0, 1.0]])) == (1 + 1) / (4 + 4)


def auxk_case():
    """Two latents, the second dead. x = (3, 4); the first rebuilds (3, 0), so e = (0, 4).

    The dead one's encoder row is (0, 0.5), its decoder row (0, 1): activation 2, e_hat = (0, 2).
    """
    sae = TopKSAE(2, 2, 1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
        sae.W_dec.copy_(torch.eye(2))
    x = torch.tensor([[3.0, 4.0]])
    return (
        sae,
        x,
        sae.decode(Latents(torch.tensor([[3.0]]), torch.tensor([[0]]))),
        torch.tensor([False, True]),
    )


def test_auxk_by_hand():
    sae, x, x_hat, dead = auxk_case()
    loss = auxk_loss(sae, x, x_hat, dead, k_aux=1)
    assert loss == (4 - 2) ** 2 / 4**2
    loss.backward()
    # d/d e_hat = 2 (e_hat - e) / 16 = -1/4 on the second axis: more of the dead latent is less loss.
    assert_close(sae.W_dec.grad, torch.tensor([[0.0, 0.0], [0.0, -0.25 * 2]]))
    assert_close(sae.W_enc.grad, torch.tensor([[0.0, 0.0], [-0.25 * 3, -0.25 * 4]]))
    assert_close(sae.b_enc.grad, torch.tensor([0.0, -0.25]))
    assert_close(sae.b_dec.grad, torch.tensor([0.0, 0.25 * 0.5]))  # through the encoder only: e_hat has no b_dec


def test_auxk_descends_towards_the_residual_not_away_from_it():
    sae, x, x_hat, dead = auxk_case()
    optimiser = torch.optim.SGD([sae.W_enc, sae.W_dec], lr=0.01)
    for _ in range(200):
        optimiser.zero_grad()
        loss = auxk_loss(sae, x, x_hat, dead, k_aux=1)
        loss.backward()
        optimiser.step()
    assert loss < 1e-6
    act = x[0] @ sae.W_enc[1]
    assert_close((act * sae.W_dec[1]).detach(), torch.tensor([0.0, 4.0]), atol=1e-2, rtol=0)


def test_auxk_leaves_the_residual_alone():
    sae, x, _, dead = auxk_case()
    loss = auxk_loss(sae, x, sae(x), dead, k_aux=1)
    loss.backward()
    assert not sae.W_dec.grad[0].any() and not sae.W_enc.grad[0].any()  # the living latent's share of e


def test_auxk_weighs_few_dead_latents_less_and_none_nothing():
    sae, x, x_hat, dead = auxk_case()
    assert auxk_loss(sae, x, x_hat, dead, k_aux=4) == 0.25 * (4 - 2) ** 2 / 4**2
    none = auxk_loss(sae, x, x_hat, torch.zeros(2, dtype=torch.bool), k_aux=4)
    assert none == 0 and none.shape == ()
    assert auxk_loss(sae, x, x, dead, k_aux=1) == 0  # nothing left to explain


def test_auxk_equals_its_dense_formula():
    sae = random_sae(n_latents=30)
    x = torch.randn(9, 6, dtype=torch.float64, generator=rng(2))
    x_hat, dead = sae(x), torch.rand(30, generator=rng(4)) < 0.5
    pre = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc) * dead
    top = pre.topk(3)
    e_hat = torch.zeros_like(pre).scatter(1, top.indices, top.values) @ sae.W_dec
    e = (x - x_hat).detach()
    expected = ((e - e_hat) ** 2).sum() / (e**2).sum()
    assert_close(auxk_loss(sae, x, x_hat, dead, k_aux=3), expected)


def test_geometric_median_minimises_the_sum_of_distances():
    x = torch.randn(40, 3, dtype=torch.float64, generator=rng(8)) * torch.tensor([1.0, 3.0, 0.5]) + 2
    cost = lambda point: float((x - torch.as_tensor(point)).norm(dim=1).sum())  # noqa: E731
    best = minimize(cost, x.mean(0).numpy(), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-9})
    assert_close(geometric_median(x), torch.as_tensor(best.x), atol=1e-3, rtol=0)


def test_geometric_median_in_one_dimension_is_the_median():
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [1e4]])  # the mean is 2002
    assert_close(geometric_median(x, steps=1000, tolerance=0), torch.tensor([3.0]), atol=1e-2, rtol=0)


def test_geometric_median_of_one_point_is_that_point():
    assert_close(geometric_median(torch.full((5, 2), 7.0)), torch.full((2,), 7.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_require_finite_counts_the_bad_tokens(bad):
    x = torch.zeros(2, 3, 4)
    require_finite(x, "layer 2")
    x[0, 1, 2] = x[1, 2, 0] = bad
    with pytest.raises(ValueError, match="layer 2: 2 of 6 tokens"):
        require_finite(x, "layer 2")


def test_a_sum_that_overflows_is_still_finite():
    require_finite(torch.full((4, 4), 3e38), "layer 2")


def test_save_and_load(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        sae = random_sae(dtype=dtype)
        sae.save(tmp_path)
        loaded = TopKSAE.load(tmp_path)
        assert (loaded.k, loaded.W_dec.dtype) == (sae.k, dtype)
        for name, weights in sae.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weights)
    assert all(weights.requires_grad for weights in loaded.parameters())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("k", [0, -1, 21, 5000, 2.5, True, None])
def test_a_k_that_the_loops_cannot_take_is_refused_by_every_call(k):
    """Compiled loops check nothing: with more than there is they would not end."""
    sae, x = random_sae(), torch.randn(3, 6, generator=rng(1))
    number = "k is .*, with 20 latents; choose a whole number from 1 to 20"
    calls = {
        "encode": lambda: sae.encode(x, k=k),
        "encode_topk": lambda: topk.encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, k),
        "top_k": lambda: kernels.top_k(x, sae.W_enc, sae.b_enc, k),
    }
    for name, call in calls.items():
        if (name, k) != ("encode", None):  # None is the SAE's k
            with pytest.raises(ValueError, match=number):
                call()
    some = torch.tensor([3, 4])
    with pytest.raises(ValueError, match=r"k is .*, with 2 latents"):
        topk.encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, 3, some)
    with pytest.raises(ValueError, match=r"k is .*, with 4 latents"):
        sae.encode(x, k=4).top(k)


@pytest.mark.parametrize("index", [-1, 20, 10**9])
def test_latents_that_the_sae_does_not_have_are_refused(index):
    sae = random_sae()
    latents = topk.Latents(torch.ones(2, 3), torch.tensor([[0, 1, 2], [0, 1, index]]))
    with pytest.raises((IndexError, RuntimeError)):
        sae.decode(latents)
