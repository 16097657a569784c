"""The cache finds exactly what sorting everything finds; images that cannot be read are named."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make
from PIL import Image

from lmm_sae_nb.cache import LatentCache, _Top, activation_maps, cache_activations, open_images
from lmm_sae_nb.lmm import LMM
from lmm_sae_nb.sae import Latents, TopKSAE


@pytest.fixture(scope="module")
def lmm():
    torch.manual_seed(0)
    return LMM(*make("picture_world"))


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((192, 192)) for _ in range(7)]


@settings(deadline=None, max_examples=60)
@given(
    images=st.integers(1, 9),
    batch=st.integers(1, 5),
    n_top=st.integers(1, 4),
    seed=st.integers(0, 999),
    coarse=st.booleans(),
)
def test_running_top_is_what_sorting_everything_gives(images, batch, n_top, seed, coarse):
    """Against dense brute force, with ties (coarse values) and fewer images than places."""
    patches, k, n_latents = 6, 2, 5
    rng = torch.Generator().manual_seed(seed)
    acts = torch.rand(images, patches, k, generator=rng)
    acts = (acts * 3).floor() if coarse else acts
    indices = torch.stack([torch.randperm(n_latents, generator=rng)[:k] for _ in range(images * patches)]).view(
        images, patches, k
    )
    top = _Top(n_latents, n_top, patches)
    for start in range(0, images, batch):
        top.update(Latents(acts[start : start + batch], indices[start : start + batch]), start)

    dense = torch.zeros(images, patches, n_latents).scatter(-1, indices, acts)
    for latent in range(n_latents):
        means = [(float(dense[i, :, latent].sum() / patches), i) for i in range(images)]
        best = sorted((row for row in means if row[0] > 0), key=lambda row: (-row[0], row[1]))[:n_top]
        padded = best + [(0.0, -1)] * (n_top - len(best))
        assert top.images[latent].tolist() == [i for _, i in padded]
        torch.testing.assert_close(top.means[latent], torch.tensor([m for m, _ in padded]))
        for rank, (_, image) in enumerate(best):
            torch.testing.assert_close(top.patches[latent, rank].float(), dense[image, :, latent], atol=1e-3, rtol=1e-3)


def test_the_pass_equals_one_image_at_a_time(lmm, pictures, tmp_path):
    sae = TopKSAE(lmm.width, 24, 3, generator=torch.Generator().manual_seed(1))
    cache = cache_activations(lmm, sae, pictures, 0, n_top=3, batch_size=2, folder=tmp_path)
    dense = []
    for picture in pictures:
        prompt = lmm.prompt("", picture)
        x = lmm.hidden_states(prompt, 0)[0, prompt.spans[0].where("base")]
        z = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
        kept = z.topk(3, -1)
        dense.append(torch.zeros_like(z).scatter(-1, kept.indices, kept.values).detach())
    dense = torch.stack(dense)
    means = dense.mean(1).T
    values, order = means.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(cache.top_means, values[:, :3], atol=1e-5, rtol=1e-4)
    fires = values[:, :3] > 0
    assert (cache.top_images[fires] == order[:, :3][fires]).all()
    assert (cache.top_images[~fires] == -1).all()
    torch.testing.assert_close(cache.frequency, (dense > 0).float().mean((0, 1)))
    torch.testing.assert_close(cache.max, dense.amax((0, 1)))
    assert (cache.live == (dense > 0).any(0).any(0)).all()
    latent = int(cache.frequency.argmax())
    image = int(cache.top_images[latent, 0])
    torch.testing.assert_close(cache.patch_map(latent, 0), dense[image, :, latent].view(lmm.grid), atol=1e-2, rtol=1e-2)
    maps = activation_maps(lmm, sae, pictures, 0, [latent, 0], batch_size=3)
    np.testing.assert_allclose(maps[image, 0], dense[image, :, latent].view(lmm.grid), atol=1e-4)
    np.testing.assert_allclose(maps[2, 1], dense[2, :, 0].view(lmm.grid), atol=1e-4)


def test_an_sae_of_another_width_is_refused(lmm, pictures, tmp_path):
    with pytest.raises(ValueError, match=f"width {lmm.width + 1}.*width {lmm.width}"):
        cache_activations(lmm, TopKSAE(lmm.width + 1, 8, 2), pictures, 0, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_to_rank_is_refused(lmm, tmp_path):
    with pytest.raises(ValueError, match="0 images"):
        cache_activations(lmm, TopKSAE(lmm.width, 8, 2), [], 0, folder=tmp_path)


def test_a_missing_or_foreign_cache_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="02_cache_activations"):
        LatentCache.load(tmp_path / "nowhere")
    (tmp_path / "cache.json").write_text("{}")
    (tmp_path / "cache.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cache.safetensors"):
        LatentCache.load(tmp_path)


def test_images_of_a_folder_in_order_of_names(tmp_path):
    (tmp_path / "deeper").mkdir()
    for n, name in enumerate(("b.png", "a.jpg", "deeper/c.webp")):
        Image.new("RGB", (8, 8), (n * 50, 0, 0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    found = open_images(tmp_path)
    assert len(found) == 3
    assert found[1].getpixel((0, 0)) == (0, 0, 0)


def test_images_of_a_saved_data_set(tmp_path):
    Dataset.from_dict({"image": [Image.new("L", (4, 4), 7)]}).save_to_disk(tmp_path)
    found = open_images(tmp_path)
    assert (len(found), found[0].mode, found[0].getpixel((0, 0))) == (1, "RGB", (7, 7, 7))


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n cut"])
def test_an_unreadable_image_is_named(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(ValueError, match="broken.png"):
        open_images(tmp_path)[0]


def test_a_folder_without_images_and_a_missing_one_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        open_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="picture"):
        open_images(Dataset.from_dict({"picture": [1]}))
