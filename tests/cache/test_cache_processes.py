"""Two real processes (gloo, started by accelerate) and three make the very bytes that one makes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState, debug_launcher
from models import make
from PIL import Image
from torch.multiprocessing import ProcessRaisedException

from lmm_sae_nb.cache import activations
from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.cache.resume import part_files, read_progress
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE

pytestmark = pytest.mark.slow

SETTINGS = {"n_top": 3, "batch_size": 2, "store": "float32"}


@pytest.fixture(scope="module")
def given():
    lmm = LMM(*make("picture_world"))
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((192, 192)) for _ in range(13)]
    return SAEInPlace(lmm, TopKSAE(lmm.width, 64, 4, generator=torch.Generator().manual_seed(1)), 0), pictures


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    cache_activations(*given, **SETTINGS, folder=folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch):
    """Unset, accelerate chooses and warns, and a warning is an error here."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(given, folder: Path, processes: int, fail_at: int | None = None) -> None:
    """A pass by so many processes; the one that gets to batch `fail_at` fails there, and takes the others with it."""
    encode = activations.encode_batch

    def failing(places, batch):
        if batch.number == fail_at:
            raise RuntimeError("the power is gone")
        return encode(places, batch)

    def work():
        torch.set_num_threads(1)  # the parent's threads are not there
        PartialState._reset_state()
        activations.encode_batch = failing
        cache = cache_activations(*given, **SETTINGS, folder=folder, save_every=0)
        assert PartialState().num_processes == processes
        assert cache.images == len(given[1])
        PartialState().destroy_process_group()

    debug_launcher(work, num_processes=processes)


def same_answers(one: Path, other: Path) -> None:
    names = ("cache.safetensors", "cache.json")
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    first, second = (LatentCache.load(folder).store.latents(0, 64) for folder in (one, other))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert sorted(file.name for file in other.iterdir()) == ["cache.json", "cache.safetensors", "key.json", "store"]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_share_a_pass_make_the_bytes_of_one(given, alone, tmp_path, processes):
    run(given, tmp_path, processes)
    same_answers(alone, tmp_path)


@pytest.mark.parametrize("later", [1, 2, 3])
def test_other_processes_go_on_with_what_two_left(given, alone, tmp_path, later):
    with pytest.raises(ProcessRaisedException, match="the power is gone"):
        run(given, tmp_path, 2, fail_at=5)
    batches = [read_progress(path)["batches"] for path in part_files(tmp_path / ".partial")]
    assert 0 < sum(map(len, batches)) < 7
    run(given, tmp_path, later)
    same_answers(alone, tmp_path)
