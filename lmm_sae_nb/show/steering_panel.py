"""A panel to steer one latent: choose it, a value and a scope, and read the answer before and after."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import io
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from statistics import median
from typing import NamedTuple

import ipywidgets as widgets
import torch
from PIL import Image, UnidentifiedImageError
from transformers import StoppingCriteria

from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.show.tables import mark_changes
from lmm_sae_nb.steer.steering import Comparison, Edit, Scope, steered

SCOPES = {
    "all tokens": Scope(),
    "base image": Scope(("base",)),
    "image, with tiles": Scope(("base", "tiles", "newline")),
    "text": Scope(("text",)),
    "the prompt only": Scope(phases=("prompt",)),
}
TITLES = {"untouched": "untouched", "spliced": "SAE spliced in", "steered": "steered"}
KEPT = 32  # answers of the two controls that are not asked for again


class Asked(NamedTuple):
    """What the controls said at one moment."""

    text: str
    image: Image.Image | None
    pixels: str | None  # SHA-256 of the image's
    edit: Edit
    times_maximum: float
    scope: Scope
    keep_error: bool


class _Stale(Exception):
    """The controls have moved on, nobody waits for this answer."""


class _StopIfStale(StoppingCriteria):
    """Ends a generation at the next token once its question is not the last one any more."""

    def __init__(self, panel: SteeringPanel, number: int):
        self.panel, self.number = panel, number

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.panel.is_stale(self.number), device=input_ids.device)


def answers_html(answers: Mapping[str, str]) -> str:
    """The answers of one prompt that are known so far, as a small table: untouched, spliced, steered; escaped."""
    rows = []
    for name, title in TITLES.items():
        text = html.escape(answers[name]) if name in answers else "…"
        if name != "untouched" and name in answers and "untouched" in answers:
            text = mark_changes(answers["untouched"], answers[name])
        rows.append(f"<tr><th style='text-align:left'>{title}</th><td>{text}</td></tr>")
    return f"<table class='answers'>{''.join(rows)}</table>"


def download_html(name: str, text: str) -> str:
    """A link that saves a text as a file, without a server: it carries the file itself."""
    data = base64.b64encode(text.encode()).decode()
    return (
        f'<a class="jupyter-button" download="{html.escape(name)}" href="data:application/json;base64,{data}" '
        'style="padding:0 10px;text-decoration:none">save as JSON</a>'
    )


class SteeringPanel:
    """Choose a latent, a value and a scope, and read the model's answer before and after.

    names: what to call latents, by number; any other number of the SAE's can be typed. The value is a multiple of the
    latent's own maximum in the cache, so that values compare across latents. `box` is the widget to display.

    Answers are computed one at a time beside the notebook's own loop and shown as they come; the two controls,
    untouched and with the SAE spliced in, are computed once for a prompt and image. A question that is out of date
    stops at its next token and is not shown. A cell that runs the model itself waits until the panel has answered, for
    what steers the panel's answer would steer the cell's too. `record()` is what is shown, as JSON text, and so is the
    file behind "save as JSON".
    """

    def __init__(
        self,
        place: SAEInPlace,
        cache: LatentCache,
        names: Mapping[int, str],
        *,
        image: Image.Image | None = None,
        text: str = "What do you see in this image?",
        max_new_tokens: int = 24,
    ):
        lmm, sae, layer = place.lmm, place.sae, place.layer
        sae.require_width(lmm.width)
        self.lmm, self.sae, self.layer, self.cache, self.names = lmm, sae, layer, cache, dict(names)
        self.image, self.max_new_tokens = image, max_new_tokens
        self._called = {f"{name} ({n})": n for n, name in sorted(self.names.items(), key=lambda row: row[1])}
        self._asked, self._shown, self._tasks = 0, None, set()
        self._controls: dict[tuple, str] = {}  # answers that do not depend on the latent
        self._worker = ThreadPoolExecutor(1)  # hooks of two answers must not meet in the model
        self._make_controls(text)
        self._show_picture()

    def _make_controls(self, text: str) -> None:
        wide = {"layout": widgets.Layout(width="32em"), "style": {"description_width": "6em"}}
        self.latent = widgets.Combobox(
            value=next(iter(self._called), "0"),
            options=list(self._called),
            description="latent",
            ensure_option=False,
            continuous_update=False,
            **wide,
        )
        self.value = widgets.FloatSlider(
            1.0, min=0.0, max=8.0, step=0.25, description="x maximum", continuous_update=False, **wide
        )
        self.scope = widgets.SelectionSlider(options=list(SCOPES), description="scope", continuous_update=False, **wide)
        self.keep_error = widgets.Checkbox(False, description="keep what the SAE leaves unexplained", **wide)
        self.text = widgets.Text(text, description="prompt", continuous_update=False, **wide)
        self.upload = widgets.FileUpload(accept="image/*", description="image")
        self.picture = widgets.Image(layout=widgets.Layout(max_width="12em", object_fit="contain"))
        self.answers, self.status, self.download = widgets.HTML(), widgets.HTML(), widgets.HTML()
        controls = (self.latent, self.value, self.scope, self.keep_error, self.text)
        for control in controls:
            control.observe(lambda _: self.ask(), "value")
        self.upload.observe(lambda _: self._take_upload(), "value")
        column = widgets.VBox([*controls, widgets.HBox([self.upload, self.download])])
        self.box = widgets.VBox([widgets.HBox([column, self.picture]), self.status, self.answers])

    # -- what is asked

    def choose(self, latent: int) -> None:
        """Steer this latent from now on, as if it were chosen in the panel."""
        self.latent.value = next((called for called, n in self._called.items() if n == latent), str(latent))

    def chosen_latent(self) -> int:
        """The number behind the latent's field; ValueError, naming the range, if it is none of the SAE's."""
        typed = self.latent.value.strip()
        number = self._called.get(typed)
        if number is None:
            matches = [latent for latent, name in self.names.items() if name == typed]
            number = matches[0] if matches else int(typed) if typed.isdecimal() else -1
        if not 0 <= number < self.sae.n_latents:
            raise ValueError(f"no latent is called {typed!r}; choose a name, or a number below {self.sae.n_latents}")
        return number

    def edit(self) -> Edit:
        """The clamp that the controls say; ValueError for an unknown latent, or one that never fired."""
        latent = self.chosen_latent()
        highest = float(self.cache.max[latent])
        if highest == 0:
            raise ValueError(
                f"latent {latent} never fired on the cached images, so its maximum is no unit; choose one that did"
            )
        return Edit(latent, self.value.value * highest)

    def asked(self) -> Asked:
        """What the controls say now; ValueError as `edit`, or for an empty prompt."""
        if not self.text.value.strip():
            raise ValueError("the prompt is empty; type a question")
        edit, scope, image = self.edit(), SCOPES[self.scope.value], self.image
        pixels = image and hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
        return Asked(self.text.value, image, pixels, edit, self.value.value, scope, self.keep_error.value)

    def is_stale(self, number: int) -> bool:
        """Whether something else was asked since question `number`."""
        return number != self._asked

    @torch.no_grad()
    def answer(self, asked: Asked, number: int) -> Iterator[dict[str, str]]:
        """The answers known so far, by name, after each: untouched, steered, spliced; `steering.compare`, piecewise.

        Raises _Stale once another question is the last one.
        """
        prompt, known = self.lmm.prompt(asked.text, asked.image), {}
        ways = {
            "untouched": ((asked.text, asked.pixels), nullcontext),
            "steered": (None, lambda: self._steered(prompt, asked, [asked.edit])),
            "spliced": ((asked.text, asked.pixels, asked.keep_error), lambda: self._steered(prompt, asked, [])),
        }
        for name, (key, run) in ways.items():
            known[name] = self._controls.get(key) if key else None
            if known[name] is None:
                with run():
                    stop = {"stopping_criteria": [_StopIfStale(self, number)]}
                    known[name] = self.lmm.generate(prompt, max_new_tokens=self.max_new_tokens, **stop)[0]
            if self.is_stale(number):
                raise _Stale
            if key:
                self._controls = dict([*self._controls.items(), (key, known[name])][-KEPT:])
            yield dict(known)

    def measure(self, repeats: int = 6) -> dict[str, float]:
        """Measure in seconds how long a new question takes, and, as a median, a moved slider.

        A new question first computes the untouched answer; a moved slider only the steered one.
        """
        seconds = []
        for _ in range(repeats):
            begun = time.perf_counter()
            next(known for known in self.answer(self.asked(), self._asked) if "steered" in known)
            seconds.append(time.perf_counter() - begun)
        return {"panel_question_seconds": seconds[0], "panel_slider_seconds": median(seconds[1:])}

    def _steered(self, prompt, asked: Asked, edits: list[Edit]):
        return steered(
            SAEInPlace(self.lmm, self.sae, self.layer), prompt, edits, asked.scope, keep_error=asked.keep_error
        )

    # -- asking and showing

    def ask(self) -> None:
        """Compute beside the notebook's loop and show the answers as they come; without a loop, at once."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.ask_now()
            return
        self._asked += 1
        task = loop.create_task(self._ask(self._asked))
        self._tasks.add(task)  # a loop alone does not keep it alive
        task.add_done_callback(self._tasks.discard)

    def ask_now(self) -> None:
        """Compute and show the answers before returning: for the cell that displays the panel, and to warm up."""
        self._asked += 1
        try:
            asked = self.asked()
            *_, known = self._worker.submit(list, self.answer(asked, self._asked)).result()
            self._show(asked, known)
        except Exception as error:
            self._refuse(error)

    async def _ask(self, number: int) -> None:
        await asyncio.sleep(0.05)  # a slider that is still moving asks again within this time
        if self.is_stale(number):
            return
        self.status.value, loop = "<i>asking …</i>", asyncio.get_running_loop()
        try:
            asked = self.asked()
            steps = self.answer(asked, number)
            while (known := await loop.run_in_executor(self._worker, next, steps, None)) is not None:
                if self.is_stale(number):
                    return
                self._show(asked, known)
        except _Stale:
            return
        except Exception as error:  # a task's exception would be told to nobody
            if not self.is_stale(number):
                self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        """Show what was wrong in the place of the answers, which are of another question."""
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        self._shown, self.answers.value, self.download.value = None, "", ""
        self.status.value = f"<b>{html.escape(kind + str(error))}</b>"

    def _show(self, asked: Asked, known: Mapping[str, str]) -> None:
        self.answers.value = answers_html(known)
        if set(known) < set(TITLES):
            self._shown, self.download.value = None, ""
            return
        image = asked.image and {"size": list(asked.image.size), "sha256_of_pixels": asked.pixels}
        self._shown = {
            "model": str(self.lmm.name).replace("\\", "/").rsplit("/", 1)[-1],
            "prompt": asked.text,
            "image": image,
            "layer": self.layer,
            "latent": asked.edit.latent,
            "name": self.names.get(asked.edit.latent),
            "value": asked.edit.value,
            "times_maximum": asked.times_maximum,
            "scope": asdict(asked.scope),
            "keep_error": asked.keep_error,
        } | {name: known[name] for name in Comparison._fields}
        self.status.value = ""
        self.download.value = download_html(f"steering-latent-{asked.edit.latent}.json", self.record())

    def record(self) -> str:
        """What is shown, as JSON: the controls and the three answers. ValueError before the first answer."""
        if self._shown is None:
            raise ValueError("nothing has been answered yet; move a slider or call ask_now() first")
        return json.dumps(self._shown, indent=2, ensure_ascii=False)

    # -- the image

    def _take_upload(self) -> None:
        for file in self.upload.value:
            try:
                self.image = Image.open(io.BytesIO(bytes(file["content"]))).convert("RGB")
            except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
                self.status.value = f"<b>{html.escape(file['name'])} is not a readable image; choose another file</b>"
                return
        self._show_picture()
        self.ask()

    def _show_picture(self) -> None:
        if self.image is not None:
            data = io.BytesIO()
            self.image.save(data, "png")
            self.picture.value = data.getvalue()
