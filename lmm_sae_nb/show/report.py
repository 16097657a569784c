"""Say in a sentence what a page found: its result, its findings, and where the numbers come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from IPython.display import HTML, Markdown, display

from lmm_sae_nb.show.markup import escaped, sentence
from lmm_sae_nb.show.seed_study import SeedStudy
from lmm_sae_nb.support.conversions import conversions_in_words, sum_conversions
from lmm_sae_nb.support.files import project_root
from lmm_sae_nb.support.intervals import Mean
from lmm_sae_nb.support.stages import Page, Stage, read_typed


class PageResult(NamedTuple):
    """The texts of `headline`."""

    ours: str
    paper: str
    why: str
    controls: str = ""


def headline(page: Page | None, ours: str, paper: str, why: str, controls: str = "") -> None:
    """Show the page's result beside the paper's. In the book this cell's output opens the page.

    page: whose run is named; None if the result is the same for every run.
    ours: one sentence, its numbers from metrics.
    paper: what the paper reports, or that it reports nothing.
    why: why the two differ, in one sentence.
    controls: what control SAEs and simple methods reach; empty if the page has none.
    """
    title = f"**Result** (preset `{page.run}`):" if page else "**Result:**"
    lines = {title: ours, "**Controls:**": controls, "**The paper:**": paper, "**Why they differ:**": why}
    display(Markdown("\n>\n".join(f"> {head} {sentence(text)}" for head, text in lines.items() if text)))


def percent(value: float | Mean, digits: int = 0) -> str:
    """Return a fraction as "85%", or with its interval as "85% (76 to 91%)".

    value: in [0, 1]; `read_mean` reads it from metrics with its interval.
    digits: behind the point.
    """
    if not isinstance(value, Mean):
        return f"{100 * value:.{digits}f}%"
    mean, low, high = (f"{100 * number:.{digits}f}" for number in value)
    return f"{mean}% ({low} to {high}%)"


def findings(*sentences: str) -> None:
    """Show what was found as a list; each sentence has its numbers from metrics.

    sentences: Markdown with emphasis, code and links to pages. A text of data or models goes through `as_text`.
    """
    display(Markdown("\n".join(f"- {sentence(text)}" for text in sentences)))


def left_out(*faults: Mapping[int, str], converted: Iterable[Mapping[str, int]] = (), most: int = 20) -> None:
    """Print what could not be read and was left out, and how many pictures were converted.

    faults: number of a row or picture to what is wrong with it.
    converted: counts of conversions, of different pictures.
    most: so many faults are printed; of the others the number is said.
    """
    every = [fault for some in faults for fault in some.values()]
    for fault in every[:most]:
        print("left out:", fault)
    if len(every) > most:
        print(f"and {len(every) - most:,} more")
    if counts := sum_conversions(converted):
        print(conversions_in_words(counts))


def over_saes(study: SeedStudy | None, stage: Stage | str, metric: str, form: Callable[[float], str] = percent) -> str:
    """Return "median of 6 SAEs: 88%, lowest 86%, highest 91%"; empty if no SAE of the study has the metric.

    study: None if there is none.
    stage: or its name.
    form: writes a number.
    """
    measured = study and study.find(stage if isinstance(stage, str) else stage.name, metric)
    if not measured:
        return ""
    median, lowest, highest = map(form, (measured.median, measured.lowest, measured.highest))
    return f"median of {len(measured.known)} SAEs: {median}, lowest {lowest}, highest {highest}"


def across_saes(
    study: SeedStudy | None, stage: Stage | str, metrics: Mapping[str, str], form: Callable[[float], str] = percent
) -> list[str]:
    """Return a sentence for each metric that the study has: its words, and the median, lowest and highest value.

    metrics: name to words.
    form: writes a number.
    """
    found = {words: over_saes(study, stage, name, form) for name, words in metrics.items()}
    return [f"{words[:1].upper()}{words[1:]}: {text}." for words, text in found.items() if text]


@dataclass(frozen=True)
class Published:
    """A number that the paper reports, and where."""

    value: float
    where: str


@dataclass(frozen=True)
class Target:
    """What a metric should reach; one of the two."""

    at_least: float | None = None
    at_most: float | None = None


ENTRIES = {"published": Published, "targets": Target, "metrics": str}


def entry(file: str, stage: str, metric: str) -> Published | Target | str | None:
    """Return what `book/<file>.json` says about a metric, by its name or else by the longest pattern that fits it.

    file: published, targets or metrics.
    """
    known = _entries(file).get(stage, {})
    fitting = [name for name in known if name == metric or fnmatchcase(metric, name)]
    return known[max(fitting, key=lambda name: (name == metric, len(name)))] if fitting else None


def published(stage: str, metric: str) -> float:
    """Return the paper's number for a metric, from `book/published.json`.

    Raises:
        KeyError: the paper reports no such number.
    """
    found = entry("published", stage, metric)
    if found is None:
        raise KeyError(f"book/published.json has no number for {stage}.{metric}; add it, with where the paper has it")
    return found.value


def published_numbers(stage: str) -> dict[str, float]:
    """Return all numbers that the paper reports for a stage, by metric, from `book/published.json`."""
    return {metric: found.value for metric, found in _entries("published").get(stage, {}).items()}


def _entries(file: str) -> dict[str, dict[str, Any]]:
    """Return a file of `book/`: stage to metric to entry."""
    return read_typed(project_root() / "book" / f"{file}.json", dict[str, dict[str, ENTRIES[file]]])


def meaning(stage: str, metric: str) -> str:
    """Return the sentence that explains a metric, from `book/metrics.json`; empty if there is none."""
    return entry("metrics", stage, metric) or ""


def number(value: float) -> str:
    """Return a count in full, anything else with three significant digits, zeros at the end included."""
    return f"{value:,}" if isinstance(value, int) else f"{value:#.3g}".rstrip(".") if value else "0"


def metrics_table(stage: Stage) -> HTML:
    """Return a stage's metrics as a table: name, value, interval, and what it means."""
    metrics, rows = stage.metrics, []
    for name, value in metrics.items():
        if name.endswith(("_low", "_high")) and name.rsplit("_", 1)[0] in metrics:
            continue
        ends = [number(metrics[name + end]) for end in ("_low", "_high") if name + end in metrics]
        cells = (
            f"<code>{escaped(name)}</code>",
            number(value),
            " to ".join(ends),
            escaped(meaning(stage.name, name)),
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{title}</th>" for title in ("metric", "value", "99% interval", "meaning"))
    return HTML(f"<table><tr>{head}</tr>{''.join(rows)}</table>")


def provenance(page: Page, *stages: Stage) -> None:
    """Print the run, and for each stage its seed, its wall time in seconds and the versions that made it."""
    for stage in stages:
        made = stage.manifest
        versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        seed = "" if made["seed"] is None else f"seed {made['seed']}, "
        print(f"run {page.run}, stage {stage.name}: {seed}{made['seconds']:.0f} s; {versions}")
