"""Ask any server of the OpenAI protocol."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from PIL import Image

from lmm_sae_nb.chat.questions import Question, Reply

if TYPE_CHECKING:
    import openai

# What a server answers to a question that it cannot take, whoever asks; to a key; to the name of a model.
OF_THE_QUESTION, OF_THE_KEY, OF_THE_MODEL = (400, 413, 422), (401, 403), 404


class EndpointError(RuntimeError):
    """Nothing more is to be had from this endpoint: it is down, refuses the key, lacks the model or does not tell
    probabilities."""


class EndpointChat:
    """Any endpoint that speaks OpenAI's chat protocol (SGLang, vLLM, `transformers serve`, a commercial one).

    model, url: as the endpoint names them; the url up to and with `/v1`. key_variable: the environment variable that
    holds the key, "" if none is wanted; the key itself reaches no text that comes from here. concurrency: questions
    under way at once. timeout: seconds that an answer may take, and each wait in it. retries: of a question that meets
    429, 5xx or no connection, after the client's exponential back-off or what Retry-After says. max_bytes: of a whole
    answer; more is a fault. stop_after: questions failed in a row that count as the endpoint being down; once any has
    been answered (`answered`), of those that it refuses for themselves (too large, say) ten count as one. request:
    fields of the request that are added, or left out if None (`{"max_tokens": None,
    "max_completion_tokens": 99}`).

    A question that fails is a `Reply` with its fault. EndpointError if the key is refused, the model unknown, or the
    endpoint down or silent about probabilities that were asked for, after every reply that was under way has been given
    back. ValueError for a url that carries a key, or if the variable is not set.
    """

    def __init__(
        self, model: str, url: str, *, key_variable: str = "", concurrency: int = 8, timeout: float = 120.0,
        retries: int = 4, max_new_tokens: int = 512, max_bytes: int = 2**20, stop_after: int = 5,
        request: Mapping[str, object] | None = None,
    ):  # fmt: skip
        where = urlsplit(url)
        if where.scheme not in ("http", "https") or not where.hostname or where.username or where.query:
            raise ValueError(
                f"the endpoint's address has to be http(s)://host[:port]/v1 without name, key or query; it begins "
                f"{where.scheme}://{where.hostname or ''}; keys go into an environment variable"
            )
        if key_variable and not os.environ.get(key_variable):
            raise ValueError(
                f"the environment variable {key_variable}, which is to hold the key for {url}, is not set; export it "
                "and start again, or give no key_variable if the endpoint wants none"
            )
        if min(concurrency, max_new_tokens, max_bytes, stop_after) < 1 or retries < 0 or timeout <= 0:
            raise ValueError(
                f"concurrency {concurrency}, timeout {timeout}, retries {retries}, max_new_tokens {max_new_tokens}, "
                f"max_bytes {max_bytes}, stop_after {stop_after}: give at least 1 of each (retries: 0)"
            )
        self.name, self.concurrency, self.answered = model, concurrency, False
        self._url, self._key_variable, self._timeout = url, key_variable, timeout
        self._max_bytes, self._stop_after = max_bytes, stop_after
        self._key = os.environ[key_variable] if key_variable else ""
        self._connection = dict(
            api_key=self._key or "none", base_url=url, timeout=timeout, max_retries=retries,
            default_headers={"Accept-Encoding": "identity"},
        )  # fmt: skip
        fields = {"temperature": 0.0, "max_tokens": max_new_tokens} | dict(request or {})
        self._request = {name: value for name, value in fields.items() if value is not None}
        self.identity = json.dumps(["endpoint", url, model, self._request], sort_keys=True)

    def __call__(self, questions: Iterable[Question]) -> Iterator[tuple[int, Reply]]:
        import openai  # takes half a second, which only those who ask an endpoint should pay

        waiting, under_way, fatal, in_a_row = enumerate(questions), {}, None, []
        pool, client = ThreadPoolExecutor(self.concurrency), openai.OpenAI(**self._connection)
        try:
            while True:
                room = 0 if fatal else self.concurrency - len(under_way)
                try:
                    for number, question in islice(waiting, room):
                        under_way[pool.submit(self._ask, client, question)] = number
                except Exception as error:  # a picture that cannot be read, say: what is under way has been paid for
                    fatal = error
                if not under_way:
                    break
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    reply, stop = _outcome_of(future)
                    self.answered = self.answered or reply.text is not None
                    weight = 1 if reply.refused and self.answered else 10
                    in_a_row = [] if reply.text is not None else [*in_a_row, weight]
                    if sum(in_a_row) >= 10 * self._stop_after and not stop:
                        many = f"{len(in_a_row)} questions in a row have failed"
                        stop = EndpointError(f"{many}, the last with: {reply.fault}")
                    fatal = fatal or stop
                    yield under_way.pop(future), reply
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()
        if isinstance(fatal, EndpointError):
            raise EndpointError(
                f"{self.name} at {self._url}: {fatal}. What was answered is kept; once this is put right, run again"
            ) from None
        if fatal:
            raise fatal

    def _ask(self, client: openai.OpenAI, question: Question) -> Reply:
        """One question; EndpointError if asking others is of no use."""
        try:
            messages = [{"role": "user", "content": [_part(part) for part in question.parts()]}]
            reply = _reply(self._body(client, messages))
        except Exception as error:  # whatever client, network, JSON and server come up with
            status = getattr(error, "status_code", None)
            if status in OF_THE_KEY:
                where = f"in {self._key_variable}" if self._key_variable else "(none was given: set key_variable)"
                raise EndpointError(f"it refuses the key {where}: {self._told(error)}") from None
            if status == OF_THE_MODEL:
                raise EndpointError(f"it has no such model or address: {self._told(error)}") from None
            return Reply(None, self._told(error), refused=status in OF_THE_QUESTION)
        if self._request.get("logprobs") and reply.text and reply.sureness is None:
            raise EndpointError(
                "it answers without the probabilities of its tokens (logprobs), which least_sure is held against; set "
                "least_sure to 0, or ask a server that returns them"
            )
        return reply

    def _body(self, client: openai.OpenAI, messages: list[dict]) -> bytes:
        """The answer's bytes, at most `max_bytes` of them within `timeout` seconds; ValueError for more."""
        with client.chat.completions.with_streaming_response.create(
            model=self.name, messages=messages, **self._request
        ) as response:
            body, latest = bytearray(), time.monotonic() + self._timeout
            for piece in response.iter_bytes():
                body += piece
                if len(body) > self._max_bytes:
                    raise ValueError(f"the answer has more than {self._max_bytes} bytes")
                if time.monotonic() > latest:
                    raise TimeoutError(f"the answer took more than {self._timeout} s")
        return bytes(body)

    def _told(self, error: Exception) -> str:
        """An error in one line of at most 300 characters, without the key, which some servers repeat."""
        cause = f" ({error.__cause__!r})" if error.__cause__ else ""
        said = " ".join(f"{type(error).__name__}: {error}{cause}".split())
        return (said.replace(self._key, "[key]") if self._key else said)[:300]


def _outcome_of(future: Future) -> tuple[Reply, EndpointError | None]:
    try:
        return future.result(), None
    except EndpointError as error:
        return Reply(None, str(error)), error


def _part(part: str | Image.Image) -> dict:
    """A part of a turn as the protocol has it; images as PNG, losslessly."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    held = io.BytesIO()
    part.convert("RGB").save(held, "PNG")
    url = "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def _reply(body: bytes) -> Reply:
    """The first choice's text; ValueError if the body is no completion."""
    try:
        choice = json.loads(body)["choices"][0]
        text, cut = choice["message"].get("content") or "", choice.get("finish_reason") == "length"
        told = (choice.get("logprobs") or {}).get("content")
        sureness = math.exp(sum(float(token["logprob"]) for token in told)) if told else None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"the answer is no chat completion: {bytes(body[:80])!r}") from error
    if not isinstance(text, str):
        raise ValueError(f"the answer's content is no text but a {type(text).__name__}")
    return Reply(text.strip(), "", cut, sureness)
