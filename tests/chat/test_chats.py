"""Good replies come through, are kept, and are not asked for again, however badly a model or a server behaves."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import started
from models import make, tokenizer
from models import text as text_settings
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2Config, Qwen2ForCausalLM

from lmm_sae_nb.benchmarks.faulty_server import KEY, serving
from lmm_sae_nb.chat.endpoint import EndpointChat, EndpointError
from lmm_sae_nb.chat.local import LocalChat
from lmm_sae_nb.chat.questions import Question
from lmm_sae_nb.chat.recorded import Recorded, ask, open_chat
from lmm_sae_nb.interpret import explainers
from lmm_sae_nb.interpret.explainers import Outcome
from lmm_sae_nb.support.images import pixel_hash

EXPLAINER = "data/models/tiny-explainer"
PROMPT = "what do these images have in common ?"


def pictures(count: int, seed: int = 0, side: int = 8) -> tuple[Image.Image, ...]:
    rng = np.random.default_rng(seed)
    return tuple(Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count))


def quick(server, **settings) -> EndpointChat:
    return EndpointChat("a model", server.url, **{"timeout": 1.0, "retries": 1, "concurrency": 4, **settings})


# Questions.


@pytest.mark.parametrize(
    ("text", "images", "parts"),
    [
        ("why ?", 2, ["image", "image", "why ?"]),
        ("look: {images} why ?", 2, ["look: ", "image", "image", " why ?"]),
        ("{images}why ?", 1, ["image", "why ?"]),
        ("why ?", 0, ["why ?"]),
    ],
)
def test_images_stand_where_the_prompt_says(text, images, parts):
    found = Question(text, pictures(images)).parts()
    assert [part if isinstance(part, str) else "image" for part in found] == parts


def test_a_question_s_key_changes_with_all_that_a_reply_depends_on():
    one, two = pictures(2)
    questions = [
        ("me", Question("a", (one, two))), ("you", Question("a", (one, two))), ("me", Question("b", (one, two))),
        ("me", Question("a", (two, one))), ("me", Question("a", (one,))), ("me", Question("a")),
    ]  # fmt: skip
    assert len({question.key(identity) for identity, question in questions}) == len(questions)
    assert Question("a", (one.copy(), two)).key("me") == questions[0][1].key("me")
    assert pixel_hash(one) == pixel_hash(one.copy()) != pixel_hash(one.convert("L"))


# A misbehaving endpoint.

FAULTS = {
    "500": r"oops, \[key\]", "400": "this image is too large", "hang": "timed out", "cut": "incomplete|closed|peer",
    "drip": "timed out", "not json": "no chat completion: '<html>", "empty": "no chat completion: ''",
    "a list": "no chat completion", "huge": "more than 100000 bytes",
}  # fmt: skip


def test_every_fault_is_reported_and_no_other_question_suffers(monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    good = ["429 once", "500 once", "silence once", "cut short", "hello"]
    questions = [Question(text, pictures(1)) for text in [*FAULTS, *good]]
    with serving(key=KEY, answers=lambda request: "<script>alert('$x$')</script>") as server:
        chat = quick(server, key_variable="LOOPBACK_KEY", max_bytes=100_000, stop_after=99)
        replies = dict(zip([question.text for question in questions], ask(chat, questions), strict=True))
    for text, fault in FAULTS.items():
        assert replies[text].text is None
        assert re.search(fault, replies[text].fault, re.IGNORECASE), replies[text].fault
    script = "<script>alert('$x$')</script>"
    assert [replies[text].text for text in good] == [script, script, script, "train tra", script]
    assert [replies[text].cut for text in good] == [False, False, False, True, False]
    assert KEY not in str(replies) and all(len(reply.fault) <= 300 for reply in replies.values())
    times = server.times()
    assert [times[text] for text in ("429 once", "500 once", "500", "hang", "400", "not json")] == [2, 2, 2, 2, 1, 1]
    busy = [request.at for request in server.requests if request.text == "429 once"]
    assert busy[1] - busy[0] >= 0.3  # what Retry-After said
    assert {request.key for request in server.requests} == {KEY}


def test_questions_that_are_too_large_stop_no_other_once_one_has_been_answered():
    large = [Question("400", pictures(1, seed=n)) for n in range(7)]
    with serving() as server:
        chat = quick(server, concurrency=1, stop_after=3)
        replies = ask(chat, [Question("hello"), *large, Question("bye")])
        assert [reply.text for reply in replies] == ["heard: hello", *[None] * 7, "heard: bye"]
        assert [reply.refused for reply in replies] == [False, *[True] * 7, False]
        fresh = quick(server, concurrency=1, stop_after=3)  # it has had no answer yet
        with pytest.raises(EndpointError, match="3 questions in a row have failed, the last with: .*too large"):
            ask(fresh, large)
        with pytest.raises(EndpointError, match="3 questions in a row have failed, the last with: .*oops"):
            ask(chat, [Question("hello"), *(Question("500", pictures(1, seed=n)) for n in range(7))])


def test_a_refusal_between_failures_neither_counts_nor_hides_that_the_endpoint_is_down():
    bad = [Question("400" if n % 2 else "500", pictures(1, seed=n)) for n in range(12)]
    with serving() as server:
        with pytest.raises(EndpointError, match="3 questions in a row have failed"):
            ask(quick(server, concurrency=1, stop_after=3, retries=0), [Question("hello"), *bad])
        assert len(server.requests) == 1 + 5  # hello, then 500, 400, 500, 400, 500


def test_a_run_that_lacks_only_what_is_too_large_goes_on(tmp_path):
    questions = [Question("hello"), *(Question("400", pictures(1, seed=n)) for n in range(7))]
    with serving() as server:
        for requests in (8, 8 + 7):
            chat = Recorded(quick(server, concurrency=1, stop_after=3), tmp_path / "r.jsonl")
            assert [reply.text for reply in ask(chat, questions)] == ["heard: hello", *[None] * 7]
            assert (len(server.requests), chat.failed) == (requests, 0)
        request = {"logprobs": True}  # with other fields it is another chat, of which nothing is known
        another = Recorded(quick(server, concurrency=1, stop_after=3, request=request), tmp_path / "r.jsonl")
        with pytest.raises(EndpointError, match="3 questions in a row have failed"):
            ask(another, questions[1:])


def test_what_is_refused_first_counts_as_failed_only_if_nothing_is_answered(tmp_path):
    with serving() as server:
        for text, failed in (("hello", 0), ("500", 3)):
            chat = Recorded(quick(server, concurrency=1, stop_after=9), tmp_path / f"{text}.jsonl")
            ask(chat, [Question("400", pictures(1, seed=1)), Question("400", pictures(1, seed=2)), Question(text)])
            assert chat.failed == failed


def test_a_picture_that_cannot_be_sent_is_a_fault_of_its_question():
    broken = Image.new("RGB", (4, 4))
    broken.close()
    with serving() as server:
        one, other = ask(quick(server), [Question("look", (broken,)), Question("hello")])
    assert one.text is None and "ValueError" in one.fault and other.text == "heard: hello"


def test_a_question_that_cannot_be_made_loses_no_answer(tmp_path):
    def questions():
        yield from (Question(str(n)) for n in range(3))
        raise OSError("this picture cannot be read")

    with serving() as server:
        chat = Recorded(quick(server, concurrency=8), tmp_path / "r.jsonl")
        with pytest.raises(OSError, match="cannot be read"):
            ask(chat, questions())
        again = Recorded(quick(server), tmp_path / "r.jsonl")
        assert [reply.text for reply in ask(again, [Question(str(n)) for n in range(3)])] == [
            "heard: 0",
            "heard: 1",
            "heard: 2",
        ]
        assert len(server.requests) == 3


def test_a_wrong_key_stops_everything_and_is_not_repeated(monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", "sk-mistyped")
    with serving(key=KEY) as server:
        chat = quick(server, key_variable="LOOPBACK_KEY", concurrency=1)
        with pytest.raises(EndpointError, match="refuses the key in LOOPBACK_KEY") as caught:
            ask(chat, [Question(str(n)) for n in range(50)])
        assert "sk-mistyped" not in str(caught.value)
        assert len(server.requests) == 1
        with pytest.raises(EndpointError, match=r"none was given: set key_variable"):
            ask(quick(server), [Question("hello")])


def test_an_unknown_model_stops_everything():
    with serving() as server, pytest.raises(EndpointError, match="unknown at .*no such model or address"):
        ask(EndpointChat("unknown", server.url, retries=0), [Question("hello")])


@pytest.mark.parametrize(
    ("url", "settings", "message"),
    [
        ("http://me:secret@host/v1", {}, "without name, key or query"),
        ("https://host/v1?key=secret", {}, "without name, key or query"),
        ("host:30000", {}, "has to be http"),
        ("http://host/v1", {"key_variable": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE, which is to hold the key"),
        ("http://host/v1", {"concurrency": 0}, "concurrency 0"),
    ],
)
def test_an_endpoint_that_cannot_be_asked_is_refused_at_once(url, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        EndpointChat("a model", url, **settings)
    assert "secret" not in str(caught.value)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_an_endpoint_that_is_down_stops_the_run_and_loses_nothing(tmp_path):
    questions, port, record = [Question(str(n)) for n in range(12)], free_port(), tmp_path / "replies.jsonl"

    def chat():
        url = f"http://127.0.0.1:{port}/v1"
        return Recorded(EndpointChat("a model", url, retries=0, concurrency=2, stop_after=4), record)

    with serving(port=port):
        first = ask(chat(), questions[:5])
    with pytest.raises(EndpointError, match=r"4 questions in a row have failed.*Connection.*kept.*run again"):
        ask(chat(), questions)
    with serving(port=port) as server:
        assert ask(chat(), questions)[:5] == first
        assert server.times() == {str(n): 1 for n in range(5, 12)}  # those that had failed among them
    assert [reply.text for reply in ask(chat(), questions)] == [f"heard: {n}" for n in range(12)]  # nobody to ask


# The record.


def test_the_same_question_is_asked_once_and_another_model_or_image_anew(tmp_path):
    with serving() as server:
        one, other = (Recorded(EndpointChat(name, server.url), tmp_path / "r.jsonl") for name in ("one", "other"))
        questions = [Question("a", pictures(2)), Question("a", pictures(2)), Question("a", pictures(2, seed=1))]
        assert len(ask(one, questions)) == 3
        assert len(server.requests) == 2
        assert ask(one, questions) and len(server.requests) == 2
        assert ask(other, questions) and len(server.requests) == 4
        slow = Recorded(EndpointChat("slow", server.url, concurrency=1), tmp_path / "r.jsonl")
        again = [Question(text) for text in ("a", "b", "c", "a", "400", "d", "400")]  # after it has been answered
        assert [reply.text for reply in ask(slow, again)] == [*map("heard: {}".format, "abca"), None, "heard: d", None]
        assert (len(server.requests), slow.failed) == (4 + 5, 0)  # what was refused is not asked again in one call


def test_a_last_line_without_its_end_counts_if_it_is_whole_and_is_asked_again_if_not(tmp_path):
    record = tmp_path / "r.jsonl"
    with serving() as server:
        questions = [Question(str(n)) for n in range(3)]
        ask(Recorded(quick(server, concurrency=1), record), questions)
        whole = record.read_bytes()
        chat, last = quick(server), len(whole.splitlines()[-1])
        for torn in (1, 2, last // 2, last, last + 1):  # the first leaves a whole reply
            record.write_bytes(whole[:-torn])
            before = len(server.requests)
            assert [reply.text for reply in ask(Recorded(chat, record), questions)] == [f"heard: {n}" for n in range(3)]
            assert len(server.requests) == before + (torn > 1)
            assert [json.loads(line)["text"] for line in record.read_bytes().splitlines()] == [
                "heard: 0",
                "heard: 1",
                "heard: 2",
            ]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"key": "a', b"[1]", b"null", b"\xff\xfe", b"[" * 20_000, b'{"text": 7, "key": "a"}',
        b'{"key": "K", "text": "x", "fault": "", "cut": false, "confidence": NaN}',
        b'{"key": "K", "text": "x", "fault": "", "cut": "no", "confidence": null}',
        b'{"key": "K", "text": ["x"], "fault": "", "cut": false, "confidence": null}',
    ],
    ids=["cut", "list", "null", "not utf-8", "deep", "no fault", "nan", "cut is text", "list of texts"],
)  # fmt: skip
def test_a_damaged_line_is_reported_and_asked_again_and_ends_no_run(tmp_path, damage):
    record, questions = tmp_path / "r.jsonl", [Question("a"), Question("b")]
    with serving() as server:
        first = ask(Recorded(quick(server, concurrency=1), record), questions)
        lines = record.read_bytes().splitlines()
        key = json.loads(lines[0])["key"].encode()
        record.write_bytes(damage.replace(b"K", key) + b"\n" + lines[1] + b"\n")
        for asked in (3, 3):  # what was asked again is kept
            chat = Recorded(quick(server), record)
            with pytest.warns(UserWarning, match="r.jsonl: 1 lines are no replies .* line 1; .* asked again"):
                assert ask(chat, questions) == first
            assert (len(server.requests), chat.counts["replies_damaged_lines"]) == (asked, 1)


def test_a_flipped_bit_in_a_reply_is_noticed(tmp_path):
    record, questions = tmp_path / "r.jsonl", [Question("a")]
    with serving() as server:
        first = ask(Recorded(quick(server), record), questions)
        record.write_bytes(record.read_bytes().replace(b"heard", b"heazd"))
        with pytest.warns(UserWarning, match="asked again"):
            assert ask(Recorded(quick(server), record), questions) == first


def test_lines_of_an_older_run_are_read_as_answers_are_now(tmp_path):
    record = tmp_path / "r.jsonl"
    with serving() as server:
        chat = quick(server)
        old = {"a": "cat\ud83d", "b": "", "c": "<think>a cat, or", "d": "<think>a cat</think> dog"}
        rows = [
            {"key": Question(name).key(chat.identity), "text": text, "fault": "", "cut": False, "confidence": None}
            for name, text in old.items()
        ]
        record.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = Recorded(chat, record)
        replies = ask(found, [Question(name) for name in old])
        assert [reply.answer for reply in replies] == ["cat\ufffd", "heard: b", "heard: c", "dog"]
        assert server.times() == {"b": 1, "c": 1}
        assert (found.counts["replies_replaced_characters"], found.counts["replies_with_thoughts"]) == (1, 1)


def _explain(url: str, record: Path) -> None:
    """A run of 60 latents against the endpoint, in a process that is going to be killed."""
    chat = Recorded(EndpointChat("a model", url, concurrency=3), record)
    explainers.explainer(chat, PROMPT)(pictures(2, seed) for seed in range(60))


@pytest.mark.slow
def test_killed_at_ten_random_points_no_answer_is_lost_and_none_asked_for_twice(tmp_path):
    """SIGKILL; the answer tells which images were asked about, so that the record can be held against the requests."""
    record, rng = tmp_path / "replies.jsonl", random.Random(3)

    def answer(request):
        time.sleep(rng.uniform(0, 0.02))
        return str(hash(request.images))

    with serving(answers=answer) as server:
        states = []
        for served in sorted(rng.sample(range(1, 58), 10)):
            process, _ = started(_explain, server.url, record)
            while len(server.requests) < served and process.is_alive():
                time.sleep(0.001)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            time.sleep(0.05)  # what it had sent arrives
            states.append((kept(record), len(server.requests)))
        process, _ = started(_explain, server.url, record)
        process.join()
        assert process.exitcode == 0
        said = [str(hash(request.images)) for request in server.requests]
    for answers, asked_before in states:
        assert not answers & set(said[asked_before:]), "it asked again for what it had kept"
        assert answers <= kept(record), "an answer was lost"
    assert len(record.read_bytes().splitlines()) == len(kept(record)) == len(set(said)) == 60
    assert len(said) <= 60 + 3 * len(states)  # what was under way when it was killed is asked for again


def kept(record: Path) -> set[str]:
    """The answers in the whole lines of a record."""
    lines = record.read_bytes().split(b"\n")[:-1] if record.exists() else []
    return {json.loads(line)["text"] for line in lines}


def test_an_endpoint_is_asked_for_its_confidence_which_is_kept(tmp_path):
    with serving() as server:
        plain = open_chat(f"a model@{server.url}")
        curious = open_chat(f"a model@{server.url}", confidence=True)
        assert plain.identity != curious.identity
        assert ask(plain, [Question("a?")])[0].confidence is None
        first = ask(Recorded(curious, tmp_path / "replies.jsonl"), [Question("a?")])
        assert first[0].confidence == pytest.approx(0.5 * 0.25)
        assert ask(Recorded(curious, tmp_path / "replies.jsonl"), [Question("a?")]) == first
        assert len(server.requests) == 2  # the last came from the record


def test_an_endpoint_that_reports_no_confidence_is_not_asked_to_the_end():
    with serving() as server:
        curious = open_chat(f"unsure of itself@{server.url}", confidence=True, concurrency=2)
        with pytest.raises(EndpointError, match="without the probabilities.*set least_confidence to 0"):
            ask(curious, (Question(f"{n}?") for n in range(50)))
        assert len(server.requests) <= 3


# Models in this process, and a real server.


def shown_sets(count: int) -> list[Question]:
    return [Question(PROMPT, pictures(5 - seed % 2, seed, 192)) for seed in range(count)]


def test_a_local_model_answers_in_batches_what_it_answers_alone(root):
    chat = LocalChat.load(root / EXPLAINER, batch_size=3, max_new_tokens=8)
    replies = ask(chat, shown_sets(4))
    model = AutoModelForImageTextToText.from_pretrained(root / EXPLAINER, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(root / EXPLAINER)
    for question, reply in zip(shown_sets(4), replies, strict=True):
        content = [{"type": "image"}] * len(question.images) + [{"type": "text", "text": PROMPT}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=text, images=list(question.images), return_tensors="pt", add_special_tokens=False)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert reply.text == processor.decode(out, skip_special_tokens=True).strip()
        assert reply.cut == (model.generation_config.eos_token_id not in out.tolist())
        end = out.tolist().index(model.generation_config.eos_token_id) + 1 if not reply.cut else len(out)
        tokens = out[:end]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():  # all at once, where generation went word by word
            logits = model(**inputs).logits[0, -end - 1 : -1]
        assert reply.confidence == pytest.approx(float(logits.softmax(-1)[range(end), tokens].prod()), rel=1e-3)


def text_model() -> LocalChat:
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} {% endif %}"
    torch.manual_seed(0)
    return LocalChat(Qwen2ForCausalLM(Qwen2Config(**text_settings(words))), words, "text alone", "1", max_new_tokens=4)


def test_a_model_of_text_alone_refuses_images_and_answers_text():
    chat = text_model()
    assert len(ask(chat, [Question("a stripe ?"), Question("two, and much longer ?")])) == 2
    with pytest.raises(ValueError, match="text alone reads text alone and cannot take images"):
        ask(chat, [Question("what ?", pictures(1))])


def test_a_model_without_a_chat_template_is_refused():
    model, processor = make("instructblip")
    with pytest.raises(ValueError, match="this one has no chat template"):
        LocalChat(model, processor, "this one", "1")


@pytest.fixture
def transformers_serve(root):
    """A real `transformers serve` on loopback."""
    port = free_port()
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    options = ["serve", str(root / EXPLAINER), "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, *options, "--dtype", "float32"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=root
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.communicate()


def _wait_for(url: str, process: subprocess.Popen) -> None:
    for _ in range(1200):
        assert process.poll() is None, process.stdout.read().decode()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    pytest.fail("transformers serve did not come up within two minutes")


@pytest.mark.slow
def test_a_real_server_answers_what_the_model_in_this_process_does(root, transformers_serve, tmp_path):
    near = open_chat(EXPLAINER, max_new_tokens=16)
    far = open_chat(f"{root / EXPLAINER}@{transformers_serve}", concurrency=2, max_new_tokens=16)
    assert isinstance(near, LocalChat) and isinstance(far, EndpointChat)
    sets = [question.images for question in shown_sets(3)]
    here = explainers.explainer(near, PROMPT)(sets)
    there = explainers.explainer(Recorded(far, tmp_path / "replies.jsonl"), PROMPT)(sets)
    assert [answer[:3] for answer in here] == [answer[:3] for answer in there]
    assert all(0 < answer.confidence <= 1 for answer in here) and {answer.confidence for answer in there} == {None}
    assert {answer.outcome for answer in there} <= {Outcome.EXPLAINED, Outcome.REFUSED, Outcome.UNPARSEABLE}
    assert len((tmp_path / "replies.jsonl").read_bytes().splitlines()) == 3
    curious = open_chat(f"{root / EXPLAINER}@{transformers_serve}", max_new_tokens=16, confidence=True)
    with pytest.raises(EndpointError, match="without the probabilities"):  # this server ignores `logprobs`
        explainers.explainer(curious, PROMPT)(sets)
