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
# # 4. Score the explanations
#
# **The question.** Section 3.2 and Table 1: does the region that a concept's name points to match the region that excites
# the latent?
#
# **You will learn** what intersection over union (IoU) measures here, and how it compares with chance.
#
# **Reads** `interpret/`, `cache/`, the SAE. **Writes** `score/`.
#
# | preset | segmenter | time |
# |---|---|---|
# | `tiny` | ground-truth masks | 1 minute, 2 cores |
# | `paper` | GroundingDINO + SAM | GPUs |

# %% tags=["parameters"]
run: str = "tiny"  # results go to data/artifacts/<run>/
model: str = "data/models/tiny-llava-next"  # a folder of this project, or a name on the hub
images: str = "data/artifacts/tiny/world/cache"  # the images that were cached, with ground-truth masks
concepts: str = "data/artifacts/tiny/world/concepts.json"  # names of the ground truth's concepts
layer: int = 2  # 0-based, the layer that the SAE was trained on
n_top: int = 5  # exemplars of each latent
share: float = 0.25  # a patch counts as active above this share of its image's highest activation
random_runs: int = 10  # draws of n_top random images for the baseline
seed: int = 0  # of the random images and of the bootstrap

# %% tags=["remove-cell"]
import time
from collections import defaultdict

import numpy as np
from datasets import load_from_disk

from lmm_sae_nb import explain, plots
from lmm_sae_nb import score as scoring
from lmm_sae_nb.artifacts import Stage, project_root, read_json, require, write_json
from lmm_sae_nb.cache import LatentCache, activation_maps
from lmm_sae_nb.explain import exemplars, exemplars_on, upsample
from lmm_sae_nb.images import open_images
from lmm_sae_nb.lmm import LMM
from lmm_sae_nb.sae import TopKSAE
from lmm_sae_nb.score import TrueMasks, iou, latent_iou, mean_interval

root = project_root()
plots.style()

# %%
lmm = LMM.load(root / model if (root / model).is_dir() else model)
sae = TopKSAE.load(require(run, "train", "sae.safetensors", "01_train_sae.py").parent)
cache = LatentCache.load(require(run, "cache", "manifest.json", "02_cache_activations.py").parent)
explanations = read_json(require(run, "interpret", "explanations.json", "03_interpret_features.py"))
pictures = open_images(root / images)
truth = TrueMasks(load_from_disk(root / images), root / concepts)
explained = {
    int(latent): row["concept"]
    for latent, row in explanations.items()
    if row["concept"] and truth.kinds_of(row["concept"])
}
if len(explained) < 2:
    raise ValueError(f"{len(explained)} latents are explained, scores need two; run notebooks/03_interpret_features.py with more latents or a lower `agree`")
print(f"{len(explained)} explained latents of {len(explanations)}")

# %% [markdown]
# ## IoU, strictly
#
# > "The IoU score between the segmentation mask and our activation mask is then calculated, serving as the reference score
# > for the feature's relevance."
#
# The activation mask is made of the patches above a stated share of the image's highest activation, by nearest neighbour:
# the reference code's bilinear mask enlarges a single patch fourfold. One case by hand:

# %% mystnb={"figure": {"caption": "A worked example (Figure 3): activated (orange), the concept's true mask (blue), both (green).", "name": "fig-worked"}}
latent = max(explained, key=lambda n: explanations[str(n)]["true_iou"])
case = exemplars(cache, pictures, latent, n_top=n_top, share=share)[0]
activated, wanted = upsample(case.visible, case.image.size), truth(case.image_index, explained[latent])
assert iou(activated, wanted) == (activated & wanted).sum() / (activated | wanted).sum()
plots.overlap(case.image, activated, wanted, f"latent {latent}: {explained[latent]}, IoU {iou(activated, wanted):.2f}");
# %% [markdown]
# ## Every explained latent, and chance
#
# The baseline is the paper's: the same latent and explanation on random images in place of its top images.

# %%
stage, code = Stage(run, "score"), [explain, scoring]
params = dict(model=model, images=images, layer=layer, n_top=n_top, share=share, random_runs=random_runs, seed=seed)
inputs = [
    path
    for path in (
        root / model,
        root / concepts,
        *(Stage(run, s).path("manifest.json") for s in ("train", "cache", "interpret")),
    )
    if path.exists()
]
if not stage.is_current(params, inputs, code):
    started = time.monotonic()
    ours = {
        n: latent_iou(exemplars(cache, pictures, n, n_top=n_top, share=share), c, truth) for n, c in explained.items()
    }
    drawn = np.random.default_rng(seed).integers(len(pictures), size=random_runs * n_top).tolist()
    maps = activation_maps(lmm, sae, [pictures[i] for i in drawn], layer, list(explained))
    random = {
        n: latent_iou(exemplars_on(pictures, drawn, maps[:, column], share=share), c, truth)
        for column, (n, c) in enumerate(explained.items())
    }
    rows = {
        str(n): {"concept": c, "kind": truth.kinds_of(c)[0], "iou": ours[n], "iou_random": random[n]}
        for n, c in explained.items()
    }
    write_json(stage.path("scores.json"), rows)
    total, chance = mean_interval(list(ours.values()), seed=seed), mean_interval(list(random.values()), seed=seed)
    metrics = {
        "latents_scored": len(ours), "iou_strict": total.mean, "iou_strict_low": total.low, "iou_strict_high": total.high,
        "iou_random": chance.mean, "iou_random_low": chance.low, "iou_random_high": chance.high,
        "iou_ratio": total.mean / max(chance.mean, 1e-9),
    }  # fmt: skip
    stage.finish(params, inputs, metrics, time.monotonic() - started, code)
scores = read_json(stage.path("scores.json"))
read_json(stage.path("metrics.json"))

# %% [markdown]
# Table 1 by concept kind, as far as this chapter goes (IoU in `strict` mode against ground truth; the paper's 0.20 against
# 0.005 are for GroundingDINO-SAM masks of photographs, with its own way of making masks).

# %% mystnb={"figure": {"caption": "Strict IoU of explained latents by the kind of their concept, with 99 % bootstrap intervals, beside random images.", "name": "fig-iou-by-kind"}}
by_kind = defaultdict(list)
for row in scores.values():
    by_kind[row["kind"]].append(row)
by_kind["total"] = list(scores.values())
table = {
    f"{kind} (n={len(rows)})": {
        "top images": mean_interval([r["iou"] for r in rows]),
        "random images": mean_interval([r["iou_random"] for r in rows]),
    }
    for kind, rows in by_kind.items()
    if len(rows) > 1
}
plots.means(table, "IoU, strict");
# %%
for kind, row in table.items():
    print(f"{kind:18s}", "   ".join(f"{name}: {mean}" for name, mean in row.items()))

# %% mystnb={"figure": {"caption": "A gallery (Figure 4): for each concept kind the latent of median IoU, on its top image.", "name": "fig-gallery"}}
middle = {
    kind: sorted(rows, key=lambda r: r["iou"])[len(rows) // 2] for kind, rows in by_kind.items() if kind != "total"
}
which = {kind: next(n for n, row in scores.items() if row is median) for kind, median in middle.items()}
axes = (
    plots.images([], columns=len(which), side=1.6)
    if not which
    else plots.images([pictures[0]] * len(which), columns=len(which), side=1.6)
)
for ax, (kind, n) in zip(axes.flat, which.items(), strict=False):
    top = exemplars(cache, pictures, int(n), n_top=1, share=share)[0]
    name = scores[n]["concept"]
    plots.overlap(
        top.image,
        upsample(top.visible, top.image.size),
        truth(top.image_index, name),
        f"{kind}: {name}, {scores[n]['iou']:.2f}",
        ax=ax,
    )

# %% [markdown]
# ## What we found
#
# The means with their intervals are above and on the [results page](../results). They hold for explained latents only, and
# for masks that are true by construction; what a segmenter makes of the same explanations is a later chapter's question.

# %% tags=["hide-input"]
manifest = read_json(stage.path("manifest.json"))
print(f"run {run} · {model} · layer {layer} · seed {seed} · {manifest['seconds']:.0f} s · {manifest['versions']}")
