"""Turn samples (image, question, answer) into prompts, and mark the tokens that an SAE learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.prompts import Prompt
from lmm_sae_nb.support.images import open_rgb

COLUMNS = ["image", "question", "answer"]


def prompts(lmm: LMM, samples: Sequence[Mapping], order: Iterable[int], batch: int) -> Iterator[Prompt]:
    """Yield samples as prompts with answers, as in supervised fine-tuning, a batch at a time.

    lmm: formats and processes them.
    samples: rows with `image` (PIL or None), `question` and `answer`.
    order: numbers of the samples, in the order to yield them.
    batch: samples per prompt.

    Raises:
        OSError: files of the samples cannot be read; the message names the samples.
    """
    order = list(order)
    if hasattr(samples, "select_columns"):  # a data set decodes all pictures of a row, also label maps
        samples = samples.select_columns(COLUMNS)
    for start in range(0, len(order), batch):
        wanted = order[start : start + batch]
        try:
            rows = [samples[i] for i in wanted]
        except OSError as error:
            raise OSError(
                f"one of samples {', '.join(map(str, wanted))} cannot be read ({error}); restore the data set's "
                "files and run again: a training goes on from its last checkpoint"
            ) from error
        questions, images, answers = ([row[column] for row in rows] for column in ("question", "image", "answer"))
        yield lmm.prompt(questions, images, answers=answers)


def pictured(samples: Sequence[Mapping]) -> Sequence[Mapping]:
    """Return the samples that have an image, for models that need one, such as InstructBLIP.

    samples: rows, or a saved data set, of which no picture is decoded.
    """
    if not hasattr(samples, "with_format"):
        return [row for row in samples if row["image"] is not None]
    known = samples.select_columns(["image"]).with_format("arrow")
    return samples.select([n for n in range(len(samples)) if known[n]["image"][0].is_valid])


def token_mask(prompt: Prompt, kinds: Sequence[str]) -> Bool[Tensor, "batch tokens"]:
    """Mark the tokens of any of these kinds, on the device of the prompt's inputs."""
    return prompt.mask(*kinds).to(prompt.inputs["input_ids"].device)


def data_fingerprint(samples: Sequence[Mapping]) -> str:
    """Return a SHA-256 of the number of samples and of up to 16 whole samples, spread evenly over the data set."""
    if hasattr(samples, "select_columns"):
        samples = samples.select_columns(COLUMNS)
    digest = hashlib.sha256(str(len(samples)).encode())
    for place in np.linspace(0, len(samples) - 1, min(16, len(samples)), dtype=int).tolist():
        row = samples[place]
        pixels = b"" if row["image"] is None else open_rgb(row["image"], f"row {place}").tobytes()
        digest.update(repr((row["question"], row["answer"], len(pixels))).encode() + pixels)
    return digest.hexdigest()
