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
# # A2. What a training step costs
#
# **The question.** How long does one training step of a TopK SAE take on a CPU, and how much memory, here and in other
# libraries? And how long does the model take that it is trained on?
#
# **You will learn** what a step costs beside the one product that it cannot do without, where the rest of the time goes,
# and what it takes to measure the libraries against each other.
#
# **Reads** `book/benchmarks.json` and `book/cache_opening.json`, the last committed measurements.
# **Writes** nothing, unless `rerun` is set: then it measures the first again, which takes a quarter of an hour on an idle
# machine, needs a package registry the first time, and replaces that file. Time: seconds.

# %% tags=["parameters"]
run: str = "tiny"  # this page is the same for every run
rerun: bool = False  # measure now, instead of showing the last committed measurement

# %% tags=["remove-cell"]
import matplotlib.pyplot as plt
import torch

from lmm_sae_nb.benchmarks.comparison import bars, renew
from lmm_sae_nb.sae.adam import SAEAdam
from lmm_sae_nb.sae.losses import fvu
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.show import plots
from lmm_sae_nb.support.files import project_root, read_json

path = project_root() / "book/benchmarks.json"
plots.style()

# %% [markdown]
# ## What is measured
#
# A whole step: forward, backward, clipping, Adam, and what the library does to its dictionary's rows. No latent is dead.
# Each library runs its own classes, in a process of its own, on the same input. The *floor* is the one dense product that
# every exact TopK SAE has to make, `x @ W_enc.T`. It is timed in turns with the step, so that a ratio holds on a busy
# machine too. Memory is the highest that the process held, weights, moments and gradients included.
#
# A step here makes no gradient of shape (tokens, latents) and gathers no rows of shape (tokens · k, width): loops compiled
# by numba go through the dictionary once for the decoding, once for both of the decoder's gradients and once for the
# encoder's, a strip of columns at a time that stays in the processor's cache. TopK takes a bound from the maxima of groups
# of latents and looks only at what reaches it. Adam, clipping and the rows' unit length are two passes over the weights.
# Gradients lie in memory that is used again, for fresh pages can cost more than what is written to them.
#
# The step is the plain one, to rounding:

# %%
sae, same = (TopKSAE(64, 512, 8, generator=torch.Generator().manual_seed(0)) for _ in range(2))
x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
fvu(x, sae(x)).backward()
SAEAdam(sae, lr=1e-3).step()

z = torch.relu((x - same.b_dec) @ same.W_enc.T + same.b_enc)
z = z * (z >= z.topk(8).values[:, -1:])
fvu(x, z @ same.W_dec + same.b_dec).backward()
same.drop_parallel_gradient()
torch.nn.utils.clip_grad_norm_(same.parameters(), 1.0)
torch.optim.Adam(same.parameters(), lr=1e-3).step()
same.normalise_rows()
for ours, plain in zip(sae.parameters(), same.parameters(), strict=True):
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## What came out

# %%
measured = renew(path) if rerun else read_json(path)
machine = measured["machine"]
print("measured now" if rerun else "the last committed measurement", "·", measured["date"])
print(f"{machine['cpu']}, {machine['cores']} cores, {machine['vectors']}, {machine['system']}; load before: {machine['busy']}")
print(", ".join(f"{name} {version}" for name, version in measured["versions"].items()))

# %% mystnb={"figure": {"caption": "One training step on one thread. Left: its time as a multiple of the one dense product. Right: the highest memory of the process, in MB. Shorter is better; both axes are logarithmic.", "name": "fig-benchmarks"}}
one = [row for row in measured["results"] if row["threads"] == 1]
shapes = {f"{r['tokens']} tokens\nwidth {r['width']}\n{r['latents']} latents\nk {r['k']}": {} for r in one}
ratios, memory = ({shape: {} for shape in shapes} for _ in range(2))
for r in one:
    shape = f"{r['tokens']} tokens\nwidth {r['width']}\n{r['latents']} latents\nk {r['k']}"
    ratios[shape][r["system"]], memory[shape][r["system"]] = r["ratio"], r["peak_mb"]
_, (left, right) = plt.subplots(1, 2, figsize=(8, 4.2), sharey=True)
plots.bars(ratios, "multiples of the dense product", log=True, ax=left)
plots.bars(memory, "MB", log=True, ax=right)
right.get_legend().remove();

# %%
print("width  threads  system               step ms   floor ms  ratio   MB")
for r in measured["results"]:
    print(
        f"{r['width']:5d}  {r['threads']:7d}  {r['system']:19s} {r['step_ms']:9.1f} {r['floor_ms']:9.1f}  {r['ratio']:5.2f} {r['peak_mb']:6d}"
    )

# %% [markdown]
# ## What we found
#
# What was aimed at: at most 2.1, 1.8 and 2.5 times the floor; 1.6, 1.6 and 4 times faster than the fastest of the other
# libraries; less memory than each.

# %%
for row in (row | {"threads": n} for n in (1, 2) for row in bars(measured["results"], n)):
    print(
        f"{row['threads']} threads, width {row['width']:4d}: {row['ratio']:.2f} times the floor (aimed at {row['at_most']}), {row['faster']:.2f} times faster than the next ({row['at_least']}), "
        f"{row['peak_mb']} MB (the leanest peer {row['leanest_peer_mb']}): {'met' if row['met'] else 'NOT met'}"
    )

# %% [markdown]
# ## Opening a cache
#
# From a closed file whose pages the system has dropped from its memory to one latent's top images and patch maps, of latents
# at random; what was aimed at is 5 ms. `python -m lmm_sae_nb.benchmarks.cache_opening` measures it anew.

# %%
opened = read_json(project_root() / "book/cache_opening.json")
print(f"{opened['date']} · {opened['machine']['cpu']} · {opened['latents']:,} latents x top {opened['n_top']} x {opened['patches']} patches, {opened['megabytes']:.0f} MB")
print(f"cold: median {opened['cold_median']:.1f} ms, highest of {opened['read']} {opened['cold_highest']:.1f} ms, within 5 ms {opened['within_5_ms']:.0%}; warm: median {opened['warm_median']:.2f} ms")

# %% [markdown]
# Limits: one kind of machine and no GPU; random inputs; one chunk of tokens a step; the peers by their Python interface, of
# which sparsify has Triton kernels for GPUs that have no part in this.
