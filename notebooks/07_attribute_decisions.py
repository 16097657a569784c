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
# # 7. Attribute decisions to latents
#
# **The question.** Section 2.4: which latents, at which tokens, made the model answer this and not that?
#
# **You will learn** what influence is, how one forward and one backward approximate that of every active latent at every
# token, and how well: against ablation, pair by pair, at three depths.
#
# **Reads** the SAE, held-out samples, training samples. **Writes** `attribute/`.
#
# | preset | decisions, pairs ablated | time |
# |---|---|---|
# | `tiny` | 100 held-out, 16 random active pairs each | 2 minutes, 2 cores |
# | `paper` | 20, 200 each | GPUs |

# %% tags=["parameters"]
run: str = "tiny"  # results go to data/artifacts/<run>/
model: str = "data/models/tiny-llava-next"  # a folder of this project, or a name on the hub
layer: int = 1  # 0-based, the layer that the SAE was trained on
heldout: str = "data/artifacts/tiny/world/heldout"  # samples that no training has seen, with image and question
dataset: str = "data/artifacts/tiny/world/train"  # what the small SAEs of other layers are trained on
decisions: int = 100  # held-out decisions of the layer's SAE
pairs: int = 16  # active (token, latent) pairs of each that are ablated, at random
own_pairs: int = 1  # of them, integrated along their own path
ig_steps: int = 4  # steps of integrated gradients
other_layers: list = [4, 6]  # small SAEs are trained there, to compare by depth
other_decisions: int = 16  # decisions for each of them
other_latents: int = 1024  # their latents
other_steps: int = 60  # their optimiser steps, of 1,024 tokens
k: int = 16  # their active latents a token
repetitions: int = 9  # of the timing
seed: int = 0  # of the pairs and of the small SAEs

# %% tags=["remove-cell"]
import time
from itertools import islice

import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import load_from_disk
from IPython.display import HTML
from torch.testing import assert_close

from lmm_sae_nb.attribute import agreement as attribute_agreement
from lmm_sae_nb.attribute import attribution
from lmm_sae_nb.attribute.agreement import agreement, cost, own_decision, some_pairs
from lmm_sae_nb.attribute.attribution import difference, exact, integrated, linear, own_path
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.in_place import SAEInPlace
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.show import plots
from lmm_sae_nb.support import intervals
from lmm_sae_nb.support.files import project_root, read_json, write_json
from lmm_sae_nb.support.intervals import bounds, mean_interval
from lmm_sae_nb.support.stages import Stage, require
from lmm_sae_nb.train.training import Recipe, train_saes

root = project_root()
plots.style()

# %%
lmm = LMM.load(root / model if (root / model).is_dir() else model)
sae = TopKSAE.load(require(run, "train", "sae.safetensors", "01_train_sae.py").parent).requires_grad_(False).to(lmm.device)
unseen = list(islice((row for row in load_from_disk(root / heldout) if row["image"] is not None), decisions))
row = next((row for row in unseen if row["family"] == "exists"), unseen[0]) if "family" in unseen[0] else unseen[0]
choice = own_decision(lmm, row["question"], row["image"])
told, instead = (lmm.tokenizer.decode(token) for token in (choice.answer, choice.baseline))
print(f"{row['question']}   {told!r} against {instead!r}, the runner-up")

# %% [markdown]
# ## Influence, by definition and linearly
#
# > "$d(\mathbf{u}, v_c, v_b) = \mathbf{u}[v_c] - \mathbf{u}[v_b]$ … the influence … is the difference … when steering is
# > applied or not"; approximately $\frac{\partial d}{\partial z_{ij}} (\hat{z}_{ij} - z_{ij})$.
#
# The SAE is spliced into the clean run and what it leaves unexplained stays in, as a term of its own. What is shown is
# `attribution`, $-I$: positive supports the answer. The linear form in plain PyTorch, with the latents themselves as leaves:

# %%
parts = linear(SAEInPlace(lmm, sae, layer), choice)
mask = choice.prompt.mask("base", "tiles", "newline", "text")[0]
x = lmm.hidden_states(choice.prompt, layer)[0, mask]
z = sae.encode(x)
acts = z.acts.clone().requires_grad_()
states = torch.einsum("tk,tkw->tw", acts, sae.W_dec[z.indices]) + sae.b_dec + (x - sae.decode(z))
with lmm.spliced(layer, lambda hidden: hidden.masked_scatter(mask[None, :, None], states)):
    d = difference(lmm, choice)[0]
gradient, slope = torch.autograd.grad(d, (acts, states))
assert_close(parts.values[mask], (acts * gradient).detach(), atol=1e-4, rtol=1e-3)
assert abs(parts.clean - float(d.detach())) < 1e-4

# %% [markdown]
# One pair by definition: the strongest is silenced and the model runs again. And the parts sum to what they should: at each
# token latents, error and bias to $\langle \partial d / \partial \mathbf{x}, \mathbf{x} \rangle$; integrated gradients over
# all tokens to $d$ of the clean run less $d$ with nothing but `b_dec`.

# %%
strongest = parts.values.abs() == parts.values.abs().max()
token, slot = strongest[mask].nonzero()[0].tolist()
silenced = (states - 0).detach().clone()
silenced[token] -= z.acts[token, slot] * sae.W_dec[z.indices[token, slot]]
with torch.no_grad(), lmm.spliced(layer, lambda hidden: hidden.masked_scatter(mask[None, :, None], silenced)):
    without = float(difference(lmm, choice)[0])
by_hand = float(d.detach()) - without
assert abs(float(exact(SAEInPlace(lmm, sae, layer), choice, strongest)[strongest][0]) - by_hand) < 1e-4
assert_close((parts.of_tokens() + parts.error + parts.bias)[mask], (slope * states).sum(-1).detach(), atol=1e-3, rtol=1e-3)
whole = integrated(SAEInPlace(lmm, sae, layer), choice, steps=ig_steps)
with torch.no_grad(), lmm.spliced(layer, lambda hidden: hidden.masked_scatter(mask[None, :, None], sae.b_dec.expand_as(states))):
    nothing = float(difference(lmm, choice)[0])
summed = float((whole.of_tokens() + whole.error).sum())
print(f"strongest pair: {by_hand:+.4f} exactly, {float(parts.values[strongest][0]):+.4f} linearly")
print(f"integrated gradients sum to {summed:.3f} with {ig_steps} steps, the whole difference is {parts.clean - nothing:.3f}")

# %% [markdown]
# ## Where the decision comes from

# %%
latents, totals = parts.of_latents()
for kind in ("base", "tiles", "newline", "text"):
    own = choice.prompt.mask(kind)[0]
    print(f"{kind:8s} latents {float(parts.of_tokens()[own].sum()):+.3f}   error {float(parts.error[own].sum()):+.3f}   bias {float(parts.bias[own].sum()):+.3f}")
print("for:    ", [(n, round(v, 3)) for n, v in zip(latents[:5].tolist(), totals[:5].tolist(), strict=True)])
print("against:", [(n, round(v, 3)) for n, v in zip(latents[-5:].tolist(), totals[-5:].tolist(), strict=True)])

# %% mystnb={"figure": {"caption": "Attribution at the base image's patches: of all latents, and of the three that support and the three that oppose the answer most there. Orange is for, blue against.", "name": "fig-attribution-maps"}}
base = choice.prompt.mask("base")[0]
seen = parts.of_latents(base)[0].tolist()
maps = {"all latents": parts.of_tokens()} | {f"latent {n}": parts.map_of(n) for n in seen[:3] + seen[-3:]}
axes = plots.images([row["image"]] * (1 + len(maps)), ["image"] + [""] * len(maps), columns=4, side=1.9)
for ax, (title, values_of) in zip(axes.flat[1:], maps.items(), strict=False):
    plots.signed_map(row["image"], choice.prompt.spans[0].as_grid(values_of[base]).numpy(), title, ax=ax)

# %%
words = choice.prompt.mask("text")[0]
pieces = lmm.tokenizer.convert_ids_to_tokens(choice.prompt.inputs["input_ids"][0][words.to(lmm.device)].tolist())
HTML(plots.token_html(pieces, parts.of_tokens()[words].tolist()))

# %% [markdown]
# ## How good is the approximation?
#
# For each of the held-out decisions (the model's own first token against its runner-up) random active pairs are ablated, all
# equally likely, so that a rank correlation over them estimates that over all pairs of the decision, thousands of them. How
# decisions differ widens the interval of the mean more than how few of their pairs were drawn. Ablating all of them for 100
# decisions takes hours here: `python -m lmm_sae_nb.benchmarks.ablations` does it, in pieces and layer by layer, and puts the
# outcome into `book/ablations.json`.
#
# Three approximations are held against ablation: the linear one; integrated gradients on the common path, on which all
# latents grow from nothing at once; and, for a few pairs, integrated gradients on each pair's own path.

# %%
stage, code = Stage(run, "attribute"), [attribution, attribute_agreement, intervals]
params = dict(
    model=model, layer=layer, heldout=heldout, dataset=dataset, decisions=decisions, pairs=pairs, own_pairs=own_pairs,
    ig_steps=ig_steps, other_layers=other_layers, other_decisions=other_decisions, other_latents=other_latents,
    other_steps=other_steps, k=k, repetitions=repetitions, seed=seed,
)  # fmt: skip
inputs = [path for path in (root / model, root / heldout, root / dataset, Stage(run, "train").path("manifest.json")) if path.exists()]
ways = ("linear", "ig", "own_path")
if not stage.is_current(params, inputs, code):
    started = time.monotonic()
    timing = cost(SAEInPlace(lmm, sae, layer), choice, repetitions)
    recipes = {f"layer_{other}": Recipe(other, n_latents=other_latents, k=k, lr=2e-3) for other in other_layers}
    how = dict(steps=other_steps, batch_tokens=1024, dead_after_tokens=50_000, seed=seed, folder=stage.path("others"))
    small = train_saes(lmm, load_from_disk(root / dataset), recipes, **how) if recipes else {}
    saes = {layer: sae} | {recipes[name].layer: its.sae.requires_grad_(False) for name, its in small.items()}
    rows, generator = [], torch.Generator().manual_seed(seed)
    for at, its in saes.items():
        for sample in unseen if at == layer else unseen[:other_decisions]:
            case = own_decision(lmm, sample["question"], sample["image"])
            one = linear(SAEInPlace(lmm, its, at), case)
            asked = some_pairs(one, pairs, generator)
            few = some_pairs(one, own_pairs, generator, among=asked)
            values = {
                "exact": exact(SAEInPlace(lmm, its, at), case, asked),
                "linear": one.values, "ig": integrated(SAEInPlace(lmm, its, at), case, steps=ig_steps).values,
                "own_path": own_path(SAEInPlace(lmm, its, at), case, few),
            }  # fmt: skip
            rows.append({"layer": at} | {name: [round(v, 8) if v == v else None for v in value[asked].tolist()] for name, value in values.items()})
    write_json(stage.path("pairs.json"), {"rows": rows})

    def columns(row):
        return {name: torch.tensor([[np.nan if v is None else v for v in row[name]]]) for name in ("exact", *ways)}

    metrics = {"decisions": sum(row["layer"] == layer for row in rows), "pairs": sum(len(row["exact"]) for row in rows if row["layer"] == layer)}
    for at in saes:
        of = [columns(row) for row in rows if row["layer"] == at]
        end = "" if at == layer else f"_layer_{at}"
        for way in ways:
            if way == "own_path":  # few pairs a decision: all together
                both = agreement(*(torch.cat([c[name] for c in of], 1) for name in ("exact", way)))
                metrics |= {f"spearman_{way}{end}": both.spearman, f"sign_{way}{end}": both.sign, f"pairs_{way}{end}": both.pairs}
                continue
            found = [agreement(c["exact"], c[way]) for c in of]
            for name, values in {"spearman": [a.spearman for a in found], "sign": [a.sign for a in found]}.items():
                metrics |= bounds(f"{name}_{way}{end}", mean_interval(values, seed=seed))
    stage.finish(params, inputs, metrics | timing, time.monotonic() - started, code)
metrics, rows = read_json(stage.path("metrics.json")), read_json(stage.path("pairs.json"))["rows"]
for name, value in metrics.items():
    if not name.endswith(("_low", "_high")):
        ends = f"  [{metrics[name + '_low']:.3f}, {metrics[name + '_high']:.3f}]" if name + "_low" in metrics else ""
        print(f"{name:28s} {value:10.4g}{ends}")

# %% mystnb={"figure": {"caption": "Ablated against approximated attribution, all decisions of the layer's SAE together.", "name": "fig-agreement"}}
own = [row for row in rows if row["layer"] == layer]
together = {name: np.concatenate([np.array(row[name], float) for row in own]) for name in ("exact", "linear", "ig")}
plots.agreement(together["exact"], {"linear": together["linear"], "integrated gradients": together["ig"]});

# %% mystnb={"figure": {"caption": "Mean rank correlation with ablation within a decision, by the layer of the SAE; 99 % intervals.", "name": "fig-by-layer"}}
depths = {n: "" if n == layer else f"_layer_{n}" for n in sorted([layer, *other_layers])}
_, ax = plt.subplots(figsize=(5, 2.2))
for way, label in (("linear", "linear"), ("ig", "integrated gradients")):
    means = [metrics[f"spearman_{way}{end}"] for end in depths.values()]
    spread = np.abs(np.array([[metrics[f"spearman_{way}{end}{b}"] for end in depths.values()] for b in ("_low", "_high")]) - means)
    ax.errorbar(list(depths), means, yerr=spread, fmt="o-", capsize=2, label=label)
ax.set(xlabel="layer of the SAE", ylabel="Spearman, with ablation", xticks=list(depths), ylim=(0, 1))
ax.legend(frameon=False);

# %% [markdown]
# ## Every pair
#
# What the long measurement found, layer by layer, of the SAEs whose hashes it names (an SAE trained on another machine may
# differ in its bits). The pieces of layer 1 were computed by a script that is not in the repository: the same ablations, with
# the decoder's linear products through oneDNN, in float32, and the last layer for the last token alone; on 993 pairs of two
# decisions the difference to `attribution.exact`, which then had torch's own products, was at most 9e-6 logits. The other
# layers' come from the command as it then was, those of a part of layer 4's decisions from a second process with its
# `measure`.

# %%
measured = root / "book/ablations.json"
every = read_json(measured)["layers"] if measured.is_file() else []
cell = lambda its: its and "{mean:.3f} [{low:.3f}, {high:.3f}]".format_map(its)  # noqa: E731
plots.table([
    {"layer": at["layer"], "SAE": at["sae"][:8], "decisions": at["decisions"], "pairs": at["pairs"]}
    | {f"{way}, {what}": cell(at.get(f"{name}_{short}")) for short, way in (("linear", "linear"), ("ig", "integrated")) for name, what in (("spearman", "Spearman"), ("sign", "signs"))}
    for at in every
], "Every active pair ablated: means over decisions, 99 % intervals" if every else "not measured yet")  # fmt: skip

# %% [markdown]
# ## What we found
#
# The linear form ranks pairs as ablation does, at the price printed above (`cost_ratio`: all pairs in multiples of one forward
# of the spliced model; the reference code needs two forwards and a backward for *each* latent). Integrated gradients rank
# worse against ablation, not better, and for a reason: their path takes away all latents at once, and so a latent's
# share in a joint effect is what they tell; their merit is that shares sum to the whole. On a pair's own path they agree
# with ablation almost perfectly, but at the deepest of these layers, where most pairs' influence is hardly above the rounding
# of logits: what the linear form misses is the curve of that one path. Limits: pairs of very small influence, near the
# rounding of float32 logits, rank by chance; one SAE a layer; the first token of answers only.

# %% tags=["hide-input"]
manifest = read_json(stage.path("manifest.json"))
print(f"run {run} · {model} · layer {layer} · seed {seed} · {manifest['seconds']:.0f} s · {manifest['versions']}")
