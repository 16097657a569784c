"""Rows of a data set as samples, images or traps; whatever does not fit is refused with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from datasets import Features, Image, List, Value

from lmm_sae_nb.model.sample_checks import row_fault
from lmm_sae_nb.prepare.recipe import Source
from lmm_sae_nb.support.images import picture_fault

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
TEXT = Value("string")
CONVERSATIONS = Features(images=List(Image()), conversation=List({"role": TEXT, "content": TEXT}))
EXCHANGES = Features(image=Image(), question=TEXT, answer=TEXT)
IMAGES = Features(image=Image(), source=TEXT)
TRAPS = Features(image=Image(), question=TEXT, answer=TEXT, taught=TEXT, group=TEXT, part=TEXT)


class Unfit(ValueError):
    """Raised for a record that cannot become a row; the message is the reason."""


def features_of(kind: str, source: Source) -> Features:
    """Return the columns that a source's rows get.

    kind: samples, images or traps.
    """
    if kind == "samples":
        return CONVERSATIONS if "conversation" in source.columns else EXCHANGES
    return IMAGES if kind == "images" else TRAPS


def as_row(kind: str, source: Source, record: Mapping, random: Random) -> dict[str, Any]:
    """Return a record of a source as a row; pictures keep their bytes.

    kind: samples, images or traps.
    random: draws the part of a trap.

    Raises:
        Unfit: it cannot become one.
        KeyError: the source has no such column.
    """
    columns = source.columns
    values = {ours: record[theirs] for ours, theirs in columns.items()}
    pictures = _pictures(values.get("images") if "images" in columns else values.get("image"))
    if kind == "images":
        if not pictures:
            raise Unfit("it has no image")
        return {"image": pictures[0], "source": source.source}
    if kind == "samples" and "conversation" in columns:
        row = {"images": pictures, "conversation": _conversation(values["conversation"])}
    else:
        if len(pictures) > 1:
            raise Unfit(f"it has {len(pictures)} images and one question; give a conversation")
        answer = values.get("answer")
        answer = source.answers.get(str(answer), answer)
        question = values.get("question")
        question = question.replace("<image>", "").strip() if isinstance(question, str) else question
        row = {"image": pictures[0] if pictures else None, "question": question, "answer": answer}
    if fault := row_fault(row):
        raise Unfit(fault)
    return row | _trap(row, values, source, random) if kind == "traps" else row


def _trap(row: Mapping, values: Mapping, source: Source, random: Random) -> dict[str, str]:
    if row["image"] is None:
        raise Unfit("it has no image that could contradict memory")
    taught = values.get("taught")
    if taught is None:
        others = sorted(set(source.answers.values()) - {row["answer"]})
        if len(others) != 1:
            raise Unfit(f"the answer {row['answer']!r} is not one of two; give a column `taught`")
        (taught,) = others
    return {"taught": taught, "group": str(values.get("group", "")), "part": random.choice(["choose", "report"])}


def _conversation(turns: Any) -> Any:
    """Return a conversation with the roles user, assistant and system; faults are left to the check of the row."""
    if not isinstance(turns, list):
        return turns
    found = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            return turns
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        found.append({"role": ROLES.get(role, role), "content": content})
    return found


def _pictures(image: Any) -> list[dict]:
    """Return one image or a list of them, as bytes."""
    given = image if isinstance(image, list) else [image]
    return [_encoded(each, number) for number, each in enumerate(given) if each is not None]


def _encoded(image: Any, number: int) -> dict:
    """Return an image's bytes, if they begin as those of a picture do."""
    if not isinstance(image, Mapping):
        raise Unfit(f"image {number} is {image!r:.60}, no picture; name another column")
    try:
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    except (OSError, TypeError) as error:
        raise Unfit(f"image {number} cannot be read ({error})") from error
    if fault := picture_fault(data):
        raise Unfit(f"image {number} is no picture ({fault:.80})")
    return {"bytes": data, "path": None}
