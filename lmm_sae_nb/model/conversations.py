"""Conversations as samples hold them: turns with a role and a text, in which a mark stands for each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MARK = "<image>"  # the place of the next image in a turn's text
ROLES = ("system", "user", "assistant")


def as_turns(conversation: Sequence[Mapping]) -> list[dict]:
    """Return a conversation as chat templates take it: the content of a turn is a list of texts and images.

    White space between a mark and the end of its turn is a separator of whoever wrote the data. It is left out, because
    the template writes that of the model.

    conversation: turns with `role` and `content`; MARK stands for an image.
    """
    turns = []
    for turn in conversation:
        pieces = turn["content"].split(MARK)
        full = [number for number, piece in enumerate(pieces) if piece.strip()]
        if len(pieces) > 1:
            first, last = (full[0], full[-1]) if full else (len(pieces), -1)
            pieces = [piece if first <= number <= last else "" for number, piece in enumerate(pieces)]
            if first > 0 and full:
                pieces[first] = pieces[first].lstrip()
            if full and last < len(pieces) - 1:
                pieces[last] = pieces[last].rstrip()
        content = []
        for number, piece in enumerate(pieces):
            content += [{"type": "image"}] * (number > 0)
            content += [{"type": "text", "text": piece}] * bool(piece)
        turns.append({"role": turn["role"], "content": content or [{"type": "text", "text": ""}]})
    return turns


def conversation_fault(conversation: Any, images: int) -> str:
    """Return what is wrong with a conversation, and what to do; "" if nothing is.

    images: how many come with it.
    """
    if not isinstance(conversation, list | tuple) or not conversation:
        return f"conversation is {conversation!r:.60}; give a list of turns, each with role and content"
    last = ""
    for number, turn in enumerate(conversation):
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            return f"turn {number} is {turn!r:.60}; give a dictionary with role and content"
        role, content = turn["role"], turn["content"]
        if role not in ROLES:
            return f"turn {number} has the role {role!r}; choose one of {', '.join(ROLES)}"
        if not isinstance(content, str):
            return f"the content of turn {number} is {content!r:.60}, not text; write it, with {MARK} for an image"
        if role == "system" and number:
            return f"turn {number} is of the system; only the first turn can be"
        if role == "assistant" and last != "user":
            return f"turn {number} is an answer without a question; add the question, or take the sample out"
        if role == last:
            return f"turns {number - 1} and {number} are both of the {role}; join them, or take the sample out"
        if role == "assistant" and MARK in content:
            return f"the answer in turn {number} holds the mark {MARK}, but a model shows no images; take it out"
        last = role
    if last != "assistant":
        return f"its last turn is of the {last}, so the answer is missing; add it, or take the turn out"
    marks = sum(turn["content"].count(MARK) for turn in conversation)
    if marks != images:
        return f"its turns hold the mark {MARK} {marks} times for {images} images; write one for each image"
    return ""


def first_exchange(conversation: Sequence[Mapping]) -> tuple[str, str, int]:
    """Return the first question without its marks, its answer, and how many images come before the answer."""
    asked, (question, answer) = 0, ("", "")
    for number, turn in enumerate(conversation):
        asked += turn["content"].count(MARK)
        if turn["role"] == "user":
            question, answer = turn["content"].replace(MARK, "").strip(), conversation[number + 1]["content"]
            break
    return question, answer, asked
