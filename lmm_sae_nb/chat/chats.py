"""Chats: questions with images in, texts out, from a model in this process or any server of OpenAI's protocol.

`Recorded` writes every reply to disk as it comes, so that a run that was killed goes on without asking again.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import urlsplit

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from lmm_sae_nb.model.frozen import frozen
from lmm_sae_nb.model.processor import load_processor
from lmm_sae_nb.support.artifacts import fingerprint, sync

if TYPE_CHECKING:
    import openai

IMAGES = "{images}"  # where a question's images stand in its text
# What a server answers to a question that it cannot take, whoever asks; to a key; to the name of a model.
OF_THE_QUESTION, OF_THE_KEY, OF_THE_MODEL = (400, 413, 422), (401, 403), 404


# ---- questions and replies ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One user's turn: a text, with its images where it says `{images}`, or else before it."""

    text: str
    images: tuple[Image.Image, ...] = ()

    def parts(self) -> list[str | Image.Image]:
        """Text and images in their order, empty text left out."""
        before, _, after = self.text.partition(IMAGES) if IMAGES in self.text else ("", "", self.text)
        return [part for part in (before, *self.images, after) if not isinstance(part, str) or part.strip()]

    def key(self, identity: str) -> str:
        """SHA-256 of all that a reply depends on: who is asked, the text, every pixel."""
        digest = hashlib.sha256(json.dumps([identity, self.text, len(self.images)]).encode())
        for image in self.images:
            digest.update(pixel_hash(image).encode())
        return digest.hexdigest()


class Reply(NamedTuple):
    """What came back: `text` is None if nothing did, and `fault` says why; `cut` if it ran into its limit.

    refused: the endpoint cannot take this very question (400, 413, 422), which if it takes others is not its state.
    sureness: the probability that the model gives this very text, the product of its tokens', in [0, 1]; None of a
    server that does not tell.
    """

    text: str | None
    fault: str = ""
    cut: bool = False
    sureness: float | None = None
    refused: bool = False


class Chat(Protocol):
    """Questions in, (number of the question, reply) out, each as soon as it is there, in any order.

    name: for people; identity: changes with whatever changes the replies.
    """

    name: str
    identity: str

    def __call__(self, questions: Iterable[Question]) -> Iterator[tuple[int, Reply]]: ...


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of an image's mode, size and pixels: of equal images equal, whatever file they come from."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


# ---- a model in this process ----------------------------------------------------------------------------------


class LocalChat:
    """A transformers model, of image and text or of text alone, asked in batches, greedily.

    The processor's (or tokenizer's) chat template writes the turns. ValueError for images to a model of text alone,
    or a model without a chat template. A reply of a batch can differ from that of another batch by rounding. The model
    given is made `frozen`.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin | PreTrainedTokenizerBase, name: str, identity: str,
        *, batch_size: int = 4, max_new_tokens: int = 64,
    ):  # fmt: skip
        self.name, self.batch_size, self.max_new_tokens = name, batch_size, max_new_tokens
        self.identity = json.dumps(["local", identity, max_new_tokens])
        self._model, self._processor = frozen(model), processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._sees = self._tokenizer is not processor
        self._image_token = str(getattr(processor, "image_token", None) or "<image>")  # which the template writes
        self._template = getattr(processor, "chat_template", None) or self._tokenizer.chat_template
        if self._template is None:
            raise ValueError(f"{name} has no chat template; ask a model that was trained to be asked")
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    @classmethod
    def load(cls, name_or_path: str | Path, *, device: str | None = None, **settings: int) -> LocalChat:
        """A folder, or a name on the hub, onto a GPU if there is one; settings: batch_size, max_new_tokens."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        model_class = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        reads = load_processor if sees else AutoTokenizer.from_pretrained
        dtype = torch.float32 if device == "cpu" else "auto"
        model = model_class.from_pretrained(name_or_path, dtype=dtype, trust_remote_code=False)
        processor = reads(name_or_path, trust_remote_code=False)
        folder = Path(name_or_path)
        which = fingerprint(folder) if folder.is_dir() else f"{name_or_path}@{config._commit_hash}"
        return cls(
            model.to(device), processor, folder.name if folder.is_dir() else str(name_or_path), which, **settings
        )

    def __call__(self, questions: Iterable[Question]) -> Iterator[tuple[int, Reply]]:
        numbered = enumerate(questions)
        while batch := list(islice(numbered, self.batch_size)):
            replies = self._batch([question for _, question in batch])
            yield from zip((number for number, _ in batch), replies, strict=True)

    @torch.no_grad()
    def _batch(self, questions: list[Question]) -> list[Reply]:
        inputs = self._processor.apply_chat_template(
            [self._turn(question) for question in questions], chat_template=self._template, tokenize=True,
            add_generation_prompt=True, return_dict=True, return_tensors="pt", **self._padding(),
        )  # fmt: skip
        inputs = inputs.to(self._model.device)
        for name, value in inputs.items():
            if value.is_floating_point():
                inputs[name] = value.to(self._model.dtype)
        pad = self._tokenizer.pad_token_id
        made = self._model.generate(
            **inputs, do_sample=False, max_new_tokens=self.max_new_tokens, pad_token_id=pad, num_beams=1,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        out = made.sequences[:, inputs["input_ids"].shape[1] :]
        texts = self._tokenizer.batch_decode(out, skip_special_tokens=True)
        ends = self._model.generation_config.eos_token_id
        ended = torch.isin(out, torch.tensor([ends] if isinstance(ends, int) else ends or [], device=out.device))
        whole = ended.any(1).tolist() if ends is not None else [True] * len(texts)
        log_chance = torch.stack(made.logits, 1).float().log_softmax(-1).gather(2, out[..., None])[..., 0]
        behind = ended.cumsum(1) - ended.int() > 0  # what follows the end is padding
        sure = log_chance.masked_fill(behind, 0).sum(1).exp().tolist()
        return [Reply(text.strip(), "", not end, p) for text, end, p in zip(texts, whole, sure, strict=True)]

    def _padding(self) -> dict:
        return {"processor_kwargs": {"padding": True}} if self._sees else {"padding": True}

    def _turn(self, question: Question) -> list[dict]:
        if not self._sees:
            if question.images:
                raise ValueError(f"{self.name} reads text alone and cannot be shown images; ask a multimodal model")
            return [{"role": "user", "content": question.text}]
        parts = [
            {"type": "text", "text": part.replace(self._image_token, " ")}
            if isinstance(part, str)
            else {"type": "image", "image": part.convert("RGB")}
            for part in question.parts()
        ]
        return [{"role": "user", "content": parts}]


# ---- a server -------------------------------------------------------------------------------------------------


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


def open_chat(
    who: str, *, root: Path | None = None, key_variable: str = "", concurrency: int = 8, timeout: float = 120.0,
    batch_size: int = 4, max_new_tokens: int = 64, sureness: bool = False,
) -> Chat:  # fmt: skip
    """Whom a parameter names: `name@http://host:port/v1` is an endpoint, all else a folder below root or a hub name.

    sureness: ask an endpoint for its tokens' probabilities, which some servers refuse; a model here always has them.
    """
    name, at, address = who.partition("@http")
    if at:
        return EndpointChat(
            name, "http" + address, key_variable=key_variable, concurrency=concurrency, timeout=timeout,
            max_new_tokens=max_new_tokens, request={"logprobs": True} if sureness else None,
        )  # fmt: skip
    folder = (root or Path()) / who
    return LocalChat.load(folder if folder.is_dir() else who, batch_size=batch_size, max_new_tokens=max_new_tokens)


# ---- the record -----------------------------------------------------------------------------------------------


class Recorded:
    """A chat whose replies are kept in a file of JSON lines, one for each, on the disk before it is given back.

    A question whose reply is there is not asked: same model, text and pixels (`Question.key`); lines of other
    questions stay and are not looked at. One that failed is asked again. A last line that was cut short is dropped.
    One process at a time may write the file.
    """

    def __init__(self, chat: Chat, path: str | Path):
        self.name, self.identity, self._chat, self._path = chat.name, chat.identity, chat, Path(path)
        self._who = hashlib.sha256(chat.identity.encode()).hexdigest()[:16]
        self._answers = False  # whether the file has a reply of this very chat
        self.asked = 0  # questions that reached the chat
        self.failed = 0  # those of them without a reply, but for what was refused by an endpoint that answers others

    def __call__(self, questions: Iterable[Question]) -> Iterator[tuple[int, Reply]]:
        kept = self._read()
        if self._answers:
            self._chat.answered = True  # what an `EndpointChat` would else have to find out again
        with self._path.open("ab") as file:
            sync(self._path.parent)
            left: list[tuple[int, str]] = []
            known: list[tuple[int, Reply]] = []
            twins: dict[str, list[int]] = {}  # of a question that is asked already in this call
            refused = 0

            def unanswered() -> Iterator[Question]:
                for number, question in enumerate(questions):
                    key = question.key(self.identity)
                    if key in kept:
                        known.append((number, kept[key]))
                    elif key in twins:
                        twins[key].append(number)
                    else:
                        twins[key] = [number]
                        left.append((number, key))
                        self.asked += 1
                        yield question

            for place, reply in self._chat(unanswered()):
                _, key = left[place]
                line = {"key": key, "model": self.name, "who": self._who, **reply._asdict()}
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                refused += reply.refused
                self.failed += reply.text is None and not reply.refused
                kept[key] = reply  # for a question that comes again later in this call
                for number in twins[key]:
                    yield number, reply
            if not getattr(self._chat, "answered", True):
                self.failed += refused
            yield from known

    def _read(self) -> dict[str, Reply]:
        """Replies by key, without those that failed; ValueError for a damaged line that is not the last."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            return {}
        data = self._path.read_bytes()
        whole, found = data[: data.rfind(b"\n") + 1], {}
        if len(whole) < len(data):
            os.truncate(self._path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                told = json.loads(line)
                key, reply = told["key"], Reply(told["text"], told["fault"], told["cut"], told["sureness"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self._path}, line {number} is damaged ({error}); delete that line") from error
            if reply.text is not None:
                found[key] = reply
                self._answers = self._answers or told.get("who") == self._who
        return found


def ask(chat: Chat, questions: Iterable[Question]) -> list[Reply]:
    """All replies, in the order of the questions."""
    replies = dict(chat(questions))
    return [replies[number] for number in range(len(replies))]
