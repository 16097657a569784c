# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5. Compare layers, models and sizes
#
# **The question.** Sections 3.1, 3.3 and 3.4: do latents mean something at every depth, in another architecture, and in a
# dictionary of another size; and is deeper better?
#
# **You will learn** how SAEs of several layers and sizes are trained in one pass over the model, what changes with depth, why
# a model without patches has no IoU, and where more latents stop paying.
#
# **Reads** the models, training samples, held-out samples, images. **Writes** `compare/`: every SAE with its cache, what its
# latents were named, their scores, and `metrics.json`.
#
# | preset | layers | other models | sizes | time |
# |---|---|---|---|---|
# | `tiny` | 3 of 8 | Picture World InstructBLIP, shipped | 4, and 3 values of k | 4 minutes, 2 cores |
# | `paper` | 3 of 32 | InstructBLIP-Vicuna-7B | 2^15 to 2^18 | GPUs |

# %% tags=["parameters"]
run: str = "tiny"  # results go to data/artifacts/<run>/
model: str = "data/models/tiny-llava-next"  # a folder of this project, or a name on the hub
layers: list = [1, 3, 6]  # 0-based: a low, a middle and a high one; the paper's 8th, 25th and 32nd are 7, 24, 31
others: list = ["data/models/tiny-instructblip"]  # further models
other_layer: int = 3  # of each of them
dataset: str = "data/artifacts/tiny/world/train"  # samples with image, question and answer
heldout: str = "data/artifacts/tiny/world/heldout"  # samples that no training has seen
images: str = "data/artifacts/tiny/world/cache"  # a data set with an image column, or a folder of images
concepts: str = "data/artifacts/tiny/world/concepts.json"  # names of the ground truth's concepts; "": there is none
n_latents: int = 512  # of the SAE of every layer and model
k: int = 16  # active latents a token; the paper: 256 of a width of 4,096, a sixteenth
sizes: list = [256, 512, 1024, 4096]  # latents, on the middle layer; the paper's 2^17 are 32 times the width, here 8,192
ks: list = [8, 16, 32]  # k, on the middle layer
steps: int = 240  # optimiser steps, of all SAEs at once
batch_tokens: int = 512  # tokens a step
other_steps: int = 160  # for the SAEs of the other models
other_batch_tokens: int = 256  # a sample of theirs has few tokens
lr: float = 2e-3  # highest learning rate
dead_after_tokens: int = 50_000  # a latent silent for so long counts as dead
evaluated: int = 32  # held-out samples
cached_images: int = 350  # the first so many of the images
explainer: str = "data/models/tiny-explainer"  # a folder, a name on the hub, or name@http://host:port/v1, an endpoint
prompt: str = "what do these images have in common ?"  # {images} says where they stand; they come first without it
tag: str = ""  # what the explanation stands behind in the reply; "": all of it
refiner: str = ""  # a language model that shortens explanations; "": the vocabulary of `concepts`
labeller: str = ""  # a language model that gives a concept its kind; "": the vocabulary of `concepts`
key_variable: str = ""  # the environment variable with the endpoints' key; "": they want none
concurrency: int = 8  # questions under way at once, to an endpoint
timeout: float = 120.0  # seconds that an endpoint's answer may take
max_new_tokens: int = 16  # of an explanation
least_confidence: float = 0.0  # a lower probability of the explainer counts as a refusal; 0: every explanation stands
n_explained: int = 100  # latents of each layer and model that are explained; so many are asked about as that takes
n_swept: int = 12  # the same for the SAEs of other sizes
n_top: int = 5  # exemplars shown for each
threshold: float = 0.25  # a patch is visible above this share of its image's highest activation
segmenter: str = ""  # finds a concept by its name, where there is no ground truth
detector: str = ""  # finds boxes for the segmenter, which then is a SAM
similarity: str = "data/models/tiny-clip"  # image-text similarity
random_runs: int = 10  # draws of n_top random images, IoU
clip_runs: int = 30  # the same, CLIP score
n_steered: int = 20  # latents named for an object that are clamped, a layer
dose: float = 8.0  # of the latent's own maximum
steered_kinds: list = ["base", "tiles", "newline"]  # token kinds that are clamped
question: str = "What do you see in this image?"  # about a pure white image
blank_size: int = 192  # pixels a side of the white image
decisions: int = 8  # held-out decisions whose attribution is ablated, a layer
pairs: int = 24  # active (token, latent) pairs of each
seed: int = 0  # of everything random

# %% tags=["remove-cell"]
import time
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import load_from_disk
from IPython.display import display
from PIL import Image
from pydantic import TypeAdapter
from torch.utils.data import Subset

from lmm_sae_nb.attribute import agreement as attribute_agreement
from lmm_sae_nb.attribute import attribution
from lmm_sae_nb.attribute.agreement import agreement, random_pairs
from lmm_sae_nb.attribute.attribution import exact, greedy_decision, linear
from lmm_sae_nb.cache import activations, latent_cache
from lmm_sae_nb.cache.activations import cache_several
from lmm_sae_nb.chat.recorded import Recorded, open_chat
from lmm_sae_nb.interpret import explain, explainers
from lmm_sae_nb.interpret.exemplars import ExemplarsByLatent, exemplars
from lmm_sae_nb.interpret.explain import as_rows, explain_enough, explain_latents
from lmm_sae_nb.interpret.explainers import Vocabulary, mentions
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.samples import pictured
from lmm_sae_nb.model.token_kinds import NoPatchGrid
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.score.latents import explained_latents, score_latents
from lmm_sae_nb.score.masks import exemplar_maps
from lmm_sae_nb.score.scores import Scores
from lmm_sae_nb.score.segmenters import open_segmenters
from lmm_sae_nb.score.similarity import ImageTextSimilarity
from lmm_sae_nb.score.tables import kind_table
from lmm_sae_nb.show import plots
from lmm_sae_nb.steer import steering
from lmm_sae_nb.steer.steering import Edit, Scope, answers
from lmm_sae_nb.support import intervals
from lmm_sae_nb.support.files import project_root, read_json, write_json
from lmm_sae_nb.support.images import Remembered, open_images
from lmm_sae_nb.support.intervals import Mean, bounds, mean_interval
from lmm_sae_nb.support.stages import Stage, read_typed
from lmm_sae_nb.train import evaluate, training
from lmm_sae_nb.train.evaluate import evaluate_saes
from lmm_sae_nb.train.training import Recipe, train_saes
from lmm_sae_nb.truth import accuracy, label_maps
from lmm_sae_nb.truth.label_maps import TrueMasks

root = project_root()
device = "cuda" if torch.cuda.is_available() else "cpu"
plots.style()


def named(path: str) -> str | Path:
    return root / path if (root / path).is_dir() else path


# %%
lmms = {Path(name).name: LMM.load(named(name)) for name in (model, *others)}
first, *rest = lmms
lmm, middle = lmms[first], layers[len(layers) // 2]
samples, unseen = load_from_disk(root / dataset), load_from_disk(root / heldout)
pictures = open_images(root / images)
pictures = Subset(pictures, range(min(cached_images, len(pictures))))
truth = TrueMasks(load_from_disk(root / images), root / concepts) if concepts else None
for name, its in lmms.items():
    print(f"{name}: {type(its.model).__name__}, {its.n_layers} layers of width {its.width}, base patches {its.grid}")

# %% [markdown]
# ## Which layers
#
# The paper takes the 8th, 25th and 32nd of 32 layers. What image tokens hold behind the last layer is read by nothing: the
# answer is read off the last token, and no layer follows that could look back at the patches. So the states of image tokens
# there may mean anything, a clamp on them does nothing, and the deepest layer here is the last but one. To see it: zeros in
# place of all image tokens, behind each layer.

# %%
row = next(row for row in unseen if row["image"] is not None)
asked_about = lmm.prompt(row["question"], row["image"])
pixels = asked_about.mask("base", "tiles", "newline")[..., None].to(lmm.device)
with torch.no_grad():
    clean = lmm.last_logits(asked_about)
    for n in sorted({*layers, lmm.n_layers - 2, lmm.n_layers - 1}):
        with lmm.spliced(n, lambda hidden: hidden.masked_fill(pixels, 0)):
            print(f"behind layer {n}: the answer's logits change by up to {float((lmm.last_logits(asked_about) - clean).abs().max()):.3f}")

# %% [markdown]
# ## One pass over each model
#
# All SAEs of a model learn from the same tokens: the model runs once, the states of the layers lie side by side in one buffer,
# and each SAE gets the bits that it would get alone (tested). The same holds for the cache. Besides the layers there are SAEs
# of other sizes on the middle one. Stop it, and it goes on where it was. The other models learn from samples with an image: a
# Q-Former cannot do without.

# %%
stage, code = Stage(run, "compare"), [attribution, explainers, activations, evaluate, explain, attribute_agreement, accuracy, steering, training]
params = dict(
    model=model, layers=layers, others=others, other_layer=other_layer, dataset=dataset, heldout=heldout, images=images,
    concepts=concepts, n_latents=n_latents, k=k, sizes=sizes, ks=ks, steps=steps, batch_tokens=batch_tokens,
    other_steps=other_steps, other_batch_tokens=other_batch_tokens, lr=lr, dead_after_tokens=dead_after_tokens, evaluated=evaluated, cached_images=cached_images, explainer=explainer, prompt=prompt,
    tag=tag, refiner=refiner, labeller=labeller, max_new_tokens=max_new_tokens, least_confidence=least_confidence, n_explained=n_explained, n_swept=n_swept, n_top=n_top,
    threshold=threshold, segmenter=segmenter, detector=detector, similarity=similarity, random_runs=random_runs, clip_runs=clip_runs,
    n_steered=n_steered, dose=dose, steered_kinds=steered_kinds, question=question, blank_size=blank_size, decisions=decisions,
    pairs=pairs, seed=seed,
)  # fmt: skip
read = (model, *others, dataset, heldout, images, concepts, explainer, refiner, labeller, segmenter, detector, similarity)
inputs = [root / name for name in dict.fromkeys(read) if name and (root / name).exists()]
current, started, metrics = stage.is_current(params, inputs, code), time.monotonic(), {}
of_layers = {f"layer_{n}": Recipe(n, n_latents, k, lr) for n in layers}
swept = {f"n_{n}": Recipe(middle, n, k, lr) for n in sizes if n != n_latents} | {f"k_{n}": Recipe(middle, n_latents, n, lr) for n in ks if n != k}
plan = {first: of_layers | swept} | {name: {name: Recipe(other_layer, n_latents, k, lr)} for name in rest}

# %%
studied = {}
for name, recipes in plan.items() if not current else ():
    data, length, tokens = (samples, steps, batch_tokens) if name == first else (pictured(samples), other_steps, other_batch_tokens)
    how = dict(steps=length, batch_tokens=tokens, dead_after_tokens=dead_after_tokens, seed=seed)
    trained = train_saes(lmms[name], data, recipes, folder=stage.path(name), **how)
    saes = {each: (its.sae.requires_grad_(False), recipes[each].layer) for each, its in trained.items()}
    caches = cache_several(lmms[name], saes, pictures, n_top=n_top, folder=stage.path(name))
    studied |= {each: (lmms[name], *saes[each], caches[each]) for each in saes}

# %% [markdown]
# ## Explained and scored
#
# The loop over layers and models, with the calls of notebooks 03 and 04. Live latents are asked about in random order until
# enough are explained. A model without a patch grid has no activation maps: its exemplars are whole images, ranked by the mean
# over its query tokens, and its only score is CLIP's on whole images.

# %%
vocabulary, remembered = Vocabulary(root / concepts) if concepts else None, Remembered(pictures)
if not current:
    open_as = partial(open_chat, key_variable=key_variable, concurrency=concurrency, timeout=timeout, max_new_tokens=max_new_tokens)
    talk = {who: Recorded(open_as(who, confidence=who == explainer and least_confidence > 0), stage.path("replies.jsonl")) for who in {explainer, refiner, labeller} - {""}}
    refine = explainers.refiner(talk[refiner]) if refiner else vocabulary.refine if vocabulary else explainers.no_refiner
    label = explainers.labeller(talk[labeller]) if labeller else vocabulary.label if vocabulary else explainers.no_labeller
    ask = partial(explain_latents, explain=explainers.explainer(talk[explainer], prompt, tag=tag, least_confidence=least_confidence), refine=refine, label=label)
    segmenters = open_segmenters(truth, segmenter, detector, remembered, device)
    all_pairs = ImageTextSimilarity.load(named(similarity), device=device).all_pairs

# %%
for name in () if current else (*of_layers, *rest):
    its, sae, layer, found_in = studied[name]
    look = ExemplarsByLatent(found_in, remembered, n_top=n_top, threshold=threshold)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(found_in.live)).tolist()
    rows = as_rows(explain_enough(order, look, ask, n_explained, 16))
    explained = explained_latents(rows, truth, seed=seed)
    how = dict(threshold=threshold, n_top=n_top, random_runs=random_runs, clip_runs=clip_runs, seed=seed)
    scores = score_latents(SAEInPlace(its, sae, layer), remembered, look, explained, segmenters, all_pairs, **how)
    write_json(stage.path(f"{name}.json"), {"explanations": rows, "scores": scores.rows()})
    write_json(stage.path(f"{name}_scores.json"), TypeAdapter(Scores).dump_python(scores, mode="json"))

# %% [markdown]
# And what else changes with depth: what the SAE keeps (on held-out samples), what it costs the model, whether a latent named for
# an object, clamped at the patches of a white image, makes the answer name that object (notebook 06), and how the linear
# attribution ranks random active pairs against ablating them (notebook 07). Names are right if the exemplars show that very
# concept.

# %%
if not current:
    few, white = unseen.select(range(evaluated)), Image.new("RGB", (blank_size, blank_size), "white")
    cases = [greedy_decision(lmm, row["question"], row["image"]) for row in islice((row for row in unseen if row["image"] is not None), decisions)]
    kept = evaluate_saes({name: SAEInPlace(*studied[name][:3]) for name in of_layers}, few)
    kept |= evaluate_saes({name: SAEInPlace(*studied[name][:3]) for name in swept}, few, losses=False)
    patch_truth, generator = label_maps.PatchTruth(truth, lmm.grid) if truth and lmm.grid else None, torch.Generator().manual_seed(seed)
for name in () if current else (*of_layers, *swept):
    found_in = studied[name][3]
    look = ExemplarsByLatent(found_in, remembered, n_top=n_top, threshold=threshold)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(found_in.live)).tolist()
    rows = read_json(stage.path(f"{name}.json"))["explanations"] if name in of_layers else as_rows(explain_enough(order, look, ask, n_swept, 16))
    told = {n: row for n, row in rows.items() if row["outcome"] == "explained"}
    right = accuracy.judged(accuracy.with_truth(told, look, patch_truth)) if patch_truth else {}
    quality = kept[name] | accuracy.counted(rows) | right
    wanted = ("fvu", "dead_fraction", "loss_recovered", "explained_fraction", "concept_accuracy")
    metrics |= {f"{quantity}_{name}{end}": quality[quantity + end] for quantity in wanted for end in ("", "_low", "_high") if quantity + end in quality}

# %%
for name in () if current else of_layers:
    _, sae, layer, found_in = studied[name]
    scores = read_json(stage.path(f"{name}.json"))["scores"]
    objects = np.random.default_rng(seed).permutation([n for n, row in scores.items() if row["kind"] == "object"]).tolist()[:n_steered]
    settings = [[Edit(int(n), dose * float(found_in.max[int(n)]))] for n in objects]
    said = answers(SAEInPlace(lmm, sae, layer), question, white, settings, Scope(tuple(steered_kinds)), batch=20, max_new_tokens=24)
    metrics |= bounds(f"steered_{name}", intervals.proportion([mentions(answer, scores[n]["concept"]) for n, answer in zip(objects, said, strict=True)])) if objects else {}
    rho = []
    for case in cases:
        one = linear(SAEInPlace(lmm, sae, layer), case)
        some = random_pairs(one, pairs, generator)
        rho.append(agreement(exact(SAEInPlace(lmm, sae, layer), case, some), one.values).spearman)
    metrics |= bounds(f"spearman_{name}", mean_interval(rho)) if len(rho) > 1 else {}

# %%
scored = {name: read_json(stage.path(f"{name}.json")) for name in (*of_layers, *rest)}
all_scores = {name: read_typed(stage.path(f"{name}_scores.json"), Scores) for name in scored}
columns = {name: list(map(str, its.columns)) for name, its in all_scores.items()}
totals = {
    name: {str(column): kind_table(its, column, seed)["total"] for column in its.columns} for name, its in all_scores.items()
}  # fmt: skip
chance = {name: {column: row.random or row.area for column, row in rows.items()} for name, rows in totals.items()}
if not current:
    metrics |= {k: v for name, rows in totals.items() for column, row in rows.items() for k, v in row.metrics(f"{column}_{name}").items()}
    metrics |= {f"{column}_{name}_above_random": int(row.score.low > chance[name][column].high) for name, rows in totals.items() for column, row in rows.items()}
    metrics |= {f"latents_{name}": len(its["scores"]) for name, its in scored.items()}
    low, high = (scored[name]["scores"].values() for name in (f"layer_{layers[0]}", f"layer_{layers[-1]}"))
    for column in columns[f"layer_{layers[0]}"]:
        metrics |= bounds(f"{column}_rise", intervals.difference_interval([row[column] for row in low], [row[column] for row in high], seed=seed))
    metrics["replies_failed"] = sum(chat.failed for chat in talk.values())  # the next run asks for them again
    stage.finish(params, inputs, {"layers": len(layers), "architectures": len(lmms)} | metrics, time.monotonic() - started, code)
metrics = read_json(stage.path("metrics.json"))


def cell(name: str) -> Mean | float | None:
    return Mean(*(metrics[name + end] for end in ("", "_low", "_high"))) if f"{name}_low" in metrics else metrics.get(name)


# %% [markdown]
# ## Table 3: layers
#
# > "Our results consistently show a significant improvement compared to random baselines … as layer depth increases, both IOU
# > and Clip-Score improve."
#
# Means over explained latents with 99 % intervals. Chance in the `paper` mode is random images, as the paper's; the strict CLIP
# score, of the highlighted region, has the region of the same area elsewhere (`strict` IoU has both).

# %%
quantities = {"IoU, paper": "iou_paper", "IoU, strict": "iou_strict", "CLIP, paper": "clip_paper", "CLIP, strict": "clip_strict"}
published = {"the paper, 8th of 32": (0.30, 22.82), "the paper, 25th": (0.31, 24.92), "the paper, 32nd": (0.40, 26.55)}
ours = [
    {"SAE": f"{first}, layer {n}", "latents": metrics[f"latents_layer_{n}"]}
    | {title + ("" if what == "top" else ", chance"): totals[f"layer_{n}"][column].score if what == "top" else chance[f"layer_{n}"][column]
       for title, column in quantities.items() for what in ("top", "chance")}
    for n in layers
]  # fmt: skip
theirs = [{"SAE": title, "latents": 100, "IoU, paper": iou, "IoU, paper, chance": 0.005, "CLIP, paper": cs, "CLIP, paper, chance": 18.2} for title, (iou, cs) in published.items()]
display(plots.table(ours + theirs, "Table 3"))
by_score = {
    title: {f"layer {n}": {"own images": totals[f"layer_{n}"][column].score, "chance": chance[f"layer_{n}"][column]} for n in layers}
    for title, column in quantities.items()
}  # fmt: skip
# %% mystnb={"figure": {"caption": "IoU by layer, with 99 % intervals, on the latents' own images and by chance.", "name": "fig-layers-iou"}}
plots.mean_panels({title: rows for title, rows in by_score.items() if title.startswith("IoU")});
# %% mystnb={"figure": {"caption": "CLIP score by layer, likewise.", "name": "fig-layers-clip"}}
plots.mean_panels({title: rows for title, rows in by_score.items() if title.startswith("CLIP")});
# %%
for title, column in quantities.items():
    if f"{column}_rise" in metrics:
        verdict = "rises" if metrics[f"{column}_rise_low"] > 0 else "falls" if metrics[f"{column}_rise_high"] < 0 else "neither rises nor falls beyond its interval"
        print(f"{title:12s} from layer {layers[0]} to {layers[-1]}: {cell(f'{column}_rise')}, {verdict}")

# %% [markdown]
# ## What concepts do on their way through the depth

# %% mystnb={"figure": {"caption": "Kinds of concept among the explained latents, by layer.", "name": "fig-kinds"}}
kinds = {name: Counter(row["kind"] for row in scored[name]["scores"].values()) for name in of_layers}
plots.stacked({name.replace("_", " "): {kind: count / its.total() for kind, count in sorted(its.items())} for name, its in kinds.items()}, "share of explained latents");
# %%
shown = {"FVU": "fvu", "dead latents": "dead_fraction", "loss recovered": "loss_recovered", "explained": "explained_fraction",
         "names right": "concept_accuracy", "steered answer names it": "steered", "linear against exact": "spearman"}  # fmt: skip
plots.table([{"layer": n} | {title: cell(f"{quantity}_layer_{n}") for title, quantity in shown.items()} for n in layers])
# %%
by_layer = {name: {row["concept"]: n for n, row in scored[name]["scores"].items()} for name in of_layers}
everywhere = sorted(set.intersection(*map(set, by_layer.values())))
print(f"{len(everywhere)} concepts are named at every layer: {', '.join(everywhere)}")
# %% mystnb={"figure": {"caption": "Two concepts that are named at every layer, from low to high: the latents' images with their activation, and masked.", "name": "fig-depth"}}
caches = {name: latent_cache.LatentCache.load(stage.path(first) / name) for name in of_layers}
strips = [(f"{name.replace('_', ' ')}, latent {by_layer[name][concept]}: {concept}", exemplars(caches[name], pictures, int(by_layer[name][concept]), n_top=n_top, threshold=threshold))
          for concept in everywhere[:: max(1, len(everywhere) // 2)][:2] for name in of_layers]  # fmt: skip
plots.exemplar_strip(strips);

# %% [markdown]
# ## Table 4: another architecture
#
# > "Since BLIP image tokens are limited to only 32 tokens, we evaluate only the Clip-Score on Instruct-BLIP-7B, comparing it to a
# > random baseline."
#
# A Q-Former's query tokens mix all patches. Asked for an IoU, the package says so:

# %%
for name in rest:
    its = lmms[name]
    found_in = latent_cache.LatentCache.load(stage.path(name) / name)
    try:
        exemplar_maps(exemplars(found_in, pictures, int(next(iter(scored[name]["scores"]))), n_top=n_top))
    except NoPatchGrid as reason:
        print(f"{name}: {reason}")
# %%
rows = [{"model": f"{first}, layer {middle}", "CLIP, paper": cell(f"clip_paper_layer_{middle}"), "random": cell(f"clip_paper_layer_{middle}_random"), "latents": metrics[f"latents_layer_{middle}"]}]
rows += [{"model": f"{name}, layer {other_layer}", "CLIP, paper": cell(f"clip_paper_{name}"), "random": cell(f"clip_paper_{name}_random"), "latents": metrics[f"latents_{name}"]} for name in rest]
plots.table([*rows, {"model": "InstructBLIP-7B, 25th, the paper", "CLIP, paper": 28.01, "random": 17.71, "latents": 100}], "Table 4")
# %% mystnb={"figure": {"caption": "Latents of the other model at random: the whole images that excite them most, and the name they were given.", "name": "fig-other-model"}}
strips = [
    (f"{name}, latent {n}: {row['concept']}", exemplars(latent_cache.LatentCache.load(stage.path(name) / name), pictures, int(n), n_top=n_top))
    for name in rest for n, row in list(scored[name]["scores"].items())[:: max(1, len(scored[name]["scores"]) // 3)][:3]
]  # fmt: skip
plots.exemplar_strip(strips);
# %% [markdown]
# What the models can do on held-out scenes, by question family: the share of right answers where the model comes with its exam.

# %%
exams = {Path(name).name: read_json(root / name / "exam.json") for name in (model, *others) if (root / name / "exam.json").is_file()}
families = dict.fromkeys(family for exam in exams.values() for family, its in exam.items() if isinstance(its, dict) and "fraction" in its)
plots.table([{"model": name} | {family: exam.get(family, {}).get("fraction") for family in families} for name, exam in exams.items()])

# %% [markdown]
# ## Scaling
#
# > "We scale our sparse autoencoder with $2^{17}$ … later tries to scale the features into $2^{18}$ but observe no loss decrease."
#
# On the middle layer, all in the same pass: four numbers of latents at one k, three k at one number. The paper's choice, in
# multiples of the model's width, is marked: 32 times as many latents, k a sixteenth.

# %%
def swept_at(quantity: str, at: dict[int, str]) -> dict[int, Mean]:
    ends = {n: [metrics.get(f"{quantity}_{name}{end}") for end in ("", "_low", "_high")] for n, name in at.items()}
    return {n: Mean(v, v if low is None else low, v if high is None else high) for n, (v, low, high) in ends.items() if v is not None}


sweeps = {
    ("latents", 32 * lmm.width): {n: f"layer_{middle}" if n == n_latents else f"n_{n}" for n in sorted(sizes)},
    ("k, active latents a token", lmm.width / 16): {n: f"layer_{middle}" if n == k else f"k_{n}" for n in sorted(ks)},
}
# %% mystnb={"figure": {"caption": "What more latents, and more active ones, bring: held-out FVU, dead latents, and the share of explained latents whose name is right, with 99 % intervals; dashed: the paper's choice.", "name": "fig-scaling"}}
axes = plots.panels(2, inches=3.4)
for ax, ((xlabel, chosen), at) in zip(axes, sweeps.items(), strict=True):
    curves = {title: swept_at(quantity, at) for title, quantity in shown.items() if quantity in ("fvu", "dead_fraction", "concept_accuracy")}
    plots.dose_curves({title: curve for title, curve in curves.items() if curve}, xlabel, "share", ax=ax).axvline(chosen, color="grey", ls="--", lw=1)
# %%
for (xlabel, _), at in sweeps.items():
    fvu = {n: metrics[f"fvu_{name}"] for n, name in at.items()}
    print(f"{xlabel}: FVU", ", ".join(f"{n}: {value:.4f}" for n, value in fvu.items()), "· change a doubling", ", ".join(
        f"{(fvu[b] / fvu[a]) ** (1 / np.log2(b / a)) - 1:+.1%}" for a, b in zip(list(fvu)[:-1], list(fvu)[1:], strict=True)))  # fmt: skip

# %% [markdown]
# ## What we found
#
# Latents are explained, and score above chance, at every depth, in both models and both modes. Whether scores rise with depth
# is said above by the interval of the difference: a rise that lies within it is none. What a clamp at the patches can
# do does not follow the scores: near the end, where hardly a layer is left to read the patches, it does least. A latent may be
# well named and no handle at all, which IoU and CLIP score do not tell. A model without patches is named from whole images,
# hence after scenes and colours, mostly; CLIP score on whole images favours that.
#
# Limits: SAEs of one short training and one seed, larger ones with fewer tokens a latent; explained latents only, which are
# other latents at every layer; in `tiny` the similarity model knows the same world. The numbers are on the
# [results page](../results).

# %% tags=["hide-input"]
manifest = read_json(stage.path("manifest.json"))
print(f"run {run} · {', '.join((model, *others))} · layers {layers} · seed {seed} · {manifest['seconds']:.0f} s · {manifest['versions']}")
