"""The peers read what we write, and we what they write: the same latents and reconstruction on the same input.

They bring torchvision, so they live in an environment of their own; elsewhere these tests are skipped.
"""

import warnings
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lmm_sae_nb.sae.formats import read_sae
from lmm_sae_nb.sae.topk import SAE, TopKSAE

WIDTH, LATENTS, K = 16, 48, 5
INSTALL = (
    "python -m venv peers && peers/bin/pip install pytest torch==2.13.0 eai-sparsify==1.3.3 sae-lens==6.54.0 "
    "dictionary-learning==0.1.0 overcomplete==0.3.0 && peers/bin/pip uninstall -y torchvision && "
    "peers/bin/python -m pytest tests/peers"
)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def peer():
    """Import a peer's module, or skip."""

    def load(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pytest.importorskip(name, reason=f"{name} is not here; to run this: {INSTALL}")

    return load


@pytest.fixture
def ours() -> TopKSAE:
    draw = torch.Generator().manual_seed(0)
    sae = TopKSAE(WIDTH, LATENTS, K, generator=draw).requires_grad_(False)
    for weights in (sae.W_enc, sae.b_enc, sae.b_dec):
        weights.add_(torch.randn(weights.shape, generator=draw) * 0.3)
    return sae


def seen(sae: TopKSAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense latents and the reconstruction."""
    with torch.no_grad():
        latents = sae.encode(x)
        return torch.zeros(len(x), sae.n_latents).scatter(1, latents.indices, latents.acts), sae.decode(latents)


def tokens(width: int) -> torch.Tensor:
    return 2 * torch.randn(64, width, generator=torch.Generator().manual_seed(2))


def test_sparsify_reads_ours(peer, ours, tmp_path):
    ours.save(tmp_path, "sparsify")
    theirs, x = peer("sparsify").SparseCoder.load_from_disk(tmp_path), tokens(WIDTH)
    z, x_hat = seen(ours, x)
    with torch.no_grad():
        found = theirs.encode(x)
        assert_close(torch.zeros_like(z).scatter(1, found.top_indices, found.top_acts), z)
        assert_close(theirs(x).sae_out, x_hat)


def test_saelens_reads_ours(peer, ours, tmp_path):
    ours.save(tmp_path, "saelens")
    theirs, x = peer("sae_lens").SAE.load_from_disk(tmp_path), tokens(WIDTH)
    with torch.no_grad():
        for theirs_seen, ours_seen in zip((theirs.encode(x), theirs(x)), seen(ours, x), strict=True):
            assert_close(theirs_seen, ours_seen)


def test_saelens_reads_ours_with_thresholds(peer, ours, tmp_path):
    threshold = torch.rand(LATENTS, generator=torch.Generator().manual_seed(1))
    jumping = SAE(WIDTH, LATENTS, LATENTS, threshold=threshold).requires_grad_(False)
    jumping.load_state_dict(ours.state_dict() | {"threshold": threshold})
    jumping.save(tmp_path)
    theirs, x = peer("sae_lens").SAE.load_from_disk(tmp_path), tokens(WIDTH)
    with torch.no_grad():
        for theirs_seen, ours_seen in zip((theirs.encode(x), theirs(x)), seen(jumping, x), strict=True):
            assert_close(theirs_seen, ours_seen)


def test_saelens_trains_on_from_ours(peer, ours, tmp_path):
    ours.save(tmp_path, "saelens")
    training = peer("sae_lens").TrainingSAE.load_from_disk(tmp_path)
    with torch.no_grad():
        assert_close(training(tokens(WIDTH)), seen(ours, tokens(WIDTH))[1])


def test_dictionary_learning_reads_ours(peer, ours, tmp_path):
    ours.save(tmp_path, "dictionary_learning")
    theirs, config = peer("dictionary_learning.utils").load_dictionary(str(tmp_path), "cpu")
    assert config["trainer"]["k"] == K
    x = tokens(WIDTH)
    with torch.no_grad():
        for theirs_seen, ours_seen in zip((theirs.encode(x), theirs(x)), seen(ours, x), strict=True):
            assert_close(theirs_seen, ours_seen)


@pytest.mark.parametrize(
    "made", sorted(path.name for path in (Path(__file__).parents[1] / "fixtures" / "saes").iterdir())
)
def test_ours_reads_theirs(peer, made, tmp_path):
    save, encode, reconstruct = peer("make_fixtures").MADE[made]()
    folder = tmp_path / made
    folder.mkdir()
    save(folder)
    ours = SAE.load(folder, k=3 if made == "overcomplete" else None)
    x = tokens(ours.width)
    with torch.no_grad():
        for theirs_seen, ours_seen in zip((encode(x), reconstruct(x)), seen(ours, x), strict=True):
            assert_close(ours_seen, theirs_seen)


@pytest.mark.parametrize("activation", ["groupmax", "transcode", "skip_connection"])
def test_another_kind_of_sparsify_is_refused(peer, activation, tmp_path):
    sparsify = peer("sparsify")
    change = {"activation": activation} if activation == "groupmax" else {activation: True}
    config = sparsify.SparseCoderConfig(num_latents=LATENTS, k=4, **change)
    sparsify.SparseCoder(WIDTH, config).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"cfg\.json: \w+ is .*: it .*; use an SAE with"):
        read_sae(tmp_path)


@pytest.mark.parametrize("kind", ["AbsTopKSAE", "MatchingPursuitSAE", "Transcoder", "TopKSAE"])
def test_another_kind_of_saelens_is_refused(peer, kind, tmp_path):
    sae_lens = peer("sae_lens")
    settings = {
        "Transcoder": {"d_out": WIDTH, "apply_b_dec_to_input": False},
        "TopKSAE": {"k": 4, "normalize_activations": "layer_norm"},
    }
    settings = settings.get(kind, {"k": 4} if "TopK" in kind else {})
    config = getattr(sae_lens, f"{kind}Config")(d_in=WIDTH, d_sae=LATENTS, **settings)
    getattr(sae_lens, kind)(config).save_model(tmp_path)
    with pytest.raises(ValueError, match=r"cfg\.json: \w+ is .*: it .*; use an SAE with"):
        read_sae(tmp_path)


def trained_by_dictionary_learning(peer, kind: str, folder) -> None:
    """Five steps of its own training loop, on normalised activations."""
    peer("dictionary_learning")
    trainers, training = peer("dictionary_learning.trainers"), peer("dictionary_learning.training")
    config = {"trainer": getattr(trainers, kind), "activation_dim": WIDTH, "dict_size": LATENTS, "k": K, "steps": 5}
    config |= {"layer": 0, "lm_name": "none", "device": "cpu", "warmup_steps": 1, "seed": 0}
    data = (3 * tokens(WIDTH) for _ in range(200))
    training.trainSAE(data, [config], 5, save_dir=str(folder), device="cpu", normalize_activations=True)


def test_ours_reads_what_dictionary_learning_trained(peer, tmp_path):
    trained_by_dictionary_learning(peer, "TopKTrainer", tmp_path)
    theirs, _ = peer("dictionary_learning.utils").load_dictionary(str(tmp_path / "trainer_0"), "cpu")
    with pytest.raises(ValueError, match="one for each seed or hookpoint: trainer_0"):
        TopKSAE.load(tmp_path)
    ours, x = TopKSAE.load(tmp_path / "trainer_0"), tokens(WIDTH)
    with torch.no_grad():
        for theirs_seen, ours_seen in zip((theirs.encode(x), theirs(x)), seen(ours, x), strict=True):
            assert_close(ours_seen, theirs_seen)


def test_a_batchtopk_sae_without_a_measured_threshold_is_refused(peer, tmp_path):
    trained_by_dictionary_learning(peer, "BatchTopKTrainer", tmp_path)
    with pytest.raises(ValueError, match="the threshold is -1: it was not measured yet"):
        read_sae(tmp_path / "trainer_0")
