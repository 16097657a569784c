"""Prepare the preset `small` from a local hub, and run every page at toy size: `rehearse.py FOLDER [PAGE ...]`.

The hub holds narrow random models under their true names. FOLDER becomes a project without data, and the pages run with
rehearsal.yaml, which extends `small` by sizes alone.
"""

import os
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

HERE = Path(__file__).parent

HUB_DATA = {
    "LLaVA-NeXT-Data": ("llava", {"train": 600}, 2),
    "COCO-Caption2017": ("coco", {"val": 10, "test": 2}, 1),
    "HallusionBench": ("hallusion", {"image": 40, "non_image": 2}, 1),
}


def main(folder: Path, *pages: str) -> int:
    from hub import Hub

    with Hub(folder / "hub") as hub:
        os.environ |= hub.environment(folder / "cache")  # before anything of the hub is imported
        os.environ.pop("TRANSFORMERS_OFFLINE", None)
        if not (folder / "project").exists():
            fill(folder / "hub")
            from toy_pages import make_project

            make_project(folder / "project", world=False)
            command = [sys.executable, "-m", "lmm_sae_nb.prepare", "--preset", "small"]
            subprocess.run(command, cwd=folder / "project", check=True)
            check_what_was_sent(hub)
        return run(folder / "project", pages)


def fill(hub: Path) -> None:
    """Write the models and data sets of the preset `small`."""
    import hub_data
    import hub_models

    for name, (make, splits, files) in HUB_DATA.items():
        hub_data.publish(hub, name, {split: getattr(hub_data, make)(rows) for split, rows in splits.items()}, files)
    hub_models.publish_small(hub)


def check_what_was_sent(hub) -> None:
    """The parquet files that are read were sent once, the others not at all."""
    for file in hub.folder.glob("datasets/**/*.parquet"):
        name = file.relative_to(hub.folder).as_posix()
        needed = file.name.startswith(("train", "val", "image"))
        most = file.stat().st_size + 70_000 if needed else 0  # the end of a file, with its index, comes first
        assert (hub.sent[name] > 0) == needed and hub.sent[name] <= most, f"{name}: {hub.sent[name]} bytes were sent"


def run(project: Path, pages: tuple[str, ...]) -> int:
    """Run the pages, one after the other; return how many failed."""
    import matplotlib
    import torch
    from toy_pages import name_latents, run_page

    from lmm_sae_nb.support import notebooks
    from lmm_sae_nb.support.presets import preset

    torch.set_num_threads(1)
    matplotlib.use("agg")
    os.chdir(project)
    values, failed = preset(HERE / "rehearsal.yaml"), 0
    for source in notebooks.sources(project):
        if pages and not source.stem.startswith(pages):
            continue
        began, used = time.monotonic(), time.process_time()
        try:
            run_page(source, values[source.stem])
            if source.stem.startswith("08"):
                for traps in one_answer(Path(values[source.stem]["traps"])):
                    run_page(source, values[source.stem] | {"traps": str(traps)})
            if source.stem.startswith("03"):  # page 06 needs latents of these names, which chance does not give
                name_latents(Path("data/artifacts/small/interpret/explanations.json"))
            print(
                f"{source.stem}: {time.monotonic() - began:.0f} s, {time.process_time() - used:.0f} CPU s", flush=True
            )
        except Exception:
            failed += 1
            print(f"{source.stem} FAILED\n{traceback.format_exc()[-3000:]}", flush=True)
    return failed


def one_answer(traps: Path) -> list[Path]:
    """Write the traps whose right answer is Yes, and those whose right answer is No; return where they are.

    The model answers one of the two for nearly all. So no case is wrong in one of them, and no case right in the other.
    """
    from datasets import load_from_disk

    rows, written = load_from_disk(traps), []
    for word in ("Yes", "No"):
        written.append(traps.with_name(f"traps_{word}"))
        if not written[-1].exists():
            numbers = [number for number, answer in enumerate(rows["answer"]) if answer == word]
            rows.select(numbers).save_to_disk(written[-1])
    return written


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
