"""Data sets on disk: their columns, sizes and seeds, the same content each time, and whole or not at all."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import worlds
from datasets import load_from_disk
from PIL import Image

from lmm_sae_nb.pictureworld.concepts import KINDS
from lmm_sae_nb.pictureworld.scenes import HELD_OUT, VALIDATION
from lmm_sae_nb.pictureworld.shelf import render

SIZES = {"train": 17, "cache": 5, "heldout": 4}
FIRST = {"train": 0, "cache": VALIDATION, "heldout": HELD_OUT}
CHILD = """
import sys
from pathlib import Path
from lmm_sae_nb.pictureworld.shelf import render
if __name__ == "__main__":
    render(Path(sys.argv[1]), {"cache": 5, "train": int(sys.argv[2])})
"""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf") / "world"
    render(folder, SIZES)
    return folder


def rows(folder, split):
    """The rows with their pictures as the bytes that are stored."""
    table = load_from_disk(folder / split).with_format("arrow")[:]
    return table.to_pylist()


def test_columns_sizes_and_seeds(shelf):
    assert {entry.name for entry in shelf.iterdir()} == {*SIZES, "concepts.json"}
    assert json.loads((shelf / "concepts.json").read_text()) == {kind: list(names) for kind, names in KINDS.items()}
    for split, size in SIZES.items():
        data = load_from_disk(shelf / split)
        assert set(data.column_names) == {"image", "seed", "question", "answer", "family", *KINDS}
        assert data["seed"][:] == list(range(FIRST[split], FIRST[split] + size))
        for row in data:
            pictured = split != "train" or row["seed"] % 8 != 7
            assert (row["image"] is not None) == pictured
            assert all((row[kind] is not None) == pictured for kind in KINDS)
            assert row["question"] and row["answer"] and row["family"]


def test_pictures_and_label_maps_are_the_scenes(shelf):
    for split in SIZES:
        for row in load_from_disk(shelf / split):
            if row["image"] is None:
                continue
            scene = worlds.scene(row["seed"])
            assert row["image"].mode == "RGB" and (np.asarray(row["image"]) == scene.pixels).all()
            for kind in KINDS:
                assert row[kind].mode == "L" and (np.asarray(row[kind]) == scene.labels[kind]).all()


def test_a_second_rendering_holds_the_same(shelf, tmp_path):
    render(tmp_path / "again", SIZES)
    for split in SIZES:
        assert rows(shelf, split) == rows(tmp_path / "again", split)
    assert (tmp_path / "again" / "concepts.json").read_bytes() == (shelf / "concepts.json").read_bytes()


def test_an_image_is_a_png(shelf):
    first = rows(shelf, "cache")[0]["image"]["bytes"]
    assert Image.open(io.BytesIO(first)).format == "PNG"


def test_a_killed_rendering_leaves_nothing_that_looks_whole_and_the_next_completes_it(tmp_path, root):
    folder = tmp_path / "world"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), "100000"], cwd=root, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "world.building" / "cache").exists() and child.poll() is None:  # then train is under way
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        assert child.poll() is None, "it ended before it could be killed"
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert not folder.exists()
    render(folder, {"cache": 5, "train": 6})
    assert {entry.name for entry in tmp_path.iterdir()} == {"world"}
    assert {entry.name for entry in folder.iterdir()} == {"cache", "train", "concepts.json"}
    assert len(load_from_disk(folder / "train")) == 6


def test_a_failed_rendering_leaves_the_old_one(shelf, tmp_path):
    render(tmp_path / "world", {"heldout": 2})
    with pytest.raises(ValueError, match="no split test; Picture World has train, cache, heldout"):
        render(tmp_path / "world", {"heldout": 3, "test": 3})
    assert len(load_from_disk(tmp_path / "world" / "heldout")) == 2


@pytest.mark.parametrize(("split", "size"), [("train", 900_001), ("cache", 100_001), ("heldout", 0), ("train", -3)])
def test_a_split_keeps_to_its_seeds(tmp_path, split, size):
    with pytest.raises(ValueError, match=f"{split}.*{size}"):
        render(tmp_path / "world", {split: size})
    assert not any(tmp_path.iterdir())
