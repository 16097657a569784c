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
# # 3. Let another model say what each latent means
#
# **The question** (section 2.2). Can a multimodal model look at the images
# that excite a latent, and name what the latent stands for?
#
# **You will learn** what an explainer sees, and how it answers or refuses. You
# will also see what photographs cannot show: whether the names are true.
#
# **Reads** the cache of notebook 02 and its images; where there is a ground
# truth, also the SAE of notebook 01. **Writes** the stage `interpret`: the
# outcome and the concept of each latent, the replies, and the metrics.
#
# | preset | explainer | latents | time |
# |---|---|---|---|
# | `tiny` | Picture World's, part of this project | about 1,000 | 2 minutes, one core |
# | `small` | Qwen2.5-VL-3B | 500 | never run |
# | `paper` | LLaVA-OneVision-72B, an endpoint | 5,000 | never run |

# %% tags=["parameters"]
# results go to data/artifacts/<run>/
run: str = "tiny"
# the model under study: a folder of this project, or a name on the hub
model: str = "data/models/tiny-llava-next"
# how the model under study is loaded
loading: dict = {
    "dtype": "float32",  # "bfloat16" halves the memory and rounds more
    "device": "",  # such as "cuda:1" or "cpu"; "": a GPU if there is one
    "device_map": "",  # "auto": over all GPUs, if one is too small
    "image_size": [],  # [width, height] that images get; []: their own
}
# counted from 0; the layer that the SAE was trained on.
# Or another hookpoint, such as "decoder.1.mlp" (see Your own LMM)
layer: "int or str" = 1
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
    # fields of a request to add, or with None to leave out, such as
    # {"chat_template_kwargs": {"enable_thinking": False}}
    "extra": {},
}
n_explained: int = 1024  # latents, at most: those that are live
# which of them, if there are more
asked: dict = {
    # "random"; "most active", by the mean activation over all images; or
    # "images": the most active on the images given here
    "by": "random",
    # for "images": rows of `images`, or files, as [17, "pictures/a.png"]
    "images": [],
}
n_top: int = 5  # exemplars of a latent
# a patch is visible above this fraction, from 0 to 1, of its image's
# highest activation
threshold: float = 0.25
# brightness of the other patches, from 0 to 1; reference code: 0.12
dim: float = 0.0
seed: int = 0  # of the choice of latents
# the same page for other SAEs, which differ in their seed; "": none. It is
# left out where notebook 01 has another recipe
seeds_study: str = "book/seeds.json"
# the same metrics of control SAEs (A4); "" or another recipe: none
panel: str = "book/panel.json"

# %% tags=["remove-cell"]
from collections import Counter

import numpy as np
from datasets import load_from_disk

from lmm_sae_nb import LatentCache, SAEInPlace, open_images
from lmm_sae_nb.interpret.choice import choose_latents
from lmm_sae_nb.interpret.exemplars import ExemplarsByLatent, upsample
from lmm_sae_nb.interpret.explain import (
    ExplanationRows,
    as_rows,
    latents_in_training,
)
from lmm_sae_nb.interpret.open import open_interpreter
from lmm_sae_nb.show import plots
from lmm_sae_nb.show.markup import as_text
from lmm_sae_nb.show.name_sentences import (
    name_findings,
    name_result,
    names_of_others,
)
from lmm_sae_nb.show.panel import read_panel
from lmm_sae_nb.show.report import (
    findings,
    headline,
    metrics_table,
    percent,
    provenance,
)
from lmm_sae_nb.show.seed_study import read_study
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
# active somewhere in the cache. The parameter `asked` says which, if there are
# more than `n_explained`: random ones, the most active, or those that are most
# active on images of your choice. The metrics below speak for the whole SAE only
# if the choice is random.

# %%
cache = LatentCache.load(page.file("cache"))
pictures = Remembered(open_images(page.locate(images)))
chosen = choose_latents(
    cache, pictures, n_explained, asked, seed=seed,
    load=lambda: SAEInPlace.load(
        page.locate(model), page.file("train"), layer, **loading
    ),
)  # fmt: skip
by_latent = ExemplarsByLatent(
    cache, pictures, chosen.tolist(),
    n_top=n_top, threshold=threshold, dim=dim,
)  # fmt: skip
live = int(cache.live.sum())
print(f"{live:,} live latents; we ask about {len(chosen):,}")

# %% [markdown]
# The masks of one exemplar in plain NumPy:

# %%
first = by_latent[chosen[0]][0]
if cache.grid:
    visible = first.activation > threshold * first.activation.max()
    hidden = ~upsample(visible, first.image.size)
    expected = dim * np.asarray(first.image)[hidden]
    assert (abs(np.asarray(first.masked)[hidden] - expected) <= 0.5).all()

# %% mystnb={"figure": {"caption": "The exemplars of two latents, and what the explainer sees of them. Yellow: strongest, violet: weak, grey: not active, scaled per image. The lower row shows only the patches above 25% of the image's maximum.", "name": "fig-exemplars"}, "image": {"alt": "Two latents with five images each, once with the activation over them and once with all but the active patches black."}}
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
# it. A *refiner* shortens the answer to a concept. A *labeller* gives the
# concept a kind: those of Table 1, and faces and words. In the preset `tiny`,
# both look names up in the world's vocabulary and need no model.
#
# The explainer's reply has a probability, the product over its tokens: its
# *confidence*. Each latent has one of four outcomes:
#
# - *Explained*: it has a concept.
# - *Refused*: the explainer says that it cannot explain, or its confidence is
#   below `least_confidence`.
# - *Unparseable*: no concept can be read from the answer.
# - *Failed*: there is no answer.
#
# We chose the limit of 0.55 with an earlier explainer, on 600 random latents.
# It was the lowest limit at which 86% of the names were right, a little more
# than our target of 85%. The other 424 latents had no part in this choice;
# 89% of their names were right ([lab notebook](../lab_notebook)). In the
# presets `small` and `paper` there is no limit.
#
# Each reply is saved at once. If you stop the page and run it again, it goes
# on where it was. We cut off what a model thinks aloud (`<think>`) before we
# read its answer. The metrics that begin with `replies_` count what was wrong
# with replies.
#
# In your own preset, `explainer` names the model and gives its question. For
# a model behind an endpoint, `endpoint` says how it is asked.

# %%
stage = page.stage(
    "interpret", after=("train", "cache"),
    without=(
        "endpoint.key_variable", "endpoint.concurrency",
        "endpoint.timeout", "seeds_study", "panel",
    ),
)  # fmt: skip
interpreter = open_interpreter(
    explainer, refiner, labeller, endpoint,
    concepts=concepts, replies=stage.path("replies.jsonl"),
)  # fmt: skip
interpreter.models

# %% [markdown]
# Label maps decide the true concept. Without them, the page leaves out what
# follows about truth. The true concept must cover at least half of the visible
# patches in at least three of the five images. If several concepts do, we take
# the one of highest IoU (intersection over union with these patches). We first
# multiply the IoU by 2 for words, because letters are thinner than their sign.
# For textures and materials we multiply by 1.25. For colours we multiply by
# 0.5, because every thing has a colour. Without this weight, the IoU must be at
# least 0.1.
#
# The explainer was trained with this same rule. So the accuracy says how well
# it learned the rule.

# %%
truth = None
if concepts:
    labelled = load_from_disk(page.locate(images))
    truth = LabelMaps(labelled, page.locate(concepts))
explanations = stage.result(
    "explanations", ExplanationRows,
    lambda: accuracy.add_truth(
        as_rows(interpreter.explain(by_latent)), by_latent, truth
    ),
)  # fmt: skip
replies = stage.result(
    "reply_counts", dict[str, int], lambda: interpreter.counts
)
explained = [n for n, row in explanations.items() if row["concept"]]
refused = [n for n in explanations if n not in explained]

# %%
def title(latent: int) -> str:
    row = explanations[latent]
    text = f"latent {latent}: {row['concept'] or row['outcome']}"
    true = row.get("true_concept") or "nothing in common"
    return f"{text} (true: {true})" if truth else text


# %% mystnb={"figure": {"caption": "Explained latents (Figure 2), evenly spaced by number, with the name that the explainer gives. A scene covers its whole image, so sky can stand for 'meadow'. Yellow: strongest, violet: weak, grey: not active, scaled per image. The lower row shows only the patches above 25% of the image's maximum.", "name": "fig-explained"}, "image": {"alt": "Four explained latents with five images each, the activation over them and masked."}}
four = explained[:: max(1, len(explained) // 4)][:4]
plots.exemplar_strip([(title(n), by_latent[n]) for n in four]);
# %% mystnb={"figure": {"caption": "Latents without an explanation, evenly spaced by number, with the outcome. Yellow: strongest, violet: weak, grey: not active, scaled per image. The lower row shows only the patches above 25% of the image's maximum.", "name": "fig-refused"}, "image": {"alt": "Three latents that the explainer refused, with five images each."}}
three = refused[len(refused) // 6 :: max(1, len(refused) // 3)][:3]
plots.exemplar_strip([(title(n), by_latent[n]) for n in three]);
# %% [markdown]
# The next table shows the answers for a few latents, and what their images
# really show. `true_iou` is the IoU of the true concept with the visible
# patches; it is 0 if there is none. `responds_to` is the first of these that
# holds:
#
# - *One concept*: there is a true concept.
# - *A detail*: a concept covers half of the visible patches, but these are a
#   small part of it (IoU below 0.1). A detail counts as nothing in common.
# - *A place*: the visible patches of two images have a mean IoU of 0.3 or more.
# - *Edges*: a border runs through at least half of the visible patches.
# - *Several concepts*: at most three account for four images in five.
# - *None of these*.

# %%
columns = (
    "outcome", "answer", "confidence", "true_concept", "true_iou",
    "responds_to",
)  # fmt: skip
plots.table([
    {"latent": n} | {name: explanations[n].get(name) for name in columns}
    for n in explained[:6] + refused[:4]
])  # fmt: skip

# %% [markdown]
# How easily does the rule find a true concept? As a control, we put the masks
# of each latent on random other images. There, no concept should be in common.

# %%
by_chance = {}
if truth:
    by_chance = stage.result(
        "true_by_chance", dict[int, str | None],
        lambda: accuracy.concepts_by_chance(
            by_latent, truth, cache.images, seed
        ),
    )  # fmt: skip

# %% tags=["remove-input"]
if truth:
    count = Counter(name for name in by_chance.values() if name)
    own = [row["true_concept"] for row in explanations.values()]
    hits = sum(
        name is not None and name == explanations[n]["true_concept"]
        for n, name in by_chance.items()
    )
    findings(
        "The rule finds a true concept for "
        f"{len(own) - own.count(None):,} latents. With the same masks on "
        f"random images, it finds one for {count.total():,}. The most "
        "frequent of these are "
        f"{', '.join(as_text(n) for n, _ in count.most_common(3))}. "
        f"For {hits:,} latents it is the concept of their own images."
    )

# %% [markdown]
# So masks alone often meet the rule, mostly with colours of large areas, such
# as a blue sky. They rarely meet it with the *same* concept.

# %% [markdown]
# ## Is every concept of the world found?
#
# Accuracy says how many names are right. It does not say which concepts were
# missed. So we also go the other way. For each concept we look for *detectors*:
# latents whose activation best predicts the concept (F1 over patches: the
# harmonic mean of precision and recall). We choose latent and threshold on the
# cached scenes, and measure F1 on held-out scenes. A latent with F1 above 0.5
# detects the concept. We ask the explainer about every detector, also about
# those that were not drawn above.
#
# A frequent concept gets a high F1 from a latent that is often active. So there
# is a control: each scene gets the label map of another scene, both when we
# choose latents and when we measure them.

# %%
recall = {}
if truth:
    unlearned = load_from_disk(page.locate(heldout))
    detection = stage.result(
        "detectors", Detection,
        lambda: detect_concepts(
            SAEInPlace.load(
                page.locate(model), page.file("train"), layer, **loading
            ),
            cache, truth, open_images(page.locate(heldout)),
            LabelMaps(unlearned, page.locate(concepts)),
        ),
    )  # fmt: skip
    detecting = stage.result(
        "detector_explanations", ExplanationRows,
        lambda: as_rows(
            interpreter.explain(by_latent.only(detection.latents()))
        ),
    )  # fmt: skip
    given = {n: row["concept"] for n, row in detecting.items()}
    recall = recall_metrics(detection, given)

# %% mystnb={"figure": {"caption": "The concepts that the held-out scenes show, by kind. Some have a detector that carries their name, some a detector with another name or with none, and some no detector.", "name": "fig-recall"}, "image": {"alt": "A bar for each kind of concept, divided into named, detected and not detected."}}
if truth:
    plots.stacked(recall_by_kind(detection, given), "concepts");

# %% [markdown]
# ## The metrics
#
# The embedded explainer was trained to name masked scenes. Many of the masks
# came from latents of an SAE, on other scenes (`taught.json` beside the
# explainer says which). That SAE had an earlier training than today's of page
# 01. If this run's SAE is that one, there are metrics that end in `_unseen`.
# They are of the latents whose masks were no lessons.
#
# There are two controls for the names, both from latents of the same kind if
# possible. `concept_accuracy_shuffled` gives each latent *another name*, which
# is always a different one, as on page 04. It can only be right where the
# latent's own name is wrong. `concept_accuracy_guessed` gives it the name of a
# random latent, which may be the same name. This guess knows how frequent a
# name is, so it is the harder control.

# %% tags=["hide-output"]
in_training = latents_in_training(
    page.root / explainer["model"], page.file("train")
)
limit = explainer["least_confidence"]
metrics = stage.finish(
    accuracy.outcome_metrics(explanations, limit)
    | accuracy.accuracy_metrics(explanations, seed)
    | accuracy.unseen_metrics(explanations, in_training, seed)
    | accuracy.chance_metrics(by_chance)
    | recall
    | replies
    | {"replies_failed": replies["replies_failed"] or interpreter.failed}
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

# %% mystnb={"figure": {"caption": "Which kinds the explainer confuses. Rows: the kind of the true concept. Columns: the kind of the name, or the outcome. Colour: fraction of the row. Right kinds and right refusals are on the diagonal. A right kind is not always a right name.", "name": "fig-confusion"}, "image": {"alt": "A table of counts: true kind of concept against given kind or outcome."}}
if truth:
    counts = accuracy.kinds_given(explanations)
    plots.cross_table(counts, "explained as", "true kind");

# %% tags=["remove-input"]
if truth:
    missed = {
        kind: (row.get("refused", 0), sum(row.values()))
        for kind, row in counts.items() if kind != "nothing in common"
    }
    kind, (lost, of) = max(missed.items(), key=lambda item: item[1][0])
    findings(
        f"Most latents that the explainer refuses though they have a true "
        f"concept are of the kind {as_text(kind)}: {lost} of {of}."
    )

# %% [markdown]
# This is the accuracy that other limits of confidence would give: high limits
# on the left, no limit on the right.

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

# %% tags=["remove-input"]
if truth and limits:
    last = limits[-1]
    findings(
        f"Without a limit, {percent(last['explained_fraction'])} of the "
        f"latents would get a name, and {percent(last['concept_accuracy'])} "
        "of these names would be right."
    )

# %% [markdown]
# Which latents are refused? The next figure counts what they respond to, in
# the words of the list above. A refusal is right if the latent does not respond
# to one concept; a detail counts as nothing in common.

# %% mystnb={"figure": {"caption": "What the latents respond to, by outcome. A latent that responds to one concept and is not explained was missed.", "name": "fig-responses"}, "image": {"alt": "A bar for each outcome, divided by what the latents respond to."}}
if truth:
    responses = {}
    for row in explanations.values():
        counts = responses.setdefault(row["outcome"], Counter())
        counts[row["responds_to"]] += 1
    plots.stacked(responses, "latents");
# %% tags=["remove-input"]
if truth and "refused" in responses:
    (most, n), *_ = responses["refused"].most_common(1)
    findings(
        f"Of {responses['refused'].total()} refused latents, {n} respond to: "
        f"{most}."
    )


# %% [markdown]
# ## Other SAEs
#
# The intervals above say how much the choice of latents matters. They do not
# say how much the choice of the SAE matters. So this page ran for several
# SAEs that differ only in the seed of notebook 01
# (`python -m lmm_sae_nb.benchmarks seeds`). The explainer learned from none of
# them, but from an SAE that began with the same weights as seed 0. The names of
# seed 0 are not right more often than the others' ([lab notebook](../lab_notebook)).

# %% mystnb={"figure": {"caption": "The same page for several SAEs that differ only in their seed (grey), with their median (black), and this page's SAE (blue).", "name": "fig-interpret-seeds"}, "image": {"alt": "A row for each metric with a dot for each SAE."}}
study = read_study(page.locate(seeds_study), page)
of_all = {
    "explained_fraction": "latents that get a name",
    "concept_accuracy": "names that are the true concept",
    "concept_accuracy_guessed": "control: guessed names",
    "concept_recall": "concepts that a latent detects and names",
}
plots.other_saes(study, stage, of_all, "fraction");
# %% [markdown]
# ## What we found

# %% tags=["remove-input"]
all_panel = read_panel(page.locate(panel), page)
findings(
    *name_findings(metrics),
    *names_of_others(study, all_panel, of_all),
)

# %% [markdown]
# **Limits.** One explainer, and one rule of what images have in
# common. The rule counts a detail as nothing in common, so a name for a detail
# is wrong, and its refusal is right. A latent that responds to several things,
# to a place or to an edge is rightly refused, too. The limit of confidence was
# chosen on 600 latents of an earlier SAE, with an earlier explainer. Without
# label maps, as for photographs, accuracy, recall and their figures are left
# out. Notebook 04 scores what was explained.

# %% tags=["result", "remove-input"]
headline(
    page,
    *name_result(metrics, study, all_panel),
)

# %% tags=["remove-input"]
provenance(page, stage)
