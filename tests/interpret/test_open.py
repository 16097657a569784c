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


@pytest.mark.parametrize("settings", [{"model": "m"}, {"prompt": "?"}, {"model": "m", "prompt": "?", "least_sure": 1}])
def test_a_setting_that_is_missing_or_that_nobody_reads_is_refused(settings, tmp_path):
    with pytest.raises(ValueError, match="the explainer's settings are .*; give model and prompt"):
        open_interpreter(settings, "", "", ENDPOINT, concepts="", replies=tmp_path / "r.jsonl")
