"""The steering panel in process: what it asks, shows, drops and refuses. The browser is tests/test_lab.py's."""

import asyncio
import io
import json
import types
from datetime import datetime, timezone

import pytest
import torch
from models import llava_next, noise

from lmm_sae_nb.lmm import LMM
from lmm_sae_nb.sae import TopKSAE
from lmm_sae_nb.steering import Edit, compare
from lmm_sae_nb.widgets import SteeringPanel, marked


@pytest.fixture(scope="module")
def panel_parts():
    torch.manual_seed(0)
    lmm = LMM(*llava_next())
    sae = TopKSAE(lmm.width, 24, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    cache = types.SimpleNamespace(max=torch.arange(24).float())
    return lmm, sae, 1, cache, {3: "cat", 5: "dog <b>"}


@pytest.fixture(autouse=True)
def no_loop_but_its_own():
    """The browser tests leave their loop marked as running in this thread, where it turns only when they call."""
    loop = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    yield
    asyncio._set_running_loop(loop)


@pytest.fixture
def panel(panel_parts):
    return SteeringPanel(*panel_parts, image=noise(), text="what ?", max_new_tokens=4)


def test_changed_words_are_marked_and_everything_is_escaped():
    assert marked("a cat sits", "a dog sits") == "a <mark>dog</mark> sits"
    assert marked("a cat", "a cat <script>") == "a cat <mark>&lt;script&gt;</mark>"
    assert marked("a & b", "a & b") == "a &amp; b"
    assert marked("gone now", "") == ""


def test_a_moved_slider_shows_what_compare_says(panel, panel_parts):
    lmm, sae, layer, cache, _ = panel_parts
    panel.latent.value = "3"
    panel.value.value = 2.0
    expected = compare(lmm, sae, layer, "what ?", panel.image, [Edit(3, 6.0)], max_new_tokens=4)
    shown = json.loads(panel.record())
    assert [shown[name] for name in ("untouched", "spliced", "steered")] == [part[0] for part in expected]
    assert shown["value"] == 6.0 and shown["times_maximum"] == 2.0 and shown["name"] == "cat"
    assert "<table>" in panel.answers.value


def test_latents_are_found_by_name_or_number(panel):
    for typed, number in {"cat (3)": 3, "cat": 3, "7": 7, " 23 ": 23}.items():
        panel.latent.value = typed
        assert panel.chosen_latent() == number
    for wrong in ("24", "no such", "-1", ""):
        panel.latent.value = wrong
        assert "no latent is called" in panel.status.value
    panel.latent.value = "0"
    assert "never fired" in panel.status.value


def test_answers_out_of_date_are_not_shown(panel, monkeypatch):
    """Three moves of the slider while the first answer is being computed: the last alone is shown."""
    computed = []
    compute = SteeringPanel.compute

    def counted(self):
        computed.append(self.value.value)
        return compute(self)

    monkeypatch.setattr(SteeringPanel, "compute", counted)

    async def move():
        panel.latent.value = "3"
        for times in (2.0, 3.0, 4.0):
            panel.value.value = times
            await asyncio.sleep(0.01)
        while json.loads(panel.record())["times_maximum"] != 4.0 if panel._shown else True:
            await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(move(), 60))
    assert computed == [4.0]


def uploaded(name: str, content: bytes) -> dict:
    when = datetime(2026, 1, 1, tzinfo=timezone.utc)
    return {"name": name, "type": "image/png", "size": len(content), "content": content, "last_modified": when}


def test_an_uploaded_image_is_asked_about_and_a_broken_one_refused(panel):
    data = io.BytesIO()
    noise(64, 64, seed=5).save(data, "png")
    panel.latent.value = "3"
    panel.upload.value = (uploaded("a.png", data.getvalue()),)
    assert panel.image.size == (64, 64) and panel.picture.value[:4] == b"\x89PNG"
    panel.upload.value = (uploaded("<b>.png", b"none"),)
    assert "&lt;b&gt;.png is not a readable image" in panel.status.value


def test_nothing_to_record_before_the_first_answer(panel):
    with pytest.raises(ValueError, match="nothing has been answered yet"):
        panel.record()
