"""Steering by kind of concept: what names a concept, what chooses the dose, and reasons where nothing is measured."""

import numpy as np
import pytest
from labelled import CONCEPTS

from lmm_sae_nb.controls import kind_steering
from lmm_sae_nb.controls.kind_steering import kind_baselines, split_by_concept, steer_kinds
from lmm_sae_nb.interpret.explainers import mentions
from lmm_sae_nb.pictureworld.world.concepts import KINDS
from lmm_sae_nb.pictureworld.world.questions import FOR_KIND
from lmm_sae_nb.steer.objects import SteeredQuestion
from lmm_sae_nb.truth.label_maps import LabelMaps


@pytest.mark.parametrize(
    ("kind", "concept", "naming", "other"),
    [
        (
            "object",
            "star",
            ["a blank scene with a red star in the center .", "two stars"],
            ["a blank scene .", "start ."],
        ),
        ("scene", "sea", ["a sea scene ."], ["a seat scene ."]),
        ("material", "wood", ["wood .", "Wood"], ["wooden .", "metal ."]),
        ("texture", "rings", ["rings ."], ["strings .", "ring ."]),
        ("colour", "red", ["red ."], ["a reddish one ."]),
        ("face", "sad", ["sad ."], ["sadly .", "happy ."]),
        ("word", "bus", ["bus ."], ["busy .", "taxi ."]),
    ],
)
def test_an_answer_names_a_concept_if_it_has_its_word(kind, concept, naming, other):
    assert concept in KINDS[kind] and FOR_KIND[kind]
    assert all(mentions(answer, concept) for answer in naming)
    assert not any(mentions(answer, concept) for answer in other)


def test_every_kind_has_a_question_or_says_that_there_is_none():
    assert FOR_KIND.keys() == KINDS.keys()
    assert [kind for kind, question in FOR_KIND.items() if not question] == ["part"]


@pytest.mark.parametrize("seed", range(20))
def test_no_concept_both_chooses_the_dose_and_is_reported(seed):
    rng = np.random.default_rng(seed)
    latents = {n: f"concept {rng.integers(rng.integers(1, 9))}" for n in range(rng.integers(3, 40))}
    split = split_by_concept(latents, 12, 6, seed)
    reported, choosing = ({latents[n] for n in part} for part in (split.reported, split.choosing))
    assert not reported & choosing
    assert bool(choosing) == (len(set(latents.values())) >= 3)
    assert 0 < len(split.reported) <= 12 and len(split.choosing) <= 6


def questions(studied, **texts):
    (place, *_), images, _ = studied
    return {
        kind: text and SteeredQuestion(place.lmm, text, images[0], images[1:5], batch=4, max_new_tokens=2)
        for kind, text in texts.items()
    }


def named(studied, names):
    live = np.flatnonzero(studied[0].cache.live).tolist()
    return {n: {"concept": concept, "kind": kind} for n, (concept, kind) in zip(live, names, strict=False)}


def test_each_kind_has_its_question_and_a_dose_of_its_own_concepts(studied, monkeypatch):
    seen, steer_by = {}, kind_steering.steer_by

    def recorded(way, asked, concepts, doses, **how):
        seen[asked.text] = {part: {concepts[n] for n in how[part]} for part in ("reported", "choosing")}
        return steer_by(way, asked, concepts, doses, **how)

    monkeypatch.setattr(kind_steering, "steer_by", recorded)
    rows = named(
        studied,
        [(name, "object") for name in ("cat", "dog", "hat", "car")]
        + [("red", "colour"), ("red", "colour"), ("blue", "colour"), ("in", "part"), ("say", "word")],
    )
    asked = questions(studied, colour="what colour ?", object="what ?", part=None, word="what word ?")
    found = steer_kinds(studied[0], rows, asked, doses=[2, 8])
    assert found.metrics["dose_chosen_on_object"] == 1
    assert not seen["what ?"]["reported"] & seen["what ?"]["choosing"]
    assert (found.metrics["dose_chosen_on_colour"], found.metrics["dose_colour"]) == (0, found.metrics["dose_object"])
    assert seen["what colour ?"] == {"reported": {"red", "blue"}, "choosing": set()}
    assert (found.metrics["steered_colour"], found.metrics["concepts_colour"]) == (3, 2)
    assert found.metrics["steered"] == 3 + found.metrics["steered_object"]
    of_kinds = [
        found.metrics[f"named_of_100_{kind}"] * found.metrics[f"steered_{kind}"] for kind in ("object", "colour")
    ]
    assert found.metrics["named_of_100"] == pytest.approx(sum(of_kinds) / found.metrics["steered"])
    reasons = {"part": "no question", "word": "1 latents have such a name; it takes 3", "colour": "the dose of objects"}
    for kind, reason in reasons.items():
        (why,) = [why for why in found.why if f"by kind, {kind}:" in why]
        assert reason in why
    assert (found.metrics["latents_part"], found.metrics["steered_part"]) == (1, 0)


def test_a_name_that_is_said_without_a_clamp_is_left_out(studied, monkeypatch):
    monkeypatch.setattr(kind_steering, "clamping", lambda *_: lambda tries: ["a cat ."] * len(tries))
    rows = named(studied, [("cat", "object")] * 3 + [("dog", "object")])
    found = steer_kinds(studied[0], rows, questions(studied, object="what ?"))
    assert found.metrics == {"latents_object": 4, "steered_object": 0, "steered": 0}
    assert "1 latents have such a name, not counting 3 whose name the unclamped answer has" in found.why[0]


@pytest.mark.slow
def test_methods_without_an_sae_are_measured_by_kind_and_together(studied):
    _, images, rows = studied
    live = np.flatnonzero(studied[0].cache.live).tolist()
    names = {"object": dict(zip(live[:3], ("cat", "dog", "hat"), strict=True)), "colour": {live[4]: "red"}}
    asked = questions(studied, object="what ?", colour="which ?", part=None)
    found = kind_baselines(
        studied[0], names, images, LabelMaps(rows, CONCEPTS), asked, doses=[20], count=2, choosing=1, most=300,
    )  # fmt: skip
    assert found.metrics["steer_concepts_object"] == found.metrics["steer_concepts"] == 2
    for way in ("latent", "decoder", "detector", "difference", "probe", "prompt"):
        for metric in ("named_of_100", "fluency", "control_named_of_100"):
            name = f"steer_{way}_{metric}"
            assert found.metrics[name] == found.metrics[f"{name}_object"]
            assert {f"{name}_object_low", f"{name}_object_high"} <= found.metrics.keys()
    assert "steer_probe_named_above_latent_object" in found.metrics
    assert [why.split(": ")[0] for why in found.why] == ["steering by kind, colour", "steering by kind, part"]
    assert "named for 1 colours" in found.why[0] and "no question" in found.why[1]
