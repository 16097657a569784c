"""A server on loopback that speaks OpenAI's chat protocol as badly as it is told to."""

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

KEY = "sk-loopback-0123456789"


class Request(NamedTuple):
    """What arrived: the text, the images' data, the key, and when."""

    text: str
    images: tuple[str, ...]
    key: str
    at: float


class Server(ThreadingHTTPServer):
    """`answers` gives the text of an answer for a Request, or the status of an error; `requests` has all that came.

    key: asked for, if any.
    """

    daemon_threads, request_queue_size = True, 64

    def __init__(self, answers=lambda request: f"heard: {request.text}", key: str = "", port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.answers, self.key = answers, key
        self.requests: list[Request] = []
        self.lock, self.over = threading.Lock(), threading.Event()

    def handle_error(self, request, client_address) -> None:
        """Clients go away when they have had enough."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def times(self) -> Counter:
        with self.lock:
            return Counter(request.text for request in self.requests)


@contextmanager
def serving(*args, **kwargs) -> Iterator[Server]:
    with Server(*args, **kwargs) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()


class Handler(BaseHTTPRequestHandler):
    """Model and question decide what goes wrong: `429 once`, `500 once`, `500`, `hang`, `drip`, `cut`, `html`, ..."""

    protocol_version, server = "HTTP/1.1", None

    def log_message(self, *args) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = body["messages"][-1]["content"]
        text = " ".join(part["text"] for part in parts if part["type"] == "text")
        images = tuple(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        with self.server.lock:
            request = Request(text, images, key, time.monotonic())
            first = text not in {earlier.text for earlier in self.server.requests}
            self.server.requests.append(request)
        if self.server.key and key != self.server.key:
            return self.send(401, {"error": {"message": f"Incorrect API key provided: {key}"}})
        if body["model"] == "unknown":
            return self.send(404, {"error": {"message": "no such model"}})
        fault = getattr(self, "fault_" + text.replace(" ", "_"), None)
        if fault is None or (text.endswith("once") and not first):
            answer = self.server.answers(request)
            if isinstance(answer, int):
                return self.send(answer, {"error": {"message": "not this question"}})
            told = completion(answer)
            if body.get("logprobs") and body["model"] != "unsure of itself":
                chances = [{"token": word, "logprob": math.log(p)} for word, p in (("one", 0.5), ("two", 0.25))]
                told["choices"][0]["logprobs"] = {"content": chances}
            return self.send(200, told)
        fault()

    def send(self, status: int, body: object, promised: int | None = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(promised or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def fault_429_once(self) -> None:
        self.send(429, {"error": {"message": "slow down"}}, Retry_After="0.3")

    def fault_500_once(self) -> None:
        self.send(500, {"error": {"message": "oops"}})

    def fault_500(self) -> None:
        self.send(500, {"error": {"message": f"oops, {KEY}"}})

    def fault_400(self) -> None:
        self.send(400, {"error": {"message": "this image is too large"}})

    def fault_hang(self) -> None:
        self.server.over.wait(20)

    def fault_drip(self) -> None:
        self.send(200, b"{", promised=10**6)
        while not self.server.over.wait(0.1):
            self.wfile.write(b" ")

    def fault_cut(self) -> None:
        self.send(200, b'{"choices": [{"mess', promised=1000)
        self.close_connection = True

    def fault_silence_once(self) -> None:
        self.close_connection = True

    def fault_not_json(self) -> None:
        self.send(200, b"<html>It works!</html>", Content_Type="text/html")

    def fault_empty(self) -> None:
        self.send(200, b"")

    def fault_a_list(self) -> None:
        self.send(200, [1, 2])

    def fault_huge(self) -> None:
        self.send(200, completion("x" * 10_000_000))

    def fault_no_content(self) -> None:
        self.send(200, completion(None))

    def fault_cut_short(self) -> None:
        self.send(200, completion("train tra", "length"))


def completion(text: str | None, reason: str = "stop") -> dict:
    message = {"role": "assistant", "content": text}
    return {"id": "1", "object": "chat.completion", "choices": [{"message": message, "finish_reason": reason}]}
