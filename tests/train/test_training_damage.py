"""Unreadable samples, damaged files, leftovers and second runs: named, left out or made again, never a wrong SAE."""

import io
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from trainings import LMM_, SAMPLES, SETTINGS, told, train, train_together
from trainings import run as in_child

from lmm_sae_nb.model.samples import readable
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.files import temporary_name
from lmm_sae_nb.support.images import UnfitImage, UnreadableImage
from lmm_sae_nb.support.locks import FolderInUse, hold
from lmm_sae_nb.train import checkpoint, training
from lmm_sae_nb.train.sample_parts import LeftOut, ShuffledParts, StreamedParts
from lmm_sae_nb.train.training import train_sae

FEATURES = Features(image=ImageFeature(), question=Value("string"), answer=Value("string"))
BROKEN = 2  # a sample with a picture; all seven are read in each epoch


def rows(broken: bool = True) -> list[dict]:
    """The samples with their pictures as bytes, one of them cut short."""
    found = []
    for number, row in enumerate(SAMPLES):
        image = None
        if row["image"]:
            row["image"].save(buffer := io.BytesIO(), "PNG")
            data = buffer.getvalue()
            image = {"bytes": data[:-400] if broken and number == BROKEN else data, "path": None}
        found.append({**row, "image": image})
    return found


def data(broken: bool = True) -> Dataset:
    return Dataset.from_list(rows(broken), features=FEATURES)


def without(samples: Dataset) -> Dataset:
    return samples.select([n for n in range(len(samples)) if n != BROKEN])


def run(samples, folder: Path, **settings):
    return train_sae(LMM_, samples, 1, folder=folder, **SETTINGS | settings)


class Stop(Exception):
    """The end of a run."""


def stopped(samples, folder: Path, at: int = 4, **settings) -> None:
    """A run that is stopped in a step, after a checkpoint."""

    def on_log(history):
        if len(history) == at:
            raise Stop

    with pytest.raises(Stop):
        run(samples, folder, on_log=on_log, **settings)
    assert (folder / "checkpoint").is_dir()


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    """A run that leaves the broken sample out."""
    folder = tmp_path_factory.mktemp("skipping") / "run"
    return folder, run(data(), folder, unreadable="skip")


def test_an_unreadable_sample_is_named_or_left_out(skipping, tmp_path):
    with pytest.raises(UnreadableImage, match=f"sample {BROKEN} is not a readable image .*unreadable: skip"):
        run(data(), tmp_path)
    folder, trained = skipping
    (folder / ".lock").touch()  # as after a kill at the very end
    assert [*trained.skipped] == [BROKEN] and f"sample {BROKEN}: " in trained.skipped[BROKEN]
    assert trained.history[-1]["step"] == SETTINGS["steps"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = run(data(), folder, unreadable="skip")
    assert again.skipped == trained.skipped and not (folder / ".lock").exists()
    assert torch.equal(again.sae.W_dec, trained.sae.W_dec)
    with pytest.raises(
        ValueError, match=rf"left out 1 samples .*the first is {BROKEN} \(sample {BROKEN}: .*unreadable: s"
    ):
        run(data(), folder)


@pytest.fixture
def narrow(monkeypatch):
    """The samples with a picture that the processor refuses, as some do for its sides, and one that is converted."""
    processor = type(LMM_.processor.image_processor)
    call = processor.__call__

    def refusing(self, images, *arguments, **settings):
        flat = [each for row in images for each in (row if isinstance(row, list) else [row])]
        if any(image.width == 1 for image in flat):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return call(self, images, *arguments, **settings)

    monkeypatch.setattr(processor, "__call__", refusing)
    samples = [dict(row) for row in SAMPLES]
    samples[BROKEN]["image"] = samples[BROKEN]["image"].crop((0, 0, 1, 192))
    samples[5]["image"] = samples[5]["image"].convert("RGBA")  # the same pixels
    return samples


def test_a_picture_that_the_processor_refuses_is_left_out_as_one_that_cannot_be_read(skipping, narrow, tmp_path):
    with pytest.raises(UnfitImage, match=f"^sample {BROKEN}: .*1 x 192 px, does not fit .*aspect ratio"):
        run(narrow, tmp_path / "refused")
    stopped(narrow, tmp_path / "run", unreadable="skip")
    trained = run(narrow, tmp_path / "run", unreadable="skip")
    assert torch.equal(trained.sae.W_dec, skipping[1].sae.W_dec)
    for each in (trained, run(narrow, tmp_path / "run", unreadable="skip")):
        assert [*each.skipped] == [BROKEN] and "aspect ratio" in each.skipped[BROKEN]
        assert each.converted == {"pictures": 1, "colours": 1}
    kept, unread, _ = readable(narrow, "skip", LMM_)
    assert len(kept) == len(narrow) - 1 and [*unread] == [BROKEN]
    assert skipping[1].converted == {}


def test_the_order_of_the_others_is_that_of_all_samples():
    left_out = LeftOut(SAMPLES, {BROKEN: "by hand"}, removed=False)
    numbers = [[n for n, _ in ShuffledParts(SAMPLES, 2, 3, left_out)(part)] for part in range(8)]
    complete = [
        [n for n, _ in ShuffledParts(SAMPLES, 2, 3, LeftOut(SAMPLES, {}, removed=False))(part)] for part in range(8)
    ]
    assert numbers == [[n for n in part if n != BROKEN] for part in complete]
    few = [row for n, row in enumerate(SAMPLES) if n != BROKEN]
    removed = ShuffledParts(few, 2, 3, LeftOut(few, {BROKEN: "by hand"}, removed=True))
    for part, expected in enumerate(numbers):
        read = {number: opener() for number, opener in removed(part)}
        assert [*read] == expected
        assert all(read[number]["question"] == SAMPLES[number]["question"] for number in read)


@pytest.mark.slow
def test_a_run_that_refused_goes_on_when_it_may_skip_or_when_the_row_is_gone(skipping, tmp_path):
    """The case of the issue: nothing of the checkpoint is lost, and the SAE is the same to the bit."""
    folder, trained = skipping
    stopped(data(), tmp_path / "skip", unreadable="skip")
    shutil.copytree(tmp_path / "skip", tmp_path / "removed")
    shutil.copytree(tmp_path / "skip", tmp_path / "other")
    with pytest.raises(ValueError, match="take these rows out, or leave them out"):
        run(data(), tmp_path / "skip")
    assert torch.equal(run(data(), tmp_path / "skip", unreadable="skip").sae.W_dec, trained.sae.W_dec)
    assert told(tmp_path / "skip") == told(folder)
    removed = run(without(data()), tmp_path / "removed")  # nothing is unreadable now: "refuse" is right
    assert told(tmp_path / "removed") == told(folder)
    assert [*removed.skipped] == [BROKEN]
    assert run(without(data()), tmp_path / "removed").skipped == removed.skipped  # finished, and known as such
    with pytest.raises(ValueError, match="checkpoint of another run: samples was"):
        run(data().select([0, 1, 3, 4, 5]), tmp_path / "other", unreadable="skip")


@pytest.mark.slow
def test_a_row_that_made_a_run_stop_can_be_taken_out_and_the_run_goes_on(skipping, tmp_path):
    """The broken picture comes late, after a checkpoint that knows nothing of it."""
    settings = {"batch_samples": 1, "buffer_tokens": 512, "batch_tokens": 256}
    first = next(seed for seed in range(99) if order(seed)[-1] == BROKEN)
    whole = run(data(), tmp_path / "whole", unreadable="skip", seed=first, **settings)
    with pytest.raises(UnreadableImage):
        run(data(), tmp_path / "run", seed=first, **settings)
    assert (tmp_path / "run" / "checkpoint" / "unreadable.json").is_file()
    trained = run(without(data()), tmp_path / "run", seed=first, **settings)
    assert torch.equal(trained.sae.W_dec, whole.sae.W_dec)
    assert trained.skipped == whole.skipped
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.slow
def test_a_picture_that_made_a_run_stop_can_be_repaired_and_the_run_goes_on(tmp_path):
    """The broken picture comes late, after a checkpoint that knows nothing of it."""
    settings = {"batch_samples": 1, "buffer_tokens": 512, "batch_tokens": 256}
    settings["seed"] = next(seed for seed in range(99) if order(seed)[-1] == BROKEN)
    whole = run(data(broken=False), tmp_path / "whole", **settings)
    with pytest.raises(UnreadableImage):
        run(data(), tmp_path / "run", **settings)
    other = rows(broken=False)
    other[BROKEN + 1]["answer"] = "something else"
    with pytest.raises(ValueError, match="checkpoint of another run: samples was"):
        run(Dataset.from_list(other, features=FEATURES), tmp_path / "run", **settings)
    assert torch.equal(run(data(broken=False), tmp_path / "run", **settings).sae.W_dec, whole.sae.W_dec)


@pytest.mark.slow
def test_another_picture_makes_another_run_wherever_it_is(tmp_path):
    """Of 28 samples, the pixels of 16 always count; this is another one."""
    assert (changed := 6) not in np.linspace(0, 27, 16, dtype=int)
    many = 4 * rows(broken=False)
    (other := list(many))[changed] = many[changed] | {"image": many[BROKEN]["image"]}
    samples, others = (Dataset.from_list(each, features=FEATURES) for each in (many, other))
    stopped(samples, tmp_path / "run")
    with pytest.raises(ValueError, match="checkpoint of another run: samples was"):
        run(others, tmp_path / "run")
    finished = run(samples, tmp_path / "run").sae
    assert not torch.equal(run(others, tmp_path / "run").sae.W_dec, finished.W_dec)


def order(seed: int) -> list[int]:
    """The order of the samples in the first epoch."""
    parts = ShuffledParts(SAMPLES, 1, seed, LeftOut(SAMPLES, {}, removed=False))
    return [number for part in range(len(SAMPLES)) for number, _ in parts(part)]


def train_and_skip(folder: Path, settings: dict) -> None:
    run(data(), folder, unreadable="skip", **settings)


@pytest.mark.slow
def test_every_process_leaves_out_what_one_of_them_could_not_read(skipping, tmp_path):
    assert in_child(train_together, tmp_path / "together", 2, {}, train_and_skip) == 0
    folders = skipping[0], tmp_path / "together"
    alone, together = (json.loads((folder / "history.json").read_text()) for folder in folders)
    assert together["skipped"] == alone["skipped"]
    assert together["samples_left"] == alone["samples_left"]
    for ours, theirs in zip(*(TopKSAE.load(folder).parameters() for folder in folders), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)  # Adam steps are 2e-3


def test_samples_of_which_none_can_be_read(tmp_path):
    broken = data().select([BROKEN] * 3)
    with pytest.raises(ValueError, match="none of 3 samples can be read; the first is sample"):
        run(broken, tmp_path, unreadable="skip")


@pytest.mark.parametrize("change", [{"answer": None}, {"question": None}, {"image": []}])
def test_a_wrong_sample_is_named_before_anything_is_written(tmp_path, change):
    with pytest.raises(ValueError, match="^sample 6 .rows count from 0.: "):
        run([*SAMPLES[:6], SAMPLES[6] | change], tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Streams.


def stream(samples: list[dict]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(samples), features=FEATURES)


def test_a_data_stream_comes_in_its_order_epoch_after_epoch_and_from_any_part():
    parts = StreamedParts(stream(rows(broken=False)), 3)
    orders = [[(number, read()["question"]) for number, read in parts(part)] for part in (0, 1, 2, 3, 5, 4, 0)]
    epoch = [(n, row["question"]) for n, row in enumerate(SAMPLES)]
    assert orders == [epoch[:3], epoch[3:6], epoch[6:], epoch[:3], epoch[6:], epoch[3:6], epoch[:3]]
    with pytest.raises(ValueError, match="the stream of samples is empty"):
        list(StreamedParts(stream([]), 3)(0))


@pytest.mark.slow
def test_a_training_from_a_stream_goes_on_and_skips(tmp_path):
    whole = run(stream(rows()), tmp_path / "whole", unreadable="skip")
    assert [*whole.skipped] == [BROKEN]
    stopped(stream(rows()), tmp_path / "run", unreadable="skip")
    assert torch.equal(run(stream(rows()), tmp_path / "run", unreadable="skip").sae.W_dec, whole.sae.W_dec)
    assert told(tmp_path / "run") == told(tmp_path / "whole")
    with pytest.raises(ValueError, match="sample 1: answer is None"):
        run(stream([rows()[0], rows()[1] | {"answer": None}]), tmp_path / "wrong")


# Damage.


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The folder of a training that was stopped."""
    folder = tmp_path_factory.mktemp("half") / "run"
    stopped(SAMPLES, folder)
    return folder


@pytest.fixture
def halfway(half, tmp_path):
    shutil.copytree(half, tmp_path / "run")
    return tmp_path / "run"


def only_step(folder: Path) -> Path:
    (step,) = (folder / "checkpoint").iterdir()
    return step


def flip(path: Path, fraction: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(fraction * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def changed(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


HUGE = {"block": 10**9, "batch": 0, "part": 10**12, "skip": 0}
DAMAGE = {
    "state cut": lambda step: (step / "state.json").write_bytes((step / "state.json").read_bytes()[:50]),
    "state empty": lambda step: (step / "state.json").write_bytes(b""),
    "state gone": lambda step: (step / "state.json").unlink(),
    "another step": lambda step: changed(step / "state.json", step=20),
    "no position": lambda step: changed(step / "state.json", position={}),
    "a huge position": lambda step: changed(
        step / "state.json", position=dict(block=10**9, batch=0, part=10**12, skip=0)
    ),
    "wrong types": lambda step: changed(step / "state.json", step="3", histories=[]),
    "of an older version": lambda step: (step / "state.json").write_text('{"step": 3}'),
    **{
        f"{name} {kind}": lambda step, name=name, damage=damage: damage(step / name)
        for name in ("tensors.safetensors", "optimiser.pt")
        for kind, damage in {
            "gone": Path.unlink,
            "empty": lambda path: path.write_bytes(b""),
            "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
            "flipped at its start": lambda path: flip(path, 0),
            "flipped in the middle": lambda path: flip(path, 0.5),
            "flipped at its end": lambda path: flip(path, 1),
            "something else": lambda path: path.write_bytes(b"x" * 5000),
        }.items()
    },
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_with_the_remedy_and_never_trained_on(halfway, damage):
    damage(only_step(halfway))
    with pytest.raises(ValueError, match=r"checkpoint is damaged: .*(state|tensors|optim).*delete .*/checkpoint to"):
        train(halfway)


def test_the_older_of_two_checkpoints_is_taken_if_the_newer_is_damaged(halfway, tmp_path):
    step = only_step(halfway)
    shutil.copytree(step, step.with_name("99"))
    flip(step.with_name("99") / "tensors.safetensors", 0.9)
    with pytest.warns(UserWarning, match=rf"99/tensors.safetensors is damaged.* continues from step {step.name}"):
        loaded = checkpoint.load(halfway / "checkpoint")
    assert loaded.state["step"] == int(step.name)


def test_leftovers_of_a_killed_writer_are_cleared_before_the_first_step(halfway, tmp_path, monkeypatch):
    """Room for two checkpoints is enough for a resume."""
    leftover = temporary_name(halfway / "checkpoint" / "9")
    leftover.mkdir()
    (leftover / "tensors.safetensors").write_bytes(b"x" * 100)
    (halfway / "checkpoint" / ".mine.tmp").write_text("the user's")

    def look(folder, step, saved):
        assert not leftover.exists()
        raise Stop

    monkeypatch.setattr(checkpoint, "save", look)
    with pytest.raises(Stop):
        train(halfway)
    assert (halfway / "checkpoint" / ".mine.tmp").exists()


def test_a_second_run_is_refused(tmp_path):
    with hold(tmp_path / "run"), pytest.raises(FolderInUse, match="another run holds .*run since .*process"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder)
    return folder


@pytest.mark.parametrize("name", ["sae.safetensors", "cfg.json", "history.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_finished_sae_with_a_damaged_file_is_trained_again(finished, tmp_path, monkeypatch, name, damage):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    path = folder / name
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif name == "cfg.json":
        path.write_text(path.read_text().replace('"k": 4', '"k": 5'))
    else:
        flip(path, 0.5)
    monkeypatch.setattr(training, "do_steps", stop)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(Stop):
            train(folder)
    if (name, damage) != ("history.json", "gone"):  # then nothing says that it was finished
        assert any(f"the SAE in {folder} is trained again: " in str(warning.message) for warning in caught)


def stop(*_):
    raise Stop


@pytest.mark.slow
def test_an_sae_that_is_trained_again_is_the_same_to_the_bit(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    flip(tmp_path / "run" / "sae.safetensors", 0.5)
    with pytest.warns(UserWarning, match="trained again: .*sae.safetensors is damaged"):
        train(tmp_path / "run")
    assert told(tmp_path / "run") == told(finished)
