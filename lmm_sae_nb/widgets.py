"""Faces for the calls below, in a notebook: a steering panel. They compute nothing themselves."""

from __future__ import annotations

import asyncio
import difflib
import html
import io
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import ipywidgets as widgets
from PIL import Image, UnidentifiedImageError

from lmm_sae_nb.cache import LatentCache
from lmm_sae_nb.lmm import LMM
from lmm_sae_nb.sae import TopKSAE
from lmm_sae_nb.steering import Comparison, Edit, Scope, compare

SCOPES = {
    "all tokens": Scope(),
    "base image": Scope(("base",)),
    "image, with tiles": Scope(("base", "tiles", "newline")),
    "text": Scope(("text",)),
    "the prompt only": Scope(phases=("prompt",)),
}


def marked(before: str, after: str) -> str:
    """HTML of `after`, escaped, in which the words that `before` does not have in this place are marked."""
    old, new = before.split(), after.split()
    words = []
    for tag, _, _, start, stop in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        text = html.escape(" ".join(new[start:stop]))
        if text:
            words.append(text if tag == "equal" else f"<mark>{text}</mark>")
    return " ".join(words)


def answers_html(answers: Comparison) -> str:
    """The three answers of one prompt as a small table: untouched, spliced, steered."""
    first = [part[0] for part in answers]
    rows = {
        "untouched": html.escape(first[0]),
        "SAE spliced in": marked(first[0], first[1]),
        "steered": marked(first[0], first[2]),
    }
    return "<table>" + "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in rows.items()) + "</table>"


class SteeringPanel:
    """Choose a latent, a value and a scope, and read the model's answer before and after.

    names: what to call latents, by number; any other number of the SAE's can be typed. The value is a multiple of the
    latent's own maximum in the cache, so that values compare across latents. Answers are computed one at a time beside
    the notebook's own loop; one that is out of date when it is ready is not shown. `record()` is what is shown, as
    JSON text; `box` is the widget to display.
    """

    def __init__(
        self,
        lmm: LMM,
        sae: TopKSAE,
        layer: int,
        cache: LatentCache,
        names: Mapping[int, str],
        *,
        image: Image.Image | None = None,
        text: str = "What do you see in this image?",
        max_new_tokens: int = 24,
    ):
        self.lmm, self.sae, self.layer, self.cache, self.names = lmm, sae, layer, cache, dict(names)
        self.image, self.max_new_tokens = image, max_new_tokens
        called = {f"{name} ({latent})": latent for latent, name in sorted(self.names.items(), key=lambda row: row[1])}
        wide = {"layout": widgets.Layout(width="32em"), "style": {"description_width": "6em"}}
        self.latent = widgets.Combobox(
            value=next(iter(called), "0"), options=list(called), description="latent", ensure_option=False, **wide
        )
        self.value = widgets.FloatSlider(
            1.0, min=0.0, max=8.0, step=0.25, description="x maximum", continuous_update=False, **wide
        )
        self.scope = widgets.Dropdown(options=list(SCOPES), description="scope", **wide)
        self.keep_error = widgets.Checkbox(False, description="keep what the SAE leaves unexplained", indent=True)
        self.text = widgets.Text(text, description="prompt", continuous_update=False, **wide)
        self.upload = widgets.FileUpload(accept="image/*", description="image")
        self.picture = widgets.Image(layout=widgets.Layout(max_width="12em"))
        self.answers, self.status = widgets.HTML(), widgets.HTML()
        self._called, self._asked, self._shown = called, 0, None
        self._worker = ThreadPoolExecutor(1)  # hooks of two answers must not meet in the model
        self._show_picture()
        for control in (self.latent, self.value, self.scope, self.keep_error, self.text):
            control.observe(lambda _: self.ask(), "value")
        self.upload.observe(lambda _: self._take_upload(), "value")
        controls = [self.latent, self.value, self.scope, self.keep_error, self.text, self.upload]
        self.box = widgets.VBox(
            [widgets.HBox([widgets.VBox(controls), self.picture]), self.status, self.answers],
        )

    # -- what is asked

    def chosen_latent(self) -> int:
        """The number behind the latent's field; ValueError, naming the range, if it is none of the SAE's."""
        typed = self.latent.value.strip()
        number = self._called.get(typed)
        if number is None:
            matches = [latent for latent, name in self.names.items() if name == typed]
            number = matches[0] if matches else int(typed) if typed.isdigit() else -1
        if not 0 <= number < self.sae.n_latents:
            raise ValueError(f"no latent is called {typed!r}; choose a name, or a number below {self.sae.n_latents}")
        return number

    def edit(self) -> Edit:
        latent = self.chosen_latent()
        highest = float(self.cache.max[latent])
        if highest == 0:
            raise ValueError(
                f"latent {latent} never fired on the cached images, so its maximum is no unit; choose one that did"
            )
        return Edit(latent, self.value.value * highest)

    def compute(self) -> dict:
        """The answers to what the controls say now, and what they said."""
        edit, scope = self.edit(), SCOPES[self.scope.value]
        answers = compare(
            self.lmm, self.sae, self.layer, self.text.value, self.image, [edit], scope,
            keep_error=self.keep_error.value, max_new_tokens=self.max_new_tokens,
        )  # fmt: skip
        said = {
            "prompt": self.text.value,
            "layer": self.layer,
            "latent": edit.latent,
            "name": self.names.get(edit.latent),
        }
        said |= {"value": edit.value, "times_maximum": self.value.value, "scope": asdict(scope)}
        said |= {"keep_error": self.keep_error.value}
        return said | {name: part[0] for name, part in answers._asdict().items()}

    # -- asking and showing

    def ask(self) -> None:
        """Compute beside the notebook's loop (or, without one, at once) and show the answer if it is still wanted."""
        self._asked += 1
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._show(self._try())
            return
        loop.create_task(self._answer(self._asked))

    async def _answer(self, number: int) -> None:
        await asyncio.sleep(0.05)  # a slider that is still moving asks again within this time
        if number != self._asked:
            return
        self.status.value = "<i>asking …</i>"
        result = await asyncio.get_running_loop().run_in_executor(self._worker, self._try)
        if number == self._asked:
            self._show(result)

    def _try(self) -> dict | ValueError:
        try:
            return self.compute()
        except ValueError as error:
            return error

    def _show(self, result: dict | ValueError) -> None:
        if isinstance(result, ValueError):
            self.status.value = f"<b>{html.escape(str(result))}</b>"
            return
        self._shown, self.status.value = result, ""
        self.answers.value = answers_html(Comparison(*([result[name]] for name in Comparison._fields)))

    def record(self) -> str:
        """What is shown, as JSON: the controls and the three answers. ValueError before the first answer."""
        if self._shown is None:
            raise ValueError("nothing has been answered yet; move a slider or call ask() first")
        return json.dumps(self._shown, indent=2, ensure_ascii=False)

    # -- the image

    def _take_upload(self) -> None:
        for file in self.upload.value:
            try:
                self.image = Image.open(io.BytesIO(bytes(file["content"]))).convert("RGB")
            except (UnidentifiedImageError, OSError):
                self.status.value = f"<b>{html.escape(file['name'])} is not a readable image; choose another file</b>"
                return
        self._show_picture()
        self.ask()

    def _show_picture(self) -> None:
        if self.image is not None:
            data = io.BytesIO()
            self.image.save(data, "png")
            self.picture.value = data.getvalue()
