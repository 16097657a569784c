"""Numbers as the sentences of pages have them."""

from lmm_sae_nb.show import report
from lmm_sae_nb.show.report import across_saes, over_saes, percent
from lmm_sae_nb.show.seed_study import Measured, SeedStudy, read_study
from lmm_sae_nb.support.intervals import Mean


def test_a_fraction_is_written_in_percent_with_its_interval_if_it_has_one():
    assert percent(0.8471) == "85%" and percent(0.0128, 1) == "1.3%"
    assert percent(Mean(0.8471, 0.7592, 0.9068)) == "85% (76 to 91%)"
    assert percent(Mean(0.0, 0.0, 0.0128), 1) == "0.0% (0.0 to 1.3%)"


def test_controls_have_a_line_of_their_own_in_a_headline(monkeypatch):
    shown = []
    monkeypatch.setattr(report, "display", lambda text: shown.append(text.data))
    report.headline(None, "we are good.", "it is good.", "no reason.", controls="random ones are good.")
    report.headline(None, "we are good.", "it is good.", "no reason.")
    first, second = (text.split("\n>\n") for text in shown)
    assert first[1] == "> **Controls:** random ones are good." and first[:1] + first[2:] == second


def test_a_study_of_several_saes_gives_median_lowest_and_highest_in_words():
    named = Measured.of([0.9, None, 0.5, 0.6, 0.8])
    study = SeedStudy("", "", {}, {}, [0, 1, 2, 3, 4], [], {"steer": {"named": named}})
    assert over_saes(study, "steer", "named") == "median of 4 SAEs: 70%, lowest 50%, highest 90%"
    (sentence,) = across_saes(study, "steer", {"named": "right names", "unknown": "no"}, "{:.1f}".format)
    assert sentence == "Right names: median of 4 SAEs: 0.7, lowest 0.5, highest 0.9."
    assert over_saes(read_study(""), "steer", "named") == ""


def test_what_was_left_out_is_named_and_the_rest_is_counted(capsys):
    report.left_out({3: "row 3 is cut", 5: "row 5 is empty"}, {}, {9: "c.png is no image"}, most=2)
    assert capsys.readouterr().out.splitlines() == [
        "left out: row 3 is cut", "left out: row 5 is empty", "and 1 more",
    ]  # fmt: skip
    report.left_out({}, {})
    assert capsys.readouterr().out == ""
