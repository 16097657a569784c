"""Section 2.4: which latents, at which tokens, make the model decide for one answer against another.

- `attribution`: the influence of every (token, latent) pair: by ablation, linearly, by integrated gradients.
- `agreement`: how well an approximation agrees with ablation, and what it costs.
- `study`: the comparison of all ways on many decisions, at several layers.
"""
