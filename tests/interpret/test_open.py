"""The three models of a page are opened from grouped parameters, each when it is first asked."""

import pytest
from PIL import Image

from lmm_sae_nb.benchmarks.faulty_server import serving
from lmm_sae_nb.interpret.exemplars import Exemplar
from lmm_sae_nb.interpret.explainers import Outcome
from lmm_sae_nb.interpret.open import open_interpreter

ENDPOINT = {"key_variable": "", "concurrency": 2, "timeout": 5.0}


def by_latent(*latents: int) -> dict[int, list[Exemplar]]:
    return {n: [Exemplar(0, Image.new("RGB", (4, 4), (n, 0, 0)), None, None)] for n in latents}


def test_explainer_refiner_and_labeller_each_answer_their_own_question(tmp_path):
    def answer(request):
        if request.images:
            return "[E]: an animal with whiskers"
        return "Cat." if "whiskers" in request.text and "Description" in request.text else "object"

    with serving(answer) as server:
        explainer, text = f"eye@{server.url}", f"tongue@{server.url}"
        settings = {"model": explainer, "prompt": "in common ?", "tag": "[E]:"}
        interpreter = open_interpreter(settings, text, text, ENDPOINT, concepts="", replies=tmp_path / "r.jsonl")
        assert interpreter.models == {"explainer": explainer, "refiner": text, "labeller": text}
        assert not server.requests
        [row] = interpreter.explain(by_latent(7)).values()
        assert (row.outcome, row.concept, row.kind) == (Outcome.EXPLAINED, "cat", "object")
        assert [bool(request.images) for request in server.requests] == [True, False, False]
        again = open_interpreter(settings, text, text, ENDPOINT, concepts="", replies=tmp_path / "r.jsonl")
        assert again.explain(by_latent(7)) == {7: row} and len(server.requests) == 3


def test_without_refiner_and_labeller_the_vocabulary_does_their_work_or_nobody(tmp_path):
    (tmp_path / "concepts.json").write_text('{"animal": ["cat"]}')
    with serving(lambda request: "A cat.") as server:
        settings = {"model": f"eye@{server.url}", "prompt": "?"}
        results = []
        for concepts, who in (("", "nobody"), (str(tmp_path / "concepts.json"), "the vocabulary")):
            interpreter = open_interpreter(settings, "", "", ENDPOINT, concepts=concepts, replies=tmp_path / "r.jsonl")
            assert interpreter.models["refiner"] == interpreter.models["labeller"] == who
            [row] = interpreter.explain_enough(by_latent(1, 2, 3), [1, 2, 3], 1, at_once=1).values()
            results.append((row.concept, row.kind))
        assert results == [("a cat", None), ("cat", "animal")]


def test_failed_questions_are_counted_over_all_models(tmp_path):
    with serving(lambda request: "a cat" if request.images else 422) as server:
        settings = {"model": f"eye@{server.url}", "prompt": "?"}
        interpreter = open_interpreter(
            settings, f"tongue@{server.url}", "", ENDPOINT, concepts="", replies=tmp_path / "r.jsonl"
        )
        assert interpreter.failed == 0
        [row] = interpreter.explain(by_latent(1)).values()
        assert row.outcome is Outcome.FAILED and interpreter.failed == 1
        assert (interpreter.counts["replies_failed"], interpreter.counts["replies_refused"]) == (1, 1)


def test_a_page_of_a_model_that_thinks_counts_thoughts_and_what_was_only_reasoned(tmp_path):
    faults = {1: "thought that refuses", 2: "only reasoned", 3: "not utf-8", 4: "cut short"}
    asked: list[int] = []

    def choose(request):
        asked.append(request.images[0])
        return faults[len(dict.fromkeys(asked))]

    with serving(lambda request: "a cat", choose=choose) as server:
        settings = {"model": f"eye@{server.url}", "prompt": "?"}
        one_by_one = ENDPOINT | {"concurrency": 1}
        for _ in "12":  # the second from the record
            interpreter = open_interpreter(settings, "", "", one_by_one, concepts="", replies=tmp_path / "r.jsonl")
            rows = interpreter.explain(by_latent(1, 2, 3, 4))
            assert [(row.outcome, row.concept) for row in rows.values()] == [
                (Outcome.EXPLAINED, "a cat"), (Outcome.FAILED, None), (Outcome.EXPLAINED, "a cat\ufffd\ufffd"),
                (Outcome.UNPARSEABLE, None),
            ]  # fmt: skip
            assert rows[2].answer.startswith("no answer, the model only reasoned") and rows[1].answer == "a cat"
            counted = {name.removeprefix("replies_"): count for name, count in interpreter.counts.items() if count}
            assert counted == {
                "only_reasoned": 1, "asked_again": 1, "cut": 1, "with_thoughts": 1, "replaced_characters": 2,
            }  # fmt: skip
            asked, faults = [], {1: "only reasoned"}  # the others are on record


@pytest.mark.parametrize("settings", [{"model": "m"}, {"prompt": "?"}, {"model": "m", "prompt": "?", "least_sure": 1}])
def test_a_setting_that_is_missing_or_that_nobody_reads_is_refused(settings, tmp_path):
    with pytest.raises(ValueError, match="the explainer's settings are .*; give model and prompt"):
        open_interpreter(settings, "", "", ENDPOINT, concepts="", replies=tmp_path / "r.jsonl")
