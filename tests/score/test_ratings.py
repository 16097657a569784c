"""People's answers on disk: what stands after any history, cut lines, wrong lines, several people at once."""

import json
import multiprocessing

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from lmm_sae_nb.score import ratings
from lmm_sae_nb.score.ratings import (
    FIELDS,
    UNDONE,
    VERDICTS,
    append_rating,
    cohens_kappa,
    compare_raters,
    read_ratings,
    verdicts_by_rater,
)

PEOPLE = st.sampled_from(["Ann", "Bob ö"])
HISTORY = st.lists(st.tuples(PEOPLE, st.integers(0, 3), st.sampled_from([*VERDICTS, UNDONE])), max_size=12)


@settings(max_examples=30)
@given(history=HISTORY)
def test_the_last_answer_stands_unless_undone(tmp_path_factory, history):
    path = tmp_path_factory.mktemp("ratings") / "deep" / "answers.jsonl"
    for rater, latent, verdict in history:
        append_rating(path, rater, latent, "cat <b>", "object", verdict)
    expected = {}
    for rater, latent, verdict in history:
        expected[rater, latent] = verdict
    standing = {(row["rater"], row["latent"]): row["verdict"] for row in read_ratings(path)}
    assert standing == {key: verdict for key, verdict in expected.items() if verdict != UNDONE}
    lines = path.read_text(encoding="utf-8").splitlines() if history else []
    assert len(lines) == len(history)  # nothing that was said is ever lost
    assert all(tuple(json.loads(line)) == FIELDS for line in lines)


@pytest.mark.parametrize("torn", ['{"rater": "An', "x" * 9000])
def test_a_line_that_a_crash_cut_short_does_not_count_and_is_removed(tmp_path, torn):
    path = tmp_path / "answers.jsonl"
    append_rating(path, "Ann", 1, "cat", None, "yes")
    with path.open("a") as file:
        file.write(torn)
    assert [row["latent"] for row in read_ratings(path)] == [1]
    append_rating(path, "Ann", 2, "dog", None, "no")
    assert [row["latent"] for row in read_ratings(path)] == [1, 2]
    assert len(path.read_text().splitlines()) == 2


def test_another_concept_of_the_same_latent_is_another_question(tmp_path):
    path = tmp_path / "answers.jsonl"
    append_rating(path, "Ann", 1, "cat", None, "yes")
    append_rating(path, "Ann", 1, "dog", None, "no")
    assert [(row["concept"], row["verdict"]) for row in read_ratings(path)] == [("cat", "yes"), ("dog", "no")]


@pytest.mark.parametrize(
    "line",
    [
        b"not json", b"[1]", b'{"rater": "Ann"}', b"\xff\xfe", b"[" * 20_000, b"null",
        b'{"rater": "A", "latent": true, "concept": "c", "kind": null, "verdict": "yes", "time": ""}',
        b'{"rater": "A", "latent": 1, "concept": "c", "kind": null, "verdict": ["yes"], "time": ""}',
    ],
    ids=["text", "list", "no fields", "not utf-8", "deep", "null", "latent true", "list of verdicts"],
)  # fmt: skip
def test_a_line_that_is_no_answer_is_named_and_the_others_count(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    append_rating(path, "Ann", 1, "cat", None, "yes")
    with path.open("ab") as file:
        file.write(line + b"\n")
    append_rating(path, "Ann", 2, "dog", None, "no")
    with pytest.warns(UserWarning, match="answers.jsonl: 1 lines are no answers and do not count: 2; an answer has"):
        assert [row["latent"] for row in read_ratings(path)] == [1, 2]


def test_a_last_answer_that_lacks_only_its_end_counts_and_stays(tmp_path):
    path = tmp_path / "answers.jsonl"
    append_rating(path, "Ann", 1, "cat", None, "yes")
    append_rating(path, "Ann", 2, "dog", None, "no")
    path.write_bytes(path.read_bytes()[:-1])
    assert [row["latent"] for row in read_ratings(path)] == [1, 2]
    append_rating(path, "Ann", 3, "bee", None, "no")
    assert [row["latent"] for row in read_ratings(path)] == [1, 2, 3]


def test_a_name_that_cannot_be_written_is_made_writable(tmp_path):
    path = tmp_path / "answers.jsonl"
    row = append_rating(path, "Ann\ud83d", 1, "cat\x00", None, "yes")
    assert (row["rater"], row["concept"]) == ("Ann\ufffd", "cat\ufffd") and read_ratings(path) == [row]


def test_wrong_answers_are_refused_and_leave_no_trace(tmp_path):
    path = tmp_path / "answers.jsonl"
    with pytest.raises(ValueError, match="'perhaps' is no verdict; choose one of yes, no, unsure"):
        append_rating(path, "Ann", 1, "cat", None, "perhaps")
    with pytest.raises(ValueError, match="needs the name"):
        append_rating(path, "  ", 1, "cat", None, "yes")
    assert not path.exists() and read_ratings(path) == []


def _answer_many(path, rater):
    for latent in range(40):
        append_rating(path, rater, latent, "cat" * 50, None, "yes")


def test_people_who_answer_at_once_lose_nothing(tmp_path):
    path = tmp_path / "answers.jsonl"
    context = multiprocessing.get_context("spawn")
    people = [context.Process(target=_answer_many, args=(path, name)) for name in ("Ann", "Bob", "Cy")]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert [person.exitcode for person in people] == [0, 0, 0]
    assert len(read_ratings(path)) == 120


def test_what_another_is_just_writing_is_not_taken_for_a_crash(tmp_path, monkeypatch):
    """An answer waits for whoever is at half a line, says so when it waited long, and leaves that line."""
    path = tmp_path / "answers.jsonl"
    append_rating(path, "Ann", 1, "cat", None, "yes")
    monkeypatch.setattr(ratings, "PATIENCE", 0.05)
    with FileLock(tmp_path / ".answers.jsonl.lock"):
        with path.open("a") as file:
            file.write('{"rater": "Bob"')
        with pytest.raises(OSError, match="your rating was not saved"):
            append_rating(path, "Cy", 1, "cat", None, "no")
        assert path.read_text().endswith('{"rater": "Bob"')
    append_rating(path, "Cy", 1, "cat", None, "no")
    assert [row["rater"] for row in read_ratings(path)] == ["Ann", "Cy"]


def test_kappa_of_a_hand_worked_case():
    """50 items: both yes 20, both no 15, 5 and 10 differ. p = 0.70, c = 0.5 * 0.6 + 0.5 * 0.4 = 0.50, kappa 0.40."""
    one = ["yes"] * 25 + ["no"] * 25
    two = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohens_kappa(one, two) == pytest.approx(0.4)
    assert cohens_kappa(two, one) == pytest.approx(0.4)
    assert cohens_kappa(["yes", "no", "unsure"], ["yes", "no", "unsure"]) == 1
    assert cohens_kappa(["yes", "no"], ["no", "yes"]) == -1
    assert cohens_kappa(["yes", "yes"], ["yes", "yes"]) is None
    for one, two in (([], []), (["yes"], [])):
        with pytest.raises(ValueError, match="at least one"):
            cohens_kappa(one, two)


def test_raters_are_compared_on_what_both_have_rated():
    verdicts = {"b": {1: "yes", 2: "no", 9: "no"}, "a": {1: "yes", 2: "yes"}, "c": {7: "no"}}
    (found,) = compare_raters(verdicts)
    assert found == (("a", "b"), 2, 0.5, 0.0)


def test_only_answers_on_todays_explanations_count():
    answers = [
        {"rater": "a", "latent": 1, "concept": "cat", "verdict": "yes"},
        {"rater": "a", "latent": 2, "concept": "dog", "verdict": "no"},  # its concept is another one now
        {"rater": "b", "latent": 1, "concept": "cat", "verdict": "unsure"},
        {"rater": "b", "latent": 9, "concept": "cat", "verdict": "no"},
    ]
    assert verdicts_by_rater(answers, {1: "cat", 2: "bee"}) == {"a": {1: "yes"}, "b": {1: "unsure"}}
