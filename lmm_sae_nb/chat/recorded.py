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
from lmm_sae_nb.support.files import sync


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
