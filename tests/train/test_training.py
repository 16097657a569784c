"""Training against its definitions: mixing, learning rate, dead latents, evaluation."""

import io
import itertools

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make, noise
from PIL import Image

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.losses import geometric_median
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.files import read_json
from lmm_sae_nb.support.images import UnreadableImage
from lmm_sae_nb.train import training
from lmm_sae_nb.train.evaluate import control_fvus, evaluate_sae, evaluate_saes
from lmm_sae_nb.train.steps import learning_rate
from lmm_sae_nb.train.token_buffer import START, Stream, mixed
from lmm_sae_nb.train.training import train_sae


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


class Process(Accelerator):
    """One process of several that do not exist."""

    num_processes = process_index = device = gather = None  # in place of the properties

    def __init__(self, num_processes, process_index, gather):
        self.num_processes, self.process_index, self.gather, self.device = num_processes, process_index, gather, "cpu"


ALONE = Process(1, 0, lambda counts: counts)


def numbered(sizes):
    """A stream whose parts, over and over, have these sizes, and whose tokens are numbered from 0."""
    starts = [0, *itertools.accumulate(sizes)]

    def part(n):
        epoch, place = divmod(n, len(sizes))
        return torch.arange(starts[place], starts[place + 1]).double()[:, None] + epoch * starts[-1]

    return part


def told(stream, sizes, buffer, batch, start=START, **more):
    of_sizes = dict(buffer_tokens=max(buffer, batch), batch_tokens=batch, seed=0)
    return mixed(stream, len(sizes), ALONE, **of_sizes, start=start, **more)


part_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
MIXED = {"sizes": part_sizes, "buffer": st.integers(1, 90), "batch": st.integers(1, 30)}


@settings(deadline=None, max_examples=60)
@given(**MIXED, blocks=st.integers(1, 4), repeats=st.integers(1, 3))
def test_mixing_gives_each_token_out_as_often_as_wanted_and_loses_none(sizes, buffer, batch, blocks, repeats):
    length = max(buffer, batch) // batch
    told_all = told(numbered(sizes), sizes, buffer, batch, repeats=repeats)
    out = [x.flatten().tolist() for x, _ in itertools.islice(told_all, blocks * repeats * length)]
    assert all(len(x) == batch for x in out)
    for turn in range(blocks * repeats):  # every turn of a block has each of its tokens once
        tokens = itertools.chain.from_iterable(out[turn * length : (turn + 1) * length])
        first = turn // repeats * length * batch
        assert sorted(tokens) == list(range(first, first + length * batch))


def test_a_token_is_given_out_again_among_other_tokens():
    out = itertools.islice(told(numbered([60]), [60], 60, 30, repeats=2), 3)
    first, _, third = (set(x.flatten().tolist()) for x, _ in out)
    assert first != third and first & third


@settings(deadline=None, max_examples=60)
@given(**MIXED, done=st.integers(1, 40), repeats=st.integers(1, 3))
def test_a_stream_goes_on_from_any_position(sizes, buffer, batch, done, repeats):
    whole = list(itertools.islice(told(numbered(sizes), sizes, buffer, batch, repeats=repeats), done + 8))
    resumed = told(numbered(sizes), sizes, buffer, batch, whole[done - 1][1], repeats=repeats)
    for (x, position), (again, position_again) in zip(whole[done:], resumed, strict=False):
        assert torch.equal(x, again)
        assert position == position_again


@settings(deadline=None, max_examples=60)
@given(**MIXED, n=st.integers(2, 5), done=st.integers(0, 9))
def test_processes_share_the_batches_of_one(sizes, buffer, batch, n, done):
    stream = numbered(sizes)
    alone = list(itertools.islice(told(stream, sizes, buffer, batch), done + 6))
    start = alone[done - 1][1] if done else START
    shares = []
    for rank in range(n):
        rounds = itertools.count(start.part - start.part % n, n)

        def gather(_, rounds=rounds):
            first = next(rounds)
            return torch.tensor([len(stream(i)) if i >= start.part else 0 for i in range(first, first + n)])

        process = Process(n, rank, gather)
        sizes_of = dict(buffer_tokens=max(buffer, batch), batch_tokens=batch, seed=0, start=start)
        shares.append(list(itertools.islice(mixed(stream, len(sizes), process, **sizes_of), 6)))
    for number, (x, position) in enumerate(alone[done:]):
        assert sorted(torch.cat([share[number][0] for share in shares]).flatten().tolist()) == sorted(
            x.flatten().tolist()
        )
        assert {share[number][1] for share in shares} == {position}


def test_a_buffer_smaller_than_a_batch_and_no_repeat_at_all_are_refused():
    with pytest.raises(ValueError, match="batches of 9 tokens from a buffer of 8"):
        next(mixed(numbered([8]), 1, ALONE, buffer_tokens=8, batch_tokens=9, seed=0))
    with pytest.raises(ValueError, match="repeats is 0"):
        next(told(numbered([8]), [8], 8, 4, repeats=0))


def test_mixing_mixes_across_parts():
    first, _ = next(told(numbered([10] * 20), [10] * 20, 200, 50))
    assert len((first // 10).unique()) > 10


def test_the_rate_rises_then_falls_to_nothing_in_optimiser_steps():
    rates = [learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(2 / 90)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_the_stream_holds_the_chosen_kinds_and_no_others(lmm, samples):
    got = Stream(lmm, samples[1:2], 0, ("base", "text"), 3, 1)(0)
    prompt = lmm.prompt(samples[1]["question"], samples[1]["image"], answers=samples[1]["answer"])
    want = lmm.hidden_states(prompt, 0)[0][prompt.spans[0].mask("base", "text")]
    torch.testing.assert_close(got, want)


def test_an_epoch_holds_every_sample_once_and_the_next_is_in_another_order(lmm, samples):
    stream = Stream(lmm, samples, 0, ("base", "text"), 3, 2)
    assert stream.parts_an_epoch == 3
    orders = []
    for epoch in (0, 1):
        counts = [len(stream(part)) for part in range(3 * epoch, 3 * epoch + 3)]
        orders.append(counts)
        assert sum(counts) == sum(len(Stream(lmm, [row], 0, ("base", "text"), 3, 1)(0)) for row in samples)
    assert orders[0] != orders[1]


def png(image):
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("streamed", [False, True])
def test_threads_that_prepare_samples_change_no_token_and_no_fault(lmm, streamed):
    """Sample 3 cannot be read; parts come one by one, in strides, and out of order."""
    rows = [{"image": noise(20 + n, 30, seed=n), "question": "what ?", "answer": "so"} for n in range(7)]
    pictures = [{"bytes": png(row["image"]), "path": None} for row in rows]
    pictures[3] = {"bytes": b"no picture", "path": None}
    features = Features(image=datasets.Image(), question=Value("string"), answer=Value("string"))
    samples = Dataset.from_list([row | {"image": p} for row, p in zip(rows, pictures, strict=True)], features=features)
    for stride, parts in ((1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (1, [2, 3, 0, 1])):
        plain, quick = (
            Stream(lmm, samples.to_iterable_dataset() if streamed else samples, 1, SAE_KINDS, 3, 2, "skip",
                   workers=workers, stride=stride)
            for workers in (0, 2)
        )  # fmt: skip
        for part in parts:
            assert torch.equal(plain(part), quick(part))
            assert plain.left_out.faults == quick.left_out.faults
        assert len(plain.left_out.faults) == 1
        quick.close()
    refusing = Stream(lmm, samples, 1, SAE_KINDS, 3, 2, workers=2)
    with pytest.raises(UnreadableImage, match="sample 3 is not a readable image"):
        for part in range(4):
            refusing(part)
    broken = Stream(lmm, samples.select([3]), 1, SAE_KINDS, 3, 2, "skip", workers=2)
    with pytest.raises(ValueError, match="none of 1 samples can be read"):
        broken(0)


def test_a_training_with_threads_ends_with_the_same_bits(lmm, samples, tmp_path):
    how = dict(n_latents=40, k=4, steps=4, batch_tokens=64, buffer_tokens=128, lr=1e-3, batch_samples=2, k_aux=5)
    one, other = (train_sae(lmm, samples, 1, **how, workers=n, folder=tmp_path / str(n)).sae for n in (0, 2))
    for name, weights in one.state_dict().items():
        assert torch.equal(weights, other.state_dict()[name]), name
    assert read_json(tmp_path / "2" / "history.json")["run"]["k_aux"] == 5


def test_token_kinds_that_no_sample_has_are_refused(lmm, samples, tmp_path):
    with pytest.raises(ValueError, match="no sample has a token of the chosen kinds"):
        train_sae(lmm, samples[:1], 0, n_latents=8, k=2, steps=1, batch_tokens=9, kinds=("tiles",), folder=tmp_path)


def test_hidden_states_that_are_not_finite_stop_training(lmm, samples, tmp_path):
    with (
        lmm.spliced(0, lambda hidden: hidden * float("nan")),
        pytest.raises(ValueError, match="NaN or infinity"),
    ):
        train_sae(lmm, samples, 1, n_latents=8, k=2, steps=1, batch_tokens=64, folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_lowers_fvu_and_is_reproducible(lmm, samples, tmp_path):
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


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_training_stopped_within_a_repeated_buffer_ends_with_the_same_bits(lmm, samples, tmp_path, step):
    """A buffer has two batches, given out twice: steps 1 to 4 are of the first, 5 and 6 of the second."""
    wanted = dict(n_latents=40, k=4, steps=6, batch_tokens=256, buffer_tokens=512, repeats=2, batch_samples=2, lr=3e-3,
                  log_every=1, checkpoint_minutes=0)  # fmt: skip

    def stop(rows):
        if len(rows) == step:
            raise KeyboardInterrupt

    whole = train_sae(lmm, samples, 1, folder=tmp_path / "whole", **wanted).sae
    with pytest.raises(KeyboardInterrupt):
        train_sae(lmm, samples, 1, folder=tmp_path / "run", on_log=stop, **wanted)
    assert (tmp_path / "run" / "checkpoint").is_dir()
    resumed = train_sae(lmm, samples, 1, folder=tmp_path / "run", **wanted).sae
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def dense(x, W_enc, b_enc, W_dec, b_dec, k):
    """Equations 1 and 2 without a thought for memory."""
    z = torch.relu((x - b_dec) @ W_enc.T + b_enc)
    kept = z.topk(k, dim=-1)
    z = torch.zeros_like(z).scatter(-1, kept.indices, kept.values)
    return z, z @ W_dec


def test_a_training_is_what_plain_torch_makes_of_its_batches(lmm, samples, tmp_path):
    """Two batches a step, dead latents among them, against dense autograd with torch's own Adam."""
    n, k, steps, lr, dead_after = 60, 3, 5, 5e-3, 150
    wanted = dict(n_latents=n, k=k, steps=steps, batch_tokens=60, accumulate=2, lr=lr, seed=7, batch_samples=2)
    trained = train_sae(
        lmm,
        samples,
        1,
        folder=tmp_path,
        dead_after_tokens=dead_after,
        buffer_tokens=300,
        repeats=2,
        log_every=1,
        **wanted,
    )
    stream = Stream(lmm, samples, 1, ("base", "tiles", "newline", "text"), 7, 2)
    batches = mixed(stream, 3, ALONE, buffer_tokens=300, repeats=2, batch_tokens=60, seed=7)
    x, _ = first = next(batches)
    batches = itertools.chain([first], batches)
    start = TopKSAE(lmm.width, n, k, generator=torch.Generator().manual_seed(7))
    start.b_dec.data.copy_(geometric_median(x))
    weights = [getattr(start, name).detach().clone().requires_grad_() for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
    W_enc, b_enc, W_dec, b_dec = weights
    adam, silent, deadest = torch.optim.Adam(weights), torch.zeros(n), 0
    for row in trained.history:
        adam.param_groups[0]["lr"] = learning_rate(row["step"] - 1, steps, lr, 1)
        dead, fired = silent > dead_after, torch.zeros(n, dtype=torch.bool)
        deadest = max(deadest, int(dead.sum()))
        losses = []
        for x, _ in itertools.islice(batches, 2):
            z, x_hat = dense(x, *weights, k)
            error = x - x_hat - b_dec
            loss = error.square().sum() / (x - x.mean(0)).square().sum()
            if dead.any():
                residual, k_aux = error.detach(), lmm.width // 2
                _, e_hat = dense(x, W_enc[dead], b_enc[dead], W_dec[dead], b_dec, min(k_aux, int(dead.sum())))
                aux = (residual - e_hat).square().sum() / residual.square().sum()
                loss = loss + aux * min(1, int(dead.sum()) / k_aux) / 32
            (loss / 2).backward()
            losses.append(float(loss.detach()))
            fired |= (z > 0).any(0)
        W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec.detach()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        adam.zero_grad()
        W_dec.data = torch.nn.functional.normalize(W_dec.data, dim=1)
        silent = torch.where(fired, 0, silent + 120)
        assert row["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
        assert row["dead_fraction"] == pytest.approx(float((silent > dead_after).float().mean()))
        assert row["tokens"] == 120 * row["step"]
    assert deadest > 0
    for ours, theirs in zip(trained.sae.parameters(), weights, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)  # Adam steps are up to 5e-3


def test_a_finished_training_is_not_repeated(lmm, samples, tmp_path, monkeypatch):
    wanted = dict(n_latents=16, k=2, steps=2, batch_tokens=32, folder=tmp_path)
    one = train_sae(lmm, samples, 1, **wanted)
    with monkeypatch.context() as patch:
        patch.setattr("lmm_sae_nb.train.steps._step", None)
        two = train_sae(lmm, samples, 1, **wanted)
        assert one.history == two.history
        assert all(torch.equal(a, b) for a, b in zip(one.sae.parameters(), two.sae.parameters(), strict=True))
        with pytest.raises(TypeError):
            train_sae(lmm, samples, 1, **wanted | {"seed": 1})
        patch.setattr(training, "_code", dict)
        with pytest.raises(TypeError):
            train_sae(lmm, samples, 1, **wanted)
    assert train_sae(lmm, samples, 1, **wanted | {"seed": 1}).history != one.history


def test_bfloat16_products_train_about_the_same(lmm, samples, tmp_path):
    wanted = dict(n_latents=48, k=4, steps=10, batch_tokens=256, buffer_tokens=512, lr=3e-3)
    exact = train_sae(lmm, samples, 1, folder=tmp_path / "no", **wanted)
    mixed = train_sae(lmm, samples, 1, folder=tmp_path / "bf16", mixed_precision="bf16", **wanted)
    assert mixed.sae.W_dec.dtype == torch.float32
    assert mixed.history[-1]["fvu"] != exact.history[-1]["fvu"]
    assert mixed.history[-1]["fvu"] == pytest.approx(exact.history[-1]["fvu"], rel=0.05)
    with pytest.raises(ValueError, match="mixed_precision is 'fp16'; choose 'no' or 'bf16'"):
        train_sae(lmm, samples, 1, folder=tmp_path / "fp16", mixed_precision="fp16", **wanted)


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
    measured = evaluate_sae(SAEInPlace(lmm, Perfect(lmm.width), 1), samples, batch_samples=2)
    assert measured["fvu"] == pytest.approx(0, abs=1e-9)
    assert measured["loss_recovered"] == pytest.approx(1, abs=1e-3)
    assert measured["l0"] == pytest.approx(lmm.width, rel=0.05)  # of each pair x, -x one is positive


@torch.no_grad()
def test_fvu_and_dead_fraction_by_brute_force(lmm, samples):
    sae = TopKSAE(lmm.width, 40, 3, generator=torch.Generator().manual_seed(5))
    measured = evaluate_sae(SAEInPlace(lmm, sae, 1), samples, kinds=("base", "text"), batch_samples=2)
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


@torch.no_grad()
def test_controls_of_the_fvu_by_brute_force(lmm, samples):
    """An SAE before its training, and the best k directions for the tokens, by a singular value decomposition."""
    sae = TopKSAE(lmm.width, 40, 3, generator=torch.Generator().manual_seed(5))
    x = torch.cat([
        lmm.hidden_states(prompt, 1)[0][prompt.spans[0].mask("base", "text")]
        for row in samples for prompt in [lmm.prompt(row["question"], row["image"], answers=row["answer"])]
    ]).double()  # fmt: skip
    sae.b_dec.data = x.mean(0).float()
    found = control_fvus(SAEInPlace(lmm, sae, 1), samples, kinds=("base", "text"), batch_samples=2, seed=5)
    centred = x - x.mean(0)
    untrained = (centred - sae(x.float()) + x.mean(0)).square().sum() / centred.square().sum()
    assert found["fvu_untrained"] == pytest.approx(float(untrained), rel=1e-3)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    rest = centred - centred @ directions[:3].T @ directions[:3]
    assert found["fvu_components"] == pytest.approx(float(rest.square().sum() / centred.square().sum()), rel=1e-3)
    assert found["fvu_components"] == pytest.approx(float(1 - (sizes[:3] ** 2).sum() / (sizes**2).sum()), rel=1e-3)


@torch.no_grad()
def test_intervals_are_over_samples(lmm, samples):
    sae = TopKSAE(lmm.width, 40, 3, generator=torch.Generator().manual_seed(5))
    measured = evaluate_sae(SAEInPlace(lmm, sae, 1), samples, batch_samples=2)
    for name in ("fvu", "loss_clean", "loss_spliced", "loss_zero", "loss_recovered"):
        assert measured[f"{name}_low"] < measured[name] < measured[f"{name}_high"]
    for batch_samples in (1, 3):
        again = evaluate_sae(SAEInPlace(lmm, sae, 1), samples, batch_samples=batch_samples)
        assert again["fvu_low"] == pytest.approx(measured["fvu_low"], rel=1e-2)
    assert "fvu_low" not in evaluate_sae(SAEInPlace(lmm, sae, 1), samples[:1], batch_samples=2)


@pytest.mark.slow
def test_several_saes_are_measured_as_each_alone(lmm, samples):
    sizes = {"low": (40, 3, 0), "wide": (64, 2, 0), "high": (24, 4, 2)}
    places = {
        name: SAEInPlace(lmm, TopKSAE(lmm.width, n_latents, k, generator=torch.Generator().manual_seed(k)), layer)
        for name, (n_latents, k, layer) in sizes.items()
    }
    alone = {name: evaluate_sae(place, samples, batch_samples=2) for name, place in places.items()}
    assert evaluate_saes(places, samples, batch_samples=2) == alone
    for name, measured in evaluate_saes(places, samples, batch_samples=2, losses=False).items():
        assert measured == {key: value for key, value in alone[name].items() if not key.startswith("loss")}


def test_loss_recovered_is_left_out_where_zeros_change_nothing(lmm, samples):
    """Answers are read off the last layer's own tokens, not off its image tokens."""
    pictured = [row for row in samples if row["image"]]
    measured = evaluate_sae(SAEInPlace(lmm, Perfect(lmm.width), lmm.n_layers - 1), pictured, kinds=("base",))
    assert measured["loss_zero"] == measured["loss_clean"] > 0
    assert "loss_recovered" not in measured


def test_saes_of_several_models_are_refused(lmm, samples):
    other = LMM(lmm.model, lmm.processor)
    places = {name: SAEInPlace(each, TopKSAE(lmm.width, 12, 2), 1) for name, each in (("a", lmm), ("b", other))}
    with pytest.raises(ValueError, match="of 2 models"):
        evaluate_saes(places, samples)
    with pytest.raises(ValueError, match="of 0 models"):
        evaluate_saes({}, samples)


def test_an_sae_of_another_width_is_refused(lmm, samples):
    with pytest.raises(ValueError, match="width 9"):
        evaluate_sae(SAEInPlace(lmm, TopKSAE(9, 12, 2), 1), samples)
