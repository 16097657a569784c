"""Read what a model sends back. Every reply comes in through this file: of an endpoint, of a model in this process, and
on record; explainer, refiner, labeller and judges read `Reply.answer`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

UNREADABLE = "\ufffd"  # the replacement character, for what is no text
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")  # all but white space
TAG = re.compile(  # [THINK] alone in square brackets: prompts use marks such as [REASONING]:
    r"(?:[<◁]|\[(?=/?think\])) ?(/?) ?(think(?:ing)?|thoughts?|reasoning) ?(/?)[>\]▷]", re.IGNORECASE
)
REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking")  # fields of a message, by server
CUT = ("length", "content_filter")  # the reasons to finish that leave an answer incomplete
ONLY_REASONED = "no answer, the model only reasoned: raise max_new_tokens or switch thinking off"


class Reply(NamedTuple):
    """The reply to one question.

    text: as the model wrote it, thoughts included, without what is no text (`readable`); None if there is no answer.
    fault: why there is no answer.
    cut: whether the text ran into its limit of tokens, or into a filter.
    confidence: the probability that the model gives this very text, the product over its tokens (those of a thought
        are among them), in [0, 1]; None if the server does not report it.
    refused: whether this very question gets no answer, while others may: status 400, 413 or 422, a refusal, a filter, a
        call for a tool, or nothing but reasoning.
    only_reasoned: whether the model reasoned and gave no answer.
    replaced: characters that stand for what was no text, and are `UNREADABLE` now.
    tries: how often it was asked until this reply came, or until there was no use in asking again.
    """

    text: str | None
    fault: str = ""
    cut: bool = False
    confidence: float | None = None
    refused: bool = False
    only_reasoned: bool = False
    replaced: int = 0
    tries: int = 1

    @property
    def answer(self) -> str | None:
        """The text without thoughts, which is to be read; None if there is no answer."""
        return None if self.text is None else without_thoughts(readable(self.text))


def readable(text: str) -> str:
    """Return a text that can be written: halves of surrogate pairs and control characters become `UNREADABLE`."""
    paired = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return CONTROL.sub(UNREADABLE, paired)


def without_thoughts(text: str) -> str:
    """Return what stands outside of <think>...</think> and its relatives (`TAG`), without space at its ends.

    Blocks may be nested. A block that is not closed reaches to the end; one that is not opened begins with the text, as
    many chat templates open it in the prompt.
    """
    kept, opened, at = [], [], 0
    count: Counter[str] = Counter()  # of each name among `opened`
    for tag in TAG.finditer(text):
        closes, name, empty = tag[1], tag[2].lower(), tag[3]
        if not opened:
            kept.append(text[at : tag.start()])
        at = tag.end()
        if closes and not opened:
            kept = []
        elif closes and count[name]:
            last = ""
            while last != name:
                last = opened.pop()
                count[last] -= 1
        elif not closes and not empty:
            opened.append(name)
            count[name] += 1
    if not opened:
        kept.append(text[at:])
    answer = "".join(kept).strip()
    if opened and not answer:  # a thought may mention <think>: then what follows the last end is the answer
        ends = [tag for tag in TAG.finditer(text) if tag[1]]
        rest = text[ends[-1].end() :] if ends else ""
        answer = (rest[: opening.start()] if (opening := TAG.search(rest)) else rest).strip()
    return answer


def read_text(
    text: str, *, cut: bool = False, confidence: float | None = None, reasoned: bool = False, tries: int = 1
) -> Reply:
    """Return the reply that a text is.

    reasoned: whether the server says that the model has reasoned, so that no text is no answer.
    cut, confidence, tries: as in `Reply`.
    """
    clean = readable(text).strip()
    if not without_thoughts(clean) and (clean or reasoned):
        return Reply(None, ONLY_REASONED, refused=True, only_reasoned=True, tries=tries)
    return Reply(clean, "", cut, confidence, replaced=clean.count(UNREADABLE), tries=tries)


def read_completion(body: bytes, *, with_confidence: bool = False, tries: int = 1) -> Reply:
    """Return the reply that the body of a chat completion holds: the first of its choices.

    body: UTF-8; what is not becomes `UNREADABLE`.
    with_confidence: whether the probabilities of the tokens were asked for.
    tries: as in `Reply`.

    Raises:
        ValueError: the body is no completion, or an error. The message can be as long as the body, and may hold what
            the server was sent, such as a key.
    """
    text = body.decode("utf-8-sig", "replace")
    try:
        completion = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer is no chat completion: {text!r}") from error
    choices, error = _at(completion, "choices"), _at(completion, "error")
    choice = choices[0] if isinstance(choices, list) and choices else None
    error = error or _at(choice, "error")
    if error or _at(choice, "finish_reason") == "error":
        raise ValueError(f"the answer is an error: {json.dumps(error)}")
    message, reason = _at(choice, "message"), _at(choice, "finish_reason")
    if not isinstance(message, Mapping):
        raise ValueError(f"the answer is no chat completion: {text!r}")
    content, thought = _text_of(message.get("content"))
    used = _at(completion, "usage", "completion_tokens_details", "reasoning_tokens")
    thought = thought or any(message.get(name) for name in REASONING) or (isinstance(used, int) and used > 0)
    if not content.strip() and (why := _no_answer(message, reason)):
        return Reply(None, why, refused=True, tries=tries)
    tokens = _at(choice, "logprobs", "content") if with_confidence else None
    return read_text(
        content, cut=reason in CUT, confidence=_confidence(tokens), reasoned=thought or reason == "length", tries=tries
    )


def _at(value: object, *path: str) -> object:
    """Return what is found by these names, one in the other; None if there is no such thing."""
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _text_of(content: object) -> tuple[str, bool]:
    """Return the text of a message's content, and whether one of its parts is a thought.

    Raises:
        ValueError: it is neither text, nor a list of parts, nor null.
    """
    if content is None or isinstance(content, str):
        return content or "", False
    if not isinstance(content, list):
        raise ValueError(f"the answer's content is no text but a {type(content).__name__}")
    texts, thought = [], False
    for part in content:
        kind = "text" if isinstance(part, str) else _at(part, "type")
        text = part if isinstance(part, str) else _at(part, "text")
        if kind in ("text", "output_text") and isinstance(text, str):
            texts.append(text)
        thought = thought or kind in ("thinking", "reasoning")
    return "".join(texts), thought


def _no_answer(message: Mapping, reason: object) -> str:
    """Return why a message without text is no answer; "" if it does not say."""
    if message.get("refusal"):
        return f"the model refuses to answer: {message['refusal']}"
    if reason == "content_filter":
        return "no answer, the endpoint's content filter stopped it"
    if message.get("tool_calls") or message.get("function_call"):
        return "no answer, the model called a tool: switch tools off"
    return ""


def _confidence(tokens: object) -> float | None:
    """Return the probability of all tokens; None if they are not reported.

    Raises:
        ValueError: they are no logarithms of probabilities.
    """
    if not tokens:
        return None
    logprobs = [_at(token, "logprob") for token in tokens] if isinstance(tokens, list) else [None]
    for value in logprobs:
        if isinstance(value, bool) or not isinstance(value, int | float) or not value < 0.01:
            raise ValueError(f"the answer's logprobs hold {str(value)[:30]}, which is no logarithm of a probability")
    return math.exp(min(0.0, sum(logprobs)))
