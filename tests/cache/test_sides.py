"""Which latents respond to images, to text, or to both: counted by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from models import noise

from lmm_sae_nb.cache.sides import side_metrics, side_rows, sides
from lmm_sae_nb.cache.texts import cache_texts
from lmm_sae_nb.sae.in_place import SAEInPlace

pytestmark = pytest.mark.usefixtures("unchecked")  # for its stand-ins


def firings(base: list[int], tiles: list[int], text: list[int], tokens: tuple[int, int, int]) -> SimpleNamespace:
    """Firings of some latents on 1000 base tokens and so on."""
    return SimpleNamespace(
        fired=np.array([base, tiles, [9] * len(base), text]),
        tokens=dict(zip(("base", "tiles", "newline", "text"), (tokens[0], tokens[1], 50, tokens[2]), strict=True)),
    )


def test_a_side_follows_from_the_rates_and_only_where_chance_is_a_bad_explanation():
    """1,000 image tokens and 100 of text. The latents: on images alone, often; the same, twice; on text alone; on both
    at one rate; on text at a tenth of the images' rate, and just below it; never."""
    cache = firings(
        [150, 1, 0, 100, 100, 210, 0], [150, 1, 0, 100, 100, 210, 0], [0, 0, 9, 20, 2, 4, 0], (500, 500, 100)
    )
    found = sides(cache)
    assert found.image_only.tolist() == [True, False, False, False, False, True, False]
    assert found.text_only.tolist() == [False, False, True, False, False, False, False]
    assert found.both.tolist() == [False, False, False, True, True, False, False]
    assert found.undetermined.tolist() == [False, True, False, False, False, False, False]
    assert side_metrics(found) == {
        "latents_image_only": 2, "latents_text_only": 1, "latents_both": 2, "latents_undetermined": 1,
        "latents_image_only_fraction": 0.4, "latents_text_only_fraction": 0.2, "latents_both_fraction": 0.4,
    }  # fmt: skip


def test_chance_is_that_of_tokens_drawn_without_replacement():
    """Two firings on images, none on text: of 1,100 tokens, neither of two drawn is one of the 100 of text."""
    cache, p = firings([2], [0], [0], (500, 500, 100)), (1000 / 1100) * (999 / 1099)
    assert sides(cache, max_probability=p - 1e-6).undetermined.all()
    assert sides(cache, max_probability=p + 1e-6).image_only.all()


def test_latents_active_on_random_tokens_are_on_both_sides_or_undetermined():
    rng = np.random.default_rng(0)
    total = rng.integers(0, 300, 2000)
    text = rng.hypergeometric(500, 10_000, total)
    found = sides(firings((total - text).tolist(), [0] * 2000, text.tolist(), (5000, 5000, 500)))
    assert found.image_only.sum() + found.text_only.sum() < 0.02 * 2000
    assert found.both.sum() > 1000


def test_the_rows_have_every_active_latent_once_with_its_top_words(lmm, sae, tmp_path):
    rows = [{"image": noise(seed=n), "question": "what ?", "answer": f"it is {n} ."} for n in range(4)]
    cache = cache_texts(SAEInPlace(lmm, sae, 1), rows, n_top=4, folder=tmp_path)
    rows, found = side_rows(lmm, cache), sides(cache)
    assert len(rows) == sum(latents.sum() for latents in found)
    for name, latents in found._asdict().items():
        for n in np.flatnonzero(latents):
            row = rows[str(n)]
            assert row["responds to"] == name.replace("_", " ")
            assert row["text tokens"] == [lmm.tokenizer.decode([word.token]) for word in cache.top_words(int(n))]


@pytest.mark.parametrize(("tokens", "min_ratio", "message"), [
    ((0, 0, 9), 0.1, "0 image and 9 text tokens; give samples that have both"),
    ((9, 9, 0), 0.1, "18 image and 0 text tokens"),
    ((9, 9, 9), 0.0, "min_ratio is 0.0"),
])  # fmt: skip
def test_sides_without_tokens_and_a_wrong_ratio_are_refused(tokens, min_ratio, message):
    with pytest.raises(ValueError, match=message):
        sides(firings([1], [1], [1], tokens), min_ratio)
