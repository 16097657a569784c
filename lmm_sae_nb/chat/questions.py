"""Questions with images, and the interface of all that can be asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL import Image

from lmm_sae_nb.chat.replies import Reply
from lmm_sae_nb.support.images import pixel_hash

IMAGES = "{images}"  # marks the place of a question's images in its text


@dataclass(frozen=True)
class Question:
    """One turn of the user.

    text: `{images}` marks the place of the images; without it they come first.
    images: as many as the model can take.
    """

    text: str
    images: tuple[Image.Image, ...] = ()

    def parts(self) -> list[str | Image.Image]:
        """Return text and images in their order, without empty text."""
        before, _, after = self.text.partition(IMAGES) if IMAGES in self.text else ("", "", self.text)
        return [part for part in (before, *self.images, after) if not isinstance(part, str) or part.strip()]

    def key(self, identity: str) -> str:
        """Return the SHA-256 of all that a reply depends on: the model, the text, every pixel.

        identity: of the chat that is asked.
        """
        digest = hashlib.sha256(json.dumps([identity, self.text, len(self.images)]).encode())
        for image in self.images:
            digest.update(pixel_hash(image).encode())
        return digest.hexdigest()


@runtime_checkable
class Chat(Protocol):
    """A model to ask. Called with questions, it yields (number of the question, reply) in any order, each at once.

    name: for people.
    identity: changes with everything that changes the replies.
    """

    name: str
    identity: str

    def __call__(self, questions: Iterable[Question]) -> Iterator[tuple[int, Reply]]: ...
