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
# **The question** (sections 3.1, 3.3 and 3.4). Do latents have a meaning at
# every depth, in another architecture, and in an SAE of another size? And do
# their scores improve with depth?
#
# **You will learn** how to train SAEs of several layers and sizes in one pass
# over the model, what changes with depth, why a model without patches has no
# IoU, and how the error changes with the size of an SAE.
#
# **Reads** the models, training samples, held-out samples and images.
# **Writes** the stage `compare`: every SAE with its cache, the names of its
# latents and their scores.
#
# | preset | layers | other models | sizes | time |
# |---|---|---|---|---|
# | `tiny` | 3 of 8 | InstructBLIP of Picture World | 3 numbers of latents, 3 of k | 3 minutes on two cores, beside other pages |
# | `paper` | 3 of 32 | InstructBLIP-Vicuna-7B | $2^{15}$ to $2^{18}$ latents | never run; see [A3](A3_full_scale) |
#
# In `tiny`, all SAEs of this page are smaller and shorter trained than that of
# notebook 01. Fewer images are cached, and no name is refused for low
# confidence. So compare these numbers with each other, not with those of notebooks 03 and 04.

# %% tags=["parameters"]
# results go to data/artifacts/<run>/
run: str = "tiny"
# the model under study: a folder of this project, or a name on the hub
model: str = "data/models/tiny-llava-next"
# how the models under study are loaded
loading: dict = {
    "dtype": "float32",  # "bfloat16" halves the memory and rounds more
    "device": "",  # such as "cuda:1" or "cpu"; "": a GPU if there is one
    "device_map": "",  # "auto": over all GPUs, if one is too small
    "image_size": [],  # [width, height] that images get; []: their own
}
# a low, a middle and a high layer, counted from 0; the paper's 8th, 25th
# and 32nd are 7, 24 and 31
layers: list[int] = [1, 3, 6]
others: list[str] = ["data/models/tiny-instructblip"]  # further models
other_layer: int = 3  # of each further model
# training samples: image, question, answer
dataset: str = "data/artifacts/tiny/world/train"
# samples that no training has seen
heldout: str = "data/artifacts/tiny/world/heldout"
# a data set with an image column, or a folder of images
images: str = "data/artifacts/tiny/world/cache"
# unreadable pictures; one of "refuse" or "skip", which leaves them out
unreadable: str = "refuse"
cached_images: int = 250  # how many of the images are cached
# names of the ground truth's concepts; "": there is no ground truth
concepts: str = "data/artifacts/tiny/world/concepts.json"
# the SAE of every layer
training: dict = {
    "n_latents": 512,
    "k": 16,  # active latents per token; the paper: a 16th of the width
    "lr": 2e-3,  # highest learning rate
    "steps": 160,  # optimiser steps
    "batch_tokens": 512,  # tokens per optimiser step
    "batch_samples": 16,  # samples that the model reads at a time
    # tokens without activation after which a latent counts as dead
    "dead_after_tokens": 50_000,
    "k_aux": 0,  # dead latents that AuxK revives; 0: width / 2
}
at_once: int = 0  # SAEs that learn in one pass; 0: all, if memory allows
tf32: bool = True  # GPUs round the factors of float32 products to TF32
workers: int = 1  # threads that prepare samples and images
# the SAE of a further model: entries that differ
other_training: dict = {"steps": 120, "batch_tokens": 256}
# numbers of latents on the middle layer; the paper's 2^17 are 32 times the
# width, here 8,192
sizes: list[int] = [256, 512, 2048]
# active latents per token, on the middle layer
ks: list[int] = [8, 16, 32]
# kinds of training beside TopK, on the middle layer: each one of
# "batch_topk" or "matryoshka"; []: none
training_kinds: list[str] = ["batch_topk", "matryoshka"]
# held-out samples, at least 1, on which each SAE is evaluated
evaluated: int = 12
# the model that names what exemplars have in common
explainer: dict = {
    # a folder, a name on the hub, or name@http://host:port/v1
    "model": "data/models/tiny-explainer",
    "prompt": "what do these images have in common ?",
    "tag": "",  # the explanation follows it in the reply; "": no tag
    "batch_size": 4,  # questions at once, to a model in this process
    "max_new_tokens": 16,  # of an answer
    # a lower probability of the explainer counts as a refusal
    "least_confidence": 0.0,
}
# a language model that shortens explanations; "": the names in `concepts`
refiner: str = ""
# a language model that gives a concept its kind; "": as in `concepts`
labeller: str = ""
# for models behind an endpoint
endpoint: dict = {
    "key_variable": "",  # environment variable with the key; "": no key
    "concurrency": 8,  # questions at the same time
    "timeout": 120.0,  # seconds that an answer may take
    # fields of a request to add, or with None to leave out, such as
    # {"chat_template_kwargs": {"enable_thinking": False}}
    "extra": {},
}
# explained latents of each layer and model: at least so many, because the
# last batch of questions is kept whole
n_explained: int = 36
n_swept: int = 12  # the same for each SAE of another size
n_top: int = 5  # exemplars of each latent
# a patch is visible above this fraction, from 0 to 1, of its image's
# highest activation
threshold: float = 0.25
# how names are scored
scoring: dict = {
    # finds a concept by its name, where there is no ground truth
    "segmenter": "",
    "detector": "",  # finds boxes for the segmenter, which then is a SAM
    "similarity": "data/models/tiny-clip",  # of images and texts
    "random_runs": 5,  # draws of n_top random images for the IoU
    "clip_runs": 10,  # and for the CLIP score
}
# the steering of notebook 06, in small
steering: dict = {
    # clamped latents of each layer, named for an object; all of them if
    # there are fewer
    "n_latents": 20,
    "dose": 8.0,  # of the latent's maximum; notebook 06 chooses another
    "kinds": ["base", "tiles", "newline"],  # of the clamped tokens
    "question": "What do you see in this image?",  # about a white image
    "image_size": 192,  # side of the white image, pixels
}
# the comparison of notebook 07, in small
attribution: dict = {
    "decisions": 6,  # held-out decisions of each layer
    "pairs": 12,  # active (token, latent) pairs ablated in each decision
}
seed: int = 0  # of everything random

# %% tags=["remove-cell"]
from functools import partial
from pathlib import Path

from datasets import load_from_disk
from IPython.display import display

from lmm_sae_nb.compare.depth import (
    SteeredLatent,
    effect_of_image_tokens,
    rank_agreement,
    steer_objects,
)
from lmm_sae_nb.compare.report import (
    changes_per_doubling,
    depth_metrics,
    depth_panels,
    direction,
    doubling_rows,
    exam_rows,
    kind_fractions,
    kind_metrics,
    kind_rows,
    layer_rows,
    quality_metrics,
    quantity_rows,
    rise_metrics,
    rise_rows,
    score_metrics,
    shared_concepts,
    size_curves,
)
from lmm_sae_nb.compare.saes import (
    compare_fvus,
    evaluate_awake,
    kind_recipes,
    names_by_size,
    size_recipes,
    train_and_cache,
)
from lmm_sae_nb.compare.scored import (
    ScoredSAE,
    explain_and_score,
    explain_some,
)
from lmm_sae_nb.compare.sentences import (
    above_chance,
    kind_shift_sentences,
    name_counts_sentences,
    steering_sentences,
    training_kind_sentences,
    within_kinds_sentences,
)
from lmm_sae_nb.interpret.open import open_interpreter
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.sample_checks import open_samples
from lmm_sae_nb.model.samples import first_turns, pictured, readable
from lmm_sae_nb.model.token_kinds import NoPatchGrid
from lmm_sae_nb.score.masks import exemplar_maps
from lmm_sae_nb.score.scores import Column
from lmm_sae_nb.score.segmenters import open_segmenters
from lmm_sae_nb.score.similarity import ImageTextSimilarity
from lmm_sae_nb.score.tables import kind_table
from lmm_sae_nb.show import plots
from lmm_sae_nb.show.cure_sentences import interval
from lmm_sae_nb.show.markup import as_text
from lmm_sae_nb.show.report import (
    findings,
    headline,
    left_out,
    metrics_table,
    provenance,
    published_numbers,
)
from lmm_sae_nb.support.conversions import conversion_metrics
from lmm_sae_nb.support.images import Remembered, open_images
from lmm_sae_nb.support.intervals import Mean, proportion, read_mean
from lmm_sae_nb.support.stages import Metrics, Page
from lmm_sae_nb.train.training import Recipe
from lmm_sae_nb.truth.accuracy import other_names
from lmm_sae_nb.truth.label_maps import LabelMaps

page = Page(globals())
plots.style()

# %%
folders = {Path(name).name: page.locate(name) for name in (model, *others)}
lmms = {
    name: LMM.load(folder, **loading) for name, folder in folders.items()
}
first, *rest = lmms
lmm, middle = lmms[first], layers[len(layers) // 2]
for name, each in lmms.items():
    kind = type(each.model).__name__
    print(f"{name}: {kind}, {each.n_layers} layers of width {each.width}")

# %%
samples = open_samples(page.locate(dataset))
unseen = open_samples(page.locate(heldout))
unseen, unread, unlike = readable(unseen, unreadable, lmm)
pictures = open_images(page.locate(images))
# keeps decoded images in memory: scores look at them again and again
pictures = Remembered(pictures.first(cached_images))
truth = None
if concepts:
    labelled = load_from_disk(page.locate(images))
    truth = LabelMaps(labelled, page.locate(concepts))

# %% [markdown]
# ## Which layers
#
# The paper takes the 8th, 25th and 32nd of 32 layers. After the last layer
# nothing reads the states of image tokens: the answer comes from the last
# token, and no later layer can look back at the patches. Such states may mean
# anything, and a clamp on them changes nothing. So our deepest layer is the
# last but one. To check, we set all image tokens to zero after each layer.
# How much does the answer to one held-out sample change? Read the last row.

# %%
asked = first_turns(unseen)  # of conversations, the first turn
row = next(row for row in asked if row["image"] is not None)
deep = sorted({*layers, lmm.n_layers - 2, lmm.n_layers - 1})
changes = effect_of_image_tokens(lmm, row, deep)
plots.table([
    {"after layer": str(n), "largest change of a logit": changes[n]}
    for n in deep
])

# %% [markdown]
# ## One pass over each model
#
# All SAEs of a model learn from the same tokens. The model runs once, and the
# states of all layers lie side by side in one buffer. Each SAE comes out
# exactly as if it were trained alone. The same holds for the cache. Besides
# the layers, the middle one gets SAEs of other sizes. If you interrupt the
# cell, run it again: it continues.

# %%
size = {name: training[name] for name in ("n_latents", "k", "lr")}
how = {name: training[name] for name in training if name not in size}
how |= dict(n_top=n_top, at_once=at_once, seed=seed, unreadable=unreadable)
how |= dict(tf32=tf32, workers=workers)
by_layer = {f"layer_{n}": Recipe(n, **size) for n in layers}
center = by_layer[f"layer_{middle}"]
by_size = size_recipes(center, sizes, ks)
by_training = kind_recipes(center, training_kinds)
recipes = by_layer | by_size | by_training

# %%
stage = page.stage(
    "compare",
    without=(
        "endpoint.key_variable", "endpoint.concurrency",
        "endpoint.timeout", "unreadable", "workers",
    ),
)  # fmt: skip
studied = train_and_cache(
    lmm, recipes, samples, pictures, folder=stage.path(first), **how
)
of_middle = studied[f"layer_{middle}"]
left_out(
    of_middle.skipped, unread, of_middle.cache.skipped,
    converted=[of_middle.converted, unlike, of_middle.cache.converted],
)  # fmt: skip

# %% [markdown]
# The other models learn from samples with an image: a Q-Former needs one.

# %%
with_image = pictured(first_turns(samples))
for name in rest:
    studied |= train_and_cache(
        lmms[name], {name: Recipe(other_layer, **size)}, with_image,
        pictures, folder=stage.path(name), **how | other_training,
    )  # fmt: skip

# %% [markdown]
# ## Explained and scored
#
# Each SAE goes through notebooks 03 and 04. We ask about live latents in
# random order until enough are explained. The table further down says which
# fraction is explained: the first answer to this page's question. A model without a patch grid has no
# activation maps. Its exemplars are whole images, ranked by the mean
# activation over its query tokens, and its only score is the CLIP score of
# whole images.

# %%
interpreter = open_interpreter(
    explainer, refiner, labeller, endpoint, concepts=concepts,
    replies=stage.path("replies.jsonl"),
)  # fmt: skip
finders = open_segmenters(
    truth, scoring["segmenter"], scoring["detector"], pictures
)
similarity = ImageTextSimilarity.load(page.locate(scoring["similarity"]))
exemplars = dict(n_top=n_top, threshold=threshold)
runs = {name: scoring[name] for name in ("random_runs", "clip_runs")}

# %%
score = partial(
    explain_and_score, images=pictures, interpreter=interpreter,
    truth=truth, segmenters=finders, all_pairs=similarity.all_pairs,
    n_explained=n_explained, seed=seed, **exemplars, **runs,
)  # fmt: skip
scored = {
    name: stage.result(name, ScoredSAE, partial(score, studied[name]))
    for name in (*by_layer, *rest)
}

# %% [markdown]
# ## What else changes with depth
#
# We evaluate every SAE on held-out samples, as in notebook 01. For SAEs of
# other sizes, we ask until at least `n_swept` latents are explained; for other
# kinds of training, until at least half of `n_explained` are.

# %%
places = {name: studied[name].place for name in recipes}
some = unseen.select(range(min(evaluated, len(unseen))))
evaluation = stage.result(
    "evaluation", dict[str, Metrics], lambda: evaluate_awake(places, some)
)
of_kind = {"topk": f"layer_{middle}"} | {n: n for n in by_training}
fvus = stage.result(
    "fvus", dict[str, Mean],
    lambda: compare_fvus({n: places[n] for n in of_kind.values()}, some),
)  # fmt: skip

# %%
explain = partial(
    explain_some, images=pictures, interpreter=interpreter, truth=truth,
    seed=seed, **exemplars,
)  # fmt: skip
enough = dict.fromkeys(by_size, n_swept)
enough |= dict.fromkeys(by_training, max(2, n_explained // 2))
swept = stage.result(
    "swept", dict[str, dict[int, dict]],
    lambda: {n: explain(studied[n], enough=enough[n]) for n in enough},
)  # fmt: skip

# %% [markdown]
# Can a latent that is named for an object also produce it? We clamp it at the
# tokens of a white image and ask what the model sees. The dose is fixed, and
# we clamp no random latents. Notebook 06 chooses the dose and
# has this control. And does the linear attribution rank latents as ablation
# does (notebook 07)?

# %%
named = {name: scored[name].scores.explained for name in by_layer}
steer = partial(steer_objects, seed=seed, **steering)
steered = stage.result(
    "steered", dict[str, list[SteeredLatent]],
    lambda: {name: steer(studied[name], named[name]) for name in by_layer},
)  # fmt: skip

# %%
of_layers = {name: places[name] for name in by_layer}
ranks = stage.result(
    "ranks", dict[str, list[float]],
    lambda: rank_agreement(of_layers, asked, seed=seed, **attribution),
)  # fmt: skip

# %%
rows = {name: scored[name].explanations for name in by_layer} | swept
metrics = {"layers": len(layers), "architectures": len(lmms)}
for name in recipes:
    metrics |= quality_metrics(name, evaluation[name], rows[name])
metrics |= kind_metrics(of_kind, evaluation, rows, fvus, seed)
low, high = (scored[f"layer_{n}"].scores for n in (layers[0], layers[-1]))
metrics |= depth_metrics(steered, ranks) | score_metrics(scored, seed)
metrics |= rise_metrics(low, high, seed)
metrics = stage.finish(metrics | {
    "replies_failed": interpreter.failed,
    "samples_skipped": max(len(each.skipped) for each in studied.values()),
    "heldout_skipped": len(unread),
    "images_skipped": len(of_middle.cache.skipped),
    **conversion_metrics("samples", of_middle.converted),
    **conversion_metrics("heldout", unlike),
    **conversion_metrics("images", of_middle.cache.converted),
})  # fmt: skip

# %% [markdown]
# ## Table 3: layers
#
# > "Our results consistently show a significant improvement compared to random
# > baselines … as layer depth increases, both IOU and Clip-Score improve."
#
# The table shows means over explained latents with 99% intervals. Notebook
# 04 defines the modes and two kinds of chance:
#
# - *Moved*: the same images with the activation at a random other place, for
#   the CLIP score a region of the same area. We take it as the chance wherever
#   there is a region, because it is harder to beat than random images.
# - *Random images*, as in the paper. In the mode `paper`, CLIP sees whole
#   images; there this is the only chance.
#
# *Less moved* is the difference, latent by latent.

# %%
published = published_numbers("compare")
plots.table(layer_rows(metrics, layers, published), "Table 3")

# %% [markdown]
# The paper's numbers in the three columns are of its 8th, 25th and 32nd of 32
# layers: its low, middle and high layer, not the same relative depth. The paper
# compares each layer with one random value, so its rise cannot be split into a
# rise above chance.

# %% mystnb={"figure": {"caption": "IoU by layer, with 99% intervals, on the latents' own images, with the activation moved, and on random images.", "name": "fig-layers-iou"}, "image": {"alt": "Dots of the mean IoU and of two kinds of chance for three layers, in two modes."}}
plots.mean_panels(depth_panels(metrics, layers, "iou"));
# %% mystnb={"figure": {"caption": "CLIP score by layer, with 99% intervals, on the latents' own images and by chance: random images in the paper's mode, the moved region in the strict mode.", "name": "fig-layers-clip"}, "image": {"alt": "Dots of the mean CLIP score and of chance for three layers, in two modes."}}
plots.mean_panels(depth_panels(metrics, layers, "clip"));
# %% [markdown]
# Does the score rise from the lowest to the highest layer? It does if the
# interval of the difference lies above 0.

# %%
plots.table(rise_rows(metrics, layers))

# %% [markdown]
# Chance changes with depth, too. Names such as colours and scenes fit many
# images. So the fair question is whether a score rises more than its chance:
# the rows *less moved* and *less random images*.

# %% [markdown]
# ## Concepts on their way through the depth

# %% mystnb={"figure": {"caption": "Kinds of concept among the explained latents, by layer, and of the other model.", "name": "fig-kinds"}, "image": {"alt": "Stacked bars of the kinds of concept for each layer and for the other model."}}
kinds = {
    name.replace("_", " "): kind_fractions(scored[name].scores)
    for name in scored
}
plots.stacked(kinds, "fraction of explained latents");
# %% tags=["remove-input"]
shifts = kind_shift_sentences(low, high, layers)
findings(*(as_text(each) for each in shifts))

# %%
quantities = {
    "fvu": "FVU", "dead_fraction": "silent on held-out tokens",
    "loss_recovered": "loss recovered",
    "explained_fraction": "explained, of those asked about",
    "concept_accuracy": "names right",
    "steered": "clamped: the answer names the object",
    "spearman": "linear against ablation, Spearman (page 07)",
}  # fmt: skip
plots.table(quantity_rows(metrics, layers, quantities))

# %% mystnb={"figure": {"caption": "Two concepts that a latent of every layer is named for, from the lowest to the highest layer. Not every image shows the concept. Above: the latent's images in grey, with its activation in colour (yellow: high, purple: low; no colour: not active). Below: the visible patches; all other patches are black. Images with the same pixels count once, so a latent may have fewer than five.", "name": "fig-depth"}, "image": {"alt": "Rows of images with activation maps, for two concepts at three layers."}}
shared = shared_concepts({name: scored[name] for name in by_layer})
chosen = list(shared)[:: max(1, len(shared) // 2)][:2]
plots.exemplar_strip([
    (
        f"{name.replace('_', ' ')}, latent {latent}: {concept}",
        studied[name].exemplars(pictures, **exemplars)[latent],
    )
    for concept in chosen
    for name, latent in shared[concept].items()
]);
# %%
print(len(shared), "concepts are named at every layer.")
print(*shared, sep=", ")

# %% [markdown]
# Not every name is right: see the row *names right*. We do not know how many
# concepts random names of three layers would share. All SAEs of one size start
# from the same weights, so a latent number can keep its concept over layers.
# This does not prove that it is the same latent.

# %% [markdown]
# ## Table 4: another architecture
#
# > "Since BLIP image tokens are limited to only 32 tokens, we evaluate only the
# > Clip-Score on Instruct-BLIP-7B, comparing it to a random baseline."
#
# A Q-Former's query tokens mix all patches. Asked for an IoU, the package
# explains why there is none:

# %%
seen = {name: list(scored[name].scores.explained) for name in rest}
for name in rest:
    images_of = studied[name].exemplars(pictures, **exemplars)
    try:
        exemplar_maps(images_of[seen[name][0]])
    except NoPatchGrid as reason:
        print(f"{name}: {reason}")

# %%
at = {f"{first}, layer {middle}": f"layer_{middle}"}
at |= {f"{name}, layer {other_layer}": name for name in rest}
table = [
    {"model": title, "latents": metrics[f"latents_{name}"]}
    | {"CLIP score": read_mean(metrics, f"clip_paper_{name}")}
    | {"random images": read_mean(metrics, f"clip_paper_{name}_random")}
    | {"above them": read_mean(metrics, f"clip_paper_{name}_gain")}
    for title, name in at.items()
]
blip = "clip_paper_*instructblip"
clip, random = published[blip], published[f"{blip}_random"]
paper = {"model": "the paper: InstructBLIP-7B, 25th layer"}
paper |= {"latents": "100 (as in 3.3)"}
paper |= {"CLIP score": clip, "random images": random}
plots.table([*table, paper | {"above them": clip - random}], "Table 4")

# %% [markdown]
# In `tiny` the SAE of the other model learned from fewer tokens than those of
# the layers (*What we found* says how many). And its names are of other kinds.
# Some kinds score higher than others (page 04). So the rows differ in more than
# the architecture. The next table compares within kinds. It has a row for each
# kind of which every model has two names.

# %%
def by_kind(name):
    """The mean CLIP score of each kind with two latents or more."""
    table = kind_table(scored[name].scores, Column("clip", "paper"), seed)
    return {kind: row.score for kind, row in table.items()}


columns = {title: by_kind(name) for title, name in at.items()}
any_of, *_ = columns.values()
common = [k for k in any_of if all(k in row for row in columns.values())]
of_all = {"total": "all kinds, also those without a row"}
plots.table([
    {"kind": of_all.get(kind, kind)}
    | {title: row[kind] for title, row in columns.items()}
    for kind in common
])

# %% tags=["remove-input"]
middle_scores = scored[f"layer_{middle}"].scores
for name in rest:
    compared = within_kinds_sentences(
        middle_scores, scored[name].scores, (first, name),
        Column("clip", "paper"), seed,
    )  # fmt: skip
    findings(*(as_text(each) for each in compared))

# %% [markdown]
# Are the names of the other model right? Its exemplars are whole images, so we
# ask less than on page 03: do at least three of the five images show the
# concept anywhere? As a control, the same with another name.

# %%
shown = {}
for name in rest if truth else ():
    kept = scored[name].scores.explained
    images_of = studied[name].exemplars(pictures, **exemplars)
    own = {n: row.concept for n, row in kept.items()}
    names_of = {"its name": own, "another name": other_names(kept, seed)}
    for words, names in names_of.items():
        shown[f"{name}, {words}"] = proportion([
            sum(mask.any() for mask in truth(
                [each.image_index for each in images_of[n]], names[n]
            )) >= 3
            for n in kept if names[n]
        ])
if shown:
    display(plots.table([
        {"names": words, "shown in three of five images": value}
        for words, value in shown.items()
    ]))

# %% mystnb={"figure": {"caption": "Three latents of the other model, evenly spaced in the alphabet of their names: the whole images that excite each most, as they are. A white place within a frame is a white picture. Images with the same pixels count once, so a latent may have fewer than five.", "name": "fig-other-model"}, "image": {"alt": "Rows of five images, each with the name of a latent."}}
plots.exemplar_strip([
    (
        f"latent {n}: {scored[name].scores.explained[n].concept}",
        studied[name].exemplars(pictures, **exemplars)[n],
    )
    for name in rest
    for n in seen[name][:: max(1, len(seen[name]) // 3)][:3]
]);
# %% [markdown]
# How well do the models answer questions about held-out scenes? For models
# whose folder holds exam results, the table gives the fraction of right
# answers in a few families of questions. The row *trap follows fact* is
# different: the fraction of answers that follow memory against the map (lower
# is better). [A1](A1_picture_world) explains all families and has intervals.

# %%
asked = ("describe", "position", "read", "trap follows fact")
exam = exam_rows(folders)
plots.table([row for row in exam if row["questions"] in asked])

# %% [markdown]
# ## Scaling
#
# > "We scale our sparse autoencoder with $2^{17}$ … later tries to scale the
# > features into $2^{18}$ but observe no loss decrease."
#
# All SAEs of the middle layer come from the same pass. One series has a number
# of latents from `sizes` each, at the k of `training`. The other has a k from
# `ks` each, at its number of latents. The SAE of `training` is in both. Dashed
# lines mark the paper's choice relative to the model's width: 32 times as many
# latents, and a k of a sixteenth. Each SAE saw the same number of tokens. More
# active latents always lower the FVU; this is no surprise.

# %% mystnb={"figure": {"caption": "Left: number of latents. Right: k. FVU and silent latents on held-out tokens, and the fraction of right names, with 99% intervals. Names right rests on few names; the line below the figure says on how many. The dashed line is the paper's choice.", "name": "fig-scaling"}, "image": {"alt": "Curves of FVU, silent latents and right names over the number of latents and over k."}}
drawn = ("fvu", "dead_fraction", "concept_accuracy")
titles = {name: quantities[name] for name in drawn}
n_names = names_by_size(recipes, center, "n_latents")
k_names = names_by_size(recipes, center, "k")
by_n, by_k = (size_curves(metrics, x, titles) for x in (n_names, k_names))
plots.size_panels({
    "latents": (by_n, 32 * lmm.width),
    "k, active latents per token": (by_k, lmm.width / 16),
}, "fraction", "the paper's choice for this width");
# %% tags=["remove-input"]
swept_names = [*n_names.values(), *k_names.values()]
counted = name_counts_sentences(
    metrics, rows, swept_names, f"layer_{middle}"
)
if counted:
    findings(*counted)

# %%
plots.table(doubling_rows(metrics, n_names, "latents"))

# %%
plots.table(doubling_rows(metrics, k_names, "k"))

# %% [markdown]
# ### Other kinds of training
#
# The paper's SAEs are TopK. Two later kinds learned from the same tokens, with
# the same sizes and first weights. BatchTopK keeps the largest activations of a
# whole batch: $k$ a token on average, more where there is more to say. In use
# it has a threshold, the mean of what the last batches kept. After a training
# as short as here, fewer than $k$ latents may pass it; fewer active latents
# leave a higher FVU. Matryoshka also reconstructs from its first latents alone.
# We compare the FVU on the same samples, and the names of explained latents.

# %%
plots.table(kind_rows(metrics, of_kind))

# %% [markdown]
# All numbers of this page:

# %% tags=["hide-output"]
metrics_table(stage)

# %% [markdown]
# ## What we found

# %% tags=["remove-input"]
over_moved = above_chance(metrics, scored, "moved")
over_random = above_chance(metrics, scored, "random")
ends = ("iou_paper_rise", "iou_paper_moved_rise", "iou_strict_moved_rise",
        "clip_paper_rise", "clip_paper_gain_rise", "clip_strict_moved_rise")
iou, iou_moved, iou_strict, clip, gain, strict_gain = (
    read_mean(metrics, name) for name in ends
)
span = f"from layer {layers[0]} to layer {layers[-1]}"
rise = 0.10  # of the paper's IoU, 0.30 to 0.40
short = partial(interval, form="{:.1f}")
holds = iou.low <= rise <= iou.high
findings(
    f"Explained latents score above the moved activation in {over_moved}.",
    f"They score above random images in {over_random}. Above means that the "
    "interval of the difference lies above 0.",
    f"{span[0].upper()}{span[1:]}, the IoU of the paper's mode "
    f"{direction(iou)}: the difference is {iou}. Its lead over the moved "
    f"activation {direction(iou_moved)}: {iou_moved}; in the strict mode the "
    f"difference is {iou_strict}.",
    f"The interval of the IoU's difference "
    f"{'holds' if iou.low <= 0 <= iou.high else 'excludes'} 0, and it "
    f"{'holds' if holds else 'excludes'} the paper's rise of {rise:.2f}.",
    f"The CLIP score of whole images {direction(clip)} ({short(clip)}). "
    f"Its lead over random images {direction(gain)} ({short(gain)}). In the "
    "strict mode, its lead over the moved region "
    f"{direction(strict_gain)} ({short(strict_gain)}).",
)

# %% tags=["remove-input"]
fractions = [
    f"{metrics[f'explained_fraction_layer_{n}']:.0%} at layer {n}"
    for n in layers
]
findings(
    "The explainer names this fraction of the latents it was asked about: "
    f"{', '.join(fractions)}."
)

# %% tags=["remove-input"]
tokens, other_tokens = (
    each["steps"] * each["batch_tokens"]
    for each in (training, training | other_training)
)
for name in rest:
    fractions = kinds[name.replace("_", " ")]
    most = sorted(fractions, key=fractions.get, reverse=True)[:2]
    findings(
        f"In {name}, latents have a CLIP score of "
        f"{read_mean(metrics, f'clip_paper_{name}')}; random images have "
        f"{read_mean(metrics, f'clip_paper_{name}_random')}. Its SAE saw "
        f"{other_tokens / tokens:.0%} of the tokens that the layers' saw.",
        f"The most frequent kinds of names in {name}: "
        + ", ".join(f"{as_text(n)} ({fractions[n]:.0%})" for n in most)
        + ". Some kinds score higher than others, so compare within kinds.",
    )
    findings(*(
        f"{words}: fraction that three of five images show: {value}."
        for words, value in shown.items() if words.startswith(name)
    ))

# %% tags=["remove-input"]
tried = {n: steered[f"layer_{n}"] for n in layers}
findings(
    f"Clamped at dose {steering['dose']:g}, at most {steering['n_latents']} "
    "latents a layer. There is no control with random latents here; page 06 "
    "has it.",
    *(as_text(each) for each in steering_sentences(tried)),
)

# %% tags=["remove-input"]
by_latents, by_k = (
    changes_per_doubling(metrics, names) for names in (n_names, k_names)
)


def steps(changes):
    """Each step's change, in words."""
    return ", ".join(f"{x:+.1%} (to {n:,})" for n, x in changes.items())


if by_latents:
    *_, before, largest = n_names
    findings(
        "Per doubling of the latents, the FVU changes by "
        f"{steps(by_latents)}.",
        f"With this short training, {largest:,} latents have an FVU of "
        f"{read_mean(metrics, f'fvu_{n_names[largest]}')}, and {before:,} "
        f"have {read_mean(metrics, f'fvu_{n_names[before]}')}. "
        f"{metrics[f'dead_fraction_{n_names[largest]}']:.0%} of the "
        f"{largest:,} are silent. A longer training may change this.",
    )
if by_latents and by_k:
    every = max(by_k.values()) < min(by_latents.values())
    findings(
        f"Per doubling of k, it changes by {steps(by_k)}: "
        f"{'each' if every else 'not each'} doubling of k helps more than "
        "any doubling of the latents.",
    )

# %% tags=["remove-input"]
findings(*(
    training_kind_sentences(metrics, of_kind)
    or ["Without other kinds of training and two held-out samples, no kinds "
        "are compared."]
))  # fmt: skip

# %% [markdown]
# **Limits.** The SAEs had one short training with one seed; larger ones saw
# fewer tokens per latent. Only explained latents are scored, and these differ
# from layer to layer. In `tiny` the similarity model knows the same world. The
# [results page](../results) gathers the numbers of every page.

# %% tags=["result", "remove-input"]
moves = {"rises": "we see a rise", "falls": "we see a fall"}
seen_iou = moves.get(direction(iou), "we see no rise")
first_n, last_n = (
    metrics[f"latents_layer_{n}"] for n in (layers[0], layers[-1])
)
headline(
    page,
    "named latents score above the same activation moved elsewhere in "
    f"{over_moved}. {span[0].upper()}{span[1:]}, the IoU {direction(iou)}: "
    f"{iou}. Its lead over the moved activation {direction(iou_moved)}: "
    f"{iou_moved}. The CLIP score {direction(clip)} ({short(clip)}). Its "
    f"lead over random images {direction(gain)} ({short(gain)}).",
    "IoU 0.30, 0.31 and 0.40, CLIP score 22.82, 24.92 and 26.55 at the "
    "8th, 25th and 32nd of 32 layers: both improve with depth. Random "
    "images have 0.005 and 18.2, one value for all layers. It gives no "
    "intervals, and it does not move the activation.",
    f"{seen_iou} of the IoU, and we {'cannot' if holds else 'can'} exclude "
    f"a rise of {rise:.2f}. The difference is {interval(iou)}, from {first_n} "
    f"latents at layer {layers[0]} and {last_n} at layer {layers[-1]}. The "
    "layers lie at other relative depths, too.",
)

# %% tags=["remove-input"]
provenance(page, stage)
