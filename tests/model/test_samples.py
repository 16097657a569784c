"""Samples are checked before a run, by row number; pictures are opened in one way; what cannot be read is named."""

import io

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, Sequence, Value
from PIL import Image

from lmm_sae_nb.model.sample_checks import check_samples, open_samples
from lmm_sae_nb.model.samples import SampleReader, examples, prompts, readable
from lmm_sae_nb.support.images import UnreadableImage

FEATURES = Features(image=datasets.Image(), question=Value("string"), answer=Value("string"))


def picture(number: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def row(**change) -> dict:
    return {"image": picture(), "question": "what is it ?", "answer": "a dog"} | change


def encoded(image: Image.Image, cut: int | None = None) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue()[:cut], "path": None}


def saved(rows: list[dict]) -> Dataset:
    return Dataset.from_list(rows, features=FEATURES)


FAULTS = {
    "no answer": (row(answer=None), "answer is None, not text; write the text, or take the row out"),
    "no question": (row(question=None), "question is None, not text"),
    "a number": (row(answer=7), "answer is 7, not text"),
    "two images": (
        row(image=[picture(), picture()]),
        "image is a list of 2; give one image or None",
    ),
    "no image in a list": (row(image=[]), "image is a list of 0; give one image or None"),
    "three turns": (
        row(question=["a", "b", "c"]),
        "question is a list of 3; give one question and one",
    ),
    "a path": (row(image="dog.png"), "image is 'dog.png'; give a PIL image or None, or cast the column"),
    "an array": (row(image=np.zeros((2, 2, 3))), "image is array.*; give a PIL image or None"),
    "a column less": ({"image": None, "question": "?"}, "it has no answer, only image, question; rename the columns"),
    "no row": ("text", "it is a str; give a dictionary of image, question, answer"),
}


@pytest.mark.parametrize(("wrong", "message"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_row_is_named_before_the_run_with_its_value_and_the_remedy(wrong, message):
    with pytest.raises(ValueError, match=rf"(?s)^sample 2 \(rows count from 0\): {message}"):
        check_samples([row(), row(image=None), wrong])


def test_further_wrong_rows_are_numbered():
    rows = [row(), *[row(answer=None)] * 9]
    with pytest.raises(ValueError, match=r"sample 1 .* Also rows 2, 3, 4, 5, 6 and 3 more$"):
        check_samples(rows)
    with pytest.raises(ValueError, match=r"sample 1 .* take the row out. Also rows 2, 3, 4, 5, 6 and 3 more$"):
        check_samples(saved(rows))


@pytest.mark.parametrize("column", ["question", "answer"])
def test_a_missing_text_of_a_data_set_is_named_and_no_picture_is_read(column, monkeypatch):
    def never(*_):
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(datasets.Image, "decode_example", never)
    check_samples(saved([row(), row(image=None)]))
    with pytest.raises(ValueError, match=f"sample 3 .*: {column} is None, not text"):
        check_samples(saved([row()] * 3 + [row(**{column: None})]))
    with pytest.raises(ValueError, match=f"sample 1 .*: {column} is None"):  # of a selection, its own numbers
        check_samples(saved([row()] * 3 + [row(**{column: None})]).select([1, 3]))


def test_a_data_set_of_lists_is_refused():
    lists = Features(image=Sequence(datasets.Image()), question=Value("string"), answer=Value("string"))
    with pytest.raises(ValueError, match="sample 0 .*image is a list of 2"):
        check_samples(Dataset.from_list([row(image=[picture(), picture()])], features=lists))
    turns = Features(image=datasets.Image(), question=Sequence(Value("string")), answer=Value("string"))
    with pytest.raises(ValueError, match="sample 0 .*question is a list of 3; give one question and one answer"):
        check_samples(Dataset.from_list([row(question=["a", "b", "c"])], features=turns))
    with pytest.raises(ValueError, match=r"sample 0 .*image is 'a.png'; .*cast_column\('image', datasets.Image"):
        check_samples(Dataset.from_list([row(image="a.png")]))
    check_samples(Dataset.from_list([row(image=None)]))


def test_columns_of_other_names_are_listed():
    with pytest.raises(ValueError, match="no column question and no answer, only image, conversations; rename"):
        check_samples(Dataset.from_dict({"image": [None], "conversations": [[]]}))


@pytest.mark.usefixtures("unchecked")
def test_splits_are_named(tmp_path):
    splits = DatasetDict(train=saved([row()]), test=saved([row()]))
    splits.save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"has the splits train, test; give the folder of one: .*both/train"):
        open_samples(tmp_path / "both")
    assert len(open_samples(tmp_path / "both" / "train")) == 1
    with pytest.raises(ValueError, match=r"splits train, test; give one: samples\['train'\]"):
        check_samples(splits)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        open_samples(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no whole data set"):
        open_samples(tmp_path)


@pytest.mark.usefixtures("unchecked")
def test_what_are_no_samples_is_refused():
    with pytest.raises(ValueError, match=r"the text 'my/samples'; open the folder: open_samples\('my/samples'\)"):
        check_samples("my/samples")
    with pytest.raises(ValueError, match="are a generator; give a data set"):
        check_samples(row() for _ in range(2))
    check_samples(IterableDataset.from_generator(lambda: iter([row(answer=None)])))  # checked as it comes


def test_a_text_with_the_image_token_is_named_before_the_run(lmm):
    token = lmm.processor.image_token
    rows = [row(), row(question=f"{token}\nwhat ?")]
    for samples in (rows, saved(rows)):
        with pytest.raises(ValueError, match=f"sample 1 .*question .* holds the image token {token}; leave it out"):
            check_samples(samples, lmm)


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    """16 bits, transparent, turned: in memory, as bytes, as a file."""
    ramp = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040)
    clear = picture().convert("RGBA")
    clear.putalpha(Image.fromarray(np.full((8, 8), 128, np.uint8)))
    for number, image in enumerate((ramp, clear)):
        image.save(tmp_path / f"{number}.png")
        sources = [image, encoded(image), {"bytes": None, "path": str(tmp_path / f"{number}.png")}]
        read = [np.asarray(SampleReader([row(image=source)])[0]["image"]) for source in sources]
        read.append(np.asarray(SampleReader(saved([row(image=encoded(image))]))[0]["image"]))
        assert all(np.array_equal(read[0], other) for other in read[1:])
        assert abs(float(read[0].mean()) - (127.5 if number == 0 else 191)) < 8


def test_an_unreadable_picture_names_its_sample_and_a_lost_file_is_not_one(tmp_path, lmm):
    broken = saved([row(), row(image=encoded(picture(), 40))])
    with pytest.raises(UnreadableImage, match="sample 1 is not a readable image"):
        list(prompts(lmm, broken, [0, 1], 2))
    picture().save(tmp_path / "gone.png")
    lost = saved([row(image=str(tmp_path / "gone.png"))])
    (tmp_path / "gone.png").unlink()
    with pytest.raises(OSError, match=r"sample 0 \(gone.png\) cannot be read .*restore the data set's files"):
        SampleReader(lost)[0]


def test_a_sample_that_the_model_cannot_take_is_named(lmm, monkeypatch):
    make = type(lmm).conversations

    def conversations(self, turns, images):
        if "no" in str(turns):
            raise ValueError("cannot take it")
        return make(self, turns, images)

    monkeypatch.setattr(type(lmm), "conversations", conversations)
    with pytest.raises(ValueError, match="^sample 7: cannot take it"):
        list(prompts(lmm, [row()] * 7 + [row(answer="no")], [3, 7], 2))


def test_readable_samples_and_the_names_of_the_others():
    samples = saved([row(), row(image=encoded(picture(), 40)), row(image=None), row(image=encoded(picture(), 0))])
    kept, skipped, converted = readable(samples, "skip")
    assert [each["image"] is None for each in kept] == [False, True]
    assert {number: fault.split(":")[0] for number, fault in skipped.items()} == {1: "sample 1", 3: "sample 3"}
    with pytest.raises(UnreadableImage, match="sample 1"):
        readable(samples, "refuse")
    with pytest.raises(ValueError, match="no sample can be read, 1 were skipped: sample 0"):
        readable(samples.select([1]), "skip")
    assert readable(rows := [row(), row(image=None)], "refuse") == (rows, {}, converted) and converted == {}
    with pytest.raises(ValueError, match="unreadable is 'ask'; choose one of 'refuse' and 'skip'"):
        readable(samples, "ask")


def test_examples_are_the_first_readable_pictures_however_few_there_are():
    rows = [row(image=None), row(image=encoded(picture(), 40)), row(answer="1"), row(image=None), row(answer="2")]
    for samples in (rows, saved(rows)):
        assert [each["answer"] for each in examples(samples, 6)] == ["1", "2"]
        assert [each["answer"] for each in examples(samples, 1)] == ["1"]
    assert examples(saved([row(image=None)]), 6) == []
