"""POPE: the questions against a search by hand, its measures against scikit-learn, its answers against one run each."""

from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import noise
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from lmm_sae_nb.attribute.attribution import single_token
from lmm_sae_nb.hallucination.answers import Shift
from lmm_sae_nb.hallucination.presence import (
    SAMPLINGS,
    Asked,
    Presence,
    ask_presence,
    in_words,
    measure_presence,
    presence_questions,
    visible_things,
)
from lmm_sae_nb.hallucination.report import Method
from lmm_sae_nb.steer.steering import Edit, Scope, steered
from lmm_sae_nb.truth.label_maps import LabelMaps

NAMES = list("abcdefgh")


def scenes(seed: int, images: int = 60) -> np.ndarray:
    """Things that appear in pairs: a with b, c with d and so on; later pairs are rarer."""
    rng = np.random.default_rng(seed)
    pairs = rng.random((images, 4)) < [0.6, 0.4, 0.3, 0.2]
    return np.repeat(pairs, 2, 1) & (rng.random((images, 8)) < 0.8)


@pytest.mark.parametrize("seed", range(3))
def test_half_of_the_answers_are_yes_and_absent_things_are_absent(seed):
    visible, seen = scenes(seed), scenes(seed + 10)
    asked = presence_questions(visible, seen, NAMES, scenes=25, each=2, seed=seed)
    assert list(asked) == list(SAMPLINGS)
    images = np.flatnonzero(visible.any(1))[:25].tolist()
    there = [each for each in asked["random"] if each.present]
    for questions in asked.values():
        assert [each for each in questions if each.present] == there
        assert len(set(questions)) == len(questions) and list(dict.fromkeys(q.image for q in questions)) == images
        assert all(visible[q.image, NAMES.index(q.thing)] == q.present for q in questions)
        per_image = Counter((q.image, q.present) for q in questions)
        for image in images:
            assert per_image[image, True] == per_image[image, False] == min(2, visible[image].sum())


def test_popular_and_adversarial_things_are_those_of_a_count_by_hand():
    visible, seen = scenes(1), scenes(2)
    asked = presence_questions(visible, seen, NAMES, each=2)
    often = {name: sum(row[n] for row in seen.tolist()) for n, name in enumerate(NAMES)}
    for image in {q.image for q in asked["popular"]}:
        absent = [name for name, shows in zip(NAMES, visible[image], strict=True) if not shows]
        there = [q.thing for q in asked["popular"] if q.image == image and q.present]
        chosen = [q.thing for q in asked["popular"] if q.image == image and not q.present]
        assert sorted(map(often.get, chosen)) == sorted(map(often.get, absent), reverse=True)[: len(there)][::-1]
        for thing in there:
            both = [sum(row[NAMES.index(thing)] and row[NAMES.index(name)] for row in seen.tolist()) for name in absent]
            best = {name for name, count in zip(absent, both, strict=True) if count == max(both)}
            taken = [q.thing for q in asked["adversarial"] if q.image == image and not q.present]
            assert best & set(taken), "the thing that appears with this one most often is asked"


def test_images_that_show_nothing_and_images_that_show_everything_are_refused():
    nothing, everything = np.zeros((5, 8), bool), np.ones((5, 8), bool)
    with pytest.raises(ValueError, match="0 images to ask about and .* show one of 8 things"):
        presence_questions(nothing, scenes(0), NAMES)
    with pytest.raises(ValueError, match="image 0 lacks only 0 of 8 things"):
        presence_questions(everything, scenes(0), NAMES)


def test_things_are_those_on_a_pixel_of_the_label_map():
    grid = np.zeros((6, 6), np.uint8)
    grid[0, 0], grid[3:, 3:] = 2, 3
    maps = LabelMaps([{"object": Image.fromarray(each)} for each in (grid, 0 * grid)], {"object": ["x", "y", "z"]})
    assert visible_things(maps, [0, 1], "object", ["z", "x", "y"]).tolist() == [[True, False, True], [False] * 3]
    with pytest.raises(ValueError, match="no object w"):
        visible_things(maps, [0], "object", ["w", "x"])
    with pytest.raises(ValueError, match="no word x"):
        visible_things(maps, [0], "word", ["x"])


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_the_measures_are_those_of_scikit_learn(rate):
    rng = np.random.default_rng(7)
    present = rng.random(200) < 0.5
    yes = rng.random(200) < rate
    answers = Presence(
        {"popular": [Asked(n, "x", bool(p)) for n, p in enumerate(present)]}, {"m": {"popular": yes.tolist()}}
    )
    scores = answers.scores("m", "popular")
    expected = {"accuracy": accuracy_score(present, yes), "recall": recall_score(present, yes), "yes": yes.mean()}
    expected |= {"precision": precision_score(present, yes)} if yes.any() else {}
    expected |= {"f1": f1_score(present, yes, zero_division=0)}
    assert {name: score.fraction for name, score in scores.items()} == pytest.approx(expected)
    assert all(0 <= score.low <= score.fraction <= score.high <= 1 for score in scores.values())
    metrics = answers.metrics("object")
    assert metrics["object_questions"] == 200
    assert metrics["m_object_popular_f1_low"] == scores["f1"].low <= metrics["m_object_popular_f1"]


def test_a_change_is_over_all_samplings_and_its_interval_over_images():
    rng = np.random.default_rng(4)
    asked = {name: [Asked(n // 4, str(n), n % 2 == 0) for n in range(200)] for name in ("random", "popular")}
    yes = {m: {name: (rng.random(200) < 0.5).tolist() for name in asked} for m in ("untouched", "cure")}
    answers = Presence(asked, yes)
    right = {
        m: np.concatenate([np.array(said[name]) == [q.present for q in asked[name]] for name in asked])
        for m, said in yes.items()
    }
    change = answers.change("cure", "untouched")
    assert change.mean == pytest.approx(right["cure"].mean() - right["untouched"].mean())
    assert change.low < change.mean < change.high
    # answers that are the same within an image say no more than one of them
    repeated = {m: {name: np.repeat(said[name][:50], 4).tolist() for name in asked} for m, said in yes.items()}
    everywhere = {name: [Asked(n // 4, str(n), True) for n in range(200)] for name in asked}
    wide = Presence(everywhere, repeated).change("cure", "untouched")
    assert wide.high - wide.low > 1.5 * (change.high - change.low)
    assert answers.metrics("object")["cure_object_change_low"] == change.low


def test_the_interval_of_f1_covers_the_true_value_as_often_as_it_says():
    rng = np.random.default_rng(3)
    inside = []
    for _ in range(300):
        present = rng.random(150) < 0.5
        yes = np.where(present, rng.random(150) < 0.8, rng.random(150) < 0.3)
        asked = {"random": [Asked(n, "x", bool(p)) for n, p in enumerate(present)]}
        score = Presence(asked, {"m": {"random": yes.tolist()}}).scores("m", "random")["f1"]
        inside.append(score.low <= 2 * 0.4 / (2 * 0.4 + 0.15 + 0.1) <= score.high)
    assert np.mean(inside) > 0.96


def test_each_question_is_answered_as_in_a_run_of_its_own(place):
    images = {n: noise(40, 40, n) for n in range(2)}
    asked = {
        "random": [Asked(0, "a", True), Asked(0, "b", False), Asked(1, "b", True), Asked(1, "a", False)],
        "popular": [Asked(0, "a", True), Asked(0, "c", False)],
    }
    edits, scope = (Edit(3, 30.0), Edit(7, 10.0)), Scope(("text",), ("prompt",))
    methods = {
        "untouched": Method((None,)),
        "clamp": Method((edits,), scope),
        "shift": Method((Shift((0.5,) * place.lmm.width),), scope),
        "asked": Method((None,), before="please ."),
    }
    found = ask_presence(place, images, asked, methods, "is there {} ?".format, answers=("y", "n"))
    assert found.asked == asked
    no = single_token(place.lmm, "n")
    for name, before in (("untouched", ""), ("clamp", ""), ("asked", "please . ")):
        for sampling, questions in asked.items():
            said = []
            for each in questions:
                prompt = place.lmm.prompt(f"{before}is there {each.thing} ?", images[each.image])
                with torch.no_grad(), steered(place, prompt, edits if name == "clamp" else (), scope, keep_error=True):
                    said.append(int(place.lmm.last_logits(prompt)[0].argmax()) != no)
            assert found.yes[name][sampling] == said


@pytest.mark.parametrize(
    ("question", "thing", "expected"),
    [
        ("is there a {} ?", "dog", "is there a dog ?"),
        ("Is there a {} here?", "owl", "Is there an owl here?"),
        ("is there a {} ?", "grapes", "is there grapes ?"),
        ("is the label {} in the image ?", "iran", "is the label iran in the image ?"),
    ],
)
def test_a_question_has_the_article_of_its_thing(question, thing, expected):
    assert in_words(question, thing, plural=["grapes"]) == expected


def test_things_of_every_kind_are_asked_about_and_counted_from_the_label_maps(place):
    """What is asked as present lies on the map, and what is popular comes from the first rows of the others."""
    rng, rows = np.random.default_rng(5), []
    for n in range(8):
        grids = {"object": np.zeros((4, 4), np.uint8), "word": np.zeros((4, 4), np.uint8)}
        grids["object"][0, :2], grids["word"][1, 1] = rng.integers(0, 4, 2), rng.integers(0, 3)
        rows.append({"image": noise(40, 40, n)} | {kind: Image.fromarray(grid) for kind, grid in grids.items()})
    other = [{kind: Image.fromarray(np.full((4, 4), n, np.uint8)) for kind in ("object", "word")} for n in (2, 2, 1)]
    concepts = {"object": ["cat", "owl", "ox"], "word": ["go", "stop"]}
    found = measure_presence(
        place, Dataset.from_list(rows), Dataset.from_list(other), concepts, concepts,
        {"object": "is there a {} ?", "word": "the word {} ?"}, {"untouched": Method((None,))},
        answers=("y", "n"), each=1, counted=2,
    )  # fmt: skip
    assert list(found) == ["object", "word"]
    for kind, answers in found.items():
        for each in answers.asked["popular"]:
            on_map = concepts[kind].index(each.thing) + 1 in np.asarray(rows[each.image][kind])
            assert on_map == each.present
            second = concepts[kind][1]
            there = {q.thing for q in answers.asked["popular"] if q.image == each.image and q.present}
            if not each.present and second not in there and 2 not in np.asarray(rows[each.image][kind]):
                assert each.thing == second
        assert list(answers.yes) == ["untouched"] and set(answers.yes["untouched"]) == set(SAMPLINGS)
