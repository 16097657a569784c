"""The results page: every claim with its control, the paper's number and the target; every metric explained."""

import json

import pytest

from book import results
from lmm_sae_nb.show import report
from lmm_sae_nb.show.seed_study import Measured, SeedStudy


@pytest.fixture
def run(tmp_path):
    """A run whose stages have a few metrics."""
    for stage, metrics in {
        "train": {"fvu": 0.2, "tokens": 123456},
        "score": {
            "iou_paper": 0.25, "iou_paper_low": 0.2, "iou_paper_high": 0.3,
            "iou_paper_area": 0.0244, "iou_paper_area_low": 0.02, "iou_paper_area_high": 0.03,
        },
        "compare": {"clip_paper_an-instructblip": 40.0, "clip_paper_an-instructblip_random": 20.0},
    }.items():  # fmt: skip
        (tmp_path / "tiny" / stage).mkdir(parents=True)
        (tmp_path / "tiny" / stage / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path / "tiny"


def row(page: str, start: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(start))


def test_a_claim_stands_beside_its_control_and_the_papers_number(run):
    line = row(results.page(run, []), "| [Latents are active where")
    assert (
        "| 0.250 [0.200, 0.300] | 0.0244 [0.0200, 0.0300]: the activation moved in the same images | 0.2 (Table 1"
        in line
    )


def test_a_claim_may_have_two_controls():
    metrics = {"interpret": {"guessed": 0.15}, "controls": {"random": 0.85, "random_low": 0.8, "random_high": 0.9}}
    both = [["interpret.guessed", "guessed names"], ["controls.random", "random rows"]]
    assert results.control(metrics, both) == "0.150: guessed names; 0.850 [0.800, 0.900]: random rows"


def test_a_pattern_means_the_metric_and_not_its_control(run):
    line = row(results.page(run, []), "| [It works in another architecture")
    assert "| 40.0 | 20.0: random images |" in line


def test_a_target_that_was_missed_says_so(run):
    assert "at most 0.1, **missed**" in row(results.page(run, []), "| [Few latents")


def test_a_control_of_several_draws_has_its_median_and_range_and_no_interval(run):
    (run / "hallucination").mkdir()
    draws = {"random_harmed_median": 0.02, "random_harmed_lowest": 0.01, "random_harmed_highest": 0.04}
    metrics = {"fitted_harmed": 0.01, "fitted_harmed_low": 0.0, "fitted_harmed_high": 0.05} | draws
    (run / "hallucination" / "metrics.json").write_text(json.dumps(metrics))
    page = results.page(run, [])
    assert "| 0.0200 (0.0100 to 0.0400): random latents" in row(page, "| [The fitted clamp breaks few")
    assert "| `random_harmed_median` | 0.0200 (0.0100 to 0.0400) |" in page


def test_a_claim_that_this_run_did_not_measure_is_left_out(run):
    assert "A judge agrees" not in results.page(run, [])


def test_every_metric_is_listed_once_with_its_interval(run):
    page = results.page(run, ["train", "score"])
    assert "| `tokens` | 123,456 |" in page
    assert "| `iou_paper` | 0.250 [0.200, 0.300] |" in page
    assert "_low" not in page
    assert page.index("Stage `train`") < page.index("Stage `score`") < page.index("Stage `compare`")


def test_a_claim_has_the_median_and_the_range_of_several_saes_beside_it(run):
    fvu = {"fvu": Measured.of([0.1, 0.4, 0.25])}
    study = SeedStudy("", "", {}, {}, [0, 1, 2], [], {"train": fvu})
    page = results.page(run, [], study)
    assert "| claim | ours | 3 SAEs: median (lowest to highest) | control |" in page
    assert "| 0.200 | 0.250 (0.100 to 0.400) | as many principal components |" in row(page, "| [Few latents")
    assert "| 0.250 [0.200, 0.300] |  | 0.0244" in row(page, "| [Latents are active where")  # not in the study
    assert "SAEs" not in results.page(run, [])


def test_a_run_without_numbers_says_so(tmp_path):
    assert "No stage has written" in results.page(tmp_path / "empty", [])


def test_the_longest_fitting_pattern_explains_a_metric(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "book").mkdir()
    known = {"score": {"iou_*": "an IoU", "iou_paper_*": "one of the paper's", "iou_paper_b": "b"}}
    (tmp_path / "book/metrics.json").write_text(json.dumps(known))
    monkeypatch.chdir(tmp_path)
    asked = ("iou_a", "iou_paper_a", "iou_paper_b", "clip")
    assert [report.meaning("score", name) for name in asked] == ["an IoU", "one of the paper's", "b", ""]


@pytest.mark.parametrize("file", ["published", "targets"])
def test_published_numbers_and_targets_are_numbers(file):
    for metrics in json.loads((results.HERE / f"{file}.json").read_text()).values():
        for entry in metrics.values():
            values = [value for name, value in entry.items() if name in ("value", "at_least", "at_most")]
            assert len(values) == 1
            assert isinstance(values[0], int | float)
            assert file != "published" or entry["where"]
