"""A fingerprint of samples sees every picture that changed, as far as that is cheap, and nothing else."""

import io
import shutil
from collections.abc import Sequence

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from PIL import Image

from lmm_sae_nb.model import data_identity
from lmm_sae_nb.model.data_identity import data_fingerprint
from lmm_sae_nb.model.samples import first_turns

N, CHANGED = 40, 3  # samples, and one that is not among the 16 whose pixels always count
SHORT = Features(image=datasets.Image(), question=Value("string"), answer=Value("string"))
TURN = {"role": Value("string"), "content": Value("string")}
LONG = Features(images=datasets.Sequence(datasets.Image()), conversation=[TURN])


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "BMP", cut: int | None = None) -> dict:
    """A picture as a data set stores it. Every BMP of one size has the same number of bytes."""
    image.save(buffer := io.BytesIO(), kind)
    return {"bytes": buffer.getvalue()[:cut], "path": None}


def pictures(changed: bool, kind: str = "BMP") -> list[dict]:
    return [encoded(picture(N if changed and n == CHANGED else n), kind) for n in range(N)]


def rows(images: list) -> list[dict]:
    return [{"image": image, "question": f"{n} ?", "answer": "yes"} for n, image in enumerate(images)]


class Made(Sequence):
    """Samples that a call makes."""

    def __init__(self, samples):
        self._samples = samples

    def __len__(self):
        return len(self._samples)

    def __getitem__(self, number):
        return self._samples[number]


def in_memory(changed, folder):
    return rows([Image.open(io.BytesIO(each["bytes"])) for each in pictures(changed)])


def as_bytes(changed, folder):
    return rows(pictures(changed))


def saved(changed, folder):
    Dataset.from_list(rows(pictures(changed)), features=SHORT).save_to_disk(folder / "saved")
    return datasets.load_from_disk(folder / "saved")


def files(changed, folder):
    for number, each in enumerate(pictures(changed)):
        (folder / f"{number}.bmp").write_bytes(each["bytes"])
    paths = [str(folder / f"{number}.bmp") for number in range(N)]
    return Dataset.from_dict({"image": paths, "question": ["?"] * N, "answer": ["yes"] * N}, features=SHORT)


def in_another_order(changed, folder):
    order = list(reversed(range(N)))
    backwards = [rows(pictures(changed))[n] for n in order]
    return Dataset.from_list(backwards, features=SHORT).select(order)


def conversations(changed, folder):
    texts, talk = ("hello ?", "<image> or <image> ?"), {}
    for text in texts:
        talk[text] = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    found = [{"images": [image] * 2, "conversation": talk[texts[1]]} for image in pictures(changed)]
    return Dataset.from_list([{"images": [], "conversation": talk[texts[0]]}, *found], features=LONG)


def turns(changed, folder):
    return first_turns(conversations(changed, folder))


@pytest.mark.parametrize("form", [in_memory, as_bytes, saved, files, in_another_order, conversations, turns])
def test_another_picture_anywhere_gives_another_fingerprint_though_its_file_is_as_long(form, tmp_path):
    places = [tmp_path / name for name in ("one", "two", "changed")]
    for place in places:
        place.mkdir()
    one, two, changed = (data_fingerprint(form(place == places[2], place)) for place in places)
    assert one == two != changed


@pytest.mark.parametrize("form", [saved, files, in_memory])
def test_of_large_data_only_sizes_count_and_no_other_picture_is_read(form, tmp_path, monkeypatch):
    monkeypatch.setattr(data_identity, "LARGE", 0)
    monkeypatch.setattr(data_identity, "_content", None)
    (tmp_path / "other").mkdir()
    known = data_fingerprint(form(False, tmp_path))
    assert known == data_fingerprint(form(True, tmp_path / "other"))
    shutil.rmtree(tmp_path / "other")
    larger = rows([*pictures(False)[:CHANGED], encoded(Image.new("RGB", (9, 9))), *pictures(False)[CHANGED + 1 :]])
    if form is saved:
        assert known != data_fingerprint(Dataset.from_list(larger, features=SHORT))


def test_samples_that_a_call_makes_count_by_texts_and_sizes():
    whole = data_fingerprint(Made(rows([picture(n) for n in range(N)])))
    other, larger, said = (rows([picture(n) for n in range(N)]) for _ in range(3))
    other[CHANGED]["image"], larger[CHANGED]["image"] = picture(N), picture(N).resize((9, 9))
    said[CHANGED]["answer"] = "no"
    assert data_fingerprint(Made(other)) == whole
    assert len({whole, data_fingerprint(Made(larger)), data_fingerprint(Made(said))}) == 3


def test_copied_files_and_a_file_that_comes_back_are_the_same_data(tmp_path):
    samples = files(False, tmp_path)
    known = data_fingerprint(samples)
    (tmp_path / "3.bmp").rename(tmp_path / "away")
    assert data_fingerprint(samples) != known
    (tmp_path / "3.bmp").write_bytes((tmp_path / "away").read_bytes())
    assert data_fingerprint(samples) == known


@pytest.mark.parametrize("form", [list, lambda found: Dataset.from_list(found, features=SHORT)])
def test_a_fingerprint_is_of_the_data_whether_or_not_rows_that_are_left_out_are_there(form):
    """40 samples, so that 16 of them count with their pixels; each removal also shifts which."""
    whole = rows(pictures(False, "PNG"))
    for gone in ([0], [39], [3, 4, 5], [0, 20, 38]):
        cut = [each | {"image": encoded(picture(n), "PNG", 40)} if n in gone else each for n, each in enumerate(whole)]
        left = [each for n, each in enumerate(whole) if n not in gone]
        assert data_fingerprint(form(cut), gone) == data_fingerprint(form(left))
        assert len({data_fingerprint(form(each)) for each in (whole, cut, left)}) == 3
        assert data_fingerprint(form(whole), [1]) != data_fingerprint(form(left))
