"""The widgets in process: what they ask, show, drop and refuse. The browser is tests/book/test_lab.py's."""

import asyncio
import io
import json
import threading
import types
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
from models import llava_next, noise
from PIL import Image

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.interpret.exemplars import ExemplarsByLatent
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.score.ratings import append_rating, read_ratings
from lmm_sae_nb.show.feature_browser import FeatureBrowser
from lmm_sae_nb.show.latent_table import LatentTable
from lmm_sae_nb.show.rater import Rater, added
from lmm_sae_nb.show.steering_panel import SteeringPanel
from lmm_sae_nb.show.tables import case_studies, mark_changes
from lmm_sae_nb.steer.experiments import CaseStudy
from lmm_sae_nb.steer.fluency import Ordinary
from lmm_sae_nb.steer.steering import Comparison, Edit, Scope, compare

pytestmark = pytest.mark.usefixtures("unchecked")  # for its stand-ins


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
    return SteeringPanel(SAEInPlace(*panel_parts[:3]), *panel_parts[3:], image=noise(), text="what ?", max_new_tokens=4)


# The steering panel.


def test_changed_words_are_marked_and_everything_is_escaped():
    assert mark_changes("a cat sits", "a dog sits") == "a <mark>dog</mark> sits"
    assert mark_changes("a cat", "a cat <script>") == "a cat <mark>&lt;script&gt;</mark>"
    assert mark_changes("a & b", "a & b") == "a &amp; b"
    assert mark_changes("gone now", "") == ""


def test_a_case_study_has_a_row_for_each_dose_and_its_texts_are_escaped():
    study = CaseStudy(
        "sad <b>", 3, "why <i> ?", "a cat", [0.0, 0.5, 8.0], ["a cat", "a cat", "a <u>"], [], Ordinary([], [])
    )
    text = case_studies([study]).data
    assert text.count("<tr>") == 4 and text.count("<mark>") == 1
    assert "dose 0.5" in text and "dose 8<" in text and "<mark>&lt;u&gt;</mark>" in text
    assert "sad &lt;b&gt;" in text and "why &lt;i&gt; ?" in text


@pytest.mark.parametrize("keep_error", [False, True])
def test_a_moved_slider_shows_what_compare_says(panel, panel_parts, keep_error):
    lmm, sae, layer, cache, _ = panel_parts
    panel.keep_error.value = keep_error
    panel.choose(3)
    for times, scope in ((2.0, "all tokens"), (5.0, "text")):
        panel.dose.value, panel.scope.value = times, scope
        kinds = {"all tokens": Scope(), "text": Scope(("text",))}[scope]
        expected = compare(
            SAEInPlace(lmm, sae, layer),
            "what ?",
            panel.image,
            [Edit(3, 3 * times)],
            kinds,
            keep_error=keep_error,
            max_new_tokens=4,
        )
        shown = json.loads(panel.record())
        assert [shown[name] for name in Comparison._fields] == [part[0] for part in expected]
        assert shown["value"] == 3 * times and shown["dose"] == times and shown["name"] == "cat"
    assert "<table" in panel.answers.value and "steering-latent-3.json" in panel.download.value


def test_another_image_is_not_answered_from_what_was_kept(panel, panel_parts):
    lmm, sae, layer, _, _ = panel_parts
    panel.choose(3)
    for seed in range(3):
        panel.image = noise(seed=seed)
        panel.ask_now()
        expected = compare(SAEInPlace(lmm, sae, layer), "what ?", panel.image, [Edit(3, 3.0)], max_new_tokens=4)
        assert [json.loads(panel.record())[name] for name in Comparison._fields] == [part[0] for part in expected]


def test_latents_are_found_by_name_or_number(panel):
    for typed, number in {"cat (3)": 3, "cat": 3, "7": 7, " 23 ": 23}.items():
        panel.latent.value = typed
        assert panel.chosen_latent() == number
    for wrong in ("24", "no such", "-1", "", "²"):
        panel.latent.value = wrong
        assert "no latent is called" in panel.status.value and panel.answers.value == ""
    panel.latent.value = "0"
    assert "not active on any cached image" in panel.status.value
    with pytest.raises(ValueError, match="there is no answer yet"):
        panel.record()


def test_an_empty_prompt_and_an_unforeseen_error_are_shown(panel, monkeypatch):
    panel.text.value = "  "
    assert "the prompt is empty" in panel.status.value

    def broken(*args, **kwargs):
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr(LMM, "generate", broken)
    panel.text.value = "why ?"
    assert "RuntimeError: out of &lt;memory&gt;" in panel.status.value


def test_an_sae_of_another_width_is_refused(panel_parts):
    lmm, _, layer, cache, names = panel_parts
    with pytest.raises(ValueError, match="width"):
        SteeringPanel(SAEInPlace(lmm, TopKSAE(lmm.width + 1, 24, 4), layer), cache, names)


async def until(done) -> None:
    while not done():
        await asyncio.sleep(0.01)


def times_shown(panel) -> float | None:
    return panel._record and panel._record["dose"]


def test_a_slider_that_is_still_moving_asks_once(panel, monkeypatch):
    asked = []
    answer = SteeringPanel.answer
    monkeypatch.setattr(SteeringPanel, "answer", lambda self, *args: asked.append(args[0]) or answer(self, *args))

    async def move():
        panel.latent.value = "3"
        for times in (2.0, 3.0, 4.0):
            panel.dose.value = times
            await asyncio.sleep(0.01)
        await until(lambda: times_shown(panel) == 4.0)

    asyncio.run(asyncio.wait_for(move(), 60))
    assert [one.dose for one in asked] == [4.0]


def test_an_answer_that_is_out_of_date_stops_at_its_next_token_and_is_not_shown(panel, monkeypatch):
    """The slider moves while the first answer is being generated: the model waits at a token until it has moved."""
    shown, tokens, held, go = [], [], threading.Event(), threading.Event()
    show, generate = SteeringPanel._show, LMM.generate

    def counted(self, prompt, stopping_criteria, **settings):
        def hold(ids, scores, **_):
            tokens.append(ids.shape[1])
            if len(tokens) == 2:
                held.set()
                go.wait(60)
            return torch.zeros(len(ids), dtype=torch.bool)

        return generate(self, prompt, stopping_criteria=[hold, *stopping_criteria], **settings)

    panel.max_new_tokens = 4
    monkeypatch.setattr(LMM, "generate", counted)
    monkeypatch.setattr(
        SteeringPanel, "_show", lambda self, asked, known: shown.append(asked.dose) or show(self, asked, known)
    )

    async def move():
        panel.dose.value = 2.0
        await until(held.is_set)
        panel.dose.value = 3.0
        go.set()
        await until(lambda: times_shown(panel) == 3.0)

    asyncio.run(asyncio.wait_for(move(), 60))
    assert set(shown) == {3.0}
    assert tokens[2] == min(tokens)  # the third token was another generation's first


def uploaded(name: str, content: bytes) -> dict:
    when = datetime(2026, 1, 1, tzinfo=timezone.utc)
    return {"name": name, "type": "image/png", "size": len(content), "content": content, "last_modified": when}


def test_an_uploaded_image_is_asked_about_and_a_broken_one_refused(panel):
    data = io.BytesIO()
    noise(64, 64, seed=5).save(data, "png")
    panel.latent.value = "3"
    panel.upload.value = (uploaded("a.png", data.getvalue()),)
    assert panel.image.size == (64, 64) and panel.picture.value[:4] == b"\x89PNG"
    assert json.loads(panel.record())["image"]["size"] == [64, 64]
    for content in (b"none", data.getvalue()[:200]):
        panel.upload.value = (uploaded("<b>.png", content),)
        assert "&lt;b&gt;.png is not a readable image" in panel.status.value
        assert panel.image.size == (64, 64)


def test_nothing_to_record_before_the_first_answer(panel):
    with pytest.raises(ValueError, match="there is no answer yet"):
        panel.record()


# The rater and the browser.


@pytest.fixture(scope="module")
def cached(panel_parts, tmp_path_factory):
    lmm, sae, layer, _, _ = panel_parts
    pictures = [noise(40, 30, seed) for seed in range(3)]
    return pictures, cache_activations(
        SAEInPlace(lmm, sae, layer), pictures, n_top=2, folder=tmp_path_factory.mktemp("cache")
    )


EXPLAINED = {4: {"concept": "cat <b>", "kind": "object"}, 9: {"concept": "red"}, 7: {"concept": "sky", "kind": "scene"}}


@pytest.fixture
def rating(cached, tmp_path):
    """A maker of raters over one file."""
    pictures, cache = cached

    def make(rater: str = "", explained=EXPLAINED) -> Rater:
        return Rater(tmp_path / "answers.jsonl", explained, ExemplarsByLatent(cache, pictures), rater=rater)

    return make


def given(rater: Rater) -> list[tuple]:
    return [(row["rater"], row["latent"], row["verdict"]) for row in read_ratings(rater.path)]


def test_nothing_can_be_answered_without_a_name(rating):
    rater = rating()
    assert all(button.disabled for button in rater.buttons.values()) and "type your name" in rater.status.value
    rater.keys.value = "yn"
    assert given(rater) == []
    rater.rate("yes")
    assert "needs the name" in rater.status.value and given(rater) == []
    rater.rater.value = "Ann"
    assert not any(button.disabled for button in rater.buttons.values()) and rater.status.value == ""


def test_each_answer_is_kept_at_once_and_another_day_goes_on_after_it(rating):
    rater = rating("Ann")
    assert "Latent 4" in rater.question.value and "<b>cat &lt;b&gt;</b> (object)" in rater.question.value
    rater.buttons["yes"].click()
    assert given(rater) == [("Ann", 4, "yes")] and "Latent 9" in rater.question.value
    again = rating("Ann")
    assert "Latent 9" in again.question.value and again.count.value == "1 of 3" and again.progress.value == 1
    again.rater.value = "Bob"
    assert "Latent 4" in again.question.value and again.count.value == "0 of 3"
    assert again.rater.options == ("Ann",)


def test_undo_brings_the_last_one_back_also_from_another_day(rating):
    rater = rating("Ann")
    rater.buttons["yes"].click()
    rater.buttons["no"].click()
    rating("Bob").buttons["unsure"].click()
    again = rating("Ann")
    again.back.click()
    assert given(again) == [("Ann", 4, "yes"), ("Bob", 4, "unsure")] and "Latent 9" in again.question.value
    again.back.click()
    assert given(again) == [("Bob", 4, "unsure")] and again.back.disabled
    again.undo()
    assert given(again) == [("Bob", 4, "unsure")]


def test_keys_that_arrive_together_or_late_count_once(rating):
    """The field only grows, several keys may come at once, and the rater never empties it."""
    rater = rating("Ann")
    for typed in ("y", "yxN", "yxNu", "yxNuz", "yxNuz"):
        rater.keys.value = typed
    assert given(rater) == [("Ann", 4, "yes"), ("Ann", 9, "no")]
    rater.keys.value = ""  # the person empties it
    rater.keys.value = "u"
    assert given(rater)[-1] == ("Ann", 7, "unsure")
    assert "All latents are answered" in rater.question.value and all(b.disabled for b in rater.buttons.values())
    rater.keys.value = "uy"
    assert len(given(rater)) == 3


@pytest.mark.parametrize(
    ("before", "after", "typed"),
    [("", "y", "y"), ("yn", "ynz", "z"), ("ynz", "nynz", "n"), ("ynz", "yynz", "y"), ("yn", "yzzn", "zz"),
     ("ynz", "u", "u"), ("ynz", "yn", ""), ("ynz", "yz", ""), ("yy", "y", ""), ("y", "", ""), ("ynz", "yuz", "u")],
)  # fmt: skip
def test_a_key_counts_wherever_the_caret_is_and_a_deletion_never(before, after, typed):
    assert added(before, after) == typed


def test_an_answer_on_another_explanation_does_not_count(rating):
    append_rating(rating("Ann").path, "Ann", 4, "dog", "object", "yes")
    assert rating("Ann").current() == 4


def test_a_file_that_cannot_be_written_is_reported_and_no_latent_is_skipped(rating):
    rater = rating("Ann")
    rater.path.mkdir()
    rater._save(4, "yes")
    assert "answers.jsonl" in rater.status.value and "Latent 4" in rater.question.value


def test_three_rows_of_pictures_are_shown(rating, cached):
    rater = rating("Ann")
    pictures, cache = cached
    columns = len(cache.top(4))
    assert columns > 0
    width, height = Image.open(io.BytesIO(rater.images.value)).size
    assert (width + 2) == columns * (rater.side + 2) and (height + 2) == 3 * (rater.side + 2)


def test_nothing_to_rate_is_refused(rating):
    with pytest.raises(ValueError, match="nothing to rate"):
        rating("Ann", {})


@pytest.fixture
def table(cached):
    pictures, cache = cached
    latents = np.flatnonzero(np.asarray(cache.live)).tolist()
    return LatentTable(cache, pictures, {n: {"concept": f"thing <{n}>", "iou": n / 24} for n in latents})


def test_the_browser_lists_pages_and_shows_details(table):
    browser = FeatureBrowser(table, sort="iou", per_page=2)
    order = table.find(sort="iou")
    assert len(order) > 4 and browser.latent == order[0]
    assert browser.count.value == f"1 to 2 of {len(order)}"
    browser.later.click()
    assert [b.description.split(":")[0] for b in browser.buttons] == [str(n) for n in order[2:4]]
    browser.buttons[1].click()
    assert browser.latent == order[3] and f"thing &lt;{order[3]}&gt;" in browser.title.value
    assert browser.views.value == table.strip(order[3], browser.side, 85) and "<svg" in browser.bars.value
    for _ in range(50):
        browser.later.click()
    assert browser.count.value.endswith(f"to {len(order)} of {len(order)}")
    browser.text.value = str(order[2])
    assert browser.latent == order[2] and browser.buttons[1].layout.display == "none"
    browser.text.value = "zebra"
    assert browser.count.value == "no latent fits"


def test_the_browser_hands_its_latent_on(table):
    chosen = []
    browser = FeatureBrowser(table, chosen.append)
    browser.hand_on.click()
    assert chosen == [browser.latent] == table.find()[:1]
    assert FeatureBrowser(table).hand_on.layout.display == "none"


def test_an_empty_table_or_an_unknown_column_is_refused(table):
    with pytest.raises(ValueError, match="no column 'x' to sort by"):
        FeatureBrowser(table, sort="x")
    with pytest.raises(ValueError, match="the table of latents is empty"):
        FeatureBrowser(LatentTable(table.cache, table.pictures, {}))
