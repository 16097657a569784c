"""Make the results page: a line for each claim of the paper, then every metric of every stage, folded."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lmm_sae_nb.show import report
from lmm_sae_nb.show.markup import code
from lmm_sae_nb.show.seed_study import SeedStudy
from lmm_sae_nb.support.stages import read_typed

HERE = Path(__file__).parent
ENDS = ("_low", "_high")
MEDIAN = "_median"
HEAD = """# Results

The notebooks of this build measured every number on this page, in the run {run}. An interval has a level of 99%. The
paper's numbers come from photographs and a model of 8 billion parameters; ours come from the run. So the two columns
show that the same quantity is meant, not that the numbers should be equal. A *control* is the same measurement where
the claim should fail. A *target* is what this book set out to reach; a target that was missed stays here.

[A4](notebooks/A4_controls_and_metrics) has more controls: dictionaries that learned nothing, and methods without an
SAE. Some reach the numbers below.
{study}
{claims}

## Every metric

Open a stage to see all of its metrics. Numbers in square brackets are the interval; numbers in
round brackets are the lowest and the highest of several random draws, beside their median.

{details}
"""
STUDY = """
The column of several SAEs comes from a study: SAEs that differ only in the seed of notebook 01, each with its own run
of the pages (`book/seeds.json`). An interval says how much the choice of images or latents matters; this column says
how much the choice of the SAE matters.
"""
Metrics = dict[str, dict[str, float]]  # stage -> metric -> value


def with_interval(metrics: dict[str, float], name: str) -> str:
    """Return a metric's value, with its interval if it has one; a median of draws has their range."""
    extremes = [metrics.get(name.removesuffix(MEDIAN) + end) for end in ("_lowest", "_highest")]
    if name.endswith(MEDIAN) and None not in extremes:
        return f"{report.number(metrics[name])} ({report.number(extremes[0])} to {report.number(extremes[1])})"
    ends = [metrics.get(name + end) for end in ENDS]
    interval = "" if None in ends else f" [{report.number(ends[0])}, {report.number(ends[1])}]"
    return report.number(metrics[name]) + interval


def find(metrics: Metrics, name: str) -> tuple[str, str] | None:
    """Return stage and metric of a dotted name, whose metric may be a pattern; None if the run has none.

    Of several metrics that fit, the shortest is meant: `clip_paper_*instructblip*` is not that of its control.
    """
    stage, _, pattern = name.partition(".")
    found = [metric for metric in metrics.get(stage, {}) if fnmatchcase(metric, pattern)]
    return (stage, min(found, key=len)) if found else None


def control(metrics: Metrics, given: str | list[str] | list[list[str]] | None) -> str:
    """Return the control's column: a sentence as it is, or a metric with what it stands for, or several of these."""
    if given is None:
        return ""
    if isinstance(given, str):
        return given
    if isinstance(given[0], list):
        return "; ".join(control(metrics, each) for each in given)
    place = find(metrics, given[0])
    return f"{with_interval(metrics[place[0]], place[1])}: {given[1]}" if place else given[1]


def over_seeds(study: SeedStudy | None, stage: str, metric: str) -> str:
    """Return the median of a study's SAEs, with the lowest and the highest value; empty if none has the metric."""
    measured = study and study.find(stage, metric)
    if not measured:
        return ""
    return f"{report.number(measured.median)} ({report.number(measured.lowest)} to {report.number(measured.highest)})"


def claims(metrics: Metrics, study: SeedStudy | None) -> str:
    """Return the table's rows: one for each claim that this run measured."""
    rows = []
    for claim in read_typed(HERE / "claims.json", list[dict[str, Any]]):
        place = find(metrics, claim["metric"])
        if place is None:
            continue
        stage, metric = place
        title = f"[{claim['claim']}](notebooks/{claim['page']})"
        ours = with_interval(metrics[stage], metric)
        columns = [title, ours, control(metrics, claim.get("control")), paper(stage, metric), target(metrics, *place)]
        if study:
            columns.insert(2, over_seeds(study, stage, metric))
        rows.append("| " + " | ".join(columns) + " |")
    return "\n".join(rows)


def paper(stage: str, metric: str) -> str:
    """Return what the paper reports for a metric, and where; empty if it reports nothing."""
    entry = report.entry("published", stage, metric)
    return f"{entry.value:g} ({entry.where})" if entry else ""


def target(metrics: Metrics, stage: str, metric: str) -> str:
    """Return a metric's target and whether this run met it; empty if there is none."""
    entry = report.entry("targets", stage, metric)
    if not entry:
        return ""
    value = metrics[stage][metric]
    least, most = entry.at_least, entry.at_most
    met = (least is None or value >= least) and (most is None or value <= most)
    return (f"at least {least:g}" if most is None else f"at most {most:g}") + (", met" if met else ", **missed**")


def details(stage: str, metrics: Metrics) -> str:
    """Return one stage's metrics as a folded table: name, value, paper, target, and a sentence that explains it."""
    own = metrics[stage]
    rows = ["| metric | ours | the paper | target | meaning |", "|---|--:|---|---|---|"]
    for name in own:
        if any(name.endswith(end) and name.removesuffix(end) in own for end in ENDS):
            continue
        columns = (paper(stage, name), target(metrics, stage, name), report.meaning(stage, name))
        rows.append(f"| {code(name)} | {with_interval(own, name)} | " + " | ".join(columns) + " |")
    return f"::::{{dropdown}} Stage {code(stage)}: {len(rows) - 2} metrics\n\n" + "\n".join(rows) + "\n\n::::\n"


def page(artifacts: Path, order: list[str], study: SeedStudy | None = None) -> str:
    """Return the whole page for one run's folder; stages stand in the order of the notebooks that write them.

    study: of several SAEs; None leaves its column out.
    """
    found: Metrics = {
        file.parent.name: read_typed(file, dict[str, int | float]) for file in sorted(artifacts.glob("*/metrics.json"))
    }
    ordered = sorted(found, key=lambda stage: (order.index(stage) if stage in order else len(order), stage))
    folded = "\n".join(details(stage, found) for stage in ordered) or "No stage has written its numbers yet.\n"
    heads = ["claim", "ours", "control", "the paper", "target"]
    if study:
        heads.insert(2, f"{len(study.seeds)} SAEs: median (lowest to highest)")
    table = [" | ".join(["", *heads, ""]).strip(), "|" + "---|" * len(heads), claims(found, study)]
    return HEAD.format(run=code(artifacts.name), study=STUDY if study else "", claims="\n".join(table), details=folded)
