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
# **The question.** Section 2.2: for each latent, which images of a large set excite it most, and which patches of them?
#
# **You will learn** how the mean over patches ranks images, why one pass is enough for every latent at once, and what the
# activation statistics of latents look like.
#
# **Reads** the model, `train/`, images and, for the text side, samples. **Writes** `cache/`: for every latent its top
# images, their patch maps, its top texts and tokens, and statistics.
#
# | preset | images | time |
# |---|---|---|
# | `tiny` | 2,400 held-back Picture World scenes | 2 minutes, 2 cores |
# | `paper` | 46,684 images | GPUs |

# %% tags=["parameters"]
run: str = "tiny"  # results go to data/artifacts/<run>/
model: str = "data/models/tiny-llava-next"  # a folder of this project, or a name on the hub
images: str = "data/artifacts/tiny/world/cache"  # a data set with an image column, or a folder of images
layer: int = 1  # 0-based, the layer that the SAE was trained on
n_top: int = 5  # images kept for each latent
batch_size: int = 16  # images a forward
store: str = "float16"  # or "float32": keeps every activation, tens of GB at full scale; "" only those of the top images
unreadable: str = "refuse"  # what to do with files that are no pictures; "skip" leaves them out and names them
texts: str = "data/artifacts/tiny/world/train"  # samples with image, question and answer, for the text side
n_texts: int = 300  # of them that are read, at random
seed: int = 0  # of their choice

# %% tags=["remove-cell"]
import time

import numpy as np
import torch
from datasets import load_from_disk
from torch.testing import assert_close

from lmm_sae_nb.cache import activations as caching
from lmm_sae_nb.cache import texts as texting
from lmm_sae_nb.cache.activations import cache_activations, forecast
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.cache.texts import TextCache, as_rows, cache_texts, counted, read, serves
from lmm_sae_nb.interpret.exemplars import exemplars
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.token_kinds import SAE_KINDS
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.show import plots
from lmm_sae_nb.support.files import project_root, read_json, write_json
from lmm_sae_nb.support.images import open_images
from lmm_sae_nb.support.stages import Stage, require

root = project_root()
plots.style()

# %%
lmm = LMM.load(root / model if (root / model).is_dir() else model)
sae = TopKSAE.load(require(run, "train", "sae.safetensors", "01_train_sae.py").parent)
pictures = open_images(root / images)
print(f"{len(pictures)} images, {sae.n_latents} latents, top {n_top}")

# %% [markdown]
# ## One pass
#
# > "By averaging over the second dimension, we obtain the mean activation values
# > $\bar{\mathbf{Z}} = \frac{1}{576} \sum_j \mathbf{Z}[:, j, :]$ … we identify the top-5 influential image by selecting the
# > top-5 activations along the first dimension."
#
# Only base image tokens count (576 at the paper's size, 144 here). The reference code keeps all activations and ranks
# them later; a running top-n is exact in one pass, with memory that does not grow with the number of images. What comes
# behind the last base token cannot change it, attention looks back only, so the tiles never pass the language model.
#
# A pass that is cut short goes on where it was when this cell runs again. `accelerate launch` on this file, or `torchrun`
# where there are no GPUs, shares the pass among processes; the result is the same to the byte.

# %%
stage, code = Stage(run, "cache"), [caching, texting]
params = dict(
    model=model, images=images, layer=layer, n_top=n_top, store=store, unreadable=unreadable, texts=texts, n_texts=n_texts, seed=seed
)  # fmt: skip
read_here = (root / model, root / images, root / texts, Stage(run, "train").path("sae.safetensors"))
inputs = [path for path in read_here if path.exists()]
current = stage.is_current(params, inputs, code)
if not current:
    settings = dict(n_top=n_top, batch_size=batch_size, store=store or None, unreadable=unreadable)
    told = forecast(lmm, sae, pictures, layer, **settings)
    print(f"about {told.seconds:.0f} s, up to {told.disk / 1e6:,.0f} MB of disk, {told.memory / 1e9:.1f} GB beside the model")
    started = time.monotonic()
    cache = cache_activations(SAEInPlace(lmm, sae, layer), pictures, **settings, folder=stage.folder)
    seconds = time.monotonic() - started
    metrics = {
        "images": cache.images,
        "skipped": len(cache.skipped),
        "latents": cache.n_latents,
        "latents_live": int(cache.live.sum()),
        "images_per_second": cache.images / seconds,
        "seconds": seconds,
    }
cache = LatentCache.load(stage.folder)
print(f"{cache.images} images, {len(cache.skipped)} skipped; {int(cache.live.sum())} of {cache.n_latents} latents fire")

# %% [markdown]
# **Check.** For the most exciting image of one latent: run the model again and average by hand.

# %%
latent = int(cache.top_means[:, 0].argmax())
first, _ = cache.top(latent)[0]
prompt = lmm.prompt("", pictures[first])
base = prompt.spans[0].where("base")
acts = sae.encode(lmm.hidden_states(prompt, layer)[0, base])
by_hand = torch.where(acts.indices == latent, acts.acts, 0).sum(-1)
assert_close(by_hand.mean(), cache.top_means[latent, 0], rtol=1e-3, atol=1e-5)
if cache.grid:  # a Q-Former's tokens have no places
    assert_close(by_hand.reshape(cache.grid), cache.patch_map(latent, 0), rtol=1e-2, atol=1e-2)

# %% [markdown]
# ## What it looks like
#
# Six latents at random among those that fire on few patches. For each, its top images: above, the activation over the grey
# image; below, the image with only its most activated patches visible.

# %% mystnb={"figure": {"caption": "Random live latents with their five most exciting images: the activation on the patch grid, and the image with only its most activated patches visible.", "name": "fig-top-images"}}
rng = np.random.default_rng(0)
rare = np.flatnonzero(np.asarray(cache.live) & (np.asarray(cache.frequency) < 0.05))
chosen = np.sort(rng.permutation(rare)[:6])
plots.exemplar_strip([(f"latent {latent}", exemplars(cache, pictures, int(latent))) for latent in chosen]);
# %% mystnb={"figure": {"caption": "How often latents fire: share of base patches on which each live latent is active.", "name": "fig-frequency"}}
plots.histogram(np.asarray(cache.frequency), "share of base patches", log=True);
# %% [markdown]
# ## Text too
#
# The SAE has learned from text tokens as well. The same pass over samples as in fine-tuning, with and without an image:
# for every latent the text tokens that excite it most, the texts of highest mean, and on how many tokens of each kind it
# fires. It *serves* a side, images or text, if it fires there at least a tenth as often, a token, as on the other side.
# That it serves one side only has to be no accident: were its firings dealt out at random among all tokens, so few on the
# other side would come about in less than 1 % of cases; else it counts as *untold*, as rare latents must.

# %%
samples = load_from_disk(root / texts)
some = np.sort(np.random.default_rng(seed).choice(len(samples), min(n_texts, len(samples)), replace=False))
samples = samples.select(some)
if not current:
    started = time.monotonic()
    spoken = cache_texts(SAEInPlace(lmm, sae, layer), samples, n_top=n_top, batch_samples=batch_size, folder=stage.folder)
    write_json(stage.path("words.json"), as_rows(lmm, spoken))  # for the feature browsers
    metrics |= {"text_tokens": spoken.tokens["text"]} | counted(serves(spoken))
    stage.finish(params, inputs, metrics, seconds + time.monotonic() - started, code)
spoken = TextCache.load(stage.folder)
read_json(stage.path("metrics.json"))

# %% [markdown]
# Latents of both sorts at random, among those that fire on some text: which tokens excite them most, and the text of highest
# mean, shaded by the activation.

# %%
served, often = serves(spoken), spoken.fired[SAE_KINDS.index("text")] >= n_top
shown = [(side, int(n)) for side in ("text_only", "both") for n in rng.permutation(np.flatnonzero(getattr(served, side) & often))[:3]]
plots.shaded_texts({
    f"latent {n}, {side.replace('_', ' ')}: " + " · ".join(lmm.tokenizer.decode([word.token]) for word in spoken.top_words(n)):
    [read(SAEInPlace(lmm, sae, layer), samples[text], n) for text, _ in spoken.top_texts(n)[:2]] for side, n in shown
})  # fmt: skip

# %% [markdown]
# ## What we found
#
# Most latents fire on few patches, and their top images tend to show one thing in common. Some fire on a large part of every
# background: the low-level latents of section 4.2. Notebook 03 asks a model what the common thing is. Most of the latents
# that can be told serve images and text; the text-only ones stand for words, as they are written or about to be.

# %% tags=["hide-input"]
manifest = read_json(stage.path("manifest.json"))
print(f"run {run} · {model} · layer {layer} · {manifest['seconds']:.0f} s · {manifest['versions']}")
