"""Explaining by steering: against one clamp at a time, and the two ways of explaining counted by hand."""

import numpy as np
import pytest
import torch
from models import llava_next, noise

from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.interpret.explain import as_rows
from lmm_sae_nb.interpret.explainers import Answer, Outcome, Vocabulary
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.steer.explain import (
    both_ways,
    explain_by_steering,
    measure_steering_explanations,
    steering_accuracy,
)
from lmm_sae_nb.steer.steering import Edit, Scope, compare

WORLD = Vocabulary({"scene": ["sea", "blank"], "object": ["cat", "dog", "circle"], "colour": ["red"], "word": ["cat"]})


# --- The concept of an answer ---------------------------------------------------------------------------------


def test_the_concept_of_an_answer_is_the_first_that_the_other_answer_does_not_mention():
    said = [
        "a blank scene with a dog at the top .", "a sea scene with a cat .", "a blank scene with Red circles .",
        "a blank scene .", "a category of seaside dogged reds",
    ]  # fmt: skip
    found = WORLD.find(said, "a blank scene .")
    assert [answer.text for answer in found] == ["dog", "sea", "red", None, "red"]
    assert [answer.outcome for answer in found[3:]] == [Outcome.UNPARSEABLE, Outcome.EXPLAINED]
    assert [answer.raw for answer in found] == said
    assert WORLD.mentioned("Red circles , a cat and two dogs") == ["red", "circle", "cat", "dog"]


# --- Clamps ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An untrained model with an untrained SAE, and its cache of four images."""
    torch.manual_seed(0)
    lmm = LMM(*llava_next())
    sae = TopKSAE(lmm.width, 24, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    place, pictures = SAEInPlace(lmm, sae, 1), [noise(40, 30, seed) for seed in range(4)]
    return place, cache_activations(place, pictures, n_top=2, folder=tmp_path_factory.mktemp("cache"))


def first_letter(said, spliced):
    """A finder for answers of an untrained model."""
    letters = [next((c for c in answer if c.isalnum() and c not in spliced), None) for answer in said]
    pairs = zip(said, letters, strict=True)
    return [Answer(Outcome.EXPLAINED if c else Outcome.UNPARSEABLE, c, answer) for answer, c in pairs]


def as_kind(concepts):
    return ["digit" if concept.isdigit() else "letter" for concept in concepts]


def test_an_explanation_is_what_one_clamp_makes_the_model_say(made):
    place, cache = made
    live = np.flatnonzero(np.asarray(cache.live)).tolist()[:7]
    image, scope, how = noise(40, 30, 9), Scope(("tiles", "newline")), dict(max_new_tokens=5)
    found = explain_by_steering(
        place, cache, live, "why ?", image, 30.0, first_letter, as_kind, scope=scope, batch=3, **how
    )
    assert list(found) == live
    outcomes = set()
    for latent, row in found.items():
        edits = [Edit(latent, 30 * float(cache.max[latent]))]
        alone = compare(place, "why ?", image, edits, scope, **how)
        (spliced,), (said,) = alone.spliced, alone.steered
        assert row.answer == said
        (expected,) = first_letter([said], spliced)
        outcome = Outcome.REFUSED if said == spliced else expected.outcome
        assert row.outcome is outcome
        assert row.concept == (expected.text if outcome is Outcome.EXPLAINED else None)
        assert row.kind == (as_kind([row.concept])[0] if row.concept else None)
        outcomes.add(outcome)
    assert Outcome.EXPLAINED in outcomes


def test_a_clamp_that_changes_nothing_explains_nothing(made):
    place, cache = made
    live = np.flatnonzero(np.asarray(cache.live)).tolist()[:2]
    never = Scope(phases=("prompt",), positions=())
    found = explain_by_steering(
        place, cache, live, "why ?", noise(40, 30, 9), 30.0, first_letter, as_kind, scope=never, max_new_tokens=3
    )
    assert [(row.outcome, row.concept) for row in found.values()] == [(Outcome.REFUSED, None)] * 2


def test_a_latent_that_is_never_active_has_no_dose(made):
    place, cache = made
    silent = np.flatnonzero(~np.asarray(cache.live)).tolist()
    if not silent:
        cache.max[3] = 0.0
        silent = [3]
    with pytest.raises(ValueError, match=rf"\[{silent[0]}\b.*silent"):
        explain_by_steering(place, cache, silent[:1], "why ?", noise(), 2.0, first_letter, as_kind)


def test_the_panel_clamps_as_many_latents_as_asked(made):
    place, cache = made
    live = np.flatnonzero(np.asarray(cache.max) > 0).tolist()
    rows = {n: row(f"{n % 2}", "0") for n in live}
    how = dict(scope=Scope(("tiles", "newline")), max_new_tokens=3)
    metrics = measure_steering_explanations(
        place, cache, rows, "why ?", noise(), 30.0, first_letter, as_kind, latents=5, **how
    )
    assert metrics["ways_latents"] == 5
    drawn = np.random.default_rng(0).permutation(live)[:5].tolist()
    alone = explain_by_steering(place, cache, drawn, "why ?", noise(), 30.0, first_letter, as_kind, **how)
    assert metrics == steering_accuracy(rows, as_rows(alone))


# --- Two ways -------------------------------------------------------------------------------------------------


def row(concept, true=None, kind="object", true_kind="object"):
    outcome = "explained" if concept else "refused"
    return {
        "outcome": outcome, "concept": concept, "kind": concept and kind, "true_concept": true,
        "true_kind": true and true_kind,
    }  # fmt: skip


EXEMPLARS = {
    1: row("cat", "cat"), 2: row("cat", "dog"), 3: row("dog", "dog"), 4: row(None, "cat"), 5: row(None, "dog"),
    6: row("sea", "sea", "scene", "scene"), 7: row(None), 8: row("cat"), 99: row("cat", "cat"),
}  # fmt: skip
STEERED = {
    1: row("cat"), 2: row("dog"), 3: row(None), 4: row("cat"), 5: row("cat"), 6: row("cat"), 7: row("dog"), 8: row(None)
}  # fmt: skip


def test_the_names_of_both_ways_are_the_first_that_there_is_and_those_that_agree():
    ways = both_ways(EXEMPLARS, STEERED)
    assert list(ways["both"].values()) == ["cat", "cat", "dog", "cat", "cat", "sea", "dog", "cat"]
    assert list(ways["agreed"].values()) == ["cat", *[None] * 7]
    assert 99 not in ways["exemplars"]


def test_ways_of_explaining_are_counted_by_hand():
    m = steering_accuracy(EXEMPLARS, STEERED)
    assert m["ways_latents"] == 8
    fractions = {
        "exemplars_explained": 5 / 8, "exemplars_accuracy": 3 / 5, "exemplars_right": 3 / 6,
        "steering_explained": 6 / 8, "steering_accuracy": 3 / 6, "steering_right": 3 / 6,
        "both_explained": 1, "both_accuracy": 4 / 8, "both_right": 4 / 6,
        "agreed_explained": 1 / 8, "agreed_accuracy": 1, "agreed_right": 1 / 6,
        "exemplars_right_object": 2 / 5, "steering_right_object": 3 / 5, "steering_accuracy_object": 3 / 4,
        "steering_right_scene": 0, "exemplars_right_scene": 1,
        "steering_where_refused": 1 / 3, "ways_agree": 1 / 3,
    }  # fmt: skip
    assert {name: m[name] for name in fractions} == pytest.approx(fractions)
    assert m["steering_accuracy_low"] < 0.5 < m["steering_accuracy_high"]


def test_controls_of_steering_keep_to_the_kind():
    """A guess is a name of the same kind; another answer is that of a latent whose true concept is of that kind."""
    same = {n: row("cat", "cat") for n in range(6)} | {n: row("sea", "sea", "scene", "scene") for n in range(6, 12)}
    m = steering_accuracy(same, same)
    assert m["steering_guessed"] == m["steering_other_answer"] == m["steering_accuracy"] == 1
    halves = {n: row("ab"[n % 2], "ab"[n % 2]) for n in range(400)}
    m = steering_accuracy(halves, halves, seed=2)
    for name in ("steering_guessed", "steering_other_answer"):
        assert m[f"{name}_low"] < 199 / 399 < m[f"{name}_high"]


def test_rows_without_a_truth_or_of_other_latents_are_refused():
    with pytest.raises(ValueError, match="0 latents are in both"):
        steering_accuracy(EXEMPLARS, {77: row("cat")})
    with pytest.raises(ValueError, match="no true concept"):
        steering_accuracy({1: {"concept": "cat"}}, {1: row("cat")})
