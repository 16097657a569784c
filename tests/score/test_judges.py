"""Judges of explanations, and Table 2 against Wilson's formula."""

import base64
import io
import math

import numpy as np
import pytest
from PIL import Image
from scored import CONCEPTS, corner, exemplar, label_maps

from lmm_sae_nb.benchmarks.faulty_server import serving
from lmm_sae_nb.chat.replies import Reply
from lmm_sae_nb.score.judges import (
    Judgement,
    OpenJudge,
    consistency,
    judge_latents,
    judge_metrics,
    model_judge,
    table_2,
    truth_judge,
)
from lmm_sae_nb.score.scores import Explained
from lmm_sae_nb.truth.label_maps import LabelMaps


class Answering:
    """A chat that answers each question with a function of it, the last first, and remembers what it heard."""

    name = identity = "answering"

    def __init__(self, answer):
        self.answer, self.heard = answer, []

    def __call__(self, questions):
        for number, question in reversed(list(enumerate(questions))):
            self.heard.insert(0, question)
            yield number, self.answer(question)


def test_a_model_judge_sees_masked_images_and_says_yes_no_or_unsure():
    replies = {
        7: Reply("Yes, it is."), 1: Reply("no"), 3: Reply("I am unsure"), 4: Reply(None, "down"),
        5: Reply("yes and no"), 6: Reply(None, "too large", refused=True),
    }  # fmt: skip
    chat = Answering(lambda question: replies[question.images[0].getpixel((0, 0))[0]])
    shown = [[exemplar(0, corner(1, 2), colour=(n, 0, 0))] * 2 for n in replies]
    verdicts = model_judge(chat)(shown, ["a hat"] * len(shown))
    assert verdicts == ["yes", "no", "unsure", "failed", None, None]
    *images, text = chat.heard[0].parts()
    assert images == [each.masked for each in shown[0]] and '"a hat"' in text


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("sets", "concepts"), [([[]], ["a"]), ([[1]], ["a", "b"])])
def test_a_judge_without_images_or_concept_is_an_error(sets, concepts):
    with pytest.raises(ValueError, match="give each concept its images"):
        model_judge(Answering(None))(sets, concepts)


def test_the_ground_truth_judges_what_it_knows():
    cat, dog = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    cat[:4, :4], dog[:4, :4] = 1, 2
    truth = LabelMaps([label_maps(object=cat), label_maps(object=dog)], CONCEPTS)
    shown = [exemplar(0, corner(2, 2))]
    assert truth_judge(truth)([shown] * 3, ["cat", "dog", "unicorn"]) == ["yes", "no", None]
    assert OpenJudge("", truth, {}, replies="unused")([shown], ["cat"]) == ["yes"]
    with pytest.raises(ValueError, match="nobody to judge"):
        OpenJudge("", None, {}, replies="unused")


def test_as_many_latents_of_each_kind_are_judged_on_both_names():
    explained = {n: Explained("cat" if n % 2 else "dog", "object" if n < 8 else "colour") for n in range(10)}
    others = {n: None if n == 9 else "bee" for n in explained}
    shown = {n: [exemplar(n, corner(1, 1))] for n in explained}

    def judge(sets, concepts):
        return [
            "yes" if concept == explained[one.image_index].concept else "no"
            for (one,), concept in zip(sets, concepts, strict=True)
        ]

    found = judge_latents(judge, shown, explained, others, each=3)
    assert sum(explained[n].kind == "object" for n in found) == 3
    assert {8, 9} <= found.keys()
    assert found[8] == Judgement("dog", "yes", "no")
    assert found[9] == Judgement("cat", "yes", None)


def wilson(hits: int, asked: int, z: float = 2.5758293035489004) -> tuple[float, float]:
    """Its formula, at 99%."""
    p, n = hits / asked, asked
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def test_consistency_is_the_fraction_of_yes_by_kind():
    kinds = {1: "object", 2: "object", 3: "colour", 4: "word", 5: "word"}
    explained = {n: Explained("a", kind) for n, kind in kinds.items()}
    found = consistency({1: "yes", 2: "unsure", 3: "yes", 4: None, 5: "failed"}, explained)
    assert {kind: (its.fraction, its.cases) for kind, its in found.items()} == {
        "object": (0.5, 2), "colour": (1.0, 1), "total": (pytest.approx(2 / 3), 3),
    }  # fmt: skip
    assert (found["object"].low, found["object"].high) == pytest.approx(wilson(1, 2), abs=1e-9)
    assert consistency({4: None}, explained) == {}


def test_table_2_as_metrics_has_intervals_and_numbers():
    explained = {n: Explained("a", ("object", "colour")[n % 2]) for n in range(8)}
    rows = {n: Judgement("a", ("yes", "no", "unsure")[n % 3], "no") for n in explained}
    rows[7] = Judgement("a", rows[7].judged, "failed")
    found = judge_metrics(rows, explained)
    assert found["judged"] == pytest.approx(3 / 8)
    assert (found["judged_low"], found["judged_high"]) == pytest.approx(wilson(3, 8), abs=1e-9)
    assert (found["judged_object"], found["judged_object_asked"]) == (2 / 4, 4)
    assert (found["judged_shuffled"], found["judged_shuffled_asked"], found["judged_shuffled_low"]) == (0, 7, 0)
    assert found["replies_failed"] == 1 and found["judged_without_verdict"] == 0
    rows[0] = Judgement("a")
    assert judge_metrics(rows, explained)["judged_without_verdict"] == 1


def test_table_2_stands_beside_the_papers():
    explained = {n: Explained("a", ("object", "word")[n % 2]) for n in range(4)}
    rows = {n: Judgement("a", "yes", "no") for n in explained}
    published = {"judged": 0.89, "judged_object": 0.84, "judged_people": 0.75}
    table = {row.pop("kind"): row for row in table_2(rows, explained, "truth", published)}
    assert list(table) == ["scene", "object", "part", "material", "texture", "colour", "word", "total"]
    assert table["total"]["truth"].fraction == 1 and table["total"]["truth, other names"].fraction == 0
    assert (table["total"]["GPT-4o, the paper"], table["total"]["people, the paper"]) == (0.89, 0.75)
    assert (table["object"]["GPT-4o, the paper"], table["word"]["GPT-4o, the paper"]) == (0.84, None)
    assert table["scene"]["truth"] is None
    assert list(table_2({}, explained, "truth", published)[0]) == ["kind", "GPT-4o, the paper", "people, the paper"]


@pytest.mark.slow
def test_a_judge_behind_an_endpoint_counts_what_was_wrong_with_replies(tmp_path):
    said = {(1, 0, 0): "thought", (2, 0, 0): "surrogate", (3, 0, 0): "only reasoned", (4, 0, 0): "500"}
    with serving(lambda request: "yes", choose=lambda request: said[colour_of(request)]) as server:
        judge = OpenJudge(f"m@{server.url}", None, {"concurrency": 1, "timeout": 9.0}, replies=tmp_path / "r.jsonl")
        assert judge.counts["replies_failed"] == len(server.requests) == 0
        sets = [[exemplar(0, corner(1, 2), colour=colour)] for colour in said]
        assert judge(sets, ["hat"] * 4) == ["yes", "yes", None, "failed"]
    counted = {name.removeprefix("replies_"): count for name, count in judge.counts.items() if count}
    assert counted == {
        "failed": 1, "only_reasoned": 1, "asked_again": 2, "with_thoughts": 1, "replaced_characters": 1,
    }  # fmt: skip


def colour_of(request) -> tuple[int, ...]:
    """The colour of the image that was sent."""
    data = base64.b64decode(request.images[0].partition(",")[2])
    return Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0))
