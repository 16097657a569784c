"""Files are old or new, never half-written; tensor files are refused unless whole."""

import binascii
import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import torch
from datasets import Dataset
from forks import started
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lmm_sae_nb.support import files, tensor_files


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


def test_a_fingerprint_follows_links_and_sees_every_change_of_content(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
    (outside / "a").write_text("1")
    (inside / "link").symlink_to(outside, target_is_directory=True)
    (outside / "loop").symlink_to(inside, target_is_directory=True)
    (inside / os.fsdecode(b"no text \xff")).write_text("name")
    assert [file.name for file in files.files_below(inside)] == ["a", os.fsdecode(b"no text \xff")]
    seen = {files.fingerprint(inside)}
    for text in ("2", "3", "1"):  # of one length, within one tick of the file system's clock
        (outside / "a").write_text(text)
        seen.add(files.fingerprint(inside))
    assert len(seen) == 3


def test_a_file_is_hashed_once_in_a_process_unless_it_changes(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_text("1")
    monkeypatch.setattr(files, "SETTLED", -1)  # as if it had been written long ago
    first = files.fingerprint(file)
    monkeypatch.setattr(files, "_FINGERPRINTS", dict.fromkeys(files._FINGERPRINTS, "kept"))
    assert files.fingerprint(file) == "kept"
    file.write_text("12")
    assert files.fingerprint(file) not in ("kept", first)


def test_project_root_is_the_nearest_parent_with_pyproject(project):
    assert files.project_root().samefile(project)


def test_project_root_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files.Path, "is_file", lambda self: False)
    with pytest.raises(FileNotFoundError, match="pyproject.toml"):
        files.project_root()


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "a.bin"
    files.write_atomic(path, b"old")
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [file.name for file in path.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_crash_while_writing_keeps_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def crash(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os if broken == "fsync" else files.Path, broken, crash)
    with pytest.raises(OSError, match="no space"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_written_files_obey_the_umask(tmp_path):
    plain, atomic = tmp_path / "plain", tmp_path / "atomic"
    plain.write_bytes(b"")
    files.write_atomic(atomic, b"")
    assert atomic.stat().st_mode == plain.stat().st_mode


keys = st.text().filter(lambda key: key != files.CHECKSUM)  # a checksum that is wrong is refused
json_values = st.dictionaries(keys, st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text())


@settings(deadline=None)
@given(json_values)
def test_json_round_trip(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    files.write_json(path, value)
    assert files.read_json(path) == value


def test_json_refuses_nan_and_objects(tmp_path):
    for value in ({"fvu": float("nan")}, {"model": object()}):
        with pytest.raises(ValueError, match="a.json"):
            files.write_json(tmp_path / "a.json", value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ['{"a": 1', "[1]", "\udcff"])
def test_read_json_names_a_broken_file(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="a.json"):
        files.read_json(tmp_path / "a.json")


def test_save_tensors_round_trip_with_views_and_metadata(tmp_path):
    tensors = {"view": torch.arange(6.0).reshape(2, 3).T, "ids": torch.tensor([3, 1])}
    tensor_files.save_tensors(tmp_path / "a.safetensors", tensors, {"made": "here"})
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert tensor_files.metadata_in(tensor_files.open_tensors(tmp_path / "a.safetensors")) == {"made": "here"}


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
def test_a_broken_tensor_file_is_named(tmp_path, cut):
    path = tmp_path / "a.safetensors"
    tensor_files.save_tensors(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a\.safetensors is not a whole"):
        tensor_files.open_tensors(path)
    with pytest.raises(FileNotFoundError, match="b.safetensors"):
        tensor_files.open_tensors(tmp_path / "b.safetensors")


def test_replace_folder(tmp_path):
    for name, text in (("final", "old"), ("new", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(text)
    (tmp_path / "final" / "only-old").touch()
    files.replace_folder(tmp_path / "new", tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["a"]
    assert (tmp_path / "final" / "a").read_text() == "new"


@pytest.mark.parametrize("call", range(1, 20))
def test_a_replacement_killed_at_any_moment_leaves_one_of_the_two_folders(tmp_path, monkeypatch, call):
    """Path.replace, fsync and rmtree in turn end the process: what comes after them is left undone."""
    test_replace_folder(tmp_path)
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "a").write_text("newer")
    calls = itertools.count(1)

    def until_killed(function):
        def wrapped(*args, **kwargs):
            if next(calls) == call:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "replace", until_killed(files.Path.replace))
        patch.setattr(os, "fsync", until_killed(os.fsync))
        patch.setattr(files.shutil, "rmtree", until_killed(files.shutil.rmtree))
        with contextlib.suppress(KeyboardInterrupt):
            files.replace_folder(tmp_path / "newer", tmp_path / "final")
    files.recover_folder(tmp_path / "final")
    assert (tmp_path / "final" / "a").read_text() in ("new", "newer")
    assert {path.name for path in tmp_path.iterdir()} <= {"final", "newer"}
    if (tmp_path / "newer").exists():
        files.replace_folder(tmp_path / "newer", tmp_path / "final")
    assert (tmp_path / "final" / "a").read_text() == "newer"


def test_files_of_killed_writers_are_cleared_and_those_of_the_user_stay(tmp_path):
    written = files.temporary_name
    written(tmp_path / "a.json").touch()
    written(tmp_path / "3").mkdir()
    (next(tmp_path.glob(".3.*")) / "half").touch()
    users = {".notes.tmp", ".a.json.0.tmp", ".tmpAb12Cd", "a.tmp", "below"}
    for name in users - {"below"}:
        (tmp_path / name).touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / ".mine.tmp").touch()
    written(tmp_path / "below" / "b.json").touch()
    files.clear_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == users
    assert len([*(tmp_path / "below").iterdir()]) == 2
    files.clear_temporaries(tmp_path, deep=True)
    assert [path.name for path in (tmp_path / "below").iterdir()] == [".mine.tmp"]


def _die_while_saving(folder):
    """Save until a file appears in the folder, and be killed then."""

    def watch():
        while not any(folder.iterdir()):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch).start()
    while True:
        tensor_files.save_tensors(folder / "a.safetensors", {"a": torch.zeros(2_000_000)})


def test_files_of_a_killed_save_are_cleared(tmp_path):
    for turn in range(3):
        folder = tmp_path / str(turn)
        folder.mkdir()
        process, _ = started(_die_while_saving, folder)
        process.join()
        assert process.exitcode == -signal.SIGKILL and any(folder.iterdir())
        files.clear_temporaries(folder)
        assert {path.name for path in folder.iterdir()} <= {"a.safetensors"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_hash_of_tensors_is_that_of_their_bytes_in_order(dtype):
    tensors = [torch.arange(2**22 + 5), torch.randn(70, 3), torch.randn(4, 5).T, torch.tensor(1)]
    tensors = [tensor.to(dtype) for tensor in tensors]
    as_bytes = b"".join(t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in tensors)
    assert tensor_files.hash_of(iter(tensors)) == hashlib.sha256(as_bytes).hexdigest()
    assert tensor_files.hash_of(tensors[::-1]) != tensor_files.hash_of(tensors)


def test_fingerprint_of_a_file_is_its_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    expected = hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert files.fingerprint(tmp_path / "a") == expected
    with (tmp_path / "a").open("rb") as file:
        assert files._digest(file) == expected


def test_a_large_saved_data_set_is_not_read_and_another_one_is_noticed(tmp_path, monkeypatch):
    def saved(name, rows):
        Dataset.from_list(rows).save_to_disk(tmp_path / name)
        return tmp_path / name

    one, other = saved("one", [{"a": 1}, {"a": 2}]), saved("other", [{"a": 1}, {"a": 3}])
    whole = [files.fingerprint(folder) for folder in (one, other)]
    monkeypatch.setattr(files, "LARGE", 0)
    read = []
    monkeypatch.setattr(files, "_file_fingerprint", lambda file: read.append(file.name) or file.read_text())
    known = [files.fingerprint(folder) for folder in (one, other)]
    assert len({*whole, *known}) == 4 and set(read) == {"state.json", "dataset_info.json"}
    (shard,) = one.glob("*.arrow")
    shard.write_bytes(shard.read_bytes() + b"0")
    assert files.fingerprint(one) not in known
    (other / "more.json").write_text("{}")
    assert files.fingerprint(other) not in known


def test_fingerprint_of_a_folder_sees_names_and_contents(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a").write_text("1")
    seen = {files.fingerprint(folder)}
    (folder / "a").write_text("2")
    seen.add(files.fingerprint(folder))
    (folder / "a").rename(folder / "b")
    seen.add(files.fingerprint(folder))
    assert len(seen) == 3


# Damage.


@pytest.mark.parametrize("rows", [False, True])
def test_flipped_bits_of_a_tensor_file_are_found(tmp_path, rows):
    """In its header, its numbers, its checksum; only a bit in the checksum's name is harmless, and changes nothing."""
    path = tmp_path / "a.safetensors"
    if rows:
        tensor_files.save_rows(path, {"a": (np.dtype("f4"), (3, 2))}, [("a", 1, np.ones((2, 2)))])
    else:
        tensor_files.save_tensors(path, {"a": torch.ones(3, 2), "b": torch.tensor(7, dtype=torch.bfloat16)}, {"k": "3"})
    whole, read = path.read_bytes(), load_file(path)
    accepted = []
    for bit in range(0, 8 * len(whole), 5):  # every bit of a byte in turn
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with contextlib.suppress(ValueError):
            tensor_files.open_tensors(path)
            accepted.append(bit // 8)
            assert all(torch.equal(tensor, read[name]) for name, tensor in load_file(path).items())
    name = whole.index(b'"crc32": "')
    assert set(accepted) <= set(range(name, name + 10))


def test_a_damaged_tensor_file_is_named_and_a_whole_one_is_read_once(tmp_path, monkeypatch):
    path, calls = tmp_path / "a.safetensors", []
    crc = tensor_files.crc_of
    monkeypatch.setattr(tensor_files, "crc_of", lambda *args: calls.append(args) or crc(*args))
    tensor_files.save_tensors(path, {"a": torch.ones(100)})
    for _ in range(3):
        tensor_files.open_tensors(path)
    assert len(calls) == 1
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged: its checksum .* make it again"):
        tensor_files.open_tensors(path)


def test_a_checksum_is_the_crc_32_of_the_bytes(tmp_path):
    data = np.random.default_rng(0).bytes(3 * files.BLOCK + 5)
    (tmp_path / "a").write_bytes(data)
    assert int(files.checksum(tmp_path / "a"), 16) == binascii.crc32(data)


@pytest.mark.parametrize("change", [{"step": 20}, {"position": {}}, {"more": 1}, {"text": "é"}])
def test_a_json_object_with_a_checksum_that_was_changed_is_refused(tmp_path, change):
    value = {"step": 3, "position": {"block": 2}, "rate": 1e-30, "text": "ü", "rows": [0.1, (1, None)], 5: True}
    files.write_json(tmp_path / "a.json", value, checked=True)
    assert files.read_json(tmp_path / "a.json") == json.loads(json.dumps(value))
    changed = json.loads((tmp_path / "a.json").read_text()) | change
    (tmp_path / "a.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"a\.json was changed or damaged"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_is_named_with_the_bytes_that_are_needed_and_free(tmp_path, monkeypatch, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=21_500_000))
    with pytest.raises(OSError, match=r"a\.json cannot .*: it needs up to 15 bytes, 21.5 MB are free") as error:
        files.write_json(tmp_path / "a.json", {"a": 123})
    assert error.value.errno == number
    with pytest.raises(OSError, match=r"b\.safetensors cannot be written .*: it needs up to 4\.\d+ kB, 21.5 MB"):
        tensor_files.save_tensors(tmp_path / "b.safetensors", {"a": torch.ones(1000)})
    assert not list(tmp_path.iterdir())


def test_bytes_in_units():
    sizes = (0, 999, 1000, 999_499, 999_600, 4_290_000_000, 3e15)
    assert [files.in_units(n) for n in sizes] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "999 kB",
        "1 MB",
        "4.29 GB",
        "3e+03 TB",
    ]


# Tensor files, written piece by piece and read lazily.

LAYOUTS = st.dictionaries(
    st.sampled_from("abcde"),
    st.tuples(st.sampled_from(["f2", "f4", "i4", "i8", "u2"]), st.lists(st.integers(0, 5), min_size=1, max_size=3)),
    max_size=4,
)


@settings(deadline=None, max_examples=60)
@given(layout=LAYOUTS, data=st.data())
def test_a_file_written_in_pieces_is_what_safetensors_reads(tmp_path_factory, layout, data):
    path = tmp_path_factory.mktemp("rows") / "a.safetensors"
    arrays = {name: np.arange(math.prod(shape)).astype(kind).reshape(shape) for name, (kind, shape) in layout.items()}
    pieces = []
    for name, array in arrays.items():
        cut = data.draw(st.integers(0, len(array)))
        pieces += [(name, 0, array[:cut]), (name, cut, array[cut:])]
    shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    tensor_files.save_rows(path, shapes, data.draw(st.permutations(pieces)), {"said": "x"})
    read = safetensors.numpy.load_file(path)
    with tensor_files.open_tensors(path) as file:
        assert tensor_files.metadata_in(file) == {"said": "x"}
        assert tensor_files.shapes_in(file) == {name: array.shape for name, array in arrays.items()}
    assert read.keys() == arrays.keys()
    for name, array in tensor_files.read_arrays(path).items():
        np.testing.assert_array_equal(read[name], arrays[name])
        np.testing.assert_array_equal(array, arrays[name])


def test_a_missing_cut_or_foreign_tensor_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        tensor_files.open_tensors(tmp_path / "a.safetensors")
    safetensors.numpy.save_file({"a": np.arange(9)}, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for cut in range(len(whole)):
        (tmp_path / "a.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="a.safetensors"):
            tensor_files.open_tensors(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"no tensors at all, but long enough")
    with pytest.raises(ValueError, match="a.safetensors is not a whole safetensors file"):
        tensor_files.open_tensors(tmp_path / "a.safetensors")
