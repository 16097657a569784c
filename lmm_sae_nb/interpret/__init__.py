"""Section 2.2: a larger model looks at the images that excite a latent and says what the latent means.

Read in this order: `choice` (the latents that are asked about), `exemplars` (the images and their visible patches),
`explainers` (explainer, refiner and labeller, and how their replies are understood), `explain` (from exemplars to
explanations), `open` (the three models of a page).
"""
