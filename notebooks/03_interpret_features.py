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
# **The question.** Section 2.2: can a multimodal model look at what excites a latent and name what it stands for?
#
# **You will learn** what an explainer is shown, how it answers or refuses, and, what photographs cannot tell, whether it is
# right: of the latents that it explains, of those that it refuses, and of every concept of the world.
#
# **Reads** `cache/` and its images, `train/` where there is a ground truth. **Writes** `interpret/`: what became of each asked
# latent (explained, refused, unparseable or failed), the replies as they came, and `metrics.json`.
#
# | preset | explainer | latents | time |
# |---|---|---|---|
# | `tiny` | Picture World explainer, shipped | all live latents, about 1,000 | 3 minutes, 2 cores |
# | `paper` | LLaVA-OneVision-72B behind an endpoint | 5,000 | GPUs |

# %% tags=["parameters"]
run: str = "tiny"  # results go to data/artifacts/<run>/
model: str = "data/models/tiny-llava-next"  # the model under study: a folder of this project, or a name on the hub
layer: int = 1  # 0-based, the layer that the SAE was trained on
images: str = "data/artifacts/tiny/world/cache"  # the images that were cached
heldout: str = "data/artifacts/tiny/world/heldout"  # scenes with label maps on which detecting latents are measured
concepts: str = "data/artifacts/tiny/world/concepts.json"  # names of the ground truth's concepts; "": there is no truth
explainer: str = "data/models/tiny-explainer"  # a folder, a name on the hub, or name@http://host:port/v1, an endpoint
prompt: str = "what do these images have in common ?"  # {images} says where they stand; they come first without it
tag: str = ""  # what the explanation stands behind in the reply; "": all of it
refiner: str = ""  # a language model, named likewise, that shortens explanations; "": the vocabulary of `concepts`
labeller: str = ""  # a language model that gives a concept its kind; "": the vocabulary of `concepts`
key_variable: str = ""  # the environment variable with the endpoints' key; "": they want none
n_explained: int = 1024  # live latents, at random if there are more
n_top: int = 5  # exemplars shown for each
threshold: float = 0.25  # a patch is visible above this share of its image's highest activation
dim: float = 0.0  # brightness that the other patches keep; the reference code: 0.12
batch_size: int = 4  # questions at once, to a model in this process
concurrency: int = 8  # questions under way at once, to an endpoint
timeout: float = 120.0  # seconds that an endpoint's answer may take
max_new_tokens: int = 16  # of an answer
least_confidence: float = 0.55  # an explanation to which the explainer itself gives a lower probability counts as refused
seed: int = 0  # of the choice of latents

# %% tags=["remove-cell"]
import time
from functools import partial

import numpy as np
from datasets import load_from_disk

from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.chat.recorded import Recorded, open_chat
from lmm_sae_nb.interpret import explain, explainers
from lmm_sae_nb.interpret.exemplars import ExemplarsByLatent
from lmm_sae_nb.interpret.explain import as_rows, explain_latents, latents_in_training
from lmm_sae_nb.interpret.explainers import REFUSAL, Vocabulary
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.show import plots
from lmm_sae_nb.support.files import project_root, read_json, write_json
from lmm_sae_nb.support.images import Remembered, open_images
from lmm_sae_nb.support.stages import Stage, require
from lmm_sae_nb.truth import accuracy, detectors, label_maps
from lmm_sae_nb.truth.label_maps import LabelMaps

root = project_root()
plots.style()

# %%
cache = LatentCache.load(require(run, "cache", "manifest.json", "02_cache_activations.py").parent)
pictures = Remembered(open_images(root / images))
truth = label_maps.PatchTruth(LabelMaps(load_from_disk(root / images), root / concepts), cache.grid) if concepts else None
live = np.flatnonzero(np.asarray(cache.live))
chosen = np.sort(np.random.default_rng(seed).choice(live, min(n_explained, len(live)), replace=False)).tolist()
shown = ExemplarsByLatent(cache, pictures, chosen, n_top=n_top, threshold=threshold, dim=dim)
print(f"{len(live)} live latents, {len(chosen)} of them are asked about")

# %% [markdown]
# ## What the explainer is shown
#
# > "We apply masks to the top activated images, using transparent masks for the most activated patches and black masks for
# > the rest. These masked images are then input into LLaVA-NeXT-OV-72B to detect common patterns. If no common patterns are
# > discernible, the system will return a message stating 'unable to produce explanations'."
#
# All of a latent's masked images go into one question. The question, after them:

# %%
print(prompt)

# %% [markdown]
# Every reply is on the disk before the next one is waited for: a run that is stopped, or killed, goes on where it was. What
# was said comes to one of four outcomes, and only what is explained is ever scored. An answer becomes a short concept, and
# the concept a kind of Table 1, by a second model or, where every name of the world is known, by looking it up.

# %%
stage, code = Stage(run, "interpret"), [explainers, explain, accuracy]
params = dict(
    model=model, layer=layer, images=images, heldout=heldout, concepts=concepts, explainer=explainer, prompt=prompt, tag=tag,
    refiner=refiner, labeller=labeller, n_explained=n_explained, n_top=n_top, threshold=threshold, dim=dim,
    max_new_tokens=max_new_tokens, least_confidence=least_confidence, seed=seed,
)  # fmt: skip
read = [explainer, refiner, labeller, *([model, concepts, heldout] if concepts else [])]
inputs = [root / name for name in dict.fromkeys(read) if name and (root / name).exists()]
inputs += [Stage(run, "cache").path("manifest.json")]
current = stage.is_current(params, inputs, code)
vocabulary = Vocabulary(root / concepts) if concepts else None
by = {"explainer": explainer, "refiner": refiner or (vocabulary and vocabulary.name) or "nobody",
      "labeller": labeller or (vocabulary and vocabulary.name) or "nobody"}  # fmt: skip
print(by)

# %%
if not current:
    started = time.monotonic()
    how = dict(key_variable=key_variable, concurrency=concurrency, timeout=timeout, batch_size=batch_size)
    how |= dict(max_new_tokens=max_new_tokens)
    talk = {who: Recorded(open_chat(who, confidence=who == explainer and least_confidence > 0, **how), stage.path("replies.jsonl"))
            for who in {explainer, refiner, labeller} - {""}}  # fmt: skip
    refine = explainers.refiner(talk[refiner]) if refiner else vocabulary.refine if vocabulary else explainers.no_refiner
    label = explainers.labeller(talk[labeller]) if labeller else vocabulary.label if vocabulary else explainers.no_labeller
    ask = partial(explain_latents, explain=explainers.explainer(talk[explainer], prompt, tag=tag, least_confidence=least_confidence), refine=refine, label=label)
    rows = as_rows(ask(shown))
    metrics = accuracy.counted(rows)
    if truth:
        rows = accuracy.with_truth(rows, shown, truth)
        metrics |= accuracy.judged(rows) | accuracy.untaught(rows, latents_in_training(root / explainer, Stage(run, "train").folder))
    write_json(stage.path("explanations.json"), rows)

# %% [markdown]
# ## Every concept of the world
#
# A random sample of latents cannot tell whether a concept was missed. So, the other way round: for each concept the latents
# that fire where it is and nowhere else. Which they are, and above which activation they count as firing, is chosen on the
# cached scenes and measured by F1 on scenes that nothing has seen; those above 0.5 detect it, and are explained as well.
# They stay apart from the random sample.

# %%
if truth and not current:
    lmm = LMM.load(root / model if (root / model).is_dir() else model)
    sae = TopKSAE.load(require(run, "train", "sae.safetensors", "01_train_sae.py").parent)
    unseen = label_maps.PatchTruth(LabelMaps(load_from_disk(root / heldout), root / concepts), cache.grid)
    candidates = detectors.choose_detectors(cache, truth)
    found, present = detectors.measure_detectors(SAEInPlace(lmm, sae, layer), open_images(root / heldout), unseen, candidates)
    detecting = sorted({one.latent for one in found if one.f1 > 0.5})
    told = ask(shown.only(detecting))
    named = {latent: its.concept for latent, its in told.items()}
    metrics |= detectors.recalled(found, present, named)
    kept = [one._asdict() | {"explained": named.get(one.latent)} for one in found]
    write_json(stage.path("detectors.json"), {"detectors": kept, "explanations": as_rows(told)})
if not current:
    metrics["replies_failed"] = sum(chat.failed for chat in talk.values())  # the next run asks for them again
    stage.finish(params, inputs, metrics, time.monotonic() - started, code)
explanations, metrics = (read_json(stage.path(name)) for name in ("explanations.json", "metrics.json"))
metrics

# %% [markdown]
# `concept_accuracy` is the share of explained latents whose explanation is the concept that their visible patches really
# show; `refusal_precision` the share of refusals where the truth says that they have nothing in common;
# `answerable_fraction` the share of all that have, which bounds what can be explained rightly; `concept_recall` the share of
# the world's concepts that a latent detects which was given its very name. Without ground truth they are left out. The
# embedded explainer learned to name masked pictures, other pictures than these, in part from the masks of latents of the SAE of
# the preset `tiny` (`taught.json` beside it says which); what ends in `_untaught` is of those alone that it did not learn from.

# %% mystnb={"figure": {"caption": "Explained latents, at random (Figure 2): above, the five images with the activation laid over them; below, masked as the explainer sees them.", "name": "fig-explained"}}
named = [latent for latent in chosen if explanations[str(latent)]["outcome"] == "explained"]
plots.exemplar_strip(
    [(f"latent {n}: {explanations[str(n)]['concept']}", shown[n]) for n in named[:: max(1, len(named) // 6)][:6]]
);
# %% mystnb={"figure": {"caption": "Latents that the explainer refused.", "name": "fig-refused"}}
refused = [latent for latent in chosen if explanations[str(latent)]["outcome"] == "refused"]
plots.exemplar_strip([(f"latent {n}: {REFUSAL}", shown[n]) for n in refused[:: max(1, len(refused) // 3)][:3]]);
# %% [markdown]
# What a few of them were called, beside what they really show:

# %%
for latent in named[:8] + refused[:4]:
    row = explanations[str(latent)]
    true = f"truth: {row['true_concept']} ({row['true_kind']}, IoU {row['true_iou']:.2f})" if truth else ""
    print(f"{latent:6d}  {row['outcome']:12s} {row['answer'][:60]!r:40s} {true}")

# %% [markdown]
# ## Where it goes wrong
#
# The kind of concept that a latent really shows, against the kind that it was given.

# %% mystnb={"figure": {"caption": "Which kinds the explainer confuses: the kind of the true concept (rows, nothing where the exemplars have none in common) and what the latent was given.", "name": "fig-confusion"}}
if truth:
    plots.cross_table(accuracy.confusion(explanations), "explained as", "really shows")

# %% [markdown]
# How sure the explainer is of what it says tells right names from wrong ones. Its reply has a probability, the product of its
# tokens' (`sureness`); below `least_confidence` an explanation counts as refused. What other limits would give, from the surest
# latent on the left to all of them on the right:

# %% mystnb={"figure": {"caption": "The share of names that are right, over the share of latents that have one, for every limit of sureness; the dashed line is at the limit that was set.", "name": "fig-sureness"}}
by_limit = accuracy.coverage(explanations, vocabulary.refine) if truth else []
if by_limit:
    ax = plots.curve(by_limit, "concept_accuracy", "explained_fraction")
    ax.axvline(metrics["explained_fraction"], color="0.5", lw=1, ls="--")
    ax.set(ylim=(0, 1.02));

# %% [markdown]
# What the latents that were not explained respond to, from label maps and positions (`truth.responds_to`): *one concept* was
# missed; *a detail* is a small part of one; *a place* is the same part of every image; *edges* are patches through which the
# border of something runs; *several concepts* are at most three that account for four images in five.

# %%
for name, value in metrics.items():
    if name.startswith("unexplained_"):
        print(f"{name.removeprefix('unexplained_').replace('_', ' '):18s} {value:4d}")
if not truth:
    print("There is no ground truth for these images: accuracy, recall and the tables above are left out.")

# %% [markdown]
# ## What we found
#
# The numbers are printed above and gathered on the [results page](../results). They hold for this SAE, this explainer and
# this rule of what images have in common: a concept that most of them show in half of their visible patches. A
# latent that answers to several things, to a place or to an edge is rightly refused. Notebook 04 scores what was explained.

# %% tags=["hide-input"]
manifest = read_json(stage.path("manifest.json"))
print(f"run {run} · {by} · seed {seed} · {manifest['seconds']:.0f} s · {manifest['versions']}")
