"""A server on loopback that speaks OpenAI's chat protocol, and misbehaves in every way that is asked of it.

`FAULTS` lists the ways. Tests and the fault campaign start it with `serving`, and ask it as any endpoint. A question
whose text is the name of a fault meets that fault; `choose` chooses otherwise.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import quote

KEY = "sk-loopback-0123456789"
ONCE = " once"  # after the name of a fault: only when the question is asked for the first time


class Request(NamedTuple):
    """A question that arrived.

    text: of its last turn.
    images: as data URLs.
    key: as it was sent.
    at: seconds of the monotonic clock.
    body: the whole request.
    """

    text: str
    images: tuple[str, ...]
    key: str
    at: float
    body: dict


class Result(str, Enum):
    """What a client has to make of a fault."""

    ANSWER = "an answer"  # the text that `answers` gives, perhaps with replaced characters
    CUT = "an answer that was cut short"
    FAULT = "a fault"  # the question failed, and may be asked again
    REFUSED = "refused"  # this very question gets no answer, however often it is asked
    STOP = "stop"  # it is useless to ask this endpoint anything


FAULTS: dict[str, Result] = {
    # status
    "400": Result.REFUSED, "413": Result.REFUSED, "422": Result.REFUSED, "401": Result.STOP, "403": Result.STOP,
    "404": Result.STOP, "429": Result.FAULT, "429 date": Result.FAULT, "429 absurd": Result.FAULT,
    "429 nonsense": Result.FAULT, "500": Result.FAULT, "502": Result.FAULT, "503": Result.FAULT,
    "400 huge": Result.REFUSED, "400 html": Result.REFUSED, "204": Result.FAULT,
    # time
    "hang": Result.FAULT, "drip headers": Result.FAULT, "drip": Result.FAULT, "drip an error": Result.FAULT,
    "continue": Result.FAULT,
    # connection
    "silence": Result.FAULT, "reset": Result.FAULT, "cut": Result.FAULT, "garbage": Result.FAULT,
    # redirects: nothing is sent to another address than the one that the user gave
    "redirect": Result.STOP, "redirect elsewhere": Result.STOP,
    # bodies that are no completion
    "not json": Result.FAULT, "empty": Result.FAULT, "null": Result.FAULT, "a list": Result.FAULT,
    "deep": Result.FAULT, "huge": Result.FAULT, "gzip bomb": Result.FAULT, "error in 200": Result.FAULT,
    "error in choice": Result.FAULT, "no choices": Result.FAULT, "null choices": Result.FAULT,
    "text for choice": Result.FAULT, "a number": Result.FAULT, "a tree": Result.FAULT,
    # completions without an answer
    "only reasoned": Result.REFUSED, "only reasoned, elsewhere": Result.REFUSED, "only a thought": Result.REFUSED,
    "only an open thought": Result.REFUSED, "only tokens of reasoning": Result.REFUSED,
    "used up": Result.REFUSED, "refusal": Result.REFUSED, "tool call": Result.REFUSED, "filtered": Result.REFUSED,
    # answers of unusual form
    "cut short": Result.CUT, "filtered in the middle": Result.CUT, "plain text type": Result.ANSWER,
    "thought": Result.ANSWER, "thoughts": Result.ANSWER, "nested thought": Result.ANSWER,
    "shouted thought": Result.ANSWER, "end of a thought": Result.ANSWER, "empty thought": Result.ANSWER,
    "thought that refuses": Result.ANSWER, "reasoned": Result.ANSWER, "parts": Result.ANSWER,
    "two choices": Result.ANSWER, "same id": Result.ANSWER, "null logprobs": Result.ANSWER,
    "surrogate": Result.ANSWER, "not utf-8": Result.ANSWER, "control characters": Result.ANSWER,
    "nan": Result.ANSWER,
    # a server that repeats the key
    "echo": Result.FAULT, "echo at the cut": Result.FAULT, "echo in base64": Result.FAULT,
    "echo in an address": Result.FAULT, "echo a part": Result.FAULT, "echo a refusal": Result.REFUSED,
    "echo the answer": Result.ANSWER,
}  # fmt: skip


def _named_fault(request: Request) -> str:
    return request.text


class Server(ThreadingHTTPServer):
    """A server that records what arrives and answers well or badly.

    answers: gives for a Request the text of the answer, or the status of an error.
    key: asked for, if any.
    port: 0 takes a free one.
    choose: gives for a Request the name of a fault, perhaps with `ONCE` behind it; any other text is no fault.
    elsewhere: an address to redirect to.
    """

    daemon_threads, request_queue_size = True, 64

    def __init__(
        self,
        answers: Callable[[Request], str | int] = lambda request: f"heard: {request.text}",
        key: str = "",
        port: int = 0,
        choose: Callable[[Request], str] = _named_fault,
        elsewhere: str = "",
    ):
        super().__init__(("127.0.0.1", port), Handler)
        self.answers, self.key, self.choose, self.elsewhere = answers, key, choose, elsewhere
        self.requests: list[Request] = []
        self.lock, self.over = threading.Lock(), threading.Event()

    def handle_error(self, request, client_address) -> None:
        """Say nothing: clients go away when they have had enough."""

    @property
    def url(self) -> str:
        """The address to ask, up to and with /v1."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def times(self) -> Counter:
        """Return how often each text was asked."""
        with self.lock:
            return Counter(request.text for request in self.requests)


@contextmanager
def serving(*args, **kwargs) -> Iterator[Server]:
    """Run a `Server` in a thread; it ends with the block."""
    with Server(*args, **kwargs) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()


class Handler(BaseHTTPRequestHandler):
    """One method `fault_...` for each fault."""

    protocol_version, server = "HTTP/1.1", None

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        with self.server.lock:
            key = self.headers.get("Authorization", "")
            self.server.requests.append(Request("GET", (), key, time.monotonic(), {}))
        self.send(200, completion("from a GET"))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = body["messages"][-1]["content"]
        text = " ".join(part["text"] for part in parts if part["type"] == "text")
        images = tuple(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
        self.sent_key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        with self.server.lock:
            self.request_read = request = Request(text, images, self.sent_key, time.monotonic(), body)
            asked = {(earlier.text, earlier.images) for earlier in self.server.requests}
            self.server.requests.append(request)
        if self.server.key and self.sent_key != self.server.key:
            return self.send(401, {"error": {"message": f"Incorrect API key provided: {self.sent_key}"}})
        if body["model"] == "unknown":
            return self.send(404, {"error": {"message": "no such model"}})
        fault = self.server.choose(request)
        name = fault.removesuffix(ONCE)
        is_over = name != fault and (text, images) in asked
        if name in FAULTS and not is_over:
            return getattr(self, "fault_" + re.sub("[ ,-]+", "_", name))()
        answer = self.server.answers(request)
        if isinstance(answer, int):
            return self.send(answer, {"error": {"message": "not this question"}})
        return self.send_answer(answer)

    def send(self, status: int, body: object, promised: int | None = None, **headers: str) -> None:
        """Send a whole response; a body that is no bytes is written as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(promised or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_answer(self, text: object, reason: str = "stop", **message: object) -> None:
        """Send a completion, with the probabilities of its tokens if they were asked for."""
        sent = completion(text, reason, **message)
        if self.request_read.body.get("logprobs") and self.request_read.body["model"] != "unsure of itself":
            chances = [{"token": word, "logprob": math.log(p)} for word, p in (("one", 0.5), ("two", 0.25))]
            sent["choices"][0]["logprobs"] = {"content": chances}
        self.send(200, sent)

    def good(self) -> str:
        """Return what `answers` says of this question."""
        return str(self.server.answers(self.request_read))

    # Status.

    def fault_400(self) -> None:
        self.send(400, {"error": {"message": "this image is too large"}})

    def fault_413(self) -> None:
        self.send(413, {"error": {"message": "this body is too large"}})

    def fault_422(self) -> None:
        self.send(422, {"detail": [{"msg": "not so"}]})

    def fault_401(self) -> None:
        self.send(401, {"error": {"message": f"Incorrect API key provided: {self.sent_key}"}})

    def fault_403(self) -> None:
        self.send(403, {"error": {"message": "not from your country"}})

    def fault_404(self) -> None:
        self.send(404, {"error": {"message": "no such model"}})

    def fault_429(self) -> None:
        self.send(429, {"error": {"message": "slow down"}}, Retry_After="0.3")

    def fault_429_date(self) -> None:
        self.send(429, {"error": {"message": "slow down"}}, Retry_After=formatdate(time.time() + 1, usegmt=True))

    def fault_429_absurd(self) -> None:
        self.send(429, {"error": {"message": "slow down"}}, Retry_After="9" * 400)

    def fault_429_nonsense(self) -> None:
        self.send(429, {"error": {"message": "slow down"}}, Retry_After="-1e309, soon; nan")

    def fault_500(self) -> None:
        self.send(500, {"error": {"message": f"oops, {self.sent_key}"}})

    def fault_502(self) -> None:
        self.send(502, b"<html><h1>502 Bad Gateway</h1></html>", Content_Type="text/html")

    def fault_503(self) -> None:
        self.send(503, {"error": {"message": "loading the model"}}, Retry_After="0.1")

    def fault_400_huge(self) -> None:
        self.send_response(400)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.close_connection = True
        while not self.server.over.is_set():
            self.wfile.write(b"x" * 2**20)

    def fault_400_html(self) -> None:
        self.send(400, b"<html><script>alert(1)</script></html>", Content_Type="text/html")

    def fault_204(self) -> None:
        self.send_response(204)
        self.end_headers()

    # Time.

    def fault_hang(self) -> None:
        self.server.over.wait(20)

    def fault_drip(self) -> None:
        self.send(200, b"{", promised=10**6)
        while not self.server.over.wait(0.02):
            self.wfile.write(b" ")

    def fault_drip_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not self.server.over.wait(0.02):
            self.wfile.write(b"x")

    def fault_drip_an_error(self) -> None:
        self.send(500, b"{", promised=10**6)
        while not self.server.over.wait(0.02):
            self.wfile.write(b" ")

    def fault_continue(self) -> None:
        while not self.server.over.wait(0.02):
            self.wfile.write(b"HTTP/1.1 102 Processing\r\n\r\n")

    # Connection.

    def fault_silence(self) -> None:
        self.close_connection = True

    def fault_reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def fault_cut(self) -> None:
        self.send(200, b'{"choices": [{"mess', promised=1000)
        self.close_connection = True

    def fault_garbage(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n\x00\xff\xfe\r\n\r\n")
        self.close_connection = True

    def fault_redirect(self) -> None:
        self.send(307, b"", Location=f"{self.server.url}/elsewhere")

    def fault_redirect_elsewhere(self) -> None:
        self.send(308, b"", Location=self.server.elsewhere or "http://127.0.0.1:9/v1")

    # Bodies that are no completion.

    def fault_not_json(self) -> None:
        self.send(200, b"<html>It works!</html>", Content_Type="text/html")

    def fault_empty(self) -> None:
        self.send(200, b"")

    def fault_null(self) -> None:
        self.send(200, None)

    def fault_a_list(self) -> None:
        self.send(200, [1, 2])

    def fault_deep(self) -> None:
        self.send(200, b'{"choices":' + b"[" * 50_000)

    def fault_huge(self) -> None:
        self.send(200, completion("x" * 10_000_000))

    def fault_gzip_bomb(self) -> None:
        self.send(200, gzip.compress(bytes(2**26)), Content_Encoding="gzip")  # 64 MiB of zeros in 64 KiB

    def fault_error_in_200(self) -> None:
        self.send(200, {"error": {"message": f"the provider is down for {self.sent_key}", "code": 502}})

    def fault_error_in_choice(self) -> None:
        sent = completion("", "error")
        sent["choices"][0]["error"] = {"message": "the provider went away"}
        self.send(200, sent)

    def fault_no_choices(self) -> None:
        self.send(200, completion("") | {"choices": []})

    def fault_null_choices(self) -> None:
        self.send(200, completion("") | {"choices": None})

    def fault_text_for_choice(self) -> None:
        self.send(200, completion("") | {"choices": ["dogs"]})

    def fault_a_number(self) -> None:
        self.send(200, completion(7))

    def fault_a_tree(self) -> None:
        self.send(200, completion({"text": "dogs"}))

    # Completions without an answer.

    def fault_only_reasoned(self) -> None:
        self.send_answer(None, "length", reasoning_content="These may be dogs, or")

    def fault_only_reasoned_elsewhere(self) -> None:
        self.send_answer("", reasoning="These may be dogs, or")

    def fault_only_a_thought(self) -> None:
        self.send_answer("<think>\nThese may be dogs.\n</think>\n\n")

    def fault_only_an_open_thought(self) -> None:
        self.send_answer("<think>\nThese may be dogs, or", "length")

    def fault_only_tokens_of_reasoning(self) -> None:
        usage = {"completion_tokens": 16, "completion_tokens_details": {"reasoning_tokens": 16}}
        self.send(200, completion("") | {"usage": usage})

    def fault_used_up(self) -> None:
        self.send_answer("", "length")

    def fault_refusal(self) -> None:
        self.send_answer(None, refusal="I cannot help with that.")

    def fault_tool_call(self) -> None:
        call = {"id": "1", "type": "function", "function": {"name": "look_closer", "arguments": "{}"}}
        self.send_answer(None, "tool_calls", tool_calls=[call])

    def fault_filtered(self) -> None:
        self.send_answer(None, "content_filter")

    # Answers of unusual form.

    def fault_cut_short(self) -> None:
        self.send_answer("train tra", "length")

    def fault_filtered_in_the_middle(self) -> None:
        self.send_answer("train tra", "content_filter")

    def fault_plain_text_type(self) -> None:
        self.send(200, completion(self.good()), Content_Type="text/plain")

    def fault_thought(self) -> None:
        self.send_answer(f"<think>\nThese may be cats.\n</think>\n\n{self.good()}")

    def fault_thoughts(self) -> None:
        self.send_answer(f"<think>cats</think><thinking>rather birds</thinking>{self.good()}<think>or not")

    def fault_nested_thought(self) -> None:
        self.send_answer(f"<think>cats <think>birds</think> fish</think>{self.good()}")

    def fault_shouted_thought(self) -> None:
        self.send_answer(f"<THINK>cats</Think>{self.good()}")

    def fault_end_of_a_thought(self) -> None:
        self.send_answer(f"cats, or birds\n</think>\n{self.good()}")

    def fault_empty_thought(self) -> None:
        self.send_answer(f"<think>\n\n</think>\n\n{self.good()}")

    def fault_thought_that_refuses(self) -> None:
        self.send_answer(f"<think>I may be unable to produce explanations</think> {self.good()}")

    def fault_reasoned(self) -> None:
        self.send_answer(self.good(), reasoning_content="cats, or birds")

    def fault_parts(self) -> None:
        thought = {"type": "thinking", "thinking": [{"type": "text", "text": "cats"}]}
        self.send_answer([thought, {"type": "text", "text": self.good()}])

    def fault_two_choices(self) -> None:
        sent = completion(self.good())
        self.send(200, sent | {"choices": sent["choices"] + completion("another answer")["choices"]})

    def fault_same_id(self) -> None:
        self.send(200, completion(self.good()) | {"id": "always the same"})

    def fault_null_logprobs(self) -> None:
        sent = completion(self.good())
        sent["choices"][0]["logprobs"] = None
        self.send(200, sent)

    def fault_surrogate(self) -> None:
        self.send_answer(f"{self.good()}\ud83d")

    def fault_not_utf_8(self) -> None:
        self.send(200, json.dumps(completion(self.good() + "MARK")).encode().replace(b"MARK", b"\xff\xc3"))

    def fault_control_characters(self) -> None:
        self.send_answer(f"{self.good()}\x00\x1b[31m\x7f")

    def fault_nan(self) -> None:
        self.send(200, completion(self.good()) | {"usage": {"completion_tokens": math.nan}})

    # A server that repeats the key.

    def fault_echo(self) -> None:
        self.send(200, b"your key is " + self.sent_key.encode())

    def fault_echo_at_the_cut(self) -> None:
        self.send(200, b"x" * (79 - len(self.sent_key) // 2) + self.sent_key.encode() + b" is your key")

    def fault_echo_in_base64(self) -> None:
        self.send(503, {"error": {"message": base64.b64encode(f"Bearer {self.sent_key}".encode()).decode()}})

    def fault_echo_in_an_address(self) -> None:
        self.send(500, {"error": {"message": f"https://host/?key={quote(self.sent_key, safe='').replace('-', '%2D')}"}})

    def fault_echo_a_part(self) -> None:
        self.send(500, {"error": {"message": f"wrong: {self.sent_key[:-3]}***"}})

    def fault_echo_a_refusal(self) -> None:
        self.send_answer(None, refusal=f"I do not work for {self.sent_key}")

    def fault_echo_the_answer(self) -> None:
        self.send_answer(f"{self.good()} {self.sent_key}")


def completion(content: object, reason: str = "stop", **message: object) -> dict:
    """Return a chat completion.

    content: of the message.
    message: its other fields.
    """
    message = {"role": "assistant", "content": content} | message
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return {"id": "1", "object": "chat.completion", "choices": [choice]}
