"""The sparse autoencoder (section 2.1, equations 1 and 2).

In reading order: `topk` (the SAE), `activation` (TopK and JumpReLU), `losses` (FVU and AuxK), `in_place` (the SAE at its layer of the model), `adam` (the
optimiser), `kernels` and `numba_loops` (the sparse products), `formats` (checkpoints of other libraries), `hub` (load
from and publish to the Hugging Face hub).
"""
