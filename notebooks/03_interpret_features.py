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
# # 3. Let a larger model say what each latent means
#
# **The question** (section 2.2). Can a multimodal model look at the images
# that excite a latent, and name what the latent stands for?
#
# **You will learn** what an explainer sees, and how it answers or refuses. And
# you will see what photographs cannot show: whether the names are true.
#
# **Reads** the cache of notebook 02 and its images; where there is a ground
# truth, also the SAE of notebook 01. **Writes** the stage `interpret`: the
# outcome and the concept of each latent, the replies, and the metrics.
#
# | preset | explainer | latents | time |
# |---|---|---|---|
# | `tiny` | Picture World's, part of this project | about 1,000 | 3 minutes, 2 cores |
# | `paper` | LLaVA-OneVision-72B, an endpoint | 5,000 | GPUs |

# %% tags=["parameters"]
# results go to data/artifacts/<run>/
run: str = "tiny"
# the model under study: a folder of this project, or a name on the hub
model: str = "data/models/tiny-llava-next"
layer: int = 1  # counted from 0; the layer that the SAE was trained on
# the images that were cached
images: str = "data/artifacts/tiny/world/cache"
# scenes with label maps, on which detectors are measured
heldout: str = "data/artifacts/tiny/world/heldout"
# the concepts of the world by kind; "": there is no ground truth
concepts: str = "data/artifacts/tiny/world/concepts.json"
# the model that names what exemplars have in common
explainer: dict = {
    # a folder, a name on the hub, or name@http://host:port/v1
    "model": "data/models/tiny-explainer",
    # {images} marks the place of the images; without it they come first
    "prompt": "what do these images have in common ?",
    "tag": "",  # the explanation stands behind this mark; "": no mark
    "batch_size": 4,  # questions at once, to a model in this process
    "max_new_tokens": 16,  # of an answer
    # an explanation of lower probability counts as refused
    "least_confidence": 0.55,
}
# a language model that shortens explanations; "": no model, names are
# looked up in `concepts`
refiner: str = ""
# a language model that gives concepts their kind; "": the same
labeller: str = ""
# for models behind an endpoint
endpoint: dict = {
    "key_variable": "",  # environment variable with the key; "": none
    "concurrency": 8,  # questions at the same time
    "timeout": 120.0,  # seconds that an answer may take
}
n_explained: int = 1024  # live latents; drawn at random if there are more
n_top: int = 5  # exemplars of a latent
# a patch is visible above this fraction of its image's highest activation
threshold: float = 0.25
dim: float = 0.0  # brightness of the other patches; reference code: 0.12
seed: int = 0  # of the choice of latents

# %% tags=["remove-cell"]
from collections import Counter

import numpy as np
from datasets import load_from_disk

from lmm_sae_nb import LatentCache, SAEInPlace, open_images
from lmm_sae_nb.interpret.exemplars import ExemplarsByLatent, upsample
from lmm_sae_nb.interpret.explain import as_rows, latents_in_training
from lmm_sae_nb.interpret.open import open_interpreter
from lmm_sae_nb.show import plots
from lmm_sae_nb.show.report import findings, headline, metrics_table, provenance
from lmm_sae_nb.support.images import Remembered
from lmm_sae_nb.support.stages import Page
from lmm_sae_nb.truth import accuracy
from lmm_sae_nb.truth.detectors import (
    Detection,
    detect_concepts,
    recall_by_kind,
    recall_metrics,
)
from lmm_sae_nb.truth.label_maps import LabelMaps

page = Page(globals())
plots.style()

# %% [markdown]
# ## What the explainer sees
#
# > "We apply masks to the top activated images, using transparent masks for
# > the most activated patches and black masks for the rest."
#
# The images that excite a latent most are its *exemplars*. Their most
# activated patches are *visible*. We ask about live latents: those that are
# active somewhere in the cache.

# %%
cache = LatentCache.load(page.file("cache"))
pictures = Remembered(open_images(page.locate(images)))
live = np.flatnonzero(cache.live)
draw = np.random.default_rng(seed).choice
chosen = np.sort(draw(live, min(n_explained, len(live)), replace=False))
by_latent = ExemplarsByLatent(
    cache, pictures, chosen.tolist(),
    n_top=n_top, threshold=threshold, dim=dim,
)  # fmt: skip
print(f"{len(live):,} live latents; we ask about {len(chosen):,}")

# %% [markdown]
# The masks of one exemplar in plain NumPy:

# %%
first = by_latent[chosen[0]][0]
if cache.grid:
    visible = first.activation > threshold * first.activation.max()
    hidden = ~upsample(visible, first.image.size)
    expected = dim * np.asarray(first.image)[hidden]
    assert (abs(np.asarray(first.masked)[hidden] - expected) <= 0.5).all()

# %% mystnb={"figure": {"caption": "The exemplars of two latents. Above: where the latent is active. Below: the masked images that the explainer sees.", "name": "fig-exemplars"}, "image": {"alt": "Two latents with five images each, once with the activation over them and once with all but the active patches black."}}
two = chosen[len(chosen) // 4 :: max(1, len(chosen) // 2)][:2]
plots.exemplar_strip([(f"latent {n}", by_latent[n]) for n in two]);
# %% [markdown]
# ## Ask, and accept a refusal
#
# > "These masked images are then input into LLaVA-NeXT-OV-72B to detect
# > common patterns. If no common patterns are discernible, the system will
# > return a message stating 'unable to produce explanations'."
#
# All masked images of a latent go into one question. The *explainer* answers
# it. A *refiner* shortens the answer to a concept, and a *labeller* gives the
# concept a kind, as those of Table 1. In the preset `tiny` every name of the
# world is known, so the last two steps need no model.
#
# Each latent has one of four outcomes: explained, refused, unparseable (the
# answer is of no use) or failed (there is no answer). Every reply is on the
# disk before the next one is waited for. A run that was stopped goes on where
# it was.

# %%
stage = page.stage(
    "interpret", after=("train", "cache"), without=("endpoint",)
)
interpreter = open_interpreter(
    explainer, refiner, labeller, endpoint,
    concepts=concepts, replies=stage.path("replies.jsonl"),
)  # fmt: skip
interpreter.models

# %% [markdown]
# Where there are label maps, each explanation gets its truth: the concept that
# most images of the latent (three of five) show in at least half of their
# visible patches. If several concepts do, it is the one that fits these
# patches best.

# %%
truth = None
if concepts:
    labelled = load_from_disk(page.locate(images))
    truth = LabelMaps(labelled, page.locate(concepts))
explanations = stage.result(
    "explanations", dict[int, dict],
    lambda: accuracy.add_truth(
        as_rows(interpreter.explain(by_latent)), by_latent, truth
    ),
)  # fmt: skip
explained = [n for n, row in explanations.items() if row["concept"]]
refused = [n for n in explanations if n not in explained]

# %% mystnb={"figure": {"caption": "Explained latents, every so many (Figure 2), with the concept that the explainer names.", "name": "fig-explained"}, "image": {"alt": "Four explained latents with five images each, the activation over them and masked."}}
four = explained[:: max(1, len(explained) // 4)][:4]
titles = {n: f"latent {n}: {explanations[n]['concept']}" for n in four}
plots.exemplar_strip([(titles[n], by_latent[n]) for n in four]);
# %% mystnb={"figure": {"caption": "Latents without an explanation, and the outcome.", "name": "fig-refused"}, "image": {"alt": "Three latents that the explainer refused, with five images each."}}
three = refused[len(refused) // 6 :: max(1, len(refused) // 3)][:3]
titles = {n: f"latent {n}: {explanations[n]['outcome']}" for n in three}
plots.exemplar_strip([(titles[n], by_latent[n]) for n in three]);
# %% [markdown]
# The answers for a few latents, beside what their images really show:

# %%
columns = ("outcome", "answer", "true_concept", "true_iou", "responds_to")
plots.table([
    {"latent": n} | {name: explanations[n].get(name) for name in columns}
    for n in explained[:6] + refused[:4]
])  # fmt: skip

# %% [markdown]
# ## Is every concept of the world found?
#
# Accuracy says how many names are right. It does not say which concepts were
# missed. So we also go the other way. For each concept we look for *detectors*:
# latents that are active where the concept is, and nowhere else. We choose
# latent and threshold on the cached scenes, by F1 over patches. We measure F1
# on held-out scenes. A latent with F1 above 0.5 detects the concept, and the
# explainer is asked about it, too.

# %%
recall = {}
if truth:
    unlearned = load_from_disk(page.locate(heldout))
    detection = stage.result(
        "detectors", Detection,
        lambda: detect_concepts(
            SAEInPlace.load(page.locate(model), page.file("train"), layer),
            cache, truth, open_images(page.locate(heldout)),
            LabelMaps(unlearned, page.locate(concepts)),
        ),
    )  # fmt: skip
    detecting = stage.result(
        "detector_explanations", dict[int, dict],
        lambda: as_rows(
            interpreter.explain(by_latent.only(detection.latents()))
        ),
    )  # fmt: skip
    given = {n: row["concept"] for n, row in detecting.items()}
    recall = recall_metrics(detection, given)

# %% mystnb={"figure": {"caption": "The concepts that the held-out scenes show, by kind: those with a detector that carries their name, those with a detector of another name, and those without a detector.", "name": "fig-recall"}, "image": {"alt": "A bar for each kind of concept, divided into named, detected and not detected."}}
if truth:
    plots.stacked(recall_by_kind(detection, given), "concepts");

# %% [markdown]
# ## The metrics
#
# The embedded explainer was trained to name masked scenes. Some of the masks
# came from latents of this same SAE, on other scenes (`taught.json` beside the
# explainer lists these latents). Metrics that end in `_unseen` are of the
# other latents alone.

# %%
in_training = latents_in_training(
    page.root / explainer["model"], page.file("train")
)
metrics = stage.finish(
    accuracy.outcome_metrics(explanations)
    | accuracy.accuracy_metrics(explanations)
    | accuracy.unseen_metrics(explanations, in_training)
    | recall
    | {"replies_failed": interpreter.failed}
)
metrics_table(stage)

# %% [markdown]
# By hand, the accuracy is the fraction of equal names:

# %%
if truth and explained:
    rows = [explanations[n] for n in explained]
    right = [row["concept"] == row["true_concept"] for row in rows]
    assert np.mean(right) == metrics["concept_accuracy"]

# %% [markdown]
# ## Where it goes wrong

# %% mystnb={"figure": {"caption": "Which kinds the explainer confuses. Rows: the kind of the concept that the images show. Columns: the kind of the name, or the outcome.", "name": "fig-confusion"}, "image": {"alt": "A table of counts: true kind of concept against given kind or outcome."}}
if truth:
    counts = accuracy.kinds_given(explanations)
    plots.cross_table(counts, "explained as", "really shows");

# %% [markdown]
# The explainer's reply has a probability, the product over its tokens: its
# *confidence*. An explanation below `least_confidence` counts as refused. This
# is the accuracy that other limits would give: strict limits on the left, no
# limit on the right.

# %% mystnb={"figure": {"caption": "Accuracy of the names over the fraction of latents that get one, for every limit of confidence. Dashed: the limit of this run.", "name": "fig-confidence"}, "image": {"alt": "A curve of accuracy over the fraction of explained latents."}}
if truth:
    limits = accuracy.accuracy_by_confidence(
        explanations, interpreter.refine
    )
    if limits:
        ax = plots.curve(limits, "concept_accuracy", "explained_fraction")
        ax.axvline(metrics["explained_fraction"], color="0.5", ls="--")
        ax.set(
            xlabel="fraction of the latents that get a name",
            ylabel="fraction of right names", ylim=(0, 1.02),
        )

# %% [markdown]
# Which latents are refused? Label maps and positions tell what a latent
# responds to. *One concept*: its images have a concept in common. *A detail*:
# they do, but the patches are a small part of it. *A place*: the same part of
# every image. *Edges*: a border runs through the patches. *Several concepts*:
# at most three account for four images in five.

# %% mystnb={"figure": {"caption": "What the latents respond to, by outcome. A latent that responds to one concept and is not explained was missed.", "name": "fig-responses"}, "image": {"alt": "A bar for each outcome, divided by what the latents respond to."}}
if truth:
    responses = {}
    for row in explanations.values():
        counts = responses.setdefault(row["outcome"], Counter())
        counts[row["responds_to"]] += 1
    plots.stacked(responses, "latents");

# %% [markdown]
# ## What we found

# %% tags=["remove-input"]
sentences = [
    f"The explainer names {metrics['explained']:,} of {metrics['asked']:,} "
    f"latents ({metrics['explained_fraction']:.0%}) and refuses "
    f"{metrics['refused']:,}."
]
if truth and explained:
    sentences += [
        f"{metrics['concept_accuracy']:.0%} of the names are the concept that "
        f"the images show. {metrics['concept_common']:.0%} are at least one "
        "of the concepts that they have in common.",
        f"{metrics['answerable_fraction']:.0%} of the latents have a concept "
        "in common. No explainer can rightly name more.",
        f"Of {metrics['concepts_present']} concepts in the held-out scenes, "
        f"{metrics['concepts_detected']:.0%} have a latent that detects them, "
        f"{metrics['concept_recall']:.0%} one that also carries their name.",
    ]
if "refusal_precision" in metrics:
    sentences.append(
        f"{metrics['refusal_precision']:.0%} of the refusals are right: these "
        "images have no concept in common."
    )
if "concept_accuracy_unseen" in metrics:
    sentences.append(
        f"Of the names for the {metrics['asked_unseen']} latents that the "
        "explainer was not trained on, "
        f"{metrics['concept_accuracy_unseen']:.0%} are right."
    )
findings(*sentences)

# %% [markdown]
# **Limits.** One SAE, one explainer, and one rule of what images have in
# common. A latent that responds to several things, to a place or to an edge is
# rightly refused. Without label maps, as for photographs, accuracy, recall and
# their figures are left out. Notebook 04 scores what was explained.

# %% tags=["result", "remove-input"]
correct = ""
if "concept_accuracy" in metrics:
    correct = f"; {metrics['concept_accuracy']:.0%} of the names are right"
headline(
    page,
    f"the explainer names {metrics['explained_fraction']:.0%} of "
    f"{metrics['asked']:,} live latents{correct}.",
    "it explains 5,000 latents and does not report how many were refused; "
    "two people agree with 75% of the names, GPT-4o with 89% (Table 2).",
    "label maps decide here, people and GPT-4o there; and Picture World has "
    "a few hundred concepts, which its explainer was trained to name.",
)

# %% tags=["remove-input"]
provenance(page, stage)
