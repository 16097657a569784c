"""Steering without an SAE, against hand-written hooks and one answer at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from labelled import CONCEPTS
from scipy import sparse

from lmm_sae_nb.controls.direction_steering import (
    SteeringComparison,
    added,
    adding,
    compare_ways,
    prompting,
    steering_baselines,
)
from lmm_sae_nb.controls.directions import LabelledStates, mean_differences
from lmm_sae_nb.steer.fluency import Ordinary, ReadAnswer
from lmm_sae_nb.steer.objects import SteeredAnswer, SteeredQuestion, Steering, Try
from lmm_sae_nb.steer.steering import Edit, Scope, compare
from lmm_sae_nb.support.intervals import mean_interval
from lmm_sae_nb.truth.detectors import choose_detectors
from lmm_sae_nb.truth.label_maps import LabelMaps

IMAGE_TOKENS = Scope(("tiles", "newline"))


@pytest.fixture
def asked(studied):
    (place, *_), images, _ = studied
    return SteeredQuestion(place.lmm, "what ?", images[0], images[1:4], batch=2, max_new_tokens=3)


@pytest.fixture
def cached(studied):
    (place, *_), images, rows = studied
    return LabelledStates.read(place.lmm, place.layer, images, LabelMaps(rows, CONCEPTS))


def by_hook(lmm, layer, text, image, vector, kinds, generated=False, **generation):
    """The answer with a vector added by a hook of PyTorch alone."""
    prompt = lmm.prompt(text, image)
    mask = prompt.mask(*kinds)

    def hook(module, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        if hidden.shape[1] > 1:
            hidden[mask] += vector
        elif generated:
            hidden += vector
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = lmm.layer(layer).register_forward_hook(hook)
    try:
        return lmm.generate(prompt, **generation)[0], lmm.last_logits(prompt)[0]
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("scope", "generated"),
    [(IMAGE_TOKENS, False), (Scope(("base", "text")), True), (Scope(("base", "text"), phases=("prompt",)), False)],
)
def test_adding_a_vector_is_a_hook_that_adds_it(studied, scope, generated):
    (place, *_), images, _ = studied
    lmm = place.lmm
    vectors = 20 * torch.randn(2, lmm.width, generator=torch.Generator().manual_seed(0))
    prompt = lmm.prompt(["what ?"] * 2, images[:2])
    with torch.no_grad(), added(lmm, 1, prompt, vectors, scope):
        said, logits = lmm.generate(prompt, max_new_tokens=5), lmm.last_logits(prompt)
    for n in range(2):
        answer, expected = by_hook(lmm, 1, "what ?", images[n], vectors[n], scope.kinds, generated, max_new_tokens=5)
        assert said[n] == answer
        torch.testing.assert_close(logits[n], expected, atol=1e-3, rtol=1e-3)


def test_a_dose_of_a_direction_is_a_length(studied, asked):
    (place, *_), images, _ = studied
    directions = np.random.default_rng(0).normal(size=(3, place.lmm.width)).astype(np.float32)
    way = adding(1, directions, 4.0, asked, IMAGE_TOKENS)
    said = way([Try(2, "cat", 8.0), Try(0, "dog", 0.5), Try(1, "hat", 0.0)])
    for answer, vector in zip(
        said,
        (32 * directions[2] / np.linalg.norm(directions[2]), 2 * directions[0] / np.linalg.norm(directions[0])),
        strict=False,
    ):
        expected, _ = by_hook(
            place.lmm, 1, "what ?", images[0], torch.from_numpy(vector), IMAGE_TOKENS.kinds, max_new_tokens=3
        )
        assert answer == expected
    assert said[2] == asked.untouched


def test_a_prompt_says_the_concept_of_the_number(studied, asked):
    lmm, image = asked.lmm, asked.image
    said = prompting(asked, {0: "cat", 1: "dog"}, ["is it a {} ?", "say {} ."])([
        Try(0, "hat", 2.0), Try(1, "hat", 1.0), Try(0, "", 0.0)
    ])  # fmt: skip
    texts = ["say cat .", "is it a dog ?", "what ?"]
    assert said == [lmm.generate(lmm.prompt(text, image), max_new_tokens=3)[0] for text in texts]


@pytest.mark.slow
def test_every_way_steers_towards_the_same_objects(studied, cached, asked):
    (place, cache, *_), images, rows = studied
    truth, live = LabelMaps(rows, CONCEPTS), np.flatnonzero(cache.live).tolist()
    names = dict(zip(live[:4], ("cat", "dog", "hat", "car"), strict=True))  # no scene shows cars
    how = dict(doses=[2, 50], forms=["say {} .", "is it a {} ?"], count=2, choosing=1, most=300)
    found = compare_ways(studied[0], names, truth, cached, asked, **how)
    own = {name: latent for latent, name in names.items()}
    assert found.length == pytest.approx(float(cache.max[live[:3]].mean()))
    order = [row.concept for row in found.ways["latent"].reported]
    (chooser,) = {"cat", "dog", "hat"} - {*order}
    for way in found.ways.values():
        assert {row.concept for row in way.choosing} == {chooser}
        assert [row.concept for row in way.reported] == order == [row.concept for row in way.random]
        assert {row.dose for row in way.objects} == {way.dose, way.naming_dose}
        assert {row.dose for row in way.random} == {way.dose}
    clamped, difference, prompt = (found.ways[name] for name in ("latent", "difference", "prompt"))
    best = {each.concept: each.latent for each in choose_detectors(cache, truth, best=1)}
    for row, latent in [
        *((row, own[row.concept]) for row in clamped.reported),
        *((row, best[row.concept]) for row in found.ways["detector"].reported),
    ]:
        edits = [Edit(latent, row.dose * float(cache.max[latent]))]
        alone = compare(place, "what ?", images[0], edits, IMAGE_TOKENS, max_new_tokens=3)
        assert (clamped.untouched, clamped.spliced, row.answer) == tuple(part[0] for part in alone)
    columns = {name: n for n, (_, name) in enumerate(cached.names)}
    for name, directions in (
        ("difference", mean_differences(cached, [columns[name] for name in order])),
        ("decoder", place.sae.W_dec.detach().numpy()[[own[name] for name in order]]),
    ):
        for row, vector in zip(found.ways[name].reported, directions, strict=True):
            unit = torch.from_numpy(vector / np.linalg.norm(vector))
            added_by_hand, _ = by_hook(
                place.lmm, 1, "what ?", images[0], row.dose * found.length * unit, IMAGE_TOKENS.kinds, max_new_tokens=3
            )
            assert row.answer == added_by_hand
    assert difference.spliced == difference.untouched
    form = how["forms"][int(prompt.dose) - 1]
    for rows_of, said in ((prompt.reported, order), (prompt.random, order[::-1])):  # the control says the next object
        for row, name in zip(rows_of, said, strict=True):
            text = place.lmm.prompt(form.format(name), images[0])
            assert row.answer == place.lmm.generate(text, max_new_tokens=3)[0]
    metrics = steering_baselines(
        studied[0], names, images, truth, question="what ?", others=4, batch=2, max_new_tokens=3, **how
    )
    assert {"steer_latent_named_of_100", "steer_probe_control_fluency", "steer_prompt_dose"} <= metrics.keys()


def test_steering_needs_three_objects_that_latents_are_named_for_and_scenes_show(studied, cached, asked):
    live, truth = np.flatnonzero(studied[0].cache.live).tolist(), LabelMaps(studied[2], CONCEPTS)
    with pytest.raises(ValueError, match="named for 2 objects that 5 cached images show"):
        compare_ways(studied[0], dict(zip(live, ("cat", "dog", "red"), strict=False)), truth, cached, asked)
    shows = cached.shows.toarray()
    shows[:, cached.names.index(("object", "hat"))] = 0
    few = replace(cached, shows=sparse.csc_array(shows))
    with pytest.raises(ValueError, match="named for 2 objects"):
        compare_ways(studied[0], dict(zip(live, ("cat", "dog", "hat"), strict=False)), truth, few, asked)


def test_steering_metrics_compare_each_way_with_the_latent_of_the_same_concept():
    ordinary = Ordinary([ReadAnswer("", 4.0, 0.0)], [ReadAnswer("", 5.0, 0.0)] * 2)

    def way(*named: bool) -> Steering:
        rows = [SteeredAnswer(n, "hat", 2.0, "a", True, hit, 0.5, 0.0) for n, hit in enumerate(named)]
        return Steering("-", "-", ordinary, 2.0, 2.0, rows, rows[:1], rows)

    metrics = SteeringComparison({"latent": way(True, False, False), "probe": way(True, True, False)}, 7.0).metrics
    assert (metrics["steer_length"], metrics["steer_concepts"], metrics["steer_probe_dose"]) == (7, 3, 2)
    assert metrics["steer_probe_named_of_100"] == pytest.approx(200 / 3)
    assert metrics["steer_probe_named_above_latent"] == pytest.approx(1 / 3)
    assert metrics["steer_probe_named_above_latent_high"] == mean_interval([0, 1, 0]).high
    harmonic = 2 * 0.5 / 1.5
    assert metrics["steer_probe_harmonic_above_latent"] == pytest.approx(harmonic / 3)
    assert metrics["steer_unsteered_fluency"] == pytest.approx(0.8)
    assert not [name for name in metrics if "latent_unsteered" in name or name.startswith("steer_latent_named_above")]
