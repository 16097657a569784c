"""Numbers as the sentences of pages have them."""

from lmm_sae_nb.show.report import percent
from lmm_sae_nb.support.intervals import Mean


def test_a_fraction_is_written_in_percent_with_its_interval_if_it_has_one():
    assert percent(0.8471) == "85 %" and percent(0.0128, 1) == "1.3 %"
    assert percent(Mean(0.8471, 0.7592, 0.9068)) == "85 % (76 to 91 %)"
    assert percent(Mean(0.0, 0.0, 0.0128), 1) == "0.0 % (0.0 to 1.3 %)"
