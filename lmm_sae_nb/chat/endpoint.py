"""Ask a server that speaks OpenAI's chat protocol."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager, suppress
from itertools import islice
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from PIL import Image

from lmm_sae_nb.chat.keys import Mask, read_key
from lmm_sae_nb.chat.questions import Question
from lmm_sae_nb.chat.replies import Reply, read_completion, readable
from lmm_sae_nb.support.images import rgb

if TYPE_CHECKING:
    import openai

REFUSES_QUESTION, REFUSES_KEY, NO_SUCH_MODEL = (400, 413, 422), (401, 403), 404  # HTTP status
TRIES = 3  # of a question that the model only reasons about
OWN_FIELDS = ("model", "messages", "stream", "n")  # of the request; nobody else may set them
LONGEST_FAULT = 300  # characters


class EndpointError(RuntimeError):
    """The endpoint is of no more use: it is down, refuses the key, lacks the model, or reports no probabilities."""


class EndpointChat:
    """An endpoint that speaks OpenAI's chat protocol (SGLang, vLLM, `transformers serve`, a commercial one).

    A question that fails gets a `Reply` with its fault, and the others go on. One that the model only reasons about is
    asked up to `TRIES` times.

    model: the name that the endpoint gives it.
    url: up to and with `/v1`, without name, key or query. A redirect to another address is not followed.
    key_variable: the environment variable that holds the key, "" if none is wanted. No text that comes from here
        contains the key, not even if the server repeats it.
    concurrency: questions at the same time.
    timeout: seconds that an answer may take, from the connection to the last byte.
    retries: of a question after status 408, 409, 429 or 5xx, without a connection or after `timeout`, with growing
        pauses, or after the time that Retry-After gives; if that is more than 120 s, there is no retry. So a question
        takes at most (retries + 1) * timeout + retries * 120 seconds.
    max_new_tokens: of an answer.
    max_bytes: of a whole answer; more is a fault.
    stop_after: questions that fail in a row until the endpoint counts as down. Once it has answered any question
        (`answered`), one that fails for itself (`Reply.refused`), as for its size, is no such failure.
    request: fields of the request that are added, or left out if None
        (`{"max_tokens": None, "max_completion_tokens": 99}`).

    Raises:
        ValueError: the url contains a key, the environment variable holds no key (`read_key`), a number is too small,
            or `request` has one of `OWN_FIELDS`.
        EndpointError: when asked, after all replies on their way have been given back: the key is refused, the model is
            unknown, the endpoint is down or elsewhere, or it reports no probabilities although they were asked for.
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
        if min(concurrency, max_new_tokens, max_bytes, stop_after) < 1 or retries < 0 or timeout <= 0:
            raise ValueError(
                f"concurrency {concurrency}, timeout {timeout}, retries {retries}, max_new_tokens {max_new_tokens}, "
                f"max_bytes {max_bytes}, stop_after {stop_after}: give at least 1 of each (retries: 0)"
            )
        key = read_key(key_variable, url)
        self.name, self.concurrency, self.answered = model, concurrency, False
        self._url, self._key_variable, self._mask = url, key_variable, Mask(key)
        self._timeout, self._max_bytes, self._stop_after = timeout, max_bytes, stop_after
        self._connection = dict(
            api_key=key or "none", base_url=url, timeout=timeout, max_retries=retries,
            default_headers={"Accept-Encoding": "identity"},
        )  # fmt: skip
        self._request = _fields({"temperature": 0.0, "max_tokens": max_new_tokens}, request or {})
        self.identity = json.dumps(["endpoint", url, model, self._request], sort_keys=True)

    def __call__(self, questions: Iterable[Question]) -> Iterator[tuple[int, Reply]]:
        waiting, under_way, fatal, failures = enumerate(questions), {}, None, 0
        with _event_loop() as loop, self._client(loop) as client:
            while True:
                room = 0 if fatal else self.concurrency - len(under_way)
                try:
                    for number, question in islice(waiting, room):
                        under_way[asyncio.run_coroutine_threadsafe(self._ask(client, question), loop)] = number
                except Exception as error:  # as of a picture that cannot be read: give back what is under way first
                    fatal = error
                if not under_way:
                    break
                done, _ = futures.wait(under_way, return_when=futures.FIRST_COMPLETED)
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
        if isinstance(fatal, EndpointError):
            raise EndpointError(
                f"{self.name} at {self._url}: {fatal}. What was answered is kept; once this is put right, run again"
            ) from None
        if fatal:
            raise fatal

    @contextmanager
    def _client(self, loop: asyncio.AbstractEventLoop) -> Iterator[openai.AsyncOpenAI]:
        import openai  # takes half a second, so only those who ask an endpoint import it

        from lmm_sae_nb.chat.connection import BoundedClient

        sender = BoundedClient(self._timeout, self._max_bytes, timeout=self._timeout)
        client = openai.AsyncOpenAI(**self._connection, http_client=sender)
        try:
            yield client
        finally:
            with suppress(Exception):  # it is of no more use, whatever state it is in
                asyncio.run_coroutine_threadsafe(client.close(), loop).result(1.0)

    async def _ask(self, client: openai.AsyncOpenAI, question: Question) -> Reply:
        """Ask one question.

        Raises:
            EndpointError: there is no use in asking others.
        """
        tries = 0
        try:
            messages = await asyncio.to_thread(_messages, question)
            while True:
                answer = await client.chat.completions.with_raw_response.create(
                    model=self.name, messages=messages, extra_body=self._request
                )
                tries += 1 + answer.retries_taken
                logprobs = bool(self._request.get("logprobs"))
                reply = read_completion(answer.content, with_confidence=logprobs, tries=tries)
                if not reply.only_reasoned or tries >= TRIES:
                    break
        except Exception as error:  # any that client, network, JSON or server can raise
            return self._failed(error, tries + _requests(error))
        if self._request.get("logprobs") and reply.text and reply.confidence is None:
            raise EndpointError(
                "it answers without the probabilities of its tokens (logprobs), which least_confidence needs; set "
                "least_confidence to 0, or ask a server that returns them"
            )
        return reply._replace(
            text=None if reply.text is None else self._mask(reply.text), fault=self._line(reply.fault)
        )

    def _failed(self, error: Exception, tries: int) -> Reply:
        """Return the reply that an error leaves.

        Raises:
            EndpointError: there is no use in asking others.
        """
        status = getattr(error, "status_code", None)
        cause = f" ({error.__cause__!r})" if error.__cause__ and not isinstance(error, ValueError) else ""
        body = getattr(error, "body", None)
        said = f": {body}" if body and " - " not in str(error) else ""  # " - " and the server's message, if it has one
        fault = self._line(f"{type(error).__name__}: {error}{said}{cause}")
        if status in REFUSES_KEY:
            key = f"in {self._key_variable}" if self._key_variable else "(none was given: set key_variable)"
            raise EndpointError(f"it refuses the key {key}: {fault}") from None
        if status == NO_SUCH_MODEL:
            raise EndpointError(f"it has no such model or address: {fault}") from None
        if status is not None and 300 <= status < 400:
            where = self._line(error.response.headers.get("location", "nowhere"))
            raise EndpointError(f"it redirects to {where}; if that is the server to ask, give its address") from None
        return Reply(None, fault, refused=status in REFUSES_QUESTION, tries=tries)

    def _line(self, text: str) -> str:
        """Return a text from outside as one line that can be written, without the key, which some servers repeat."""
        return " ".join(readable(self._mask(text)).split())[:LONGEST_FAULT]


def _requests(error: Exception) -> int:
    """Return how many requests ended in this error; the last of them says how many came before it."""
    request = vars(error).get("request")
    return 0 if request is None else 1 + int(request.headers.get("x-stainless-retry-count", 0))


def _result_of(future: futures.Future) -> tuple[Reply, EndpointError | None]:
    try:
        return future.result(), None
    except EndpointError as error:
        return Reply(None, str(error)), error


def _fields(usual: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of a request: the usual ones, and those that are given in their place or, if None, removed.

    Raises:
        ValueError: one cannot be given, or cannot be written as JSON.
    """
    if wrong := sorted(set(given) & set(OWN_FIELDS)):
        raise ValueError(f"the extra fields of a request have {', '.join(wrong)}, which this package sets; remove it")
    fields = {name: value for name, value in {**usual, **given}.items() if value is not None}
    try:
        json.dumps(fields, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the extra fields of a request are {dict(given)}, which is no JSON ({error})") from error
    return fields


@contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Run an event loop in a thread of its own, for Jupyter has one in this thread; its end waits for nothing."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True, name="endpoint")
    thread.start()
    try:
        yield loop
    finally:
        with suppress(TimeoutError, futures.TimeoutError):
            asyncio.run_coroutine_threadsafe(_cancel_others(), loop).result(1.0)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _messages(question: Question) -> list[dict]:
    return [{"role": "user", "content": [_part(part) for part in question.parts()]}]


def _part(part: str | Image.Image) -> dict:
    """Return a part of a turn as the protocol has it; images as PNG, without loss."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    file = io.BytesIO()
    rgb(part).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}
