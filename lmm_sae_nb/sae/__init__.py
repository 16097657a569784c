"""The sparse autoencoder (section 2.1, equations 1 and 2).

In reading order: `topk` (the SAE), `activation` (how it chooses active latents), `losses` (FVU and AuxK), `in_place`
(the SAE at its layer of the model), `adam` (the optimiser), `kernels` and `numba_loops` (the sparse products),
`formats` (checkpoints), `libraries` (how each library writes them), `hook_names` (the place that each library says its
SAE reads), `folding` (all kinds in one form), `weight_files`, `hub` (load from and publish to the Hugging Face hub).
"""
