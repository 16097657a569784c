"""Ablate every active pair of held-out decisions and write book/ablations.json, a row for each layer.

This takes hours on a CPU. A run that was stopped goes on where it was. `python -m lmm_sae_nb.benchmarks ablations`
measures the SAE of notebook 01, `--sae data/artifacts/tiny/attribute/others/layer_4` one of notebook 07's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from datasets import load_from_disk

from lmm_sae_nb.attribute.agreement import agreement
from lmm_sae_nb.attribute.attribution import exact, greedy_decision, integrated, linear
from lmm_sae_nb.benchmarks.comparison import circumstances
from lmm_sae_nb.model.hookpoints import Hookpoint
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.support.files import fingerprint, project_root, read_json, write_json
from lmm_sae_nb.support.intervals import mean_interval
from lmm_sae_nb.support.stages import require
from lmm_sae_nb.support.tensor_files import metadata_in, open_tensors, save_tensors

WAYS = ("linear", "ig")
QUANTITIES = ("spearman", "sign")


def measure(place: SAEInPlace, sample: Mapping, folder: Path, batch: int = 4) -> dict[str, float | str]:
    """Compare the approximations with ablation at every active pair of one decision.

    sample: a row with question and image.
    folder: keeps the ablations; those that are there already are read, not computed.
    batch: ablations that run side by side.

    Raises:
        ValueError: the folder holds the ablations of another question, layer or model.
    """
    done = folder / "done.safetensors"
    key = {"question": sample["question"], "layer": str(place.layer), "model": place.lmm.fingerprint(place.layer)}
    if not done.is_file():
        choice = greedy_decision(place.lmm, sample["question"], sample["image"])
        values = {
            "exact": exact(place, choice, batch=batch, store=folder / "part.safetensors"),
            "linear": linear(place, choice).values,
            "ig": integrated(place, choice).values,
        }
        save_tensors(done, values, key)
        (folder / "part.safetensors").unlink(missing_ok=True)  # not there if no pair was active
    file = open_tensors(done)
    if metadata_in(file) != key:
        raise ValueError(f"{done} holds the ablations of {metadata_in(file)}, not of {key}; delete {folder.parent}")
    by_way = {way: agreement(file.get_tensor("exact"), file.get_tensor(way)) for way in WAYS}
    row = {"seed": sample.get("seed", -1), "question": sample["question"], "pairs": by_way["linear"].pairs}
    return row | {f"{name}_{way}": getattr(by_way[way], name) for way in WAYS for name in QUANTITIES}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this command's options to a parser."""
    root = project_root()
    parser.add_argument("--run", default="tiny", help="the run whose SAE is measured, unless --sae names another")
    parser.add_argument("--sae", type=Path, help="the folder of an SAE")
    parser.add_argument("--model", default="data/models/tiny-llava-next")
    parser.add_argument("--layer", type=int, help="counted from 0; by default the layer that the SAE was trained on")
    parser.add_argument("--heldout", type=Path, default=root / "data/artifacts/tiny/world/heldout")
    parser.add_argument("--decisions", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=root / "book" / "ablations.json")


def main(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        SystemExit: the file that it should write is another one.
    """
    root = project_root()
    if options.out.is_file() and "layers" not in read_json(options.out):
        raise SystemExit(f"{options.out} has no layers; delete it, or give another --out")
    torch.set_num_threads(options.threads)
    source = root / options.sae if options.sae else require(options.run, "train")
    model = root / options.model
    place = SAEInPlace.load(model if model.is_dir() else options.model, source, options.layer)
    hashes = {"sae": fingerprint(source / "sae.safetensors"), "model": place.lmm.fingerprint(place.layer)}
    folder = root / "data/artifacts" / options.run / "ablations" / hashes["sae"][:12]
    pictured, rows = (row for row in load_from_disk(options.heldout) if row["image"] is not None), []
    for number, sample in enumerate(islice(pictured, options.decisions)):
        rows.append(measure(place, sample, folder / f"{number:04d}"))
        print(number, rows[-1], flush=True)
        record(options.out, summary(rows, place.layer, hashes))


def record(path: Path, row: dict) -> None:
    """Write a layer's row into the file, unless the file has a row of more decisions for this layer."""
    rows = {known["layer"]: known for known in (read_json(path)["layers"] if path.is_file() else [])}
    if rows.get(row["layer"], row)["decisions"] <= row["decisions"]:
        rows[row["layer"]] = row
        write_json(path, {"layers": [rows[layer] for layer in sorted(rows)]})


def summary(rows: Sequence[dict], layer: Hookpoint, hashes: Mapping[str, str]) -> dict:
    """Summarise the decisions of a layer: means, from two decisions on with 99% intervals, and the circumstances.

    rows: as `measure` returns them.
    hashes: of the SAE and of the model.
    """
    row = circumstances() | hashes | {"layer": layer}
    row |= {"decisions": len(rows), "pairs": sum(each["pairs"] for each in rows)}
    if len(rows) > 1:
        for name in (f"{quantity}_{way}" for way in WAYS for quantity in QUANTITIES):
            row[name] = mean_interval([each[name] for each in rows])._asdict()
    return row | {"by_decision": list(rows)}
