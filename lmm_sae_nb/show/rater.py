"""Let people say, latent by latent, whether the explanation fits the images (the human study of Table 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets as widgets
import numpy as np

from lmm_sae_nb.score.ratings import UNDONE, VERDICTS, append_rating, read_ratings
from lmm_sae_nb.show.markup import escaped
from lmm_sae_nb.show.thumbnails import heated, sheet, webp

if TYPE_CHECKING:
    from lmm_sae_nb.interpret.exemplars import Exemplar

KEYS = {"y": "yes", "n": "no", "u": "unsure"}
TAKE_BACK = "z"
STYLES = {"yes": "success", "no": "danger", "unsure": "warning"}


def added(before: str, after: str) -> str:
    """Return the characters that were typed into `before`, or over a part of it, to make `after`."""
    head = len(commonprefix([before, after]))
    tail = len(commonprefix([before[head:][::-1], after[head:][::-1]]))
    return after[head : len(after) - tail]


class Rater:
    """Show the exemplars and the explanation of one latent after another, and save each answer at once.

    Each rater continues at the first latent that they have not answered. The keys are y, n, u, and z to take the last
    answer back. They are typed into the field below the buttons, which gets the focus back after a click. `box` is the
    widget to display.

    path: the JSON-lines file of `lmm_sae_nb.score.ratings`; all raters share it.
    explained: latent to its row, with `concept` and perhaps `kind`, in the order of the questions.
    exemplars: latent to exemplars.
    rater: who answers; another name can be typed.
    side: pixels of the square that each picture fits into.

    Raises:
        ValueError: `explained` is empty.
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
            raise ValueError("there is nothing to rate; give latents with an explanation")
        self.path, self.exemplars, self.side = Path(path), exemplars, side
        self.explained = {int(latent): (row["concept"], row.get("kind")) for latent, row in explained.items()}
        raters = dict.fromkeys(row["rater"] for row in read_ratings(self.path))
        self.rater = widgets.Combobox(
            value=rater, options=list(raters), description="rater", placeholder="your name", continuous_update=False
        )
        self.progress = widgets.IntProgress(max=len(self.explained), layout=widgets.Layout(width="16em"))
        self.count, self.question, self.status = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.images = widgets.Image(format="webp", layout=widgets.Layout(align_self="flex-start", max_width="100%"))
        self.buttons = {
            verdict: widgets.Button(description=f"{verdict} ({key})", button_style=STYLES[verdict])
            for key, verdict in KEYS.items()
        }
        self.back = widgets.Button(description=f"take back ({TAKE_BACK})", icon="undo")
        keys = f"keys: {', '.join((*KEYS, TAKE_BACK))}"
        self.keys = widgets.Text(placeholder=keys, layout=widgets.Layout(width="16em"))
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

    # -- the answers

    def answered(self) -> list[dict]:
        """Return this rater's answers on today's explanations, in the order they were given."""
        name = self.rater.value.strip()
        rows = [row for row in read_ratings(self.path) if row["rater"] == name and row["latent"] in self.explained]
        return [row for row in rows if self.explained[row["latent"]][0] == row["concept"]]

    def current(self) -> int | None:
        """Return the first latent that this rater has not answered; None if there is none."""
        done = {row["latent"] for row in self.answered()}
        return next((latent for latent in self.explained if latent not in done), None)

    def rate(self, verdict: str) -> None:
        """Save a verdict on the current latent and show the next one, or show why it was not saved."""
        if (latent := self.current()) is not None:
            self._save(latent, verdict)

    def undo(self) -> None:
        """Take this rater's last answer back and show that latent again."""
        if rows := self.answered():
            self._save(rows[-1]["latent"], UNDONE)

    def _save(self, latent: int, verdict: str) -> None:
        try:
            append_rating(self.path, self.rater.value, latent, *self.explained[latent], verdict)
        except (OSError, ValueError) as error:
            self.status.value = f"<b>{escaped(str(error))}</b>"
        else:
            self.show()

    # -- showing

    def show(self) -> None:
        """Show the first latent that this rater has not answered, and the progress."""
        done, latent, named = len(self.answered()), self.current(), bool(self.rater.value.strip())
        self.progress.value = done
        self.count.value = f"{done} of {len(self.explained)}"
        self.status.value = "" if named else "<b>type your name above to begin</b>"
        for button in self.buttons.values():
            button.disabled = latent is None or not named
        self.back.disabled = not done
        if latent is None:
            self.question.value, self.images.value = "<b>All latents are answered. Thank you.</b>", b""
            return
        concept, kind = self.explained[latent]
        name = f"<b>{escaped(concept)}</b>" + (f" ({escaped(kind)})" if kind else "")
        self.question.value = f"Latent {latent}: do the visible patches have this in common: {name}?"
        self.images.value = self.picture(latent)

    def picture(self, latent: int) -> bytes:
        """Return the exemplars as WebP in three rows: images, activation, visible patches.

        Exemplars without a patch grid are one row of images.
        """
        exemplars = self.exemplars[latent]
        rows = [[exemplar.image for exemplar in exemplars]]
        if all(exemplar.activation is not None for exemplar in exemplars):
            rows.append([heated(exemplar.image, np.asarray(exemplar.activation)) for exemplar in exemplars])
            rows.append([exemplar.masked for exemplar in exemplars])
        return webp(sheet(rows, self.side))

    # -- buttons and keys

    def _renamed(self) -> None:
        self.show()
        self.keys.focus()

    def _clicked(self, act: Callable[[], None]) -> None:
        act()
        self.keys.focus()

    def _pressed(self, typed: str) -> None:
        """Act on the keys that were added to the field since the last call.

        This never empties the field: a key that is pressed at that moment would bring the earlier ones back.
        """
        before, self._typed = self._typed, typed
        for key in added(before, typed).lower():
            if key == TAKE_BACK:
                self.undo()
            elif key in KEYS and self.rater.value.strip():
                self.rate(KEYS[key])


assert set(KEYS.values()) == set(VERDICTS)
