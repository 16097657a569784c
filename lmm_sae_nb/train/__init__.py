"""Training and evaluation of an SAE on a layer's hidden states (sections 2.1 and 3.1).

In reading order: `training` (`train_sae`), `sample_parts` (the order of samples), `token_buffer` (mix the tokens of
many samples), `kinds` (BatchTopK and Matryoshka), `state` and `steps` (what a training does), `evaluate` (measure on
held-out samples), `checkpoint` (continue after a kill), `launch` (several processes).
"""
