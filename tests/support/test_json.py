"""JSON from the disk: what is not whole or of another type is refused in one sentence with file, place and remedy."""

import json
from dataclasses import dataclass

import pytest

from lmm_sae_nb.interpret.explain import ExplanationRows, latents_in_training
from lmm_sae_nb.show.report import entry
from lmm_sae_nb.support import files
from lmm_sae_nb.support.concepts import read_concepts
from lmm_sae_nb.support.files import read_json
from lmm_sae_nb.support.intervals import Mean
from lmm_sae_nb.support.stages import Stage, read_manifest, read_typed


@dataclass
class Row:
    concept: str | None
    means: dict[int, Mean]


DAMAGED = {
    "empty": (b"", "it is empty"),
    "blank": (b" \n", "it is empty"),
    "cut short": (b'{"a": 1, "b', "Unterminated string|line 1 column"),
    "binary": (bytes(range(256)), "byte 128 is not UTF-8|line 1 column 1"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
    "latin-1": ('{"a": "é"}'.encode("latin-1"), "byte 7 is not UTF-8"),
    "two values": (b"{}{}", "Extra data"),
    "deep": (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
    "deep and whole": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "NaN": (b'{"a": NaN}', "NaN is no finite number"),
    "infinite": (b'{"a": -Infinity}', "-Infinity is no finite number"),
    "too large for a float": (b'{"a": 1e999}', "1e999 is no finite number"),
    "too large for an int": (b'{"a": ' + b"9" * 5000 + b"}", "limit"),
    "a name twice": (b'{"a": {"b": 1, "b": 2}}', "the name 'b' comes twice"),
}
OTHER_TYPES = {
    "true for 1": ('{"concept": "cat", "means": {"3": [true, 0, 1]}}', "at means.3.0: .*, not True"),
    "a text for a number": ('{"concept": "cat", "means": {"3": ["1", 0, 1]}}', "at means.3.0: .*, not '1'"),
    "a number for a text": ('{"concept": 7, "means": {}}', "at concept: .*valid string, not 7"),
    "a missing key": ('{"concept": null}', "at means: Field required"),
    "too few": ('{"concept": null, "means": {"3": [1, 2]}}', "at means.3.*: "),
    "another key": ('{"concept": null, "means": {"x": [1, 2, 3]}}', "at means.x.*, not 'x'"),
    "a list": ("[]", "not \\[\\]"),
    "a long value": (json.dumps({"concept": list(range(5000)), "means": {}}), "at concept"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_what_is_no_whole_json_is_refused_with_the_file_and_the_reason(tmp_path, how):
    data, why = DAMAGED[how]
    file = tmp_path / "metrics.json"
    file.write_bytes(data)
    for read in (read_json, lambda path: read_typed(path, dict)):
        with pytest.raises(
            ValueError, match=f"metrics.json is not whole JSON .*({why}).*; correct it, or delete it"
        ) as e:
            read(file)
        assert len(str(e.value)) < 400


@pytest.mark.parametrize("how", OTHER_TYPES)
def test_a_value_of_another_type_is_refused_with_its_place(tmp_path, how):
    text, why = OTHER_TYPES[how]
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"rows.json does not hold what this version writes there: .*{why}") as e:
        read_typed(file, Row)
    assert len(str(e.value)) < 400


def test_a_missing_file_a_folder_and_a_huge_file_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="rows.json is missing; run the notebook"):
        read_typed(tmp_path / "rows.json", Row)
    with pytest.raises(ValueError, match="is a folder"):
        read_json(tmp_path)
    (tmp_path / "huge.json").write_text("{}")
    monkeypatch.setattr(files, "LARGEST", 1)
    with pytest.raises(ValueError, match="huge.json has 0.0 GiB, more than"):
        read_json(tmp_path / "huge.json")


def test_a_value_that_was_written_comes_back_as_it_was(tmp_path):
    row = {"concept": "a \u2028 $ \U0001f600", "means": {"3": [1, 0.5, 2e300]}}
    files.write_json(tmp_path / "row.json", row)
    assert read_typed(tmp_path / "row.json", Row) == Row(row["concept"], {3: Mean(1, 0.5, 2e300)})
    assert read_json(tmp_path / "row.json") == row
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_typed(tmp_path / "bom.json", list[int]) == [1]


CONCEPTS = {
    "names that are no texts": ('{"object": ["cat", 7]}', "at object.1: .*string, not 7"),
    "no list": ('{"object": "cat"}', "at object: .*, not 'cat'"),
    "no object": ('["cat"]', "not .'cat'"),
    "no names": ('{"object": []}', "the kind 'object' has no names"),
    "an empty name": ('{"object": ["cat", " "]}', "or an empty one"),
}


@pytest.mark.parametrize("how", CONCEPTS)
def test_concepts_of_another_type_are_refused(tmp_path, how):
    text, why = CONCEPTS[how]
    (tmp_path / "concepts.json").write_text(text)
    with pytest.raises(ValueError, match=f"concepts.json.*{why}"):
        read_concepts(tmp_path / "concepts.json")
    with pytest.raises(FileNotFoundError, match="missing; render the data sets"):
        read_concepts(tmp_path / "none.json")


@pytest.mark.parametrize("row", [{"outcome": 3, "concept": "cat"}, {"outcome": "explained"}, {"concept": []}, []])
def test_a_row_of_explanations_without_its_texts_is_refused(tmp_path, row):
    (tmp_path / "explanations.json").write_text(json.dumps({"7": row}))
    with pytest.raises(ValueError, match="explanations.json does not hold .* at 7: "):
        read_typed(tmp_path / "explanations.json", ExplanationRows)


@pytest.mark.parametrize(
    "lesson", [{}, {"trained": {"params": {}}, "latents": [1]}, {"trained": None, "latents": [1.5]}]
)
def test_what_an_explainer_learned_from_is_refused_if_it_is_of_another_type(tmp_path, lesson):
    (tmp_path / "taught.json").write_text(json.dumps({"lessons": [lesson]}))
    (tmp_path / "manifest.json").write_text('{"params": {}, "inputs": {}}')
    with pytest.raises(ValueError, match="taught.json does not hold .* at lessons.0."):
        latents_in_training(tmp_path, tmp_path)


def test_a_manifest_of_another_version_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"params": [], "inputs": {}}')
    with pytest.raises(ValueError, match="manifest.json is no manifest of this version: params is "):
        read_manifest(tmp_path / "manifest.json")


@pytest.mark.parametrize("value", ['{"value": "0.2", "where": ""}', "0.2", "[]"])
def test_a_published_number_of_another_type_is_refused(tmp_path, monkeypatch, value):
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "book").mkdir()
    (tmp_path / "book/published.json").write_text(f'{{"score": {{"iou": {value}}}}}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="published.json does not hold .* at score.iou"):
        entry("published", "score", "iou")


@pytest.mark.parametrize("text", ['{"live": "0.5"}', '{"live": true}', '{"live": [1]}', "[]", "{"])
def test_metrics_that_are_no_numbers_are_refused(tmp_path, monkeypatch, text):
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    stage = Stage("tiny", "cache").begin({}, [])
    stage.finish({"live": 0.9})
    stage.path("metrics.json").write_text(text)
    with pytest.raises(ValueError, match="metrics.json .*; correct it, or delete it"):
        print(stage.metrics)
