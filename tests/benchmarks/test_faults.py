"""The fault campaign: it finds what is wrong, ends what hangs, goes on after a stop; the committed counts are whole."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from lmm_sae_nb.benchmarks import faults, faults_files
from lmm_sae_nb.benchmarks.faults_endings import (
    FAILED,
    SURVIVED,
    Attempted,
    Ending,
    campaign_metrics,
    commits,
    compare,
    endings_by_group,
    failure_rows,
    kind_rows,
    summary,
)
from lmm_sae_nb.benchmarks.faults_world import make_world
from lmm_sae_nb.support.files import read_json

QUICK = [kind for kind in faults.KINDS if kind not in ("kill, page", "endpoint") and "disk" not in kind]


@pytest.fixture(scope="module")
def world(lmm, root, tmp_path_factory):
    here = os.getcwd()
    made = make_world(tmp_path_factory.mktemp("faults") / "world", lmm, root)
    os.chdir(here)
    return made


@pytest.fixture(autouse=True)
def _at_home(root, unchecked):
    yield
    os.chdir(root)


@pytest.mark.slow
def test_a_campaign_survives_what_it_did_when_the_counts_were_made_and_is_not_made_twice(world, root, tmp_path):
    command = f"-m lmm_sae_nb.benchmarks faults --tries 1 --jobs 1 --work {tmp_path} --out {tmp_path / 'faults.json'}"
    subprocess.run([sys.executable, *command.split(), "--kinds", *QUICK], cwd=root, check=False, timeout=300)
    record, code = tmp_path / "record.jsonl", faults.code_hash(root)
    made = faults.read_record(record, code)
    assert {each.kind for each in made} == set(QUICK) == read_json(tmp_path / "faults.json")["kinds"].keys()
    failed = {each.kind: each for each in made if each.ending in FAILED}
    known = {kind for kind, row in read_json(root / "book" / "faults.json")["kinds"].items() if row["failures"]}
    assert failed.keys() <= known, failed
    with record.open("a") as lines:
        lines.write('{"kind": "cut sh')
    assert faults.run(world, dict.fromkeys(QUICK, 1), record, code=code) == made
    assert faults.read_record(record, "other code") == []


def test_an_attempt_that_hangs_or_dies_is_a_failure_and_the_others_go_on(world, tmp_path, monkeypatch):
    attempts = {
        "hang": lambda world, place, seed: time.sleep(60),
        "die": lambda world, place, seed: os._exit(3),
        "break": lambda world, place, seed: 1 / 0,
        "work": lambda world, place, seed: Ending("nothing", "as usual"),
    }
    kinds = {name: faults.Kind(attempt, 1, name) for name, attempt in attempts.items()}
    monkeypatch.setattr(faults, "KINDS", kinds)
    monkeypatch.setattr(faults, "PATIENCE", 0.3)
    made = faults.run(world, dict.fromkeys(kinds, 1), tmp_path / "record.jsonl", code="now", jobs=2)
    endings = {each.kind: each.ending for each in made}
    assert endings == {"hang": "hang", "die": "died", "break": "campaign broken", "work": "as usual"}


@pytest.mark.parametrize(
    ("read", "ending"),
    [
        (lambda project: [], "another result"),
        (lambda project: json.loads("{"), "raw error"),
        (lambda project: {}["a"], "raw error"),
        (lambda project: read_json(project / "concepts.json"), "clear error"),
    ],
)
def test_a_reader_that_is_wrong_is_found(world, tmp_path, read, ending):
    """Half a file, which no reader can make good."""
    (project := tmp_path / "project").mkdir()
    (project / "concepts.json").write_bytes((world.folder / "concepts.json").read_bytes()[:60])
    assert faults_files.READS["concepts"].valid(world, project / "concepts.json") == (False, None)
    assert compare("", lambda: read(project), None, ["concepts.json"]).ending == ending


def test_counts_add_up_and_failures_are_kept_with_their_reason():
    def attempted(kind, seed, ending, reason=""):
        return Attempted(kind, seed, f"case {seed}", ending, reason, 0.5, "now")

    made = [attempted("kill, a", 0, "as usual"), attempted("kill, a", 1, "leftovers", "x.tmp")]
    made += [attempted("kill, b", 0, "clear error"), attempted("disk", 0, "not possible", "no root")]
    found = summary(made, {"kill, a": "A", "kill, b": "B", "disk": "C"}, "abc", {"date": "today"})
    assert [(row["tried"], row["survived"]) for row in kind_rows(found)] == [(2, 1), (1, 1), (0, 0)]
    assert failure_rows(found) == [{"fault": "kill, a", "case": "case 1", "ending": "leftovers", "reason": "x.tmp"}]
    assert found["kinds"]["disk"]["not_possible"] == "no root"
    assert commits(found) == ["abc"]
    assert endings_by_group(found) == {"kill": {"as usual": 1 / 3, "clear error": 1 / 3, "not survived": 1 / 3}}
    assert campaign_metrics(found) == {
        "faults_tried": 3, "faults_failed": 1, "faults_kill_tried": 3, "faults_kill_failed": 1,
        "faults_disk_tried": 0, "faults_disk_failed": 0,
    }  # fmt: skip


def test_reasons_of_failures_name_no_folder_of_a_machine():
    reason = "No file '/tmp/a b/c/cache.json' in /one/two/; http://127.0.0.1:80/v1/models gave 3/4"
    found = summary([Attempted("a", 0, "", "leftovers", reason, 1.0, "now")], {"a": "A"}, "abc", {})
    (row,) = failure_rows(found)
    assert row["reason"] == "No file 'cache.json' in ; http://127.0.0.1:80/v1/models gave 3/4"


def test_the_committed_counts_have_every_kind_and_pages_say_nothing_else(root):
    committed = read_json(root / "book" / "faults.json")
    assert committed["kinds"].keys() == faults.KINDS.keys()
    assert len(commits(committed)) == 1  # all kinds were tried on the same code
    for kind, row in committed["kinds"].items():
        assert row["meaning"] == faults.KINDS[kind].meaning
        assert row["tried"] >= 3 or "not_possible" in row, kind
        assert sum(row["endings"].values()) == row["tried"], kind
        assert row["endings"].keys() <= SURVIVED.keys() | FAILED.keys()
        failed = sum(row["endings"].get(ending, 0) for ending in FAILED)
        assert row["tried"] - row["survived"] == failed and min(failed, 1) <= len(row["failures"]) <= failed, kind
        assert all(failure["reason"] for failure in row["failures"]), kind
    texts = [file.read_text() for file in (root / "README.md", root / "notebooks" / "A2_benchmarks.py")]
    numbers = {int(n.replace(",", "")) for text in texts for n in re.findall(r"([\d,]*\d) faults", text)}
    assert numbers <= set(campaign_metrics(committed).values())
