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
# # A3. What the paper's scale needs
#
# **The question.** How much memory, disk and time does the paper's own scale
# need (section 3.1)? How much of that can we know without a GPU?
#
# **You will learn** what notebooks 01 to 03 cost on one GPU and on eight, and
# what decides the cost. You will see whether every page of the preset fits one
# GPU. A small run says how close such a prediction comes.
#
# **Reads** a preset's file. **Writes** the stage `full_scale`: the
# predictions, and what a *geometry twin* measured. Time: half a minute.

# %% tags=["parameters"]
# results go to data/artifacts/<run>/
run: str = "tiny"
# the preset whose costs are predicted
preset: str = "notebooks/params/paper.yaml"
# one of "A100 80GB", "H100 80GB" or "RTX 4090"
gpu: str = "A100 80GB"
cached_images: int = 46684  # images that notebook 02 caches in the paper
# fraction, from 0 to 1, of the GPU's published peaks that is reached
utilisation: float = 0.4
# the model whose geometry the twin has
twin: str = "llava-hf/llama3-llava-next-8b-hf"
twin_width: int = 64  # width of the twin's decoder; the model's is 4096
twin_images: int = 1  # pictures that the twin reads
# optimiser steps of the twin's training, of 1,024 tokens each
twin_steps: int = 2
seed: int = 0  # of the twin's weights and pictures

# %% tags=["remove-cell"]
import pandas as pd
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lmm_sae_nb.full_scale.costs import (
    Assumptions,
    device_named,
    train_cost,
)
from lmm_sae_nb.full_scale.geometry_twin import (
    geometry_twin,
    gpu_rows,
    noise,
    predicted_and_measured,
    run_twin,
)
from lmm_sae_nb.full_scale.models import (
    count_parameters,
    forward_flops,
    image_layout,
    meta_model,
)
from lmm_sae_nb.full_scale.pages import (
    dominating,
    page_hours,
    page_needs,
    page_rows,
)
from lmm_sae_nb.full_scale.presets import (
    commands,
    cost_metrics,
    explainer_name,
    preset_costs,
    read_preset,
)
from lmm_sae_nb.show import plots
from lmm_sae_nb.show.report import (
    findings,
    headline,
    metrics_table,
    provenance,
)
from lmm_sae_nb.support.stages import Metrics, Page, read_typed

page = Page(globals())
plots.style()

# %% [markdown]
# ## The models
#
# We build the preset's models as their real classes on torch's *meta* device,
# where weights have shapes and no memory. So we count parameters instead of
# looking them up. The layout of an image's tokens comes from the model's own
# code.
#
# To predict the costs of your own preset, set `preset` to its file. Values that
# it does not give are the notebooks' defaults. Tiles are counted for LLaVA-NeXT
# and LLaVA-OneVision; for other families that cut tiles, the forecast counts
# the whole image alone and is too low. Where a model's config does not say how
# an image becomes tokens, as with a Q-Former, this page stops and says so. With
# a ready SAE, no training is counted; `n_latents` and `k` should be the SAE's.

# %%
path, device = page.locate(preset), device_named(gpu)
values = read_preset(path)
assumptions = Assumptions(utilisation=utilisation)
studied = values["01_train_sae"]["model"]
names = sorted({studied, explainer_name(values), twin})
models = {name: meta_model(name) for name in names}
rows = [
    {"model": name, "parameters, 1e9": count_parameters(model) / 1e9}
    | image_layout(model, assumptions.image)._asdict()
    for name, model in models.items()
]
pd.DataFrame(rows).style.format(precision=2).hide(axis="index")

# %% [markdown]
# `tokens` is the length of an image in the language model's sequence. `base`
# counts the patches of the whole image. The vision tower reads `crops`, each
# of `patches` patches.
#
# ## The prediction
#
# A stage's time is the sum over its kinds of work. A kind of work takes as long
# as the slower of two: its floating point operations at the GPU's published
# peak, or its bytes at the published bandwidth. We multiply peak and bandwidth
# by `utilisation`. This is a guess, and all hours are proportional to its
# inverse.
#
# The language model runs in 16 bits. The SAE is float32; its large products
# are in TF32 if the preset says so. We assume that some latents are dead from
# the first step on, so that AuxK works all the time. Threads prepare images
# while the GPU works. *Waiting for images* is the time that the GPU still has
# to wait.
#
# Eight GPUs divide samples, buffer and images among them. In training and
# caching, each GPU holds the whole language model and the SAE. In training,
# it sums gradients with the others at every step. The explainer is divided
# among the GPUs.
#
# No preset gives the values below. Those of the GPU come from its maker:
# memory in bytes, *float32* and *bfloat16* in FLOP/s, *bandwidth* and *link*
# (in one direction) in bytes/s. The others we assume.

# %%
plots.table([
    {"from": source, "name": name.replace("_", " ")}
    | {"value": f"{x:.4g}" if isinstance(x, float) else str(x)}
    for source, known in (("GPU", device), ("assumed", assumptions))
    for name, x in known._asdict().items()
])

# %%
given = dict(images=cached_images, assumptions=assumptions)
costs = {gpus: preset_costs(values, gpus=gpus, **given) for gpus in (1, 8)}
each = [(gpus, cost) for gpus, stages in costs.items() for cost in stages]
table = [cost.row(device, gpus, utilisation) for gpus, cost in each]
fits = f"fits {gpu}"
words = [row | {fits: "yes" if row[fits] else "no"} for row in table]
style = pd.DataFrame(words).style.format(precision=1, thousands=",")
style.hide(axis="index")

# %% mystnb={"figure": {"caption": "Predicted hours of each stage, by kind of work.", "name": "fig-hours"}, "image": {"alt": "Stacked bars of hours for three stages on one and on eight GPUs."}}
count = {1: "one GPU", 8: "eight GPUs"}
labels = [f"{row['stage']}, {count[row['GPUs']]}" for row in table]
hours = [cost.hours(device, gpus, utilisation) for gpus, cost in each]
plots.stacked(dict(zip(labels, hours, strict=True)), f"hours, {gpu}");
# %% [markdown]
# The table gives the tokens that the SAE or the explainer reads, in millions.
# It also gives the floating point operations of the whole stage, and the
# memory of one GPU, of the host and of the disk. Thin parts of the bars are
# hard to see; the bars of training matter most.
#
# *Reading* is the explainer's forward pass over a question with its images.
# *Writing* is its answer, token by token. *Adam* is the optimiser's pass over
# all weights of the SAE. *Sum over GPUs* is the exchange of gradients, which
# one GPU does not need. *AuxK* revives dead latents. The next lines say how
# much time TF32 and fewer latents of AuxK save, and how much bfloat16 would:

# %%
used = (
    "layer", "n_latents", "k", "steps", "batch_tokens", "buffer_tokens",
    "repeats", "batch_samples", "workers",
)  # fmt: skip
train = {name: values["01_train_sae"][name] for name in used}
k_aux = values["01_train_sae"]["k_aux"]
ways = {
    "float32 without TF32": dict(tf32=False, k_aux=k_aux),
    "TF32": dict(tf32=True, k_aux=k_aux),
    "bfloat16": dict(mixed_precision="bf16", k_aux=k_aux),
    "TF32, half of the width for AuxK": dict(tf32=True, k_aux=0),
}
for name, way in ways.items():
    cost = train_cost(
        models[studied], **train, **way, gpus=8, assumptions=assumptions
    )
    took = cost.hours(device, 8, utilisation)
    print(
        f"{name}: {sum(took.values()):.1f} hours on eight GPUs, the "
        f"encoder {took['SAE encoder']:.1f}, AuxK {took['AuxK']:.1f}"
    )

# %% [markdown]
# In bfloat16, rounding can change which latents are among the k largest. So can
# TF32, less often. `python -m lmm_sae_nb.benchmarks gpu` measures both, see
# [A2](A2_benchmarks).

# %% mystnb={"figure": {"caption": "Predicted memory of one GPU, by what needs it. The dashed line is the GPU's memory.", "name": "fig-memory"}, "image": {"alt": "Stacked bars of GPU memory for three stages on one and on eight GPUs, with the GPU's memory as a line."}}
of_gpu = [
    {name: bytes_ / 1e9 for name, bytes_ in cost.gpu.items()}
    for _, cost in each
]
memory = dict(zip(labels, of_gpu, strict=True))
plots.stacked(memory, "GB per GPU", limit=device.memory / 1e9);
# %% [markdown]
# ## Every page
#
# Does every page fit? Notebook 01 runs on eight GPUs, each other page on one.
# The table has the worst moment of each page. A page that attributes needs the
# model in float32. Page 05 keeps finished SAEs on the CPU. Models behind an
# endpoint run on other GPUs.

# %%
needs = page_needs(values, **given)
of_pages = page_rows(needs, device)
pd.DataFrame(of_pages).style.format(precision=1).hide(axis="index")

# %% [markdown]
# Which kind of work takes longest in the whole forecast? Training and caching
# have a known amount of work, so here are the pages that do them. Explaining is
# above. How long scoring, steering and questions take depends on the lengths
# of the answers.

# %% mystnb={"figure": {"caption": "Predicted hours of training and caching, by page and kind of work. Page 01 uses eight GPUs, the others one.", "name": "fig-page-hours"}, "image": {"alt": "Stacked bars of hours for pages 01, 02, 05 and 07, by kind of work."}}
of_kind = page_hours(values, cached_images, device, utilisation)
plots.stacked(
    {f"page {name}": parts for name, parts in of_kind.items()},
    f"hours, {gpu}",
);
# %% tags=["remove-input"]
page_, kind, most, of = dominating(of_kind)
largest = max(of_pages, key=lambda row: row["GB of one GPU"])
unfit = [row["page"] for row in of_pages if row[fits] == "no"]
findings(
    f"The longest line is {kind} on page {page_}: {most:.0f} of {of:.0f} "
    "hours.",
    f"Page {largest['page']} needs most memory: "
    f"{largest['GB of one GPU']:.0f} GB of one GPU. "
    + (f"Too large: {', '.join(unfit)}." if unfit else "Every page fits."),
)

# %% [markdown]
# ## The commands
#
# Run them from the repository's root, on the machine with the GPUs. First
# write the preset's data, as the head of its file explains. Each notebook
# uses one GPU. If several GPUs have trained the SAE, notebook 01 finds it and
# does not train it again.
#
# `accelerate` is in `.venv`: type `source .venv/bin/activate` first. vLLM is
# not part of this project: install it in an environment of its own.
#
# An explainer that does not fit one GPU needs a server that divides it among
# several. A preset names it as `name@http://host:port/v1`. Any server that
# speaks OpenAI's chat protocol will do. Start each server in a separate
# terminal.
#
# As printed, a server takes nearly all memory of its GPUs. Several servers, or
# servers and notebooks, may have to share GPUs. Then give each server its part
# with `--gpu-memory-utilization`. The right values depend on the models; we
# have not tried any.

# %%
for gpus in costs:
    for purpose, command in commands(preset, values, gpus).items():
        print(f"# {count[gpus]}: {purpose}\n{command}\n")

# %% [markdown]
# ## A geometry twin, run for real
#
# The twin has the model's real geometry:
#
# - crops of 336 px with 24 x 24 patches, up to four tiles and the base image;
# - 24 layers of vision and 32 of language, with grouped-query attention;
# - an SAE of $2^{17}$ latents with $k = 256$ on layer 24.
#
# Only its widths are smaller, and its weights are random. It runs the real
# classes and processor on this machine, once. It trains, caches, and
# attributes one decision on each picture to every active latent at every
# token. It runs no explainer.

# %%
stage = page.stage("full_scale")
model = geometry_twin(twin, twin_width, seed)
pictures = noise([assumptions.image] * twin_images, seed)
size = dict(n_latents=2**17, k=256, steps=twin_steps, seed=seed)
measured = stage.result(
    "twin", Metrics, lambda: run_twin(model, pictures, layer=24, **size)
)
twin_metrics = {f"twin_{name}": value for name, value in measured.items()}
predicted = cost_metrics(costs, device, utilisation)
of_page = {
    f"page_{name}_gb": sum(parts.values()) / 1e9
    for name, parts in needs.items()
}
metrics = stage.finish(predicted | of_page | twin_metrics)

# %% mystnb={"figure": {"caption": "The twin: the prediction from this machine's measured speed of products and copies, beside the measurement.", "name": "fig-twin"}, "image": {"alt": "Dots for predicted and measured seconds and gigabytes of training, caching and attribution."}}
left, right = plots.panels(2, inches=2.6)
seconds = predicted_and_measured(measured, "seconds")
plots.compared(seconds, "seconds", ax=left)
memory = predicted_and_measured(measured, "gb")
plots.compared(memory, "highest GB", ax=right);
# %% [markdown]
# **Check.** The predicted FLOPs are arithmetic on shapes. On the twin we can
# count them: PyTorch's own counter sees every product of one forward up to
# the layer. It does not see fused attention, so we switch that off. A square
# picture has fewer tiles, so this is quick.

# %%
square = (336, 336)
prompt = model.prompt("what is shown ?", noise([square], seed)[0])
counter = FlopCounterMode(display=False)
with counter, sdpa_kernel(SDPBackend.MATH):
    model.hidden_states(prompt, 24)
counted = counter.get_total_flops()
layout = image_layout(model.model, square)
tokens = prompt.inputs["input_ids"].shape[1]
flops = forward_flops(model.model, tokens, layout, 24)
assert abs(flops / counted - 1) < 0.02, (flops, counted)
print(f"{counted / 1e9:.2f} counted, {flops / 1e9:.2f} predicted GFLOPs")

# %% [markdown]
# ## Measured on a GPU
#
# `python -m lmm_sae_nb.benchmarks gpu` runs the paper's sizes on one GPU and
# predicts the same with these formulas, from the GPU's measured speed.

# %%
file = page.root / "book/gpu.json"
on_gpu = read_typed(file, dict) if file.is_file() else {}
if on_gpu:
    print("measured on", on_gpu["date"], "with", on_gpu["device"])
    plots.table(gpu_rows(on_gpu["results"]))
else:
    print("It has not been run yet.")

# %% tags=["hide-output"]
metrics_table(stage)

# %% [markdown]
# ## What we found

# %% tags=["remove-input"]
alone = costs[1][0].hours(device, 1, utilisation)  # training on one GPU
longest = max(alone, key=alone.get)
too_large = [
    f"On {count[row['GPUs']]}, the stage *{row['stage']}* is predicted not "
    "to fit."
    for row in table
    if not row[fits]
]
ratios, excess = (
    [pair["measured"] / pair["predicted"] for pair in pairs.values()]
    for pairs in (seconds, memory)
)
took = ", ".join(
    f"{name} {ratio:.1f} times"
    for name, ratio in zip(seconds, ratios, strict=True)
)
needed = memory["attribute"]
explainer_fits = next(
    row[fits] for row in table
    if (row["stage"], row["GPUs"]) == ("explain", 1)
)
findings(
    "Training is predicted to take at least "
    f"{metrics['train_hours_gpus_1']:.0f} hours on one {gpu} and "
    f"{metrics['train_hours_gpus_8']:.0f} on eight. On one, the longest "
    f"part is the {longest} ({alone[longest]:.0f} of "
    f"{sum(alone.values()):.0f} hours).",
    *too_large,
    f"Of all pages, {len(of_page) - len(unfit)} of {len(of_page)} are "
    f"predicted to fit one {gpu}; page {largest['page']} needs most, "
    f"{largest['GB of one GPU']:.0f} GB.",
    f"On the twin, each stage took longer than predicted, in one run each: "
    f"{took}. We do not know how much of this a GPU would show, so read "
    "the hours as a lower bound." if min(ratios) > 1 else
    f"Measured times over predicted ones on the twin, one run each: {took}.",
    f"The twin needed {min(excess):.2f} to {max(excess):.2f} times the "
    f"predicted memory. In attribution it needed {needed['measured']:.1f} "
    f"GB; the prediction is {needed['predicted']:.1f} GB.",
)

# %% [markdown]
# **Limits.** The forecasts above are arithmetic. The twin's products are
# narrow, a GPU's are wide. So the ratios of the twin do not say which
# `utilisation` a GPU reaches. A high ratio means that much of the work there is
# not in the prediction's list, such as that of Python and the processor. We
# predict no hours of attribution at the paper's scale, and we do not test
# explaining on the twin.

# %% tags=["result", "remove-input"]
headline(
    None,
    f"with `{path.name}`, training needs "
    f"{metrics['train_gb_per_gpu_gpus_1']:.0f} GB of one {gpu}; the "
    f"explainer needs {metrics['explain_gb_per_gpu_gpus_1']:.0f} GB and "
    f"{'fits' if explainer_fits else 'does not fit'} one. Training is "
    f"predicted to take at least {metrics['train_hours_gpus_1']:.0f} hours "
    f"on one GPU and {metrics['train_hours_gpus_8']:.0f} on eight. "
    f"{len(of_page) - len(unfit)} of {len(of_page)} pages are predicted to "
    "fit one GPU. "
    + ("" if on_gpu else "Nothing ran on a GPU. ")
    + "A narrow twin on a processor needed "
    f"{min(excess):.2f} to {max(excess):.2f} times its predicted memory; "
    f"measured over predicted times are: {took}.",
    "it reports neither its GPUs nor its hours.",
    "there is nothing to compare; this is a prediction from shapes and "
    "published peaks.",
)

# %% tags=["remove-input"]
provenance(page, stage)
