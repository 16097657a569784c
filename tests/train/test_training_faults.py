"""Faults stop a training with an error that says what to do; the next run continues from the last good checkpoint."""

import json
import re
import resource
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Value, load_from_disk
from trainings import LMM_, SAMPLES, SETTINGS, run, told, train

from lmm_sae_nb.sae.adam import SAEAdam
from lmm_sae_nb.train.training import train_sae

pytestmark = pytest.mark.slow

FEATURES = Features(image=Image(), question=Value("string"), answer=Value("string"))


def nothing(place: Path) -> None:
    pass


def files_must_stay_small(place: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))  # the system refuses to write more


def a_weight_breaks(place: Path) -> None:
    LMM_.layer(1).mlp.down_proj.weight.data[0, 0] = float("nan")


def the_images_vanish(place: Path) -> None:
    (place / "images").rename(place / "elsewhere")


def the_shard_vanishes(place: Path) -> None:
    for shard in (place / "saved").glob("*.arrow"):
        shard.unlink()


def train_until(place: Path, fault, saved: bool = False) -> None:
    """A training into place/run that meets a fault after its third step; an error is written to place/error."""
    samples = load_from_disk(str(place / "saved")) if saved else in_files(place)
    try:
        on_log = lambda history: fault(place) if len(history) == 3 else None  # noqa: E731
        train_sae(LMM_, samples, 1, folder=place / "run", on_log=on_log, **SETTINGS)
    except (OSError, ValueError) as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (place / "error").write_text(f"{type(error).__name__}: {error}")


def rows(place: Path) -> list[dict]:
    """The samples, with their images in files."""
    paths = [str(place / "images" / f"{n}.png") if row["image"] else None for n, row in enumerate(SAMPLES)]
    return [{**row, "image": path} for row, path in zip(SAMPLES, paths, strict=True)]


def in_files(place: Path) -> Dataset:
    return Dataset.from_list(rows(place), features=FEATURES)


def with_images(place: Path) -> Path:
    (place / "images").mkdir()
    for row, sample in zip(rows(place), SAMPLES, strict=True):
        if row["image"]:
            sample["image"].save(row["image"])
    return place


@pytest.fixture
def place(tmp_path):
    return with_images(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = with_images(tmp_path_factory.mktemp("whole"))
    assert run(train_until, place, nothing) == 0
    return place / "run"


def assert_goes_on(place: Path, whole: Path) -> None:
    """A fault left one whole checkpoint and nothing else, and the training ends as if there had been no fault."""
    (step,) = (place / "run" / "checkpoint").iterdir()
    assert json.loads((step / "state.json").read_text())["step"] == int(step.name) >= 2
    assert [path.name for path in (place / "run").iterdir()] == ["checkpoint"]
    assert run(train_until, place, nothing) == 0
    assert told(place / "run") == told(whole)


def test_a_full_disk(place, whole):
    assert run(train_until, place, files_must_stay_small) == 0
    error = (place / "error").read_text()
    assert error.startswith("OSError: ")
    assert "the checkpoint of step 3 could not be written" in error
    assert "free. Make room and run again: training continues from the checkpoint of step 2" in error
    assert_goes_on(place, whole)


def test_hidden_states_that_are_not_finite(place, whole):
    assert run(train_until, place, a_weight_breaks) == 0
    error = (place / "error").read_text()
    assert error.startswith("ValueError: hidden states of layer 1, samples ")
    assert "hold NaN or infinity; load the model in float32 or bfloat16" in error
    assert_goes_on(place, whole)


def test_images_that_vanish(place, whole):
    assert run(train_until, place, the_images_vanish) == 0
    error = (place / "error").read_text()
    assert re.match(r"OSError: sample \d \(\d\.png\) cannot be read", error)
    assert "restore the data set's files and run again" in error
    (place / "elsewhere").rename(place / "images")
    assert_goes_on(place, whole)


def test_a_shard_that_vanishes(place, whole):
    """Once open it is mapped and stays; before that, datasets names it."""
    in_files(place).save_to_disk(str(place / "saved"))
    assert run(train_until, place, the_shard_vanishes, True) == 0
    assert told(place / "run") == told(whole)
    with pytest.raises(FileNotFoundError, match=r"data-00000-of-00001\.arrow"):
        load_from_disk(str(place / "saved"))


def test_a_loss_that_is_not_finite(tmp_path):
    with pytest.raises(ValueError, match="the loss is not finite: FVU .*lower lr"):
        train(tmp_path / "run", {"lr": 1e30})
    with pytest.raises(ValueError, match="the loss is not finite: FVU nan.* or on tokens that vary"):
        train(tmp_path / "alike", {"batch_tokens": 1, "buffer_tokens": 4})


def test_weights_that_are_not_finite_make_no_checkpoint(tmp_path, monkeypatch):
    def spoil(optimiser, closure=None):
        optimiser.param_groups[0]["params"][0].data[0, 0] = float("inf")

    monkeypatch.setattr(SAEAdam, "step", spoil)
    with pytest.raises(ValueError, match="after step 1 weights hold NaN or infinity; train with a lower lr"):
        train(tmp_path / "run")
    assert not tmp_path.joinpath("run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 7}, "checkpoint of another run: steps was 6, is now 7. .*or delete the folder to start again"),
        ({"kinds": ("base",)}, r"kinds was \['base', .*\], is now \['base'\]"),
        ({"lr": 1e-3, "seed": 4}, "lr was 0.003, is now 0.001; seed was 3, is now 4"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(place, settings, message):
    assert run(train_until, place, a_weight_breaks) == 0
    with pytest.raises(ValueError, match=message):
        train_sae(LMM_, in_files(place), 1, folder=place / "run", **SETTINGS | settings)
    with pytest.raises(ValueError, match="samples was .*, is now"):
        train_sae(LMM_, in_files(place).select(range(5)), 1, folder=place / "run", **SETTINGS)
