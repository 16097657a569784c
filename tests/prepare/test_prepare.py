"""The data of a preset: every record once, as its bytes, where the pages read it; a run that was killed goes on."""

import json
from pathlib import Path

import hub_data
import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from PIL import Image

from lmm_sae_nb.model.sample_checks import check_samples, open_samples
from lmm_sae_nb.prepare import write
from lmm_sae_nb.prepare.__main__ import main
from lmm_sae_nb.prepare.recipe import Source, read_recipe
from lmm_sae_nb.prepare.sources import plan
from lmm_sae_nb.support.images import open_images

PRESET = """
extends: small
unreadable: {unreadable}
prepare:
  samples: {{source: sources/datasets/lmms-lab/LLaVA-NeXT-Data, rows: {rows}, heldout: {heldout}}}
  images: {{source: sources/datasets/lmms-lab/COCO-Caption2017}}
  traps: {{source: sources/datasets/lmms-lab/HallusionBench}}
"""


@pytest.fixture
def project(tmp_path, root, monkeypatch):
    (tmp_path / "notebooks/params").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("")
    for file in root.glob("notebooks/*.py"):
        (tmp_path / "notebooks" / file.name).symlink_to(file)
    (tmp_path / "notebooks/params/small.yaml").symlink_to(root / "notebooks/params/small.yaml")
    hub_data.publish(tmp_path / "sources", "LLaVA-NeXT-Data", {"train": hub_data.llava(60)}, files=3)
    hub_data.publish(tmp_path / "sources", "COCO-Caption2017", {"val": hub_data.coco(5), "test": hub_data.coco(2)})
    hub_data.publish(tmp_path / "sources", "HallusionBench", {"image": hub_data.hallusion(12)})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    given(tmp_path)
    return tmp_path


def given(project: Path, unreadable: str = "skip", rows: int = 0, heldout: int = 6, name: str = "mine") -> None:
    text = PRESET.format(unreadable=unreadable, rows=rows, heldout=heldout)
    (project / f"notebooks/params/{name}.yaml").write_text(text)


def prepare(*names: str) -> None:
    main(["--preset", "mine", *(["--only", *names] if names else [])])


def said(rows: Dataset) -> set[str]:
    return {row["conversation"][0]["content"].removeprefix("<image>\n") for row in rows}


def test_every_record_is_written_once_as_its_bytes_and_those_that_do_not_fit_are_named(project, capsys):
    prepare()
    train, heldout = (open_samples(project / f"data/artifacts/small/samples/{name}") for name in ("train", "heldout"))
    check_samples(train)
    fit = [row for row in hub_data.llava(60) if len(row["conversations"]) > 1]
    assert len(train) + len(heldout) == len(fit) == 54 and len(heldout) == 6
    assert said(train) | said(heldout) == {f"What is number {row['id']}?" for row in fit}
    numbers = {row["conversation"][0]["content"].split()[-1]: row for row in train.with_format("arrow")[:].to_pylist()}
    for row in fit:
        written = numbers.get(f"{row['id']}?")
        if written is not None:
            assert [image["bytes"] for image in written["images"]] == ([row["image"]["bytes"]] if row["image"] else [])
            assert [turn["content"] for turn in written["conversation"]] == [t["value"] for t in row["conversations"]]
            assert {turn["role"] for turn in written["conversation"]} == {"user", "assistant"}
    report = json.loads((project / "data/artifacts/small/samples/train/prepare.json").read_text())
    assert sorted(int(place.split()[-1]) for place in report["skipped"]) == [9, 9, 9, 19, 19, 19]
    assert "6 records were left out: its last turn is of the user" in capsys.readouterr().out
    images = open_images(project / "data/artifacts/small/images")
    assert [image.size for image in images] == [(48 + 16 * (n % 3), 48) for n in range(1000, 1005)]


def test_traps_are_those_that_page_08_reads(project):
    prepare("traps")
    traps = load_from_disk(project / "data/artifacts/small/traps")
    assert [(row["answer"], row["taught"]) for row in traps][:2] == [("No", "Yes"), ("Yes", "No")]
    assert set(traps["part"]) == {"choose", "report"} and set(traps["group"]) == {"chart", "map", "illusion"}
    assert not (project / "data/artifacts/small/images").exists()


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_data(project, monkeypatch):
    prepare("samples")
    whole = open_samples(project / "data/artifacts/small/samples/train").with_format("arrow")[:].to_pylist()
    (project / "data/artifacts/small").rename(project / "first")
    as_row, read = write.as_row, []

    def killed(*arguments):
        read.append(arguments)
        if len(read) == 47:  # in the last file
            raise KeyboardInterrupt
        return as_row(*arguments)

    monkeypatch.setattr(write, "as_row", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare("samples")
    assert not (project / "data/artifacts/small/samples/train").exists()
    read[:] = [None] * 100
    prepare("samples")
    assert len(read) == 120  # only the last file was read again
    assert open_samples(project / "data/artifacts/small/samples/train").with_format("arrow")[:].to_pylist() == whole
    names = sorted(file.name for file in (project / "data/artifacts/small/samples").iterdir())
    assert names == ["heldout", "train"]


def test_a_kill_between_two_data_sets_loses_nothing(project, monkeypatch):
    replace_folder = write.replace_folder

    def killed(temporary, final):
        replace_folder(temporary, final)
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "replace_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare("samples")
    monkeypatch.undo()
    monkeypatch.chdir(project)
    prepare("samples")
    train, heldout = (open_samples(project / f"data/artifacts/small/samples/{name}") for name in ("train", "heldout"))
    assert len(said(train) | said(heldout)) == len(train) + len(heldout) == 54


def test_what_is_there_stays_and_another_recipe_is_refused(project, capsys):
    prepare("samples")
    before = (project / "data/artifacts/small/samples/train/state.json").stat().st_mtime_ns
    prepare("samples")
    assert "samples: is there already" in capsys.readouterr().out
    assert (project / "data/artifacts/small/samples/train/state.json").stat().st_mtime_ns == before
    given(project, heldout=7)
    with pytest.raises(SystemExit, match="holds data of another recipe; delete the folder"):
        prepare("samples")


def test_data_of_the_user_s_own_stay_as_they_are_and_the_rest_is_written(project, capsys):
    (project / "my/pictures").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(project / "my/pictures/one.png")
    Dataset.from_list([{"image": None, "question": "what ?", "answer": "that"}]).save_to_disk("my/train")
    file = project / "notebooks/params/mine.yaml"
    file.write_text(file.read_text() + "images: my/pictures\n08_hallucination_case: {traps: my/train}\n")
    prepare()
    told = capsys.readouterr().out
    assert "my/pictures holds data of yours" in told and "my/train holds data of yours" in told
    assert [path.name for path in (project / "my/pictures").iterdir()] == ["one.png"]
    assert open_samples(project / "data/artifacts/small/samples/train")
    (project / "my/pictures/one.png").unlink()
    with pytest.raises(SystemExit, match="my/pictures holds something that this command did not write"):
        prepare()


def test_a_record_that_does_not_fit_is_refused_by_choice(project):
    given(project, unreadable="refuse")
    with pytest.raises(SystemExit, match=r"file \d, row 9: its last turn is of the user.* unreadable: skip"):
        prepare("samples")


def test_a_source_with_no_more_rows_than_are_held_out_is_refused(project):
    given(project, heldout=60)
    with pytest.raises(SystemExit, match="has 60 rows, and 60 are to be held out: lower heldout"):
        prepare("samples")


def test_a_forecast_writes_nothing(project, capsys):
    main(["--preset", "mine", "--forecast"])
    assert not (project / "data").exists()
    assert "samples: 60 rows, about" in capsys.readouterr().out


@pytest.mark.parametrize(("rows", "heldout", "files"), [(0, 9, 4), (2000, 100, 8), (300, 10, 8), (15_200, 400, 250)])
def test_rows_come_in_equal_numbers_from_as_many_files_as_have_work(rows, heldout, files):
    shares = plan(Source("a/b", rows=rows, heldout=heldout, seed=3), files)
    assert sorted(share.file for share in shares) == list(range(files))
    assert sum(share.heldout for share in shares) == heldout
    some = [share.rows for share in shares if share.rows]
    if rows:
        assert sum(some) == rows + heldout and max(some) - min(some) <= 1
        assert len(some) == max(1, min(files, (rows + heldout) // 500))
    first = plan(Source("a/b", rows=rows, shuffle=False), files)
    assert [share.file for share in first] == list(range(files))
    assert np.all([share.rows in (None, 0, rows) for share in first])


@pytest.mark.parametrize(("text", "message"), [
    ("extends: small\nprepare: {samples: {source: a/b, split: 3}}", "mine.yaml, line 2: split is 3; write a text"),
    ("extends: small\nprepare:\n  samples:\n    sauce: a/b", "mine.yaml, line 4: .* no entry 'sauce'.*mean 'source'"),
    ("extends: small\nprepare: {samples: a/b}", "mine.yaml, line 2: samples is 'a/b'; write  source"),
    ("extends: small\nprepare: {mine: {source: a/b}}", "line 2: mine has no kind; write  kind: samples, images"),
    ("extends: small\nprepare: {mine: {source: a/b, kind: images}}", "no page says where mine belongs; write  to:"),
    ("extends: small\nprepare: {traps: {answers: {x: 3}}}", "answers is .*; write texts, in quotes"),
    ("run: mine", "mine.yaml has no section prepare"),
])  # fmt: skip
def test_a_wrong_recipe_is_named_by_its_line(project, text, message):
    file = project / "notebooks/params/mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(file, project)


def test_published_presets_say_where_everything_goes(root):
    for name in ("small", "paper"):
        goals, unreadable = read_recipe(root / f"notebooks/params/{name}.yaml", root)
        folder = root / "data/artifacts" / name
        assert {goal.name: goal.folder for goal in goals} == {
            "samples": folder / "samples/train", "images": folder / "images", "traps": folder / "traps"
        }  # fmt: skip
        assert goals[0].heldout == folder / "samples/heldout" and unreadable == "skip"
