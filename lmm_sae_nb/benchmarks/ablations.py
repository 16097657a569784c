"""Ablate every active pair of held-out decisions, in pieces, and write book/ablations.json, which has a row a layer.

Hours on a CPU; stopped, it goes on where it was. `python -m lmm_sae_nb.benchmarks.ablations` after notebook 01 is about
its SAE; `--sae data/artifacts/tiny/attribute/others/layer_4` about one of notebook 07's.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import torch
from datasets import load_from_disk

from lmm_sae_nb.attribute.agreement import agreement
from lmm_sae_nb.attribute.attribution import exact, greedy_decision, integrated, linear
from lmm_sae_nb.benchmarks.comparison import circumstances
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.support.files import fingerprint, project_root, read_json, write_json
from lmm_sae_nb.support.intervals import mean_interval
from lmm_sae_nb.support.stages import require
from lmm_sae_nb.support.tensor_files import open_tensors, save_tensors

WAYS = ("linear", "ig")


def measure(lmm: LMM, sae: TopKSAE, layer: int, sample: dict, folder: Path, batch: int = 4) -> dict[str, float]:
    """One decision: every active pair ablated, or read if it was before; how the approximations agree.

    ValueError if what is in the folder is of another decision, layer or model.
    """
    done = folder / "done.safetensors"
    of = {"question": sample["question"], "layer": str(layer), "model": lmm.fingerprint(layer)}
    if not done.is_file():
        choice = greedy_decision(lmm, sample["question"], sample["image"])
        parts = linear(SAEInPlace(lmm, sae, layer), choice)
        values = {"exact": exact(SAEInPlace(lmm, sae, layer), choice, batch=batch, store=folder / "part.safetensors")}
        values |= {"linear": parts.values, "ig": integrated(SAEInPlace(lmm, sae, layer), choice).values}
        save_tensors(done, values, of)
        (folder / "part.safetensors").unlink(missing_ok=True)  # not there if no pair was active
    file = open_tensors(done)
    if file.metadata() != of:
        raise ValueError(f"{done} holds the ablations of {file.metadata()}, not of {of}; delete {folder.parent}")
    found = {way: agreement(file.get_tensor("exact"), file.get_tensor(way)) for way in WAYS}
    row = {"seed": sample.get("seed", -1), "question": sample["question"], "pairs": found["linear"].pairs}
    return row | {f"{name}_{way}": getattr(found[way], name) for way in WAYS for name in ("spearman", "sign")}


def main() -> None:
    root = project_root()
    parser = argparse.ArgumentParser(prog="python -m lmm_sae_nb.benchmarks.ablations", description=__doc__)
    parser.add_argument("--run", default="tiny", help="whose SAE, unless --sae names another")
    parser.add_argument("--sae", type=Path, help="the folder of an SAE")
    parser.add_argument("--model", default="data/models/tiny-llava-next")
    parser.add_argument("--layer", type=int, help="0-based; without it the one that the SAE says it was trained on")
    parser.add_argument("--heldout", type=Path, default=root / "data/artifacts/tiny/world/heldout")
    parser.add_argument("--decisions", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=root / "book" / "ablations.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = root / asked.model
    lmm = LMM.load(model if model.is_dir() else asked.model)
    source = root / asked.sae if asked.sae else require(asked.run, "train", "sae.safetensors", "01_train_sae.py").parent
    sae = TopKSAE.load(source).requires_grad_(False).to(lmm.device)
    if asked.layer is None and sae.trained_on is None:
        parser.error(f"{source} does not say which layer the SAE was trained on; give --layer")
    layer = sae.trained_on.layer if asked.layer is None else asked.layer
    hashes = {"sae": fingerprint(source / "sae.safetensors"), "model": lmm.fingerprint(layer)}
    folder = root / "data/artifacts" / asked.run / "ablations" / hashes["sae"][:12]
    if asked.out.is_file() and "layers" not in read_json(asked.out):
        parser.error(f"{asked.out} has no layers; delete it, or give another --out")
    pictured, rows = (row for row in load_from_disk(asked.heldout) if row["image"] is not None), []
    for number, sample in enumerate(islice(pictured, asked.decisions)):
        rows.append(measure(lmm, sae, layer, sample, folder / f"{number:04d}"))
        print(number, rows[-1], flush=True)
        keep(asked.out, summary(rows, layer, hashes))


def keep(path: Path, told: dict) -> None:
    """Put what was told of a layer into the file, unless that knows of more decisions of this layer."""
    rows = {row["layer"]: row for row in (read_json(path)["layers"] if path.is_file() else [])}
    if rows.get(told["layer"], told)["decisions"] <= told["decisions"]:
        rows[told["layer"]] = told
        write_json(path, {"layers": [rows[layer] for layer in sorted(rows)]})


def summary(rows: list[dict], layer: int, hashes: dict[str, str]) -> dict:
    """Means over the decisions that are done, with 99 % intervals once there are two, and what they were of."""
    told = circumstances() | hashes | {"layer": layer}
    told |= {"decisions": len(rows), "pairs": sum(row["pairs"] for row in rows)}
    if len(rows) > 1:
        for name in (f"{kind}_{way}" for way in WAYS for kind in ("spearman", "sign")):
            told[name] = mean_interval([row[name] for row in rows])._asdict()
    return told | {"by_decision": rows}


if __name__ == "__main__":
    main()
