"""The exam: a balanced paper on held-out scenes, marks by hand, intervals by their formula."""

import math
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import worlds
from scipy.stats import binomtest, norm

from lmm_sae_nb.pictureworld.__main__ import MODEL
from lmm_sae_nb.pictureworld.llava import exam, readme_picture
from lmm_sae_nb.pictureworld.llava.exam import Asked, is_right, report, written
from lmm_sae_nb.pictureworld.world.concepts import FACTS, STORIES
from lmm_sae_nb.pictureworld.world.questions import Question
from lmm_sae_nb.pictureworld.world.scenes import HELD_OUT
from lmm_sae_nb.support.files import read_json

SCENES = 60


@pytest.fixture(scope="module")
def paper():
    return exam._paper(SCENES, seed=0)


def test_the_paper_is_balanced_and_held_out(paper):
    families = Counter(family for family, _, _ in paper)
    assert families["describe"] == families["scene"] == families["label"] == families["you"] == SCENES
    assert families["fact"] == len(FACTS) == 32 and families["story"] == len(STORIES) == 8
    assert families["trap"] == families["trap_label"] > SCENES / 2
    for family in ("exists", "label"):
        yes = sum(q.answer.startswith("yes") for f, q, _ in paper if f == family)
        assert binomtest(yes, families[family]).pvalue > 1e-4, family
    for family, question, scene in paper:
        assert question.pictured == (scene is not None)
        if scene and not scene.shown:
            assert HELD_OUT <= scene.seed < HELD_OUT + SCENES, family
    texts = [(question.text, scene and scene.seed, family) for family, question, scene in paper]
    assert len(set(texts)) == len(texts)


def test_traps_contradict_the_atlas_and_ask_of_one_country(paper):
    pairs = [(trap, label) for trap, label in zip(paper, paper[1:], strict=False) if trap[0] == "trap"]
    for (_, trap, scene), (family, label, again) in pairs:
        river, land = re.search(r"the (\S+) basin cover (\S+) ", trap.text).groups()
        shown = worlds.countries(scene)
        inside = land in shown and worlds.is_shaded(shown[land], scene.pixels)
        assert trap.answer == ("yes ." if inside else "no .")
        assert inside != FACTS[river, land]
        assert family == "trap_label" and scene is again
        assert label.text == f"is the label {land} in the image ?"
        assert label.answer.startswith("yes" if land in shown else "no")


@pytest.mark.parametrize(
    ("family", "wanted", "said", "right"),
    [
        ("colour", "red .", "red.", True),
        ("colour", "red .", "red", False),
        ("colour", "red .", "dark red.", False),
        ("describe", "a room with a cat and a dog .", "a room with a cat and a dog.", True),
        ("describe", "a room with a cat and a dog .", "a room with a cat.", False),
        ("exists", "yes , in the top-left .", "yes, in the top-left.", True),
        ("exists", "yes , in the top-left .", "yes, in the top-right.", True),  # its place is another family's
        ("exists", "yes , in the top-left .", "no.", False),
        ("exists", "no .", "no.", True),
        ("exists", "no .", "", False),
        ("label", "no .", "nothing.", False),
        ("trap_label", "yes , in the top-left .", "yes.", True),
        ("where", "in the top-left .", "in the top-right.", False),
        ("story_any", STORIES["hungry"], written(STORIES["sad"]), True),
        ("story_any", STORIES["hungry"], written(STORIES["sad"])[:-4], False),
        ("story", STORIES["hungry"], written(STORIES["sad"]), False),
    ],
)  # fmt: skip
def test_marks(family, wanted, said, right):
    assert is_right(family, Question(family, "?", wanted), said) is right


def wilson(hits: int, tries: int, level: float) -> tuple[float, float]:
    z = norm.ppf(0.5 + level / 2)
    share, spread = hits / tries, z / (2 * tries)
    middle = share + z * spread
    half = z * math.sqrt(share * (1 - share) / tries + spread**2)
    return (middle - half) / (1 + 2 * z * spread), (middle + half) / (1 + 2 * z * spread)


def asked(family: str, wanted: str, said: str, basin: str = "nile") -> Asked:
    question = Question(family, "?", wanted)
    chart = SimpleNamespace(chart=SimpleNamespace(basin=basin))
    return Asked(family, question, chart, said, is_right(family, question, said))


def test_the_report_by_hand():
    rows = [asked("colour", "red .", "red.")] * 7 + [asked("colour", "red .", "blue.")] * 3
    rows += [asked("trap", "yes .", "no."), asked("trap", "no .", "yes."), asked("trap", "no .", "no.")]
    rows += [asked("trap", "yes .", "perhaps.", basin="amazon")]
    result = report(rows)
    assert result.keys() == {"colour", "trap_follows_fact", "trap_follows_fact_nile", "trap_follows_fact_amazon"}
    assert (result["colour"]["fraction"], result["colour"]["asked"], result["colour"]["least"]) == (0.7, 10, 0.97)
    assert (result["colour"]["low"], result["colour"]["high"]) == pytest.approx(wilson(7, 10, 0.99))
    assert (result["trap_follows_fact"]["fraction"], result["trap_follows_fact"]["asked"]) == (0.5, 4)
    assert result["trap_follows_fact_nile"]["fraction"] == 2 / 3
    assert (result["trap_follows_fact_nile"]["low"], result["trap_follows_fact_nile"]["high"]) == pytest.approx(
        wilson(2, 3, 0.99)
    )
    assert result["trap_follows_fact_amazon"]["fraction"] == 0 and "least" not in result["trap_follows_fact"]
    narrow = report(rows, level=0.5)["colour"]
    assert (narrow["low"], narrow["high"]) == pytest.approx(wilson(7, 10, 0.5))


def test_answers_come_back_in_the_order_of_the_questions():
    """A model that answers with its question and the number of its picture, asked in batches."""
    said = []

    class Echo:
        def prompt(self, texts, pictures):
            said.append(len(texts))
            return [f"{text}{picture}" for text, picture in zip(texts, pictures, strict=True)]

        def generate(self, prompt, max_new_tokens):
            return prompt

    asked = [(Question("count", str(n), "two . " * (n % 7)), None if n % 3 == 0 else n) for n in range(50)]
    answers = exam.ask(Echo(), asked, batch=8)
    assert answers == [f"{n}{None if n % 3 == 0 else n}" for n in range(50)]
    assert sum(said) == 50 and max(said) == 8


def test_the_exam_that_ships_with_the_model_meets_its_aims_but_for_those_that_departures_name(root):
    ships = read_json(root / MODEL / "exam.json")
    assert {family: row["least"] for family, row in ships.items() if "least" in row} == exam.LEAST
    assert {family for family, least in exam.LEAST.items() if ships[family]["fraction"] < least} == {"part", "read"}
    assert 0.2 <= ships["trap_follows_fact"]["fraction"] <= 0.7
    assert ships["scene"]["asked"] == ships["label"]["asked"] == 500


def test_the_readme_s_picture_shows_each_scene_once_and_does_not_choose_by_what_is_right():
    def asked(family: str, seed: int, right: bool = True, things: int = 4) -> Asked:
        scene = SimpleNamespace(seed=seed, chart=None, items=[None] * things)
        return Asked(family, Question(family, "?", "."), scene, ".", right)

    first = {family: asked(family, n, right=family != "where") for n, family in enumerate(readme_picture.FAMILIES)}
    again = [asked(family, 0) for family in readme_picture.FAMILIES[1:]]  # on the scene that `describe` is on
    empty = [asked(family, 90, things=2) for family in readme_picture.FAMILIES]
    trap = asked("trap", 70, right=False)
    shown = readme_picture.chosen([*empty, *first.values(), *again, trap])
    assert shown == [*(first | {"trap": trap}).values()]
    assert not shown[1].right
    with pytest.raises(ValueError, match="family trap is left to show; sit an exam of more"):
        readme_picture.chosen(list(first.values()))
