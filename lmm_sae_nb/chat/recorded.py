"""Open a chat, and keep every reply on disk, so that a run that was killed does not ask again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lmm_sae_nb.chat.endpoint import EndpointChat
from lmm_sae_nb.chat.local import LocalChat
from lmm_sae_nb.chat.questions import Chat, Question, Reply
from lmm_sae_nb.support.files import project_root, sync


def open_chat(
    model: str, *, key_variable: str = "", concurrency: int = 8, timeout: float = 120.0, batch_size: int = 4,
    max_new_tokens: int = 64, confidence: bool = False,
) -> Chat:  # fmt: skip
    """Open the model that a parameter names.

    model: a folder of this project, a name on the hub, or an endpoint as name@http://host:port/v1.
    key_variable: the environment variable that holds the endpoint's key; "" if it wants none.
    concurrency: questions that an endpoint is asked at the same time.
    timeout: seconds that an endpoint's answer may take.
    batch_size: questions that a model in this process is asked at the same time.
    max_new_tokens: of an answer.
    confidence: ask an endpoint for the probabilities of its tokens, which not every server reports. A model in this
        process always reports them.
    """
    name, at, address = model.partition("@http")
    if at:
        return EndpointChat(
            name, "http" + address, key_variable=key_variable, concurrency=concurrency, timeout=timeout,
            max_new_tokens=max_new_tokens, request={"logprobs": True} if confidence else None,
        )  # fmt: skip
    folder = project_root() / model
    return LocalChat.load(folder if folder.is_dir() else model, batch_size=batch_size, max_new_tokens=max_new_tokens)


class Recorded:
    """A chat that writes each reply to a file of JSON lines before it gives the reply back.

    A question with a reply in the file (same model, text and pixels: `Question.key`) is not asked. One that failed is
    asked again. Lines of other chats stay. A last line that was cut short is dropped. Only one process at a time may
    write the file.

    chat: the model to ask.
    path: the file; it is made if it is missing.
    failed: how many questions failed, without those that an endpoint refused while it answered others.
    """

    def __init__(self, chat: Chat, path: str | Path):
        self.name, self.identity, self._chat, self._path = chat.name, chat.identity, chat, Path(path)
        self._chat_hash = hashlib.sha256(chat.identity.encode()).hexdigest()[:16]
        self.failed = 0

    def __call__(self, questions: Iterable[Question]) -> Iterator[tuple[int, Reply]]:
        kept = self._read()
        with self._path.open("ab") as file:
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
                    elif key in numbers:
                        numbers[key].append(number)
                    else:
                        numbers[key] = [number]
                        keys.append(key)
                        yield question

            for place, reply in self._chat(unanswered()):
                key = keys[place]
                line = {"key": key, "model": self.name, "chat": self._chat_hash, **reply._asdict()}
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                refused += reply.refused
                self.failed += reply.text is None and not reply.refused
                kept[key] = reply  # for a question that comes again later in this call
                for number in numbers[key]:
                    yield number, reply
            if not getattr(self._chat, "answered", True):
                self.failed += refused
            yield from known

    def _read(self) -> dict[str, Reply]:
        """Return the replies in the file by key, without those that failed.

        Raises:
            ValueError: a line that is not the last is damaged.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            return {}
        data = self._path.read_bytes()
        whole, replies = data[: data.rfind(b"\n") + 1], {}
        if len(whole) < len(data):
            os.truncate(self._path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                if "chat" not in row and "who" in row:
                    continue  # of a version that kept other fields: asked again
                key, reply = row["key"], Reply(row["text"], row["fault"], row["cut"], row["confidence"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self._path}, line {number} is damaged ({error}); delete that line") from error
            if reply.text is not None:
                replies[key] = reply
                if row["chat"] == self._chat_hash and hasattr(self._chat, "answered"):
                    self._chat.answered = True  # so that it need not find out again that it answers
        return replies


def ask(chat: Chat, questions: Iterable[Question]) -> list[Reply]:
    """Ask all questions and return the replies in the order of the questions."""
    replies = dict(chat(questions))
    return [replies[number] for number in range(len(replies))]
