"""Every sparse kernel, compiled and plain, against dense formulas in float64 and torch's Adam."""

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lmm_sae_nb.sae import kernels, losses
from lmm_sae_nb.sae.adam import SAEAdam
from lmm_sae_nb.sae.losses import auxk_loss, fvu
from lmm_sae_nb.sae.topk import Latents, TopKSAE, decode_sparse


@pytest.fixture(params=[True, False], ids=["compiled", "plain"])
def way(request, monkeypatch):
    """Each way in turn; blocks so small that everything is made of several."""
    monkeypatch.setattr(kernels, "COMPILED", request.param)
    monkeypatch.setattr(kernels, "BLOCK", 64)
    monkeypatch.setattr(kernels, "TOKENS", 5)
    monkeypatch.setattr(kernels, "LATENTS", 7)
    if request.param:
        assert kernels.is_compiled(torch.zeros(1)), "numba is a dependency; install it or unset NUMBA_DISABLE_JIT"
    return request.param


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randn(seed, *shape):
    return torch.randn(*shape, generator=rng(seed))


anyone = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.tuples(st.integers(1, 13), st.integers(1, 300), st.integers(1, 40), st.integers(0, 99))


# ---- TopK -------------------------------------------------------------------------------------------------------


@anyone
@given(st.integers(1, 9), st.integers(1, 200), st.integers(0, 99), st.booleans(), st.data())
def test_top_k_keeps_the_largest_whatever_the_ties(way, tokens, n_latents, seed, ties, data):
    k = data.draw(st.integers(1, n_latents))
    pre = randn(seed, tokens, n_latents)
    if ties:
        pre = (2 * pre).round()
    bias = randn(seed + 1, n_latents).round()
    acts, indices = kernels.top_k(torch.eye(tokens), pre.T.contiguous(), bias, k)
    assert all(len(set(row)) == k for row in indices.tolist()), "a latent is chosen once"
    whole = (pre + bias).relu()
    assert_close(acts, whole.gather(1, indices), rtol=0, atol=0)
    assert_close(acts.sort(descending=True).values, whole.sort(descending=True).values[:, :k], rtol=0, atol=0)


def test_top_k_among_many_latents(way, monkeypatch):
    """Enough of them that the choice goes by groups: 4,000 latents, 62 groups of 64."""
    monkeypatch.setattr(kernels, "BLOCK", 2**20)
    pre = randn(0, 6, 4000)
    pre[1] = -pre[1].abs()  # none is positive
    pre[2, :3990] = -1.0  # fewer differ than are kept
    pre[3] = torch.arange(4000)
    pre[4, ::2] = -1e30
    acts, indices = kernels.top_k(torch.eye(6), pre.T.contiguous(), torch.zeros(4000), 16)
    best = pre.topk(16)
    assert_close(acts.sort(descending=True).values, best.values.relu(), rtol=0, atol=0)
    assert_close(pre.gather(1, indices).sort(descending=True).values, best.values, rtol=0, atol=0)
    assert set(indices[3].tolist()) == set(range(3984, 4000))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_shows_in_the_activations(way, bad):
    x = randn(0, 3, 5)
    x[1, 2] = bad
    acts, indices = kernels.top_k(x, randn(1, 50, 5), torch.zeros(50), 4)
    assert acts[[0, 2]].isfinite().all() and not acts[1].isfinite().all()
    assert ((indices >= 0) & (indices < 50)).all()


def test_autocast_rounds_the_dense_product_alone(way):
    sae, x = TopKSAE(64, 128, 8, generator=rng(0)), randn(1, 9, 64)
    exact = sae.encode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = sae.encode(x)
        x_hat = sae.decode(rough)
    assert rough.acts.dtype == x_hat.dtype == torch.float32
    pre = ((x - sae.b_dec).bfloat16() @ sae.W_enc.bfloat16().T).float().relu()
    assert_close(rough.acts, pre.gather(1, rough.indices))
    assert_close(rough.acts, rough.acts.bfloat16().float(), rtol=0, atol=0)
    assert_close(rough.acts.sort().values, exact.acts.sort().values, rtol=0.02, atol=0.02)
    assert not torch.equal(rough.acts, exact.acts)
    assert_close(x_hat, dense(rough, 128) @ sae.W_dec.double().float(), rtol=1e-5, atol=1e-5)


# ---- sums over active latents -----------------------------------------------------------------------------------


def dense(latents, n_latents):
    z = torch.zeros(len(latents.acts), n_latents, dtype=latents.acts.dtype)
    return z.scatter_add(1, latents.indices, latents.acts)


@anyone
@given(sizes, st.data())
def test_decoding_and_its_gradients_are_the_dense_ones(way, size, data):
    tokens, width, n_latents, seed = size
    k = data.draw(st.integers(1, n_latents))
    indices = torch.rand(tokens, n_latents, generator=rng(seed)).argsort(1)[:, :k]
    acts, rows, grad = randn(seed, tokens, k).relu(), randn(seed + 1, n_latents, width), randn(seed + 2, tokens, width)
    acts[:: data.draw(st.integers(1, 3))] = 0  # tokens of which nothing is active
    ours = acts.requires_grad_(), rows.requires_grad_()
    theirs = [part.detach().double().requires_grad_() for part in ours]
    out, expected = decode_sparse(Latents(ours[0], indices), ours[1]), None
    expected = dense(Latents(theirs[0], indices), n_latents) @ theirs[1]
    assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    for mine, exact in zip(
        torch.autograd.grad(out, ours, grad), torch.autograd.grad(expected, theirs, grad.double()), strict=True
    ):
        assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_latent_listed_twice_counts_twice(way):
    rows = randn(0, 5, 3).requires_grad_()
    acts = torch.tensor([[1.0, 2.0]], requires_grad=True)
    out = decode_sparse(Latents(acts, torch.tensor([[4, 4]])), rows)
    assert_close(out, 3 * rows[4:])
    out.sum().backward()
    assert_close(acts.grad, rows[4].sum().detach().expand(1, 2))
    assert_close(rows.grad[4], torch.full((3,), 3.0))


def test_no_tokens_give_empty_results(way):
    sae = TopKSAE(6, 20, 4)
    assert sae(torch.zeros(0, 6)).shape == (0, 6)
    sae(torch.zeros(0, 6)).sum().backward()
    assert all(not weights.grad.any() for weights in sae.parameters())


def test_an_index_beyond_the_latents_is_refused():
    rows = torch.zeros(5, 3, requires_grad=True)
    for wrong in (5, -1):
        with pytest.raises((IndexError, RuntimeError), match=r"-1|5"):
            decode_sparse(Latents(torch.ones(1, 1), torch.tensor([[wrong]])), rows)


def training_case(size, data):
    """An SAE in training and its tokens: ties between latents, tokens of zeros, closed latents, any k."""
    tokens, width, n_latents, seed = size
    sae = TopKSAE(width, n_latents, data.draw(st.integers(1, n_latents)), generator=rng(seed))
    with torch.no_grad():
        for n, weights in enumerate(sae.parameters()):
            weights.add_(randn(seed + n, *weights.shape), alpha=0.1)
        sae.b_enc[:: data.draw(st.integers(1, 4))] -= 5.0
    x = randn(seed + 9, tokens, width)
    x[:: data.draw(st.integers(2, 5))] = 0
    return sae, x


def dense_loss(weights, k, x, dead, k_aux):
    """FVU + AuxK / 32 as formulas, with a dense z."""
    W_enc, b_enc, W_dec, b_dec = weights

    def decoded(pre, k):
        top = pre.topk(k)
        return torch.zeros_like(pre).scatter(1, top.indices, top.values) @ W_dec

    pre = ((x - b_dec) @ W_enc.T + b_enc).relu()
    x_hat = decoded(pre, k) + b_dec
    loss = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    if dead.any():
        e, n_dead = (x - x_hat).detach(), int(dead.sum())
        left = e - decoded(pre * dead, min(k_aux, n_dead))
        loss = loss + min(1, n_dead / k_aux) * left.square().sum() / e.square().sum() / 32
    return loss


@anyone
@given(sizes, st.data())
def test_a_training_steps_gradients_are_those_of_dense_autograd(way, size, data):
    sae, x = training_case((size[0] + 2, *size[1:]), data)
    dead = torch.rand(sae.n_latents, generator=rng(3)) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    k_aux = data.draw(st.integers(1, 9))
    latents = sae.encode(x)
    x_hat = sae.decode(latents)
    (fvu(x, x_hat) + auxk_loss(sae, x, x_hat, dead, k_aux) / 32).backward()
    exact = [weights.detach().double().requires_grad_() for weights in sae.parameters()]
    expected = dense_loss(exact, sae.k, x.double(), dead, k_aux)
    # rounding decides between latents that float32 cannot tell apart: such a case proves nothing
    pre = ((x.double() - exact[3]) @ exact[0].T + exact[1]).detach()
    gaps = pre.relu().sort(descending=True).values.diff().abs()
    assume(not ((gaps < 1e-5) & (gaps > 0)).any() and (pre.abs() > 1e-5).all())
    assume(not 0 < pre.max() < 3e-2)  # a gradient of activations that are hardly more than rounding
    expected.backward()
    for (name, mine), theirs in zip(sae.named_parameters(), exact, strict=True):
        scale = float(theirs.grad.abs().max()) + 1e-6
        assert_close(mine.grad.double() / scale, theirs.grad / scale, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: n + m)


@pytest.mark.slow
@anyone
@given(sizes, st.data())
def test_auxk_in_parts_has_the_value_and_the_gradients_of_the_whole(monkeypatch, size, data):
    sae, x = training_case((size[0] + 2, *size[1:]), data)
    dead, k_aux = torch.arange(sae.n_latents) % 3 < 2, data.draw(st.integers(1, 9))
    x_hat = sae(x).detach()
    found = {}
    for places in (2**25, 2 * k_aux, 1):
        monkeypatch.setattr(losses, "PLACES", places)
        sae.zero_grad()
        loss = auxk_loss(sae, x, x_hat, dead, k_aux)
        if loss.requires_grad:
            loss.backward()
        found[places] = [loss.detach(), *(weights.grad for weights in sae.parameters())]
    whole, *parts = found.values()
    for part in parts:
        for one, other in zip(whole, part, strict=True):
            assert_close(one, other, rtol=1e-4, atol=1e-5)


# ---- the optimiser ----------------------------------------------------------------------------------------------


def given_gradients(sae, seed, size=1.0):
    for n, weights in enumerate(sae.parameters()):
        weights.grad = size * randn(seed + n, *weights.shape)


def reference_step(sae, adam, max_norm=1.0):
    """The optimiser's step as four plain operations."""
    sae.drop_parallel_gradient()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), max_norm)
    adam.step()
    sae.normalise_rows()


@anyone
@given(st.integers(2, 200), st.integers(1, 40), st.integers(0, 99), st.sampled_from([1e-4, 0.02, 1.0, 30.0]))
def test_steps_are_those_of_torch_adam_on_projected_and_clipped_gradients(way, width, n_latents, seed, size):
    ours = TopKSAE(width, n_latents, 1, generator=rng(seed))
    theirs = TopKSAE(width, n_latents, 1, generator=rng(seed)).double()
    theirs.load_state_dict(ours.state_dict())
    optimiser = SAEAdam(ours, lr=0.1)
    adam = torch.optim.Adam(theirs.parameters(), lr=0.1)
    for step in range(4):
        for group in (*optimiser.param_groups, *adam.param_groups):
            group["lr"] = 0.01 * (step + 1)
        given_gradients(ours, 10 * step + seed, size)
        for mine, exact in zip(ours.parameters(), theirs.parameters(), strict=True):
            exact.grad = mine.grad.double()
        kept = ours.W_dec.grad.clone()
        optimiser.step()
        reference_step(theirs, adam)
        assert torch.equal(ours.W_dec.grad, kept)
    for (name, mine), exact in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # the sign of an element whose gradient is nothing but rounding is anyone's
        assert_close(mine.double(), exact, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: n + m)
    assert_close(ours.W_dec.norm(dim=1), torch.ones(n_latents))


@pytest.mark.parametrize("shape", [(40, 7), (1, 5), (33,)])
def test_torchs_fused_adam_does_the_step_that_the_cpu_does(monkeypatch, shape):
    monkeypatch.setattr(kernels, "BLOCK", 64)  # so that there are several blocks of rows
    states = [[randn(0, *shape), torch.zeros(shape), torch.zeros(shape)] for _ in range(2)]
    for weights, *_ in states:
        weights.div_(weights.norm(dim=-1, keepdim=True))
    for step in range(1, 4):
        grad, scale, adam = randn(step, *shape), torch.tensor(0.7), kernels.Adam(0.01 * step, 0.9, 0.999, 1e-8, step)
        kept = grad.clone()
        for fused, (weights, *moments) in zip((False, True), states, strict=True):
            along = (grad * weights).sum(1) if len(shape) == 2 else None
            kernels.adam_(weights, grad, *moments, adam, scale, along, fused=fused)
        assert torch.equal(grad, kept)
    for one, other in zip(*states, strict=True):
        assert_close(one, other)


def test_training_resumed_from_a_state_dict_is_the_same_to_the_bit(way, tmp_path):
    def run(sae, optimiser, steps):
        for step in steps:
            x = randn(step, 12, 24)
            fvu(x, sae(x)).backward()
            optimiser.step()
            optimiser.zero_grad()

    straight = TopKSAE(24, 60, 5, generator=rng(0))
    optimiser = SAEAdam(straight, 0.01, betas=(0.8, 0.99), eps=1e-6, max_norm=0.1)
    run(straight, optimiser, range(4))
    torch.save([straight.state_dict(), optimiser.state_dict()], tmp_path / "half.pt")
    run(straight, optimiser, range(4, 9))
    resumed = TopKSAE(24, 60, 5, generator=rng(5))
    again = SAEAdam(resumed, 1.0)
    weights, state = torch.load(tmp_path / "half.pt", weights_only=True)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    run(resumed, again, range(4, 9))
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    def trained(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            sae = TopKSAE(300, 90, 7, generator=rng(0))
            latents = Latents(randn(1, 40, 7).relu(), torch.rand(40, 90, generator=rng(2)).argsort(1)[:, :7])
            loss = (sae.decode(latents) - randn(3, 40, 300)).square().sum()
            loss.backward()
            summed = kernels.sum_by_latent(*latents, randn(4, 40, 300), sae.W_enc)
            sae.W_enc.grad, sae.b_enc.grad = summed.clone(), torch.ones(90)
            SAEAdam(sae, 0.01, max_norm=1e9).step()
            return [part.detach().clone() for part in (*sae.parameters(), sae.W_dec.grad)]
        finally:
            torch.set_num_threads(before)

    monkeypatch.setattr(kernels, "LATENTS", 8)
    for one, many in zip(trained(1), trained(3), strict=True):
        assert torch.equal(one, many)


def test_the_optimiser_steps_only_what_has_a_gradient(way):
    sae = TopKSAE(4, 6, 2, generator=rng(0))
    before = {name: weights.clone() for name, weights in sae.named_parameters()}
    optimiser = SAEAdam(sae, 0.1)
    sae.b_dec.grad = torch.ones(4)
    assert optimiser.step(lambda: torch.tensor(3.0)) == 3.0
    assert [name for name, weights in sae.named_parameters() if not torch.equal(weights, before[name])] == ["b_dec"]
    optimiser.zero_grad()
    assert all(weights.grad is None for weights in sae.parameters())


def test_the_optimiser_takes_a_state_of_torch_adam(way):
    one, two = (TopKSAE(5, 9, 2, generator=rng(0)) for _ in range(2))
    adam, optimiser = torch.optim.Adam(one.parameters(), lr=0.01), SAEAdam(two, 0.01)
    given_gradients(one, 1)
    reference_step(one, adam)
    two.load_state_dict(one.state_dict())
    state = copy.deepcopy(adam.state_dict()["state"])
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
    for sae in (one, two):
        given_gradients(sae, 7)
    reference_step(one, adam)
    optimiser.step()
    for mine, theirs in zip(two.parameters(), one.parameters(), strict=True):
        assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_accelerate_prepares_it_with_its_schedule(way):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    sae = TopKSAE(8, 20, 3, generator=rng(0))
    alone = TopKSAE(8, 20, 3, generator=rng(0))
    prepared, optimiser = accelerator.prepare(sae, SAEAdam(sae, 0.01))
    plain = SAEAdam(alone, 0.01)
    for step in range(3):
        x = randn(step, 16, 8)
        accelerator.backward(fvu(x, prepared(x)))
        fvu(x, alone(x)).backward()
        for each in (optimiser, plain):
            each.step()
            each.zero_grad()
    for mine, theirs in zip(sae.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# ---- memory and processes ---------------------------------------------------------------------------------------


def test_threads_may_train_beside_each_other():
    def train(seed):
        sae = TopKSAE(32, 64, 4, generator=rng(seed))
        optimiser = SAEAdam(sae, 0.01)
        for step in range(5):
            fvu(x := randn(step, 16, 32), sae(x)).backward()
            optimiser.step()
            optimiser.zero_grad()
        return sae.W_dec.detach()

    alone = [train(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for mine, theirs in zip(pool.map(train, range(4)), alone, strict=True):
            assert torch.equal(mine, theirs)


PROGRAM = """
import os, torch
{before}
from lmm_sae_nb.sae import kernels
from lmm_sae_nb.sae.losses import fvu
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.sae.adam import SAEAdam
torch.set_num_threads(2)
def trained():
    sae = TopKSAE(300, 64, 4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(1))
    fvu(x, sae(x)).backward()
    SAEAdam(sae, 0.01).step()
    return sae.W_dec.detach()
def decoded():
    rows = torch.arange(64 * 300.0).reshape(64, 300)
    return kernels.decode(torch.ones(64, 4), torch.arange(256).reshape(64, 4) % 64, rows)
print(kernels.is_compiled(torch.zeros(1)), float({result}.double().sum()))
{after}
"""


def child(result, before="", after="", **environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(result=result, before=before, after=after)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_without_numba_or_with_it_switched_off_plain_torch_is_used():
    compiled = child("trained()")
    assert compiled[0] == "True"
    missing = "import sys; sys.modules['numba'] = None; import importlib.util as u; f = u.find_spec; "
    missing += "u.find_spec = lambda name, *rest: None if name == 'numba' else f(name, *rest)"
    for plain in (child("trained()", NUMBA_DISABLE_JIT="1"), child("trained()", missing)):
        assert plain[0] == "False"
        assert np.isclose(float(plain[1]), float(compiled[1]), rtol=1e-5)


@pytest.mark.slow
def test_kernels_compile_without_a_folder_for_machine_code():
    """Neither beside the sources nor in the user's cache: every place that numba tries is refused."""
    refuse = "def refuse(*a, **k): raise PermissionError('read-only')\n"
    refuse += "import numba.core.caching as caching; caching.tempfile.TemporaryFile = refuse"
    compiled, plain = child("decoded()", refuse, NUMBA_CACHE_DIR=""), child("decoded()", NUMBA_DISABLE_JIT="1")
    assert (compiled[0], plain[0]) == ("True", "False") and np.isclose(float(plain[1]), float(compiled[1]), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_threads_of_its_own():
    """notebook_launcher forks after the parent has used its threads; the child must not wait for those."""
    after = """
before = decoded()
if (pid := os.fork()) == 0:
    import signal
    signal.alarm(60)
    os._exit(0 if torch.equal(decoded(), before) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    child("decoded()", after=after)


def test_shapes_that_do_not_fit_are_refused_before_a_compiled_loop_runs():
    """A loop would read and write beyond the ends of its arrays."""
    acts, indices, x, rows = torch.ones(5, 2), torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 8), torch.ones(6, 8)
    step = kernels.Adam(0.1, 0.9, 0.9, 1e-8, 1)
    wrong = {
        "bias": lambda: kernels.top_k(x, rows, torch.ones(5), 2),
        "width": lambda: kernels.top_k(x[:, :7].contiguous(), rows, torch.ones(6), 2),
        "indices": lambda: kernels.decode(acts, indices[:4], rows),
        "tokens": lambda: kernels.sum_by_latent(acts, indices, x[:4], rows),
        "narrow": lambda: kernels.sum_by_latent(acts, indices, x[:, :4].contiguous(), rows),
        "gradient": lambda: kernels.decode_gradients(x[:, :4].contiguous(), acts, indices, rows),
        "adam": lambda: kernels.adam_(rows, rows[:4], rows.clone(), rows.clone(), step, torch.ones(())),
        "rows": lambda: kernels.along_rows(rows[:4], rows),
    }
    for name, call in wrong.items():
        with pytest.raises(ValueError, match=r"tensors of the shapes \(.*\) do not fit together"):
            call()
            raise AssertionError(name)
