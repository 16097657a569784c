"""An endpoint that misbehaves in every way of `faulty_server.FAULTS`: what comes of it, and how soon."""

import gc
import json
import re
import threading
import time
import warnings
from pathlib import Path

import pytest

from lmm_sae_nb.benchmarks.faulty_server import FAULTS, KEY, Result, serving
from lmm_sae_nb.chat.endpoint import EndpointChat, EndpointError
from lmm_sae_nb.chat.questions import Question
from lmm_sae_nb.chat.recorded import Recorded, ask, open_chat
from lmm_sae_nb.interpret.explainers import Outcome, parse_reply

SAID = {  # what the fault, or the end of the run, has to say
    "400": "this image is too large", "400 huge": "x{100}", "400 html": "400: <html><script>",
    "429 absurd": "slow down", "500": r"oops, \[key\]", "422": "not so", "502": "502: <html>", "503": "loading",
    "204": "no chat completion: ''", "hang": "timed out", "drip headers": "timed out.*took more than 0.2 s",
    "drip": "timed out", "continue": "timed out", "drip an error": "timed out",
    "silence": "Connection error.*disconnected", "reset": "Connection error",
    "cut": "Connection error.*incomplete|peer closed", "garbage": "Connection error.*illegal",
    "redirect": r"redirects to http://127.0.0.1:\d+/v1/elsewhere; if that is", "redirect elsewhere": "redirects to",
    "401": r"refuses the key in LOOPBACK_KEY: .*\[key\]", "403": "refuses the key .*country",
    "404": "no such model or address", "deep": "no chat completion", "huge": "more than 100000 bytes",
    "gzip bomb": r"compressed \(gzip\)", "error in 200": r"an error: .*provider is down for \[key\]",
    "error in choice": "an error: .*went away", "a number": "no text but a int", "a tree": "no text but a dict",
    "text for choice": "no chat completion",
    "only reasoned": "only reasoned: raise max_new_tokens or switch thinking off", "refusal": "refuses .*cannot help",
    "tool call": "called a tool", "filtered": "content filter", "echo": r"your key is \[key\]",
    "echo at the cut": r"x\[key\] is your key", "echo in base64": r"\[key\]", "echo a part": r"wrong: \[key\]",
}  # fmt: skip
SLOW = {"hang", "drip headers", "drip", "drip an error", "continue"}  # without end, so that the limit may be short
GOOD = "heard: dogs"


def pieces(size: int = 8) -> list[str]:
    """The parts of the key that may stand nowhere."""
    return [KEY[at : at + size] for at in range(len(KEY) - size + 1)]


@pytest.fixture
def with_key(monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", f"{KEY}\n")


def quick(url: str, **settings) -> EndpointChat:
    usual = {"timeout": 20.0, "retries": 0, "concurrency": 16, "max_bytes": 100_000, "stop_after": 999}
    return EndpointChat("a model", url, key_variable="LOOPBACK_KEY", **usual | settings)


@pytest.mark.usefixtures("with_key")
@pytest.mark.parametrize("ending", [ending for ending in Result if ending is not Result.STOP])
def test_every_fault_of_a_question_is_typed_soon_and_harms_no_other(tmp_path, ending):
    names = [name for name, call in FAULTS.items() if call is ending]
    with serving(key=KEY, answers=lambda request: GOOD) as server:
        chat = Recorded(quick(server.url), tmp_path / "r.jsonl")
        *replies, good = ask(chat, [Question(text) for text in [*names, "hello"] if text not in SLOW])
        asked = server.times()
    assert good.text == GOOD
    names = [name for name in names if name not in SLOW]
    for name, reply in zip(names, replies, strict=True):
        if ending is Result.ANSWER:
            assert reply.answer.removesuffix("[key]").strip(" \ufffd[31m") == GOOD, name
            assert parse_reply(reply).outcome is Outcome.EXPLAINED
            assert reply.replaced == reply.text.count("\ufffd") >= (name in ("surrogate", "not utf-8"))
        elif ending is Result.CUT:
            assert (reply.text, reply.cut) == ("train tra", True)
        else:
            assert reply.text is None and len(reply.fault) <= 300, name
            assert re.search(SAID.get(name, ""), reply.fault, re.IGNORECASE), reply.fault
            assert reply.refused is (ending is Result.REFUSED), name
            assert asked[name] == (3 if reply.only_reasoned else 1), name
    assert chat.failed == (len(names) if ending is Result.FAULT else 0)
    record = (tmp_path / "r.jsonl").read_text()
    assert not any(piece in record for piece in pieces())
    assert chat.counts["replies_only_reasoned"] == sum(reply.only_reasoned for reply in replies)


@pytest.mark.usefixtures("with_key")
def test_an_answer_without_an_end_takes_no_longer_than_its_limit():
    with serving(key=KEY) as server:
        start = time.monotonic()
        replies = ask(quick(server.url, timeout=0.2), [Question(name) for name in SLOW])
        assert time.monotonic() - start < 10  # on a busy machine; without a limit it would take for ever
    for name, reply in zip(SLOW, replies, strict=True):
        assert reply.text is None and re.search(SAID[name], reply.fault), name


@pytest.mark.usefixtures("with_key")
@pytest.mark.parametrize("name", [name for name, call in FAULTS.items() if call is Result.STOP])
def test_what_makes_all_others_useless_stops_at_once_and_shows_no_key(name):
    with serving() as elsewhere, serving(key=KEY, elsewhere=f"{elsewhere.url}/x?key={KEY}") as server:
        with pytest.raises(EndpointError, match=SAID[name]) as caught:
            ask(quick(server.url, concurrency=1), [Question(name) for _ in range(9)])
        assert len(server.requests) == 1 and not elsewhere.requests  # which would have got the key
    assert not any(piece in str(caught.value) for piece in pieces())


@pytest.mark.usefixtures("with_key")
def test_an_answer_comes_in_the_end_if_the_fault_passes():
    passing = ("429 once", "429 date once", "503 once", "502 once", "reset once", "cut once")
    reasons = ("only reasoned once", "only an open thought once")
    with serving(key=KEY, answers=lambda request: GOOD) as server:
        chat = quick(server.url, retries=1)
        replies = ask(chat, [Question(text) for text in (*passing, *reasons)])
        assert [(reply.text, reply.tries) for reply in replies] == [(GOOD, 2)] * len(replies), replies
        one, two = (request.at for request in server.requests if request.text == "429 once")
        assert two - one >= 0.3  # what Retry-After said
        assert len({request.key for request in server.requests}) == 1


@pytest.mark.usefixtures("with_key")
def test_every_question_that_the_server_saw_more_than_once_counts_whatever_came_of_it(tmp_path):
    texts = ("500", "silence", "400", "only reasoned", "503 once", "not json", "a good one")
    with serving(key=KEY) as server:
        for retries in (1, 0):
            chat = Recorded(quick(server.url, retries=retries), tmp_path / "r.jsonl")
            ask(chat, [Question(text) for text in texts])
            seen = server.times()
            assert chat.counts["replies_asked_again"] == sum(times > 1 for times in seen.values())
            assert sum(chat._tries.values()) == seen.total()
    assert seen["500"] == 3 and seen["a good one"] == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://no-such-host.invalid/v1", "Connection error"),  # no name
        ("https{}", "Connection error.*SSL"),  # no TLS
        ("http://127.0.0.1:9/v1", "Connection error"),  # nobody listens
    ],
)
def test_a_server_that_cannot_be_reached_stops_the_run_with_its_reason(url, message, monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    with serving() as server:
        chat = quick(url.format(server.url.removeprefix("http")), stop_after=2)
        with pytest.raises(EndpointError, match=f"2 questions in a row have failed.*{message}") as caught:
            ask(chat, [Question("a"), Question("b")])
    assert KEY not in str(caught.value)


def test_a_model_that_only_reasons_stops_the_run_early_with_the_remedy(tmp_path):
    with serving(choose=lambda request: "only reasoned") as server:
        chat = Recorded(EndpointChat("a model", server.url, concurrency=1), tmp_path / "r.jsonl")
        with pytest.raises(EndpointError, match="5 questions in a row .*raise max_new_tokens or switch thinking off"):
            ask(chat, [Question(str(n)) for n in range(50)])
        assert len(server.requests) == 5 * 3 and chat.counts["replies_only_reasoned"] == 5


def test_a_question_that_the_model_only_reasons_about_is_asked_again_by_the_next_run(tmp_path):
    def choose(request):
        return "only reasoned" if request.text == "b" and len(server.requests) < 6 else ""

    with serving(choose=choose) as server:
        questions = [Question("a"), Question("b")]
        first, second = (Recorded(EndpointChat("m", server.url, concurrency=1), tmp_path / "r.jsonl") for _ in "12")
        assert [parse_reply(reply).outcome for reply in ask(first, questions)] == [Outcome.EXPLAINED, Outcome.FAILED]
        assert (first.failed, first.counts["replies_only_reasoned"]) == (0, 1)
        server.requests += server.requests  # from now on it answers
        assert [reply.text for reply in ask(second, questions)] == ["heard: a", "heard: b"]


def test_nothing_is_left_running_when_asking_ends_early():
    before = set(threading.enumerate())
    with serving(choose=lambda request: "hang" if request.text == "9" else "") as server, warnings.catch_warnings():
        warnings.simplefilter("error")
        replies = EndpointChat("m", server.url, concurrency=2)(Question(str(n)) for n in (9, 1, 2, 3))
        assert next(replies)[1].text == "heard: 1"
        start = time.monotonic()
        replies.close()
        gc.collect()  # an unfinished task would complain here
        assert time.monotonic() - start < 10  # the server would hang for 20
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "endpoint"]


# Extra fields of a request.


def test_fields_are_added_replaced_and_left_out_and_belong_to_the_record_s_key(tmp_path):
    extra = {"max_tokens": None, "max_completion_tokens": 7, "chat_template_kwargs": {"enable_thinking": False}}
    with serving() as server:
        chats = [open_chat(f"m@{server.url}", max_new_tokens=9, extra=fields) for fields in ({}, extra, None)]
        for chat in chats:
            ask(Recorded(chat, tmp_path / "r.jsonl"), [Question("a")])
        plain, rich = (request.body for request in server.requests)  # the third is on record
    assert chats[0].identity == chats[2].identity != chats[1].identity
    assert plain == {"model": "m", "messages": plain["messages"], "temperature": 0.0, "max_tokens": 9}
    assert rich == {
        "model": "m", "messages": plain["messages"], "temperature": 0.0, "max_completion_tokens": 7,
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip


@pytest.mark.parametrize(
    "extra", [{"model": "x"}, {"stream": True}, {"messages": []}, {"top_p": float("nan")}, {"a": {1}}]
)
def test_fields_that_cannot_be_sent_are_refused(extra):
    with pytest.raises(ValueError, match="the extra fields of a request"):
        open_chat("m@http://host/v1", extra=extra)


@pytest.mark.usefixtures("with_key")
def test_no_log_has_the_key(caplog):
    caplog.set_level("DEBUG")
    with serving(key=KEY) as server:
        ask(quick(server.url), [Question("echo"), Question("500"), Question("hello")])
    assert caplog.text and not any(piece in caplog.text for piece in pieces())


def test_the_record_of_hostile_replies_is_plain_json_lines(tmp_path):
    path = Path(tmp_path / "r.jsonl")
    with serving() as server:
        names = ("surrogate", "control characters", "not utf-8")
        ask(Recorded(EndpointChat("m", server.url), path), [Question(name) for name in names])
    rows = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert len(rows) == 3 and all(row["text"].encode() and row["replaced"] >= 1 for row in rows)
