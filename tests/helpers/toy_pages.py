"""Run pages of the book at toy size, one after the other, in this process: `toy_pages.py FOLDER DTYPE [PAGE ...]`.

In bfloat16 they run as with the preset `paper`: without a ground truth, and page 05 without other sizes. In float32
they run with an SAE of the output of an MLP.

The cells are those that `make book` runs. All models are on the pretend device; the model under study is of the dtype.
FOLDER becomes a small copy of the project, with a small Picture World.
"""

import os
import sys
import time
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import torch

from lmm_sae_nb.benchmarks.faults_pages import name_latents
from lmm_sae_nb.pictureworld.world.datasets import render
from lmm_sae_nb.support import notebooks
from lmm_sae_nb.support.presets import preset

HERE = Path(__file__).parent
SCENES = {"train": 160, "cache": 60, "heldout": 40, "traps": 60}
SPECIAL = {"bfloat16": {"concepts": "", "sizes": [], "ks": []}, "float32": {"layer": "decoder.1.mlp"}}


def make_project(folder: Path, world: bool = True) -> None:
    """Make a folder that is like the repository, but holds no results, and a small world or no data at all."""
    (folder / "data/artifacts/tiny").mkdir(parents=True)
    for name in ("pyproject.toml", "notebooks", "book", "lmm_sae_nb", "data/models", "data/pictureworld"):
        (folder / name).symlink_to(notebooks.REPOSITORY / name)
    if world:
        os.chdir(folder)
        render(folder / "data/artifacts/tiny/world", SCENES)


def run_page(source: Path, values: dict) -> None:
    """Run the cells of a page, with these parameters behind its own."""
    notebook = Path("build") / f"{source.stem}.ipynb"
    notebooks.convert(source, notebook)
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{source.name}, cell {number}", "exec"), namespace)
            if "parameters" in cell.metadata.get("tags", []):
                namespace.update(values)
            plt.close("all")


def main(folder: Path, dtype: str, *pages: str) -> None:
    from pretend_device import pretend_device  # it stays registered, so only this command's process may have it

    torch.set_num_threads(1)
    matplotlib.use("agg")
    if not folder.exists():
        make_project(folder)
    os.chdir(folder)
    toy = preset(HERE / "toy.yaml")
    for source in notebooks.sources(folder):
        if pages and not source.stem.startswith(pages):
            continue
        values, began = toy[source.stem], time.monotonic()
        if "loading" in (known := notebooks.parameters(source)):
            values = values | {"loading": known["loading"].default | {"dtype": dtype}}
        values = values | {name: value for name, value in SPECIAL[dtype].items() if name in known}
        with pretend_device():
            run_page(source, values)
        if source.stem.startswith("03"):
            name_latents(Path("data/artifacts/toy/interpret/explanations.json"))
        print(f"{source.stem}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(Path(sys.argv[1]), *sys.argv[2:])
