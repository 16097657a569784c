"""Say in words what the models of Picture World reach in their exams (appendix A1).

An exam has a row for each family of questions, or for each kind of concept: `fraction` with its ends `low` and `high`,
the number `asked`, and the target `least` where there is one. Other quantities have their ends at `<name>_low` and
`<name>_high`.
"""

from __future__ import annotations

from collections.abc import Mapping

Row = Mapping[str, float]
Rows = Mapping[str, Row]


def answers_in_words(exam: Rows) -> list[str]:
    """Return which targets the model under study reaches, and how often it answers from memory.

    exam: family of questions to its row.
    """
    aims = {name: row for name, row in exam.items() if row.get("least")}
    missed = _missed(aims)
    unsure = [name for name, row in aims.items() if name not in missed and row["low"] < row["least"]]
    return [
        f"The shipped model reaches {len(aims) - len(missed)} of {len(aims)} targets. It misses: {_listed(missed)}. "
        f"For {len(unsure)} of those that it reaches, the interval extends below the target, because few questions "
        "were asked.",
        "Asked about maps that contradict a fact, it follows the fact in "
        f"{_percent(exam['trap_follows_fact'])} of answers. Notebook 08 asks about other such maps and tries to cure "
        "this.",
    ]


def answers_in_short(exam: Rows) -> str:
    """Return for the top of the page how well the model under study describes scenes and reads signs."""
    describe, read = exam["describe"], exam["read"]
    return (
        f"on held-out scenes the embedded LLaVA-NeXT describes {_percent(describe)} of {describe['asked']} scenes "
        f"without a mistake. It reads {_percent(read)} of {read['asked']} signs; the target was {read['least']:.0%}."
    )


def explainer_in_words(exam: Mapping[str, Rows], titles: Mapping[str, str]) -> str:
    """Return which targets the model that names latents misses.

    exam: where the sets come from to the exam on them.
    titles: the same to what the sentence calls it.
    """
    below = {titles[origin]: _missed(rows) for origin, rows in exam.items()}
    targets = sum("least" in row for rows in exam.values() for row in rows.values())
    parts = "; ".join(f"on {title}, {_listed(rows)}" for title, rows in below.items())
    return f"The explainer misses {sum(map(len, below.values()))} of {targets} targets: {parts}."


def segmenter_in_words(exam: Rows) -> str:
    """Return how often the CLIPSeg finds a concept where it is not."""
    return f"The CLIPSeg finds a concept in {_percent(exam['total'], 'false_alarm')} of the scenes without it."


def similarity_in_words(exam: Rows, names: int) -> str:
    """Return of how many regions the CLIP puts the right name first, colours and others apart.

    exam: kind of concept to its row, and `total`.
    names: number that it chooses from.
    """
    colours, every = exam["colour"], exam["total"]
    right = [row["named_first"] * row["asked"] for row in (every, colours)]
    others = (right[0] - right[1]) / (every["asked"] - colours["asked"])
    objects, words, parts = (_percent(exam[kind], "named_first") for kind in ("object", "word", "part"))
    return (
        f"The CLIP gives {_percent(every, 'named_first')} of all regions the right name first; the first of {names} "
        f"names at random would be right in {1 / names:.1%}. {colours['asked']} of the {every['asked']} regions are "
        f"colours, which are easy ({colours['named_first']:.0%}); of the others {others:.0%} are right. Objects: "
        f"{objects}, words: {words}, parts: {parts}."
    )


def queries_in_words(exam: Rows, through_patches: Rows) -> str:
    """Return what is lost if the language model sees 32 queries and not every patch.

    exam: of the model with queries. It has three families of questions or more, besides the traps.
    through_patches: of the model under study, on the same families.
    """
    loss = {
        name: through_patches[name]["fraction"] - row["fraction"]
        for name, row in exam.items()
        if "follows_fact" not in name  # this is no score
    }
    first, second, third, *_ = sorted(loss, key=loss.get, reverse=True)
    falls = " and ".join(
        f"*{name}* falls from {_percent(through_patches[name])} to {_percent(exam[name])}" for name in (first, second)
    )
    missed, targets = _missed(exam), [name for name in exam if through_patches.get(name, {}).get("least")]
    return (
        f"Through 32 queries, two families of questions lose most: {falls}. No other family falls by more than "
        f"{100 * loss[third]:.0f} points. It misses {len(missed)} of {len(targets)} targets: {_listed(missed)}."
    )


def _percent(row: Row, name: str = "fraction") -> str:
    """Return one quantity of a row as a percentage, with the ends of its interval."""
    start = "" if name == "fraction" else f"{name}_"
    return f"{row[name]:.0%} [{row[f'{start}low']:.0%}, {row[f'{start}high']:.0%}]"


def _missed(exam: Rows) -> dict[str, Row]:
    """Return the rows that are below their target."""
    return {name: row for name, row in exam.items() if row["fraction"] < row.get("least", 0)}


def _listed(rows: Rows) -> str:
    """Return "read (0.83, target 0.93), part (0.91, target 0.97)"."""
    parts = (f"{name} ({row['fraction']:.2f}, target {row['least']:.2f})" for name, row in rows.items())
    return ", ".join(parts) or "none"
