"""A damaged data set is refused by the name of its file; one that is whole is read as plain values."""

import json

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from PIL import Image

from lmm_sae_nb.support.images import open_images
from lmm_sae_nb.support.saved_data import open_saved

FEATURES = Features(image=datasets.Image(), question=Value("string"))


@pytest.fixture
def saved(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    rows = [{"image": Image.fromarray(each), "question": f"what is {n} ?"} for n, each in enumerate(pixels)]
    Dataset.from_list(rows, features=FEATURES).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


def flip(file, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 16
    file.write_bytes(data)


@pytest.mark.parametrize("length", [0, 100, -1000])
def test_a_table_that_was_cut_is_named(saved, length):
    (file,) = saved.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:length])
    for read in (open_saved, open_images):
        with pytest.raises(ValueError, match=rf"{file.name} .*restore it"):
            read(saved)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize("text", ["", "[1]", '{"a', "\\x00"])
def test_a_damaged_description_is_named(saved, name, text):
    (saved / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        open_saved(saved)


def test_offsets_that_lead_nowhere_are_found_before_a_row_is_read(saved):
    (file,) = saved.glob("*.arrow")
    at = file.read_bytes().index(b"what is 0 ?what is 1 ?what is 2 ?")
    offsets = np.array([0, 11, 22, 33], dtype=np.int32).tobytes()
    flip(file, file.read_bytes().rindex(offsets, 0, at) + 7)  # the highest byte of the second one
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        open_saved(saved)


def test_a_format_that_the_data_were_saved_with_does_not_count(saved):
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"_format_type": "numpy", "_format_columns": ["question"]}))
    assert open_saved(saved)[1]["question"] == "what is 1 ?" and open_saved(saved)[1]["image"] is not None


def test_pictures_of_a_data_set_whose_bytes_changed_have_another_identity(saved):
    before = open_images(saved)
    (file,) = saved.glob("*.arrow")
    known = before.identity, before.stamp
    flip(file, file.read_bytes().index(b"IDAT") + 9)
    after = open_images(saved)
    assert after.identity != known[0] and after.stamp != known[1]
