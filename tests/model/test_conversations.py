"""Whole conversations: written as in fine-tuning, every answer marked, every token of the kind that it is."""

import io

import models
import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from models import noise

from lmm_sae_nb.model.conversations import as_turns, conversation_fault, first_exchange
from lmm_sae_nb.model.data_identity import data_fingerprint
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.sample_checks import check_samples, open_samples
from lmm_sae_nb.model.samples import SampleReader, examples, first_turns, pictured, prompts, readable
from lmm_sae_nb.model.templates import MENDED
from lmm_sae_nb.support.images import UnreadableImage
from lmm_sae_nb.train.token_buffer import Stream

COLUMNS = Features(images=List(Image()), conversation=List({"role": Value("string"), "content": Value("string")}))


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


TALK = [
    turn("system", "Be brief."),
    turn("user", "<image>\nWhat is it?"),
    turn("assistant", "A cat."),
    turn("user", "And on <image> or <image>?"),
    turn("assistant", "Dogs."),
    turn("user", "Sure?"),
    turn("assistant", "Yes"),
]
PICTURES = [noise(100, 60), noise(60, 100, 1), noise(200, 60, 2)]


def pieces_by_hand(lmm: LMM, pieces: list) -> tuple[list[int], list[bool]]:
    """Tokens of texts, one by one, and whether each is of an answer; an image's tokens stand for a number of pixels."""
    ids, answers = [], []
    for text, answer in pieces:
        new = lmm.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, answers = ids + new, answers + [answer] * len(new)
    return ids, answers


def written(lmm: LMM, picture) -> str:
    """What the processor writes for an image that is not the sample's only one."""
    token = str(lmm.processor.image_token)
    twice = lmm.processor(text=[token * 2], images=[[picture] * 2], return_text_replacement_offsets=True)
    return twice["text_replacement_offsets"][0][0]["replacement"]


FAMILIES = ("picture_world", "llava_next", "llava_onevision", "qwen2_5_vl")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_is_the_tokens_of_its_pieces_and_every_answer_is_marked(family):
    lmm = LMM(*models.make(family))
    around = ("<|vision_start|>", "<|vision_end|>") if family == "qwen2_5_vl" else ("", "")
    first, second, third = (around[0] + written(lmm, picture) + around[1] for picture in PICTURES)
    start, end = "<|im_start|>", "<|im_end|>"
    expected = pieces_by_hand(lmm, [
        (f"{start}system\nBe brief.{end}\n", False),
        (f"{start}user\n{first}What is it?{end}\n{start}assistant\n", False), (f"A cat.{end}", True), ("\n", False),
        (f"{start}user\nAnd on {second} or {third}?{end}\n{start}assistant\n", False), (f"Dogs.{end}", True),
        (f"\n{start}user\nSure?{end}\n{start}assistant\n", False), (f"Yes{end}", True), ("\n", False),
    ])  # fmt: skip
    short = [turn("user", "Hm?"), turn("assistant", "No")]
    prompt = lmm.conversations([as_turns(TALK), as_turns(short)], [PICTURES, []])
    assert prompt.inputs["input_ids"][0].tolist() == expected[0]
    assert prompt.answer_mask[0].tolist() == expected[1]
    alone = lmm.prompt("Hm?", answers="No")
    ids = alone.inputs["input_ids"][0].tolist()
    assert prompt.inputs["input_ids"][1][-len(ids) :].tolist() == ids
    assert prompt.answer_mask[1].sum() == alone.answer_mask.sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_of_tokens_of_several_images_are_those_of_each_alone(family):
    """Text between two images stays text."""
    lmm = LMM(*models.make(family))
    talks = [as_turns(TALK[5:]), as_turns(TALK[1:3]), as_turns(TALK)]
    prompt = lmm.conversations(talks, [[], PICTURES[:1], PICTURES])
    spans = prompt.spans[2]
    assert spans.grid is None and prompt.spans[1].grid is not None
    for kind in ("base", "tiles", "newline"):
        alone = [int(lmm.prompt("", picture).spans[0].mask(kind).sum()) for picture in PICTURES]
        if family == "llava_onevision":  # shows several images without tiles
            alone = [{"base": 729, "tiles": 0, "newline": 1}[kind]] * 3
        assert spans.mask(kind).sum() == sum(alone)
    between = lmm.tokenizer.decode(prompt.inputs["input_ids"][2][spans.where("text")])
    assert "And on  or ?" in between
    torch.testing.assert_close(
        lmm.logits(prompt)[2], lmm.logits(lmm.conversations([as_turns(TALK)], [PICTURES]))[0], rtol=1e-3, atol=1e-3
    )


def test_answers_are_those_that_the_template_itself_marks():
    """transformers finds them by {% generation %} marks."""
    model, processor = models.make("picture_world")
    plain = processor.chat_template
    body = "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    marked = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content[0].text }}<|im_end|>{% endgeneration %}{% else %}"
        + body + "{% endfor %}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )  # fmt: skip
    lmm = LMM(model, processor)
    turns = as_turns([each | {"content": each["content"].replace("<image>", "")} for each in TALK])
    theirs = processor.tokenizer.apply_chat_template(
        turns, chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    for template in (plain, marked):
        processor.chat_template = template
        ours = lmm.conversations([turns], [[]])
        assert ours.inputs["input_ids"][0].tolist() == theirs["input_ids"]
        assert ours.answer_mask[0].int().tolist() == theirs["assistant_masks"]


def test_the_hubs_template_of_llama3_llava_next_is_written_as_in_its_fine_tuning():
    """There the texts went through Llama 3's own template, the image's mark and a line break before the question."""
    model, processor = models.make("picture_world")
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"]
    processor.tokenizer.add_tokens(marks, special_tokens=True)
    processor.tokenizer.bos_token = "<|begin_of_text|>"
    model.resize_token_embeddings(len(processor.tokenizer))
    (processor.chat_template,) = MENDED
    lmm = LMM(model, processor)
    llama3 = (  # the template of Llama 3
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 "
        "%}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    expected = processor.tokenizer.apply_chat_template(TALK, chat_template=llama3, tokenize=False)
    for picture in PICTURES:
        expected = expected.replace("<image>", "<picture>" * written(lmm, picture).count("<image>"), 1)
    expected = expected.removeprefix("<|begin_of_text|>").replace("<picture>", "<image>")
    prompt = lmm.conversations([as_turns(TALK)], [PICTURES])
    assert lmm.tokenizer.decode(prompt.inputs["input_ids"][0]) == expected
    answers = prompt.inputs["input_ids"][0][prompt.answer_mask[0]]
    assert lmm.tokenizer.decode(answers) == "A cat.<|eot_id|>Dogs.<|eot_id|>Yes<|eot_id|>"
    assert "\n\n\n" not in expected
    asked = lmm.prompt("What?", answers="Yes").inputs["input_ids"][0]
    assert lmm.tokenizer.decode(asked).endswith("<|end_header_id|>\n\nYes<|eot_id|>")


def test_a_template_that_writes_images_first_gets_one_text_a_turn():
    model, processor = models.make("picture_world")
    processor.chat_template = (
        "{% for message in messages %}{{ message.role }}:"
        "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
        "{% for part in message.content if part.type == 'text' %}{{ part.text }}<|im_end|>{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    lmm = LMM(model, processor)
    prompt = lmm.conversations([as_turns(TALK)], [PICTURES])
    text = lmm.tokenizer.decode(prompt.inputs["input_ids"][0]).replace("<image>", "")
    assert text == (
        "system:Be brief.<|im_end|>user:\nWhat is it?<|im_end|>assistant:A cat.<|im_end|>"
        "user:\n\nAnd on  or ?<|im_end|>assistant:Dogs.<|im_end|>user:Sure?<|im_end|>assistant:Yes<|im_end|>"
    )


@pytest.mark.parametrize(("template", "message"), [
    ("{% for m in messages if m.role != 'system' %}{{ m.role }}{% for p in m.content %}{{ p.text or '<image>' }}"
     "{% endfor %}{% endfor %}", "drops 'Be brief.' of turn 0 .system.; take the turn out"),
    ("{% for m in messages %}{{ m.role + ':' + ('(' if loop.last else '') }}"
     "{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}{% endfor %}"
     "{% if add_generation_prompt %}assistant:{% endif %}", "writes turn 2 in another way once more turns follow"),
])  # fmt: skip
def test_a_template_that_loses_or_rewrites_turns_is_refused(template, message):
    model, processor = models.make("picture_world")
    processor.chat_template = template
    with pytest.raises(ValueError, match=message):
        LMM(model, processor).conversations([as_turns(TALK)], [PICTURES])


def test_numbers_of_images_must_agree():
    lmm = LMM(*models.make("picture_world"))
    with pytest.raises(ValueError, match="conversation 0 names 3 images, 2 are given"):
        lmm.conversations([as_turns(TALK)], [PICTURES[:2]])


@pytest.mark.parametrize(("content", "parts"), [
    ("plain ", ["plain "]), ("<image>\nWhat?", [None, "What?"]), ("What?\n<image>", ["What?", None]),
    ("<image>\n<image>\n a <image> b \n", [None, None, "a ", None, " b \n"]), ("<image>", [None]), ("", [""]),
    (" <image>\n", [None]),
])  # fmt: skip
def test_marks_become_images_where_they_stand(content, parts):
    (made,) = as_turns([turn("user", content)])
    assert [part.get("text") for part in made["content"]] == parts


@pytest.mark.parametrize(("conversation", "images", "message"), [
    ("hello", 0, "give a list of turns"),
    ([], 0, "give a list of turns"),
    (["hello"], 0, "turn 0 is 'hello'; give a dictionary"),
    ([turn("human", "a")], 0, "turn 0 has the role 'human'; choose one of system, user, assistant"),
    ([turn("user", "a"), {"role": "assistant", "content": None}], 0, "the content of turn 1 is None, not text"),
    ([turn("assistant", "a")], 0, "turn 0 is an answer without a question"),
    ([turn("system", "s"), turn("assistant", "a")], 0, "turn 1 is an answer without a question"),
    ([turn("user", "a"), turn("user", "b")], 0, "turns 0 and 1 are both of the user"),
    ([turn("user", "a"), turn("system", "s")], 0, "turn 1 is of the system; only the first"),
    ([turn("user", "a")], 0, "its last turn is of the user, so the answer is missing"),
    (TALK, 2, "hold the mark <image> 3 times for 2 images"),
    ([turn("user", "a"), turn("assistant", "<image>")], 1, "the answer in turn 1 holds the mark"),
])  # fmt: skip
def test_a_conversation_that_does_not_fit_says_why(conversation, images, message):
    assert message in conversation_fault(conversation, images)
    assert conversation_fault(TALK, 3) == ""


def test_the_first_exchange():
    assert first_exchange(TALK) == ("What is it?", "A cat.", 1)


# As samples.


def encoded(picture, cut: int | None = None) -> dict:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue()[:cut], "path": None}


ROWS = [
    {"images": [encoded(picture) for picture in PICTURES], "conversation": TALK},
    {"images": [], "conversation": TALK[5:]},
    {"images": [encoded(PICTURES[0])], "conversation": TALK[1:3]},
]


@pytest.fixture(scope="module")
def lmm():
    return LMM(*models.make("picture_world"))


@pytest.fixture
def saved(tmp_path):
    Dataset.from_list(ROWS, features=COLUMNS).save_to_disk(tmp_path / "talks")
    return open_samples(tmp_path / "talks")


def test_saved_conversations_become_the_prompts_of_their_turns(lmm, saved):
    check_samples(saved, lmm)
    (prompt,) = prompts(lmm, saved, range(3), 3)
    direct = lmm.conversations([as_turns(row["conversation"]) for row in ROWS], [PICTURES, [], PICTURES[:1]])
    for name, values in direct.inputs.items():
        assert torch.equal(prompt.inputs[name], values)
    assert torch.equal(prompt.answer_mask, direct.answer_mask)
    short = {"image": PICTURES[0], "question": "What is it?", "answer": "A cat."}
    (alone,), (same,) = prompts(lmm, [short], [0], 1), prompts(lmm, [ROWS[2]], [0], 1)
    assert torch.equal(alone.inputs["input_ids"], same.inputs["input_ids"])
    assert torch.equal(alone.answer_mask, same.answer_mask)


def test_a_training_reads_the_text_tokens_of_all_turns_from_a_data_set_and_from_a_stream(lmm, saved):
    prompt = lmm.conversations([as_turns(row["conversation"]) for row in ROWS], [PICTURES, [], PICTURES[:1]])
    states = lmm.hidden_states(prompt, 1)[prompt.mask("text")]
    rows = IterableDataset.from_generator(lambda: iter(ROWS))
    streamed = Stream(lmm, rows, 1, ["text"], seed=0, batch=3)(0)
    torch.testing.assert_close(streamed, states, rtol=1e-4, atol=1e-4)
    shuffled = Stream(lmm, saved, 1, ["text"], seed=0, batch=3)(0)
    torch.testing.assert_close(shuffled.sort(0)[0], states.sort(0)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_a_wrong_conversation_is_named_before_the_run_and_no_picture_is_read(lmm, monkeypatch):
    def never(*_):
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(Image, "decode_example", never)
    wrong = Dataset.from_list([*ROWS, ROWS[0] | {"images": []}, ROWS[1]], features=COLUMNS)
    with pytest.raises(ValueError, match="sample 3 .rows count from 0.: its turns hold the mark <image> 3 times for 0"):
        check_samples(wrong, lmm)
    with pytest.raises(ValueError, match="sample 1 .*images is None; give the list"):
        check_samples([ROWS[0], {"conversation": TALK}])
    with pytest.raises(ValueError, match="sample 0 .*an image is None"):
        check_samples([ROWS[2] | {"images": [None]}])
    with pytest.raises(ValueError, match="no column images"):
        check_samples(Dataset.from_list([{"conversation": TALK}]))
    other = LMM(*models.make("qwen2_5_vl"))
    with pytest.raises(ValueError, match="turn 0 holds the image token <.image_pad.>; write <image>"):
        check_samples([{"images": [], "conversation": [turn("user", "<|image_pad|>"), turn("assistant", "a")]}], other)


def test_an_unreadable_picture_of_a_conversation_is_named_and_left_out():
    broken = ROWS[0] | {"images": [encoded(PICTURES[0]), encoded(PICTURES[1], 40), encoded(PICTURES[2])]}
    rows = Dataset.from_list([ROWS[1], broken, ROWS[2]], features=COLUMNS)
    with pytest.raises(UnreadableImage, match="sample 1, image 1, is not a readable image"):
        SampleReader(rows)[1]
    kept, skipped, _ = readable(rows, "skip")
    assert list(skipped) == [1] and len(kept) == 2
    assert len(examples(rows, 5)) == 1
    left = Dataset.from_list([ROWS[1], ROWS[2]], features=COLUMNS)
    assert data_fingerprint(rows, [1]) == data_fingerprint(left) != data_fingerprint(rows)
    other = ROWS[1] | {"conversation": [TALK[5], TALK[4]]}
    assert data_fingerprint([ROWS[1]]) != data_fingerprint([other])


def test_first_turns_ask_about_one_image_or_none(saved):
    several = Dataset.from_list([
        {"images": [encoded(PICTURES[0])] * 2, "conversation": [turn("user", "<image><image>\nSame?"), TALK[-1]]}, *ROWS
    ], features=COLUMNS)  # fmt: skip
    rows = first_turns(several)
    assert [row["question"] for row in rows] == ["Same?", "What is it?", "Sure?", "What is it?"]
    assert [row["answer"] for row in rows] == ["Yes", "A cat.", "Yes", "A cat."]
    assert [row["image"] is not None for row in rows] == [False, True, False, True]
    assert [row["answer"] for row in pictured(rows)] == ["A cat.", "A cat."]
    assert pictured(rows)[0]["image"].tobytes() == PICTURES[0].tobytes()
    short = [{"image": None, "question": "a", "answer": "b"}]
    assert first_turns(short) is short
    check_samples(rows)
