"""Browse latents: search, sort, see what excites one, and hand it to the steering panel."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets as widgets

from lmm_sae_nb.show.latent_table import LatentTable
from lmm_sae_nb.show.markup import escaped
from lmm_sae_nb.show.thumbnails import histogram_svg

UNSORTED = "latent"


class FeatureBrowser:
    """Search latents by word or number, sort them by any column, and see one in detail.

    `box` is the widget to display.

    table: the latents.
    steer: called with a latent when "steer it" is pressed, such as `SteeringPanel.choose`; without it there is no such
        button.
    sort: the column to sort by at first.
    per_page: latents in the list.
    side: pixels of each picture in the detailed view.

    Raises:
        ValueError: the table is empty or does not have the column.
    """

    def __init__(
        self,
        table: LatentTable,
        steer: Callable[[int], None] | None = None,
        *,
        sort: str | None = None,
        per_page: int = 6,
        side: int = 96,
    ):
        if not table.rows:
            raise ValueError("the table of latents is empty; explain latents with notebooks/03_interpret_features.py")
        table.find(sort=sort)  # refuses an unknown column
        self.table, self.steer, self.side, self.page, self.latent = table, steer, side, 0, None
        self.text = widgets.Text(placeholder="word or number", description="search", continuous_update=False)
        self.sort = widgets.Dropdown(options=[UNSORTED, *table.columns], value=sort or UNSORTED, description="sort by")
        self.descending = widgets.Checkbox(True, description="highest first", indent=False)
        self.kind = widgets.Dropdown(options=[("all kinds", ""), *((k, k) for k in table.kinds())], description="kind")
        self.buttons = [widgets.Button(layout=widgets.Layout(width="24em")) for _ in range(per_page)]
        self.strips = [widgets.Image(format="webp", layout={"align_self": "flex-start"}) for _ in range(per_page)]
        self.count = widgets.HTML(layout=widgets.Layout(width="11em"))
        arrows = (widgets.Button(icon=f"arrow-{way}", layout={"width": "4em"}) for way in ("left", "right"))
        self.earlier, self.later = arrows
        self.title, self.facts, self.bars = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.views = widgets.Image(format="webp", layout=widgets.Layout(align_self="flex-start", max_width="100%"))
        self.hand_on = widgets.Button(description="steer it", icon="sliders")
        self.hand_on.layout.display = None if steer else "none"
        self._observe()
        rows = [widgets.VBox(pair) for pair in zip(self.buttons, self.strips, strict=True)]
        results = widgets.VBox([widgets.HBox([self.earlier, self.count, self.later]), *rows])
        details = widgets.VBox([self.title, self.views, self.bars, self.facts, self.hand_on])
        head = widgets.HBox([self.text, self.kind, self.sort, self.descending])
        self.box = widgets.VBox([head, widgets.HBox([results, details])])
        self.search()

    def _observe(self) -> None:
        for control in (self.text, self.sort, self.descending, self.kind):
            control.observe(lambda _: self.search(), "value")
        for place, button in enumerate(self.buttons):
            button.on_click(lambda _, place=place: self.show(self._here()[place]))
        self.earlier.on_click(lambda _: self._turn(-1))
        self.later.on_click(lambda _: self._turn(1))
        self.hand_on.on_click(lambda _: self.steer(self.latent))

    def search(self) -> None:
        """List the latents that the controls ask for, from the first page, and show the first one."""
        sort = None if self.sort.value == UNSORTED else self.sort.value
        self.results = self.table.find(
            self.text.value, sort=sort, descending=self.descending.value, kind=self.kind.value
        )
        self.page = 0
        self._list()
        if self.results:
            self.show(self.results[0])

    def show(self, latent: int) -> None:
        """Show one latent in detail."""
        self.latent = latent
        self.title.value = f"<h4>latent {latent}: {escaped(self.table.name(latent))}</h4>"
        self.facts.value = self.table.details(latent)
        histogram = self.table.histogram(latent)
        self.bars.value = histogram_svg(histogram.counts, histogram.edges, histogram.label)
        self.views.value = self.table.strip(latent, self.side, 85)

    def _here(self) -> list[int]:
        """Return the latents of the current page."""
        size = len(self.buttons)
        return self.results[self.page * size : (self.page + 1) * size]

    def _turn(self, pages: int) -> None:
        last = max(0, (len(self.results) - 1) // len(self.buttons))
        self.page = min(max(0, self.page + pages), last)
        self._list()

    def _list(self) -> None:
        here, first = self._here(), self.page * len(self.buttons)
        self.count.value = f"{first + 1} to {first + len(here)} of {len(self.results)}" if here else "no latent fits"
        for place, (button, strip) in enumerate(zip(self.buttons, self.strips, strict=True)):
            button.layout.display = strip.layout.display = None if place < len(here) else "none"
            if place < len(here):
                latent = here[place]
                value = self.table.rows[latent].get(self.sort.value)
                button.description = f"{latent}: {self.table.name(latent)}" + (
                    f" ({value:.3g})" if isinstance(value, (int, float)) else ""
                )
                strip.value = self.table.strip(latent)
