"""Steer one latent by hand: choose it, a dose, the tokens and a prompt, and compare the answers."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from statistics import median
from typing import NamedTuple

import ipywidgets as widgets
import torch
from PIL import Image
from transformers import StoppingCriteria

from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.model.prompts import Prompt
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.show.markup import escaped
from lmm_sae_nb.show.tables import mark_changes
from lmm_sae_nb.steer.steering import Comparison, Edit, Scope, steered
from lmm_sae_nb.support.images import UnreadableImage, open_rgb, rgb

SCOPES = {
    "all tokens": Scope(),
    "base image": Scope(("base",)),
    "image, with tiles": Scope(("base", "tiles", "newline")),
    "text": Scope(("text",)),
    "the prompt only": Scope(phases=("prompt",)),
}
TITLES = {"untouched": "untouched", "spliced": "SAE spliced in", "steered": "steered"}
KEPT = 32  # answers of the two controls that are remembered


class Request(NamedTuple):
    """The state of the controls at one moment.

    pixels: SHA-256 of the image's pixels.
    dose: the clamp in units of the latent's maximum.
    """

    text: str
    image: Image.Image | None
    pixels: str | None
    edit: Edit
    dose: float
    scope: Scope
    keep_error: bool


class _Stale(Exception):
    """Another request has come, so nobody waits for this answer."""


class _StopIfStale(StoppingCriteria):
    """End a generation at its next token once another request has come."""

    def __init__(self, panel: SteeringPanel, number: int):
        self.panel, self.number = panel, number

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.panel.is_stale(self.number), device=input_ids.device)


def answers_html(answers: Mapping[str, str]) -> str:
    """Return the answers that are known so far as an HTML table: untouched, spliced, steered. Texts are escaped."""
    rows = []
    for name, title in TITLES.items():
        text = escaped(answers[name]) if name in answers else "…"
        if name != "untouched" and name in answers and "untouched" in answers:
            text = mark_changes(answers["untouched"], answers[name])
        rows.append(f"<tr><th style='text-align:left'>{title}</th><td>{text}</td></tr>")
    return f"<table class='answers'>{''.join(rows)}</table>"


def download_html(name: str, text: str) -> str:
    """Return a link that saves a text as a file. It contains the text, so it needs no server."""
    data = base64.b64encode(text.encode(errors="replace")).decode()
    return (
        f'<a class="jupyter-button" download="{escaped(name)}" href="data:application/json;base64,{data}" '
        'style="padding:0 10px;text-decoration:none">save as JSON</a>'
    )


class SteeringPanel:
    """Clamp a latent at a dose, and compare the model's answer with those of two controls.

    The controls are the untouched model and the model with the SAE spliced in. Both are computed once for each prompt
    and image. Answers are computed one after another in a thread, and appear as they come. When a control of the panel
    moves, the answer under way stops at its next token and is not shown. `box` is the widget to display.

    Do not run the model in a cell while the panel computes: the clamp would act on the cell's answer too.

    place: the model, the SAE and its layer.
    cache: gives each latent's maximum, the unit of the dose.
    names: latent to name, for the choice of a latent. Any other latent can be typed as a number.
    image: shown to the model at first; another one can be uploaded.
    text: the prompt at first.
    max_new_tokens: of an answer.
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
        self.place, self.cache, self.names = place, cache, dict(names)
        self.image, self.max_new_tokens = image, max_new_tokens
        self._options = {f"{name} ({n})": n for n, name in sorted(self.names.items(), key=lambda row: row[1])}
        self._requests, self._record, self._tasks = 0, None, set()
        self._controls: dict[tuple, str] = {}  # answers that do not depend on the latent
        self._worker = ThreadPoolExecutor(1)  # hooks of two answers must not meet in the model
        self._make_controls(text)
        self._show_picture()

    def _make_controls(self, text: str) -> None:
        wide = {"layout": widgets.Layout(width="32em"), "style": {"description_width": "6em"}}
        self.latent = widgets.Combobox(
            value=next(iter(self._options), "0"),
            options=list(self._options),
            description="latent",
            ensure_option=False,
            continuous_update=False,
            **wide,
        )
        self.dose = widgets.FloatSlider(
            1.0, min=0.0, max=8.0, step=0.25, description="dose", continuous_update=False, **wide
        )
        self.scope = widgets.SelectionSlider(options=list(SCOPES), description="scope", continuous_update=False, **wide)
        self.keep_error = widgets.Checkbox(False, description="keep what the SAE leaves unexplained", **wide)
        self.text = widgets.Text(text, description="prompt", continuous_update=False, **wide)
        self.upload = widgets.FileUpload(accept="image/*", description="image")
        self.picture = widgets.Image(layout=widgets.Layout(max_width="12em", object_fit="contain"))
        self.answers, self.status, self.download = widgets.HTML(), widgets.HTML(), widgets.HTML()
        controls = (self.latent, self.dose, self.scope, self.keep_error, self.text)
        for control in controls:
            control.observe(lambda _: self.ask(), "value")
        self.upload.observe(lambda _: self._take_upload(), "value")
        column = widgets.VBox([*controls, widgets.HBox([self.upload, self.download])])
        self.box = widgets.VBox([widgets.HBox([column, self.picture]), self.status, self.answers])

    # -- the request

    def choose(self, latent: int) -> None:
        """Steer this latent from now on, as if it were chosen in the panel."""
        self.latent.value = next((option for option, n in self._options.items() if n == latent), str(latent))

    def chosen_latent(self) -> int:
        """Return the latent that the field names.

        Raises:
            ValueError: the SAE has no such latent.
        """
        typed = self.latent.value.strip()
        number = self._options.get(typed)
        if number is None:
            matches = [latent for latent, name in self.names.items() if name == typed]
            number = matches[0] if matches else int(typed) if typed.isdecimal() else -1
        if not 0 <= number < self.place.sae.n_latents:
            raise ValueError(
                f"no latent is called {typed!r}; choose a name, or a number below {self.place.sae.n_latents}"
            )
        return number

    def edit(self) -> Edit:
        """Return the clamp that the controls say.

        Raises:
            ValueError: there is no such latent, or no cached image makes it active.
        """
        latent = self.chosen_latent()
        highest = float(self.cache.max[latent])
        if highest == 0:
            raise ValueError(
                f"latent {latent} is not active on any cached image, so a dose has no unit; choose another latent"
            )
        return Edit(latent, self.dose.value * highest)

    def request(self) -> Request:
        """Return the present state of the controls.

        Raises:
            ValueError: the prompt is empty, or as `edit`.
        """
        if not self.text.value.strip():
            raise ValueError("the prompt is empty; type a question")
        edit, scope, image = self.edit(), SCOPES[self.scope.value], self.image
        pixels = image and hashlib.sha256(rgb(image).tobytes()).hexdigest()
        return Request(self.text.value, image, pixels, edit, self.dose.value, scope, self.keep_error.value)

    def is_stale(self, number: int) -> bool:
        """Whether another request has come since request `number`."""
        return number != self._requests

    @torch.no_grad()
    def answer(self, request: Request, number: int) -> Iterator[dict[str, str]]:
        """Compute the untouched, the steered and the spliced answer, and give after each those known so far, by name.

        number: of the request; the generation stops when another one comes.
        """
        prompt, known = self.place.lmm.prompt(request.text, request.image), {}
        ways = {
            "untouched": ((request.text, request.pixels), nullcontext),
            "steered": (None, lambda: self._steered(prompt, request, [request.edit])),
            "spliced": (
                (request.text, request.pixels, request.keep_error),
                lambda: self._steered(prompt, request, []),
            ),
        }
        for name, (key, run) in ways.items():
            known[name] = self._controls.get(key) if key else None
            if known[name] is None:
                with run():
                    stop = {"stopping_criteria": [_StopIfStale(self, number)]}
                    known[name] = self.place.lmm.generate(prompt, max_new_tokens=self.max_new_tokens, **stop)[0]
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
            next(known for known in self.answer(self.request(), self._requests) if "steered" in known)
            seconds.append(time.perf_counter() - begun)
        return {"panel_question_seconds": seconds[0], "panel_slider_seconds": median(seconds[1:])}

    def _steered(self, prompt: Prompt, request: Request, edits: list[Edit]) -> AbstractContextManager[None]:
        return steered(self.place, prompt, edits, request.scope, keep_error=request.keep_error)

    # -- answering

    def ask(self) -> None:
        """Compute the answers beside the notebook's event loop and show them as they come; without a loop, at once."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.ask_now()
            return
        self._requests += 1
        task = loop.create_task(self._ask(self._requests))
        self._tasks.add(task)  # the loop holds a task only weakly
        task.add_done_callback(self._tasks.discard)

    def ask_now(self) -> None:
        """Compute and show the answers before returning."""
        self._requests += 1
        try:
            request = self.request()
            *_, known = self._worker.submit(list, self.answer(request, self._requests)).result()
            self._show(request, known)
        except Exception as error:
            self._refuse(error)

    async def _ask(self, number: int) -> None:
        await asyncio.sleep(0.05)  # a slider that is still moving asks again within this time
        if self.is_stale(number):
            return
        self.status.value, loop = "<i>asking …</i>", asyncio.get_running_loop()
        try:
            request = self.request()
            steps = self.answer(request, number)
            while (known := await loop.run_in_executor(self._worker, next, steps, None)) is not None:
                if self.is_stale(number):
                    return
                self._show(request, known)
        except _Stale:
            return
        except Exception as error:  # nobody would see the exception of a task
            if not self.is_stale(number):
                self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        """Show the error in place of the answers, which belong to an earlier request."""
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        self._record, self.answers.value, self.download.value = None, "", ""
        self.status.value = f"<b>{escaped(kind + str(error))}</b>"

    def _show(self, request: Request, known: Mapping[str, str]) -> None:
        self.answers.value = answers_html(known)
        if set(known) < set(TITLES):
            self._record, self.download.value = None, ""
            return
        image = request.image and {"size": list(request.image.size), "sha256_of_pixels": request.pixels}
        self._record = {
            "model": str(self.place.lmm.name).replace("\\", "/").rsplit("/", 1)[-1],
            "prompt": request.text,
            "image": image,
            "layer": self.place.layer,
            "latent": request.edit.latent,
            "name": self.names.get(request.edit.latent),
            "value": request.edit.value,
            "dose": request.dose,
            "scope": asdict(request.scope),
            "keep_error": request.keep_error,
        } | {name: known[name] for name in Comparison._fields}
        self.status.value = ""
        self.download.value = download_html(f"steering-latent-{request.edit.latent}.json", self.record())

    def record(self) -> str:
        """Return the controls and the three answers as JSON text.

        Raises:
            ValueError: there is no answer yet.
        """
        if self._record is None:
            raise ValueError("there is no answer yet; move a slider or call ask_now() first")
        return json.dumps(self._record, indent=2, ensure_ascii=False)

    # -- the image

    def _take_upload(self) -> None:
        for file in self.upload.value:
            try:
                self.image = open_rgb({"bytes": bytes(file["content"])}, file["name"])
            except UnreadableImage as error:
                what = escaped(f"{error.name} is not a readable image ({error.reason}); choose another file")
                self.status.value = f"<b>{what}</b>"
                return
        self._show_picture()
        self.ask()

    def _show_picture(self) -> None:
        if self.image is not None:
            data = io.BytesIO()
            self.image.save(data, "png")
            self.picture.value = data.getvalue()
