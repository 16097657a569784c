"""The README's example runs as it stands, is short, and takes its names from the package itself."""

import ast
import re

import numpy as np
import pytest
from PIL import Image

from book import pages
from lmm_sae_nb import LMM, train_sae

CODE = re.findall(r"```python\n(.+?)```", (pages.ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((192, 192))


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A checkout as a reader has it after `make book`, with pictures of his own."""
    (tmp_path / "data/artifacts/tiny").mkdir(parents=True)
    (tmp_path / "data/models").symlink_to(pages.ROOT / "data/models")
    (tmp_path / "my/pictures").mkdir(parents=True)
    for n in range(4):
        noise(n).save(tmp_path / f"my/pictures/{n}.png")
    monkeypatch.chdir(tmp_path)
    samples = [{"image": noise(n), "question": "is there a dog ?", "answer": "no ."} for n in range(4)]
    small = dict(n_latents=64, k=8, steps=4, batch_tokens=256)
    train_sae(LMM.load("data/models/tiny-llava-next"), samples, 1, **small, folder="data/artifacts/tiny/train")
    return tmp_path


def test_the_example_is_short_and_imports_from_the_package_itself():
    (code,) = CODE
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    imports = [node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    assert imports == ["lmm_sae_nb"]


def test_the_example_shows_the_image_that_excites_its_latent_most(desk, monkeypatch):
    seen = []
    monkeypatch.setattr(Image.Image, "show", lambda image: seen.append(image))
    names: dict = {}
    exec(CODE[0], names)
    means = names["cache"].top_means[:, 0]
    assert means[names["latent"]] == means.max()
    best = int(names["cache"].top_images[names["latent"], 0])
    assert np.array_equal(np.asarray(seen[0]), np.asarray(names["pictures"][best]))
