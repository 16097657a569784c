"""Prompts, hidden states, splicing, upper layers, generation and bad input, on the real classes."""

import re
import shutil
from functools import cache
from pathlib import Path

import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import noise
from PIL import Image
from tokenizers import processors
from transformers import Gemma2Config, GraniteConfig, LlamaConfig, LlamaForCausalLM

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.token_kinds import LAYOUTS
from lmm_sae_nb.model.upper_layers import above

EVERY_FAMILY = pytest.mark.parametrize("family", models.FAMILIES)


@cache
def studied(family: str = "picture_world") -> LMM:
    model, processor = models.make(family)
    if family in ("idefics3", "smolvlm"):
        processor.image_processor.size = {"longest_edge": 512}
    return LMM(model, processor)


def pair(lmm: LMM, **answers):
    """Two samples of different lengths: the first is padded."""
    return lmm.prompt(["Short?", "And a longer question?"], [noise(), noise(60, 100, seed=1)], **answers)


# --- Forward ------------------------------------------------------------------------------------------------


@EVERY_FAMILY
def test_hidden_states_are_those_the_model_reports(family):
    lmm = studied(family)
    prompt = pair(lmm)
    with torch.no_grad():
        output = lmm.model(**prompt.inputs, output_hidden_states=True, use_cache=False)
    if family == "instructblip":
        output = output.language_model_outputs
    states = lmm.hidden_states(prompt, [0, 1])
    assert list(states) == [0, 1]
    for layer in (0, 1):  # the last one's is reported after the final norm
        torch.testing.assert_close(states[layer], output.hidden_states[layer + 1], rtol=0, atol=0)
        torch.testing.assert_close(lmm.hidden_states(prompt, layer), output.hidden_states[layer + 1], rtol=0, atol=0)
    assert states[0].shape == (*prompt.inputs["input_ids"].shape, lmm.width)
    assert not states[0].requires_grad


def test_hidden_states_stop_after_the_last_layer_asked_for():
    lmm, calls = studied(), []
    handles = [
        lmm.layer(index).register_forward_hook(lambda *_, index=index: calls.append(index))
        for index in range(lmm.n_layers)
    ]
    lmm.hidden_states(lmm.prompt("Hm", noise()), [1, 0, 1])
    for handle in handles:
        handle.remove()
    assert calls == [0, 1]
    assert all(not lmm.layer(index)._forward_hooks for index in range(lmm.n_layers))


@EVERY_FAMILY
def test_a_batch_gives_what_its_samples_give_alone(family):
    lmm = studied(family)
    batch = pair(lmm)
    states, logits = lmm.hidden_states(batch, 2), lmm.logits(batch)
    samples = [lmm.prompt("Short?", noise()), lmm.prompt("And a longer question?", noise(60, 100, seed=1))]
    assert batch.mask("pad").any()
    for sample, alone in enumerate(samples):
        kept = ~batch.spans[sample].mask("pad")
        torch.testing.assert_close(states[sample][kept], lmm.hidden_states(alone, 2)[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[sample][kept], lmm.logits(alone)[0], rtol=1e-4, atol=1e-4)


def test_samples_without_an_image_go_beside_those_with_one():
    lmm = studied()
    batch = lmm.prompt(["Hello", "What?"], [None, noise()])
    alone = lmm.logits(lmm.prompt("Hello"))[0]
    torch.testing.assert_close(lmm.logits(batch)[0, -len(alone) :], alone, rtol=1e-4, atol=1e-4)


@EVERY_FAMILY
def test_upper_layers_continue_from_a_layers_states(family):
    lmm = studied(family)
    prompt = pair(lmm)
    with torch.no_grad():
        expected, seen = lmm.logits(prompt), ~prompt.mask("pad")
        upper = above(lmm, prompt, 0)
        torch.testing.assert_close(upper.hidden, lmm.hidden_states(prompt, 0), rtol=0, atol=0)
        found = lmm.head(upper.run(upper.hidden))
        torch.testing.assert_close(lmm.last_logits(prompt), expected[:, -1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-5)
    assert len(lmm.model.get_decoder().layers) == lmm.model.config.get_text_config().num_hidden_layers


@EVERY_FAMILY
def test_late_tokens_resume_from_remembered_early_ones(family):
    lmm = studied(family)
    prompt = lmm.prompt("And a question?", noise())
    with torch.no_grad():
        upper = above(lmm, prompt, 0)
        upper.remember(upper.hidden)
        versions, start = upper.hidden.repeat(3, 1, 1), upper.hidden.shape[1] - 4
        versions[1, start + 1] *= 2
        versions[2, start:] = 0
        whole = upper.run(versions)
        part = upper.resume(versions[:, start:], start)
        for version, expected in zip(versions, whole, strict=True):
            with lmm.spliced(0, lambda _, version=version: version[None]):
                torch.testing.assert_close(lmm.head(expected), lmm.logits(prompt)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part, whole[:, start:], rtol=1e-4, atol=1e-5)


@EVERY_FAMILY
def test_versions_of_several_samples_resume_from_the_tokens_of_their_own(family):
    lmm = studied(family)
    both = pair(lmm)
    with torch.no_grad():
        upper = above(lmm, both, 0)
        start, samples = upper.hidden.shape[1] - 3, torch.tensor([1, 0, 0, 1])
        upper.remember(upper.hidden)
        versions = upper.hidden[samples, start:] * torch.tensor([1.0, 2, 1, -1])[:, None, None]
        part = upper.resume(versions, start, samples)
        upper.remember(upper.hidden[[1, 0, 1]], torch.tensor([1, 0, 1]))
        again = upper.resume(versions, start, torch.tensor([2, 1, 1, 0]))
        torch.testing.assert_close(again, part, rtol=1e-4, atol=1e-5)
        for sample, version, found in zip(samples.tolist(), versions, part, strict=True):
            whole = upper.hidden.clone()
            whole[sample, start:] = version
            torch.testing.assert_close(found, upper.run(whole)[sample, start:], rtol=1e-4, atol=1e-5)


@EVERY_FAMILY
def test_states_that_begin_alike_run_as_each_alone(family):
    lmm = studied(family)
    alone = lmm.prompt("And a question?", noise())
    alike = lmm.prompt(["And a question?"] * 3, [noise()] * 3, answers=["yes", "one", "yet"])
    with torch.no_grad():
        for prompt in (alone, alike, pair(lmm)):
            upper = above(lmm, prompt, 0)
            torch.testing.assert_close(upper.run_alike(upper.hidden), upper.run(upper.hidden), rtol=1e-4, atol=1e-5)
        upper = above(lmm, alone, 0)
        versions = upper.hidden.repeat(3, 1, 1)
        versions[1, -3] *= 2
        versions[2, -2:] = 0
        torch.testing.assert_close(upper.run_alike(versions), upper.run(versions), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (Gemma2Config, {"head_dim": 8, "sliding_window": 8}),  # every other layer sees all; embeddings are scaled
        (GraniteConfig, {"embedding_multiplier": 3.0}),
    ],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_upper_layers_of_two_kinds_and_scaled_embeddings(config, more, layer):
    torch.manual_seed(0)
    lmm = LMM(*models.llava_next(192, 16, models.PICTURE_WORLD_PINPOINTS, config, **more))
    with torch.no_grad():
        for weights in lmm.model.parameters():
            weights.normal_(std=0.3)
        prompt = lmm.prompt("And a question?", noise())
        expected, upper = lmm.logits(prompt), above(lmm, prompt, layer)
        torch.testing.assert_close(lmm.head(upper.run(upper.hidden)), expected, rtol=1e-4, atol=1e-4)
        start = upper.hidden.shape[1] - 4
        upper.remember(upper.hidden)
        part = upper.resume(upper.hidden[:, start:].repeat(2, 1, 1), start)
    torch.testing.assert_close(lmm.head(part[1]), expected[0, start:], rtol=1e-4, atol=1e-4)


def test_a_decoder_whose_layers_need_the_whole_sequence_runs_whole(monkeypatch):
    lmm = studied()
    prompt, both = lmm.prompt("And a question?", noise()), pair(lmm)
    with torch.no_grad():
        upper, upper_of_both = above(lmm, prompt, 1), above(lmm, both, 1)
        versions = torch.cat([upper.hidden, 2 * upper.hidden])
        expected, of_both = upper.run(versions), lmm.logits(both)
        monkeypatch.setattr("lmm_sae_nb.model.decoder_arguments.KNOWN", {"inputs_embeds", "use_cache"})
        torch.testing.assert_close(upper.run(versions), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(upper.run_alike(versions), expected, rtol=1e-4, atol=1e-5)
        found = lmm.head(upper_of_both.run(upper_of_both.hidden))
        torch.testing.assert_close(found, of_both, rtol=1e-4, atol=1e-5)
        upper.remember(upper.hidden)
        part = upper.resume(versions[:, 3:], 3, torch.tensor([0, 0]))
        late = torch.cat([upper.hidden[:, :3].expand(2, -1, -1), versions[:, 3:]], 1)
        torch.testing.assert_close(part, upper.run(late)[:, 3:], rtol=1e-4, atol=1e-5)


def test_skipped_layers_come_back_after_an_error():
    lmm = studied()
    prompt = lmm.prompt("Hm", noise())
    upper = above(lmm, prompt, 0)
    with pytest.raises(RuntimeError):
        upper.run(torch.zeros(1, 3, lmm.width + 1))
    assert len(lmm.model.get_decoder().layers) == lmm.model.config.get_text_config().num_hidden_layers


def test_logits_are_float32_and_differentiable_in_what_is_spliced_in():
    lmm = studied()
    prompt = lmm.prompt("Hm", noise())
    push = torch.zeros(lmm.width, requires_grad=True)
    with lmm.spliced(1, lambda hidden: hidden + push):
        logits = lmm.logits(prompt)
    (gradient,) = torch.autograd.grad(logits[0, -1, 7], push)
    assert gradient.abs().sum() > 0
    step = 1e-2 * gradient / gradient.norm()
    with lmm.spliced(1, lambda hidden: hidden + step):
        up = lmm.logits(prompt)[0, -1, 7]
    with lmm.spliced(1, lambda hidden: hidden - step):
        down = lmm.logits(prompt)[0, -1, 7]
    torch.testing.assert_close((up - down) / 2e-2, gradient.norm(), rtol=2e-2, atol=1e-3)
    assert logits.dtype == torch.float32 and not lmm.logits(prompt).requires_grad


def test_a_splice_is_what_the_layers_after_it_see_and_goes():
    lmm = studied()
    prompt = lmm.prompt("Hm", noise())
    clean = lmm.hidden_states(prompt, [0, 1, 2])
    with lmm.spliced(1, lambda hidden: hidden * 2):
        spliced = lmm.hidden_states(prompt, [0, 1, 2])
    assert torch.equal(spliced[0], clean[0])
    assert torch.equal(spliced[1], clean[1] * 2)
    with torch.no_grad():
        assert not torch.allclose(spliced[2], clean[2])
        assert torch.equal(lmm.hidden_states(prompt, 2), clean[2])


def test_a_model_in_half_precision_takes_a_float32_splice():
    model, processor = models.make("picture_world")
    lmm = LMM(model.bfloat16(), processor)
    prompt = lmm.prompt("Hm", noise())
    assert prompt.inputs["pixel_values"].dtype == torch.bfloat16
    with lmm.spliced(0, lambda hidden: hidden.float() * 1.5):
        assert lmm.hidden_states(prompt, 0).dtype == torch.bfloat16
        assert lmm.logits(prompt).dtype == torch.float32


# --- Generation ---------------------------------------------------------------------------------------------


@EVERY_FAMILY
def test_generation_is_greedy_and_its_cache_changes_nothing(family):
    """Against one forward of the whole sequence for every token, without a cache."""
    lmm = studied(family)
    image = noise()
    prompt = lmm.prompt("Go on", image)
    inputs = dict(prompt.inputs)
    end = {lmm.tokenizer.eos_token_id}
    tokens = []
    while len(tokens) < 6 and not end & set(tokens):
        with torch.no_grad():
            tokens.append(int(lmm.model(**inputs, use_cache=False).logits[0, -1].argmax()))
        for name, new in (("input_ids", tokens[-1]), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.tensor([[new]])], dim=1)
    expected = lmm.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert lmm.generate(prompt, max_new_tokens=6) == [expected]
    assert lmm.generate(prompt, max_new_tokens=6, use_cache=False) == [expected]


@EVERY_FAMILY
def test_a_splice_steers_the_prompt_and_every_step_of_generation(family):
    """A splice that writes one token's direction makes the model say that token; it sees one token a step."""
    lmm = studied(family)
    prompt = pair(lmm)
    head = lmm.model.get_output_embeddings().weight
    scores = head @ head.T
    scores.fill_diagonal_(-torch.inf)
    wanted = int((head.norm(dim=1) ** 2 - scores.amax(1))[:256].argmax())  # its own direction's winner
    shapes = []

    def steer(hidden):
        shapes.append(tuple(hidden.shape))
        return torch.zeros_like(hidden) + 1e4 * head[wanted]

    with lmm.spliced(lmm.n_layers - 1, steer):
        answers = lmm.generate(prompt, max_new_tokens=5)
    said = lmm.tokenizer.decode([wanted] * 5).strip()
    assert answers == [said, said]
    length = prompt.inputs["input_ids"].shape[1]
    assert shapes == [(2, length, lmm.width), *[(2, 1, lmm.width)] * 4]
    assert lmm.generate(prompt, max_new_tokens=5) != answers


@EVERY_FAMILY
def test_a_batch_is_answered_as_its_samples_are_alone(family):
    lmm = studied(family)
    alone = [lmm.prompt("Short?", noise()), lmm.prompt("And a longer question?", noise(60, 100, seed=1))]
    assert lmm.generate(pair(lmm), 5) == [lmm.generate(prompt, 5)[0] for prompt in alone]


def test_generation_stops_at_the_end_token_and_gives_only_the_answer():
    lmm = studied()
    prompt = pair(lmm)
    head = lmm.model.get_output_embeddings().weight
    end = head[lmm.tokenizer.eos_token_id]
    steps = []

    def finish(hidden):
        steps.append(len(steps))
        return hidden if len(steps) < 3 else torch.zeros_like(hidden) + 1e4 * (end - head.mean(0))

    with lmm.spliced(lmm.n_layers - 1, finish):
        answers = lmm.generate(prompt, max_new_tokens=50)
    assert len(steps) <= 4
    assert not any(models.IM_END in answer or "Short?" in answer or models.PAD in answer for answer in answers)


def test_generation_samples_when_asked_to():
    lmm = studied()
    prompt = lmm.prompt("Go on", noise())
    torch.manual_seed(0)
    drawn = {lmm.generate(prompt, max_new_tokens=8, do_sample=True, temperature=5.0)[0] for _ in range(4)}
    assert len(drawn) > 1


# --- Answers ------------------------------------------------------------------------------------------------


@EVERY_FAMILY
def test_answer_mask_marks_the_answer_and_its_end(family):
    lmm = studied(family)
    prompt = pair(lmm, answers=["a cat", "Yes, in the top left."])
    marked = [
        lmm.tokenizer.decode(ids[mask]).strip()
        for ids, mask in zip(prompt.inputs["input_ids"], prompt.answer_mask, strict=True)
    ]
    assert marked == ["a cat" + models.IM_END, "Yes, in the top left." + models.IM_END]
    assert not (prompt.answer_mask & ~prompt.mask("text", "special")).any()
    assert pair(lmm).answer_mask is None


@settings(max_examples=25, deadline=None, derandomize=True)
@given(question=st.text(max_size=12), answer=st.text(min_size=1, max_size=12))
def test_any_answer_is_marked_whole(question, answer):
    lmm = studied()
    prompt = lmm.prompt(question, noise(), answers=answer)
    marked = prompt.inputs["input_ids"][0][prompt.answer_mask[0]]
    written = lmm.tokenizer(answer)["input_ids"]
    assert marked.tolist() == [*written, lmm.tokenizer.eos_token_id]


@EVERY_FAMILY
def test_the_question_is_the_same_with_and_without_an_answer(family):
    """What is trained on continues exactly what is asked, the Q-Former's instruction included."""
    lmm = studied(family)
    asked, told = lmm.prompt("What?", noise()), lmm.prompt("What?", noise(), answers="A cat.")
    length = asked.inputs["input_ids"].shape[1]
    assert torch.equal(told.inputs["input_ids"][:, :length], asked.inputs["input_ids"])
    assert torch.equal(told.spans[0].kinds[:length], asked.spans[0].kinds)
    assert torch.equal(told.answer_mask[0].nonzero()[0], torch.tensor([length]))
    torch.testing.assert_close(lmm.logits(told)[:, :length], lmm.logits(asked), rtol=1e-4, atol=1e-4)


@EVERY_FAMILY
def test_cross_entropy_is_the_models_own_loss_over_the_answer(family):
    lmm = studied(family)
    questions, images, answers = (
        ["Short?", "And a longer question?"],
        [noise(), noise(60, 100, seed=1)],
        ["ab", "c" * 9],
    )
    together = lmm.cross_entropy(lmm.prompt(questions, images, answers=answers))
    for loss, sample in zip(together, zip(questions, images, answers, strict=True), strict=True):
        question, image, answer = sample
        prompt = lmm.prompt(question, image, answers=answer)
        ids = prompt.inputs["input_ids"][0]
        logits = lmm.logits(prompt)[0]
        by_hand = [
            F.cross_entropy(logits[position - 1], ids[position])
            for position in prompt.answer_mask[0].nonzero()[:, 0].tolist()
        ]
        assert len(by_hand) == len(answer) + 1 + (family == "instructblip")  # a token a byte, and the end
        torch.testing.assert_close(loss, torch.stack(by_hand).mean(), rtol=1e-4, atol=1e-4)


def test_templates_without_an_end_token_or_with_white_space_after_it():
    model, processor = models.make("picture_world")
    lmm = LMM(model, processor)
    processor.chat_template = (  # as llava-hf/llava-1.5's: no end token, white space after the answer
        "{% for message in messages %}{{ message.role | upper }}: {% for part in message.content %}"
        "{{ '<image>\n' if part.type == 'image' else part.text + ' ' }}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    prompt = lmm.prompt("Hm?", noise(), answers="A cat.")
    assert lmm.tokenizer.decode(prompt.inputs["input_ids"][0][prompt.answer_mask[0]]) == " A cat."


def test_begin_of_sequence_is_written_once():
    model, processor = models.make("picture_world")
    processor.tokenizer.add_special_tokens({"bos_token": "<end_of_utterance>"})
    bos = processor.tokenizer.bos_token_id
    processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end_of_utterance> $A", special_tokens=[("<end_of_utterance>", bos)]
    )
    lmm, template = LMM(model, processor), processor.chat_template
    for written in (template, "{{ bos_token }}" + template):  # by the tokenizer, or by the template
        processor.chat_template = written
        prompt = lmm.prompt("Hm", noise(), answers="Yes")
        ids = prompt.inputs["input_ids"][0]
        assert (ids == bos).nonzero().tolist() == [[0]]
        assert lmm.tokenizer.decode(ids[prompt.answer_mask[0]]) == "Yes<|im_end|>"


# --- Loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["picture_world", "llava_onevision", "qwen2_5_vl", "idefics3", "instructblip"])
def test_load_gives_the_same_model_frozen_and_padded_left(family, tmp_path):
    model, processor = models.make(family)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    lmm = LMM.load(tmp_path / "model", device="cpu")
    assert not lmm.model.training and not any(weights.requires_grad for weights in lmm.model.parameters())
    assert lmm.tokenizer.padding_side == "left"
    assert lmm.device == torch.device("cpu") and lmm.model.dtype == torch.float32
    assert lmm.name == str(tmp_path / "model")
    assert (lmm.n_layers, lmm.width) == (models.LAYERS, models.WIDTH)
    original = LMM(model, processor)
    torch.testing.assert_close(lmm.logits(pair(lmm)), original.logits(pair(original)), rtol=1e-5, atol=1e-5)


def test_load_takes_another_dtype(tmp_path):
    model, processor = models.make("picture_world")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert LMM.load(str(tmp_path), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_load_refuses_a_model_of_text_alone(tmp_path):
    LlamaForCausalLM(LlamaConfig(**models.text(models.tokenizer()))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(llama\) takes no images and text, as far as transformers knows; choose"):
        LMM.load(tmp_path)


def test_images_of_one_size_have_one_grid_whatever_they_were(tmp_path):
    """Qwen2.5-VL's grid follows the image: 14 px patches, merged two by two."""
    model, processor = models.make("qwen2_5_vl")
    assert LMM(model, processor).grid is None
    lmm = LMM(model, processor, image_size=(112, 84))
    assert lmm.grid == (3, 4)
    picture = noise(300, 60)
    prompt = lmm.prompt("", picture)
    assert prompt.spans[0].grid == (3, 4)
    alone = LMM(model, processor).prompt("", picture.resize((112, 84), Image.Resampling.BICUBIC))
    assert torch.equal(prompt.inputs["pixel_values"], alone.inputs["pixel_values"])


def test_a_damaged_folder_of_a_model_is_named_and_no_weight_is_drawn_at_random(tmp_path):
    model, processor = models.make("picture_world")
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")

    def damaged(name: str, change) -> Path:
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / str(len([*tmp_path.iterdir()]))))
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        return folder

    with pytest.raises(ValueError, match="have no weights for .*lm_head|have no weights for .*embed"):
        LMM.load(damaged("model.safetensors", lambda data: data.replace(b"embed_tokens", b"embed_tokenz")))
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        LMM.load(damaged("model.safetensors", lambda data: data[:-5]))
    for name in ("config.json", "tokenizer.json", "processor_config.json"):
        folder = damaged(name, lambda data: data[: len(data) // 2])
        with pytest.raises(ValueError, match=str(folder)):
            LMM.load(folder)
    with pytest.raises(ValueError, match="config.json has the number 1e.30, which is no size"):
        LMM.load(
            damaged(
                "config.json",
                lambda data: re.sub(b'"(num_hidden_layers|num_layers)": [0-9]+', b'"\\1": 1' + b"0" * 30, data),
            )
        )


def test_load_names_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder .*nowhere; give another one, or a name on the hub"):
        LMM.load(tmp_path / "nowhere")


def test_load_never_runs_code_that_comes_with_a_checkpoint_unasked(tmp_path):
    model, processor = models.make("picture_world")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    remote = '{"auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"},'
    (tmp_path / "config.json").write_text(config.replace('"llava_next"', '"never_heard_of"', 1).replace("{", remote, 1))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran code from the checkpoint')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        LMM.load(tmp_path)


def test_a_missing_pad_token_becomes_the_end_token():
    model, processor = models.make("picture_world")
    processor.tokenizer.pad_token = None
    lmm = LMM(model, processor)
    assert lmm.tokenizer.pad_token_id == lmm.tokenizer.eos_token_id == lmm.model.generation_config.pad_token_id
    prompt = pair(lmm)
    assert torch.equal(prompt.mask("pad"), prompt.inputs["attention_mask"] == 0)
    assert prompt.spans[0].mask("special").sum() == 3  # two starts and one end, which is no padding


# --- Bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [-1, 3, 24])
def test_no_such_layer(index):
    lmm = studied()
    prompt = lmm.prompt("Hm", noise())
    for ask in (lmm.layer, lambda i: lmm.hidden_states(prompt, i), lambda i: lmm.spliced(i, torch.relu)):
        with pytest.raises(ValueError, match=f"no layer {index}: .* has layers 0 to 2, 0-based"):
            ask(index)


def test_no_layer_at_all():
    with pytest.raises(ValueError, match="give at least one"):
        studied().hidden_states(studied().prompt("Hm"), [])


def test_a_model_without_image_tokens():
    _, processor = models.make("picture_world")
    text_only = LlamaForCausalLM(LlamaConfig(**models.text(processor.tokenizer)))
    with pytest.raises(ValueError, match=r"\(llama\) has no image_token_id .*choose a model whose images become"):
        LMM(text_only, processor)


def test_a_family_whose_layout_cannot_be_found_out():
    model, processor = models.make("picture_world")  # rows of tiles end in a learned newline, which no token shows
    model.config.model_type = "brand_new"
    with pytest.raises(
        ValueError, match=r"register a function .* as lmm_sae_nb.model.token_kinds.LAYOUTS\['brand_new'\]"
    ):
        LMM(model, processor)


def test_a_family_can_be_registered(monkeypatch):
    model, processor = models.make("picture_world")
    model.config.model_type = "brand_new"
    monkeypatch.setitem(LAYOUTS, "brand_new", LAYOUTS["llava_next"])
    assert LMM(model, processor).prompt("", noise()).spans[0].grid == (12, 12)


@pytest.mark.usefixtures("unchecked")
def test_a_tokenizer_alone_is_no_processor():
    model, processor = models.make("picture_world")
    with pytest.raises(ValueError, match="does not process both text and images; load the processor"):
        LMM(model, processor.tokenizer)


def test_a_processor_with_another_image_token():
    model, processor = models.make("picture_world")
    model.config.image_token_id += 1
    with pytest.raises(ValueError, match="writes images as token 259, the model reads them as token 260; load both"):
        LMM(model, processor)


def test_a_processor_with_words_that_the_model_does_not_know():
    model, processor = models.make("picture_world")
    processor.tokenizer.add_tokens(["novel"])
    lmm = LMM(model, processor)
    lmm.prompt("Old words do.", noise())
    with pytest.raises(ValueError, match="writes token 302, the model knows tokens 0 to 301; load both"):
        lmm.prompt("A novel one.", noise())


def test_an_encoder_decoder_is_refused():
    model, processor = models.make("picture_world")
    del model.model.language_model.layers
    with pytest.raises(ValueError, match="decoder-only"):
        LMM(model, processor)


@pytest.mark.parametrize(
    ("family", "misfit"),
    [
        ("llava_next", {"patch_size": 28}),
        ("llava_next", {"num_additional_image_tokens": 0}),
        ("llava_next", {"vision_feature_select_strategy": "full"}),
        ("llava_onevision", {"num_image_tokens": 196}),
        ("llava_onevision", {"vision_feature_select_strategy": "default"}),
        ("idefics3", {"image_seq_len": 169}),
        ("instructblip", {"num_query_tokens": 16}),
    ],
    ids=str,
)
def test_a_processor_that_writes_another_number_of_image_tokens(family, misfit):
    model, processor = models.make(family)
    lmm = LMM(model, processor)
    for name, value in misfit.items():
        setattr(processor, name, value)
    wrong = r"for an image of 100 x 60 px \(sample 0\) it wrote \d+ image tokens, the model expects \d+;"
    with pytest.raises(ValueError, match=wrong):
        lmm.prompt("Hm", noise())


def test_an_image_for_some_samples_only_where_the_processor_cannot():
    with pytest.raises(
        ValueError, match="sample 0 has no image beside .* a Q-Former takes no text without an image, give"
    ):
        studied("instructblip").prompt(["Hello", "Hm"], [None, noise()])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (0, 5)), "0 x 5 px: it has no pixels"),
        (Image.new("RGB", (5, 0)), "5 x 0 px: it has no pixels"),
        (torch.zeros(3, 9, 9), "Tensor is not a PIL image; use PIL.Image.open or PIL.Image.fromarray"),
        ("picture.png", "str is not a PIL image"),
    ],
)
def test_an_image_that_is_none(image, message):
    with pytest.raises(ValueError, match=message):
        studied().prompt("Hm", image)


def test_an_image_of_another_mode_is_seen_in_rgb():
    lmm = studied()
    grey = noise().convert("L")
    pixels = [lmm.prompt("", image).inputs["pixel_values"] for image in (grey, grey.convert("RGB"))]
    assert torch.equal(*pixels)


def test_a_missing_chat_template():
    model, processor = models.make("picture_world")
    processor.chat_template = None
    lmm = LMM(model, processor)
    with pytest.raises(ValueError, match="has no chat template; set lmm.processor.chat_template"):
        lmm.prompt("Hm", noise())
    processor.tokenizer.chat_template = models.chat_template()  # the tokenizer's will do
    assert lmm.prompt("Hm", noise()).spans[0].grid == (12, 12)


def test_a_chat_template_that_drops_the_answer():
    model, processor = models.make("picture_world")
    processor.chat_template = "{{ '<image>' }}Q"
    with pytest.raises(ValueError, match="writes no answer after"):
        LMM(model, processor).prompt("Hm", noise(), answers="Yes")


def test_a_text_that_holds_the_image_token():
    with pytest.raises(ValueError, match="'see <image>' holds the image token.*leave it out"):
        studied().prompt("see <image>", noise())


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ({"texts": ["a", "b"], "images": noise()}, "2 texts, 1 images, 0 answers"),
        ({"texts": "a", "images": [noise(), noise()]}, "1 texts, 2 images, 0 answers"),
        ({"texts": ["a", "b"], "answers": ["c"]}, "2 texts, 2 images, 1 answers"),
        ({"texts": []}, "0 texts, 0 images, 0 answers"),
    ],
)
def test_numbers_that_differ(arguments, counts):
    with pytest.raises(ValueError, match=f"{counts}: give each text one image or None"):
        studied().prompt(**arguments)


def test_cross_entropy_without_answers():
    with pytest.raises(ValueError, match="no answers; make it with prompt"):
        studied().cross_entropy(studied().prompt("Hm"))
