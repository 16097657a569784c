"""Caches in the paper's and delphi's layouts, written by hand, answer as what they were written from."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lmm_sae_nb.cache.formats import read_delphi_cache, read_paper_cache

IMAGES, POSITIONS, LATENTS, SPLITS, BASE = 9, 10, 12, 3, 6


@pytest.fixture
def dense() -> np.ndarray:
    """(images, positions, latents), of which positions from BASE on are no base patches."""
    rng = np.random.default_rng(0)
    acts = rng.random((IMAGES, POSITIONS, LATENTS)) * (rng.random((IMAGES, POSITIONS, LATENTS)) < 0.2)
    acts[2], acts[5] = acts[1], acts[1]  # ties
    acts[..., 4] = 0  # one that never fires
    return acts.astype(np.float16).astype(np.float32)


def edges() -> list[tuple[int, int]]:
    bounds = np.linspace(0, LATENTS, SPLITS + 1).astype(int)
    return [(int(start), int(stop) - 1) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]


def write_paper(folder, dense) -> None:
    folder.mkdir()
    locations = np.argwhere(dense > 1e-5)
    for start, end in edges():
        kept = locations[(locations[:, 2] >= start) & (locations[:, 2] < end)]  # its fault: end is lost
        tensors = {"locations": kept.astype(np.int64), "activations": dense[tuple(kept.T)]}
        save_file(tensors, folder / f"{start}_{end}.safetensors")


def write_delphi(folder, dense, number=np.uint16) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"n_splits": SPLITS, "model_name": "m"}))
    locations = np.argwhere(dense > 1e-5)
    for start, end in edges():
        kept = locations[(locations[:, 2] >= start) & (locations[:, 2] <= end)]
        save_file(
            {
                "locations": (kept - [0, 0, start]).astype(number),
                "activations": dense[tuple(kept.T)].astype(np.float16),
                "tokens": np.zeros((IMAGES, POSITIONS), np.int64),
            },
            folder / f"{start}_{end}.safetensors",
        )


def check_latent(found, dense, latent) -> None:
    again = np.zeros((IMAGES, POSITIONS), np.float32)
    again[found.images, found.patches] = found.acts
    np.testing.assert_array_equal(again, dense[:, :, latent])
    assert set(found.latents) <= {latent}


def check_cache(cache, dense, latent) -> None:
    base = dense[:, :BASE, latent]
    means = base.mean(1)
    best = [int(image) for image in np.lexsort((np.arange(IMAGES), -means))[:3] if means[image] > 0]
    assert cache.top_images[latent].tolist() == best + [-1] * (3 - len(best))
    for rank, image in enumerate(best):
        np.testing.assert_allclose(cache.top_means[latent, rank], means[image], rtol=1e-6)
        np.testing.assert_array_equal(cache.patch_map(latent, rank), base[image].reshape(2, 3))
    np.testing.assert_allclose(cache.frequency[latent], (base > 0).mean(), rtol=1e-6)
    np.testing.assert_allclose(cache.mean[latent], base[base > 0].mean() if base.any() else 0, rtol=1e-6)
    assert cache.max[latent] == base.max()


def test_the_papers_layout_and_what_it_has_lost(dense, tmp_path):
    write_paper(tmp_path / "in", dense)
    held = read_paper_cache(tmp_path / "in")
    assert (held.n_latents, held.lost) == (LATENTS, [3, 7, 11])
    cache = held.as_cache(tmp_path / "out", images=IMAGES, patches=BASE, grid=(2, 3), n_top=3)
    for latent in set(range(LATENTS)) - set(held.lost):
        check_latent(held.latent(latent), dense, latent)
        check_cache(cache, dense, latent)
    for latent in held.lost:
        with pytest.raises(ValueError, match=f"latent {latent} is lost"):
            held.latent(latent)
        assert not cache.live[latent]
    assert json.loads((tmp_path / "out" / "cache.json").read_text())["lost"] == [3, 7, 11]


@pytest.mark.parametrize("number", [np.uint16, np.uint32])
def test_delphis_layout(dense, tmp_path, number):
    write_delphi(tmp_path / "in", dense, number)
    held = read_delphi_cache(tmp_path / "in")
    assert (held.n_latents, held.lost) == (LATENTS, [])
    cache = held.as_cache(tmp_path / "out", images=IMAGES, patches=BASE, grid=(2, 3), n_top=3)
    for latent in range(LATENTS):
        check_latent(held.latent(latent), dense, latent)
        check_cache(cache, dense, latent)
    assert torch.equal(cache.live, torch.as_tensor(dense[:, :BASE].any((0, 1))))


def test_a_layout_taken_for_the_other_is_refused(dense, tmp_path):
    write_paper(tmp_path / "paper", dense)
    write_delphi(tmp_path / "delphi", dense)
    with pytest.raises(ValueError, match="another layout"):
        read_delphi_cache(tmp_path / "paper").latent(5)
    with pytest.raises(ValueError, match="another layout"):
        read_paper_cache(tmp_path / "delphi").latent(5)


def test_what_is_missing_or_wrong_is_named(dense, tmp_path):
    with pytest.raises(FileNotFoundError, match="START_END"):
        read_paper_cache(tmp_path)
    write_paper(tmp_path / "in", dense)
    held = read_paper_cache(tmp_path / "in")
    with pytest.raises(ValueError, match="no latent 12: the files hold latents 0 to 11"):
        held.latent(12)
    with pytest.raises(ValueError, match="an image 8, but images=8: count all"):
        held.as_cache(tmp_path / "out", images=8, patches=BASE, grid=None)
    with pytest.raises(ValueError, match="grid of 2 x 2 has not 6 patches"):
        held.as_cache(tmp_path / "out", images=9, patches=BASE, grid=(2, 2))
    file = tmp_path / "in" / "0_3.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="0_3.safetensors is not a whole"):
        held.latent(0)
    file.unlink()
    with pytest.raises(ValueError, match="begin at latent 4"):
        read_paper_cache(tmp_path / "in").as_cache(tmp_path / "out", images=9, patches=BASE, grid=None)
    (tmp_path / "in" / "8_11.safetensors").rename(tmp_path / "in" / "9_12.safetensors")
    with pytest.raises(ValueError, match="do not follow"):
        read_paper_cache(tmp_path / "in")
