"""The results page, made from every stage's metrics.json: a table a stage, the paper's number beside ours."""

from __future__ import annotations

import json
from pathlib import Path

PAPER = {  # stage and metric -> what the paper reports
    ("score", "iou_paper"): "0.20 (Table 1, all concepts)",
    ("score", "iou_paper_random"): "0.005 (Table 1, random images)",
    ("score", "iou_paper_ratio"): "40 (Table 1, the two above)",
    ("score", "iou_strict"): "0.20 (Table 1, all concepts; measured in the `paper` mode)",
    ("score", "clip_paper"): "23.6 (Table 1, all concepts)",
    ("score", "clip_paper_random"): "18.2 (Table 1, random images)",
    ("compare", "iou_paper_layer_1"): "0.30 (Table 3, the 8th of 32 layers)",
    ("compare", "iou_paper_layer_3"): "0.31 (Table 3, the 25th)",
    ("compare", "iou_paper_layer_6"): "0.40 (Table 3, the 32nd)",
    ("compare", "clip_paper_layer_1"): "22.82 (Table 3, the 8th of 32 layers)",
    ("compare", "clip_paper_layer_3"): "24.92 (Table 3, the 25th)",
    ("compare", "clip_paper_layer_6"): "26.55 (Table 3, the 32nd)",
    ("compare", "clip_paper_tiny-instructblip"): "28.01 (Table 4, InstructBLIP-7B)",
    ("compare", "clip_paper_tiny-instructblip_random"): "17.71 (Table 4)",
    ("judge", "judged"): "0.89 by GPT-4o, 0.75 by two people (Table 2)",
}
HEAD = """# Results

Every number below was written by a notebook of this build, of the run `{run}`, and is read from
`data/artifacts/{run}/STAGE/metrics.json`. An interval is the 99 % one that the notebook computed. The paper's
numbers come from photographs and an 8B model, ours from the run named here: side by side they show that the
same quantity is meant, not that they should be equal.
"""


def number(value: float) -> str:
    """A count in full, anything else to four significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def table(stage: str, metrics: dict[str, float]) -> str:
    """One stage as a Markdown table; `x_low` and `x_high` become the interval in the row of `x`."""
    bounds = {f"{name}{end}" for name in metrics for end in ("_low", "_high")}
    rows = ["| quantity | ours | interval | the paper |", "|---|--:|--:|---|"]
    for name, value in metrics.items():
        if name in bounds:
            continue
        ends = [metrics.get(name + end) for end in ("_low", "_high")]
        interval = "" if None in ends else f"{number(ends[0])} to {number(ends[1])}"
        rows.append(f"| `{name}` | {number(value)} | {interval} | {PAPER.get((stage, name), '')} |")
    return f"## {stage}\n\n" + "\n".join(rows) + "\n"


def page(artifacts: Path, order: list[str]) -> str:
    """The whole page for one run's folder; stages stand in the order of the notebooks that write them."""
    found = {file.parent.name: json.loads(file.read_text()) for file in sorted(artifacts.glob("*/metrics.json"))}
    ordered = sorted(found, key=lambda stage: (order.index(stage) if stage in order else len(order), stage))
    tables = [table(stage, found[stage]) for stage in ordered] or ["No stage has written its numbers yet.\n"]
    return "\n".join([HEAD.format(run=artifacts.name), *tables])
