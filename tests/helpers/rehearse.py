"""Do what a user of a preset types, at toy size: `rehearse.py FOLDER [--preset paper] [PAGE ...]`.

That is `python -m lmm_sae_nb.prepare --preset small`, then `make book JOBS=1`, in a copy of the repository and from a
local hub, which holds narrow random models under their true names. The book's preset is rehearsal.yaml, which extends
`small` by sizes alone, or rehearsal_paper.yaml. Page 08 runs once more, with questions that are never answered wrong.
The models that `paper` asks through endpoints answer from this process, at the ports that the preset names.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import hub_data
import hub_models
from datasets import load_from_disk
from hub import Hub
from repository import copy_repository

from lmm_sae_nb.support.presets import preset

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
REPLIES = {"explainer": hub_models.EXPLANATION, "refiner": hub_models.NAME, "labeller": "object"}
RIGHT = "rehearsal_of_right_answers"


def main(folder: Path, name: str, *pages: str) -> None:
    project, book = folder / "project", Path(RUNS[name]).stem
    with Hub(folder / "hub") as hub, ExitStack() as servers:
        os.environ |= hub.environment(folder / "cache") | {"PYTHONPATH": str(project)}
        os.environ.pop("TRANSFORMERS_OFFLINE", None)
        if not project.exists():
            fill(folder / "hub", name)
            copy_repository(project)
            run(project, sys.executable, "-m", "lmm_sae_nb.prepare", "--preset", name)
            check_what_was_sent(hub)
            write_presets(project, name)
        if name == "paper":
            for port, reply in endpoints(project / "notebooks/params/paper.yaml").items():
                servers.enter_context(answering(port, reply))
        doit = (sys.executable, "-m", "doit")
        if pages:
            run(project, *doit, f"preset={book}", *(f"page:{page}" for page in pages))
        else:
            run(project, "make", "book", f"PRESET={book}", "JOBS=1")
            run(project, *doit, f"preset={RIGHT}", "page:08_hallucination_case", "results")


def run(project: Path, *command: str) -> None:
    """Run a command as a user does, and say what it took."""
    began = cpu_seconds()
    subprocess.run(command, cwd=project, check=True)
    took = f"{cpu_seconds() - began:.0f} CPU s; the largest process so far had {most_memory():.1f} GB"
    print(f"{' '.join(command)}: {took}", flush=True)


def write_presets(project: Path, name: str) -> None:
    """Add the preset of sizes, and one whose questions all have the right answer Yes.

    The model says Yes to nearly all. So it answers none of these wrong. Of the first preset's questions with the right
    answer Yes, it answers none wrong either.
    """
    params, traps = project / "notebooks/params", f"data/artifacts/{name}/traps"
    (params / RUNS[name]).write_text((HERE / RUNS[name]).read_text())
    rows = load_from_disk(project / traps)
    yes = [number for number, answer in enumerate(rows["answer"]) if answer == "Yes"]
    rows.select(yes).save_to_disk(project / f"{traps}_yes")
    with (params / f"{RIGHT}.yaml").open("w") as file:
        file.write(f"extends: {Path(RUNS[name]).stem}\n08_hallucination_case: {{traps: {traps}_yes}}\n")


def fill(hub: Path, name: str) -> None:
    """Write the models and data sets of a preset."""
    for data, (make, splits, files) in HUB_DATA[name].items():
        hub_data.publish(hub, data, {split: getattr(hub_data, make)(rows) for split, rows in splits.items()}, files)
    getattr(hub_models, f"publish_{name}")(hub)


def check_what_was_sent(hub: Hub) -> None:
    """The parquet files that are read were sent once, the others not at all.

    PyArrow first reads the last 64 KiB of a file. If the file's index is longer, it then reads the index.
    """
    for file in hub.folder.glob("datasets/**/*.parquet"):
        name = file.relative_to(hub.folder).as_posix()
        needed = file.name.startswith(("train", "val", "image"))
        index = int.from_bytes(file.read_bytes()[-8:-4], "little") + 8
        most = file.stat().st_size + 2**16 + (index if index > 2**16 else 0) if needed else 0
        assert (hub.sent[name] > 0) == needed and hub.sent[name] <= most, f"{name}: {hub.sent[name]} bytes were sent"


def endpoints(params: Path) -> dict[int, str]:
    """The ports on this machine that page 03 asks with a preset, and what a model there replies."""
    values = preset(params)["03_interpret_features"]
    models = values | {"explainer": values["explainer"]["model"]}
    return {urlsplit(models[who].split("@")[1]).port: reply for who, reply in REPLIES.items()}


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


def cpu_seconds() -> float:
    """CPU seconds of the processes that this one started and that have ended."""
    ended = os.times()
    return ended.children_user + ended.children_system


def most_memory() -> float:
    """The highest memory of a process that this one started, in GB."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=sorted(RUNS), default="small")
    parser.add_argument("pages", nargs="*", help="such as 01_train_sae; all, if none is given")
    given = parser.parse_intermixed_args()  # pages may come after the option
    main(given.folder.resolve(), given.preset, *given.pages)
