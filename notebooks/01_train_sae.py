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
# # 1. Train a sparse autoencoder on a layer of a multimodal model
#
# **The question** (sections 2.1 and 3.1). One neuron of a large multimodal
# model (LMM) responds to many things, and one thing excites many neurons.
# Can we rewrite the hidden states of a layer with many *latents*, of which
# only a few are active at a time? Pages 03 and 04 ask if each has one meaning.
#
# **You will learn** how an image and a question become tokens, what a TopK
# sparse autoencoder (SAE) computes, and how to tell a good one from a bad one.
#
# **Reads** the model under study and its training samples. **Writes** the
# stage `train`: the SAE in the format of the checkpoint that the paper's authors
# published, the history of its training, and its metrics. If you have an SAE,
# name it in `ready`: then this page trains none, but measures yours.
# [Notation](../notation) explains *stage* and *preset*.
#
# | preset | model | latents, k | time |
# |---|---|---|---|
# | `tiny` | LLaVA-NeXT of Picture World | 1,024, 32 | 1.5 minutes, one core |
# | `paper` | LLaVA-NeXT-LLaMA3-8B, layer 24 | 131,072, 256 | never run; see [A3](A3_full_scale) |

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
# training samples: image, question, answer; or images, conversation
dataset: str = "data/artifacts/tiny/world/train"
# samples that no training has seen
heldout: str = "data/artifacts/tiny/world/heldout"
# samples whose picture cannot be read; one of "refuse" or "skip", which
# leaves them out and names them
unreadable: str = "refuse"
# held-out samples, at least 1, on which the SAE is evaluated
evaluated: int = 60
# counted from 0; the paper's 25th layer is 24.
# Or another hookpoint, such as "decoder.1.mlp" (see Your own LMM)
layer: "int or str" = 1
# a ready SAE, which takes the place of the training
ready: dict = {
    "sae": "",  # folder, file, or repository on the hub; "": train one
    "hookpoint": "",  # folder or file in there, such as "layers.24"
    "revision": "",  # branch or commit of the repository; "": the newest
    # active latents per token, at least 0, if the SAE's files do not say
    # it; 0: they do. With thresholds: the most that a token may have
    "k": 0,
}
n_latents: int = 1024  # the paper: 131072
k: int = 32  # active latents per token; the paper: 256
# one of "topk", "batch_topk" or "matryoshka". BatchTopK has k latents on
# average; in a Matryoshka SAE the first latents alone reconstruct, too
kind: str = "topk"
steps: int = 1500  # optimiser steps
batch_tokens: int = 512  # tokens per optimiser step
# tokens of many samples that a buffer mixes; 0: 16 batches
buffer_tokens: int = 131_072
# times, at least 1, that the SAE learns from each token of the buffer
repeats: int = 3
# samples the model reads at a time, at least 1; fewer take less memory
batch_samples: int = 16
lr: float = 3e-3  # highest learning rate
# tokens without activation after which a latent counts as dead
dead_after_tokens: int = 100_000
# kinds of token that the SAE learns from, each one of "base", "tiles",
# "newline", "text" or "special"
kinds: list[str] = ["base", "tiles", "newline", "text"]
seed: int = 0  # seed of the initial weights and of the sample order
accumulate: int = 1  # batches whose mean gradient makes one step
# one of "no" or "bf16": large products in bfloat16, weights in float32
mixed_precision: str = "no"
tf32: bool = True  # GPUs round the factors of float32 products to TF32
k_aux: int = 0  # dead latents that AuxK revives per token; 0: width / 2
workers: int = 0  # threads that prepare the next samples
processes: int = 1  # on this machine, at least 1, one per GPU
checkpoint_minutes: float = 10.0  # minutes between checkpoints
# one of "none", "tensorboard", "trackio" or "wandb"
tracker: str = "none"

# %% tags=["remove-cell"]
import torch
from torch.testing import assert_close

from lmm_sae_nb import LMM, SAEInPlace, TopKSAE, evaluate_sae, train_sae
from lmm_sae_nb.model.hookpoints import titled
from lmm_sae_nb.model.sample_checks import check_samples, open_samples
from lmm_sae_nb.model.samples import (
    as_prompt,
    examples,
    first_turns,
    readable,
)
from lmm_sae_nb.show import plots
from lmm_sae_nb.show.markup import as_text
from lmm_sae_nb.show.report import (
    findings,
    headline,
    left_out,
    metrics_table,
    percent,
    provenance,
)
from lmm_sae_nb.support.conversions import conversion_metrics
from lmm_sae_nb.support.intervals import read_mean
from lmm_sae_nb.support.stages import Metrics, Page
from lmm_sae_nb.train.evaluate import control_fvus
from lmm_sae_nb.train.launch import launch
from lmm_sae_nb.train.ready import use_ready_sae

page = Page(globals())
plots.style()

# %% [markdown]
# ## The model and its samples
#
# We format each sample as in the model's own fine-tuning: the image, the
# question, and the answer in the assistant's turn. The paper does the same:
# "looks exactly the same as the supervised fine-tuning stage" (section 3.1).
# A sample may also be a whole conversation of several turns and images. Then
# the SAE learns from the tokens of all turns.
#
# `hidden_states` of transformers starts with the embeddings. So our layer 1 is
# its entry 2. In the code of all pages, `page` knows the folders and parameters
# of this page, and `plots` draws.

# %%
lmm = LMM.load(page.locate(model), **loading)
samples = open_samples(page.locate(dataset))
unseen = open_samples(page.locate(heldout))
check_samples(samples, lmm)  # a wrong row is named here, not in an hour
print(f"{lmm.n_layers} layers of width {lmm.width}")
print(f"an image has {lmm.grid[0]} x {lmm.grid[1]} base patches")
unseen = unseen.select(range(min(evaluated, len(unseen))))
unseen, unread, unlike = readable(unseen, unreadable, lmm)
print(f"{len(samples)} samples to train on, {len(unseen)} to evaluate on")

# %% mystnb={"figure": {"caption": "Six samples that the SAE learns from: image, question and answer.", "name": "fig-samples"}, "image": {"alt": "Six generated scenes, each with a question and its answer."}}
pictured = examples(samples, 6)  # some samples are text only
shown = list(first_turns(pictured))  # of a conversation, the first turn
titles = [f"{row['question']}\n» {row['answer']}" for row in shown]
plots.images([row["image"] for row in shown], titles);
# %% [markdown]
# Every token of the sequence is of exactly one kind. LLaVA-NeXT shows an
# image twice. The whole image gives the `base` tokens. The same image, cut
# into tiles of full resolution (AnyRes), gives the `tiles` tokens, with a
# `newline` token after each row. The images of `tiny` are so small that
# there is one tile. `text` tokens are the words of question and answer.
# `special` tokens are marks of the chat template. `pad` tokens fill up a
# batch. The parameter `kinds` says from which kinds the SAE learns.

# %%
prompt = as_prompt(lmm, {0: (pictured or [samples[0]])[0]})
names = ("base", "tiles", "newline", "text", "special", "pad")
counts = {kind: int(prompt.mask(kind).sum()) for kind in names}
assert sum(counts.values()) == prompt.inputs["input_ids"].shape[1]
counts

# %% [markdown]
# ## What the SAE computes
#
# > "$\mathbf{z} = \text{TopK}(\text{ReLU}(\mathbf{W}_1(\mathbf{x} - \mathbf{b}_1) + \mathbf{b}_2))$ (1),
# > $\hat{\mathbf{x}} = \mathbf{W}_2\mathbf{z} + \mathbf{b}_3$ (2)"
#
# $\mathbf{x}$ is the hidden state of one token. TopK keeps the $k$ largest
# activations and sets the others to zero. In the code, $\mathbf{W}_1$ is
# `W_enc`, $\mathbf{b}_2$ is `b_enc`, and $\mathbf{W}_2$ is the transpose of
# `W_dec`. One bias, `b_dec`, serves as $\mathbf{b}_1$ and $\mathbf{b}_3$, as in
# the checkpoint that the paper's authors published. A small untrained SAE, with
# 64 latents and $k = 4$, is enough to check the same in plain PyTorch.

# %%
start = torch.Generator().manual_seed(seed)
x = lmm.hidden_states(prompt, layer)[0].float().cpu()
sae = TopKSAE(x.shape[1], 64, 4, generator=start)

z = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
kept = z.topk(4, dim=-1)
z = torch.zeros_like(z).scatter(-1, kept.indices, kept.values)
x_hat = z @ sae.W_dec + sae.b_dec

assert_close(sae(x), x_hat)
acts, indices = sae.encode(x)
assert_close(torch.zeros_like(z).scatter(-1, indices, acts), z)

# %% [markdown]
# ## Training
#
# The loss has two parts. The first is the fraction of variance unexplained
# (FVU). The second, AuxK, trains *dead* latents, those not active for a while,
# to explain what the reconstruction misses. If no latent is dead, the loss is
# the FVU. The parameter `kind` can train BatchTopK or Matryoshka SAEs instead,
# for comparison; the paper's SAE is `topk`.
#
# The model does not change. Its hidden states flow into a buffer that mixes the
# tokens of many samples. The SAE learns from each token of the buffer `repeats`
# times, each time among other tokens. In `tiny`, the model takes about as long
# for a token as the SAE does, so this saves a third of the time.
#
# When the buffer is full for the first time, a figure below the cell begins to
# grow. If you stop it, or the power fails, run the page again: it fills the
# buffer again, continues from the last checkpoint and ends with the same SAE.
#
# With `ready`, an SAE of another library is read and checked instead. It must
# have the model's width. If its files name the layer that it reads, this must
# be `layer`. Then it is saved as a trained one would be, so the other pages
# study it with nothing else changed.
#
# `page.stage` opens the stage that this page makes. `without` names parameters
# that do not change the result.

# %%
stage = page.stage(
    "train",
    without=(
        "processes", "checkpoint_minutes", "tracker", "unreadable",
        "workers",
    ),
)  # fmt: skip
settings = dict(
    n_latents=n_latents, k=k, kind=kind, lr=lr, steps=steps, kinds=kinds,
    seed=seed, batch_tokens=batch_tokens, buffer_tokens=buffer_tokens,
    repeats=repeats, batch_samples=batch_samples, accumulate=accumulate,
    dead_after_tokens=dead_after_tokens, mixed_precision=mixed_precision,
    tf32=tf32, k_aux=k_aux, workers=workers,
    checkpoint_minutes=checkpoint_minutes, tracker=tracker,
    unreadable=unreadable, folder=stage.folder,
)  # fmt: skip

# %% [markdown]
# If `processes` is more than 1, each process loads the model and the samples
# onto its GPU. Together they train the same SAE as one process would.

# %%
with plots.live(plots.TRAINING) as on_log:
    if ready["sae"]:
        found = ready | {"sae": page.locate(ready["sae"])}
        trained, checked = use_ready_sae(
            lmm, layer, **found, folder=stage.folder
        )  # fmt: skip
        findings(checked)
    elif processes == 1:
        trained = train_sae(lmm, samples, layer, **settings, on_log=on_log)
    else:
        source, data = page.locate(model), page.locate(dataset)
        trained = launch(
            processes, source, data, layer, **settings, on_log=on_log,
            loading=loading,
        )  # fmt: skip
place = SAEInPlace(lmm, trained.sae, layer)
left_out(trained.skipped, unread, converted=[trained.converted, unlike])

# %% mystnb={"figure": {"caption": "The training. The loss is the fraction of variance unexplained (FVU) plus the part of dead latents; where no latent is dead, the two are equal. The axis of both is logarithmic.", "name": "fig-training"}, "image": {"alt": "Curves of loss, FVU and dead latents over the optimiser steps."}}
shown = ("loss", "fvu", "dead_fraction")
rows = trained.history  # none of a ready SAE
for ax in plots.training(rows, shown)[:2] if rows else ():
    ax.set(yscale="log", yticks=(0.05, 0.1, 0.2, 0.5))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
# %% tags=["remove-input"]
end = rows[-1] if rows else {}
findings(
    f"At the end the FVU is {end['fvu']:.3f}, and {end['dead_fraction']:.1%} "
    "of the latents are dead."
    if end
    else "The SAE was not trained here, so there is no figure of a training."
)

# %% [markdown]
# ## How good is the SAE?
#
# We test the SAE on held-out samples. How much variance does it leave
# unexplained? How many latents are never active? And how much of the model's
# skill is left when the reconstruction takes the place of the layer's output?
# `loss_recovered` is 1 if the model with the reconstruction predicts the tokens
# of the answers as well as the untouched one. It is 0 if it predicts no better
# than with zeros in the layer's place. Zeros are so bad that nearly everything
# scores close to 1. So look at the loss itself, too. The error of the
# reconstruction is not added back.
#
# Two controls say if an FVU is good for $k$ numbers per token. One is an SAE
# of the same size before any training. The other is the first $k$ principal
# components of these same tokens: no $k$ fixed directions leave less variance
# unexplained. The SAE may take other directions for each token, so it should
# leave less. Intervals are bootstraps over samples.
#
# `stage.result` makes a result once and keeps it on disk.

# %%
measured = stage.result(
    "evaluation", Metrics,
    lambda: evaluate_sae(
        place, unseen, kinds=kinds, batch_samples=batch_samples
    ),
)  # fmt: skip
controls = stage.result(
    "controls", Metrics,
    lambda: control_fvus(
        place, unseen, kinds=kinds, seed=seed, batch_samples=batch_samples
    ),
)  # fmt: skip
metrics = stage.finish(measured | controls | {
    **({"train_seconds": end["seconds"]} if end else {}),
    "samples_skipped": len(trained.skipped),
    "heldout_skipped": len(unread),
    **conversion_metrics("samples", trained.converted),
    **conversion_metrics("heldout", unlike),
})  # fmt: skip
metrics_table(stage)

# %% [markdown]
# Are latents near-copies of each other? The paper argues that their directions
# become almost orthogonal (section 2.1). For each latent, here is the cosine
# with the most similar other latent. As a control, the same for random
# directions. Each direction's cosine with itself is 1. We subtract 2 from it,
# so the maximum is never the direction itself.

# %% mystnb={"figure": {"caption": "Cosine similarity of each latent's direction with its nearest neighbour (blue), and the same for random directions (grey).", "name": "fig-coherence"}, "image": {"alt": "Two histograms of cosine similarities between nearest directions: of the latents and of random directions."}}
def nearest(rows):
    """The cosine of each row with the most similar other row."""
    rows = torch.nn.functional.normalize(rows, dim=1)
    return (rows @ rows.T - 2 * torch.eye(len(rows))).amax(1)


# at most 2,048, to save memory
directions = trained.sae.W_dec.detach()[:2048].cpu()
random = nearest(torch.randn(directions.shape, generator=start))
latents = nearest(directions)
label = "cosine similarity with the nearest other direction"
ax = plots.histogram(latents.numpy(), label)
ax.hist(random.numpy(), bins=20, color=plots.CHANCE, alpha=0.7);
# %% tags=["remove-input"]
less = "less" if latents.median() > random.median() else "not less"
findings(
    f"The nearest neighbour of a latent has a cosine of "
    f"{latents.median():.2f} in the median, that of a random direction "
    f"{random.median():.2f}. So the latents are {less} orthogonal than "
    "random directions.",
    f"The largest cosine of two latents is {latents.max():.2f}; "
    f"{(latents > 0.9).float().mean():.1%} of the latents have one above 0.9.",
)

# %% [markdown]
# ## What we found

# %% tags=["remove-input"]
of_kind = {
    kind: metrics[f"fvu_{kind}"]
    for kind in kinds
    if f"fvu_{kind}" in metrics
}
worst = max(of_kind, key=of_kind.get)
size, has_k = place.sae.n_latents, place.sae.threshold is None
active = place.sae.k if has_k else round(metrics["l0"])
fvu, clean, spliced = (
    read_mean(metrics, name) for name in ("fvu", "loss_clean", "loss_spliced")
)
change = metrics["loss_spliced"] / metrics["loss_clean"] - 1
findings(
    f"On held-out samples the SAE leaves {percent(fvu, 1)} of the variance "
    "unexplained (in brackets: the 99% interval over samples). "
    f"{active} principal components leave "
    f"{percent(metrics['fvu_components'], 1)}, and an untrained SAE "
    f"{percent(metrics['fvu_untrained'], 1)}.",
    f"It is worst on `{worst}` tokens: it leaves {of_kind[worst]:.1%}.",
    f"{metrics['dead_fraction']:.1%} of {size:,} latents are silent: "
    "not active on any held-out token.",
    f"With the reconstruction, the loss of the answers goes from {clean} to "
    f"{spliced} nats ({change:+.0%}). With zeros it is "
    f"{metrics['loss_zero']:.2f}. So `loss_recovered` is "
    f"{metrics.get('loss_recovered', float('nan')):.4f}.",
    "The directions of the latents are "
    f"{less} orthogonal than random directions.",
)

# %% [markdown]
# **Limits.** One layer, one SAE, and, in `tiny`, a world that is simpler than
# photographs. The [results page](../results) gathers the numbers of every
# page. Notebook 02 asks what each latent responds to.

# %% tags=["result", "remove-input"]
silent = round(metrics["dead_fraction"] * size)
mean = "" if has_k else "On average "  # with thresholds, tokens differ
source = as_text(ready["sae"])
headline(
    page,
    (f"The SAE {source} was not trained here. " if source else "")
    + f"{mean}{active} of {size:,} latents per token leave "
    f"{percent(fvu, 1)} of the variance of the held-out states after "
    f"{titled(layer)} (of {lmm.n_layers}, counted from 0) unexplained. "
    f"{active} principal components leave {percent(metrics['fvu_components'], 1)}. "
    + (f"{silent:,} latents are" if silent else "No latent is")
    + " silent on all held-out tokens.",
    "it reports no reconstruction error for its 131,072 latents, of which "
    "256 are active per token.",
    "the paper gives no number to compare.",
)

# %% tags=["remove-input"]
provenance(page, stage)
