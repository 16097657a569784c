"""BatchTopK and Matryoshka trainings against plain PyTorch with dense latents."""

import pytest
import torch
from torch.testing import assert_close
from trainings import LMM_, SAMPLES, SETTINGS, train

from lmm_sae_nb.sae.formats import format_of
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import SAE
from lmm_sae_nb.train import kinds
from lmm_sae_nb.train.evaluate import evaluate_saes, fvu_differences
from lmm_sae_nb.train.training import Recipe, train_saes

WIDTH, N, K = 6, 32, 2


def rng(seed):
    return torch.Generator().manual_seed(seed)


def random_sae(k=K, **more) -> SAE:
    sae = SAE(WIDTH, N, k, dtype=torch.float64, generator=rng(0), **more)
    with torch.no_grad():
        for weights in sae.parameters():
            weights.add_(torch.randn(weights.shape, generator=rng(1), dtype=torch.float64), alpha=0.3)
    return sae


def pre(sae, x):
    return ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()


def dense(latents):
    return torch.zeros(len(latents.acts), N, dtype=torch.float64).scatter_add(1, latents.indices, latents.acts)


@pytest.mark.parametrize("loud", [1.0, 30.0])  # a loud token takes most of the places: more than it has at first
def test_batch_topk_keeps_the_largest_activations_of_the_whole_batch(loud):
    sae, x = random_sae(), torch.randn(9, WIDTH, generator=rng(2), dtype=torch.float64)
    x[4] *= loud
    x.requires_grad_()
    latents, smallest = kinds.batch_topk(sae, x, K)
    z = pre(sae, x)
    largest = z.flatten().topk(K * len(x)).indices
    expected = torch.zeros_like(z).flatten().scatter(0, largest, z.flatten()[largest]).reshape(z.shape)
    assert_close(dense(latents), expected)
    assert smallest == expected[expected > 0].min()
    if loud > 1:
        assert (expected[4] > 0).sum() > 4 * K
    asked = [x, *sae.parameters()]
    ours = torch.autograd.grad((sae.decode(latents) - x).square().sum(), asked)
    theirs = torch.autograd.grad((expected @ sae.W_dec + sae.b_dec - x).square().sum(), asked)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other)


def test_a_batch_topk_does_not_depend_on_how_processes_share_the_tokens():
    sae, x = random_sae(), torch.randn(10, WIDTH, generator=rng(3), dtype=torch.float64)
    whole, smallest = kinds.batch_topk(sae, x, K)
    places = whole.acts.shape[1]
    everywhere = lambda _: kinds.encode_topk(x, sae.W_enc, sae.b_enc, sae.b_dec, places).acts  # noqa: E731
    for part in (slice(0, 7), slice(7, 10)):
        latents, same = kinds.batch_topk(sae, x[part], K, everywhere)
        assert same == smallest
        assert_close(dense(latents), dense(whole)[part])


def test_the_threshold_is_a_running_mean_of_what_batches_keep():
    threshold, expected = torch.zeros(3), None
    for smallest in (0.5, 1.0, 0.2):
        kinds.follow(threshold, torch.tensor(smallest, dtype=torch.float64))
        expected = smallest if expected is None else 0.99 * expected + 0.01 * smallest
    assert_close(threshold, torch.full((3,), expected))


def test_the_matryoshka_error_is_the_mean_over_nested_prefixes():
    sae, x = random_sae(), torch.randn(9, WIDTH, generator=rng(4), dtype=torch.float64)
    latents = sae.encode(x)
    error = (x - sae.decode(latents)).square().sum()
    z, errors = dense(latents), []
    for size in (2, 4, 8, 16, 32):
        errors.append((x - z[:, :size] @ sae.W_dec[:size] - sae.b_dec).square().sum())
    found = kinds.nested_error(sae, x, latents, error)
    assert_close(found, sum(errors) / 5)
    asked = list(sae.parameters())
    theirs = torch.autograd.grad(sum(errors) / 5, asked, retain_graph=True)
    for mine, other in zip(torch.autograd.grad(found, asked), theirs, strict=True):
        assert_close(mine, other)


def test_all_kinds_start_from_the_same_weights_and_end_as_what_they_are_used_as(tmp_path):
    recipes = {kind: Recipe(1, 40, 4, SETTINGS["lr"], kind=kind) for kind in kinds.KINDS}
    shared = {name: value for name, value in SETTINGS.items() if name not in ("n_latents", "k", "lr")}
    trained = train_saes(LMM_, SAMPLES, recipes, folder=tmp_path, **shared)
    first = {kind: trained[kind].history[0]["fvu"] for kind in kinds.KINDS}
    assert first["topk"] == first["matryoshka"] != trained["matryoshka"].history[0]["loss"]
    used = {kind: (trained[kind].sae.activation.name, format_of(tmp_path / kind)) for kind in kinds.KINDS}
    usual = ("topk", "sparsify")
    assert used == {"topk": usual, "batch_topk": ("jumprelu", "saelens"), "matryoshka": usual}
    threshold = trained["batch_topk"].sae.threshold
    assert threshold[0] > 0 and (threshold == threshold[0]).all()
    for kind in kinds.KINDS:
        saved = SAE.load(tmp_path / kind)
        assert saved.trained_on.layer == 1 and saved.k == trained[kind].sae.k
        for name, weights in trained[kind].sae.state_dict().items():
            assert torch.equal(saved.state_dict()[name], weights)


def test_a_stopped_batch_topk_training_goes_on_to_the_same_bits_and_gives_way_to_another_kind(tmp_path):
    def stop(rows):
        if len(rows) == 4:
            raise KeyboardInterrupt

    whole = train(tmp_path / "whole", {"kind": "batch_topk"})
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", {"kind": "batch_topk", "on_log": stop})
    resumed = train(tmp_path / "cut", {"kind": "batch_topk"})
    for name, weights in whole.sae.state_dict().items():
        assert torch.equal(resumed.sae.state_dict()[name], weights)
    train(tmp_path / "cut", {})
    assert format_of(tmp_path / "cut") == "sparsify"


def test_an_unknown_kind_names_the_known():
    with pytest.raises(ValueError, match="no training of the kind 'gated'; choose one of topk, batch_topk, matryoshka"):
        Recipe(1, kind="gated")


def test_the_difference_of_two_fvus_is_measured_on_the_same_samples():
    saes = {name: SAE(LMM_.width, 24, k, generator=rng(5)) for name, k in (("few", 2), ("same", 2), ("more", 6))}
    places = {name: SAEInPlace(LMM_, sae, 1) for name, sae in saes.items()}
    fvus = {name: each["fvu"] for name, each in evaluate_saes(places, SAMPLES, losses=False).items()}
    found = fvu_differences(places, SAMPLES)
    assert found["same"] == (0, 0, 0)
    assert found["more"].mean == pytest.approx(fvus["more"] - fvus["few"])
    assert found["more"].low < found["more"].mean < found["more"].high
    assert fvu_differences(places, SAMPLES[:1]) == fvu_differences({"few": places["few"]}, SAMPLES) == {}
