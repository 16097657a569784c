"""Forecasts against the real thing: processors, published sizes, counted products, and arithmetic done by hand."""

import json
import re
from inspect import signature

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lmm_sae_nb.attribute.attribution import decision, linear
from lmm_sae_nb.full_scale.costs import ASSUMPTIONS, DEVICES, Assumptions, Device, Work, attribute_cost, encoding_work
from lmm_sae_nb.full_scale.geometry_twin import geometry_twin, gpu_rows, narrow, noise, predicted_and_measured, run_twin
from lmm_sae_nb.full_scale.models import (
    GEOMETRIES,
    config_of,
    count_parameters,
    count_products,
    forward_flops,
    image_layout,
    meta_model,
)
from lmm_sae_nb.full_scale.pages import page_needs
from lmm_sae_nb.full_scale.presets import commands, cost_metrics, explainer_name, preset_costs, read_preset, servers
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.train.training import Recipe, train_saes

PAPER = "llava-hf/llama3-llava-next-8b-hf"
A100 = DEVICES["A100 80GB"]


@pytest.fixture(scope="module")
def twin() -> LMM:
    return geometry_twin(PAPER, width=64)


@pytest.fixture(scope="module")
def preset(root) -> dict:
    return read_preset(root / "notebooks/params/paper.yaml")


# The models.


def test_parameters_of_the_paper_s_model_by_hand():
    """The decoder is Llama 3 8B, whose 8,030,261,248 parameters its makers published, with 64 words more."""
    d, words = 4096, 128_320
    layer = 2 * d * d + 2 * d * 1024 + 3 * d * 14_336 + 2 * d
    decoder = 32 * layer + d + 2 * words * d
    assert decoder == 8_030_261_248 + 2 * 64 * d
    v = 1024
    block = 4 * (v * v + v) + 2 * v * 4 * v + 4 * v + v + 4 * v
    tower = 24 * block + v + 577 * v + 3 * 14 * 14 * v + 4 * v
    assert tower == 303_507_456  # CLIP ViT-L/14 at 336 px, as published
    projector = (v * d + d) + (d * d + d)
    assert count_parameters(meta_model(PAPER)) == decoder + tower + projector + d  # and the newline


@pytest.mark.parametrize(
    ("name", "published"),
    [
        (PAPER, 8.36e9),
        ("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", 0.894e9),
        ("llava-hf/llava-onevision-qwen2-72b-ov-hf", 73.2e9),
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976),
    ],
)
def test_parameters_of_the_presets_models_are_those_on_their_hub_pages(name, published):
    model = meta_model(name)
    assert abs(count_parameters(model) / published - 1) < 1e-3
    assert next(model.parameters()).is_meta


def test_a_preset_s_bare_name_is_refused():
    with pytest.raises(FileNotFoundError, match="no preset paper; give its file's path from the root, such as noteb"):
        read_preset("paper")


def test_every_preset_s_models_are_known_offline(root):
    for name in ("paper", "small"):
        given = read_preset(root / f"notebooks/params/{name}.yaml")
        assert {values["model"] for values in given.values() if "model" in values and "/models/" not in values["model"]}
        for values in given.values():
            if not values.get("model", "data/").startswith("data/"):
                assert values["model"] in json.loads(GEOMETRIES.read_text())


def test_a_model_of_a_folder_is_read_from_it(root):
    folder = root / "data/models/tiny-llava-next"
    assert (
        config_of(folder).text_config.hidden_size
        == json.loads((folder / "config.json").read_text())["text_config"]["hidden_size"]
    )


@settings(max_examples=15, deadline=None)
@given(size=st.tuples(st.integers(20, 1500), st.integers(20, 1500)))
def test_tokens_of_an_image_are_what_the_real_processor_writes(twin, size):
    if max(size) > 12 * min(size):
        return
    inputs = twin.processor(text=str(twin.processor.image_token), images=noise([size]), return_tensors="pt")
    found = image_layout(meta_model(PAPER), size)
    assert found.tokens == int((inputs["input_ids"] == twin.model.config.image_token_id).sum())
    assert (found.base, found.patches) == (576, 576)
    assert found.crops == inputs["pixel_values"].shape[1]


def test_tokens_of_an_anyres_image_by_hand():
    """640 x 480 goes best into 672 x 672: 48 x 48 patches, of which padding takes 6 rows above and 6 below."""
    assert image_layout(meta_model(PAPER), (640, 480)) == (576 + 36 * (48 + 1), 576, 5, 576)
    assert image_layout(meta_model(PAPER), (1000, 300)).crops == 4  # 3 x 1 tiles and the base image


@pytest.mark.parametrize("size", [(640, 480), (100, 60), (336, 1000)])
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_tokens_of_other_families_are_what_their_processors_write(family, size):
    model, processor = make(family)
    (image,) = noise([size])
    inputs = LMM(model, processor).prompt("", image).inputs
    assert image_layout(model, size).tokens == int((inputs["input_ids"] == model.config.image_token_id).sum())


@pytest.mark.parametrize("size", [(640, 480), (336, 1000)])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "gemma3", "mistral3"])
def test_tokens_of_further_families_follow_from_their_configs(family, size):
    model, processor = families.make(family)
    lmm = LMM(model, processor)
    marks = lmm.prompt("", noise([size])[0]).mask("base", "tiles")
    layout = image_layout(model, size)
    assert layout.tokens == layout.base == int(marks.sum())
    assert forward_flops(model, 100, layout) > forward_flops(model, 100, layout, 0) > forward_flops(model, 100, None, 0)


@pytest.mark.parametrize(
    "family", ["llava", "paligemma", "internvl", "llama4", "aya_vision", "idefics2", "idefics3", "glm4v", "qwen3_5"]
)
def test_the_whole_image_of_a_family_can_be_forecast(family):
    model, _ = families.make(family)
    layout = image_layout(model, (640, 480))
    assert 0 < layout.tokens <= layout.patches and layout.crops == 1
    assert forward_flops(model, 100, layout, 1) > forward_flops(model, 100, None, 1) > 0


def test_a_family_without_a_rule_is_named():
    model, _ = make("instructblip")
    with pytest.raises(ValueError, match="costs of a instructblip cannot be predicted: its config does not say"):
        image_layout(model, (640, 480))


# FLOPs.


@pytest.mark.parametrize("layer", [0, 2])
def test_flops_of_a_forward_are_those_that_torch_counts(layer):
    lmm = LMM(*make("llava_next"))
    prompt = lmm.prompt("what is shown ?", noise([(640, 480)])[0])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        lmm.hidden_states(prompt, layer)
    tokens = prompt.inputs["input_ids"].shape[1]
    predicted = forward_flops(lmm.model, tokens, image_layout(lmm.model, (640, 480)), layer)
    assert abs(predicted / counter.get_total_flops() - 1) < 0.02


@pytest.mark.parametrize("layer", [0, 1])
def test_flops_of_an_attribution_are_those_that_torch_counts(layer):
    lmm = LMM(*make("llava_next"))
    sae = TopKSAE(lmm.width, 64, 4).requires_grad_(False)
    choice = decision(lmm, "what is shown ?", noise([(640, 480)])[0], "y", "n")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        linear(SAEInPlace(lmm, sae, layer), choice)
    text = int(choice.prompt.mask("text", "special").sum())
    cost = attribute_cost(lmm.model, layer, 64, 4, 1, assumptions=Assumptions(image=(640, 480), text_tokens=text))
    assert abs(sum(work.flops for work in cost.work) / counter.get_total_flops() - 1) < 0.03


def test_flops_of_a_sae_s_encoder_are_those_that_torch_counts():
    x, W_enc = torch.randn(7, 16), torch.randn(48, 16)
    with FlopCounterMode(display=False) as counter:
        x @ W_enc.T
    assert encoding_work(7, 16, 48)[0].flops == counter.get_total_flops()


# Time, memory, disk.


def test_work_takes_the_longer_of_products_and_bytes():
    device = Device("it", 1.0, float32=100.0, bfloat16=1000.0, bandwidth=10.0, link=5.0)
    assert Work("products", 400.0, 20.0).seconds(device, 1, 0.5) == 8.0
    assert Work("bytes", 400.0, 60.0).seconds(device, 1, 0.5) == 12.0
    assert Work("half", 4000.0, dtype="bfloat16").seconds(device, 2, 1.0) == 2.0
    assert Work("each", 400.0, divided=False).seconds(device, 2, 1.0) == 4.0
    assert [Work("sum", 0.0, sent=10.0).seconds(device, gpus, 1.0) for gpus in (1, 2)] == [0.0, 2.0]


def test_the_paper_s_training_by_hand(preset):
    one, eight = (preset_costs(preset, 46_684, gpus=gpus)[0] for gpus in (1, 8))
    tokens = 24_000 * 81_920
    assert one.tokens == tokens
    encoder = next(work for work in one.work if work.name == "SAE encoder")
    assert encoder.flops == 2 * tokens * 4096 * 131_072
    assert_close(encoder.seconds(A100, 1, 0.5), 2.110e18 / 156e12 / 0.5, rtol=1e-3, atol=0)  # in TF32
    sae = 4 * (2 * 131_072 * 4096 + 131_072 + 4096)
    assert one.disk["SAE"] == sae == 4_295_507_968  # the published file
    assert one.gpu["SAE"] + one.gpu["gradient, Adam"] == 4 * sae
    assert one.gpu["LMM"] == 2 * count_parameters(meta_model(PAPER))
    assert one.gpu["buffer"] == 16 * 81_920 * 4096 * 2 == 8 * eight.gpu["buffer"]
    assert eight.gpu["LMM"] == one.gpu["LMM"] and eight.host["processes"] == 8 * one.host["processes"]
    hours = [cost.hours(A100, gpus, 0.4) for cost, gpus in ((one, 1), (eight, 8))]
    assert_close(hours[0]["LMM forward"], 8 * hours[1]["LMM forward"])
    assert hours[0]["Adam"] == hours[1]["Adam"] and hours[0]["sum over GPUs"] == 0 < hours[1]["sum over GPUs"]


def test_a_token_that_the_sae_learns_from_twice_goes_through_the_model_once(preset):
    once = preset_costs(preset, 46_684)[0]
    twice = preset_costs(preset | {"01_train_sae": preset["01_train_sae"] | {"repeats": 2}}, 46_684)[0]
    (model, *others), (same, *other_work) = once.work, twice.work
    assert (model.name, same.flops) == ("LMM forward", model.flops / 2) and others == other_work
    assert (twice.disk["samples"], twice.prepared) == (once.disk["samples"] / 2, once.prepared / 2)
    assert (twice.tokens, twice.gpu) == (once.tokens, once.gpu)


def test_the_paper_s_cache_by_hand(preset):
    cost = preset_costs(preset, 46_684)[1]
    assert next(work for work in cost.work if work.name == "SAE encoder").flops == 2 * 46_684 * 576 * 4096 * 131_072
    top = 131_072 * 8 * 576 * 2  # the patch rows alone, 1.2 GB
    assert top < cost.host["top images"] - 0.5e9 < 1.05 * top
    assert cost.disk["images"] == 46_684 * ASSUMPTIONS.image_bytes


def test_the_paper_s_explainer_fits_eight_gpus_and_not_one(preset):
    one, eight = (preset_costs(preset, 46_684, gpus=gpus)[2] for gpus in (1, 8))
    assert sum(eight.gpu.values()) < A100.memory < one.gpu["LMM"]
    reading, writing = one.work
    assert one.tokens == 5_000 * (5 * 729 + ASSUMPTIONS.text_tokens + ASSUMPTIONS.answer_tokens)
    weights = 2 * count_products(meta_model("llava-hf/llava-onevision-qwen2-72b-ov-hf").get_decoder().layers)
    assert reading.flops > 5_000 * 5 * 729 * weights
    assert writing.flops / A100.bfloat16 < writing.bytes / A100.bandwidth  # a token at a time waits for the weights


def test_a_preset_s_dictionaries_are_merged_and_an_endpoint_s_address_is_cut_off(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("""
explainer: {model: "org/name@http://localhost:1/v1", prompt: common}
seed: 3
A1_picture_world: {explainer: data/models/tiny-explainer}
03_interpret_features:
  explainer: {prompt: here}
""")
    given = read_preset(file)
    explainer = given["03_interpret_features"]["explainer"]
    assert (explainer["model"], explainer["prompt"]) == ("org/name@http://localhost:1/v1", "here")
    assert (given["03_interpret_features"]["seed"], explainer["tag"]) == (3, "")  # the notebook's own
    assert explainer_name(given) == "org/name"
    assert explainer_name({"03_interpret_features": {"explainer": "org/name"}}) == "org/name"


def test_metrics_add_up_the_hours_of_all_work_and_the_memory_of_one_gpu(preset):
    costs = {8: preset_costs(preset, 46_684, gpus=8)}
    metrics, train = cost_metrics(costs, A100, 0.4), costs[8][0]
    assert_close(metrics["train_hours_gpus_8"], sum(work.seconds(A100, 8, 0.4) for work in train.work) / 3600)
    assert metrics["train_gb_per_gpu_gpus_8"] == sum(train.gpu.values()) / 1e9
    row = train.row(A100, 8, 0.4)
    assert (row["hours"], row["GB per GPU"]) == (metrics["train_hours_gpus_8"], metrics["train_gb_per_gpu_gpus_8"])
    assert row["fits A100 80GB"] == (row["GB per GPU"] < 80)


def test_what_a_preset_does_not_give_are_the_notebooks_defaults_and_a_ready_sae_is_not_trained(tmp_path):
    (file := tmp_path / "mine.yaml").write_text(f"""
model: {PAPER}
layer: 3
A1_picture_world: {{model: data/models/tiny-llava-next}}
""")
    train, cache, _ = preset_costs(given := read_preset(file), 100)
    assert (train.tokens, cache.host["processes"]) == (1500 * 512, ASSUMPTIONS.process_memory)
    assert set(page_needs(given, 100)) >= {"01", "05", "08"}
    file.write_text(file.read_text() + "01_train_sae: {ready: {sae: some/repository}}\n")
    ready, same, _ = preset_costs(read_preset(file), 100)
    assert sum(ready.hours(A100, 1, 0.4).values()) == 0 and same == cache


def test_commands_hold_the_preset_s_own_values(root, preset):
    path = root / "notebooks/params/paper.yaml"
    write, train, *_, rest = commands(path, preset, 8).values()
    job = json.loads(write.removeprefix("echo '").removesuffix("' > job.json"))
    assert (job["n_latents"], job["k"], job["layer"]) == (131_072, 256, 24)
    assert job["folder"] == "data/artifacts/paper/train" and job["dataset"] == preset["01_train_sae"]["dataset"]
    settings = {name: value for name, value in job.items() if name not in ("model", "loading", "dataset")}
    signature(LMM.load).bind("the model", **job["loading"])
    shared = {name: settings.pop(name) for name in list(settings) if name in signature(train_saes).parameters}
    signature(train_saes).bind("the model", "the samples", {"": Recipe(settings.pop("layer"), **settings)}, **shared)
    assert "--num_processes 8" in train and train.endswith("-m lmm_sae_nb.train.launch job.json")
    assert rest == "make book PRESET=paper JOBS=1"


def test_with_one_gpu_models_that_do_not_fit_are_asked_on_another_machine(root, preset):
    path = root / "notebooks/params/paper.yaml"
    explainer, refiner, labeller, host, book = commands(path, preset, 1).values()
    assert explainer.startswith(f"vllm serve {explainer_name(preset)} --port 30000 ")
    assert "30001" in refiner and "30002" in labeller
    old, new = re.fullmatch(r"sed -i 's#(.+)#(.+)#' .+", host).groups()
    assert path.read_text().count(old) == 3 and new == "@http://HOST:"  # all three models, and no comment
    assert book == "make book PRESET=paper JOBS=1"
    assert servers({"03_interpret_features": {"explainer": {"model": "data/models/tiny-explainer"}}}) == {}


# The twin.


def test_a_twin_has_the_geometry_and_not_the_width(twin):
    real, narrow_one = config_of(PAPER), twin.model.config
    for part, names in {
        "text_config": ("num_hidden_layers", "vocab_size"),
        "vision_config": ("num_hidden_layers", "image_size", "patch_size"),
    }.items():
        for name in names:
            assert getattr(getattr(narrow_one, part), name) == getattr(getattr(real, part), name)
    assert narrow_one.image_grid_pinpoints == real.image_grid_pinpoints
    assert (twin.n_layers, twin.width, twin.grid) == (32, 64, (24, 24))
    heads = narrow_one.text_config.num_attention_heads // narrow_one.text_config.num_key_value_heads
    assert heads == real.text_config.num_attention_heads // real.text_config.num_key_value_heads
    assert type(twin.model) is type(meta_model(PAPER))


def test_a_twin_s_tokens_have_the_kinds_of_the_real_one(twin):
    prompt = twin.prompt("what ?", noise([(640, 480)])[0], answers=["noise"])
    (spans,) = prompt.spans
    assert [int(spans.mask(kind).sum()) for kind in ("base", "tiles", "newline")] == [576, 36 * 48, 36]
    assert prompt.answer_mask.any()


def test_what_a_gpu_measured_stands_beside_what_was_predicted():
    found = {"step": {"seconds": 3.0, "seconds_predicted": 2.0, "gb": 4.0}, "model": "the time was up"}
    pair = {"part": "step", "what": "seconds", "measured": 3.0, "predicted": 2.0, "ratio": 1.5}
    assert gpu_rows(found) == [pair]


@pytest.mark.slow
def test_a_twin_trains_caches_and_attributes(twin):
    measured = run_twin(twin, noise([(640, 480)]), 1, n_latents=256, k=4, steps=2, batch_tokens=64)
    for unit in ("seconds", "gb"):
        pairs = predicted_and_measured(measured, unit)
        assert set(pairs) == {"train", "cache", "attribute"}
        assert all(pair["predicted"] > 0 and pair["measured"] > 0 for pair in pairs.values())


def test_another_family_and_a_width_that_heads_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="no geometry twin of a llava_onevision"):
        narrow(config_of("llava-hf/llava-onevision-qwen2-0.5b-ov-hf"))
    with pytest.raises(ValueError, match="width 50 is not a multiple of 8"):
        narrow(config_of(PAPER), 50)
