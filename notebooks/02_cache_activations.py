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
# # 2. Find what excites each latent
#
# **The question** (section 2.2). Which images of a large set excite a latent
# most? Which patches of these images? And which words?
#
# **You will learn** how the mean over patches ranks images, why one pass is
# enough for all latents at once, and how often latents are active.
#
# **Reads** the model, the stage `train`, images, and samples for the text
# side. **Writes** the stage `cache`: for every latent its top images, the
# activations on their patches, its top texts and tokens, and statistics.
#
# | preset | images | time |
# |---|---|---|
# | `tiny` | 2,400 scenes of Picture World, used to train none of the models | 1 minute, one core |
# | `paper` | 46,684 images | never run; see [A3](A3_full_scale) |

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
# a data set with a column of images, or a folder of images
images: str = "data/artifacts/tiny/world/cache"
# counted from 0; the layer that the SAE was trained on.
# Or another hookpoint, such as "decoder.1.mlp" (see Your own LMM)
layer: "int or str" = 1
n_top: int = 5  # images kept for each latent
batch_size: int = 16  # images that go through the model at once
workers: int = 1  # threads that prepare the next batches of images
tf32: bool = True  # GPUs round the factors of float32 products to TF32
# one of "", "float16" or "float32"; the last two keep every activation
# (tens of GB at full scale), "" only those of the top images
store: str = "float16"
# unreadable pictures; one of "refuse" or "skip", which leaves them out
unreadable: str = "refuse"
# samples for the text side: image, question, answer
texts: str = "data/artifacts/tiny/world/train"
n_texts: int = 300  # samples that are read, drawn at random
seed: int = 0  # of this draw, and of the latents in the figures

# %% tags=["remove-cell"]
import time
from collections import Counter

import numpy as np
import torch
from torch.testing import assert_close

from lmm_sae_nb import SAEInPlace, cache_activations, exemplars, open_images
from lmm_sae_nb.cache.sides import side_metrics, side_rows, sides
from lmm_sae_nb.cache.texts import cache_texts, text_activations
from lmm_sae_nb.model.sample_checks import open_samples
from lmm_sae_nb.model.samples import readable
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.show import plots
from lmm_sae_nb.show.report import (
    findings,
    headline,
    left_out,
    metrics_table,
    provenance,
)
from lmm_sae_nb.support.conversions import conversion_metrics
from lmm_sae_nb.support.devices import tolerance
from lmm_sae_nb.support.images import in_words
from lmm_sae_nb.support.stages import Page

page = Page(globals())
plots.style()

# %%
place = SAEInPlace.load(
    page.locate(model), page.file("train"), layer, **loading
)
pictures = open_images(page.locate(images))
print(f"{len(pictures)} images, {place.sae.n_latents} latents")
print(in_words(pictures.left_out))

# %% [markdown]
# ## One pass
#
# > "By averaging over the second dimension, we obtain the mean activation
# > values $\bar{\mathbf{Z}} = \frac{1}{576} \sum_j \mathbf{Z}[:, j, :]$ … we
# > identify the top-5 influential image by selecting the top-5 activations
# > along the first dimension."
#
# Only base tokens count: 576 in the paper, 144 here. The reference code keeps
# all activations and ranks them later. We keep a running list of the top
# images of every latent. This is exact too, and its memory does not grow with
# the number of images. Attention is causal: later tokens cannot change earlier
# ones. We stop after the last base token, so tile tokens never go through the
# language model.
#
# If the pass is cut short, run this cell again: it continues where it
# stopped. With `accelerate launch` or `torchrun` (two ways to start several
# processes) they work on one pass together. Neither changes a byte of the
# result.

# %%
stage = page.stage("cache", after=("train",), without=("workers",))
began = time.monotonic()
cache = cache_activations(
    place, pictures, n_top=n_top, batch_size=batch_size,
    store=store or None, unreadable=unreadable, folder=stage.folder,
    workers=workers, tf32=tf32,
)  # fmt: skip
seconds = stage.result("seconds", float, lambda: time.monotonic() - began)
live = int(cache.live.sum())
print(f"{cache.images} images read, {len(cache.skipped)} skipped")
left_out(cache.skipped, converted=[cache.converted])
print(f"{live} of {cache.n_latents} latents are active at least once")

# %% [markdown]
# **Check.** We take the latent with the highest mean activation. We run the
# model on its top image again and compute the mean over patches in plain
# PyTorch. The cache holds the same number, and the same activation on each
# patch, up to rounding: it keeps activations in 16 bits.

# %%
latent = int(cache.top_means[:, 0].argmax())
number, mean = cache.top(latent)[0]
prompt = place.lmm.prompt("", pictures[number])
base = prompt.spans[0].where("base")
hidden = place.lmm.hidden_states(prompt, layer)[0, base]
acts, indices = place.sae.encode(hidden)
ours = torch.where(indices == latent, acts, 0).sum(-1).cpu()
close = tolerance(place.lmm.model.dtype)
assert_close(ours.mean().item(), mean, rtol=close, atol=0)
if cache.grid:  # the tokens of a Q-Former have no places in the image
    on_patches = cache.patch_map(latent, 0)
    at_most = close * float(ours.max())
    ours = ours.view(cache.grid)
    assert_close(ours, on_patches, rtol=close, atol=at_most)

# %% [markdown]
# ## Top images
#
# We draw six latents at random among those that are active on less than 5%
# of the patches. Each has two rows: the activation on the grey image, then the
# image with only its most activated patches visible. These are the patches
# above 25% of the image's maximum.

# %% mystnb={"figure": {"caption": "Six random latents, of those that are active on less than 5% of the patches, with their five top images. Upper row: the activation on each patch. Yellow: strongest, violet: weak, grey: not active, scaled per image. Lower row: only the patches above 25% of the image's maximum are visible. Some latents have one theme; for others we see none.", "name": "fig-top-images"}, "image": {"alt": "For each of six latents, five generated scenes with a heat map, and below them the same scenes with most patches black."}}
rng = np.random.default_rng(seed)
frequency = np.asarray(cache.frequency)
rare = np.flatnonzero(np.asarray(cache.live) & (frequency < 0.05))
chosen = np.sort(rng.permutation(rare)[:6]).tolist()
strips = [
    (f"latent {latent}", exemplars(cache, pictures, latent))
    for latent in chosen
]
plots.exemplar_strip(strips);
# %% mystnb={"figure": {"caption": "How often latents are active, as a fraction of the base patches of all images. Most latents respond to few patches.", "name": "fig-frequency"}, "image": {"alt": "Histogram of the fraction of base patches on which each live latent is active, on a logarithmic axis."}}
label = "fraction of base patches on which the latent is active"
plots.histogram(frequency, label, log=True);
# %% [markdown]
# ## Text too
#
# The SAE has also learned from text tokens. So we read training samples, with
# and without an image, and find for every latent the text tokens that excite
# it most and the texts of highest mean activation. For each kind of token, we
# count the tokens on which the latent is active. Image tokens are `base` and
# `tiles`, not `newline`.
#
# A latent *responds to* a side, images or text, if its rate per token there is
# at least a tenth of its rate on the other side. The tenth is our choice. So
# *text only* does not mean never on images. A latent is one-sided only if
# chance is a bad explanation. Suppose its activations fell on random tokens.
# Then so few on the other side should have a probability below 1%. Otherwise
# the latent is *undetermined*; rare latents often are. Activations come in
# clusters, so the true probability is somewhat higher.
#
# Most text tokens stand after an image. So a latent that is active on them may
# still carry the image.

# %%
samples = open_samples(page.locate(texts))
draw = np.random.default_rng(seed).choice(
    len(samples), min(n_texts, len(samples)), replace=False
)
samples, unread, unlike = readable(
    samples.select(np.sort(draw)), unreadable, place.lmm
)
left_out(unread, converted=[unlike])
text_cache = cache_texts(
    place, samples, n_top=n_top, batch_samples=batch_size,
    folder=stage.folder,
)  # fmt: skip
words = stage.result(
    "words", dict[str, dict], lambda: side_rows(place.lmm, text_cache)
)
by_side = sides(text_cache)

# %%
metrics = stage.finish({
    "images": cache.images,
    "skipped": len(cache.skipped),
    "left_out": len(pictures.left_out),
    "texts_skipped": len(unread),
    **conversion_metrics("pictures", cache.converted),
    **conversion_metrics("texts", unlike),
    "latents": cache.n_latents,
    "latents_live": live,
    "median_frequency": float(np.median(frequency[cache.live])),
    "images_per_second": cache.images / seconds,
    "seconds": seconds,
    "text_tokens": text_cache.tokens["text"],
    **side_metrics(by_side),
})  # fmt: skip
metrics_table(stage)

# %% mystnb={"figure": {"caption": "What the latents respond to.", "name": "fig-sides"}, "image": {"alt": "One bar, divided into latents that respond to images only, to both, to text only, and undetermined ones."}}
counts = {
    side.replace("_", " "): metrics[f"latents_{side}"]
    for side in ("image_only", "both", "text_only", "undetermined")
}
plots.stacked({"latents": counts}, "number of latents");
# %% [markdown]
# We draw three latents that respond to text only, and three that respond to
# both, among those that are active on at least a few text tokens. Each line
# names the tokens that excite the latent most. Below it are the two texts of
# highest mean activation, shaded by the activation.

# %%
often = text_cache.fired[SAE_KINDS.index("text")] >= n_top
shaded = {}
for side in ("text_only", "both"):
    candidates = np.flatnonzero(getattr(by_side, side) & often)
    for n in rng.permutation(candidates)[:3].tolist():
        counts = Counter(words[str(n)]["text tokens"])
        tokens = " · ".join(f"{x} ({m}x)" for x, m in counts.items())
        shaded[f"latent {n}, {side.replace('_', ' ')}: {tokens}"] = [
            text_activations(place, samples[text], n)
            for text, _ in text_cache.top_texts(n)[:2]
        ]
plots.shaded_texts(shaded)

# %% [markdown]
# ## What we found

# %% tags=["remove-input"]
broad = int((frequency > 0.2).sum())
findings(
    f"{metrics['latents_live']:,} of {metrics['latents']:,} latents are "
    f"active on at least one of {metrics['images']:,} images.",
    "Half of these are active on less than "
    f"{metrics['median_frequency']:.1%} of the base patches. {broad} latents "
    "are active on more than a fifth of them. Section 4.2 of the paper finds "
    "that low-level latents are often active; page 03 names ours.",
    f"Among the latents that can be assigned to a side, "
    f"{metrics['latents_both_fraction']:.0%} respond to images and text, "
    f"{metrics['latents_image_only_fraction']:.0%} to images only, and "
    f"{metrics['latents_text_only_fraction']:.0%} to text only. The fractions "
    f"are of all latents with a side. The {len(samples)} samples are one "
    "draw; we give no interval.",
)

# %% [markdown]
# **Limits.** The mean over patches prefers images in which the latent is active
# on a large area. An image with a small thing can excite it strongly and still
# rank low. There is no control for the sides, such as samples without an image
# alone. A latent
# that responds to nothing in these images may respond to others. Notebook 03
# asks a model what the top images of a latent have in common.

# %% tags=["result", "remove-input"]
headline(
    page,
    f"one pass over {metrics['images']:,} images finds the top {n_top} "
    f"images of all {metrics['latents']:,} latents; "
    f"{metrics['latents_live'] / metrics['latents']:.0%} of the latents are "
    f"active at least once, and {metrics['latents_both_fraction']:.0%} of "
    "those with a clear side respond to images and text.",
    "it caches 46,684 images and studies 5,000 of its 131,072 latents; it "
    "does not report how many are active, or on which side.",
    "a pass over few, small images is cheap, so every latent can be studied.",
)

# %% tags=["remove-input"]
provenance(page, stage)
