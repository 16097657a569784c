"""The table of latents against hand-worked rows and brute force, and the book's features page in a browser."""

import io
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import llava_next, noise
from PIL import Image

from book import features
from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.show.latent_table import LatentTable
from lmm_sae_nb.show.thumbnails import GAP, heated, histogram_svg, sheet, webp

HOSTILE = "<script>window.broken = 1</script>```"
EXPLANATIONS = {
    "2": {"concept": "red cat", "answers": ["cat.", "a dog"], "true_iou": 0.5, "right": True},
    "5": {"concept": None, "outcome": "refused", "answers": [], "judge": {"gpt": 7, "said": "No"}},
    "3": {"concept": HOSTILE, "answers": ['"><img src=x onerror=window.broken=1>']},
}
SCORES = {"2": {"iou": 0.25, "kind": "object"}, "3": {"iou": 0.75, "kind": "part"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A real cache, with a store and without, of an untrained model and SAE on three pictures."""
    torch.manual_seed(0)
    lmm = LMM(*llava_next())
    sae = TopKSAE(lmm.width, 8, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    pictures = [noise(40, 30, seed) for seed in range(3)]
    folder = tmp_path_factory.mktemp("caches")
    caches = [
        cache_activations(SAEInPlace(lmm, sae, 1), pictures, n_top=2, folder=folder / str(store), store=store)
        for store in (None, "float32")
    ]
    return pictures, caches


@pytest.fixture(scope="module")
def table(made):
    return LatentTable(made[1][0], made[0], EXPLANATIONS, SCORES)


def test_rows_are_joined_nested_ones_flattened_and_the_unknown_left_out(table):
    assert table.rows[2]["iou"] == 0.25 and table.rows[2]["answers"] == "cat., a dog"
    assert table.rows[2]["right"] == "yes"
    assert table.rows[5]["judge.gpt"] == 7 and "concept" not in table.rows[5]
    assert table.columns == ["true_iou", "iou", "frequency", "mean", "max", "judge.gpt"]
    assert table.rows[3]["max"] == float(table.cache.max[3])
    assert [table.name(n) for n in (2, 5, 7)] == ["red cat", "refused", "not explained"]
    assert table.kinds() == ["object", "part"]


def test_search_by_word_number_and_kind(table):
    for text, found in {"": [2, 3, 5], "CAT": [2], "dog red": [2], "no": [5], "5": [5], "4": [], "zebra": []}.items():
        assert table.find(text) == found, text
    assert table.find(kind="part") == [3]


def test_sorted_by_a_column_the_unknown_last(table):
    assert table.find(sort="iou") == [3, 2, 5]
    assert table.find(sort="iou", descending=False) == [2, 3, 5]
    with pytest.raises(ValueError, match="no column 'kind' to sort by; choose one of true_iou, iou"):
        table.find(sort="kind")


CELLS = st.none() | st.integers(-3, 3) | st.just("n/a")


@given(values=st.dictionaries(st.integers(0, 7), CELLS, min_size=1), descending=st.booleans())
def test_any_column_is_sorted_as_brute_force_does(made, values, descending):
    table = LatentTable(made[1][0], made[0], {n: {"x": value, "y": 1} for n, value in values.items()})
    values = {n: value if isinstance(value, int) else None for n, value in values.items()}
    if any(value is not None for value in values.values()):
        found = table.find(sort="x", descending=descending)
        sign = -1 if descending else 1
        assert found == sorted(values, key=lambda n: (values[n] is None, sign * (values[n] or 0), n))


def test_a_latent_that_the_cache_does_not_have_is_refused(made):
    with pytest.raises(ValueError, match="a table has latent 8, but the cache has only 8"):
        LatentTable(made[1][0], made[0], {"8": {}})


def test_the_histogram_counts_every_activation_that_the_cache_kept(made):
    pictures, (plain, stored) = made
    latent = int(plain.frequency.argmax())
    few, all_of_them = (LatentTable(cache, pictures, {latent: {}}).histogram(latent) for cache in (plain, stored))
    maps = np.concatenate([np.asarray(plain.patch_map(latent, r)).ravel() for r in range(len(plain.top(latent)))])
    assert few.counts.sum() == (maps > 0).sum() and "top images" in few.label
    assert all_of_them.counts.sum() == round(float(stored.frequency[latent]) * 3 * stored._patches)
    assert "on 3 images" in all_of_them.label
    assert few.edges[0] == 0 and few.edges[-1] == pytest.approx(maps.max())


def test_a_latent_is_counted_as_itself_however_many_are_read_together(made, monkeypatch):
    pictures, (_, stored) = made
    monkeypatch.setattr("lmm_sae_nb.show.latent_table.BLOCK", 3)  # of 8
    table = LatentTable(stored, pictures, {latent: {} for latent in range(8)})
    for latent in (7, 0, 1, 2, 3, 6, 5, 4):
        images = [stored.store.image(n) for n in range(3)]
        acts = np.concatenate([image.acts[image.latents == latent] for image in images])
        found = table.histogram(latent)
        expected = np.histogram(acts, bins=24, range=(0, acts.max(initial=0) or 1))
        assert (found.counts == expected[0]).all() and found.edges == pytest.approx(expected[1])


# Pictures.


def test_active_patches_are_coloured_the_others_grey():
    image = Image.new("RGB", (4, 4), (200, 40, 40))
    pixels = np.asarray(heated(image, np.array([[0.0, 2.0], [0.0, 1.0]])), int)
    grey = int(np.asarray(image.convert("L"))[0, 0])
    assert (pixels[:, :2] == grey).all()
    top, half = pixels[0, 3], pixels[3, 3]
    assert top.sum() > half.sum() and len(set(top)) > 1 and len(set(half)) > 1
    assert (pixels[:2, 2:] == top).all() and (pixels[2:, 2:] == half).all()


def test_a_sheet_has_a_place_for_each_picture():
    pictures = [[noise(30, 20), noise(10, 40)], [noise(20, 20)]]
    whole = Image.open(io.BytesIO(webp(sheet(pictures, 16))))
    assert whole.format == "WEBP" and whole.size == (2 * 16 + GAP, 2 * 16 + GAP)
    with pytest.raises(ValueError, match="no picture to show"):
        sheet([[]], 16)


def test_a_histogram_draws_a_bar_for_every_full_bin_and_escapes_its_label():
    svg = histogram_svg(np.array([1, 0, 4]), np.array([0.0, 1.0, 2.0, 3.0]), "<b>")
    assert svg.count('z"/>') == 1 and len(re.findall("M", svg)) == 2 and "<b>" not in svg and "&lt;b&gt;" in svg
    heights = [float(height) for height in re.findall(r"v-([\d.]+)", svg)]
    assert heights[1] == pytest.approx(4 * heights[0], abs=0.2)


# The page.


@pytest.fixture(scope="module")
def shown(table, tmp_path_factory, browser):
    """The raw part of the page, in the browser."""
    folder = tmp_path_factory.mktemp("site")
    text = features.page(table, "tiny", folder / "pictures", "pictures", "six.html")
    (body,) = re.findall(r"^````\{raw\} html\n(.*?)^````$", text, re.MULTILINE | re.DOTALL)
    assert HOSTILE not in text and "```\n" not in body
    (folder / "features.html").write_text(body, encoding="utf-8")
    page, wrong = browser.new_page(), []
    page.on("request", lambda r: r.url.startswith(("file:", "data:")) or wrong.append(r.url))
    page.on("requestfailed", lambda r: "ABORTED" in r.failure or wrong.append(f"missing: {r.url}"))  # it gave up itself
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto((folder / "features.html").as_uri())
    yield page
    assert page.evaluate("window.broken") is None
    page.wait_for_load_state("networkidle")
    assert wrong == []
    page.close()


@pytest.mark.slow
def test_the_page_searches_and_sorts_as_the_table_does(shown, table):
    def latents():
        return [int(n) for n in shown.locator("article").evaluate_all("all => all.map(a => a.dataset.latent)")]

    for text in ("", "cat", "dog red", "5", "zebra", "script"):
        shown.fill("input[name=q]", text)
        for column in (None, *table.columns):
            shown.select_option("select", label=column.replace("_", " ") if column else "latent")
            for descending in (True, False):
                shown.set_checked("input[type=checkbox]", descending)
                assert latents() == table.find(text, sort=column, descending=descending), (text, column)
    shown.fill("input[name=q]", "")


def test_the_page_shows_pictures_columns_and_the_way_to_steer(shown):
    article = shown.locator("#latent-2")
    article.scroll_into_view_if_needed()
    shown.wait_for_function("document.querySelector('#latent-2 img').naturalWidth > 0")
    article.locator("summary").click()
    assert article.locator("td", has_text="red cat").is_visible()
    assert article.locator("svg path").is_visible()
    assert article.locator("a[href='six.html']").is_visible() and "panel.choose(2)" in article.inner_text()
    assert shown.locator("#latent-3 b").inner_text() == HOSTILE


def test_a_search_can_be_linked_to(shown):
    shown.goto(shown.url.split("?")[0] + "?q=refused")
    assert shown.locator("article").count() == 1


def test_a_run_without_explanations_has_a_page_that_says_so(tmp_path):
    features.write("no-such-run", tmp_path, None)
    assert "No latent of the run `no-such-run` has been explained yet" in (tmp_path / "features.md").read_text()
