"""Turn samples (image, question, answer) into prompts, and choose the tokens to learn from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.prompts import Prompt

KINDS = ("base", "tiles", "newline", "text")  # special tokens are few, alike, and of outlying norm


def prompts(lmm: LMM, samples: Sequence[Mapping], order: Iterable[int], batch: int) -> Iterator[Prompt]:
    """Samples (image or None, question, answer) as in supervised fine-tuning, a batch at a time.

    OSError naming the samples if their files cannot be read.
    """
    order = list(order)
    if hasattr(samples, "select_columns"):  # a data set decodes every picture of a row, label maps too
        samples = samples.select_columns(["image", "question", "answer"])
    for start in range(0, len(order), batch):
        wanted = order[start : start + batch]
        try:
            rows = [samples[i] for i in wanted]
        except OSError as error:
            raise OSError(
                f"one of samples {', '.join(map(str, wanted))} cannot be read ({error}); restore the data set's "
                "files and run again: a training goes on from its last checkpoint"
            ) from error
        asked = [row["question"] for row in rows]
        yield lmm.prompt(asked, [row["image"] for row in rows], answers=[row["answer"] for row in rows])


def pictured(samples: Sequence[Mapping]) -> Sequence[Mapping]:
    """The samples that have an image: for a model that cannot do without one, as InstructBLIP's Q-Former.

    Of a saved data set no picture is decoded.
    """
    if not hasattr(samples, "with_format"):
        return [row for row in samples if row["image"] is not None]
    known = samples.select_columns(["image"]).with_format("arrow")
    return samples.select([n for n in range(len(samples)) if known[n]["image"][0].is_valid])


def token_mask(prompt: Prompt, kinds: Sequence[str]) -> Bool[Tensor, "batch tokens"]:
    return prompt.mask(*kinds).to(prompt.inputs["input_ids"].device)


def data_fingerprint(samples: Sequence[Mapping]) -> str:
    """What tells one data set from another: how many samples there are, and up to 16 of them in full (SHA-256)."""
    if hasattr(samples, "select_columns"):
        samples = samples.select_columns(["image", "question", "answer"])
    digest = hashlib.sha256(str(len(samples)).encode())
    for place in np.linspace(0, len(samples) - 1, min(16, len(samples)), dtype=int).tolist():
        row = samples[place]
        pixels = b"" if row["image"] is None else row["image"].convert("RGB").tobytes()
        digest.update(repr((row["question"], row["answer"], len(pixels))).encode() + pixels)
    return digest.hexdigest()
