"""TODO."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from PIL import Image

from lmm_sae_nb.support.images import pixel_hash

IMAGES = "{images}"  # where a question's images stand in its text


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
