"""Objects on a white image, against one clamp at a time and counting by hand."""

import numpy as np
import pytest

from lmm_sae_nb.show import plots
from lmm_sae_nb.steer import objects
from lmm_sae_nb.steer.experiments import at_dose
from lmm_sae_nb.steer.fluency import Ordinary, ReadAnswer, perplexities
from lmm_sae_nb.steer.objects import ObjectSteering, SteeredAnswer, clamp_values, steer_objects
from lmm_sae_nb.steer.steering import Edit, Scope, compare
from lmm_sae_nb.support.intervals import proportion


@pytest.mark.slow
def test_objects_are_steered_as_one_clamp_at_a_time(made, live):
    place, cache, pictures = made
    concepts, scope = {n: f"thing {n}" for n in live[:5]}, Scope(("base", "tiles", "newline"))
    found = steer_objects(
        place, cache, concepts, "what ?", pictures[0], [3, 30],
        others=pictures[1:], count=3, choosing=2, scope=scope, batch=2, max_new_tokens=3,
    )  # fmt: skip
    assert len({row.latent for row in found.objects}) == 3 and len({row.latent for row in found.choosing}) == 2
    assert not {row.latent for row in found.objects} & {row.latent for row in found.choosing + found.random}
    assert {row.dose for row in found.choosing} == {3, 30}
    assert {row.dose for row in found.objects} == {found.dose, found.naming_dose} and {
        row.dose for row in found.random
    } == {found.dose}
    assert [row.concept for row in found.random] == [row.concept for row in found.reported]
    for row in found.objects + found.random + found.random_at_value:
        edits = [Edit(row.latent, row.dose * float(cache.max[row.latent]))]
        alone = compare(place, "what ?", pictures[0], edits, scope, max_new_tokens=3)
        assert (found.untouched, found.spliced, row.answer) == tuple(part[0] for part in alone)
        assert row.changed == (row.answer != found.spliced)
        (perplexity,) = perplexities(place.lmm, "what ?", pictures[0], [row.answer])
        expected = min(1, found.ordinary.perplexity / perplexity) * (1 - row.repeated)
        assert row.fluency == pytest.approx(expected, rel=1e-3)
    assert [row.latent for row in found.random_at_value] == [row.latent for row in found.random]
    same = [edit_value(cache, row) for row in found.random_at_value]
    assert same == pytest.approx([edit_value(cache, row) for row in found.reported], rel=1e-4)
    values = [edit_value(cache, row) for row in found.reported], [edit_value(cache, row) for row in found.random]
    assert list(clamp_values(found, cache).values()) == pytest.approx([np.mean(group) for group in values])


def test_of_few_latents_a_third_chooses_the_dose_and_of_two_none_is_clamped(made, live):
    place, cache, pictures = made
    how = dict(others=pictures[1:3], count=9, choosing=9, scope=Scope(("base",)), max_new_tokens=1)
    few, two = (
        steer_objects(place, cache, dict.fromkeys(live[:count], "thing"), "?", pictures[0], [3], **how)
        for count in (3, 2)
    )
    assert len(few.reported) == 2 and len(few.choosing) == 1
    assert two.metrics == {"objects_steered": 0} and two.objects == two.choosing == two.random == []
    assert clamp_values(two, cache) == {} and plots.dose_response(two) == []


def edit_value(cache, row):
    return at_dose(cache, row.latent, row.dose)[0].value


def test_the_dose_is_chosen_on_other_latents_and_the_control_searched_for_the_same_names(made, live, monkeypatch):
    """A model that names the concept of a reported latent at dose 9, of another one from dose 5, and blue at random.

    Its answers at dose 9 are not fluent.
    """
    place, cache, pictures = made
    concepts = {n: f"thing{n}" for n in live[:6]}
    reported = set(np.random.default_rng(7).permutation(sorted(concepts)).tolist()[:3])

    def fake(place, question, image, settings, scope, **_):
        said = []
        for setting in settings:
            dose = round(setting[0].value / float(cache.max[setting[0].latent])) if setting else 0
            latent = setting[0].latent if setting else None
            named = latent in concepts and dose >= (9 if latent in reported else 5)
            said.append(f"{dose} a thing{latent} ." if named else "nothing ." if dose < 5 else "blue .")
        return said

    def read(lmm, text, image, answers, **_):
        return [ReadAnswer(answer, 40.0 if answer[0] == "9" else 4.0, 0.0) for answer in answers]

    monkeypatch.setattr(objects, "answers", fake)
    monkeypatch.setattr(objects, "read_answers", read)
    ordinary = Ordinary([ReadAnswer("", 4.0, 0.0)], [ReadAnswer("", 5.0, 0.0)] * 2)
    monkeypatch.setattr(objects, "answers_about_others", lambda *_, **__: ordinary)
    how = dict(others=pictures, count=3, max_new_tokens=1, seed=7)
    found = steer_objects(place, cache, concepts, "?", pictures[0], [2, 5, 9], **how)
    assert {row.latent for row in found.objects} == reported and found.spliced == "nothing ."
    assert found.dose == found.naming_dose == 5  # though the reported latents would do better at 9
    names = {group: means(curve) for group, curve in found.curves("names_concept").items()}
    others = "other object latents, which choose the dose"
    assert names == {"object latents": {5: 0}, others: {2: 0, 5: 1, 9: 1}, "random live latents": {5: 0}}
    assert means(found.curves("fluency")[others]) == pytest.approx({2: 1, 5: 1, 9: 0.1})
    assert means(found.curves("harmonic")[others]) == pytest.approx({2: 0, 5: 1, 9: 0.2 / 1.1})
    metrics = found.metrics
    assert (metrics["dose"], metrics["objects_steered"], metrics["dose_chosen_on"]) == (5, 3, 3)
    assert (metrics["named_of_100"], metrics["control_named_of_100"], metrics["changed_of_100"]) == (0, 0, 100)
    assert metrics["changed_of_100_low"] == pytest.approx(100 * proportion([True] * 3).low)


def means(curve):
    return {dose: mean.mean for dose, mean in curve.items()}


def test_object_metrics_are_those_of_the_chosen_dose():
    def row(dose, named, fluency, repeated=0.0):
        return SteeredAnswer(1, "hat", dose, "a", True, named, fluency, repeated)

    objects = [row(4.0, True, 0.5, 0.2), row(4.0, False, 1.0), row(8.0, True, 0.1), row(8.0, True, 0.3)]
    ordinary = Ordinary([ReadAnswer("", 4.0, 0.0)], [ReadAnswer("", 5.0, 0.0)] * 2)
    controls = [row(4.0, False, 1.0)] * 2, [row(7.0, False, 0.6), row(9.0, True, 0.6)]
    metrics = ObjectSteering("-", "-", ordinary, 4.0, 8.0, objects, [row(4.0, True, 1.0)], *controls).metrics
    assert (metrics["named_of_100"], metrics["naming_dose"], metrics["naming_dose_named_of_100"]) == (50, 8, 100)
    assert (metrics["control_named_of_100"], metrics["control_value_named_of_100"]) == (0, 50)
    assert metrics["fluency"] == pytest.approx(0.75) and metrics["harmonic"] == pytest.approx(1 / 3)
    assert metrics["named_fluency"] == 0.5 and metrics["fluent_named_of_100"] == 0
    assert metrics["unsteered_fluency"] == pytest.approx(0.8)
    assert metrics["fluency_ratio"] == pytest.approx(0.75 / 0.8)
    assert metrics["repeated"] == pytest.approx(0.1) and metrics["naming_dose_fluency"] == pytest.approx(0.2)
