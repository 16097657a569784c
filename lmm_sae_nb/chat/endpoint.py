"""Ask a server that speaks OpenAI's chat protocol."""

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
from lmm_sae_nb.support.images import rgb

if TYPE_CHECKING:
    import openai

REFUSES_QUESTION, REFUSES_KEY, NO_SUCH_MODEL = (400, 413, 422), (401, 403), 404  # HTTP status


class EndpointError(RuntimeError):
    """The endpoint is of no more use: it is down, refuses the key, lacks the model, or reports no probabilities."""


class EndpointChat:
    """An endpoint that speaks OpenAI's chat protocol (SGLang, vLLM, `transformers serve`, a commercial one).

    A question that fails gets a `Reply` with its fault, and the others go on.

    model: the name that the endpoint gives it.
    url: up to and with `/v1`, without name, key or query.
    key_variable: the environment variable that holds the key, "" if none is wanted. No text that comes from here
        contains the key.
    concurrency: questions at the same time.
    timeout: seconds that an answer may take, and each wait in it.
    retries: of a question after status 429 or 5xx or without a connection, with growing pauses or after the time that
        Retry-After gives.
    max_new_tokens: of an answer.
    max_bytes: of a whole answer; more is a fault.
    stop_after: questions that fail in a row until the endpoint counts as down. Once it has answered any question
        (`answered`), one that it refuses for itself, as for its size, is no such failure.
    request: fields of the request that are added, or left out if None
        (`{"max_tokens": None, "max_completion_tokens": 99}`).

    Raises:
        ValueError: the url contains a key, the environment variable is not set, or a number is too small.
        EndpointError: when asked, after all replies on their way have been given back: the key is refused, the model is
            unknown, the endpoint is down, or it reports no probabilities although they were asked for.
    """

    def __init__(
        self, model: str, url: str, *, key_variable: str = "", concurrency: int = 8, timeout: float = 120.0,
        retries: int = 4, max_new_tokens: int = 512, max_bytes: int = 2**20, stop_after: int = 5,
        request: Mapping[str, object] | None = None,
    ):  # fmt: skip
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError(
                f"the endpoint's address has to be http(s)://host[:port]/v1 without name, key or query; it begins "
                f"{parts.scheme}://{parts.hostname or ''}; keys go into an environment variable"
            )
        if key_variable and not os.environ.get(key_variable):
            raise ValueError(
                f"the environment variable {key_variable}, which is to hold the key for {url}, is not set; export it "
                'and start again, or set key_variable to "" if the endpoint wants no key'
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
        import openai  # takes half a second, so only those who ask an endpoint import it

        waiting, under_way, fatal, failures = enumerate(questions), {}, None, 0
        pool, client = ThreadPoolExecutor(self.concurrency), openai.OpenAI(**self._connection)
        try:
            while True:
                room = 0 if fatal else self.concurrency - len(under_way)
                try:
                    for number, question in islice(waiting, room):
                        under_way[pool.submit(self._ask, client, question)] = number
                except Exception as error:  # as of a picture that cannot be read: give back what is under way first
                    fatal = error
                if not under_way:
                    break
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    reply, stop = _result_of(future)
                    if reply.text is not None:
                        self.answered, failures = True, 0
                    elif not (reply.refused and self.answered):
                        failures += 1
                    if failures >= self._stop_after and not stop:
                        stop = EndpointError(f"{failures} questions in a row have failed, the last with: {reply.fault}")
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
        """Ask one question.

        Raises:
            EndpointError: there is no use in asking others.
        """
        try:
            messages = [{"role": "user", "content": [_part(part) for part in question.parts()]}]
            reply = _reply(self._body(client, messages))
        except Exception as error:  # any that client, network, JSON or server can raise
            status = getattr(error, "status_code", None)
            if status in REFUSES_KEY:
                key = f"in {self._key_variable}" if self._key_variable else "(none was given: set key_variable)"
                raise EndpointError(f"it refuses the key {key}: {self._describe(error)}") from None
            if status == NO_SUCH_MODEL:
                raise EndpointError(f"it has no such model or address: {self._describe(error)}") from None
            return Reply(None, self._describe(error), refused=status in REFUSES_QUESTION)
        if self._request.get("logprobs") and reply.text and reply.confidence is None:
            raise EndpointError(
                "it answers without the probabilities of its tokens (logprobs), which least_confidence needs; set "
                "least_confidence to 0, or ask a server that returns them"
            )
        return reply

    def _body(self, client: openai.OpenAI, messages: list[dict]) -> bytes:
        """Return the bytes of an answer.

        Raises:
            ValueError: there are more than `max_bytes`.
            TimeoutError: it took more than `timeout` seconds.
        """
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

    def _describe(self, error: Exception) -> str:
        """Return an error as one line of at most 300 characters, without the key, which some servers repeat."""
        cause = f" ({error.__cause__!r})" if error.__cause__ else ""
        line = " ".join(f"{type(error).__name__}: {error}{cause}".split())
        return (line.replace(self._key, "[key]") if self._key else line)[:300]


def _result_of(future: Future) -> tuple[Reply, EndpointError | None]:
    try:
        return future.result(), None
    except EndpointError as error:
        return Reply(None, str(error)), error


def _part(part: str | Image.Image) -> dict:
    """Return a part of a turn as the protocol has it; images as PNG, without loss."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    file = io.BytesIO()
    rgb(part).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def _reply(body: bytes) -> Reply:
    """Return the text of the first choice.

    Raises:
        ValueError: the body is no completion.
    """
    try:
        choice = json.loads(body)["choices"][0]
        text, cut = choice["message"].get("content") or "", choice.get("finish_reason") == "length"
        tokens = (choice.get("logprobs") or {}).get("content")
        confidence = math.exp(sum(float(token["logprob"]) for token in tokens)) if tokens else None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"the answer is no chat completion: {bytes(body[:80])!r}") from error
    if not isinstance(text, str):
        raise ValueError(f"the answer's content is no text but a {type(text).__name__}")
    return Reply(text.strip(), "", cut, confidence)
