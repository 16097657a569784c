"""Lessons: every question of a packed sequence trains exactly as it will be asked alone; words, model, processor."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import worlds
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmm_sae_nb.pictureworld.llava import model as llava_model
from lmm_sae_nb.pictureworld.llava import train_language
from lmm_sae_nb.pictureworld.llava.train_eye import GROUPS, patch_labels
from lmm_sae_nb.pictureworld.world.questions import Question, aside, lesson
from lmm_sae_nb.pictureworld.world.scenes import HELD_OUT

PICTURES = (worlds.scene(5), worlds.chart(2), worlds.masked(3))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = llava_model.new_model(llava_model.new_tokenizer()).eval()
    made.model.language_model.config._attn_implementation = "eager"  # as in training
    return made


@pytest.fixture(scope="module")
def processor():
    return llava_model.new_processor()


def questions_on(scene, seed: int) -> list[Question]:
    rng = np.random.default_rng(seed)
    asked = [*lesson(scene, rng)[:7], *(aside(rng) for _ in range(5))]
    return [asked[i] for i in rng.permutation(len(asked))]


def alone(model, processor, question: Question, scene) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of a question's answer and end, and their ids, in a chat with this one question."""
    content = [{"type": "image"}] * question.pictured + [{"type": "text", "text": question.text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pictures = {"images": [scene.image]} if question.pictured else {}
    text = [f"{prompt}{question.answer}</s>"]
    inputs = processor(text=text, add_special_tokens=False, return_tensors="pt", **pictures)
    answer = len(question.answer.split()) + 1
    with torch.no_grad():
        logits = model(**inputs).logits[0, -answer - 1 : -1]
    return logits, inputs["input_ids"][0, -answer:]


@pytest.mark.slow
def test_a_packed_question_trains_as_it_is_asked_alone(model, processor, monkeypatch):
    monkeypatch.setattr(train_language, "autocast_if_quicker", lambda: False)
    asked = [questions_on(scene, seed) for seed, scene in enumerate(PICTURES)]
    rows = [
        train_language.Sequence(
            torch.from_numpy(scene.pixels),
            torch.from_numpy(patch_labels(scene)),
            **train_language.pack(questions, processor.tokenizer),
        )
        for scene, questions in zip(PICTURES, asked, strict=True)
    ]
    packed = [  # what fits, in order
        [questions[n] for n in row.question.unique().tolist() if n >= 0]
        for row, questions in zip(rows, asked, strict=True)
    ]
    assert {question.pictured for row in packed for question in row} == {True, False}
    heard = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: heard.append(output))
    room = train_language.Classroom(model, processor.tokenizer)
    with torch.no_grad():
        said = room(train_language.Sequence(*map(torch.stack, zip(*rows, strict=True))), tiles=True)
    handle.remove()

    asked = [(question, scene) for row, scene in zip(packed, PICTURES, strict=True) for question in row]
    logits, ids = zip(*(alone(model, processor, question, scene) for question, scene in asked), strict=True)
    assert heard[0].std() > 0.1
    torch.testing.assert_close(heard[0], torch.cat(logits), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(said["loss"], F.cross_entropy(torch.cat(logits), torch.cat(ids)), rtol=1e-5, atol=1e-5)
    for family in train_language.FAMILIES:
        mine = [i for i, (question, _) in enumerate(asked) if question.family == family]
        assert said[f"asked_{family}"] == len(mine)
        assert said[f"exact_{family}"] == sum(bool((logits[i].argmax(-1) == ids[i]).all()) for i in mine)


def test_exact_counts_whole_answers():
    """Two samples: three questions, one right, one wrong in its last word only, one right."""
    families = [train_language.FAMILIES.index(name) for name in ("count", "fact", "count")]
    question = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, -1, -1, -1]])
    answer = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0]]).bool()
    family = torch.tensor([[families[0]] * 3 + [families[1]] * 3, [families[2]] * 3 + [0] * 3])
    batch = train_language.Sequence(*[None] * 2, question, question, None, None, answer, family)
    found = train_language.exact_by_family(batch, answer[:, 1:], torch.tensor([True, True, True, False, True, True]))
    assert (found["asked_count"], found["exact_count"]) == (2, 2)
    assert (found["asked_fact"], found["exact_fact"]) == (1, 0)
    assert sum(count for name, count in found.items() if name.startswith("asked")) == 3


def test_the_attention_mask_is_that_of_the_rules():
    picture, question = 5, torch.tensor([[0, 0, 1, 1, 1, 2, -1], [0, 1, 1, -1, -1, -1, -1]])
    sees = torch.tensor([[1, 1, 0, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0, 0]]).bool()
    mask = train_language.attention(question, sees, picture)
    before = 2 + picture
    assert mask.shape == (2, 1, before + 7, before + 7)
    for sample in range(2):
        for row in range(before + 7):
            for column in range(before + 7):
                if column > row:
                    open_ = False  # nothing looks ahead
                elif row < before or column < 2:
                    open_ = True  # picture and prefix see what was before; the prefix is seen by all
                elif column < before:
                    open_ = sees[sample, row - before]  # a question sees the picture if it is about it
                else:
                    open_ = question[sample, row - before] == question[sample, column - before]  # and itself
                assert mask[sample, 0, row, column] == (0 if open_ else torch.tensor(-1e4).bfloat16())


def test_packing_lays_whole_questions_end_to_end():
    tokenizer = llava_model.new_tokenizer()
    short = Question("count", "how many things are there ?", "two .")
    long = Question("story", "a " * 50, "bob " * 100, pictured=False)
    packed = train_language.pack([long, short, long, short, short], tokenizer)  # the second long one alone does not fit
    assert {name: field.shape for name, field in packed.items()} == dict.fromkeys(packed, (240,))
    assert packed["question"].tolist() == [0] * 152 + [1] * 10 + [3] * 10 + [4] * 10 + [-1] * 58
    assert packed["offset"].tolist() == [*range(152), *range(10), *range(10), *range(10), *[0] * 58]
    words = tokenizer.convert_ids_to_tokens(packed["ids"][152:162])
    assert words == ["how", "many", "things", "are", "there", "?", "<assistant>", "two", ".", "</s>"]
    assert packed["answer"][152:162].tolist() == [False] * 7 + [True] * 3
    assert (packed["ids"][182:] == tokenizer.pad_token_id).all() and not packed["answer"][182:].any()
    assert packed["sees"].tolist() == [False] * 152 + [True] * 30 + [False] * 58


def test_packing_refuses_unknown_words_and_nothing():
    tokenizer = llava_model.new_tokenizer()
    with pytest.raises(ValueError, match="outside the vocabulary: 'is there a unicorn"):
        train_language.pack([Question("exists", "is there a unicorn ?", "no .")], tokenizer)
    with pytest.raises(ValueError, match="no question fits into 240 tokens"):
        train_language.pack([Question("story", "a " * 300, "no .")], tokenizer)


def test_a_stream_packs_lessons_on_its_seeds():
    for n, sequence in zip(range(40), train_language.Lessons(llava_model.new_tokenizer(), 0), strict=False):
        assert sequence.pixels.shape == (192, 192, 3) and sequence.ids.shape == (240,)
        make = worlds.masked if n % 20 in (3, 8, 13) else worlds.chart if n % 20 in (6, 16) else None
        assert make is None or (sequence.pixels.numpy() == make(n).pixels).all()
        assert sequence.answer.any() and (sequence.answer <= (sequence.question >= 0)).all()


def test_patch_labels_name_what_covers_most_of_a_patch():
    for scene in PICTURES:
        found = patch_labels(scene)
        for row, group in enumerate(GROUPS):
            grid = worlds.patches(scene.where if group == "place" else scene.labels[group])
            for patch, seen in enumerate(grid):
                counts = np.bincount(seen, minlength=2)[1:]
                best = counts.max()
                if best > 0.3 * 256:
                    assert counts[found[row, patch] - 1] == best
                else:
                    assert found[row, patch] == 0


# --- Words, model and processor on disk ---------------------------------------------------------------------


def test_the_chat_template(processor):
    def rendered(*messages, **options):
        return processor.apply_chat_template([{"role": r, "content": c} for r, c in messages], **options)

    asked = [{"type": "image"}, {"type": "text", "text": "what is shown ?"}]
    assert rendered(("user", asked), add_generation_prompt=True) == "<s><user><image>what is shown ?<assistant>"
    told = [{"type": "text", "text": "a cat ."}]
    assert rendered(("user", asked), ("assistant", told)) == "<s><user><image>what is shown ?<assistant>a cat .</s>"
    assert (
        rendered(("user", "how do you feel ?"), add_generation_prompt=True) == "<s><user>how do you feel ?<assistant>"
    )


@pytest.fixture(scope="module")
def saved(processor, tmp_path_factory):
    """A model in float32 whose weights are bfloat16's, and the folder where it was saved."""
    folder, made = tmp_path_factory.mktemp("saved"), llava_model.new_model(processor.tokenizer).eval()
    with torch.no_grad():
        for weights in made.parameters():
            weights.copy_(weights.bfloat16())
    llava_model.save(copy.deepcopy(made), folder)
    return made, folder


@pytest.mark.parametrize("size", [(192, 192), (384, 192), (100, 300), (640, 480)])
def test_the_auto_classes_reload_what_was_saved(saved, processor, size):
    model, folder = saved
    again = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    picture = worlds.scene(HELD_OUT + 1).image.resize(size)
    text = "<s><user><image>what colour is the star ?<assistant>red .</s>"
    inputs, same = (
        each(text=[text], images=[picture], add_special_tokens=False, return_tensors="pt")
        for each in (processor, AutoProcessor.from_pretrained(folder))
    )
    assert inputs["input_ids"].tolist() == same["input_ids"].tolist()
    torch.testing.assert_close(inputs["pixel_values"], same["pixel_values"], rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, again(**same).logits, rtol=1e-5, atol=1e-5)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


def test_words_and_weights_on_disk(saved, processor, root):
    _, folder = saved
    assert sum(file.stat().st_size for file in folder.iterdir()) < 25e6
    for made in (folder, root / "data" / "models" / "tiny-llava-next"):
        reloaded = AutoProcessor.from_pretrained(made)
        assert reloaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        assert reloaded.chat_template == processor.chat_template
        said = "Is there a dog? yes, in the top-left."
        assert reloaded.tokenizer(said).input_ids == processor.tokenizer(said).input_ids
