"""Training meets its own definitions: what is mixed, when the rate falls, what counts as dead, what is recovered."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make
from PIL import Image

from lmm_sae_nb.lmm import LMM
from lmm_sae_nb.sae import TopKSAE
from lmm_sae_nb.train import evaluate_sae, learning_rate, mixed, stream, train_sae


@pytest.fixture(scope="module")
def lmm():
    torch.manual_seed(0)
    return LMM(*make("picture_world"))


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    rows = []
    for n in range(5):
        image = Image.fromarray(rng.integers(0, 256, (192, 192, 3), dtype=np.uint8)) if n % 4 else None
        rows.append({"image": image, "question": f"what is {n} ?", "answer": "it is " + "so " * n})
    return rows


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), buffer=st.integers(1, 90), batch=st.integers(1, 30))
def test_mixing_neither_loses_nor_repeats_a_token(sizes, buffer, batch):
    numbers = itertools.count()
    made = [torch.tensor([[float(next(numbers))] for _ in range(size)]) for size in sizes]
    out = []
    try:
        for part in mixed(iter(made), max(buffer, batch), batch, torch.Generator().manual_seed(0)):
            assert len(part) == batch
            out += part.flatten().tolist()
    except RuntimeError as error:  # the stream ended: a generator turns StopIteration into this
        assert isinstance(error.__cause__, StopIteration)
    assert len(out) == len(set(out))
    assert set(out) <= set(range(sum(sizes)))


def test_a_buffer_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="batches of 9 tokens from a buffer of 8"):
        next(mixed(iter([]), 8, 9, torch.Generator()))


def test_mixing_mixes_across_samples():
    made = (torch.full((10, 1), float(n)) for n in itertools.count())
    first = next(mixed(made, 200, 50, torch.Generator().manual_seed(0)))
    assert len(first.unique()) > 10


def test_the_rate_rises_then_falls_to_nothing_in_optimiser_steps():
    rates = [learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(2 / 90)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_the_stream_holds_the_chosen_kinds_and_no_others(lmm, samples):
    generator = torch.Generator().manual_seed(3)
    got = next(stream(lmm, samples[1:2], 0, ("base", "text"), generator, 1))
    prompt = lmm.prompt(samples[1]["question"], samples[1]["image"], answers=samples[1]["answer"])
    want = lmm.hidden_states(prompt, 0)[0][prompt.spans[0].mask("base", "text")]
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="no sample has a token of kinds tiles"):
        next(stream(lmm, samples[:1], 0, ("tiles",), generator, 1))


def test_hidden_states_that_are_not_finite_stop_training(lmm, samples, tmp_path):
    with (
        lmm.spliced(0, lambda hidden: hidden * float("nan")),
        pytest.raises(ValueError, match="NaN or infinity"),
    ):
        train_sae(lmm, samples, 1, n_latents=8, k=2, steps=1, batch_tokens=64, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_training_reduces_what_is_unexplained_and_repeats_itself(lmm, samples, tmp_path):
    wanted = dict(
        n_latents=48,
        k=4,
        steps=40,
        batch_tokens=256,
        lr=3e-3,
        seed=7,
        dead_after_tokens=2000,
        buffer_tokens=1024,
        log_every=1,
    )
    one = train_sae(lmm, samples, 1, folder=tmp_path / "one", **wanted)
    two = train_sae(lmm, samples, 1, folder=tmp_path / "two", **wanted)
    assert one.history[-1]["fvu"] < 0.7 * one.history[0]["fvu"]
    assert [row["fvu"] for row in one.history] == [row["fvu"] for row in two.history]
    assert one.history[-1]["tokens"] == 40 * 256
    torch.testing.assert_close(one.sae.W_dec.norm(dim=1), torch.ones(48))
    loaded = TopKSAE.load(tmp_path / "one")
    assert all(torch.equal(a, b) for a, b in zip(one.sae.parameters(), loaded.parameters(), strict=True))


def test_nothing_to_train_on_is_refused(lmm, samples, tmp_path):
    with pytest.raises(ValueError, match="0 samples"):
        train_sae(lmm, [], 0, n_latents=8, k=2, steps=1, folder=tmp_path)
    with pytest.raises(ValueError, match="no layer 99"):
        train_sae(lmm, samples, 99, n_latents=8, k=2, steps=1, batch_tokens=16, folder=tmp_path)


class Perfect(TopKSAE):
    """Reconstructs exactly, by carrying x in its first `width` latents."""

    def __init__(self, width):
        super().__init__(width, 2 * width, 2 * width)
        eye = torch.eye(width)
        self.W_enc.data = torch.cat([eye, -eye])
        self.W_dec.data = torch.cat([eye, -eye])


def test_a_perfect_reconstruction_explains_and_recovers_everything(lmm, samples):
    measured = evaluate_sae(lmm, Perfect(lmm.width), samples, 1, batch_samples=2)
    assert measured["fvu"] == pytest.approx(0, abs=1e-9)
    assert measured["loss_recovered"] == pytest.approx(1, abs=1e-3)
    assert measured["l0"] == pytest.approx(lmm.width, rel=0.05)  # of each pair x, -x one is positive


@torch.no_grad()
def test_fvu_and_dead_fraction_by_brute_force(lmm, samples):
    sae = TopKSAE(lmm.width, 40, 3, generator=torch.Generator().manual_seed(5))
    measured = evaluate_sae(lmm, sae, samples, 1, kinds=("base", "text"), batch_samples=2)
    tokens, texts = [], []
    for row in samples:
        prompt = lmm.prompt(row["question"], row["image"], answers=row["answer"])
        hidden = lmm.hidden_states(prompt, 1)[0]
        tokens.append(hidden[prompt.spans[0].mask("base", "text")])
        texts.append(hidden[prompt.spans[0].mask("text")])
    x, text = torch.cat(tokens), torch.cat(texts)
    z = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    kept = z.topk(3, -1)
    dense = torch.zeros_like(z).scatter(-1, kept.indices, kept.values)
    unexplained = (x - dense @ sae.W_dec - sae.b_dec).square().sum() / (x - x.mean(0)).square().sum()
    own = (text - sae(text)).square().sum() / (text - text.mean(0)).square().sum()
    assert measured["fvu"] == pytest.approx(float(unexplained), rel=1e-3)
    assert measured["fvu_text"] == pytest.approx(float(own), rel=1e-3)
    assert measured["dead_fraction"] == pytest.approx(float((dense == 0).all(0).float().mean()))
    assert measured["tokens"] == len(x)


def test_an_sae_of_another_width_is_refused(lmm, samples):
    with pytest.raises(ValueError, match="width 9"):
        evaluate_sae(lmm, TopKSAE(9, 12, 2), samples, 1)
