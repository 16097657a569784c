"""Prepare a preset from a local hub, and run every page at toy size: `rehearse.py FOLDER [--preset paper] [PAGE ...]`.

The hub holds narrow random models under their true names. FOLDER becomes a project without data, and the pages run with
rehearsal.yaml, which extends `small` by sizes alone, or with rehearsal_paper.yaml. The models that `paper` asks through
endpoints answer from this process, at the ports that the preset names.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
import traceback
import warnings
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

HERE = Path(__file__).parent

TRAPS = ("hallusion", {"image": 40, "non_image": 2}, 1)
HUB_DATA = {
    "small": {
        "LLaVA-NeXT-Data": ("llava", {"train": 600}, 2),
        "COCO-Caption2017": ("coco", {"val": 10, "test": 2}, 1),
        "HallusionBench": TRAPS,
    },
    "paper": {
        "LLaVA-NeXT-Data": ("llava", {"train": 1500}, 2),  # 1,000 are held out
        "sae-sample-cache-dataset": ("sampled", {"train": 10}, 1),
        "HallusionBench": TRAPS,
    },
}
RUNS = {"small": "rehearsal.yaml", "paper": "rehearsal_paper.yaml"}
ENDPOINTS = {"explainer": "[EXPLANATION]: red things", "refiner": "red things", "labeller": "colour"}


def main(folder: Path, name: str, *pages: str) -> int:
    from hub import Hub

    with Hub(folder / "hub") as hub, ExitStack() as servers:
        os.environ |= hub.environment(folder / "cache")  # before anything of the hub is imported
        os.environ.pop("TRANSFORMERS_OFFLINE", None)
        if not (folder / "project").exists():
            fill(folder / "hub", name)
            from toy_pages import make_project

            make_project(folder / "project", world=False)
            command = [sys.executable, "-m", "lmm_sae_nb.prepare", "--preset", name]
            subprocess.run(command, cwd=folder / "project", check=True)
            check_what_was_sent(hub)
            print(f"prepare: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime:.0f} CPU s", flush=True)
        if name == "paper":
            for port, reply in endpoints().items():
                servers.enter_context(answering(port, reply))
        return run(folder / "project", name, pages)


def fill(hub: Path, name: str) -> None:
    """Write the models and data sets of a preset."""
    import hub_data
    import hub_models

    for data, (make, splits, files) in HUB_DATA[name].items():
        hub_data.publish(hub, data, {split: getattr(hub_data, make)(rows) for split, rows in splits.items()}, files)
    getattr(hub_models, f"publish_{name}")(hub)


def check_what_was_sent(hub) -> None:
    """The parquet files that are read were sent once, the others not at all.

    PyArrow first reads the last 64 KiB of a file. If the file's index is longer, it then reads the index.
    """
    for file in hub.folder.glob("datasets/**/*.parquet"):
        name = file.relative_to(hub.folder).as_posix()
        needed = file.name.startswith(("train", "val", "image"))
        index = int.from_bytes(file.read_bytes()[-8:-4], "little") + 8
        most = file.stat().st_size + 2**16 + (index if index > 2**16 else 0) if needed else 0
        assert (hub.sent[name] > 0) == needed and hub.sent[name] <= most, f"{name}: {hub.sent[name]} bytes were sent"


def endpoints() -> dict[int, str]:
    """The ports on this machine that page 03 of `paper` asks, with what a model there replies."""
    from lmm_sae_nb.support.presets import preset

    values = preset(HERE / RUNS["paper"])["03_interpret_features"]
    models = values | {"explainer": values["explainer"]["model"]}
    return {urlsplit(models[who].split("@")[1]).port: reply for who, reply in ENDPOINTS.items()}


@contextmanager
def answering(port: int, reply: str):
    """Serve OpenAI's chat protocol on a port of this machine; every question gets this reply."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            message = {"role": "assistant", "content": reply}
            body = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def run(project: Path, name: str, pages: tuple[str, ...]) -> int:
    """Run the pages, one after the other; return how many failed."""
    import matplotlib
    import torch
    from toy_pages import name_latents, run_page

    from lmm_sae_nb.support import notebooks
    from lmm_sae_nb.support.presets import preset

    torch.set_num_threads(1)
    matplotlib.use("agg")
    os.chdir(project)
    values, failed = preset(HERE / RUNS[name]), 0
    for source in notebooks.sources(project):
        if pages and not source.stem.startswith(pages):
            continue
        began, used = time.monotonic(), cpu_seconds()
        try:
            run_page(source, values[source.stem])
            if source.stem.startswith("08"):
                traps = Path(values[source.stem]["traps"])
                few = {"traps": str(one_answer(traps, "Yes"))}  # no case is wrong
                run_page(source, values[source.stem] | few)
            if source.stem.startswith("03"):  # page 06 needs latents of these names, which chance does not give
                name_latents(Path(f"data/artifacts/{name}/interpret/explanations.json"))
            print(
                f"{source.stem}: {time.monotonic() - began:.0f} s, {cpu_seconds() - used:.0f} CPU s, "
                f"peak of the largest process so far {most_memory():.1f} GB",
                flush=True,
            )
        except Exception:
            failed += 1
            print(f"{source.stem} FAILED\n{traceback.format_exc()[-3000:]}", flush=True)
    return failed


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def most_memory() -> float:
    """The highest memory of this process or of one that it started, in GB."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1e6


def one_answer(traps: Path, word: str) -> Path:
    """Write the traps with this right answer, and return where they are.

    The model says Yes to nearly all. So no case is wrong where Yes is right. With both answers, none is wrong of one.
    """
    from datasets import load_from_disk

    folder = traps.with_name(f"traps_{word}")
    if not folder.exists():
        rows = load_from_disk(traps)
        rows.select([n for n, answer in enumerate(rows["answer"]) if answer == word]).save_to_disk(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=sorted(RUNS), default="small")
    parser.add_argument("pages", nargs="*")
    given = parser.parse_intermixed_args()  # pages may come after the option
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.exit(main(given.folder, given.preset, *given.pages))
