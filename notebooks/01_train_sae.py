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
# **The question.** Sections 2.1 and 3.1: one neuron of a large multimodal model (LMM) stands for many things, one thing is
# spread over many neurons. Can the hidden states of a layer be taken apart into few active *latents* out of many, each
# with one meaning?
#
# **You will learn** how an image and a question become tokens, what a TopK sparse autoencoder (SAE) computes, and how
# to tell a good one from a bad one.
#
# **Reads** the model under study and its training samples. **Writes** `train/` of this run: `sae.safetensors`, `cfg.json`
# (the published checkpoint's format), the training's history and `metrics.json`.
#
# | preset | model | latents, k | time |
# |---|---|---|---|
# | `tiny` | Picture World LLaVA-NeXT, shipped | 1,024, 32 | 3 minutes, 2 cores |
# | `paper` | LLaVA-NeXT-LLaMA3-8B, layer 24 (the paper's 25th) | 131,072, 256 | GPUs |

# %% tags=["parameters"]
run: str = "tiny"  # results go to data/artifacts/<run>/
model: str = "data/models/tiny-llava-next"  # a folder of this project, or a name on the hub
dataset: str = "data/artifacts/tiny/world/train"  # samples with image, question and answer
heldout: str = "data/artifacts/tiny/world/heldout"  # samples that no training has seen
layer: int = 1  # 0-based; the paper's 25th layer is 24
n_latents: int = 1024  # the paper: 131072
k: int = 32  # active latents a token; the paper: 256
steps: int = 2000  # optimiser steps
batch_tokens: int = 512  # tokens an optimiser step
lr: float = 2e-3  # highest learning rate
dead_after_tokens: int = 100_000  # a latent silent for so long counts as dead; the paper's code: 10 million
kinds: list = ["base", "tiles", "newline", "text"]  # token kinds that the SAE learns from
seed: int = 0  # of the dictionary's start and of the shuffling
accumulate: int = 1  # batches whose mean gradient makes a step
mixed_precision: str = "no"  # or "bf16": the SAE's large products in bfloat16, its weights in float32
processes: int = 1  # of this machine, one a GPU; they give the same SAE as one
checkpoint_minutes: float = 10.0  # from one checkpoint to the next; a run cut short goes on from the last
tracker: str = "none"  # or tensorboard, trackio, wandb: where the curves go besides this page

# %% tags=["remove-cell"]
import time

import torch
from datasets import load_from_disk
from torch.testing import assert_close

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.show import plots
from lmm_sae_nb.support.files import project_root, read_json
from lmm_sae_nb.support.stages import Stage
from lmm_sae_nb.train import evaluate, training
from lmm_sae_nb.train.evaluate import evaluate_sae
from lmm_sae_nb.train.launch import launch
from lmm_sae_nb.train.training import train_sae

root = project_root()
plots.style()

# %% [markdown]
# ## The model and what it is trained on
#
# Samples are formatted as in the model's own fine-tuning: the image, the question, and the answer in the assistant's
# turn ("looks exactly the same as the supervised fine-tuning stage", section 3.1).

# %%
source = root / model if (root / model).is_dir() else model
lmm = LMM.load(source)
samples, unseen = load_from_disk(root / dataset), load_from_disk(root / heldout)
print(
    f"{lmm.name.rsplit('/', 1)[-1]}: {lmm.n_layers} layers of width {lmm.width}, base patches {lmm.grid}; {len(samples)} samples"
)

# %% mystnb={"figure": {"caption": "Samples that the SAE is trained on: an image, a question and its answer.", "name": "fig-samples"}}
pictured = [row for row in samples.select(range(14)) if row["image"] is not None][:6]
plots.images([row["image"] for row in pictured], [f"{row['question']}\n{row['answer']}" for row in pictured], side=1.9);
# %% [markdown]
# Every token of the sequence is of one kind, and the kinds tile it exactly. LLaVA-NeXT shows an image twice: as a whole, in
# `base` patches on a grid, and cut into `tiles` of full resolution (AnyRes), with a `newline` token after each row. Then
# there are `text`, `special` tokens (the chat template's marks) and, in a batch, `pad`.

# %%
prompt = lmm.prompt(pictured[0]["question"], pictured[0]["image"], answers=[pictured[0]["answer"]])
counts = {
    kind: int(prompt.spans[0].mask(kind).sum()) for kind in ("base", "tiles", "newline", "text", "special", "pad")
}
assert sum(counts.values()) == prompt.inputs["input_ids"].shape[1]
counts

# %% [markdown]
# ## What the SAE computes
#
# > "$\mathbf{z} = \text{TopK}(\text{ReLU}(\mathbf{W}_1(\mathbf{x} - \mathbf{b}_1) + \mathbf{b}_2))$ (1),
# > $\hat{\mathbf{x}} = \mathbf{W}_2\mathbf{z} + \mathbf{b}_3$ (2)"
#
# In the code $\mathbf{W}_1$ is `W_enc`, $\mathbf{b}_2$ is `b_enc`, $\mathbf{W}_2$ is the transpose of `W_dec`, and
# $\mathbf{b}_1 = \mathbf{b}_3$ is `b_dec`, as in the published checkpoint. The same in four lines of plain PyTorch:

# %%
sae = TopKSAE(lmm.width, 64, 4, generator=torch.Generator().manual_seed(seed))
x = lmm.hidden_states(prompt, layer)[0].float().cpu()
z = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
kept = z.topk(4, dim=-1)
z_sparse = torch.zeros_like(z).scatter(-1, kept.indices, kept.values)
x_hat = z_sparse @ sae.W_dec + sae.b_dec
assert_close(sae(x), x_hat)
latents = sae.encode(x)
assert_close(torch.zeros_like(z).scatter(-1, latents.indices, latents.acts), z_sparse)

# %% [markdown]
# ## Training
#
# The loss is the fraction of variance unexplained (FVU) plus AuxK, in which latents that have not fired for a while (dead
# ones) learn to explain what the reconstruction misses. The model is frozen; its hidden states stream into a buffer that
# mixes tokens of many samples. A figure below the cell grows while training goes on. Stop it, or lose power, and run the
# page again: it goes on from its last checkpoint, to the same SAE.

# %%
stage, code = Stage(run, "train"), [training, evaluate]
settings = dict(
    n_latents=n_latents, k=k, steps=steps, batch_tokens=batch_tokens, accumulate=accumulate, lr=lr,
    dead_after_tokens=dead_after_tokens, kinds=kinds, seed=seed, mixed_precision=mixed_precision,
)  # fmt: skip
params = dict(model=model, layer=layer, **settings)
inputs = [path for path in (root / model, root / dataset, root / heldout) if path.exists()]
curves = ["loss", "fvu", "dead_fraction", "l0", "tokens_per_second"]
if not stage.is_current(params, inputs, code):
    started = time.monotonic()
    with plots.live(curves) as on_log:
        how = dict(folder=stage.folder, checkpoint_minutes=checkpoint_minutes, tracker=tracker, on_log=on_log)
        if processes == 1:
            trained = train_sae(lmm, samples, layer, **settings, **how)
        else:
            trained = launch(processes, source, root / dataset, layer, **settings, **how)
    metrics = evaluate_sae(SAEInPlace(lmm, trained.sae.to(lmm.device), layer), unseen, kinds=kinds)
    metrics["train_seconds"] = trained.history[-1]["seconds"]
    stage.finish(params, inputs, metrics, time.monotonic() - started, code)
sae, history = TopKSAE.load(stage.folder), read_json(stage.path("history.json"))["rows"]

# %% mystnb={"figure": {"caption": "Training: the fraction of variance unexplained falls; few latents stay dead.", "name": "fig-training"}}
plots.training(history, curves);
# %% [markdown]
# ## Is it any good?
#
# On held-out samples: how much variance is left unexplained, in all and by token kind; what share of latents never fires;
# and how much of the model's skill survives when the reconstruction takes the layer's place. `loss_recovered` is 1 if the
# spliced model answers as well as the untouched one, 0 if no better than with the layer's output set to zero.

# %%
metrics = read_json(stage.path("metrics.json"))
for name, value in metrics.items():
    print(f"{name:24s} {value:,.4f}")

# %% mystnb={"figure": {"caption": "Cosine similarity of each dictionary row with its nearest neighbour. The paper expects near orthogonality.", "name": "fig-coherence"}}
rows = sae.W_dec.detach()[:2048]
plots.histogram((rows @ rows.T - 2 * torch.eye(len(rows))).amax(1).numpy(), "cosine with the nearest other row");
# %% [markdown]
# ## What we found
#
# The numbers above are this run's; the [results page](../results) gathers those of every stage. The limits: one layer, one
# seed, and a world that is simpler than photographs. Notebook 02 asks what each latent responds to.

# %% tags=["hide-input"]
manifest = read_json(stage.path("manifest.json"))
print(f"run {run} · {model} · layer {layer} · seed {seed} · {manifest['seconds']:.0f} s · {manifest['versions']}")
