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
# # 7. Attribute a decision to latents and tokens
#
# **The question.** Section 2.4: the model answers *yes* and not *no*. Which latents, at which tokens, made it do so?
#
# **You will learn** what silencing one latent at one token does, how one forward and one backward approximate that for
# all of them at once, and how good the approximation is when every single one is checked.
#
# **Reads** the model and `train/`. **Writes** `attribute/`: each decision's agreement of approximation and truth.
#
# | preset | decisions | time |
# |---|---|---|
# | `tiny` | 100 held-out questions, every active pair sampled evenly | 3 minutes, 2 cores |
# | `paper` | any image and question | GPUs |

# %% tags=["parameters"]
run: str = "tiny"  # results go to data/artifacts/<run>/
model: str = "data/models/tiny-llava-next"  # a folder of this project, or a name on the hub
heldout: str = "data/artifacts/tiny/world/heldout"  # samples with image and question, none of them seen in training
layer: int = 4  # 0-based, the layer that the SAE was trained on
answer: str = "yes"  # v_c; one token
baseline: str = "no"  # v_b; one token
decisions: int = 100  # questions that are answered with one of the two
pairs: int = 64  # (token, latent) pairs of each decision that are ablated for comparison; 0 for all
steps: int = 8  # of integrated gradients
seed: int = 0  # of the choice of pairs

# %% tags=["remove-cell"]
import time

import numpy as np
import torch
from datasets import load_from_disk
from IPython.display import HTML
from scipy.stats import spearmanr
from torch.testing import assert_close

from lmm_sae_nb import attribution, plots
from lmm_sae_nb.artifacts import Stage, project_root, read_json, require, write_json
from lmm_sae_nb.lmm import LMM
from lmm_sae_nb.sae import TopKSAE
from lmm_sae_nb.score import mean_interval

root = project_root()
plots.style()
