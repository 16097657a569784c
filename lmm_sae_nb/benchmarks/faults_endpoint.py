"""Faults of an endpoint: a server on loopback that misbehaves in every way of `faulty_server.FAULTS`."""

from __future__ import annotations

import base64
import os
import random
from pathlib import Path

from lmm_sae_nb.benchmarks.faults_endings import Ending, error_ending
from lmm_sae_nb.benchmarks.faults_processes import done
from lmm_sae_nb.benchmarks.faults_world import Usual, World, begin_project
from lmm_sae_nb.benchmarks.faulty_server import FAULTS, KEY, ONCE, Result, serving
from lmm_sae_nb.chat.endpoint import EndpointChat
from lmm_sae_nb.chat.questions import Question, Reply
from lmm_sae_nb.chat.recorded import Recorded, ask

QUESTIONS, FAULTY = 100, 0.09  # of an attempt, and the fraction that meets a fault
TIMEOUT, RETRIES = 0.5, 1
MOST = 3  # times in a run that a question may be asked that gets no answer, or nothing but reasoning
USELESS = [name for name, ending in FAULTS.items() if ending is Result.STOP]
SINGLE = [name for name in FAULTS if name not in USELESS]


def endpoint(world: World, place: Path, seed: int) -> Ending:
    """Ask an endpoint that misbehaves, in a process of its own, and ask again what failed."""
    begin_project(place)
    job = useless_endpoint if seed % 6 == 5 else faulty_endpoint
    ended = done(lambda world, place: job(place, seed), world, place)
    return ended.result if isinstance(ended, Usual) else ended._replace(case=f"seed {seed}")


def faulty_endpoint(place: Path, seed: int) -> Ending:
    """Ask a hundred questions of which 9% meet a fault, twice: none is answered wrongly, none asked without need.

    What each fault calls for is written beside the server. A fault of one time is gone when the question comes again.
    """
    rng = random.Random(f"endpoint {seed}")
    texts = [f"question {seed} {number}" for number in range(QUESTIONS)]
    faults = {text: rng.choice(SINGLE) + rng.choice(("", ONCE)) for text in texts if rng.random() < FAULTY}
    case = f"{QUESTIONS} questions, {', '.join(faults.values())}"
    os.environ["FAULTY_KEY"] = KEY
    with serving(key=KEY, choose=lambda request: faults.get(request.text, "none")) as server:
        settings = dict(key_variable="FAULTY_KEY", concurrency=8, timeout=TIMEOUT, retries=RETRIES, max_bytes=2**16)
        for turn in (1, 2):
            chat = Recorded(EndpointChat("a model", server.url, stop_after=50, **settings), place / "replies.jsonl")
            replies = dict(zip(texts, ask(chat, [Question(text) for text in texts]), strict=True))
            times = server.times()
            for text, reply in replies.items():
                fault = faults.get(text, "")
                if wrong := _wrong(text, fault, reply, turn):
                    return Ending(case, "another result", f"{fault or 'no fault'}, turn {turn}: {wrong}")
                again = Result(_right(fault)) in (Result.FAULT, Result.REFUSED)
                if times[text] > (turn * MOST if again else 1):
                    return Ending(case, "asked twice", f"{fault or 'no fault'}: {times[text]} times")
            if part := _part_of_key((place / "replies.jsonl").read_text() + repr(replies)):
                return Ending(case, "key shown", f"{len(part)} characters of the key are on record")
    return Ending(case, "as usual")


def _right(fault: str) -> Result:
    return FAULTS[fault.removesuffix(ONCE)] if fault else Result.ANSWER


def _wrong(text: str, fault: str, reply: Reply, turn: int) -> str:
    """Return what is wrong with a reply; "" if nothing is."""
    right, said = _right(fault), f"heard: {text}"
    passed = fault.endswith(ONCE) and right in (Result.FAULT, Result.REFUSED)  # the question may have come again
    answer, brief = reply.answer, f"{reply.answer!r} {reply.fault}"[:160]
    if passed:
        return "" if answer == said or (turn == 1 and answer is None and reply.fault) else brief
    if right in (Result.FAULT, Result.REFUSED):
        return "" if answer is None and reply.fault else brief
    if right is Result.CUT:
        return "" if reply.cut or answer is None else "it does not count as cut"
    return "" if answer and said in answer and "<" not in answer else brief


def useless_endpoint(place: Path, seed: int) -> Ending:
    """Ask an endpoint that it is useless to ask, or give a strange key: a clear error, without the key, and soon."""
    rng = random.Random(f"endpoint {seed}")
    fault, key = rng.choice(USELESS), rng.choice((KEY, f"{KEY}\n", f"{KEY}\t", f"{KEY} x  y", f"{KEY}\u00e9"))
    case = f"every question meets {fault}, the key ends in {key[-3:]!r}"
    os.environ["FAULTY_KEY"] = key
    with serving(choose=lambda request: fault) as server:
        try:
            chat = EndpointChat("a model", server.url, key_variable="FAULTY_KEY", concurrency=4, timeout=TIMEOUT)
            replies = ask(chat, [Question(f"question {number}") for number in range(60)])
        except Exception as error:
            if _part_of_key(f"{error!r} {error.__cause__!r} {error.__context__!r}"):
                return Ending(case, "key shown", "the key is in the error")
            if len(server.requests) > 12:
                return Ending(case, "asked twice", f"{len(server.requests)} requests to a useless endpoint")
            return error_ending(case, error, [server.url, "FAULTY_KEY"])
        return Ending(case, "another result", f"no error, {replies[0]}"[:200])


def _part_of_key(text: str) -> str:
    """Return the first eight characters of the key that stand in a text together, plain or in base64; "" if none do."""
    secret = KEY.removeprefix("sk-")
    coded = base64.b64encode(f"Bearer {KEY}".encode()).decode().removeprefix("QmVhcmVyIHNrL")
    parts = (each[at : at + 8] for each in (secret, coded) for at in range(len(each) - 7))
    return next((part for part in parts if part in text), "")


KINDS = {"endpoint": (endpoint, 36, "a hundred questions, asked twice, of which 9% meet a fault")}
