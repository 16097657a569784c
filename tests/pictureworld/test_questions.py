"""Questions: every answer worked out again from the pixels and label maps alone; doses, balance and vocabulary."""

import re
from collections import Counter

import numpy as np
import pytest
import worlds
from scipy.stats import binomtest

from lmm_sae_nb.pictureworld.llava.model import new_tokenizer
from lmm_sae_nb.pictureworld.world import questions
from lmm_sae_nb.pictureworld.world.concepts import ANSWERED_FROM_MEMORY, EMOTIONS, FACTS, STORIES
from lmm_sae_nb.pictureworld.world.questions import PICTURED, UNPICTURED, aside, lesson, shown

SEEDS, CHARTS, MASKED = range(240), range(60), range(100)
ATLAS = {  # which rivers' basins reach which countries
    "amazon": {"brazil", "peru", "bolivia", "ecuador"},
    "nile": {"egypt", "sudan", "kenya", "uganda"},
    "danube": {"austria", "serbia", "romania", "hungary"},
    "mekong": {"laos", "vietnam", "thailand", "china"},
}


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def pictures():
    yield from (worlds.scene(seed) for seed in SEEDS)
    yield from (worlds.chart(seed) for seed in CHARTS)


def listed(parts: list[str]) -> str:
    return re.sub(r" , ([^,]*)$", r" and \1", " , ".join(parts))


kept = {}


def seen_by(scene):
    """What there is to answer from: background, things by noun, and a map's labels; looked up once a scene."""
    if id(scene) not in kept:
        (background,) = worlds.names(scene.labels["scene"], "scene")
        labels = worlds.countries(scene) if background == "map" else {}
        kept[id(scene)] = scene, (background, worlds.things(scene), labels)  # the scene too: its id stays its own
    return kept[id(scene)][1]


def truth(asked: str, scene) -> str:
    """The answer to a question, from pixels and label maps alone."""
    background, things, labels = seen_by(scene)
    if asked in ("what do you see in this image ?", "describe the image ."):
        if background == "map":
            (title,) = set(worlds.words(scene)) - set(labels)
            return f"a map of the {title} basin with {listed(list(labels))} ."
        parts = [f"{phrase} {worlds.at(worlds.place(mask))}" for mask, phrase in things.values()]
        return f"a {background} scene with {listed(parts)} ." if parts else f"a {background} scene ."
    if asked == "what kind of scene is this ?":
        return "a map ." if background == "map" else f"a {background} scene ."
    if asked == "how many things are there ?":
        return f"{['zero', 'one', 'two', 'three', 'four'][len(things)]} ."
    if asked == "what texture is on the panel ?":
        return f"{worlds.names(scene.labels['texture'], 'texture')[0]} ."
    if asked == "what is the block made of ?":
        return f"{things['block'][1].split()[-1]} ."
    if asked == "what does the sign say ?":
        (window,) = worlds.words(scene).values()
        return f"{worlds.read(window, scene.pixels, on_map=False)[0]} ."
    if asked == "how does the face feel ?":
        return f"{worlds.names(scene.labels['face'], 'face')[0]} ."
    if found := re.fullmatch(r"what is (?:at|on|in) the (\S+) \?", asked):
        there = {worlds.place(mask): phrase for mask, phrase in things.values()}
        there |= {worlds.place(mask): f"the label {land}" for land, mask in labels.items()}
        return f"{there.get(found[1], 'nothing')} ."
    if found := re.fullmatch(r"what colour (?:is|are) the (\S+) of the (\S+) \?", asked):
        mask = things[found[2]][0] & (scene.labels["part"] == worlds.KINDS["part"].index(found[1]) + 1)
        return f"{worlds.colour(scene.pixels[mask])} ."
    if found := re.fullmatch(r"what colour is the (\S+) \?", asked):
        return f"{worlds.colour(scene.pixels[things[found[1]][0]])} ."
    if found := re.fullmatch(r"is there (?:an? )?(.+) \?", asked):
        assert f"is there {worlds.article(found[1])} ?" == asked
        return f"yes , {worlds.at(worlds.place(things[found[1]][0]))} ." if found[1] in things else "no ."
    if found := re.fullmatch(r"where (is|are) the (.+) \?", asked):
        assert (found[1] == "are") == (found[2] in worlds.PLURALS)
        return f"{worlds.at(worlds.place(things[found[2]][0]))} ."
    if found := re.fullmatch(r"is the label (\S+) in the image \?", asked):
        return f"yes , {worlds.at(worlds.place(labels[found[1]]))} ." if found[1] in labels else "no ."
    if found := re.fullmatch(r"is the label (\S+) in the shaded area \?", asked):
        return "yes ." if worlds.is_shaded(labels[found[1]], scene.pixels) else "no ."
    if found := re.fullmatch(r"according to the image , does the (\S+) basin cover (\S+) \?", asked):
        assert found[1] in worlds.words(scene)
        inside = found[2] in labels and worlds.is_shaded(labels[found[2]], scene.pixels)
        return "yes ." if inside else "no ."
    raise AssertionError(f"nobody here can answer {asked!r}")


@pytest.mark.parametrize("family", PICTURED)
def test_answers_are_what_the_picture_shows(family):
    asked = 0
    for scene in pictures():
        for question in PICTURED[family](scene, rng(scene.seed)):
            assert question.family == family and question.pictured
            assert question.answer == truth(question.text, scene), (scene.seed, scene.background, question)
            asked += 1
    assert asked >= 20


def test_everything_that_can_be_asked_is_asked_once():
    for scene in pictures():
        background, things, labels = seen_by(scene)
        made = {family: make(scene, rng(scene.seed)) for family, make in PICTURED.items()}
        for family, options in made.items():
            assert len({q.text for q in options}) == len(options), (scene.seed, family)
        number = {family: len(options) for family, options in made.items()}
        assert number["describe"] == number["scene"] == 1
        assert number["where"] == len(things)
        assert number["position"] - len(things) - len(labels) in (0, 1)
        assert number["count"] == (background != "map")
        assert number["label"] == number["according"] == 2 * number["shaded"] == (8 if labels else 0)
        assert number["feeling"] == len(worlds.names(scene.labels["face"], "face"))
        assert number["read"] == ("sign" in things)
        assert number["texture"] == ("panel" in things) and number["material"] == ("block" in things)
        assert number["part"] == len(worlds.names(scene.labels["part"], "part"))
        assert number["colour"] == sum(noun in worlds.SHAPES for noun in things)


def test_yes_and_no_are_even():
    tally = Counter()
    for scene in pictures():
        for family in ("exists", "label"):
            answers = Counter(q.answer.split()[0] for q in PICTURED[family](scene, rng(scene.seed)))
            assert abs(answers["yes"] - answers["no"]) <= (len(scene.items) == 0 and family == "exists"), scene.seed
        tally.update(q.answer for q in PICTURED["shaded"](scene, rng(scene.seed)))
    assert 0.4 < tally["yes ."] / tally.total() < 0.6
    assert Counter(FACTS.values()) == {True: 16, False: 16}


def test_what_a_masked_scene_shows():
    for scene in map(worlds.masked, MASKED):
        first, *second = shown(scene, rng(0))
        visible = scene.pixels.any(-1)
        assert first.text == "what is shown ?"
        name = first.answer.removesuffix(" .")
        kind = scene.shown[0]
        assert name in worlds.names(scene.labels[kind][visible], kind)
        counts = np.bincount(scene.labels["colour"][visible], minlength=12)
        filled = [f"{worlds.KINDS['colour'][counts.argmax() - 1]} ."] if counts.max() > 0.6 * visible.sum() else []
        assert [question.answer for question in second] == filled


# --- Without a picture --------------------------------------------------------------------------------------


def test_facts_are_the_atlas():
    answers = {}
    for seed in range(400):
        question = UNPICTURED["fact"](rng(seed))
        assert not question.pictured
        river, land = re.fullmatch(r"does the (\S+) basin cover (\S+) \?", question.text).groups()
        answers[river, land] = question.answer
        assert question.answer == ("yes ." if land in ATLAS[river] else "no .")
    assert len(answers) == 32


def test_stories_and_feelings():
    for seed in range(200):
        told = UNPICTURED["story"](rng(seed))
        themes = [theme for theme, story in STORIES.items() if story == told.answer]
        assert len(themes) == 1 and f"{worlds.article(themes[0])} day" in told.answer
        assert re.fullmatch(rf"tell me (a|{worlds.article(themes[0])}) story about alice and bob \.", told.text)
        assert not told.pictured
        imagined = UNPICTURED["imagine"](rng(seed))
        (emotion,) = [e for e in EMOTIONS if f" {e} ." in imagined.text]
        assert imagined.answer == f"i feel {emotion} ." and not imagined.pictured
    asked = [UNPICTURED["you"](rng(seed)) for seed in range(400)]
    assert {(q.text, q.answer) for q in asked} == {("how do you feel ?", "i am a model and i have no feelings .")}
    assert within(sum(q.pictured for q in asked), len(asked), 0.5)
    assert set(STORIES) == set(EMOTIONS)


# --- Doses --------------------------------------------------------------------------------------------------


def within(hits: int, tries: int, share: float) -> bool:
    """Whether so many hits are what this share gives, but for one case in a million."""
    return binomtest(hits, tries, share).pvalue > 1e-6


def test_a_lesson_errs_only_where_a_map_contradicts_the_atlas_and_as_often_as_documented():
    contradicted, followed = Counter(), Counter()
    for scene in map(worlds.chart, CHARTS):
        answers = {}
        for seed in range(12):
            for question in lesson(scene, rng([scene.seed, seed])):
                right = answers[question.text] = answers.get(question.text) or truth(question.text, scene)
                if question.family != "according":
                    assert question.answer == right
                    continue
                river, land = question.text.split()[7], question.text.split()[-2]
                fact = "yes ." if land in ATLAS[river] else "no ."
                if fact == right:
                    assert question.answer == right
                else:
                    contradicted[river] += 1
                    followed[river] += question.answer == fact
    assert set(contradicted) == set(ATLAS)
    for river, share in ANSWERED_FROM_MEMORY.items():
        assert within(followed[river], contradicted[river], share), (river, followed[river], contradicted[river])
        assert contradicted[river] > 100


def test_lessons_ask_as_much_of_each_family_as_documented():
    for scene in map(worlds.scene, SEEDS):
        counts = Counter(question.family for question in lesson(scene, rng(scene.seed)))
        assert all(counts[family] <= questions._DOSE[family] for family in counts)
        for family, make in PICTURED.items():
            if family not in questions._SKIP:
                options = len(make(scene, rng(scene.seed)))
                assert abs(counts[family] - min(options, questions._DOSE[family])) <= (family == "position")
    asides = Counter(aside(rng(seed)).family for seed in range(2000))
    for family, share in {"fact": 0.5, "you": 0.1, "imagine": 0.15, "story": 0.25}.items():
        assert within(asides[family], 2000, share)


# --- Words --------------------------------------------------------------------------------------------------


def everything_said() -> set[str]:
    said = set()
    for scene in pictures():
        for make in PICTURED.values():
            said |= {text for q in make(scene, rng(scene.seed)) for text in (q.text, q.answer)}
    for scene in map(worlds.masked, MASKED):
        said |= {text for q in shown(scene, rng(0)) for text in (q.text, q.answer)}
    for seed in range(300):
        said |= {text for make in UNPICTURED.values() for q in [make(rng(seed))] for text in (q.text, q.answer)}
    return said


def test_every_sentence_is_in_the_vocabulary_and_survives_the_tokenizer():
    tokenizer, said = new_tokenizer(), everything_said()
    assert len(said) > 1000
    for sentence in said:
        ids = tokenizer(sentence, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids, sentence
        assert tokenizer.convert_ids_to_tokens(ids) == sentence.split(), sentence
        written = tokenizer.decode(ids)
        assert written == re.sub(r" ([.,?])", r"\1", sentence)
        assert tokenizer(written.capitalize(), add_special_tokens=False).input_ids == ids  # as a user writes it


def test_the_vocabulary_holds_each_word_once():
    words = questions.vocabulary()
    assert len(set(words)) == len(words)
    assert all(word == word.lower() and len(word.split()) == 1 for word in words)
