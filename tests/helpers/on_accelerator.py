"""Tests for a process of their own, run by `test_devices.py`.

On an accelerator every call gives what it gives on the CPU; a 16-bit model is attributed as its float32 copy.
"""

import pytest
import torch
from accelerate import dispatch_model
from models import make, noise
from pretend_device import pretend_device
from torch.testing import assert_close

from lmm_sae_nb.attribute.agreement import random_pairs
from lmm_sae_nb.attribute.attribution import clamping, decision, exact, integrated, linear, separate_paths
from lmm_sae_nb.benchmarks import gpu
from lmm_sae_nb.compare.saes import evaluate_awake, train_and_cache
from lmm_sae_nb.hallucination.answers import Push, Shift, first_tokens, strength, unchanged
from lmm_sae_nb.hallucination.captions import caption_images
from lmm_sae_nb.hallucination.cases import Answered, Case, answer_questions, as_the_model_writes
from lmm_sae_nb.hallucination.fit import FitSettings, fit
from lmm_sae_nb.hallucination.report import Method
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.steer.steering import Edit, Scope, steered
from lmm_sae_nb.train.evaluate import control_fvus, evaluate_sae
from lmm_sae_nb.train.training import Recipe

LAYER = 1
IMAGE = noise()
YES, NO = Case(IMAGE, "is it so ?", "y", "n", False), Case(IMAGE, "or not ?", "n", "y", False)
ROWS = [{"image": IMAGE, "question": "why ?", "answer": "so"}, {"image": None, "question": "how ?", "answer": "thus"}]


def place_on(device: str, dtype: torch.dtype = torch.float32) -> SAEInPlace:
    """The same random model and SAE, wherever they are; the SAE is of the same dtype at first."""
    model, processor = make("picture_world")
    model.set_attn_implementation("eager")
    lmm = LMM(model.to(dtype).to(device), processor)
    sae = TopKSAE(lmm.width, 24, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return SAEInPlace(lmm, sae.requires_grad_(False), LAYER)


def place_on_two() -> SAEInPlace:
    """The same with the SAE's layer and what follows on a second accelerator, as a `device_map` has it."""
    place = place_on("cpu")
    model, decoder = place.lmm.model, "model.language_model"
    first = ["model.vision_tower", "model.multi_modal_projector", f"{decoder}.embed_tokens", f"{decoder}.rotary_emb"]
    where = dict.fromkeys([*first, "model.image_newline"], "sim:0") | {f"{decoder}.norm": "sim:1", "lm_head": "sim:1"}
    where |= {f"{decoder}.layers.{n}": "sim:0" if n < LAYER else "sim:1" for n in range(place.lmm.n_layers)}
    model.model.image_newline = torch.nn.Parameter(model.model.image_newline.to("sim:0"), requires_grad=False)
    with pytest.warns(UserWarning, match="image_newline"):  # it is a parameter, not a module
        dispatch_model(model, where, main_device="sim:0")
    return SAEInPlace(place.lmm, place.sae, LAYER)


@pytest.fixture(scope="module")
def places():
    with pretend_device():
        yield {"cpu": place_on("cpu"), "one": place_on("sim"), "two": place_on_two()}


def choice_of(place):
    return decision(place.lmm, "so ?", IMAGE, "y", "n")


def in_order(values):
    """Values of each token's latents, whose order depends on the way that TopK is computed."""
    return values.nan_to_num().sort(-1).values


def of_few_tokens(place, attribute):
    choice = choice_of(place)
    tokens = torch.arange(choice.prompt.inputs["input_ids"].shape[1]) % 50 == 49
    return in_order(attribute(place, choice, tokens[:, None].expand(-1, place.sae.k)))


def steered_logits(place):
    prompt = place.lmm.prompt(["so ?", "why so ?"], [IMAGE, None])
    with torch.no_grad(), steered(place, prompt, [Edit(2, 5.0)]):
        return place.lmm.last_logits(prompt)


def fitted(place):
    few = FitSettings(rounds=1, each=2, refits=2, direction_steps=2, batch=2)
    found = fit(place, [YES], [NO], [Answered(IMAGE, "why ?", "so")], settings=few, keep_error=False)
    return torch.tensor([edit.value for edit in found.clamps[2]] + found.direction)


def letters(texts):
    return torch.tensor([ord(letter) for text in texts for letter in text])


def captions(place):
    methods = {"clamp": Method(((Edit(2, 5.0),),)), "words": Method(((),), before="so :")}
    found = caption_images(place, [IMAGE], [[]], ["so"], methods, "what ?", max_new_tokens=3)
    return letters(text for texts in found.texts.values() for text in texts)


def as_numbers(metrics):
    return torch.tensor([value for _, value in sorted(metrics.items())])


CALLS = {
    "linear": lambda place: in_order(linear(place, choice_of(place)).values),
    "clamping": lambda place: clamping(place, choice_of(place), torch.ones(24)),
    "integrated": lambda place: in_order(integrated(place, choice_of(place), steps=2).values),
    "exact": lambda place: of_few_tokens(place, exact),
    "separate paths": lambda place: of_few_tokens(place, separate_paths),
    "steered": steered_logits,
    "first tokens": lambda place: (
        first_tokens(place, [YES, NO], [None, (), (Edit(2, 5.0),), Shift((1.0,) * place.lmm.width)]).margin
    ),
    "pushed": lambda place: first_tokens(place, [YES, NO], [Push((Edit(2, 5.0),), 1)], keep_error=False).margin,
    "unchanged": lambda place: unchanged(place, [Answered(IMAGE, "why ?", "so")], [(), (Edit(2, 5.0),)]).float(),
    "strength": lambda place: torch.tensor(strength(place, [YES, NO], (Edit(2, 5.0),), Scope())),
    "answers": lambda place: letters(each.answer[:4] for each in answer_questions(place.lmm, ROWS[:1])),
    "ways to write": lambda place: letters(case.right for case in as_the_model_writes(place.lmm, [YES, NO])),
    "captions": captions,
    "fit": fitted,
    "evaluate": lambda place: as_numbers(evaluate_sae(place, ROWS)),
    "controls": lambda place: as_numbers(control_fvus(place, ROWS)),
}


# Sums over many tokens: a device adds them up in another order than the compiled loops of a CPU.
ROUNDED = {"evaluate": {"rtol": 1e-5, "atol": 1e-5}}


@pytest.mark.parametrize("name", CALLS)
def test_an_accelerator_gives_what_the_cpu_gives(places, name):
    there, here = (CALLS[name](places[where]).cpu() for where in ("one", "cpu"))
    assert_close(there, here, **ROUNDED.get(name, {}))


@pytest.mark.parametrize("name", ["exact", "steered", "first tokens", "evaluate", "controls"])  # without a gradient,
def test_two_accelerators_give_what_the_cpu_gives(places, name):  # which a second pretend device cannot compute
    there, here = (CALLS[name](places[where]).cpu() for where in ("two", "cpu"))
    assert_close(there, here, **ROUNDED.get(name, {}))


def test_saes_that_learn_in_turns_rest_on_the_cpu_and_are_measured_on_the_accelerator(tmp_path):
    recipes, metrics = {"low": Recipe(0, 24, 3, 1e-3), "high": Recipe(1, 16, 2, 1e-3)}, {}
    with pretend_device():
        for device in ("cpu", "sim"):
            lmm = place_on(device).lmm
            how = {"steps": 2, "batch_tokens": 32, "buffer_tokens": 64, "batch_samples": 1, "n_top": 2}
            studied = train_and_cache(lmm, recipes, ROWS, [IMAGE], folder=tmp_path / device, at_once=1, **how)
            metrics[device] = evaluate_awake({name: study.place for name, study in studied.items()}, ROWS)
            assert {study.place.sae.W_dec.device.type for study in studied.values()} == {"cpu"}
    for name in recipes:
        assert_close(as_numbers(metrics["sim"][name]), as_numbers(metrics["cpu"][name]), rtol=1e-3, atol=1e-4)


def test_the_pretend_accelerator_refuses_what_cuda_refuses():
    with pretend_device():
        there, here = torch.ones(3, device="sim"), torch.ones(3)
        assert (there.device.type, (there + 1).tolist(), float(there @ there)) == ("sim", [2, 2, 2], 3)
        assert there[here > 0].tolist() == (there * torch.tensor(1.0)).tolist() == [1, 1, 1]
        for mix in (lambda: there + here, lambda: here[there > 0], lambda: there.masked_scatter(here > 0, there)):
            with pytest.raises(RuntimeError, match="same device"):
                mix()


def test_an_sae_goes_to_the_layers_device_in_float32():
    with pretend_device():
        sae = place_on("sim", torch.bfloat16).sae
        assert {(weights.device.type, weights.dtype) for weights in sae.parameters()} == {("sim", torch.float32)}


def test_an_saes_weights_are_read_onto_the_device(tmp_path):
    sae = place_on("cpu").sae
    sae.save(tmp_path)
    with pretend_device():
        read = TopKSAE.load(tmp_path, device="sim")
        assert {weights.device.type for weights in read.parameters()} == {"sim"}
        for name, weights in read.state_dict().items():
            assert_close(weights.cpu(), sae.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_is_attributed_as_its_float32_copy(dtype):
    coarse, fine = place_on("cpu", dtype), place_on("cpu", dtype)
    fine.lmm.model.float()
    before = {name: buffer.clone() for name, buffer in coarse.lmm.model.named_buffers()}
    choice = choice_of(coarse)
    for attribute in (linear, integrated):
        assert_close(attribute(coarse, choice).values, attribute(fine, choice).values)
    pairs = random_pairs(linear(fine, choice), 4, torch.Generator().manual_seed(0))
    for attribute in (exact, separate_paths):
        assert_close(attribute(coarse, choice, pairs), attribute(fine, choice, pairs), equal_nan=True)
    assert {weights.dtype for weights in coarse.lmm.model.parameters()} == {dtype}
    for name, buffer in coarse.lmm.model.named_buffers():
        assert_close(buffer, before[name], rtol=0, atol=0)


def test_a_model_has_one_fingerprint_in_float32_and_bfloat16():
    fine, coarse = place_on("cpu").lmm, place_on("cpu", torch.bfloat16).lmm
    assert fine.fingerprint(LAYER) == coarse.fingerprint(LAYER) != fine.fingerprint(LAYER - 1)


def test_every_part_is_measured_on_an_accelerator():
    with pretend_device():
        found = gpu.measure(gpu.SMALL, torch.device("sim"), minutes=5)
    assert found.keys() == gpu.parts(gpu.SMALL, torch.device("sim")).keys()
    for name, row in found.items():
        assert isinstance(row, dict) and min(row.values()) >= 0, name
    assert {"train_seconds", "cache_seconds", "attribute_seconds_predicted"} <= found["model"].keys()
    assert {"tokens_per_second", "tokens_per_second_predicted"} <= found["model"].keys()
