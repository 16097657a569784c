"""The human study of Table 2: people say, latent by latent, whether the explanation fits what is seen."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as widgets
import numpy as np

from lmm_sae_nb.score.ratings import UNDONE, VERDICTS, append_rating, read_ratings
from lmm_sae_nb.show.thumbnails import encoded, heated, sheet

if TYPE_CHECKING:
    from lmm_sae_nb.interpret.exemplars import Exemplar

KEYS = {"y": "yes", "n": "no", "u": "unsure"}
BACK = "z"
STYLES = {"yes": "success", "no": "danger", "unsure": "warning"}


def added(before: str, after: str) -> str:
    """What was typed into `before`, or over a part of it, wherever the caret stood, to make `after`."""
    head = len(commonprefix([before, after]))
    tail = len(commonprefix([before[head:][::-1], after[head:][::-1]]))
    return after[head : len(after) - tail]


class Rater:
    """Shows a latent's images and its explanation and keeps each answer, on the disk before the next one is asked.

    path: the JSON-lines file of `lmm_sae_nb.score.ratings`, shared by all raters. explained: what is to be judged,
    latent to its row with `concept` and perhaps `kind`, in this order. exemplars: by latent, of which the
    images, the activations and what is left under the mask are shown. rater: who answers; another name can be typed.

    Each rater goes on at the first latent without an answer of his own. Keys: y, n, u, and z to take the last one back,
    in the field below the buttons, which has the focus again after a click. `box` is the widget to display.
    """

    def __init__(
        self,
        path: str | Path,
        explained: Mapping[int, Mapping],
        exemplars: Mapping[int, Sequence[Exemplar]],
        *,
        rater: str = "",
        side: int = 120,
    ):
        if not explained:
            raise ValueError("there is nothing to rate; give latents that were explained")
        self.path, self.exemplars, self.side = Path(path), exemplars, side
        self.explained = {int(latent): (row["concept"], row.get("kind")) for latent, row in explained.items()}
        known = dict.fromkeys(row["rater"] for row in read_ratings(self.path))
        self.rater = widgets.Combobox(
            value=rater, options=list(known), description="rater", placeholder="your name", continuous_update=False
        )
        self.progress = widgets.IntProgress(max=len(self.explained), layout=widgets.Layout(width="16em"))
        self.count, self.question, self.status = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.images = widgets.Image(format="webp", layout=widgets.Layout(align_self="flex-start", max_width="100%"))
        self.buttons = {
            verdict: widgets.Button(description=f"{verdict} ({key})", button_style=STYLES[verdict])
            for key, verdict in KEYS.items()
        }
        self.back = widgets.Button(description=f"take back ({BACK})", icon="undo")
        self.keys = widgets.Text(placeholder=f"keys: {', '.join(KEYS)}, {BACK}", layout=widgets.Layout(width="16em"))
        self._typed = ""
        self._observe()
        self.box = widgets.VBox(
            [
                widgets.HBox([self.rater, self.progress, self.count]),
                self.question,
                self.images,
                widgets.HBox([*self.buttons.values(), self.back]),
                self.keys,
                self.status,
            ]
        )
        self.show()

    def _observe(self) -> None:
        self.rater.observe(lambda _: self._renamed(), "value")
        self.keys.observe(lambda change: self._pressed(change["new"]), "value")
        for verdict, button in self.buttons.items():
            button.on_click(lambda _, verdict=verdict: self._clicked(lambda: self.rate(verdict)))
        self.back.on_click(lambda _: self._clicked(self.undo))

    # -- what was answered

    def answered(self) -> list[dict]:
        """This rater's answers that stand and are of what is to be judged, in the order they were given."""
        rows, name = read_ratings(self.path), self.rater.value.strip()
        mine = [row for row in rows if row["rater"] == name and row["latent"] in self.explained]
        return [row for row in mine if self.explained[row["latent"]][0] == row["concept"]]

    def current(self) -> int | None:
        """The first latent that this rater has not judged; None if all are."""
        done = {row["latent"] for row in self.answered()}
        return next((latent for latent in self.explained if latent not in done), None)

    def rate(self, verdict: str) -> None:
        """Keep a verdict on the latent that is shown, and show the next; what is wrong is shown instead."""
        if (latent := self.current()) is not None:
            self._keep(latent, verdict)

    def undo(self) -> None:
        """Take this rater's last answer back and show its latent again."""
        if rows := self.answered():
            self._keep(rows[-1]["latent"], UNDONE)

    def _keep(self, latent: int, verdict: str) -> None:
        try:
            append_rating(self.path, self.rater.value, latent, *self.explained[latent], verdict)
        except (OSError, ValueError) as error:
            self.status.value = f"<b>{html.escape(str(error))}</b>"
        else:
            self.show()

    # -- showing

    def show(self) -> None:
        """Show the first latent that this rater has not judged, and how far he is."""
        done, latent, named = len(self.answered()), self.current(), bool(self.rater.value.strip())
        self.progress.value = done
        self.count.value = f"{done} of {len(self.explained)}"
        self.status.value = "" if named else "<b>type your name above to begin</b>"
        for button in self.buttons.values():
            button.disabled = latent is None or not named
        self.back.disabled = not done
        if latent is None:
            self.question.value, self.images.value = "<b>All are answered. Thank you.</b>", b""
            return
        concept, kind = self.explained[latent]
        said = f"<b>{html.escape(concept)}</b>" + (f" ({html.escape(kind)})" if kind else "")
        self.question.value = f"Latent {latent}: is what the lit patches have in common {said}?"
        self.images.value = self.picture(latent)

    def picture(self, latent: int) -> bytes:
        """Three rows as WebP: the images, their activation, what is left under the mask; whole images are one row."""
        shown = self.exemplars[latent]
        rows = [[exemplar.image for exemplar in shown]]
        if all(exemplar.activation is not None for exemplar in shown):
            rows.append([heated(exemplar.image, np.asarray(exemplar.activation)) for exemplar in shown])
            rows.append([exemplar.masked for exemplar in shown])
        return encoded(sheet(rows, self.side))

    # -- buttons and keys

    def _renamed(self) -> None:
        self.show()
        self.keys.focus()

    def _clicked(self, act: Callable[[], None]) -> None:
        act()
        self.keys.focus()

    def _pressed(self, typed: str) -> None:
        """Act on the keys that were added to the field since last time.

        The field is never emptied from here: a key pressed meanwhile would come back together with those before it.
        """
        before, self._typed = self._typed, typed
        for key in added(before, typed).lower():
            if key == BACK:
                self.undo()
            elif key in KEYS and self.rater.value.strip():
                self.rate(KEYS[key])


assert set(KEYS.values()) == set(VERDICTS)
