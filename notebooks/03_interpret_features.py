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
# # 3. Let a model say what each latent means
#
# **The question.** Section 2.2: can a multimodal model look at what excites a latent and name what it stands for?
#
# **You will learn** what an explainer is shown, how it answers, and, what photographs cannot tell, whether it is right.
#
# **Reads** `cache/` and its images. **Writes** `interpret/`: an explanation, or a refusal, for each asked latent.
#
# | preset | explainer | latents | time |
# |---|---|---|---|
# | `tiny` | the embedded LMM itself, one masked image at a time | 240 live latents at random | 3 minutes, 2 cores |
# | `paper` | LLaVA-OneVision-72B, five masked images at once | 5,000 | GPUs |

# %% tags=["parameters"]
run: str = "tiny"  # results go to data/artifacts/<run>/
model: str = "data/models/tiny-llava-next"  # the model that is asked: a folder of this project, or a name on the hub
images: str = "data/artifacts/tiny/world/cache"  # the images that were cached
concepts: str = "data/artifacts/tiny/world/concepts.json"  # names of the ground truth's concepts
n_explained: int = 240  # live latents at random
n_top: int = 5  # exemplars shown for each
share: float = 0.25  # a patch is visible above this share of its image's highest activation
agree: int = 4  # exemplars whose answers must agree
questions: list = ["what is shown ?", "what colour is shown ?"]  # asked of every exemplar, in this order
seed: int = 0  # of the choice of latents

# %% tags=["remove-cell"]
import time

import numpy as np
from datasets import load_from_disk

from lmm_sae_nb import explain, plots, score
from lmm_sae_nb.artifacts import Stage, project_root, read_json, require, write_json
from lmm_sae_nb.cache import LatentCache
from lmm_sae_nb.explain import REFUSAL, ask_each, exemplars
from lmm_sae_nb.images import open_images
from lmm_sae_nb.lmm import LMM
from lmm_sae_nb.score import TrueMasks

root = project_root()
plots.style()

# %%
lmm = LMM.load(root / model if (root / model).is_dir() else model)
cache = LatentCache.load(require(run, "cache", "manifest.json", "02_cache_activations.py").parent)
pictures = open_images(root / images)
live = np.flatnonzero(np.asarray(cache.live))
chosen = np.sort(np.random.default_rng(seed).choice(live, min(n_explained, len(live)), replace=False)).tolist()
shown = {latent: exemplars(cache, pictures, latent, n_top=n_top, share=share) for latent in chosen}
print(f"{len(live)} live latents, {len(chosen)} chosen")

# %% [markdown]
# ## Ask
#
# > "We apply masks to the top activated images, using transparent masks for the most activated patches and black masks for
# > the rest. These masked images are then input into LLaVA-NeXT-OV-72B to detect common patterns. If no common patterns are
# > discernible, the system will return a message stating 'unable to produce explanations'."
#
# Here the model under study is its own explainer. It is asked about each masked image alone, and what enough answers share
# is the explanation.

# %%
stage, code = Stage(run, "interpret"), [explain, score]
params = dict(
    model=model,
    images=images,
    n_explained=n_explained,
    n_top=n_top,
    share=share,
    agree=agree,
    questions=questions,
    seed=seed,
)
inputs = [path for path in (root / model, root / concepts, Stage(run, "cache").path("manifest.json")) if path.exists()]
if not stage.is_current(params, inputs, code):
    started = time.monotonic()
    explainer = ask_each(lmm, questions, agree=agree)
    explanations = explainer([[exemplar.masked for exemplar in shown[latent]] for latent in chosen])
    truth = TrueMasks(load_from_disk(root / images), root / concepts)
    best = [truth.best(shown[latent]) for latent in chosen]
    rows = {
        str(latent): {
            "concept": e.concept,
            "answers": e.answers,
            "true_kind": b.kind,
            "true_concept": b.concept,
            "true_iou": b.iou,
        }
        for latent, e, b in zip(chosen, explanations, best, strict=True)
    }
    write_json(stage.path("explanations.json"), rows)
    right = [row["concept"] == row["true_concept"] for row in rows.values() if row["concept"]]
    metrics = {
        "asked": len(rows), "explained": len(right), "refused": len(rows) - len(right),
        "explained_fraction": len(right) / len(rows), "concept_accuracy": sum(right) / max(1, len(right)),
    }  # fmt: skip
    stage.finish(params, inputs, metrics, time.monotonic() - started, code)
explanations = read_json(stage.path("explanations.json"))
read_json(stage.path("metrics.json"))

# %% [markdown]
# `concept_accuracy` is the share of explained latents whose explanation is the very concept that their visible patches
# overlap best with in the ground truth. No system on photographs can state it.

# %% mystnb={"figure": {"caption": "Explained latents, at random: the five exemplars, as activation and masked as the explainer sees them.", "name": "fig-explained"}}
named = [latent for latent in chosen if explanations[str(latent)]["concept"]]
plots.exemplar_strip(
    [(f"latent {n}: {explanations[str(n)]['concept']}", shown[n]) for n in named[:: max(1, len(named) // 6)][:6]]
);
# %% mystnb={"figure": {"caption": "Latents that could not be explained.", "name": "fig-refused"}}
refused = [latent for latent in chosen if not explanations[str(latent)]["concept"]]
plots.exemplar_strip([(f"latent {n}: {REFUSAL}", shown[n]) for n in refused[:: max(1, len(refused) // 3)][:3]]);
# %% [markdown]
# What the same latents were called, exemplar by exemplar, beside the concept that they really show:

# %%
for latent in named[:8] + refused[:4]:
    row = explanations[str(latent)]
    print(
        f"{latent:5d}  {row['concept'] or REFUSAL:34s} truth: {row['true_concept']} ({row['true_kind']}, IoU {row['true_iou']:.2f})   {row['answers']}"
    )

# %% [markdown]
# ## What we found
#
# The share of explained latents and their accuracy are printed above and on the [results page](../results). Latents that
# no answer fits respond to places, edges or several concepts; an explainer that sees five images at once and may say more
# than a word is a later chapter's.

# %% tags=["hide-input"]
manifest = read_json(stage.path("manifest.json"))
print(f"run {run} · asked {model} · seed {seed} · {manifest['seconds']:.0f} s · {manifest['versions']}")
