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
# **The question** (section 2.4). Which latents, at which tokens, made the
# model give this answer and not another one?
#
# **You will learn** what the influence of a latent is, how one forward pass and
# one backward pass estimate it for every latent at every token, and how good
# this estimate is. We compare it with ablation, pair by pair, at three layers.
#
# **Reads** the SAE of notebook 01, held-out samples and training samples.
# **Writes** the stage `attribute`.
#
# | preset | decisions, pairs ablated in each | time |
# |---|---|---|
# | `tiny` | 60 held-out decisions, 16 random active pairs | 2 minutes, 2 cores |
# | `paper` | 20 held-out decisions, 200 pairs | GPUs |

# %% tags=["parameters"]
# results go to data/artifacts/<run>/
run: str = "tiny"
# the model under study: a folder of this project, or a name on the hub
model: str = "data/models/tiny-llava-next"
layer: int = 1  # counted from 0; the layer that the SAE was trained on
# samples that no training has seen: image and question
heldout: str = "data/artifacts/tiny/world/heldout"
# samples for the small SAEs of other layers
dataset: str = "data/artifacts/tiny/world/train"
decisions: int = 60  # held-out decisions that are attributed
pairs: int = 16  # active (token, latent) pairs ablated in each decision
path_pairs: int = 1  # of these, integrated on a separate path
ig_steps: int = 4  # steps of integrated gradients
many_steps: int = 16  # the same, to see what more steps do
many_decisions: int = 8  # the first ones get many steps, too
other_layers: list = [4, 6]  # layers that get a small SAE, to compare
other_decisions: int = 16  # decisions for each of these layers
# the small SAE of each of these layers
other_sae: dict = {
    "n_latents": 1024,
    "k": 16,  # active latents per token
    "steps": 60,  # optimiser steps of 1,024 tokens
}
repetitions: int = 9  # of each timed run
seed: int = 0  # of the drawn pairs, the bootstrap and the small SAEs

# %% tags=["remove-cell"]
from itertools import islice

import numpy as np
import torch
from datasets import load_from_disk
from IPython.display import HTML
from torch.testing import assert_close

from lmm_sae_nb import SAEInPlace
from lmm_sae_nb.attribute.agreement import measure_cost
from lmm_sae_nb.attribute.attribution import (
    difference,
    exact,
    greedy_decision,
    integrated,
    linear,
)
from lmm_sae_nb.attribute.study import (
    ComparedDecision,
    agreement_metrics,
    compare_ways,
    joined,
    sae_hashes,
    small_saes,
)
from lmm_sae_nb.show import plots
from lmm_sae_nb.show.report import (
    findings,
    headline,
    metrics_table,
    provenance,
)
from lmm_sae_nb.support.intervals import Mean, read_mean
from lmm_sae_nb.support.stages import Metrics, Page, read_typed

page = Page(globals())
plots.style()

# %% [markdown]
# ## A decision
#
# The model decides when it writes the first token of its answer. We compare
# this token $v_c$ with a baseline token $v_b$: the runner-up.
#
# > "$d(\mathbf{u}, v_c, v_b) = \mathbf{u}[v_c] - \mathbf{u}[v_b]$."
#
# $\mathbf{u}$ holds the logits after the last token of the prompt.

# %%
place = SAEInPlace.load(page.locate(model), page.file("train"), layer)
lmm, sae = place.lmm, place.sae
samples = load_from_disk(page.locate(heldout))
pictured = (row for row in samples if row["image"] is not None)
unseen = list(islice(pictured, decisions))
row = next((r for r in unseen if r.get("family") == "exists"), unseen[0])
choice = greedy_decision(lmm, row["question"], row["image"])
answer = lmm.tokenizer.decode(choice.answer)
runner_up = lmm.tokenizer.decode(choice.baseline)
print(f"{row['question']}   {answer!r} against {runner_up!r}")

# %% [markdown]
# ## Influence, by definition and linearly
#
# > "Calculate the influence of the j-th feature in the i-th token on the
# > decision preference … $I(i, j, v_c, v_b) = d(\hat{\mathbf{u}}, v_c, v_b) -
# > d(\mathbf{u}, v_c, v_b)$" … "Given the time-intensive nature of this method
# > due to multiple forward passes, we employ a linear approximation …
# > $I \approx \left(\frac{\partial d(\mathbf{u})}{\partial \mathbf{z}}
# > \right)^T (\hat{\mathbf{z}} - \mathbf{z})$."
#
# $\hat{\mathbf{u}}$ are the logits when latent $j$ is set to zero at token
# $i$. We show the *attribution* $-I$: it is positive if the latent supports
# the answer. The SAE is spliced into the model; what it leaves unexplained
# stays in, as a term of its own. `linear` gives the estimate for all pairs at
# once. Here is the same in plain PyTorch:

# %%
parts = linear(place, choice)

kinds = ("base", "tiles", "newline", "text")
mask = choice.prompt.mask(*kinds)[0]
x = lmm.hidden_states(choice.prompt, layer)[0, mask]
z = sae.encode(x)
acts = z.acts.clone().requires_grad_()
x_hat = torch.einsum("tk,tkw->tw", acts, sae.W_dec[z.indices]) + sae.b_dec
states = x_hat + (x - sae.decode(z))


def splice(new):
    at = mask[None, :, None]
    return lmm.spliced(layer, lambda old: old.masked_scatter(at, new))


with splice(states):
    d = difference(lmm, choice)[0]
gradient, slope = torch.autograd.grad(d, (acts, states))
d = float(d.detach())
by_hand = (acts * gradient).detach()
assert_close(parts.values[mask], by_hand, atol=1e-4, rtol=1e-3)
assert abs(parts.clean - d) < 1e-4

# %% [markdown]
# One pair by definition: we set the strongest pair to zero and run the model
# again. `exact` does this for any set of pairs. It takes a mask over all
# (token, slot) pairs. A *slot* is one of the $k$ latents that the SAE keeps at
# a token; `indices` says which latent it is.

# %%
strongest = parts.values.abs() == parts.values.abs().max()
token, slot = strongest[mask].nonzero()[0].tolist()
direction = sae.W_dec[z.indices[token, slot]]
silenced = states.detach().clone()
silenced[token] -= z.acts[token, slot] * direction
with torch.no_grad(), splice(silenced):
    ablated = d - float(difference(lmm, choice)[0])

by_ablation = float(exact(place, choice, strongest)[strongest][0])
assert abs(by_ablation - ablated) < 1e-4
estimate = float(parts.values[strongest][0])
leading = int(z.indices[token, slot])
print(f"latent {leading}, token {token} of those with the SAE:")
print(f"by ablation {ablated:+.4f}, linearly {estimate:+.4f},")
print(f"which is {estimate / ablated:.0%} of its effect")

# %% [markdown]
# For the largest effects the linear form can be far off. A rank correlation,
# used below, does not see this: it compares orders, not sizes. So we also
# report the median of linear over exact among the 5 % largest pairs.
#
# **The parts add up.** At each token, latents, error and bias sum to
# $\langle \partial d / \partial \mathbf{x}, \mathbf{x} \rangle$. Integrated
# gradients let all latents grow together from zero to their values. Over all
# tokens they sum to $d$ minus the $d$ of a model in which only `b_dec` is left,
# if the integral has enough steps.

# %%
summed = (parts.of_tokens() + parts.error + parts.bias)[mask]
expected = (slope * states).sum(-1).detach()
assert_close(summed, expected, atol=1e-3, rtol=1e-3)

with torch.no_grad(), splice(sae.b_dec.expand_as(states)):
    nothing = float(difference(lmm, choice)[0])
sums = []
for steps in (ig_steps, 16, 32):
    whole = integrated(place, choice, steps=steps)
    total = float((whole.of_tokens() + whole.error).sum())
    missing = d - nothing - total
    sums.append({"steps": steps, "sum": total, "missing": missing})
title = f"The parts should sum to {d - nothing:.3f} logits"
plots.table(sums, title)

# %% [markdown]
# With 4 steps (preset `tiny`) a part of the difference is missing; with more
# the sum converges. A part of the disagreement below may come from too few
# steps. We check this with many steps on some decisions.

# %% [markdown]
# ## What a small change would do
#
# These are slopes times values: what the linear form expects if a part is
# removed. They do not sum to $d$; only integrated gradients do. The sums over
# each kind of token, in logits:

# %%
plots.table(parts.of_kinds(choice.prompt))

# %% [markdown]
# The latents that support the answer most, and those that oppose it most,
# summed over all tokens. The strongest pair above is part of its latent's sum.

# %%
latents, totals = parts.of_latents()
ranked = [
    {"latent": str(n), "attribution, logits": total,
     "strongest pair": "yes" if n == leading else ""}
    for n, total in zip(latents.tolist(), totals.tolist(), strict=True)
]  # fmt: skip
plots.table(ranked[:5] + ranked[-5:])

# %% mystnb={"figure": {"caption": "Attribution at the base image's patches: of all latents, and of the three latents that support and the three that oppose the answer most there. Orange is for the answer, blue against it. Each map has a colour scale of its own, so colours of two maps cannot be compared.", "name": "fig-attribution-maps"}, "image": {"alt": "The image of the question, and seven copies of it with patches shaded orange or blue."}}
base = choice.prompt.mask("base")[0]
grid = choice.prompt.spans[0].as_grid
on_image = parts.of_latents(base)[0].tolist()
maps = {"all latents": grid(parts.of_tokens()[base]).numpy()}
for latent in on_image[:3] + on_image[-3:]:
    maps[f"latent {latent}"] = grid(parts.map_of(latent)[base]).numpy()
plots.signed_maps(row["image"], maps);
# %% [markdown]
# The attribution of single latents lies on the things in the scene, or on an
# edge where the image is empty. It does not keep to the thing that the question
# asks about, and one latent can be for the answer at one patch and against it
# at the next.
#
# And at the words of the question (the numbers appear when you point at a
# word):

# %%
text = choice.prompt.mask("text")[0]
ids = choice.prompt.inputs["input_ids"][0].cpu()[text].tolist()
pieces = lmm.tokenizer.convert_ids_to_tokens(ids)
HTML(plots.token_html(pieces, parts.of_tokens()[text].tolist()))

# %% [markdown]
# ## How good is the approximation?
#
# We take many held-out decisions and draw random active (token, latent) pairs
# in each. Every pair is ablated. Three approximations are compared with that:
#
# 1. the linear one;
# 2. integrated gradients on the common path, where all latents grow together;
# 3. integrated gradients on a separate path for a pair: this latent alone
#    grows from zero at this token, and all else stays as it is. This costs as
#    much as ablation, so we do it for a few pairs only.
#
# All active pairs of a decision are equally likely to be drawn. Other layers
# get a small SAE each. These differ from the page's SAE in $k$, in size and in
# training, too, so a difference between layers is not only one of depth.

# %%
stage = page.stage("attribute", after=("train",))
small = small_saes(
    lmm, load_from_disk(page.locate(dataset)), other_layers,
    **other_sae, seed=seed, folder=stage.path("others"),
)  # fmt: skip
rows = [unseen] + [unseen[:other_decisions]] * len(small)
compared = stage.result(
    "pairs", list[ComparedDecision],
    lambda: compare_ways(
        [place, *small], rows, pairs=pairs, path_pairs=path_pairs,
        ig_steps=ig_steps, many_steps=many_steps,
        many_decisions=many_decisions, seed=seed,
    ),
)  # fmt: skip
cost = stage.result(
    "cost", Metrics, lambda: measure_cost(place, choice, repetitions)
)
metrics = stage.finish(agreement_metrics(compared, layer, seed) | cost)

# %% mystnb={"figure": {"caption": "Attribution by ablation and by each approximation, for all drawn pairs of the page's SAE. On the line the two are equal. Most linear points lie close to it, a few do not; many of integrated gradients do not.", "name": "fig-agreement"}, "image": {"alt": "Two scatter plots against ablation: linear attribution and integrated gradients."}}
ours = [decision for decision in compared if decision.layer == layer]
exactly, linearly, on_common_path = (
    np.array(joined(ours, way)) for way in ("exact", "linear", "ig")
)
panels = {"linear": linearly, "integrated gradients": on_common_path}
plots.agreement(exactly, panels);
# %% mystnb={"figure": {"caption": "Rank correlation with ablation within a decision: mean over decisions and 99 % interval, by layer of the SAE.", "name": "fig-by-layer"}, "image": {"alt": "Mean rank correlations with intervals of the linear form and of integrated gradients, a row for each layer."}}
ways = {"linear": "linear", "integrated gradients": "ig"}
by_layer = {}
for n in sorted([layer, *other_layers]):
    end = "" if n == layer else f"_layer_{n}"
    by_layer[f"layer {n}"] = {
        label: read_mean(metrics, f"spearman_{way}{end}")
        for label, way in ways.items()
    }
plots.means(by_layer, "Spearman's rank correlation with ablation");
# %% tags=["hide-output"]
metrics_table(stage)

# %% [markdown]
# ## All pairs
#
# A decision has thousands of active pairs (a column of the table). To ablate
# all of them takes hours here: `python -m lmm_sae_nb.benchmarks ablations`
# does it, and writes `book/ablations.json`. The table shows the last such
# measurement.
#
# It need not agree with the table above, for three reasons: there are all pairs
# instead of 16 drawn ones, 100 decisions at each layer, and 10 steps of
# integrated gradients where the command measured. And the SAEs can be others:
# the last column compares their files with this page's.
#
# The row of layer 1 comes from a separate script (float32). On 993 pairs of two
# decisions it differed from `exact` by at most 9e-6 logits. The other rows come
# from the command, in an earlier version. An SAE trained on another machine is
# not bit-identical.

# %%
measured = page.root / "book/ablations.json"
known = measured.is_file()
layers = read_typed(measured, dict)["layers"] if known else []
columns = {
    "linear, Spearman": "spearman_linear", "linear, signs": "sign_linear",
    "integrated, Spearman": "spearman_ig", "integrated, signs": "sign_ig",
}  # fmt: skip
files = [page.file("train", "sae.safetensors")]
files += stage.path("others").glob("*/sae.safetensors")
hashes = sae_hashes(files)
table = []
for each in layers:
    counts = [decision["pairs"] for decision in each["by_decision"]]
    line = {"layer": each["layer"], "decisions": each["decisions"]}
    line["pairs in one"] = f"{min(counts):,} to {max(counts):,}"
    line |= {title: Mean(**each[name]) for title, name in columns.items()}
    line["this page's SAE"] = "yes" if each["sae"] in hashes else "no"
    table.append(line)
plots.table(table, "Every active pair ablated: means over decisions")

# %% [markdown]
# ## What we found

# %% tags=["remove-input"]
def written(name):  # a metric with its interval
    value = read_mean(metrics, name)
    return f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"


def of_layers(name, digits=2):  # a metric at each layer
    return ", ".join(
        f"{metrics[name + end]:.{digits}f} at layer {n}"
        for n, end in ends.items()
    )


ends = {
    n: "" if n == layer else f"_layer_{n}"
    for n in sorted([layer, *other_layers])
}
linear_mean = read_mean(metrics, "spearman_linear")
together = read_mean(metrics, "spearman_ig")
worse = together.high < linear_mean.low
order = "worse than" if worse else "about as well as"
sentences = [
    "The linear form agrees with ablation in rank: the correlation "
    f"within a decision is {written('spearman_linear')}, and "
    f"{metrics['sign_linear']:.1%} of the signs are the same.",
    "In size: for the 5 % largest effects the median of "
    f"linear over exact is {of_layers('ratio_linear_largest')}.",
    f"Depth: its rank correlation is {of_layers('spearman_linear')}; "
    f"equal signs are {of_layers('sign_linear')}.",
    f"It costs {metrics['cost_ratio']:.1f} forward passes of the "
    "spliced model, for all pairs together. The paper's code needs two "
    "forward passes and a backward pass for each latent.",
    f"With {ig_steps} steps, integrated gradients on the common path rank "
    f"pairs {order} the linear form: {written('spearman_ig')} against "
    f"{written('spearman_linear')}.",
    "On a separate path for each pair they have a rank correlation with "
    f"ablation of {of_layers('spearman_separate_paths', 3)}; equal signs "
    f"are {of_layers('sign_separate_paths')}.",
]
if layers:
    everything = ", ".join(
        f"{each['spearman_linear']['mean']:.2f} and "
        f"{each['sign_linear']['mean']:.2f} at layer {each['layer']}"
        for each in layers
    )
    sentences.insert(
        3,
        "With all pairs ablated, rank correlation and equal signs of the "
        f"linear form are {everything}."
    )  # fmt: skip
if "spearman_ig_many" in metrics:
    few, many = (
        read_mean(metrics, f"spearman_ig_{name}")
        for name in ("few", "many")
    )
    cause = (
        "Too few steps do not explain the difference to the linear form."
        if many.high < linear_mean.low
        else "So more steps may close the gap to the linear form."
    )
    sentences.insert(
        -1,
        f"On {metrics['decisions_many_steps']} decisions we took "
        f"{many_steps} steps, too. The correlation with ablation is "
        f"{written('spearman_ig_many')} with {many_steps} steps and "
        f"{written('spearman_ig_few')} with {ig_steps}; that of the two "
        f"is {written('spearman_steps')}. {cause}"
    )  # fmt: skip
findings(*sentences)

# %% [markdown]
# Why do integrated gradients on the common path agree less with ablation? They
# remove all latents together. They measure a latent's part of a joint effect,
# not the effect of removing it alone. Their advantage is that the parts add up
# to the total, with enough steps. Separate paths show what the linear form
# misses: only the curvature along one latent's own path.
#
# **Limits.** Very small influences are close to the rounding of float32
# logits, and their rank and sign are chance; at deep layers this concerns many
# pairs. There is one SAE for each layer, and only the first token of answers
# counts.

# %% tags=["result", "remove-input"]
ranks = [metrics[f"spearman_linear{end}"] for end in ends.values()]
signs = [metrics[f"sign_linear{end}"] for end in ends.values()]
headline(
    page,
    "the linear form, at the cost of "
    f"{metrics['cost_ratio']:.1f} forward passes, has a rank correlation "
    f"of {linear_mean.mean:.2f} with ablation, on {metrics['decisions']} "
    f"decisions. At {len(ends)} layers it is {min(ranks):.2f} to "
    f"{max(ranks):.2f}, and {min(signs):.0%} to {max(signs):.0%} of the "
    "signs are right. For the 5 % largest effects the median of linear "
    f"over exact is {metrics['ratio_linear_largest']:.2f}.",
    "it uses the linear form and reports no comparison with ablation.",
    "no comparison is possible; here ablation of a sample is cheap.",
)

# %% tags=["remove-input"]
provenance(page, stage)
