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
# # A3. Full scale: what it takes, before you rent it
#
# **The question.** What memory, disk, time and commands does the paper's own scale need, and how far can that be known
# on a machine without a GPU?
#
# **You will learn** what each stage costs on one GPU and on eight, what decides it, and how close such a forecast comes
# when it is held against a run.
#
# **Reads** a preset's file, nothing else. **Writes** `full_scale/`: the forecast, and what a *geometry twin* measured.
# Time: one minute on 2 cores.

# %% tags=["parameters"]
run: str = "tiny"  # results go to data/artifacts/<run>/
preset: str = "notebooks/params/paper.yaml"  # what is forecast
gpu: str = "A100 80GB"  # one of forecast.DEVICES
cached_images: int = 46684  # images that notebook 02 caches; the paper's number
utilisation: float = 0.4  # share of the GPU's published peaks that is reached
twin: str = "llava-hf/llama3-llava-next-8b-hf"  # the model whose geometry is run for real
twin_width: int = 64  # width of its decoder; the model's own is 4096
twin_images: int = 3  # pictures that the twin sees
twin_steps: int = 2  # optimiser steps of the twin's training, 1024 tokens each
seed: int = 0  # of the twin's weights and pictures

# %% tags=["remove-cell"]
import time

import matplotlib.pyplot as plt
import pandas as pd

from lmm_sae_nb.full_scale import costs
from lmm_sae_nb.full_scale import geometry_twin as twin_module
from lmm_sae_nb.full_scale.geometry_twin import geometry_twin, noise, run_twin
from lmm_sae_nb.show import plots
from lmm_sae_nb.support.files import project_root, read_json
from lmm_sae_nb.support.stages import Stage

root = project_root()
plots.style()

# %% [markdown]
# ## The models
#
# The models of the preset are built as their true classes without memory for the weights (torch's *meta* device), so the
# numbers of parameters are counted, not looked up. The layout of an image's tokens is the model's own, too.

# %%
path = root / preset
values, device = costs.read_preset(path), costs.DEVICES[gpu]
assumed = costs.Assumed(utilisation=utilisation)
names = sorted({values["01_train_sae"]["model"], costs.explainer_of(values), twin})
models = {name: costs.meta_model(name) for name in names}
pd.DataFrame(
    [(n, costs.parameters(m) / 1e9, *costs.picture(m, assumed.image)) for n, m in models.items()],
    columns=["model", "parameters, 1e9", "tokens an image", "of the base image", "crops", "patches a crop"],
).style.format(precision=2, thousands=",").hide(axis="index")

# %% [markdown]
# ## The forecast
#
# A stage's time is the sum over its kinds of work of the longer of two: its floating point operations at the GPU's
# published peak, its bytes at the published bandwidth, both times `utilisation`. The language model runs in 16 bits, the SAE
# in float32 without TF32. On eight GPUs samples, buffer and images are divided; each GPU holds the language model and the
# SAE, and sums gradients with the others at every step. What no preset says is assumed:

# %%
print(device)
print(assumed)

# %%
rows = [(gpus, cost) for gpus in (1, 8) for cost in costs.costs(values, cached_images, gpus=gpus, assumed=assumed)]


def gb(needs):
    return sum(needs.values()) / 1e9


pd.DataFrame(
    [
        (cost.stage, gpus, cost.tokens / 1e6, sum(part.flops for part in cost.parts) / 1e18, gb(cost.gpu), gb(cost.host),
         gb(cost.disk), sum(cost.hours(device, gpus, utilisation).values()), gb(cost.gpu) < device.memory / 1e9)
        for gpus, cost in rows
    ],
    columns=["stage", "GPUs", "tokens, 1e6", "1e18 FLOPs", "GB a GPU", "GB host", "GB disk", "hours", f"fits {gpu}"],
).style.format(precision=1, thousands=",").hide(axis="index")  # fmt: skip

# %% mystnb={"figure": {"caption": "Hours of each stage, by kind of work.", "name": "fig-hours"}}
labels = [f"{cost.stage}, {gpus} GPU{'s' * (gpus > 1)}" for gpus, cost in rows]
hours = [cost.hours(device, gpus, utilisation) for gpus, cost in rows]
plots.stacked(dict(zip(labels, hours, strict=True)), f"hours, {gpu}");
# %% [markdown]
# The SAE's dense product in float32 can be the larger half of the training. In bfloat16 it would be:

# %%
train = {name: values["01_train_sae"][name] for name in ("layer", "n_latents", "k", "steps", "batch_tokens")}
lmm = models[values["01_train_sae"]["model"]]
for gpus in (1, 8):
    halved = costs.train_cost(lmm, **train, gpus=gpus, mixed_precision="bf16", assumed=assumed)
    print(f"{gpus} x {gpu}: {sum(halved.hours(device, gpus, utilisation).values()):.1f} hours")

# %% mystnb={"figure": {"caption": "Memory of one GPU, by what needs it. The dashed line is what it has.", "name": "fig-memory"}}
needs = [{name: need / 1e9 for name, need in cost.gpu.items()} for _, cost in rows]
plots.stacked(dict(zip(labels, needs, strict=True)), "GB a GPU", limit=device.memory / 1e9);
# %% [markdown]
# Notebook 04 measures against ground truth on the processor alone and is not forecast. An explainer that does not fit one GPU
# is to be served by a server that divides it.
#
# ## The commands
#
# From the repository's root, on the machine with the GPUs, once the preset's data is written (its file says how). The
# notebooks themselves use one GPU; a training that several have finished is taken up by notebook 01 as its own.

# %%
for gpus in (1, 8):
    for what, command in costs.commands(path, values, gpus).items():
        print(f"# {gpus} GPU{'s' * (gpus > 1)}: {what}\n{command}\n")

# %% [markdown]
# ## A geometry twin, run for real
#
# The twin has the model's real geometry: 336 px crops of 24 x 24 patches, up to four tiles and the base image, 24 layers of
# vision, 32 of language, grouped heads, the SAE of $2^{17}$ latents with $k = 256$ on layer 24. Only its widths are narrow and its weights
# random. It goes through the true classes, the true processor, training, caching and attribution (of one decision
# on each picture, to every active latent at every token) on this machine's processor.

# %%
stage, code = Stage(run, "full_scale"), [costs, twin_module]
params = dict(
    preset=preset, gpu=gpu, cached_images=cached_images, utilisation=utilisation, twin=twin, twin_width=twin_width,
    twin_images=twin_images, twin_steps=twin_steps, seed=seed,
)  # fmt: skip
if not stage.is_current(params, [path], code):
    started = time.monotonic()
    metrics = {f"{c.stage}_hours_gpus_{gpus}": sum(c.hours(device, gpus, utilisation).values()) for gpus, c in rows}
    metrics |= {f"{c.stage}_gb_a_gpu_gpus_{gpus}": gb(c.gpu) for gpus, c in rows}
    lmm, pictures = geometry_twin(twin, twin_width, seed), noise([assumed.image] * twin_images, seed)
    measured = run_twin(lmm, pictures, layer=24, n_latents=2**17, k=256, steps=twin_steps, seed=seed)
    metrics |= {f"twin_{name}": value for name, value in measured.items()}
    stage.finish(params, [path], metrics, time.monotonic() - started, code)
metrics = read_json(stage.path("metrics.json"))

# %% mystnb={"figure": {"caption": "The twin: forecast from this machine's measured speed of products and copies, at full utilisation, beside what was measured.", "name": "fig-twin"}}
twins = {
    unit: {
        stage: {"forecast": metrics[f"twin_{stage}_{unit}_forecast"], "measured": metrics[f"twin_{stage}_{unit}"]}
        for stage in ("train", "cache", "attribute")
    }
    for unit in ("seconds", "gb")
}
_, axes = plt.subplots(1, 2, figsize=(8, 2.1))
for ax, (unit, found) in zip(axes, twins.items(), strict=True):
    plots.compared(found, {"seconds": "seconds", "gb": "GB at the most"}[unit], ax=ax)
# %%
pd.DataFrame(
    [
        (stage, unit, *row.values(), row["measured"] / row["forecast"])
        for unit, found in twins.items()
        for stage, row in found.items()
    ],
    columns=["twin", "unit", "forecast", "measured", "ratio"],
).style.format(precision=2).hide(axis="index")

# %% [markdown]
# **Check.** The forecast's FLOPs are arithmetic on shapes. On the twin they can be counted while it runs: PyTorch's own
# counter sees every product of one forward up to the layer.

# %%
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

small = geometry_twin(twin, twin_width, seed)
prompt = small.prompt("what is shown ?", noise([assumed.image], seed)[0])
with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused one is not counted
    small.hidden_states(prompt, 24)
tokens, image = prompt.inputs["input_ids"].shape[1], costs.picture(small.model, assumed.image)
counted, reckoned = counter.get_total_flops(), costs.reading_flops(small.model, tokens, image, 24)
assert abs(reckoned / counted - 1) < 0.02, (reckoned, counted)
print(f"counted {counted / 1e9:.2f}, forecast {reckoned / 1e9:.2f} GFLOPs for {tokens:,} tokens")

# %% [markdown]
# ## What we found
#
# What decides the hours is in the first figure, what does not fit in the second. The forecast of the twin's memory and time
# stands beside what was measured. The limits: no GPU has run any of it; the twin's narrow products are far from a GPU's,
# so that its ratio says how complete the forecast's list of work is, not what `utilisation` a GPU reaches.

# %% tags=["hide-input"]
manifest = read_json(stage.path("manifest.json"))
print(f"run {run} · forecast of {preset} · {manifest['seconds']:.0f} s · {manifest['versions']}")
