"""Relevance by a model's replies and by words, and which answers are rated."""

import json

import pytest

from lmm_sae_nb.chat.replies import Reply
from lmm_sae_nb.steer import relevance
from lmm_sae_nb.steer.fluency import Ordinary
from lmm_sae_nb.steer.objects import ObjectSteering, SteeredAnswer
from lmm_sae_nb.steer.relevance import by_model, by_words, rate_objects

KINDS = {"object": ["hat", "dog"], "colour": ["red", "hat"]}


class Judge:
    """A chat that replies with a function of the question, in reverse order."""

    name = identity = "a function"

    def __init__(self, reply):
        self.reply, self.questions = reply, []

    def __call__(self, questions):
        self.questions = list(questions)
        return reversed([(n, self.reply(question)) for n, question in enumerate(self.questions)])


def test_relevance_is_a_whole_number_from_one_to_ten_or_none():
    replies = {"a": "7", "b": "Relevance: 10.", "c": "11", "d": "3 or 4", "e": None}
    judge = Judge(lambda question: Reply(replies[question.text[0]]))
    assert by_model(judge, "{answer} of {text}")(list(replies), ["hat"] * 5) == [7, 10, None, None, None]
    assert [question.text for question in judge.questions][:2] == ["a of hat", "b of hat"]


def test_words_rate_the_name_above_its_kind_above_the_rest():
    assert by_words(KINDS)(["a red hat .", "two dogs .", "red .", ""], ["hat"] * 4) == [10, 5, 1, 1]
    assert by_words(KINDS)(["a dog ."], ["unknown"]) == [1]


def steering() -> ObjectSteering:
    def row(latent, dose, answer):
        return SteeredAnswer(latent, "hat", dose, answer, True, "hat" in answer, 1.0, 0.0)

    objects = [row(1, 8.0, "red ."), row(2, 8.0, "a dog ."), row(1, 16.0, "a hat ."), row(2, 16.0, "a dog .")]
    control = [row(8, 16.0, "red ."), row(9, 16.0, "")]
    return ObjectSteering("-", "-", Ordinary([], []), 16.0, 16.0, objects, [row(3, 16.0, "a hat .")], control, control)


def test_answers_at_the_chosen_dose_and_of_the_control_are_rated(tmp_path):
    words = tmp_path / "words.json"
    words.write_text(json.dumps(KINDS))
    how = dict(replies=tmp_path / "replies.jsonl", endpoint={})
    rated = rate_objects(steering(), "", str(words), **how)
    assert (rated.objects, rated.random, rated.failed) == ([10, 5], [1, 1], 0)
    assert rated.metrics["relevance"] == pytest.approx(7.5) and rated.metrics["control_relevance"] == 1
    assert rate_objects(steering(), "", "", **how).metrics == {"replies_failed": 0}


def test_a_judge_is_asked_before_the_words_and_its_failures_are_counted(tmp_path, monkeypatch):
    judge = Judge(lambda question: Reply("8") if "hat ." in question.text else Reply(None, "it is down"))
    monkeypatch.setattr(relevance, "open_chat", lambda model, concurrency: judge)
    how = dict(replies=tmp_path / "replies.jsonl", endpoint={"concurrency": 2})
    rated = rate_objects(steering(), "judge", "no such file", **how)
    assert rated.objects == [8, None] and rated.random == [None, None] and rated.failed == 3
    assert "relevance" not in rated.metrics  # one number has no interval
