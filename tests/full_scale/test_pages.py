"""Every page of the preset `paper` fits into 80 GB, by the forecast and by arithmetic written by hand."""

import copy

import pytest

from lmm_sae_nb.full_scale.costs import DEVICES, StageCost, Work
from lmm_sae_nb.full_scale.pages import dominating, page_hours, page_needs, page_rows
from lmm_sae_nb.full_scale.presets import read_preset

A100 = DEVICES["A100 80GB"]
IMAGES = 46_684

# By hand: Llama 3 8B with 64 more words, CLIP ViT-L/14, projector and newline; an SAE of 2^17 latents of width 4096.
P = 8_030_261_248 + 2 * 64 * 4096 + 303_507_456 + (1024 * 4096 + 4096) + (4096 * 4096 + 4096) + 4096
SAE = 4_295_507_968
SAMPLE = 576 + 36 * 49 + 100  # tokens of 640 x 480 px, and of the text
LAYER = SAMPLE * (3 * 14_336 + 6 * 4096)  # numbers in one layer's intermediate results of a sample
TOPK = 3 * 4 * 2**25
LIBRARIES = 10**9


@pytest.fixture(scope="module")
def paper(root) -> dict:
    return read_preset(root / "notebooks/params/paper.yaml")


@pytest.fixture(scope="module")
def needs(paper) -> dict:
    return page_needs(paper, IMAGES)


def auxk(tokens: int) -> float:
    """A tenth of the latents is dead; 512 of them for each token, 50 bytes each."""
    return 4 * 0.1 * 131_072 * 4096 + 50 * tokens * 512


def test_every_page_fits_into_80_gb_by_hand(needs):
    tokens = 81_920 // 8
    of_batch = 24 * 4096 + 48 * 256  # bytes of a token, in float32
    by_hand = {
        "01": 2 * P + 4 * SAE + 16 * tokens * 4096 * 2 + tokens * of_batch + TOPK + auxk(tokens) + 16 * LAYER * 2,
        "03": 0,  # photographs; the explainer is behind an endpoint
        # attribution at layer 7 in float32, with 24 layers above, beside InstructBLIP in 16 bits
        "05": 4 * P + 2 * 7.91e9 + SAE + 24 * 4 * LAYER + TOPK,
        # two SAEs learn in one pass, beside that of page 01
        "07": 2 * P + SAE + 2 * 4 * SAE + 2 * 16 * 16_384 * 4096 * 2 + 16_384 * of_batch + TOPK + auxk(16_384)
        + 16 * LAYER * 2,
        "08": 4 * P + SAE + 7 * 4 * LAYER + TOPK,  # layers 25 to 31
    }  # fmt: skip
    for page, expected in by_hand.items():
        assert sum(needs[page].values()) == pytest.approx(expected + LIBRARIES, rel=1e-6), page
        assert expected < 75e9
    assert list(needs) == ["01", "02", "03", "04", "05", "06", "07", "08", "A4"]
    assert max(sum(parts.values()) for parts in needs.values()) < A100.memory
    assert {row["fits A100 80GB"] for row in page_rows(needs, A100)} == {"yes"}


def test_what_does_not_fit_is_named(paper):
    wrong = copy.deepcopy(paper)
    wrong["05_compare_layers_and_models"]["at_once"] = 0  # all eight SAEs learn at once
    rows = {row["page"]: row for row in page_rows(page_needs(wrong, IMAGES), A100)}
    assert rows["05"]["fits A100 80GB"] == "no" and rows["05"]["most"] == "SAEs"
    assert rows["05"]["GB of one GPU"] > 4 * 6 * SAE / 1e9
    wrong["07_attribute_decisions"]["batch"] = 5
    attributed = page_needs(wrong, IMAGES)["07"]
    assert attributed["LMM activations"] == 5 * 24 * 4 * LAYER and sum(attributed.values()) > 80e9


def test_images_cost_time_only_where_threads_do_not_hide_them():
    def cost(workers: int) -> dict[str, float]:
        work = [Work("products", 3600.0 * A100.bfloat16, dtype="bfloat16")]  # an hour
        stage = StageCost("it", 1.0, work, {}, {}, {}, prepared=4 * 3600.0, workers=workers, ranked=1800.0)
        return stage.hours(A100, 1, 1.0)

    assert cost(0) == {"products": 1.0, "ranking": 0.5, "waiting for images": 4.0}
    assert cost(1)["waiting for images"] == 2.5
    assert cost(2)["waiting for images"] == 0.5
    assert cost(4)["waiting for images"] == 0.0


def test_the_longest_line_is_found_and_auxk_grows_with_its_latents(paper):
    hours = page_hours(paper, IMAGES, A100, 0.4)
    assert list(hours) == ["01", "02", "05", "07"]
    page, kind, most, of = dominating(hours)
    assert most == hours[page][kind] == max(max(parts.values()) for parts in hours.values())
    assert of == pytest.approx(sum(sum(parts.values()) for parts in hours.values()))
    tokens = 24_000 * 81_920
    by_hand = 4 * 4 * tokens * 512 * 4096 / A100.bandwidth / 8 / 0.4 / 3600
    assert hours["01"]["AuxK"] == pytest.approx(by_hand, rel=1e-6)
    more = copy.deepcopy(paper)
    more["01_train_sae"]["k_aux"] = 0
    assert page_hours(more, IMAGES, A100, 0.4)["01"]["AuxK"] == pytest.approx(4 * by_hand, rel=1e-6)
    more["01_train_sae"]["tf32"] = False
    slow = page_hours(more, IMAGES, A100, 0.4)["01"]["SAE encoder"]
    assert slow == pytest.approx(8 * hours["01"]["SAE encoder"], rel=1e-2)
