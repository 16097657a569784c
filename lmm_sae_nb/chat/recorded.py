"""Open a chat, and keep every reply on disk, so that a run that was killed does not ask again."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from lmm_sae_nb.chat.endpoint import EndpointChat
from lmm_sae_nb.chat.local import LocalChat
from lmm_sae_nb.chat.questions import Chat, Question
from lmm_sae_nb.chat.replies import Reply, read_text
from lmm_sae_nb.support.files import FULL, no_room, project_root, sync


def open_chat(
    model: str, *, key_variable: str = "", concurrency: int = 8, timeout: float = 120.0, batch_size: int = 4,
    max_new_tokens: int = 64, extra: Mapping[str, object] | None = None, confidence: bool = False,
) -> Chat:  # fmt: skip
    """Open the model that a parameter names.

    model: a folder of this project, a name on the hub, or an endpoint as name@http://host:port/v1.
    key_variable: the environment variable that holds the endpoint's key; "" if it wants none.
    concurrency: questions that an endpoint is asked at the same time.
    timeout: seconds that an endpoint's answer may take.
    batch_size: questions that a model in this process is asked at the same time.
    max_new_tokens: of an answer.
    extra: fields of an endpoint's request that are added, or left out if None, such as
        `{"max_tokens": None, "max_completion_tokens": 64}` or `{"chat_template_kwargs": {"enable_thinking": False}}`.
        A model in this process has no such fields.
    confidence: ask an endpoint for the probabilities of its tokens, which not every server reports. A model in this
        process always reports them.
    """
    name, at, address = model.partition("@http")
    if at:
        return EndpointChat(
            name, "http" + address, key_variable=key_variable, concurrency=concurrency, timeout=timeout,
            max_new_tokens=max_new_tokens, request=({"logprobs": True} if confidence else {}) | dict(extra or {}),
        )  # fmt: skip
    folder = project_root() / model
    return LocalChat.load(folder if folder.is_dir() else model, batch_size=batch_size, max_new_tokens=max_new_tokens)


class Recorded:
    """A chat that writes each reply to a file of JSON lines before it gives the reply back.

    A question with a reply in the file (same model, text and pixels: `Question.key`) is not asked. One that failed is
    asked again. Lines of other chats stay. A last line that was cut short is dropped, any other line that is no reply
    is reported and stays, and their questions are asked again. Only one process at a time may write the file.

    chat: the model to ask.
    path: the file; it is made if it is missing.
    failed: how many questions failed, without those that get no answer while others do (`Reply.refused`).
    damaged: how many lines of the file are no replies.
    asked_again: how many questions were asked more than once, in this run and earlier ones, whatever came of it.
    """

    def __init__(self, chat: Chat, path: str | Path):
        self.name, self.identity, self._chat, self._path = chat.name, chat.identity, chat, Path(path)
        self._chat_hash = hashlib.sha256(chat.identity.encode()).hexdigest()[:16]
        self.failed = 0
        self.damaged = 0
        self._replies: dict[str, Reply] = {}  # by key, of the questions that were asked
        self._tries: Counter[str] = Counter()  # how often each question of the file was asked, by key

    def __call__(self, questions: Iterable[Question]) -> Iterator[tuple[int, Reply]]:
        kept = self._read()
        with self._path.open("ab", buffering=0) as file:  # else closing it would write again after a full disk
            sync(self._path.parent)
            keys: list[str] = []  # of the questions that are asked
            known: list[tuple[int, Reply]] = []
            numbers: dict[str, list[int]] = {}  # by key; more than one if a question comes twice in this call
            refused = 0

            def unanswered() -> Iterator[Question]:
                for number, question in enumerate(questions):
                    key = question.key(self.identity)
                    if key in kept:
                        known.append((number, kept[key]))
                        self._replies[key] = kept[key]
                    elif key in numbers:
                        numbers[key].append(number)
                    else:
                        numbers[key] = [number]
                        keys.append(key)
                        yield question

            for place, reply in self._chat(unanswered()):
                key = keys[place]
                line = {"key": key, "model": self.name, "chat": self._chat_hash, **reply._asdict()}
                self._append(file, line)
                self._tries[key] += reply.tries
                refused += reply.refused
                self.failed += reply.text is None and not reply.refused
                kept[key] = self._replies[key] = reply  # for a question that comes again later in this call
                for number in numbers[key]:
                    yield number, reply
            if not getattr(self._chat, "answered", True):
                self.failed += refused
            yield from known

    def _append(self, file: FileIO, row: dict) -> None:
        line = json.dumps(row | {"crc32": _checksum(row)}).encode() + b"\n"
        try:
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError as error:
            raise (no_room(self._path, None, error) if error.errno in FULL else error) from error

    @property
    def counts(self) -> dict[str, int]:
        """What became of the questions so far, as `reply_counts` says it."""
        return reply_counts([self])

    @property
    def asked_again(self) -> int:
        return sum(self._tries[key] > 1 for key in self._replies)

    @property
    def replies(self) -> list[Reply]:
        """The replies to all questions so far, each question once."""
        return list(self._replies.values())

    def _read(self) -> dict[str, Reply]:
        """Return the replies in the file by key, without those that failed."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        data = self._path.read_bytes() if self._path.exists() else b""
        lines, replies, damaged = data.split(b"\n"), {}, []
        self._tries.clear()
        if lines[-1]:  # it lacks its end: whole if it is a reply, else what a crash has left
            whole = _as_reply(lines[-1]) is not None
            with self._path.open("ab") as file:
                file.write(b"\n") if whole else file.truncate(len(data) - len(lines.pop()))
        for number, line in enumerate(lines, 1):
            row = _as_reply(line)
            if row is None:
                damaged += [number] if line.strip() else []
                continue
            self._tries[row.key] += row.reply.tries
            if row.reply.text is not None:
                replies[row.key] = row.reply
                if row.chat == self._chat_hash and hasattr(self._chat, "answered"):
                    self._chat.answered = True  # so that it need not find out again that it answers
        if len(damaged) > self.damaged:
            warnings.warn(
                f"{self._path}: {len(damaged)} lines are no replies and are ignored, such as line {damaged[0]}; their "
                "questions are asked again",
                stacklevel=3,
            )
        self.damaged = len(damaged)
        return replies


class _Row(NamedTuple):
    key: str
    chat: str
    reply: Reply


def _checksum(row: Mapping[str, object]) -> str:
    """Return the CRC-32 of a line's entries, but for the checksum itself."""
    entries = {name: value for name, value in row.items() if name != "crc32"}
    return f"{zlib.crc32(json.dumps(entries).encode()):08x}"


def _as_reply(line: bytes) -> _Row | None:
    """Return a line of the file as the reply that it holds; None if it holds none.

    It is read like an answer that comes in now: what is no text is replaced, and a mere thought is no answer.
    """
    try:
        row = json.loads(line)
        text, confidence, tries = row["text"], row["confidence"], row.get("tries", 0)
        typed = (
            isinstance(row["key"], str) and isinstance(row["fault"], str) and isinstance(row["cut"], bool)
            and isinstance(text, str | None) and isinstance(tries, int)
            and (confidence is None or type(confidence) in (int, float) and 0 <= confidence <= 1)
            and row.get("crc32") in (None, _checksum(row))  # an older version wrote no checksum
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not typed:
        return None
    if text is None or not (text or tries):  # an older version did not tell an empty answer from a mere thought
        return _Row(row["key"], "", Reply(None, row["fault"], tries=tries or 1))
    reply = read_text(text, cut=row["cut"], confidence=confidence, tries=tries or 1)
    return _Row(
        row["key"], str(row.get("chat", "")), reply._replace(replaced=max(reply.replaced, row.get("replaced", 0)))
    )


def reply_counts(chats: Collection[Recorded]) -> dict[str, int]:
    """Return what became of the questions that chats with a common file were asked, as metrics: each question once.

    replies_failed: those that get another try in the next run (`Recorded.failed`).
    replies_refused: those that get no answer while others do, but for the next.
    replies_only_reasoned: those that the model reasoned about without an answer.
    replies_asked_again: those that were asked more than once, in this run and earlier ones, whatever came of it.
    replies_cut: answers that ran into their limit.
    replies_with_thoughts: answers from which a thought was cut off.
    replies_replaced_characters: characters of all answers that were no text.
    replies_damaged_lines: lines of the file that are no replies.
    """
    replies = [reply for chat in chats for reply in chat.replies]
    return {
        "replies_failed": sum(chat.failed for chat in chats),
        "replies_refused": sum(reply.refused and not reply.only_reasoned for reply in replies),
        "replies_only_reasoned": sum(reply.only_reasoned for reply in replies),
        "replies_asked_again": sum(chat.asked_again for chat in chats),
        "replies_cut": sum(reply.cut for reply in replies),
        "replies_with_thoughts": sum(reply.answer != reply.text for reply in replies),
        "replies_replaced_characters": sum(reply.replaced for reply in replies),
        "replies_damaged_lines": max((chat.damaged for chat in chats), default=0),
    }


def ask(chat: Chat, questions: Iterable[Question]) -> list[Reply]:
    """Ask all questions and return the replies in the order of the questions."""
    replies = dict(chat(questions))
    return [replies[number] for number in range(len(replies))]
