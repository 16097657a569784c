"""Training that is stopped and goes on is the training that was never stopped; logs and curves are what they say."""

import math

import pytest
import torch
from torch import nn

from lmm_sae_nb.pictureworld.__main__ import COURSES
from lmm_sae_nb.pictureworld.training_loop import attend, optimisers, pupil_weights, read_log, smooth, warm_then_cosine
from lmm_sae_nb.train import checkpoint

STEPS = 12


def pupil():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def course(folder, steps=STEPS, stop_at=None, log_every=2, **options):
    """Train a new pupil, or the one in the folder; `stop_at`: raise in that step, as an interrupt would."""
    student, seen = pupil(), []

    def loss_at(step):
        if step == stop_at:
            raise KeyboardInterrupt
        seen.append(step)
        numbers = torch.Generator().manual_seed(step)
        x = torch.randn(16, 4, generator=numbers)
        error = ((student(x) - x[:, :2].sin()) ** 2).mean()
        return {"loss": error, "double": 2 * error}

    done = attend(folder, steps, student, optimisers([student], 1e-2), loss_at, log_every=log_every, **options)
    return student, seen, done


def kept(folder):
    return checkpoint.load(folder / "checkpoint")


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_stopped_and_resumed_training_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    whole, seen, done = course(tmp_path / "whole")
    assert done and seen == list(range(STEPS))
    pieces, calls = [], 0
    while not done or calls == 0:
        parted, seen, done = course(tmp_path / "parted", minutes=0)  # one step, then out of time
        pieces += seen
        calls += 1
    assert pieces == list(range(STEPS)) and calls == STEPS
    assert same(whole.state_dict(), parted.state_dict())
    assert same(kept(tmp_path / "whole")._asdict(), kept(tmp_path / "parted")._asdict())
    assert not same(whole.state_dict(), pupil().state_dict())


def test_an_interrupted_training_goes_on_from_its_last_checkpoint(tmp_path):
    whole, _, _ = course(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        course(tmp_path / "parted", stop_at=8, save_every=0.0)
    assert kept(tmp_path / "parted").state["step"] == 8
    parted, seen, done = course(tmp_path / "parted")
    assert done and seen == [8, 9, 10, 11]
    assert same(whole.state_dict(), parted.state_dict())
    rows, pieces = read_log(tmp_path / "whole" / "log.jsonl"), read_log(tmp_path / "parted" / "log.jsonl")
    assert [row["step"] for row in pieces] == [2, 4, 6, 8, 10, 12]
    assert [(row["loss"], row["double"]) for row in pieces] == [(row["loss"], row["double"]) for row in rows]


def test_a_log_row_after_a_checkpoint_between_two_rows_is_the_mean_of_what_it_covers(tmp_path):
    whole = course(tmp_path / "whole", log_every=1) and read_log(tmp_path / "whole" / "log.jsonl")
    with pytest.raises(KeyboardInterrupt):
        course(tmp_path / "parted", stop_at=5, save_every=0.0, log_every=4)
    course(tmp_path / "parted", log_every=4)
    rows = read_log(tmp_path / "parted" / "log.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 12]
    covered = [range(4), range(5, 8), range(8, 12)]  # step 4 was summed in the run that was stopped
    for row, steps in zip(rows, covered, strict=True):
        assert row["loss"] == pytest.approx(sum(whole[step]["loss"] for step in steps) / len(steps), abs=2e-5)


def test_a_log_row_is_the_mean_since_the_last(tmp_path):
    course(tmp_path)
    student = pupil()
    opts = optimisers([student], 1e-2)
    losses = []
    for step in range(4):  # the same training written out
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        loss = ((student(x) - x[:, :2].sin()) ** 2).mean()
        losses.append(loss.item())
        for opt in opts:
            opt.param_groups[0]["lr"] = 1e-2 * (step + 1) / 100
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
    rows = read_log(tmp_path / "log.jsonl")
    assert rows[0]["loss"] == pytest.approx((losses[0] + losses[1]) / 2, abs=1e-5)
    assert rows[1]["loss"] == pytest.approx((losses[2] + losses[3]) / 2, abs=1e-5)
    assert rows[1]["double"] == pytest.approx(losses[2] + losses[3], abs=2e-5)


def test_a_checkpoint_cut_short_in_writing_leaves_the_one_before(tmp_path, monkeypatch):
    course(tmp_path, minutes=0)
    before = kept(tmp_path)

    def broken(state, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", broken)
        with pytest.raises(OSError, match="no space"):
            course(tmp_path, minutes=0)
    assert same(kept(tmp_path)._asdict(), before._asdict())
    _, seen, done = course(tmp_path)
    assert done and seen[0] == 1


@pytest.mark.parametrize("name", ["tensors.safetensors", "optimiser.pt", "state.json"])
def test_a_flipped_bit_in_a_checkpoint_is_found_and_the_file_named(tmp_path, name):
    course(tmp_path, minutes=0)
    (file,) = tmp_path.glob(f"checkpoint/1/{name}")
    data = bytearray(file.read_bytes())
    data[len(data) * 3 // 4] ^= 4
    file.write_bytes(data)
    with pytest.raises(ValueError, match=name):
        course(tmp_path)
    with pytest.raises(ValueError, match=name):
        pupil_weights(tmp_path, "a course")


def test_matrices_go_to_muon_and_the_rest_to_adamw():
    student = nn.ModuleDict({"embed_tokens": nn.Embedding(3, 4), "layer": nn.Linear(4, 4), "lm_head": nn.Linear(4, 3)})
    muon, adamw = optimisers([student], 1e-3)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(student["layer"].weight)]
    others = {id(p) for p in student.parameters()} - {id(student["layer"].weight)}
    assert {id(p) for p in adamw.param_groups[0]["params"]} == others


def test_the_rate_rises_falls_and_never_ends():
    rates = [warm_then_cosine(step, 1100) for step in range(1101)]
    assert rates[0] == 0.01 and rates[99] == rates[100] == 1.0
    assert rates[600] == pytest.approx(0.51) and rates[1100] == pytest.approx(0.02)
    assert rates[350] == pytest.approx(0.02 + 0.98 * (1 + math.sqrt(0.5)) / 2)
    assert all(a >= b for a, b in zip(rates[99:], rates[100:], strict=False))


def test_smooth_by_hand():
    rows = [
        {"step": 1, "loss": 4.0, "asked_x": 2.0, "exact_x": 1.0, "asked_y": 0.0, "exact_y": 0.0},
        {"step": 2, "loss": 2.0, "asked_x": 4.0, "exact_x": 2.0, "asked_y": 0.0, "exact_y": 0.0},
        {"step": 3, "loss": 1.0, "asked_x": 0.0, "exact_x": 0.0, "asked_y": 1.0, "exact_y": 1.0},
        {"step": 4, "loss": 0.0, "asked_x": 6.0, "exact_x": 6.0, "asked_y": 1.0, "exact_y": 0.0},
        {"step": 5, "loss": 7.0, "asked_x": 1.0, "exact_x": 0.0, "asked_y": 1.0, "exact_y": 0.0},
    ]
    first, second, third = smooth(rows, points=2)  # two rows each, and what is left over
    assert (first["step"], first["loss"], first["share_x"]) == (1.5, 3.0, 0.5)
    assert math.isnan(first["share_y"])
    assert (second["step"], second["share_x"], second["share_y"]) == (3.5, 1.0, 0.5)
    assert (third["step"], third["loss"], third["share_x"], third["share_y"]) == (5.0, 7.0, 0.0, 0.0)
    assert len(smooth(rows)) == 5 and smooth([]) == []


def test_logs_are_read_or_asked_for(tmp_path, root):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl is missing; it is written by the training"):
        read_log(tmp_path / "nowhere.jsonl")
    for log in (root / "data" / "models" / "tiny-llava-next").glob("*.jsonl"):
        rows = read_log(log)
        assert rows[0].keys() >= {"step", "seconds", "loss"}, log.name
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps)), log.name
        assert COURSES[log.stem][0] - steps[-1] < 20, f"{log.name} ends before its course"  # a row is 20 steps
