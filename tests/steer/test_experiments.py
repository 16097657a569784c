"""The experiments of page 06 against one clamp at a time, dense equations and counting by hand."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch

from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.steer import experiments
from lmm_sae_nb.steer.experiments import (
    CaseStudy,
    RankedKinds,
    case_metrics,
    case_studies,
    kinds_by_rank,
    latents_named,
    left_out_doses,
    rank_on_image,
    ranks_on_top_images,
    with_next_latents,
    word_activations,
    word_metrics,
)
from lmm_sae_nb.steer.fluency import Ordinary, ReadAnswer, perplexities
from lmm_sae_nb.steer.steering import Edit, Scope, compare

LATENTS, K = 24, 4
PROMPT_ONLY = Scope(phases=("prompt",))


def dense_latents(place, prompt, mask):
    """TopK(ReLU(...)) of the tokens in a mask, with a zero for every other latent."""
    x = place.lmm.hidden_states(prompt, place.layer)[mask].float()
    z = torch.relu((x - place.sae.b_dec) @ place.sae.W_enc.T + place.sae.b_enc)
    kept = z.topk(K)
    return torch.zeros_like(z).scatter(1, kept.indices, kept.values)


def test_the_latent_of_a_name_is_the_one_that_an_image_excites_most():
    cache = Mock(spec=LatentCache, top_means=torch.tensor([[3.0, 0.0], [5.0, 1.0], [9.0, 2.0], [1.0, 0.0]]))
    concepts = {0: "happy", 1: "happy", 2: "sad", 3: "sad"}
    assert latents_named(cache, concepts, ["sad", "happy", "angry"]) == {"sad": 2, "happy": 1}


def test_words_of_photographs_find_latents_that_no_concept_has_before():
    cache = Mock(spec=LatentCache, top_means=torch.tensor([[3.0], [5.0], [9.0], [1.0], [7.0]]))
    concepts = {0: "people eating", 1: "smiles", 2: "a happy crowd", 3: "greedy", 4: "unhappy dogs"}
    wanted, words = ["happy", "hungry", "greedy", "sad"], {"happy": ["smile"], "hungry": ["eating"], "greedy": []}
    found = latents_named(cache, concepts, wanted, words)
    assert found == {"happy": 2, "hungry": 0, "greedy": 3}  # "unhappy" is another word
    assert latents_named(cache, concepts, ["happy", "joyful"], {"joyful": ["happy"]}) == {"joyful": 2}
    assert latents_named(cache, {2: "happy eating"}, ["happy", "hungry"], words) == {"happy": 2}


def test_without_latents_there_are_no_case_studies_and_their_number_is_0():
    assert case_metrics("x", []) == {"x_steered": 0} and word_metrics([]) == {"word_latents": 0}
    assert with_next_latents([]) == experiments.at_chosen_dose([]) == []


@pytest.mark.parametrize(
    ("with_image", "scope", "keep_error"), [(True, Scope(), False), (True, Scope(), True), (False, PROMPT_ONLY, True)]
)
def test_case_studies_say_what_one_clamp_at_a_time_says(made, live, with_image, scope, keep_error):
    place, cache, pictures = made
    latents = {"happy": live[0], "sad": live[1]}
    image = pictures[0] if with_image else None
    how = dict(scope=scope, keep_error=keep_error)
    studies = case_studies(
        place, cache, latents, "why ?", [2, 40], unsteered="be {} !", image=image, max_new_tokens=4, **how
    )
    assert [(study.concept, study.latent) for study in studies] == list(latents.items())
    for study in studies:
        assert study.doses == [0, 2, 40]
        for dose, answer in zip(study.doses[1:], study.answers[1:], strict=True):
            edits = [Edit(study.latent, dose * float(cache.max[study.latent]))]
            alone = compare(place, "why ?", image, edits, scope, keep_error=keep_error, max_new_tokens=4)
            assert (study.untouched, study.answers[0], answer) == tuple(part[0] for part in alone)
        said = {name: place.lmm.generate(place.lmm.prompt(f"be {name} !"), max_new_tokens=4)[0] for name in latents}
        own = said.pop(study.concept)
        for read, answers in (
            (study.read, study.answers),
            (study.ordinary.control, [own]),
            (study.ordinary.reference, list(said.values())),
        ):
            assert [each.answer for each in read] == answers
            expected = perplexities(place.lmm, "why ?", image, answers)
            assert [each.perplexity for each in read] == pytest.approx(expected, rel=1e-3)
    assert case_studies(place, cache, {"happy": live[0]}, "why ?", [2], unsteered="be {} !") == []


def study(concept, untouched, answers, perplexities=(), repeated=0.0):
    """A case study with doses 0, 1, 2 …; ordinary answers have perplexity 4."""
    read = [ReadAnswer(*pair, repeated) for pair in zip(answers, perplexities or [4.0] * len(answers), strict=True)]
    ordinary = Ordinary([ReadAnswer("", 4.0, 0.0)], [ReadAnswer("", 5.0, 0.0)])
    return CaseStudy(concept, 1, "how ?", untouched, [float(n) for n in range(len(answers))], answers, read, ordinary)


def test_an_answer_names_its_concept_only_if_the_clamp_brings_the_name():
    assert study("sad", "fine .", ["fine .", "i am sad ."]).named == [False, True]
    assert study("sad", "fine .", ["fine .", "i am well ."]).named == [False, False]
    assert study("sad", "i am sad .", ["fine .", "i am sad ."]).named == [False, False]
    assert study("sad", "fine .", ["i am sad .", "i am sad ."]).named == [False, False]
    assert study("sad", "fine .", ["i am sad .", "well ."]).named == [False, False]


def test_the_dose_of_a_case_is_chosen_by_the_other_cases():
    at_one = study("sad", "-", ["-", "sad", "fine"])
    at_two = [study("shy", "-", ["-", "fine", "shy"]), study("ill", "-", ["-", "fine", "ill"], [1.0, 4.0, 16.0])]
    assert at_two[1].harmonic == pytest.approx([0, 0, 2 * 0.25 / 1.25])
    assert left_out_doses([at_one, *at_two]) == [2, 1, 1]  # the last: a tie


def test_case_metrics_are_those_of_the_chosen_doses():
    cases = [
        study("sad", "-", ["-", "fine", "sad"], [1.0, 1.0, 8.0], 0.5),
        study("shy", "-", ["-", "no sad", "shy"], [1.0, 1.0, 40.0]),
        study("ill", "-", ["-", "fine", "ill"]),
    ]
    metrics = case_metrics("x", cases)
    assert (metrics["x_steered"], metrics["x_dose"]) == (3, 2)
    assert (metrics["x_named"], metrics["x_control_named"]) == (3, 0)
    assert (metrics["x_named_any_dose"], metrics["x_control_named_any_dose"]) == (3, 1)
    assert metrics["x_fluency"] == metrics["x_control_fluency"] == pytest.approx((0.25 + 0.1 + 1) / 3)
    assert metrics["x_harmonic"] == pytest.approx((0.4 + 0.2 / 1.1 + 1) / 3) and metrics["x_control_harmonic"] == 0
    assert metrics["x_repeated"] == pytest.approx(0.5 / 3)
    assert metrics["x_unsteered_fluency"] == pytest.approx(0.8) and metrics["x_reference_perplexity"] == 4
    assert metrics["x_fluency_ratio"] == pytest.approx(1.35 / 3 / 0.8)


def test_the_control_of_a_case_is_searched_for_in_the_answers_to_the_next_latent(made, live):
    place, cache, pictures = made
    latents = {"sad": live[0], "happy": live[1], "sick": live[2]}
    turned = {"sad": live[1], "happy": live[2], "sick": live[0]}
    how = dict(unsteered="be {} !", image=pictures[0], max_new_tokens=4)
    found, again = (case_studies(place, cache, group, "why ?", [40], **how) for group in (latents, turned))
    for control, alone in zip(with_next_latents(found), again, strict=True):
        assert (control.concept, control.latent, control.answers) == (alone.concept, alone.latent, alone.answers)
        assert control.fluency == pytest.approx(alone.fluency, rel=1e-3) and control.named == alone.named


def test_activations_on_words_are_the_highest_of_the_prompts_text(made, live):
    place, cache, _ = made
    concepts = dict(zip(live[:3], ("cat", "a long name", "dog"), strict=True))
    highest = {}  # of each word: every latent's, with the word alone in its batch
    for word in concepts.values():
        prompt = place.lmm.prompt(f"is there a {word} ?")
        highest[word] = dense_latents(place, prompt, prompt.mask("text")).amax(0) / cache.max.clamp_min(1e-9)
    found = word_activations(place, cache, concepts, "is there a {} ?")
    assert [(row.latent, row.concept) for row in found] == list(concepts.items())
    for row in found:
        others = [float(highest[word][row.latent]) for word in concepts.values() if word != row.concept]
        assert row.on_name == pytest.approx(float(highest[row.concept][row.latent]), abs=1e-4)
        assert row.on_others == pytest.approx(np.mean(others), abs=1e-4)
    assert word_activations(place, cache, {live[0]: "cat", live[1]: "cat"}, "{}") == []


def test_word_metrics_count_names_above_others():
    rows = [experiments.WordActivation(n, "cat", on_name, 0.2) for n, on_name in enumerate((0.1, 0.2, 0.3, 0.6))]
    metrics = word_metrics(rows)
    assert metrics["word_latents"] == 4 and metrics["word_on_name"] == pytest.approx(0.3)
    assert metrics["word_on_others"] == pytest.approx(0.2) and metrics["word_name_above_others"] == 0.5
    assert metrics["word_on_name_low"] < 0.3 < metrics["word_on_name_high"]
    assert metrics["word_difference"] == pytest.approx(0.1)
    assert metrics["word_difference_low"] < 0.1 < metrics["word_difference_high"]


def test_the_word_difference_is_paired():
    """A difference that is small beside the spread of the latents, yet the same in each: its interval is narrow."""
    on_others = np.random.default_rng(0).random(40)
    rows = [experiments.WordActivation(n, "cat", other + 0.01, other) for n, other in enumerate(on_others)]
    silent = [experiments.WordActivation(40 + n, "dog", 0.0, 0.0) for n in range(3)]
    metrics = word_metrics([*rows, *silent, experiments.WordActivation(50, "cow", 0.0, 0.01)])
    assert metrics["word_on_others_high"] > metrics["word_on_name_low"] and metrics["word_difference_low"] > 0
    assert [metrics[f"word_{name}"] for name in ("more_on_name", "more_on_others", "silent")] == [40, 1, 3]


def mean_activations(place, image):
    prompt = place.lmm.prompt("", image)
    return dense_latents(place, prompt, prompt.mask("base")).mean(0)


def test_a_rank_counts_the_latents_that_are_more_active_on_the_image(made, live):
    place, cache, pictures = made
    for latent in live[:4]:
        means = mean_activations(place, pictures[2])
        assert rank_on_image(place, pictures[2], latent) == 1 + sum(float(m) > float(means[latent]) for m in means)
    top = pictures[cache.top(live[0])[0][0]]
    assert ranks_on_top_images(place, cache, {"sad": live[0]}, pictures) == {"sad": rank_on_image(place, top, live[0])}


def test_kinds_at_each_rank_are_counted_over_images(made, monkeypatch):
    place, cache, pictures = made
    kinds = {n: ("object", "colour", "unnamed")[n % 3] for n in range(0, LATENTS, 2)}
    monkeypatch.setattr(experiments, "RANKS", ((0, 2), (2, 5)))
    monkeypatch.setattr(experiments, "MOST_FREQUENT", 3)
    found = kinds_by_rank(place, pictures, cache, kinds, images=len(pictures))
    counts = {"rank 1-2": [], "rank 3-5": []}
    for picture in pictures:
        means = mean_activations(place, picture)
        active = sorted((n for n in kinds if means[n] > 0), key=lambda n: -float(means[n]))
        counts["rank 1-2"] += [kinds[n] for n in active[:2]]
        counts["rank 3-5"] += [kinds[n] for n in active[2:5]]
    frequent = sorted(kinds, key=lambda n: -float(cache.frequency[n]))[:3]
    counts |= {"most frequent": [kinds[n] for n in frequent], "all latents": list(kinds.values())}
    for name, row in counts.items():
        if row:
            expected = {kind: row.count(kind) / len(row) for kind in set(row)}
            assert found.fractions[name] == pytest.approx(expected), name


def test_metrics_of_kinds_are_means_over_images_beside_all_latents():
    found = RankedKinds(
        {"all latents": {"colour": 0.2, "material": 0.1, "object": 0.7}},
        {"colour": [0.5, 0.0, 0.1], "material": [0.0, 0.25, 0.05], "object": [0.5, 0.75, 0.85]},
    )
    metrics = found.metrics
    assert metrics["top_ranks_colour"] == pytest.approx(0.2) and metrics["all_latents_colour"] == 0.2
    assert metrics["top_ranks_low_level"] == pytest.approx(0.3)
    assert metrics["all_latents_low_level"] == pytest.approx(0.3)
    assert 0 <= metrics["top_ranks_low_level_low"] < 0.3 < metrics["top_ranks_low_level_high"] <= 0.5
    assert metrics["top_ranks_scene"] == metrics["all_latents_scene"] == 0  # no latent has such a name
    assert not [name for name in metrics if name.endswith("object")]


def test_the_first_ranks_are_counted_image_by_image(made):
    place, cache, pictures = made
    kinds = {n: ("colour", "object")[n % 2] for n in range(LATENTS)}
    top = kinds_by_rank(place, pictures, cache, kinds, images=len(pictures)).top
    by_hand = []
    for picture in pictures:
        means = mean_activations(place, picture)
        first = sorted((n for n in kinds if means[n] > 0), key=lambda n: -float(means[n]))[:10]
        by_hand.append(sum(kinds[n] == "colour" for n in first) / len(first))
    assert sorted(top["colour"]) == pytest.approx(sorted(by_hand))
