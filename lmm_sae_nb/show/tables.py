"""Tables and shaded texts as HTML. Every text of a model or of a file is escaped."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from IPython.display import HTML
from matplotlib.colors import to_rgb

from lmm_sae_nb.show.markup import NO_MATH, escaped
from lmm_sae_nb.show.style import AGAINST, FOR

if TYPE_CHECKING:
    from lmm_sae_nb.steer.experiments import CaseStudy


def table(rows: Sequence[Mapping[str, object]], caption: str = "", digits: int = 3) -> HTML:
    """Return rows as a table; their keys are its head.

    None is a dash, and a mean has its interval below it. A column with a text in it is set left, others right.

    digits: behind the point, of a float and of a mean. With two, a number of 10 or more has none.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    left = {name for name in names if any(isinstance(row.get(name), str) for row in rows)}

    def cell(name: str, content: str, tag: str = "td") -> str:
        side = "left" if name in left else "right"
        return f"<{tag} style='text-align:{side};padding:0 .4em'>{content}</{tag}>"

    head = "".join(cell(name, escaped(name), "th") for name in names)
    body = "".join(
        "<tr>" + "".join(cell(name, _value(row.get(name), digits)) for name in names) + "</tr>" for row in rows
    )
    above = f"<caption>{escaped(caption)}</caption>" if caption else ""
    head = f"{above}<thead><tr>{head}</tr></thead>"
    return HTML(f"<table class='{NO_MATH}' style='font-size:90%'>{head}<tbody>{body}</tbody></table>")


def _value(value: object, digits: int) -> str:
    """Return the content of a table's cell."""
    if hasattr(value, "low"):
        mean, interval = (_shorter(value, digits) if digits < 3 else str(value)).split(" ", 1)
        return f"{mean}<br><small style='white-space:nowrap;font-size:85%'>{interval}</small>"
    return "–" if value is None else _number(value, digits) if isinstance(value, float) else escaped(str(value))


def _number(value: float, digits: int, like: float | None = None) -> str:
    """Return a number with so many digits behind the point, or with none if `like` (or the number) is 10 or more."""
    return f"{value:.{0 if digits == 2 and abs(value if like is None else like) >= 10 else digits}f}"


def _shorter(value: Iterable[float], digits: int) -> str:
    """Return the text of a mean with its interval, with fewer digits; each number is rounded once."""
    numbers, highest = iter(value), max(abs(value.low), abs(value.high))
    return re.sub(r"-?\d+\.\d+", lambda _: _number(next(numbers), digits, highest), str(value))


def token_html(tokens: Sequence[str], values: Sequence[float]) -> str:
    """Return tokens shaded by their values: for in orange, against in blue; the number appears on hovering."""
    highest = max((abs(value) for value in values), default=0.0) or 1.0
    spans = []
    for token, value in zip(tokens, values, strict=True):
        red, green, blue = (round(255 * part) for part in to_rgb(FOR if value > 0 else AGAINST))
        shade = f"background:rgba({red},{green},{blue},{abs(value) / highest:.2f})"
        spans.append(f'<span style="{shade};padding:0 2px" title="{value:+.3f}">{escaped(token)}</span>')
    return f'<p class="{NO_MATH}" style="line-height:1.9">' + " ".join(spans) + "</p>"


def shaded_texts(rows: Mapping[str, Sequence[tuple[Sequence[str], Sequence[float]]]]) -> HTML:
    """Return under each title some texts, each as (tokens, values): `token_html`."""
    return HTML(
        "".join(
            f"<div class='{NO_MATH}'>{escaped(title)}</div>" + "".join(token_html(*text) for text in texts)
            for title, texts in rows.items()
        )
    )


def mark_changes(before: str, after: str) -> str:
    """Return `after` with those words marked that `before` does not have in the same place."""
    old, new = before.split(), after.split()
    words = []
    for tag, _, _, start, stop in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        text = escaped(" ".join(new[start:stop]))
        if text:
            words.append(text if tag == "equal" else f"<mark>{text}</mark>")
    return " ".join(words)


def case_studies(studies: Sequence[CaseStudy]) -> HTML:
    """Return the answers of case studies as tables: the untouched model's, then one for each dose.

    Words that the untouched answer does not have in the same place are marked (`mark_changes`).
    """
    return HTML("".join(_case_study(study) for study in studies))


def _case_study(study: CaseStudy) -> str:
    """Return one case study: a title and a table."""
    answers = [("untouched", escaped(study.untouched))]
    for dose, answer in zip(study.doses, study.answers, strict=True):
        answers.append((f"dose {dose:g}" if dose else "spliced", mark_changes(study.untouched, answer)))
    style = "text-align:left;padding:0 .6em"
    rows = (f"<tr><th style='{style}'>{name}</th><td style='{style}'>{answer}</td></tr>" for name, answer in answers)
    title = f"<div class='{NO_MATH}'><b>{escaped(study.concept)}</b>: {escaped(study.prompt)}</div>"
    return f"{title}<table class='{NO_MATH}'>{''.join(rows)}</table>"
