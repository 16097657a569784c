"""Train one SAE or several in one pass over the model (section 2.1).

Accelerate says how many processes work. Each holds all SAEs and its part of the tokens. Gradients, variances, losses
and the record of active latents are summed over the processes, so the SAE does not depend on their number.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import IterableDataset
from torch import Tensor

from lmm_sae_nb.model.data_identity import data_fingerprint
from lmm_sae_nb.model.hookpoints import Hookpoint, require_kinds
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.sample_checks import check_samples
from lmm_sae_nb.model.samples import require_choice
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.sae.adam import SAEAdam
from lmm_sae_nb.sae.formats import FORMATS
from lmm_sae_nb.sae.losses import geometric_median
from lmm_sae_nb.sae.topk import HISTORY, TopKSAE
from lmm_sae_nb.support.devices import allow_tf32
from lmm_sae_nb.support.files import clear_temporaries, read_json, temporaries, write_json
from lmm_sae_nb.support.images import UnreadableImage
from lmm_sae_nb.support.locks import clear_left, hold
from lmm_sae_nb.support.stages import code_fingerprints
from lmm_sae_nb.train import checkpoint
from lmm_sae_nb.train.checkpoint import Checkpoint
from lmm_sae_nb.train.kinds import new_sae
from lmm_sae_nb.train.sample_parts import Converted, LeftOut
from lmm_sae_nb.train.state import FREEZES, Learner, Recipe, Training, joined_settings
from lmm_sae_nb.train.steps import CHECKPOINTS, do_steps, gathered
from lmm_sae_nb.train.token_buffer import Position, Stream, mixed

LOGS = "logs"  # the folder of a tracker's files
REFUSED = "unreadable.json"  # beside the checkpoint: the samples that made a run stop
TRACKERS = ("none", "tensorboard", "trackio", "wandb")


class TrainResult(NamedTuple):
    """A trained SAE.

    history: one row every few steps, with the columns of `steps.ROW`.
    skipped: number of a sample that could not be read to the name and fault of its picture.
    converted: how many of the pictures were converted to 8-bit RGB, as `count_conversions` says it.
    """

    sae: TopKSAE
    history: list[dict[str, float]]
    skipped: Mapping[int, str] = MappingProxyType({})
    converted: Mapping[str, int] = MappingProxyType({})


def train_sae(
    lmm: LMM,
    samples: Sequence[Mapping] | IterableDataset,
    layer: Hookpoint,
    *,
    n_latents: int = 131_072,
    k: int = 256,
    lr: float | None = None,
    frozen: str = "",
    kind: str = "topk",
    folder: str | Path,
    on_log: Callable[[list[dict[str, float]]], object] | None = None,
    **settings,
) -> TrainResult:
    """Train an SAE on the output of one decoder layer, or at another hookpoint; save it and its history in `folder`.

    lmm: the model under study; it does not change.
    samples: as of `train_saes`.
    layer: 0-based, or the name of another hookpoint, such as "decoder.24.mlp".
    n_latents, k, lr, frozen, kind: as of `Recipe`.
    on_log: called with all rows of the history so far, after each new row.
    settings, errors: as of `train_saes`.
    """
    on_logs = None if on_log is None else lambda histories: on_log(histories[""])
    recipes = {"": Recipe(layer, n_latents, k, lr, frozen, kind)}
    return train_saes(lmm, samples, recipes, folder=folder, on_log=on_logs, **settings)[""]


def train_saes(
    lmm: LMM,
    samples: Sequence[Mapping] | IterableDataset,
    recipes: Mapping[str, Recipe],
    *,
    steps: int,
    batch_tokens: int = 8192,
    accumulate: int = 1,
    kinds: Sequence[str] = SAE_KINDS,
    seed: int = 42,
    auxk_alpha: float = 1 / 32,
    dead_after_tokens: int = 10_000_000,
    buffer_tokens: int | None = None,
    repeats: int = 1,
    batch_samples: int = 16,
    warm_steps: int | None = None,
    mixed_precision: str = "no",
    tf32: bool = True,
    k_aux: int = 0,
    workers: int = 0,
    unreadable: str = "refuse",
    folder: str | Path,
    checkpoint_minutes: float = 10.0,
    tracker: str = "none",
    log_every: int = 10,
    on_log: Callable[[dict[str, list[dict[str, float]]]], object] | None = None,
) -> dict[str, TrainResult]:
    """Train an SAE by each recipe, all on the same tokens of one pass over the model, and save it in folder/<name>.

    The loss of a batch is FVU + auxk_alpha * AuxK. The optimiser is `SAEAdam`, with warm-up and linear decay. On one
    CPU process each SAE gets the same bits as if it were trained alone with the same seed.

    Call again with the same arguments to continue after a kill: training goes on from the last checkpoint, and on one
    CPU process ends with the same bits. At the end the checkpoint is deleted, and each history.json records what was
    trained, so the same call returns the finished SAEs. If their files are damaged, they are trained again.

    Samples whose picture cannot be read can be left out. A training that stopped at one goes on when it is called with
    "skip", or when the picture is repaired. It also goes on with the same order if exactly the rows that it left out
    are then taken out of the data. With samples that differ otherwise (`data_fingerprint`) it does not go on.

    samples: rows with `image` (PIL or None), `question` and `answer`, as `check_samples` says. A data stream
        (IterableDataset) is read in its own order; its rows are checked as they come.
    recipes: by name; a name is its folder's.
    steps: optimiser steps.
    batch_tokens: tokens per batch, over all processes.
    accumulate: batches whose mean gradient makes one step.
    kinds: kinds of token to learn from.
    seed: of the first weights and of the order of tokens.
    auxk_alpha: weight of AuxK in the loss.
    dead_after_tokens: tokens without activation after which a latent counts as dead.
    buffer_tokens: tokens in the buffer that mixes samples, over all processes; None or 0: 16 batches. It holds every
        layer's states in the model's dtype. After a stop it is filled again.
    repeats: times that each token is in a batch, each time among other tokens of the buffer. The model computes it
        once, so a larger number costs fewer forward passes and shows fewer samples.
    batch_samples: samples per forward pass of the model.
    warm_steps: steps of warm-up; by default 5% of all.
    mixed_precision: "no", or "bf16" (autocast; weights stay float32).
    tf32: let a GPU compute the products of float32 in TF32.
    k_aux: latents of AuxK per token; 0 is half the width, as in the reference code. Fewer cost less time and memory.
    workers: threads that read and process the next samples while the model computes, each `batch_samples`.
    unreadable: "skip" leaves out samples whose picture cannot be read, or that the model's processor refuses, and names
        them in the result; "refuse" stops.
    folder: for the SAEs and the checkpoint, which takes up to six times the SAEs' size.
    checkpoint_minutes: minutes between checkpoints.
    tracker: one of TRACKERS.
    log_every: steps between rows of the history.
    on_log: called with the histories so far, by name, after each new row.

    Raises:
        ValueError: there are no samples or recipes, a sample is wrong, a name is no folder's, hidden states or a loss
            are not finite, the checkpoint is damaged, or it is of another run.
        UnreadableImage: a picture cannot be read, or the processor refuses it, with "refuse".
        ModuleNotFoundError: the tracker is not installed.
        OSError: samples cannot be read, or the disk is full. The last good checkpoint stays.
        FolderInUse: another run trains into this folder.
    """
    check_samples(samples, lmm)
    streams = isinstance(samples, IterableDataset)
    if min(1 if streams else len(samples), len(recipes), steps, accumulate, repeats) < 1:
        raise ValueError(
            f"{'a stream of' if streams else len(samples)} samples, {len(recipes)} recipes, {steps} steps of "
            f"{accumulate} batches, {repeats} repeats: there is nothing to train on; give at least one of each"
        )
    if wrong := [name for name in recipes if name in (CHECKPOINTS, LOGS) or not re.fullmatch(r"(\w[\w.+-]*)?", name)]:
        raise ValueError(f"{wrong} cannot name SAEs: a name is also a folder's; use letters, digits and _ . + -")
    require_choice(unreadable)
    for recipe in recipes.values():
        require_kinds(recipe.layer, kinds)
    shared = {
        "steps": steps, "batch_tokens": batch_tokens, "accumulate": accumulate, "kinds": list(kinds), "seed": seed,
        "auxk_alpha": auxk_alpha, "dead_after_tokens": dead_after_tokens,
        "buffer_tokens": buffer_tokens or 16 * batch_tokens, "batch_samples": batch_samples,
        "warm_steps": max(1, steps // 20) if warm_steps is None else warm_steps, "mixed_precision": mixed_precision,
        "samples": data_fingerprint(samples), "image_size": lmm.image_size and list(lmm.image_size),
    }  # fmt: skip
    shared |= {"repeats": repeats} if repeats != 1 else {}  # only what differs from before, so that older records hold
    shared |= {"k_aux": k_aux} if k_aux else {}
    shared |= {"tf32": True} if tf32 and lmm.device.type == "cuda" else {}
    runs = {name: shared | recipe.run(lmm) for name, recipe in recipes.items()}
    folder = Path(folder)
    accelerator = _accelerator(lmm, mixed_precision, accumulate, tracker, folder)
    with ExitStack() as after:
        after.callback(AcceleratorState._reset_state)  # so that another precision, or a launcher, may follow
        after.callback(lambda: [each.finish() for each in accelerator.trackers])
        done = _finished(folder, runs, unreadable)
        leftovers = _leftovers(folder, runs)
        accelerator.wait_for_everyone()  # nobody clears before all have looked
        if not done or leftovers:
            if accelerator.is_main_process:
                after.enter_context(hold(folder))
                _clear(folder, runs)
            accelerator.wait_for_everyone()  # nobody reads a checkpoint before leftovers are cleared
            done = done or _finished(folder, runs, unreadable)  # another run may have held the folder until now
        if done:
            if accelerator.is_main_process:
                if (folder / CHECKPOINTS).exists():
                    checkpoint.remove(folder / CHECKPOINTS)
                clear_left(folder)
            return {name: one._replace(sae=one.sae.to(lmm.device)) for name, one in done.items()}
        if tracker != "none":
            accelerator.init_trackers(
                "lmm-sae-nb", {name: _plain(value) for name, value in joined_settings(runs).items()}
            )
        saved = checkpoint.load(folder / CHECKPOINTS)
        left_out, converted = LeftOut(samples, {}, removed=False), Converted()
        if saved:
            if _repaired(samples, shared["samples"], saved, folder / CHECKPOINTS / REFUSED):
                shared["samples"] = saved.state["run"]["samples"]
                runs = {name: run | {"samples": shared["samples"]} for name, run in runs.items()}
            record = _record_of(saved, folder / CHECKPOINTS / REFUSED, shared["samples"])
            runs = {name: _of_record(run, record) for name, run in runs.items()}
            _require_same(saved.state["run"], joined_settings(runs), folder / CHECKPOINTS)
            left_out = _left_out(samples, shared["samples"], record, unreadable, folder / CHECKPOINTS)
            converted = Converted(saved.state.get("converted", {}))
        layers = [recipe.layer for recipe in recipes.values()]
        pace = {"workers": workers, "stride": accelerator.num_processes}
        stream = Stream(lmm, samples, layers, kinds, seed, batch_samples, unreadable, left_out, converted, **pace)
        after.callback(stream.close)
        after.enter_context(allow_tf32(tf32, lmm.device))
        training, batches = _begin(lmm, stream, accelerator, runs, saved)
        try:
            do_steps(training, batches, accelerator, shared, folder, checkpoint_minutes, log_every, on_log)
        except UnreadableImage:
            if (folder / CHECKPOINTS).is_dir():
                write_json(folder / CHECKPOINTS / REFUSED, left_out.record(), checked=True)
            raise
        if accelerator.is_main_process:
            _finish(training, folder)
        accelerator.wait_for_everyone()
    faults = dict(sorted(left_out.faults.items()))
    return {
        name: TrainResult(learner.sae, learner.history, faults, converted.counts)
        for name, learner in training.learners.items()
    }


def _accelerator(lmm: LMM, mixed_precision: str, accumulate: int, tracker: str, folder: Path) -> Accelerator:
    """Return accelerate's view of this process. A single process works on the model's device; with several the model
    moves to the device of each process."""
    if mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed_precision is {mixed_precision!r}; choose 'no' or 'bf16' (float16 overflows)")
    if tracker not in TRACKERS:
        raise ValueError(f"no tracker {tracker!r}; choose one of {', '.join(TRACKERS)}")
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ModuleNotFoundError(f"the tracker {tracker} is not installed; pip install {tracker}")
    accelerator = Accelerator(
        cpu=lmm.device.type == "cpu",
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=accumulate,
        log_with=None if tracker == "none" else tracker,
        project_dir=folder / LOGS,
    )
    if accelerator.num_processes > 1:
        lmm.model.to(accelerator.device)
    return accelerator


def _plain(value: object) -> object:
    """Return a setting as a tracker can take it."""
    return ", ".join(value) if isinstance(value, list) else value


# ---- the beginning and the end of a training --------------------------------------------------------------------


def _begin(
    lmm: LMM, stream: Stream, accelerator: Accelerator, runs: Mapping[str, Mapping], saved: Checkpoint | None
) -> tuple[Training, Iterator[tuple[dict[Hookpoint, Tensor], Position]]]:
    """Return the training as its last checkpoint left it, or before its first step, and the batches that follow."""
    start = Position(**saved.state["position"]) if saved else Position()
    any_run = next(iter(runs.values()))
    sizes = {name: any_run[name] for name in ("buffer_tokens", "batch_tokens", "seed")}
    sizes |= {"repeats": any_run.get("repeats", 1)}
    batches = mixed(stream, stream.parts_an_epoch, accelerator, **sizes, start=start)
    batches = ((stream.by_layer(tokens), position) for tokens, position in batches)
    learners = {name: _learner(lmm, run, accelerator) for name, run in runs.items()}
    training = Training(learners, start, stream.left_out, stream.converted)
    if saved:
        training.load(saved)
    else:
        first = next(batches)
        batches = itertools.chain([first], batches)
        middle = {layer: geometric_median(gathered(x.float(), accelerator)) for layer, x in first[0].items()}
        for learner in training.learners.values():
            learner.sae.b_dec.data.copy_(middle[learner.run["layer"]])
    return training, batches


def _learner(lmm: LMM, run: Mapping, accelerator: Accelerator) -> Learner:
    generator = torch.Generator().manual_seed(run["seed"])
    sae = new_sae(run.get("kind", "topk"), lmm.width_at(run["layer"]), run["n_latents"], run["k"], generator)
    sae.to(lmm.device_of(run["layer"]))
    if kept := FREEZES[run.get("frozen", "")]:
        getattr(sae, kept).requires_grad_(False)
    optimiser = accelerator.prepare_optimizer(SAEAdam(sae, run["lr"]), device_placement=False)
    return Learner(run, sae, optimiser, torch.zeros(sae.n_latents, dtype=torch.long, device=sae.W_dec.device))


def _require_same(saved: Mapping, run: Mapping, folder: Path) -> None:
    """Raise ValueError, naming the differences, if a checkpoint is of another run."""
    names = sorted(name for name in saved.keys() | run.keys() if saved.get(name) != run.get(name))
    if names:
        changes = "; ".join(f"{name} was {saved.get(name)!r}, is now {run.get(name)!r}" for name in names)
        raise ValueError(
            f"{folder} holds a checkpoint of another run: {changes}. Use the old settings, or delete the folder to "
            "start again"
        )


def _record_of(saved: Checkpoint, refused: Path, fingerprint: str) -> Mapping:
    """Return what a checkpoint says of the samples that it left out, together with those at which the run then stopped
    if exactly these have been taken out since.

    refused: the file that names the latter.
    fingerprint: of the samples as they are now.
    """
    with suppress(FileNotFoundError, ValueError):
        if (record := read_json(refused)).get("samples_left") == fingerprint:
            return saved.state | record
    return saved.state


def _repaired(samples: Sequence[Mapping] | IterableDataset, fingerprint: str, saved: Checkpoint, refused: Path) -> bool:
    """Return whether samples differ from those of a checkpoint only where pictures could not be read.

    fingerprint: of the samples as they are now.
    refused: the file that names those at which the run then stopped.
    """
    records = [saved.state]
    with suppress(FileNotFoundError, ValueError):
        records.append(read_json(refused))
    if fingerprint == saved.state["run"]["samples"] or isinstance(samples, IterableDataset):
        return False
    return any(
        data_fingerprint(samples, [int(number) for number in record["skipped"]]) == record["samples_left"]
        for record in records
        if record.get("skipped")
    )


def _of_record(run: Mapping, record: Mapping) -> dict:
    """Return a run as its record has it if its data are those of the record without the rows that it left out."""
    removed = record.get("samples_left") == run["samples"]
    return {**run, "samples": record["run"]["samples"]} if removed else dict(run)


def _left_out(
    samples: Sequence[Mapping] | IterableDataset, fingerprint: str, record: Mapping, unreadable: str, path: Path
) -> LeftOut:
    """Return the samples that a record says were left out.

    fingerprint: of the samples.

    Raises:
        ValueError: they are still among the samples, and are to be refused.
    """
    faults = {int(number): fault for number, fault in record.get("skipped", {}).items()}
    removed = bool(faults) and fingerprint != record["run"]["samples"]
    if faults and not removed and unreadable == "refuse":
        number, fault = next(iter(faults.items()))
        raise ValueError(
            f"{path} left out {len(faults)} samples that cannot be read, the first is {number} ({fault}); take these "
            "rows out, or leave them out (unreadable: skip)"
        )
    return LeftOut(samples, faults, removed)


def _finish(training: Training, folder: Path) -> None:
    """Write each SAE, then its history; then delete the checkpoint. After a kill in between the next call resumes."""
    counts = training.converted.counts
    converted = {"converted": counts} if counts else {}
    for name, learner in training.learners.items():
        (folder / name / HISTORY).unlink(missing_ok=True)
        earlier = FORMATS["sparsify" if learner.sae.activation.name == "jumprelu" else "saelens"]
        (folder / name / earlier.weights).unlink(missing_ok=True)  # of an SAE of another kind
        learner.sae.save(folder / name)
        record = {"rows": learner.history, "run": learner.run, "code": _code()}
        record |= {**training.left_out.record(), **converted}
        write_json(folder / name / HISTORY, record, checked=True)
    checkpoint.remove(folder / CHECKPOINTS)


def _finished(folder: Path, runs: Mapping[str, Mapping], unreadable: str) -> dict[str, TrainResult] | None:
    """Return the SAEs if this code has finished exactly these runs before and their files are whole; otherwise None."""
    found = {}
    for name, run in runs.items():
        path = folder / name / HISTORY
        if not path.is_file():
            return None
        try:
            record = read_json(path)
            if (record.get("run"), record.get("code")) != (_of_record(run, record), _code()):
                return None
            sae = TopKSAE.load(folder / name)
        except (FileNotFoundError, ValueError) as damage:
            warnings.warn(f"the SAE in {folder / name} is trained again: {damage}", stacklevel=3)
            return None
        left_out = _left_out((), run["samples"], record, unreadable, path)
        found[name] = TrainResult(sae, record["rows"], left_out.faults, record.get("converted", {}))
    return found


def _leftovers(folder: Path, names: Iterable[str]) -> bool:
    """Return whether there is a checkpoint, or a file that a killed process left."""
    return (folder / CHECKPOINTS).exists() or any(temporaries(folder / name) for name in names)


def _clear(folder: Path, names: Iterable[str]) -> None:
    """Delete the files that killed processes left."""
    for place in (folder, folder / CHECKPOINTS, *(folder / name for name in names)):
        clear_temporaries(place)


def _code() -> dict[str, str]:
    return code_fingerprints([sys.modules[__name__]])
