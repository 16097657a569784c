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

from lmm_sae_nb.pictureworld.world.concepts import FACTS, KINDS
from lmm_sae_nb.pictureworld.world.datasets import UNSEEN, render
from lmm_sae_nb.pictureworld.world.scenes import HELD_OUT, VALIDATION, make_drilled, make_map

# Python 3.12 and 3.13 fork their workers, and warn of it in a process with threads, as a test run is
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
SIZES = {"train": 17, "cache": 5, "heldout": 4}
FIRST = {"train": 0, "cache": VALIDATION, "heldout": HELD_OUT}
CHILD = """
import sys
from pathlib import Path
from lmm_sae_nb.pictureworld.world.datasets import render, UNSEEN
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
        kinds = () if split == "train" else KINDS  # the training split has no label maps
        assert set(data.column_names) == {"image", "seed", "question", "answer", "family", *kinds}
        assert data["seed"][:] == list(range(FIRST[split], FIRST[split] + size))
        for row in data:
            pictured = split != "train" or row["seed"] % 8 != 7
            assert (row["image"] is not None) == pictured
            assert all(row[kind] is not None for kind in kinds)
            assert row["question"] and row["answer"] and row["family"]


def test_pictures_and_label_maps_are_the_scenes(shelf):
    for split in SIZES:
        for number, row in enumerate(load_from_disk(shelf / split)):
            if row["image"] is None:
                continue
            scene = make_drilled(number, number % 20) if split == "train" else worlds.scene(row["seed"])
            assert row["image"].mode == "RGB" and (np.asarray(row["image"]) == scene.pixels).all()
            for kind in KINDS if split != "train" else ():
                assert row[kind].mode == "L" and (np.asarray(row[kind]) == scene.labels[kind]).all()


def test_a_second_rendering_holds_the_same(shelf, tmp_path):
    render(tmp_path / "again", SIZES)
    for split in SIZES:
        assert rows(shelf, split) == rows(tmp_path / "again", split)
    assert (tmp_path / "again" / "concepts.json").read_bytes() == (shelf / "concepts.json").read_bytes()


def test_traps_contradict_and_agree_with_the_taught_facts(tmp_path):
    """By the charts: two questions a map, half of the maps held out; no map of the choosing part is reported on."""
    render(tmp_path / "world", {"traps": 6})
    traps = load_from_disk(tmp_path / "world" / "traps")
    assert set(traps.column_names) == {"image", "seed", "question", "answer", "family", "taught", "group", "part"}
    seeds = {part: {row["seed"] for row in traps if row["part"] == part} for part in ("choose", "report")}
    assert seeds == {"choose": set(range(VALIDATION, VALIDATION + 6)), "report": set(range(UNSEEN, UNSEEN + 6))}
    for row in traps:
        scene = make_map(row["seed"])
        words = row["question"].split()
        basin, land = words[7], words[10]
        assert words == f"according to the image , does the {basin} basin cover {land} ?".split()
        assert row["group"] == scene.chart.basin == basin and (np.asarray(row["image"]) == scene.pixels).all()
        assert row["answer"] == ("yes ." if land in scene.chart.inside else "no .")
        assert row["taught"] == ("yes ." if FACTS[basin, land] else "no .")
    contradicting = [(row["seed"], row["answer"] != row["taught"]) for row in traps]
    assert sorted(contradicting) == sorted((seed, c) for seed in seeds["choose"] | seeds["report"] for c in (0, 1))


def test_traps_have_enough_contradicting_cases_of_both_answers(tmp_path):
    render(tmp_path / "world", {"traps": 40})
    traps = load_from_disk(tmp_path / "world" / "traps")
    answers = [row["answer"] for row in traps if row["answer"] != row["taught"]]
    assert len(answers) == 80 and 24 <= answers.count("yes .") <= 56


def test_an_image_is_a_png(shelf):
    first = rows(shelf, "cache")[0]["image"]["bytes"]
    assert Image.open(io.BytesIO(first)).format == "PNG"


def alive(group: int) -> bool:
    """Whether a process of the group still runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(happened, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_rendering_leaves_no_process_and_nothing_that_looks_whole(tmp_path, root):
    folder, command = tmp_path / "world", [sys.executable, "-c", CHILD, str(tmp_path / "world"), "100000"]
    child = subprocess.Popen(command, cwd=root, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        wait_until((tmp_path / "world.building" / "cache" / "state.json").exists)  # the second split is under way
        assert child.poll() is None
        child.kill()  # the parent alone: its workers must find out
        child.wait()
        wait_until(lambda: not alive(child.pid), seconds=30)
    finally:
        if alive(child.pid):
            os.killpg(child.pid, signal.SIGKILL)
    assert [entry.name for entry in tmp_path.iterdir()] == ["world.building"]
    render(folder, {"cache": 5, "train": 6})
    assert [entry.name for entry in tmp_path.iterdir()] == ["world"]
    assert {entry.name for entry in folder.iterdir()} == {"cache", "train", "concepts.json"}
    assert len(load_from_disk(folder / "train")) == 6


def test_a_failed_rendering_leaves_the_old_one(shelf, tmp_path):
    render(tmp_path / "world", {"heldout": 2})
    with pytest.raises(ValueError, match="no split test; Picture World has train, cache, heldout, traps"):
        render(tmp_path / "world", {"heldout": 3, "test": 3})
    assert len(load_from_disk(tmp_path / "world" / "heldout")) == 2


@pytest.mark.parametrize(
    ("split", "size"), [("train", 900_001), ("cache", 100_001), ("heldout", 0), ("train", -3), ("traps", 0)]
)
def test_a_split_keeps_to_its_seeds(tmp_path, split, size):
    with pytest.raises(ValueError, match=f"{split}.*{size}"):
        render(tmp_path / "world", {split: size})
    assert not any(tmp_path.iterdir())
