"""The page "Study your own LMM" does what it says: its blocks run, its preset runs notebooks 01 to 04, its errors come.

Models are random and of the true classes, in folders, in the place of the hub's; so are the names of those that are
asked. Nothing else of the page is changed but sizes.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import families
import grounders
import models
import nbformat
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from repository import copy_repository
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from book import pages
from lmm_sae_nb.benchmarks.faulty_server import KEY, serving
from lmm_sae_nb.cache.activations import cache_activations
from lmm_sae_nb.cache.texts import cache_texts
from lmm_sae_nb.interpret.exemplars import exemplars
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.sample_checks import open_samples
from lmm_sae_nb.model.token_kinds import LAYOUTS
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE, TrainedOn
from lmm_sae_nb.score.latents import explained_latents
from lmm_sae_nb.show.latent_table import LatentTable
from lmm_sae_nb.support.images import open_images
from lmm_sae_nb.support.locks import FolderInUse, hold
from lmm_sae_nb.support.stages import require
from lmm_sae_nb.train.ready import use_ready_sae
from lmm_sae_nb.train.training import train_sae

pytestmark = pytest.mark.slow

PAGE = (pages.ROOT / "book" / "your_own_lmm.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
ERRORS = re.findall(r"^\| `(.+?)` \|", PAGE.split("## What an error means")[1], re.MULTILINE)

HERE = {  # what stands for the hub's models
    '"llava-hf/llava-onevision-qwen2-0.5b-ov-hf"': '"my/lmm"',
    'LMM.load("Qwen/Qwen2.5-VL-3B-Instruct"': 'LMM.load("my/qwen"',
    'LocalChat.load("Qwen/Qwen2.5-VL-3B-Instruct"': 'LocalChat.load("data/models/tiny-explainer"',
    '"llava-hf/llava-1.5-7b-hf"': '"my/llava"',
    '"Salesforce/instructblip-vicuna-7b"': '"my/blip"',
    '"CIDAS/clipseg-rd64-refined"': '"data/models/tiny-clipseg"',
    '"openai/clip-vit-base-patch32"': '"data/models/tiny-clip"',
}
SMALLER = {
    ", 18, ": ", 1, ",
    ", 18)": ", 1)",
    "n_latents=16384, k=64, steps=4000": "n_latents=64, k=8, steps=4, batch_tokens=512",
    "n_latents=4096, k=32, steps=1000": "n_latents=64, k=8, steps=4, batch_tokens=512",
}
PRESET = {  # the same for the preset; tiny-explainer has a question of its own, and no language model shortens
    "": {"model": "my/lmm", "layer": 1},
    "01_train_sae": {"n_latents": 64, "k": 8, "steps": 4, "batch_tokens": 512, "dead_after_tokens": 5000},
    "02_cache_activations": {"n_texts": 8, "batch_size": 4},
    "03_interpret_features": {
        "explainer": {"model": "data/models/tiny-explainer", "prompt": "what do these images have in common ?"},
        "refiner": "", "labeller": "", "n_explained": 6,
    },
    "04_score_interpretations": {
        "segmenter": "data/models/tiny-clipseg", "similarity": "data/models/tiny-clip", "random_runs": 2,
        "clip_runs": 2,
    },
}  # fmt: skip


def picture(seed: int) -> Image.Image:
    """Coarse noise, upright or not."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
        (300, 200) if seed % 2 else (200, 300)
    )


def llava():
    """llava-hf/llava-1.5-7b-hf's geometry: 24 x 24 patches of one crop."""
    words = models.tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**models.vision(336, 14)),
        text_config=LlamaConfig(**models.text(words)),
        image_token_id=words.convert_tokens_to_ids(models.IMAGE),
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=models.crop(336))
    processor = LlavaProcessor(
        image_processor=images, tokenizer=words, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=models.chat_template(),
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """The repository as a reader has it, with a folder `my/`: models, pictures, samples."""
    desk = copy_repository(tmp_path_factory.mktemp("desk"))
    (desk / "my/pictures").mkdir(parents=True)
    made = {"lmm": models.make("llava_onevision"), "qwen": models.make("qwen2_5_vl"), "llava": llava(),
            "blip": models.make("instructblip")}  # fmt: skip
    for name, parts in made.items():
        for part in parts:
            part.save_pretrained(desk / "my" / name)
    for n in range(8):
        picture(n).save(desk / f"my/pictures/{n}.png")
    (desk / "my/pictures/damaged.png").write_bytes(b"no picture")
    rows = [
        {"image": f"my/pictures/{n % 8}.png" if n % 5 else None, "question": f"what is {n} ?", "answer": f"it is {n} ."}
        for n in range(20)
    ]
    (desk / "my/samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return desk


@pytest.fixture
def at_the_desk(desk, monkeypatch):
    monkeypatch.chdir(desk)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", desk / "cache")
    monkeypatch.delitem(LAYOUTS, "llava", raising=False)
    yield desk
    LAYOUTS.pop("llava", None)


def here(code: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        code = code.replace(old, new)
    return code


# The page.


def test_every_block_is_of_a_kind_that_is_run_here():
    assert [kind for kind, _ in BLOCKS if kind != "python"] == ["yaml", "bash", "yaml"]
    text = "".join(code for kind, code in BLOCKS if kind == "python")
    assert all(old in text for old in HERE | SMALLER)


@pytest.mark.parametrize("model", ["my/lmm", "data/models/tiny-llava-next"])
def test_its_code_runs(at_the_desk, model, capsys):
    """All of it in order; with the embedded model in the other's place only what is of one's own model."""
    python = [code for kind, code in BLOCKS if kind == "python"]
    names: dict = {}
    for code in python if model == "my/lmm" else python[:3]:
        exec(compile(here(code, HERE | SMALLER | {'"my/lmm"': f'"{model}"'}), "your_own_lmm.md", "exec"), names)
    said = capsys.readouterr().out
    grids = {"my/lmm": "(27, 27)", "data/models/tiny-llava-next": "(12, 12)"}
    assert grids[model] in said
    assert names["cache"].live.any() and names["explanations"][names["by_latent"].popitem()[0]].outcome
    with Image.open("my/top.png") as top:
        assert top.size in ((300, 200), (200, 300))
    assert {"paper", "strict"} <= set(said.split())
    if model == "my/lmm":
        assert "(24, 24)\n" in said and "None " in said and said.endswith("(16, 16)\n")


@pytest.fixture(scope="module")
def mine(desk) -> subprocess.CompletedProcess:
    """Notebooks 01 to 04 run with the page's preset, by its command: another family, by parameters alone."""
    (preset, _), (command,) = ([code for kind, code in BLOCKS if kind == wanted] for wanted in ("yaml", "bash"))
    values = yaml.safe_load(preset)
    for section, changed in PRESET.items():
        (values[section] if section else values).update(changed)
    (desk / "notebooks/params/mine.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as at:
        at.chdir(desk)
        exec(compile(BLOCKS[0][1], "your_own_lmm.md", "exec"), {})
    doit = [sys.executable, "-m", "doit"]
    return subprocess.run([*doit, *command.split()[1:]], cwd=desk, env=env_of(desk), capture_output=True, text=True)


def env_of(desk: Path, **more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(desk), "HF_HUB_OFFLINE": "1"} | more


def metrics_of(*stages: str) -> dict[str, dict]:
    return {stage: json.loads(Path(f"data/artifacts/mine/{stage}/metrics.json").read_text()) for stage in stages}


def test_its_preset_runs_notebooks_01_to_04_by_its_command(at_the_desk, mine):
    assert mine.returncode == 0, mine.stdout[-3000:] + mine.stderr[-3000:]
    metrics = metrics_of("train", "cache", "interpret", "score")
    assert not Path("data/artifacts/mine/judge").exists()  # nobody was named, and there is no ground truth
    assert metrics["train"]["tokens"] > 1000 and metrics["cache"]["images"] == 8 and metrics["cache"]["skipped"] == 1
    sides = ("image_only", "text_only", "both", "undetermined")
    assert sum(metrics["cache"][f"latents_{side}"] for side in sides) == 64
    assert metrics["interpret"]["asked"] == 6
    assert not Path("data/artifacts/tiny").exists()  # nothing of Picture World is read, so none of it is rendered
    assert {"iou_paper", "iou_strict", "clip_paper", "clip_strict"} <= metrics["score"].keys()
    catalogue = LatentTable.load("mine")
    assert len(catalogue.rows) == 6
    for row in catalogue.rows.values():
        assert {"responds to", "text tokens"} <= row.keys() and ("iou_strict" in row) == (row["outcome"] == "explained")
    for page in Path("build/executed").glob("*.ipynb"):
        said = json.dumps([cell.get("outputs") for cell in nbformat.read(page, 4).cells])
        assert "Warning" not in said, page.name


def test_the_preset_of_a_ready_sae_names_parameters_of_notebook_01(at_the_desk):
    whole, ready = (yaml.safe_load(code) for kind, code in BLOCKS if kind == "yaml")
    Path("notebooks/params/ready.yaml").write_text(yaml.safe_dump(whole | ready))
    found = pages.preset(Path("notebooks/params/ready.yaml"))["01_train_sae"]
    assert found["layer"] == 24 and found["ready"] == ready["01_train_sae"]["ready"] | {"revision": "", "k": 0}


def started(source: str, env: dict[str, str], **values: object) -> subprocess.Popen:
    """A notebook as a script, with other parameters."""
    text = Path("notebooks", source).read_text()
    for name, value in values.items():
        old = rf"^({name}: [^=\n]+?) = (\{{\n.*?^\}}|[^\n]*)$"  # a dictionary takes several lines
        text, changed = re.subn(old, rf"\1 = {value!r}", text, flags=re.MULTILINE | re.DOTALL)
        assert changed == 1, name
    script = Path("notebooks", f"here_{source}")
    script.write_text(text)
    return subprocess.Popen([sys.executable, script], env=env | {"MPLBACKEND": "agg"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def test_neither_a_kill_nor_a_judge_out_of_reach_costs_an_answer_or_a_score(at_the_desk, mine):
    """Notebooks 03 and 04 on photographs; who is asked is behind an endpoint, which takes all questions but one; boxes
    and masks are by true classes."""
    for name in ("grounding_dino", "sam", "clip"):
        grounders.save(getattr(grounders, name), f"my/{name}")
    ours, wrong = env_of(at_the_desk, THE_KEY=KEY), env_of(at_the_desk, THE_KEY="sk-mistyped")
    victims: list[subprocess.Popen] = []
    too_large: list[tuple[str, ...]] = []  # the images of the question that is refused

    def answer(request):
        if len(server.requests) >= 7:
            for victim in victims:
                victim.kill()
        if request.text.startswith("Which kind"):
            return "It is an object."
        if request.text.startswith("Below"):
            return request.text.split()[-1]
        if "Is that so?" in request.text:
            return "yes"
        with server.lock:
            if len(server.requests) > 2 and not too_large:
                too_large.append(request.images)
        return 413 if request.images in too_large else f"[E]: thing{sum(map(ord, request.images[0])) % 5}"

    with serving(answer, key=KEY) as server:
        big, record = f"big@{server.url}", Path("data/artifacts/mine/interpret/replies.jsonl")
        common = dict(run="mine", model="my/lmm", layer=1, images="my/pictures", concepts="")
        endpoint = {"key_variable": "THE_KEY", "concurrency": 2, "timeout": 120.0}
        explainer = {"model": big, "prompt": "In common?", "tag": "[E]:", "least_confidence": 0.0}
        how = common | dict(explainer=explainer, refiner=big, labeller=big, endpoint=endpoint, n_explained=12)
        record.unlink()
        victims.append(started("03_interpret_features.py", ours, **how))
        victims[0].communicate()
        assert victims.pop().returncode == -signal.SIGKILL and 0 < len(record.read_text().splitlines()) <= 7
        done = started("03_interpret_features.py", ours, **how)
        said = done.communicate()[0]
        assert done.returncode == 0, said[-3000:]
        keys = [row["key"] for row in map(json.loads, record.read_text().splitlines()) if row["text"] is not None]
        assert len(set(keys)) == len(keys)
        taken = [request for request in server.requests if request.images not in too_large]
        assert len(taken) - len(keys) <= 2  # those under way at the kill
        found = metrics_of("interpret")["interpret"]
        assert (found["asked"], found["replies_failed"]) == (12, 0) and found["explained"] == 12 - found["failed"] < 12

        how = common | dict(detector="my/grounding_dino", segmenter="my/sam", similarity="my/clip", random_runs=2,
                            clip_runs=2, judge=big, endpoint=endpoint)  # fmt: skip
        refused = started("04_score_interpretations.py", wrong, **how)
        assert "it refuses the key in THE_KEY" in refused.communicate()[0] and refused.returncode == 1
        scored = Path("data/artifacts/mine/score/manifest.json").stat().st_mtime_ns
        assert not Path("data/artifacts/mine/judge/manifest.json").exists()
        judged = started("04_score_interpretations.py", ours, **how)
        said = judged.communicate()[0]
        assert judged.returncode == 0, said[-3000:]
    assert Path("data/artifacts/mine/score/manifest.json").stat().st_mtime_ns == scored
    found = metrics_of("score", "judge")
    assert {"iou_paper", "iou_strict", "clip_paper"} <= found["score"].keys() and found["judge"]["judged"] == 1
    rows, explanations = LatentTable.load("mine").rows, Path("data/artifacts/mine/interpret/explanations.json")
    told = json.loads(explanations.read_text())
    named = [number for number, row in told.items() if row["outcome"] == "explained"]
    assert {int(number) for number in named} == {number for number, row in rows.items() if row.get("judged") == "yes"}
    assert all("iou_strict" in rows[int(number)] for number in named)
    other = named[0]
    told[other]["concept"] = "something else"  # explained anew, scored and judged not yet
    explanations.write_text(json.dumps(told))
    assert not {"judged", "iou_strict"} & LatentTable.load("mine").rows[int(other)].keys()
    written = [file for file in Path("data/artifacts/mine").rglob("*") if file.is_file()]
    assert KEY not in said and not any(KEY.encode() in file.read_bytes() for file in written)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "smolvlm", "llava_next"])
def test_other_families_go_the_same_way(family, tmp_path):
    """Trained, cached, shown: by the calls alone; of Qwen2.5-VL's images, a size is said."""
    model, processor = models.make(family)
    if family in ("idefics3", "smolvlm"):
        processor.image_processor.size = {"longest_edge": 512}  # one tile
    lmm = LMM(model, processor, image_size=(224, 112) if family == "qwen2_5_vl" else None)
    pictures = [picture(n) for n in range(4)]
    samples = [{"image": image, "question": "what is it ?", "answer": "that"} for image in pictures]
    settings = dict(n_latents=32, k=4, steps=2, batch_tokens=64, batch_samples=2)
    sae = train_sae(lmm, samples, 1, **settings, folder=tmp_path / "sae").sae
    cache = cache_activations(SAEInPlace(lmm, sae, 1), pictures, n_top=3, folder=tmp_path / "cache")
    assert cache.grid == lmm.grid and cache.live.any()
    first = exemplars(cache, pictures, int(cache.top_means[:, 0].argmax()))[0]
    assert first.activation.shape == lmm.grid and first.masked.size == first.image.size
    texts = cache_texts(SAEInPlace(lmm, sae, 1), samples, folder=tmp_path / "cache")
    assert texts.tokens["base"] == 4 * lmm.grid[0] * lmm.grid[1] and texts.tokens["text"]


# Its errors.


def poor(family: str = "picture_world", **changes):
    model, processor = models.make(family)
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model, processor


def extended():
    model, processor = models.make("picture_world")
    processor.tokenizer.add_tokens(["novel"])
    return LMM(model, processor).prompt("A novel one.")


def templated(template):
    model, processor = models.make("picture_world")
    processor.chat_template = processor.tokenizer.chat_template = template
    return LMM(model, processor).prompt("Hm", answers="yes")


def misfit():
    model, processor = models.make("instructblip")
    processor.num_query_tokens = 16
    return LMM(model, processor).prompt("Hm", picture(0))


def headless():
    model, processor = models.make("picture_world")
    del model.model.language_model.layers
    return LMM(model, processor)


def refused(make) -> LMM:
    return LMM(make(), models.make("picture_world")[1])


def small() -> LMM:
    return LMM(*models.make("picture_world"))


def an_sae(layer: int = 0, seed: int = 0, width: int = models.WIDTH) -> TopKSAE:
    sae = TopKSAE(width, 8, 2)
    sae.trained_on = TrainedOn(layer, LMM(*models.make("picture_world", seed)).fingerprint(layer))
    return sae


def before_a_norm() -> SAEInPlace:
    """Gemma normalises what an MLP returns; sparsify names the MLP itself."""
    lmm = LMM(*families.make("gemma3"))
    sae = TopKSAE(lmm.width, 8, 2)
    sae.hook_name = "layers.0.mlp"
    return SAEInPlace(lmm, sae, "decoder.0.mlp")


def called(hook: str) -> TopKSAE:
    sae = TopKSAE(models.WIDTH, 8, 2)
    sae.hook_name = hook
    return sae


def cached(lmm: LMM, sae: TopKSAE, images=None, layer: int = 0):
    return cache_activations(SAEInPlace(lmm, sae, layer), images or [picture(0)], folder="my/nothing")


def text_only():
    LlamaForCausalLM(LlamaConfig(**models.text(models.tokenizer()))).save_pretrained("my/llama")
    return LMM.load("my/llama")


def damaged():
    pictures = open_images("my/pictures")
    return pictures[len(pictures) - 1]


def of_other_pictures():
    lmm, pictures = small(), open_images("my/pictures")
    cache = cached(lmm, TopKSAE(lmm.width, 8, 2), pictures.first(2))
    return exemplars(cache, pictures, 0)


def interrupted():
    settings = dict(n_latents=16, k=2, steps=4, batch_tokens=64, batch_samples=1, folder="my/half", log_every=1)
    samples = [{"image": None, "question": "what is it ?", "answer": "that"}] * 4

    def stop(history):
        if len(history) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sae(small(), samples, 0, **settings, checkpoint_minutes=0, on_log=stop)
    return train_sae(small(), samples, 0, **settings | {"k": 3})


def damaged_checkpoint():
    with contextlib.suppress(ValueError):
        interrupted()
    for file in Path("my/half/checkpoint").rglob("state.json"):
        file.write_bytes(b"")
    return interrupted()


def in_splits():
    datasets.DatasetDict(train=datasets.Dataset.from_list([ROW])).save_to_disk("my/splits")
    return open_samples("my/splits")


def flipped():
    TopKSAE(4, 8, 2).save("my/flipped")
    path = Path("my/flipped/sae.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    return TopKSAE.load("my/flipped")


def diverged():
    sae = TopKSAE(4, 8, 2)
    sae.W_enc.data[3] = torch.nan
    return sae.save("my/diverged")


def twice():
    with hold("my/twice"):
        return train_sae(small(), [ROW], 0, n_latents=8, k=2, steps=1, folder="my/twice")


def broken():
    lmm = small()
    next(lmm.layer(0).parameters()).fill_(torch.nan)
    return cached(lmm, TopKSAE(lmm.width, 8, 2))


def misspelt():
    Path("notebooks/params/typo.yaml").write_text("stpes: 3\n")
    try:
        pages.preset(Path("notebooks/params/typo.yaml"))
    finally:
        Path("notebooks/params/typo.yaml").unlink()


ROW = {"image": None, "question": "what is it ?", "answer": "that"}
RAISED = {
    "no layer …: … has layers 0 to …, 0-based": lambda: small().layer(24),
    "… takes no images and text, as far as transformers knows": text_only,
    "… has no image_token_id in its config": lambda: LMM(*poor(image_token_id=None)),
    "… reads images by cross-attention": lambda: refused(families.mllama),
    "… has an encoder and a decoder": lambda: refused(families.florence2),
    "how a … lays out its image tokens is not known; register a function": lambda: LMM(*poor(model_type="brand_new")),
    "… has no plain stack of layers; choose a decoder-only language model": headless,
    "… does not process both text and images": lambda: LMM(poor()[0], models.tokenizer()),
    "the processor does not fit …: it writes images as token …, the model reads them as token …": lambda: LMM(
        *poor(image_token_id=3)
    ),
    "the processor does not fit …: it writes token …, the model knows tokens 0 to …": extended,
    "the processor does not fit the model: for … it wrote … image tokens, the model expects …": misfit,
    "sample … has no image beside samples with one; a Q-Former takes no text without an image": lambda: LMM(
        *models.make("instructblip")
    ).prompt(["Hm", "So"], [picture(0), None]),
    "… has no chat template; set lmm.processor.chat_template to that of its training": lambda: templated(None),
    "the chat template of … writes no answer after …": lambda: templated("{{ messages[0].content[0].text }}"),
    "… holds the image token, which the chat template writes; leave it out": lambda: small().prompt("see <image>"),
    "… px: it has no pixels": lambda: small().prompt("", Image.new("RGB", (0, 9))),
    "… is not a readable image (…)": damaged,
    "… does not fit the model's processor (…)": lambda: LMM(*models.make("qwen2_5_vl")).prompt(
        "", Image.new("RGB", (400, 1))
    ),
    "the cache … is of other pictures than those of …": of_other_pictures,
    "… is not a PIL image": lambda: small().prompt("", np.zeros((9, 9, 3))),
    "no such kind of token: …; the kinds are …": lambda: small().prompt("Hm").mask("image"),
    "no sample has a token of the chosen kinds; choose others": lambda: train_sae(
        small(), [ROW], 0, n_latents=8, k=2, steps=1, kinds=["tiles"], folder="my/none"
    ),
    "the SAE reads width …, the layer's hidden states have width …": lambda: cached(small(), TopKSAE(9, 8, 2)),
    "no hookpoint '…': … has layers 0 to …": lambda: small().layer("decoder.1.mpl"),
    "… has no states of the tokens …; give kinds: …": lambda: train_sae(
        small(), [ROW], "projector", steps=1, folder="my/other"
    ),
    "… has no state for …": lambda: LMM(*models.make("qwen2_5_vl")).width_at("vision.0"),
    "the SAE reads '…', that is the output of layer …, not of layer …": lambda: cached(small(), called("layers.2")),
    "the SAE reads '…', what the module returns; this family normalises it …": before_a_norm,
    "the SAE reads '…', which is not the output of layer …": lambda: cached(small(), called("blocks.0.attn.hook_z")),
    "there is no SAE at …": lambda: use_ready_sae(small(), 0, sae="data/my/sae", folder="my/none"),
    "the SAE was trained on layer …, not …": lambda: cached(small(), an_sae(layer=1)),
    "the SAE was trained on another model than …": lambda: cached(small(), an_sae(seed=7)),
    "… holds a checkpoint of another run": interrupted,
    "the samples have no column …": lambda: train_sae(
        small(), datasets.Dataset.from_list([{"image": None, "text": "what"}]), 0, steps=1, folder="my/none"
    ),
    "sample … (rows count from 0): …": lambda: train_sae(
        small(), [ROW, ROW | {"answer": None}], 0, steps=1, folder="my/none"
    ),
    "… has the splits …; give the folder of one": in_splits,
    "the checkpoint is damaged: …": damaged_checkpoint,
    "… is damaged: its checksum is not that of what was written": flipped,
    "… holds NaN or infinity at latents …": diverged,
    "another run holds … since …": twice,
    "… is no folder; give that of a data set …": lambda: open_samples("my/trian"),
    "Directory … not found": lambda: datasets.load_from_disk("my/trian"),
    "images have … base tokens; bring them to one size": lambda: cached(
        LMM(*models.make("qwen2_5_vl")), TopKSAE(models.WIDTH, 8, 2), [picture(0), picture(0).resize((50, 900))]
    ),
    "this cache is of a model without a patch grid": lambda: cached(
        LMM(*models.make("instructblip")), TopKSAE(models.WIDTH, 8, 2)
    ).patch_map(0, 0),
    "… hold NaN or infinity; load the model in float32 or bfloat16": broken,
    "… have an explanation that can be scored, scores need two": lambda: explained_latents({"3": {"concept": "a dog"}}),
    "… is no folder; give a folder of images": lambda: open_images("my/pictuers"),
    "… holds no image": lambda: open_images("my/lmm"),
    "the data set has columns …, none is …": lambda: open_images(datasets.Dataset.from_dict({"picture": [1]})),
    "no model folder …; give another one, or a name on the hub": lambda: LMM.load(Path("my/llm")),
    "no notebook has a parameter …; did you mean …?": misspelt,
    "… is missing; run notebooks/… with run=… first": lambda: require("new", "train", "sae.safetensors"),
}


def test_every_error_of_the_page_is_raised_here():
    assert list(RAISED) == ERRORS


@pytest.mark.usefixtures("unchecked")  # some of these errors are about arguments of a wrong type
@pytest.mark.parametrize("message", ERRORS)
def test_its_errors_come_as_quoted(at_the_desk, message):
    told = re.escape(message).replace("…", ".+")
    with pytest.raises((ValueError, FileNotFoundError, FolderInUse), match=told):
        RAISED[message]()
